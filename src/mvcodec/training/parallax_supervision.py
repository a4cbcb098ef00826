"""Pixel-level alignment teaches OPAM where to look, so that it need not find out from the distortion alone.

    uncoded views --sights--> flow (fx, fy), consistency --mean over a position's pixels--> targets on the fusion's grid
    VPA at (y, x) shall look at row y + fy; HPA, in that row at x, at column x + fx        cross-entropy, Eq. (9)

OPAM brings rows first and columns of what they brought after: what VPA fetches for (y, x) from row y + fy is what HPA
has put there. Uncoded views, because the truth is wanted, and flow without weights, because it needs no training.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.nn.alignment import sights
from mvcodec.nn.para_jd import ParaJD
from mvcodec.nn.parallax_attention import OmniParallaxAttention, SourceFeatures


class _Attention(NamedTuple):
    """One call of OPAM: one main view with its S sides, B at a time."""

    scale: float
    main: SourceFeatures  # maps [S B, C, h, w]
    side: SourceFeatures
    column_key: Tensor  # of what HPA brought


class ParallaxSupervision:
    """Watches the fusions of a ParaJD while the `with` lasts; `loss` then says how far their attention is off.

    with ParallaxSupervision(model.para_jd) as parallax:
        out = model(pictures, t, joint=True)
    total = total + weight * parallax.loss(pictures)
    """

    def __init__(self, para_jd: ParaJD) -> None:
        self.opams = [m for m in para_jd.fusions.modules() if isinstance(m, OmniParallaxAttention) and m.mode == "opam"]
        self.seen: list[list[_Attention]] = [[] for _ in self.opams]
        self._hooks: list[Any] = []

    def __enter__(self) -> ParallaxSupervision:
        for opam, calls in zip(self.opams, self.seen, strict=True):
            keys: list[Tensor] = []
            assert opam.column_skm is not None

            def remember(_: nn.Module, __: Any, key: Tensor, keys: list[Tensor] = keys) -> None:
                keys[:] = [key]

            def record(
                opam: nn.Module, inputs: Any, _: Any, keys: list[Tensor] = keys, calls: list[_Attention] = calls
            ) -> None:
                # OPAM has just made column keys of what its rows brought
                calls.append(_Attention(opam.scale, inputs[0], inputs[1], keys[0]))  # type: ignore[arg-type]

            self._hooks += [opam.column_skm.register_forward_hook(remember), opam.register_forward_hook(record)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def loss(self, pictures: Tensor) -> Tensor:
        """Cross-entropy of HPA and VPA, 1 for an attention that looks everywhere alike.

        pictures [B, K, 3, H, W] in [0, 1], uncoded: the ones whose latents were fused. 0 where no two views overlap.
        """
        batch, views = pictures.shape[:2]
        terms = [pictures.new_zeros(())]
        if views > 1 and any(self.seen):
            aligned = [list(sights(scene)) for scene in pictures]
            for calls in self.seen:
                for k, call in enumerate(calls):  # one call for each main view, in order
                    flow, consistency = (
                        torch.stack([getattr(aligned[b][k], name) for b in range(batch)], 1).flatten(0, 1)
                        for name in ("flow", "consistency")
                    )  # sides first, as the fusion has them
                    terms.append(_cross_entropy(call, flow, consistency, batch) / (len(calls) * len(self.seen)))
        return torch.stack(terms).sum()


def _cross_entropy(call: _Attention, flow: Tensor, consistency: Tensor, sets: int) -> Tensor:
    """flow [N, 2, H, W] in pixels, consistency [N, 1, H, W]; mean of HPA's and VPA's, over the sets of views.

    Each set weighs alike, so that sets may be divided among processes.
    """
    height, width = call.main.value.shape[-2:]
    stride = flow.shape[-1] / width
    flow = F.adaptive_avg_pool2d(flow, (height, width)) / stride
    weight = F.adaptive_avg_pool2d(consistency, (height, width))[:, 0]
    rows = torch.arange(height, device=flow.device).view(1, -1, 1)
    columns = torch.arange(width, device=flow.device).view(1, 1, -1)
    to_row, to_column = rows + flow[:, 1], columns + flow[:, 0]
    inside = (to_row >= 0) & (to_row <= height - 1) & (to_column >= 0) & (to_column <= width - 1)
    weight = weight * inside

    with torch.autocast(flow.device.type, enabled=False):
        across = _scores(call.main.row_key, call.side.row_key, call.scale)  # [N, h, w, w]
        down = _scores(call.main.column_key.mT, call.column_key.mT, call.scale).transpose(1, 2)  # [N, h, w, h]
    there = to_row.round().clamp(0, height - 1).long()[..., None].expand(-1, -1, -1, width)
    error = _at(across.gather(1, there), to_column) / math.log(width) + _at(down, to_row) / math.log(height)
    lost, seen = (x.unflatten(0, (-1, sets)).sum(dim=(0, 2, 3)) for x in (weight * error, weight))
    return (lost / (2 * seen + 1e-3)).mean()


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[N, C, h, w] twice -> log attention of each position to those of its row, [N, h, w, w]."""
    q, k = (x.float().permute(0, 2, 3, 1) for x in (query, key))
    return ((q * scale) @ k.mT).log_softmax(-1)


def _at(scores: Tensor, position: Tensor) -> Tensor:
    """Minus the log attention [N, h, w, n] at a position [N, h, w] between two of the n."""
    position = position.clamp(0, scores.shape[-1] - 1)
    low = position.floor().clamp(max=max(scores.shape[-1] - 2, 0))
    share = position - low
    first = low.long()[..., None]
    second = (first + 1).clamp(max=scores.shape[-1] - 1)
    near, far = (scores.gather(-1, index)[..., 0] for index in (first, second))
    return -((1 - share) * near + share * far)
