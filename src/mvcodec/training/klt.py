"""Statistics for the KLT start: principal components of blocks of 16 x 16 pixels and three colours."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvcodec.nn.transforms import BLOCK, PIXELS
from mvcodec.training.data import Scene


def block_covariance(scenes: list[Scene], blocks_per_view: int = 2000, seed: int = 0) -> Tensor:
    """Second moments about 0.5 of 16x16 RGB blocks, [768, 768] float64, in the order of a 2x2 convolution at 1/8."""
    rng = np.random.default_rng(seed)
    total = torch.zeros(4 * PIXELS, 4 * PIXELS, dtype=torch.float64)
    count = 0
    side = 2 * BLOCK
    for scene in scenes:
        for view in scene.views:
            height, width = view.shape[:2]
            if min(height, width) < side:
                continue
            rows = rng.integers(0, height - side + 1, blocks_per_view)
            columns = rng.integers(0, width - side + 1, blocks_per_view)
            blocks = np.stack([view[r : r + side, c : c + side] for r, c in zip(rows, columns, strict=True)])
            x = torch.from_numpy(blocks).permute(0, 3, 1, 2).float() / 255 - 0.5
            flat = F.pixel_unshuffle(x, BLOCK).flatten(1).double()  # [n, 192 * 2 * 2]
            total += flat.T @ flat
            count += blocks_per_view
    return total / count
