"""The two passes of a slice: anchors where (row + column) is odd, as in MLIC and LDMIC, and non-anchors.

Half-grids are packed to [B, C, H, W / 2], so that nothing is computed where nothing is coded. W is even: pictures are
padded to multiples of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(full: Tensor) -> tuple[Tensor, Tensor]:
    """[.., H, W] -> (anchors, non-anchors), each [.., H, W / 2]."""
    anchor, non_anchor = (torch.empty_like(full[..., 0::2]) for _ in range(2))
    for row in (0, 1):
        anchor[..., row::2, :] = full[..., row::2, 1 - row :: 2]
        non_anchor[..., row::2, :] = full[..., row::2, row::2]
    return anchor, non_anchor


def merge(anchor: Tensor, non_anchor: Tensor) -> Tensor:
    """Inverse of `split`."""
    full = torch.cat((anchor, anchor), dim=-1)  # of the same layout; every value is then written
    for row in (0, 1):
        full[..., row::2, 1 - row :: 2] = anchor[..., row::2, :]
        full[..., row::2, row::2] = non_anchor[..., row::2, :]
    return full
