"""The networks, one paper block per file. Shapes are [B, C, H, W]; a set of K views is [B, K, C, H, W]."""
