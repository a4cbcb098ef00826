"""Anchors of the first slice on a lattice: three passes, of which only the first knows nothing but the hyperprior.

    even rows of the packed anchors = a grid of half the resolution, coded as a checkerboard:
      first:   (mu, sigma) = EP(Phi_h)
      between: (mu, sigma) = EP(Phi_h, context of the first)
    odd rows:  (mu, sigma) = EP(Phi_h, context of the even rows), diagonal neighbours of theirs

The paper codes half of each slice without neighbours. Its first slice holds nearly all bits of small files, most of
them in blocks' means, whose neighbours tell much. Cf. Lin et al., "Multistage spatial context models for learned image
compression" (ICASSP 2023), which codes every slice in such passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mvcodec.exact.arithmetic import Block
from mvcodec.exact.conv import Conv
from mvcodec.nn.checkerboard import anchors_of, merge, split
from mvcodec.nn.entropy_parameters import EntropyParameters

# A pass: parameter network and its inputs -> y_hat as decoded, and as the networks see it.
Coded = Callable[[EntropyParameters, list[Tensor]], tuple[Tensor, Tensor]]


class LatticeContext(Block):
    """What is known on a grid, zero elsewhere -> features at all its places: [B, C, H, W] -> [B, C_out, H, W]."""

    def __init__(self, channels: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels_out, 5)
        self.conv2 = Conv(channels_out, channels_out, 3)

    def forward(self, known: Tensor) -> Tensor:
        a = self.arithmetic
        return a.leaky(self.conv2(a.leaky(self.conv1(known))))


class AnchorLattice(Block):
    """The passes after the first; the first has the slice's own EP."""

    def __init__(self, channels: int, hyper_channels: int, context: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.between_context = LatticeContext(channels, context)
        self.between_parameters = EntropyParameters(hyper_channels + context, widths, channels)
        self.odd_context = LatticeContext(channels, context)
        self.odd_parameters = EntropyParameters(hyper_channels + context, widths, channels)

    def forward(self, hyper: Tensor, first: EntropyParameters, coded: Coded) -> tuple[Tensor, Tensor]:
        """hyper: Phi_h at the anchors [B, C_h, H, W / 2] -> the anchors [B, C, H, W / 2], as `coded` gives them."""
        here, there = split(hyper[..., 0::2, :])
        value, seen = coded(first, [here])
        context = self.between_context(merge(seen, torch.zeros_like(seen)))
        others = coded(self.between_parameters, [there, split(context)[1]])
        even, even_seen = merge(value, others[0]), merge(seen, others[1])
        # Place (i, j) of the odd rows has (i, j), (i, j - 1) and those of row i + 1 around it.
        odd, odd_seen = coded(self.odd_parameters, [hyper[..., 1::2, :], self.odd_context(even_seen)])
        return anchors_of(even, odd), anchors_of(even_seen, odd_seen)
