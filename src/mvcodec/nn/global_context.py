"""Parallax global context module, PGCM (Eq. (19)): non-anchors attend to all anchors of the slice.

Attention stays within square tiles, so that its cost grows with the picture's area and not with the area's square.
Queries and keys come from the channel context (slice 0: from the hyperprior, as in MLICv2), values from the anchors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mvcodec.exact.arithmetic import FLOAT, Arithmetic, Block
from mvcodec.exact.conv import Conv
from mvcodec.nn.checkerboard import merge, split
from mvcodec.nn.layers import DepthResidualBlock
from mvcodec.nn.parallax_attention import entries_at_once, whole_and_rest


def attend_anchors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tile: int = 0,
    chunk: int | None = None,
    arithmetic: Arithmetic = FLOAT,
) -> Tensor:
    """softmax(Q K^T / sqrt(C)) V over half-grids [B, C, H, W / 2], queries in chunks (exact).

    tile: attention stays within tiles of so many positions a side; 0 lets it reach everywhere.
    """
    chunk = chunk or entries_at_once(query.device)
    height, width = query.shape[2:]
    if tile and (height > tile or width > tile // 2):
        rows = []
        for down in whole_and_rest(height, tile):
            row = []
            for across in whole_and_rest(width, tile // 2):
                grid = -(-(down.stop - down.start) // tile), -(-2 * (across.stop - across.start) // tile)
                q, k, v = (_cut(x[..., down, across], grid) for x in (query, key, value))
                most = max(1, chunk // (q.shape[2] * q.shape[3]) ** 2)  # tiles at once
                groups = zip(q.split(most), k.split(most), v.split(most), strict=True)
                parts = [attend_anchors(q, k, v, 0, chunk, arithmetic) for q, k, v in groups]
                row.append(_joined(torch.cat(parts), grid))
            rows.append(torch.cat(row, dim=-1))
        return torch.cat(rows, dim=-2)
    q, k, v = (x.permute(0, 2, 3, 1).flatten(1, 2) for x in (query, key, value))  # [B, P, C]
    step = max(1, chunk // (k.shape[0] * k.shape[1]))
    parts = [arithmetic.attend(part, k, v, q.shape[-1] ** -0.5) for part in q.split(step, dim=1)]
    found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return found.unflatten(1, query.shape[2:]).permute(0, 3, 1, 2)


def _cut(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, C, n h, m w] -> its tiles [B n m, C, h, w], channels last."""
    tiles = x.permute(0, 2, 3, 1).unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))  # [B, n, h, m, w, C]
    return tiles.transpose(2, 3).flatten(0, 2).permute(0, 3, 1, 2)


def _joined(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of `_cut`."""
    rows = tiles.permute(0, 2, 3, 1).unflatten(0, (-1, *grid)).transpose(2, 3)  # [B, n, h, m, w, C]
    return rows.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class ParallaxGlobalContext(Block):
    """PGCM: -> [B, C_out, H, W / 2] at the non-anchors."""

    def __init__(self, channels: int, guide_channels: int, channels_out: int, tile: int = 0) -> None:
        super().__init__()
        self.tile = tile
        self.query = Conv(guide_channels, channels, 1)
        self.key = Conv(guide_channels, channels, 1)
        self.value = Conv(channels, channels, 1)
        self.conv = Conv(channels, channels_out, 1)
        self.depth_rb = DepthResidualBlock(channels_out, channels_out)

    def forward(self, anchor: Tensor, guide: Tensor) -> Tensor:
        """anchor [B, C, H, W / 2] values; guide [B, G, H, W], of which only decoded slices were the source."""
        guide_anchor, guide_other = split(guide)
        value = self.value(anchor)
        query, key = self.query(guide_other), self.key(guide_anchor)
        attended = attend_anchors(query, key, value, self.tile, arithmetic=self.arithmetic)
        return split(self.depth_rb(self.conv(merge(value, attended))))[1]
