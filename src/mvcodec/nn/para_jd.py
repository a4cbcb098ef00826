"""Parallax joint decoder, Para-JD (Eq. (5), (17)): PMIFM, synthesis, PMIFM, synthesis.

    {y_hat_k} 1/16 --PMIFM--> g_s coarse --> {f_k} --PMIFM--> g_s fine --> {x_hat_k}       any K >= 1

The weights are shared by all views, so any number of cameras decodes, in any order. The fusion gains start at zero:
an untrained joint decoder is K separate decoders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from mvcodec.nn.parallax_attention import SourceFeatures
from mvcodec.nn.pmifm import ParallaxFusion

RunStage = Callable[[nn.Module, Tensor, Tensor], Tensor]


def fuse_views(fusion: ParallaxFusion, x: Tensor) -> Tensor:
    """PMIFM of every view against all others: x [B, K, C, H, W] -> same shape. Per-view work is done once.

    A lone view stays as it is: what fuses views is trained on several, and must not touch one that has no others.
    """
    batch, views = x.shape[:2]
    if views == 1:
        return x
    flat = fusion.features(x.flatten(0, 1))
    features = SourceFeatures(*(f.unflatten(0, (batch, views)) for f in flat))
    fused = []
    for k in range(views):
        main = SourceFeatures(*(f[:, k] for f in features))
        others = [v for v in range(views) if v != k]
        sides = SourceFeatures(*(f[:, others].transpose(0, 1) for f in features))
        fused.append(fusion(x[:, k], main, sides))
    return torch.stack(fused, dim=1)


class ParaJD(nn.Module):
    """Para-JD around a two-stage synthesis. mode "none" leaves fusion out altogether (separate decoding)."""

    def __init__(
        self,
        coarse: nn.Module,
        fine: nn.Module,
        channels: tuple[int, int],
        widths: tuple[int, int],
        mode: str,
    ) -> None:
        super().__init__()
        self.coarse, self.fine = coarse, fine
        self.fusions = nn.ModuleList()
        if mode != "none":
            pairs = zip(channels, widths, strict=True)
            self.fusions.extend(ParallaxFusion(c, w, mode, initial_gain=0.0) for c, w in pairs)

    def forward(
        self, y_hat: Tensor, quality: Tensor, joint: bool = True, fuse: bool = True, run: RunStage | None = None
    ) -> Tensor:
        """y_hat [B, K, M, h, w] (gain undone), quality [B, K, knots] -> x_hat [B, K, 3, H, W], not clamped.

        joint=False decodes each view as if it were alone (K = 1): what `--preview` and the separate figures use.
        fuse=False skips the fusions, which change nothing while their gains are zero (first training stage).
        run: how a stage is applied to [B K, ...] maps and their qualities, if not in one piece.
        """
        batch, views = y_hat.shape[:2]
        flat_quality = quality.flatten(0, 1)
        x = y_hat
        for index, stage in enumerate((self.coarse, self.fine)):
            if self.fusions and fuse:
                grouped = x if joint else x.flatten(0, 1)[:, None]
                x = fuse_views(cast(ParallaxFusion, self.fusions[index]), grouped).reshape(x.shape)
            flat = x.flatten(0, 1)
            x = (run(stage, flat, flat_quality) if run else stage(flat, flat_quality)).unflatten(0, (batch, views))
        return x
