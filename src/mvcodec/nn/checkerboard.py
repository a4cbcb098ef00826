"""The passes of a slice: anchors where (row + column) is odd, as in MLIC and LDMIC, then non-anchors.

Half-grids are packed to [B, C, H, W / 2], so that nothing is computed where nothing is coded. H and W are multiples of
4: pictures are padded to multiples of 64.

On a *lattice*, anchors take three passes. The even rows of their half-grid are a grid of half the resolution, which is
coded as a checkerboard of its own; the odd rows lie between. Seven eighths of a slice then know neighbours, not half.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def passes(full: Tensor, lattice: bool) -> list[Tensor]:
    """Of a slice [.., H, W], what is coded at a time, in coding order.

    [.., H, W / 2] twice, or on a lattice [.., H / 2, W / 4] twice, [.., H / 2, W / 2] and [.., H, W / 2].
    """
    anchor, non_anchor = split(full)
    return [*split(anchor[..., 0::2, :]), anchor[..., 1::2, :], non_anchor] if lattice else [anchor, non_anchor]


def assembled(parts: Sequence[Tensor]) -> Tensor:
    """Inverse of `passes`."""
    *anchors, non_anchor = parts
    anchor = anchors[0] if len(anchors) == 1 else anchors_of(merge(*anchors[:2]), anchors[2])
    return merge(anchor, non_anchor)


def anchors_of(even: Tensor, odd: Tensor) -> Tensor:
    """Even and odd rows of the packed anchors, [.., H / 2, W / 2] each -> [.., H, W / 2]."""
    full = torch.cat((even, odd), dim=-2)  # of the same layout; every value is then written
    full[..., 0::2, :], full[..., 1::2, :] = even, odd
    return full
