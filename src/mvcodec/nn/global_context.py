"""Parallax global context module, PGCM (Eq. (19)): non-anchors attend to all anchors of the slice.

Queries and keys come from the channel context (slice 0: from the hyperprior, as in MLICv2), values from the anchors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvcodec.nn.checkerboard import merge, split
from mvcodec.nn.layers import DepthResidualBlock
from mvcodec.nn.parallax_attention import CHUNK_ELEMENTS


def attend_anchors(query: Tensor, key: Tensor, value: Tensor, chunk: int = CHUNK_ELEMENTS) -> Tensor:
    """softmax(Q K^T / sqrt(C)) V over half-grids [B, C, H, W / 2], queries in chunks (exact)."""
    q, k, v = (x.flatten(2).transpose(1, 2) for x in (query, key, value))  # [B, P, C]
    step = max(1, chunk // (k.shape[0] * k.shape[1]))
    parts = [
        ((q[:, s : s + step] * q.shape[-1] ** -0.5) @ k.transpose(1, 2)).softmax(dim=-1).to(v.dtype) @ v
        for s in range(0, q.shape[1], step)
    ]
    return torch.cat(parts, dim=1).transpose(1, 2).unflatten(2, query.shape[2:])


class ParallaxGlobalContext(nn.Module):
    """PGCM: -> [B, C_out, H, W / 2] at the non-anchors."""

    def __init__(self, channels: int, guide_channels: int, channels_out: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(guide_channels, channels, 1)
        self.key = nn.Conv2d(guide_channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.conv = nn.Conv2d(channels, channels_out, 1)
        self.depth_rb = DepthResidualBlock(channels_out, channels_out)

    def forward(self, anchor: Tensor, guide: Tensor) -> Tensor:
        """anchor [B, C, H, W / 2] values; guide [B, G, H, W], of which only decoded slices were the source."""
        guide_anchor, guide_other = split(guide)
        value = self.value(anchor)
        attended = attend_anchors(self.query(guide_other), self.key(guide_anchor), value)
        return split(self.depth_rb(self.conv(merge(value, attended))))[1]
