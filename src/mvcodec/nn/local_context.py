"""Local context: checkerboard window attention of a non-anchor over the anchors of its 5x5 window (MLIC, 3.4.2).

In a 5x5 window centred on a non-anchor, 12 positions are anchors. Their attention weights come from the channel (or
hyperprior) context; the weighted neighbours keep their places and are joined by one linear map, MLIC's K x K
convolution after attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.exact.arithmetic import Block
from mvcodec.exact.conv import Conv
from mvcodec.nn.checkerboard import split


class CheckerboardAttention(Block):
    """Context of non-anchors from anchors: -> [B, C_out, H, W / 2]."""

    def __init__(self, channels: int, guide_channels: int, channels_out: int, window: int = 5) -> None:
        super().__init__()
        self.reach = window // 2
        span = range(-self.reach, self.reach + 1)
        self.offsets = [(dy, dx) for dy in span for dx in span if (dy + dx) % 2]
        self.query = Conv(guide_channels, channels, 1)
        self.key = Conv(channels, channels, 1)
        self.position = nn.Parameter(torch.zeros(len(self.offsets), 1, 1))
        self.join = Conv(len(self.offsets) * channels, channels_out, 1)
        self.out = Conv(channels_out, channels_out, 1)

    def forward(self, anchor_full: Tensor, guide: Tensor) -> Tensor:
        """anchor_full [B, C, H, W] with non-anchors zero; guide [B, G, H, W / 2] at the non-anchors."""
        height, width = anchor_full.shape[-2:]
        near = self._neighbours(anchor_full, height, width)  # [B, 12, C, H, W / 2]
        keys = self._neighbours(self.key(anchor_full), height, width)
        a = self.arithmetic
        weighted = a.attend_neighbours(self.query(guide)[:, None], keys, near, self.position)
        return self.out(a.leaky(self.join(weighted.flatten(1, 2))))

    def _neighbours(self, full: Tensor, height: int, width: int) -> Tensor:
        r = self.reach
        padded = F.pad(full, (r, r, r, r))
        shifted = [padded[:, :, r + dy : r + dy + height, r + dx : r + dx + width] for dy, dx in self.offsets]
        return split(torch.stack(shifted, dim=1))[1]
