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
        both = a.widened(torch.cat((self.key(anchor), anchor), dim=1))
        keys, near = self._neighbours(both).chunk(2, dim=2)
        weighted = a.attend_neighbours(self.query(guide), keys, near, self.position)
        # `flatten(1, 2)` would do, but of one view leaves strides that oneDNN does not take for channels last
        return self.out(a.leaky(self.join(weighted.permute(0, 3, 4, 1, 2).flatten(3).permute(0, 3, 1, 2))))

    def _neighbours(self, anchor: Tensor) -> Tensor:
        """Per offset, the anchor at that place from each non-anchor: [B, S, C, H, W / 2], zero outside.

        Packed rows: non-anchor j of an odd row stands in column 2 j + 1, of an even row in 2 j; anchors the other way
        round. A neighbour in a row of the other parity is dx / 2 further; in one of the same, (dx - 1) / 2 from even
        rows and (dx + 1) / 2 from odd ones.
        """
        batch, channels, height, width = anchor.shape
        up, side = self.reach, self.reach // 2 + 1
        padded = F.pad(anchor, (side, side, up, up)).permute(0, 2, 3, 1)
        found = anchor.new_empty(batch, height, width, len(self.offsets), channels)
        for n, (dy, dx) in enumerate(self.offsets):
            # all rows together where they are shifted alike, else those of either parity
            shifts = ((0, 1, dx // 2),) if dy % 2 else ((0, 2, (dx - 1) // 2), (1, 2, (dx + 1) // 2))
            for first, step, right in shifts:
                rows = slice(up + dy + first, up + dy + height, step)
                found[:, first::step, :, n] = padded[:, rows, side + right : side + right + width]
        return found.permute(0, 3, 4, 1, 2)
