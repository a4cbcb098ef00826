"""Parallax multi information fusion module, PMIFM (Eq. (14)-(16)).

    x_i  --RB RB--> e_i --OPAM with every side e_k--> (f^t_k, C_k)
    W = softmax_k(C_k)        f^t_i = sum_k W_k f^t_k          Eq. (15)
    f'_i = x_i + gain * F([f^t_i, e_i])                        Eq. (16)

Any number of side sources, none included: then f^t = 0 and F still runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvcodec.nn.layers import ResidualBlock
from mvcodec.nn.parallax_attention import OmniParallaxAttention, SourceFeatures


class Fused(NamedTuple):
    """f' and, for maps and supervision, how far each side source was trusted."""

    feature: Tensor  # [N, C, H, W]
    consistency: Tensor  # [S, N, 1, H, W]


class ParallaxFusion(nn.Module):
    """PMIFM over `channels`, matching and fusing in `width` channels (the paper: width = channels).

    initial_gain: start of the per-channel gain on F's output; 0 makes a joint decoder start as separate decoders.
    """

    def __init__(self, channels: int, width: int, mode: str = "opam", initial_gain: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Sequential(ResidualBlock(channels, width), ResidualBlock(width, width))
        self.opam = OmniParallaxAttention(width, mode)
        self.fuse = nn.Sequential(ResidualBlock(2 * width, width), ResidualBlock(width, channels))
        self.gain = nn.Parameter(torch.full((channels, 1, 1), initial_gain))

    def features(self, x: Tensor) -> SourceFeatures:
        """x [N, C, H, W] -> what this source shows to the others and to itself."""
        return self.opam.features(self.embed(x))

    def forward(self, x: Tensor, main: SourceFeatures, sides: SourceFeatures | None) -> Fused:
        """x [N, C, H, W] and its features; sides: features with maps [S, N, width, H, W], or None."""
        if sides is None:
            aligned, consistency = torch.zeros_like(main.value), x.new_zeros((0, *x[:, :1].shape))
        else:
            count = sides.value.shape[0]
            every = SourceFeatures(*(m.expand(count, *m.shape).flatten(0, 1) for m in main))
            found = self.opam(every, SourceFeatures(*(s.flatten(0, 1) for s in sides)))
            feature = found.feature.unflatten(0, (count, -1))
            consistency = found.consistency.unflatten(0, (count, -1))
            aligned = (consistency.softmax(dim=0).to(feature.dtype) * feature).sum(dim=0)
        return Fused(x + self.gain * self.fuse(torch.cat([aligned, main.value], dim=1)), consistency)
