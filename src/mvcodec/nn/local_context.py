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
from mvcodec.nn.checkerboard import odd_rows


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

    def forward(self, anchor: Tensor, guide: Tensor) -> Tensor:
        """anchor [B, C, H, W / 2] values; guide [B, G, H, W / 2] at the non-anchors."""
        a = self.arithmetic
        keys, near = self._neighbours(torch.cat((self.key(anchor), anchor), dim=1)).chunk(2, dim=2)
        weighted = a.attend_neighbours(self.query(guide), keys, near, self.position)
        return self.out(a.leaky(self.join(weighted)))

    def _neighbours(self, anchor: Tensor) -> Tensor:
        """Per offset, the anchor at that place from each non-anchor: [B, S, C, H, W / 2], zero outside.

        Packed rows: non-anchor j of an odd row stands in column 2 j + 1, of an even row in 2 j; anchors the other way
        round. A neighbour in a row of the other parity is dx / 2 further; in one of the same, (dx - 1) / 2 from even
        rows and (dx + 1) / 2 from odd ones.
        """
        height, width = anchor.shape[-2:]
        up, side = self.reach, self.reach // 2 + 1
        padded = F.pad(anchor, (side, side, up, up))
        odd_row = odd_rows(height, anchor.device)

        def shifted(dy: int, steps: int) -> Tensor:
            return padded[..., up + dy : up + dy + height, side + steps : side + steps + width]

        return torch.stack(
            [
                shifted(dy, dx // 2)
                if dy % 2
                else torch.where(odd_row, shifted(dy, (dx + 1) // 2), shifted(dy, (dx - 1) // 2))
                for dy, dx in self.offsets
            ],
            dim=1,
        )
