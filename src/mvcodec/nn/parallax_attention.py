"""Parallax attention along rows or columns, and OPAM, its two stages in sequence (Eq. (7)-(13)).

    e_u, e_v --SKM--> Q, K      M = Q K^T per row            Eq. (8)
                                M_{v->u} = softmax(M)        Eq. (9)
    C_u = sum_j M_{v->u}[i,j] M_{u->v}[j,i]                  Eq. (10)
    f^t_u = M_{v->u} f_v                                     Eq. (11)

Rows are independent, so the work is done in chunks of rows of bounded memory; chunking changes no result. The entropy
model also cuts rows and columns into segments, beyond which nothing is matched: its cost then grows with the picture's
area, and there is no disparity to find between the slices of one view.
M_{u->v} is softmax(M^T), whose entry [j, i] is the softmax of M over its first axis at [i, j]: the consistency is an
elementwise product and sum, and no W x W x W product is ever formed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvcodec.exact.arithmetic import FLOAT, Arithmetic, Block
from mvcodec.nn.selective_kernel import SelectiveKernel


def entries_at_once(device: torch.device) -> int:
    """Attention entries to hold: few enough for a processor's cache, enough to keep a GPU busy (some 200 MB)."""
    return 1 << 17 if device.type == "cpu" else 1 << 22


class Aligned(NamedTuple):
    """A side source seen from the main one."""

    feature: Tensor  # [N, C, H, W]
    consistency: Tensor  # [N, 1, H, W] in [0, 1]


class SourceFeatures(NamedTuple):
    """What OPAM needs of one source, computed once however many others it meets."""

    value: Tensor  # e [N, C, H, W]
    row_key: Tensor  # SKM of the horizontal stage
    column_key: Tensor  # SKM of the vertical stage


def whole_and_rest(length: int, tile: int) -> list[slice]:
    """The part that whole tiles fill, and what remains: tiles, or segments, of one size are attended together."""
    whole = length // tile * tile
    return [part for part in (slice(0, whole), slice(whole, length)) if part.stop > part.start]


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    segment: int = 0,
    chunk: int | None = None,
    arithmetic: Arithmetic = FLOAT,
) -> Aligned:
    """HPA, Eq. (8)-(11): query, key [N, C, H, W], value [N, D, H, W]; every row attends to the same row.

    segment: rows are cut into pieces of so many positions, each attending to itself; 0 leaves them whole.
    """
    n, _, height, width = query.shape
    chunk = chunk or entries_at_once(query.device)
    if 0 < segment < width:
        pieces = []
        for part in whole_and_rest(width, segment):
            size = n, height, -(-(part.stop - part.start) // segment)
            q, k, v = (_rows(x[..., part], size[2]) for x in (query, key, value))
            pieces.append([x.unflatten(0, size).flatten(2, 3) for x in _attended(q, k, v, scale, chunk, arithmetic)])
        found = pieces[0] if len(pieces) == 1 else [torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)]
    else:
        q, k, v = (_rows(x, 1) for x in (query, key, value))
        found = [x.unflatten(0, (n, height)) for x in _attended(q, k, v, scale, chunk, arithmetic)]
    return Aligned(*(x.permute(0, 3, 1, 2) for x in found))


def _rows(x: Tensor, count: int) -> Tensor:
    """[N, C, H, W] -> each of its rows in `count` pieces, [N H count, W / count, C]."""
    return x.permute(0, 2, 3, 1).unflatten(2, (count, -1)).flatten(0, 2)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, scale: float, chunk: int, arithmetic: Arithmetic
) -> list[Tensor]:
    """Rows [R, W, C] -> feature [R, W, D] and consistency [R, W, 1], so many entries of attention at a time."""
    step = max(1, chunk // query.shape[1] ** 2)
    parts = zip(query.split(step), key.split(step), value.split(step), strict=True)
    found = [arithmetic.attend_both_ways(*part, scale) for part in parts]
    return list(found[0]) if len(found) == 1 else [torch.cat(pieces) for pieces in zip(*found, strict=True)]


def attend_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    segment: int = 0,
    chunk: int | None = None,
    arithmetic: Arithmetic = FLOAT,
) -> Aligned:
    """VPA: HPA with rows and columns exchanged."""
    turned = attend_rows(query.mT, key.mT, value.mT, scale, segment, chunk, arithmetic)
    return Aligned(turned.feature.mT, turned.consistency.mT)


def attend_everywhere(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    segment: int = 0,
    chunk: int | None = None,
    arithmetic: Arithmetic = FLOAT,
) -> Aligned:
    """Full two-dimensional attention, O(N^4): the paper's `2D attention` ablation, as one row of H W positions."""
    q, k, v = (x.flatten(2)[:, :, None] for x in (query, key, value))
    flat = attend_rows(q, k, v, scale, segment, chunk, arithmetic)
    return Aligned(*(x.reshape(*x.shape[:2], *query.shape[2:]) for x in flat))


class OmniParallaxAttention(Block):
    """OPAM, Eq. (12)-(13): rows first, then columns of what the rows brought; C = C_hor * C_ver.

    mode: "opam", or an ablation: "hpa" (rows only), "vpa" (columns only), "attention2d", "average" (LDMIC's joint
    context transfer: no alignment, all sources alike).
    """

    def __init__(self, channels: int, mode: str = "opam", segment: int = 0) -> None:
        super().__init__()
        self.mode = mode
        self.segment = segment
        self.scale = channels**-0.5
        self.row_skm = SelectiveKernel(channels) if mode in ("opam", "hpa", "attention2d") else None
        self.column_skm = SelectiveKernel(channels) if mode in ("opam", "vpa") else None

    def features(self, value: Tensor) -> SourceFeatures:
        """value [N, C, H, W] -> keys and queries of Eq. (7): one SKM serves both, so one call per source."""
        row = self.row_skm(value) if self.row_skm is not None else value
        column = self.column_skm(value) if self.column_skm is not None else value
        return SourceFeatures(value, row, column)

    def forward(self, main: SourceFeatures, side: SourceFeatures) -> Aligned:
        """Align `side` to `main`; both hold N maps of one size."""
        how: dict[str, Any] = {"scale": self.scale, "segment": self.segment, "arithmetic": self.arithmetic}
        if self.mode == "average":
            return Aligned(side.value, self.arithmetic.certain(side.value[:, :1]))
        if self.mode == "vpa":
            return attend_columns(main.column_key, side.column_key, side.value, **how)
        attend = attend_everywhere if self.mode == "attention2d" else attend_rows
        horizontal = attend(main.row_key, side.row_key, side.value, **how)
        if self.column_skm is None:
            return horizontal
        column_key = self.column_skm(horizontal.feature)
        vertical = attend_columns(main.column_key, column_key, horizontal.feature, **how)
        return Aligned(vertical.feature, self.arithmetic.both(horizontal.consistency, vertical.consistency))
