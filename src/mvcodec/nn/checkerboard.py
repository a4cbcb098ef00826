"""The two passes of a slice: anchors where (row + column) is odd, as in MLIC and LDMIC, and non-anchors.

Half-grids are packed to [B, C, H, W / 2], so that nothing is computed where nothing is coded. W is even: pictures are
padded to multiples of 64.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def odd_rows(height: int, device: torch.device) -> Tensor:
    """[H, 1], true in rows 1, 3, ..."""
    return _odd_rows(height, device, torch.is_inference_mode_enabled())


@lru_cache(maxsize=8)
def _odd_rows(height: int, device: torch.device, inference: bool) -> Tensor:
    """What is made in inference mode cannot be trained with, hence the third argument."""
    return (torch.arange(height, device=device) % 2 == 1)[:, None]


def split(full: Tensor) -> tuple[Tensor, Tensor]:
    """[.., H, W] -> (anchors, non-anchors), each [.., H, W / 2]."""
    even, odd = full[..., 0::2], full[..., 1::2]
    row_is_odd = odd_rows(full.shape[-2], full.device)
    return torch.where(row_is_odd, even, odd), torch.where(row_is_odd, odd, even)


def merge(anchor: Tensor, non_anchor: Tensor) -> Tensor:
    """Inverse of `split`."""
    row_is_odd = odd_rows(anchor.shape[-2], anchor.device)
    even = torch.where(row_is_odd, anchor, non_anchor)
    odd = torch.where(row_is_odd, non_anchor, anchor)
    return torch.stack([even, odd], dim=-1).flatten(-2)
