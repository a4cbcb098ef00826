"""Parallax entropy model, Para-EM (Eq. (3), (4), (18), (19)): l slices x (anchors, non-anchors) = 2 l coding steps,
and two more where the anchors of slice 0 are on a lattice (anchor_lattice.py).

    slice i:   Phi_ch = PMIFM(y_hat_{i-1}, {y_hat_j, j < i-1})            PCCM, Eq. (18)
      anchors:      (mu, sigma) = EP_a(Phi_h, Phi_ch)                       Eq. (4)
      non-anchors:  (mu, sigma) = EP_n(Phi_h, Phi_ch, Phi_lc, Phi_gc)       Phi_lc local, Phi_gc PGCM, Eq. (19)

One walk over the steps serves training, encoder and decoder: it hands (mu, ln sigma) of each step to `code`, which
returns the decoded values. A later slice cannot reach an earlier one because it does not exist yet.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn

from mvcodec.exact.arithmetic import Block
from mvcodec.exact.conv import Conv
from mvcodec.nn.anchor_lattice import AnchorLattice
from mvcodec.nn.checkerboard import merge, split
from mvcodec.nn.entropy_parameters import EntropyParameters
from mvcodec.nn.global_context import ParallaxGlobalContext
from mvcodec.nn.layers import start_at_unit_variance
from mvcodec.nn.local_context import CheckerboardAttention
from mvcodec.nn.parallax_attention import SourceFeatures
from mvcodec.nn.pmifm import Fusion, ParallaxSource

# sigma 0.3, on a binary grid: a sparse channel's standard deviation is far below the scale of its few symbols
LN_PRIOR_FLOOR = -1.2001953125

# code(step, mu, ln_sigma) -> y_hat, all of the shape of a pass (`checkerboard.passes`); steps count the passes.
CodeStep = Callable[[int, Tensor, Tensor], Tensor]


class ChannelContext(nn.Module):
    """PCCM, Eq. (18): the last slice is the main source, all earlier ones its side sources.

    own_source None: all slices share one ParallaxSource, which belongs to ParaEM. Each slice is then embedded once,
    when it is decoded, and not anew for every later one.
    """

    def __init__(self, slice_channels: int, channels_out: int, own_source: ParallaxSource | None) -> None:
        super().__init__()
        self.source = own_source
        self.fusion = Fusion(slice_channels, slice_channels, initial_gain=1.0)
        self.out = Conv(slice_channels, channels_out, 1)

    def forward(self, slices: list[Tensor], shared: ParallaxSource | None, features: list[SourceFeatures]) -> Tensor:
        """slices: the decoded ones, each [B, C, H, W], and what `shared` made of them -> Phi_ch [B, C_out, H, W]."""
        source = self.source or shared
        assert source is not None
        if self.source is not None:
            features = [self.source.features(x) for x in slices]
        sides = None
        if len(features) > 1:
            earlier = (torch.cat(maps) for maps in zip(*features[:-1], strict=True))  # `stack` would lose the layout
            sides = SourceFeatures(*(maps.unflatten(0, (len(features) - 1, -1)) for maps in earlier))
        aligned, _ = source(features[-1], sides)
        return self.out(self.fusion(slices[-1], aligned, features[-1].value))


class PlainChannelContext(Block):
    """Ablation `w/o PCCM`: three convolutions over all earlier slices (MLIC's channel-wise context)."""

    def __init__(self, slice_channels: int, count: int, channels_out: int) -> None:
        super().__init__()
        hidden = 2 * slice_channels
        self.conv1 = Conv(slice_channels * count, hidden, 3)
        self.conv2 = Conv(hidden, hidden, 3)
        self.conv3 = Conv(hidden, channels_out, 3)

    def forward(self, slices: list[Tensor], shared: None, features: list[SourceFeatures]) -> Tensor:
        a = self.arithmetic
        return self.conv3(a.leaky(self.conv2(a.leaky(self.conv1(torch.cat(slices, dim=1))))))


class SliceModel(nn.Module):
    """Contexts and parameter nets of one slice; each Phi but Phi_h has `context` channels."""

    def __init__(
        self,
        index: int,
        channels: int,
        hyper_channels: int,
        context: int,
        widths: tuple[int, ...],
        window: int,
        channel_context: str,
        global_context: str,
        raw_slices: bool,
        tile: int,
        shared_source: bool,
        lattice: bool,
    ) -> None:
        super().__init__()
        self.raw_slices = raw_slices
        self.channel_context: nn.Module | None = None
        if index and channel_context == "plain":
            self.channel_context = PlainChannelContext(channels, index, context)
        elif index:
            source = None if shared_source else ParallaxSource(channels, channels, channel_context, tile)
            self.channel_context = ChannelContext(channels, context, source)
        known = hyper_channels + (context if index else 0) + (channels * index if raw_slices else 0)
        guide = context if index else hyper_channels
        self.local_context = CheckerboardAttention(channels, guide, context, window)
        # MLIC guides its intra-slice context by the slice before alone; PGCM by the whole channel context.
        self.guided_by_last = global_context == "mlic" and index > 0
        guide = channels if self.guided_by_last else guide
        self.global_context = ParallaxGlobalContext(channels, guide, context, tile)
        self.anchor_parameters = EntropyParameters(known, widths, channels)
        self.lattice = AnchorLattice(channels, hyper_channels, context, widths) if lattice else None
        self.other_parameters = EntropyParameters(known + 2 * context, widths, channels)


class ParaEM(Block):
    """Para-EM over all slices.

    `unit` [M] is a power of two >= 1 near each channel's spread in quantiser steps, so that the nets see values of unit
    size; `ln_spread` [M] is the log standard deviation of the transform at gain 1, so that sigma starts near the truth.
    tile: all attention stays within tiles of so many latents a side (0: none), for a cost linear in the picture's area.
    """

    unit: Tensor
    ln_spread: Tensor

    def __init__(
        self,
        latent_channels: int,
        hyper_channels: int,
        context_channels: int,
        slices: int,
        widths: tuple[int, ...],
        window: int = 5,
        channel_context: str = "opam",
        global_context: str = "pgcm",
        raw_slices: bool = False,
        tile: int = 0,
        shared_source: bool = True,
        anchor_lattice: bool = False,
    ) -> None:
        super().__init__()
        self.slice_channels = latent_channels // slices
        self.source: ParallaxSource | None = None
        if shared_source and channel_context != "plain":
            self.source = ParallaxSource(self.slice_channels, self.slice_channels, channel_context, tile)
        self.models = nn.ModuleList(
            SliceModel(
                i,
                self.slice_channels,
                hyper_channels,
                context_channels,
                widths,
                window,
                channel_context,
                global_context,
                raw_slices,
                tile,
                shared_source,
                anchor_lattice and i == 0,
            )
            for i in range(slices)
        )
        start_at_unit_variance(self)
        for parameters in self.modules():
            if isinstance(parameters, EntropyParameters):
                parameters.start_as_prior()
        self.register_buffer("unit", torch.ones(latent_channels, 1, 1))
        self.register_buffer("ln_spread", torch.zeros(latent_channels, 1, 1))

    def forward(self, hyper: Tensor, ln_gain: Tensor, code: CodeStep) -> Tensor:
        """hyper Phi_h [B, C_h, H, W]; ln_gain [B]: log of the quantiser's reference gain -> y_hat [B, M, H, W]."""
        steps = count()
        hyper_anchor, hyper_other = split(hyper)
        done: list[Tensor] = []  # y_hat of each finished slice, in quantiser steps
        seen: list[Tensor] = []  # the same in units
        seen_halves: list[tuple[Tensor, Tensor]] = []  # and once more, as anchors and non-anchors
        features: list[SourceFeatures] = []  # what PCCM needs of each
        for i, model in enumerate(self.models):
            assert isinstance(model, SliceModel)
            channels = slice(i * self.slice_channels, (i + 1) * self.slice_channels)
            unit = self.unit[channels]
            prior = (self.ln_spread[channels] + ln_gain[:, None, None, None]).clamp(min=LN_PRIOR_FLOOR)
            anchor_inputs, other_inputs, guide = [hyper_anchor], [hyper_other], hyper
            if model.channel_context is not None:
                if self.source is not None:
                    features.append(self.source.features(seen[-1]))
                guide = model.channel_context(seen, self.source, features)
                known = [split(guide), *seen_halves] if model.raw_slices else [split(guide)]
                anchor_inputs += [half for half, _ in known]
                other_inputs += [half for _, half in known]

            def coded(
                parameters: EntropyParameters, inputs: list[Tensor], unit: Tensor = unit, prior: Tensor = prior
            ) -> tuple[Tensor, Tensor]:
                mu, ln_sigma = parameters(torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0])
                value = code(next(steps), mu * unit, ln_sigma + prior)
                return value, self.arithmetic.enter(value / unit)

            if model.lattice is not None:
                anchor, anchor_seen = model.lattice(hyper_anchor, model.anchor_parameters, coded)
            else:
                anchor, anchor_seen = coded(model.anchor_parameters, anchor_inputs)
            local = model.local_context(anchor_seen, split(guide)[1])
            global_ = model.global_context(anchor_seen, seen[-1] if model.guided_by_last else guide)
            other, other_seen = coded(model.other_parameters, [*other_inputs, local, global_])

            done.append(merge(anchor, other))
            seen_halves.append((anchor_seen, other_seen))
            seen.append(merge(*seen_halves[-1]))
        return torch.cat(done, dim=1)
