"""Parallax multi information fusion module, PMIFM (Eq. (14)-(16)).

    x_i  --RB RB--> e_i --OPAM with every side e_k--> (f^t_k, C_k)
    W = softmax_k(C_k)        f^t_i = sum_k W_k f^t_k          Eq. (15)
    f'_i = x_i + gain * F([f^t_i, e_i])                        Eq. (16)

Any number of side sources, none included: then f^t = 0 and F still runs. The part before the fusion, `ParallaxSource`,
may be shared: a source is then embedded once, however many others it meets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvcodec.exact.arithmetic import Block
from mvcodec.nn.layers import ResidualBlock
from mvcodec.nn.parallax_attention import OmniParallaxAttention, SourceFeatures


class ParallaxSource(Block):
    """What every source goes through before fusion: RB RB -> e, OPAM, and the weighted sum over sources of Eq. (15).

    segment: rows and columns are matched within pieces of so many positions; 0 matches whole ones.
    """

    def __init__(self, channels: int, width: int, mode: str = "opam", segment: int = 0) -> None:
        super().__init__()
        self.embed = nn.Sequential(ResidualBlock(channels, width), ResidualBlock(width, width))
        self.opam = OmniParallaxAttention(width, mode, segment=segment)

    def features(self, x: Tensor) -> SourceFeatures:
        """x [N, C, H, W] -> what this source shows to the others and to itself."""
        return self.opam.features(self.embed(x))

    def forward(self, main: SourceFeatures, sides: SourceFeatures | None) -> tuple[Tensor, Tensor]:
        """Maps [N, width, H, W] and [S, N, width, H, W], or None -> f^t [N, width, H, W], C [S, N, 1, H, W]."""
        if sides is None:
            return torch.zeros_like(main.value), main.value.new_zeros((0, *main.value[:, :1].shape))
        count = sides.value.shape[0]
        every = main if count == 1 else SourceFeatures(*(torch.cat((m,) * count) for m in main))
        found = self.opam(every, SourceFeatures(*(s.flatten(0, 1) for s in sides)))
        feature = found.feature.unflatten(0, (count, -1))
        consistency = found.consistency.unflatten(0, (count, -1))
        return self.arithmetic.blend(consistency, feature), consistency


class Fusion(Block):
    """Eq. (16): x + gain * F([f^t, e]), gain per channel."""

    def __init__(self, channels: int, width: int, initial_gain: float) -> None:
        super().__init__()
        self.fuse = nn.Sequential(ResidualBlock(2 * width, width), ResidualBlock(width, channels))
        self.gain = nn.Parameter(torch.full((channels, 1, 1), initial_gain))

    def forward(self, x: Tensor, aligned: Tensor, embedded: Tensor) -> Tensor:
        a = self.arithmetic
        if embedded.is_contiguous(memory_format=torch.channels_last):  # which columns do not leave, and `cat` needs
            aligned = aligned.contiguous(memory_format=torch.channels_last)
        return a.add(x, a.scale(self.fuse(torch.cat([aligned, embedded], dim=1)), self.gain))


class ParallaxFusion(nn.Module):
    """PMIFM over `channels`, matching and fusing in `width` channels (the paper: width = channels).

    initial_gain: start of the per-channel gain on F's output; 0 makes a joint decoder start as separate decoders.
    """

    def __init__(self, channels: int, width: int, mode: str = "opam", initial_gain: float = 1.0) -> None:
        super().__init__()
        self.source = ParallaxSource(channels, width, mode)
        self.fusion = Fusion(channels, width, initial_gain)

    def features(self, x: Tensor) -> SourceFeatures:
        """x [N, C, H, W] -> what this source shows to the others and to itself."""
        return self.source.features(x)

    def forward(self, x: Tensor, main: SourceFeatures, sides: SourceFeatures | None) -> Tensor:
        """x [N, C, H, W] and its features -> f'; sides: features with maps [S, N, width, H, W], or None."""
        aligned, _ = self.source(main, sides)
        fused: Tensor = self.fusion(x, aligned, main.value)
        return fused
