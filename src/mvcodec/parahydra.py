"""ParaHydra wired from its blocks: configuration and data flow, no arithmetic of its own.

x --g_a--> y --gain--> y q --h_a--> z --round--> z_hat --h_s--> Phi_h --Para-EM--> y_hat --1/gain--> Para-JD --> x_hat
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvcodec.exact.arithmetic import Float
from mvcodec.nn import hyperprior as hp
from mvcodec.nn import transforms as tf
from mvcodec.nn.aligned_refinement import AlignedRefinement
from mvcodec.nn.checkerboard import assembled, passes
from mvcodec.nn.coefficient_estimate import Told
from mvcodec.nn.dead_zone import rounded, threshold
from mvcodec.nn.gain import QualityGain, hat_basis, log_gain_reference
from mvcodec.nn.para_em import ParaEM
from mvcodec.nn.para_jd import ParaJD
from mvcodec.nn.quantisation_constraint import QuantisationConstraint, correction

PAD_MULTIPLE = 64  # z is at 1/64


@dataclass(frozen=True)
class ModelConfig:
    """Every width and switch. The paper's ablations are values of `joint`, `channel_context`, `global_context`."""

    profile: str = "fast"
    transform: str = "klt"  # klt | paper
    latent_channels: int = 288  # M
    hyper_channels: int = 128  # N, of z
    hyper_bands: int = 1  # parts of the scale of qualities, each with tables of its own for z
    prior_channels: int = 256  # of Phi_h
    context_channels: int = 64  # of Phi_ch, Phi_lc, Phi_gc
    slices: int = 9
    parameter_widths: tuple[int, ...] = (224, 160)  # hidden layers of EP
    raw_slices: bool = True  # EP also sees the earlier slices themselves (1x1)
    window: int = 5
    channel_context: str = "opam"  # PCCM; plain = three convolutions; hpa | vpa | average = PCCM with that attention
    global_context: str = "pgcm"  # pgcm | mlic
    shared_source: bool = True  # PCCM embeds each slice once, with one set of weights
    attention_tile: int = 16  # Para-EM's attention stays within tiles of so many latents a side
    anchor_lattice: bool = False  # anchors of slice 0 in three passes, each but the first with neighbours
    refine: str = "none"  # none (the paper) | aligned: the pixel-domain third stage of Para-JD
    joint: str = "opam"  # opam | hpa | vpa | attention2d | average | none
    fusion_widths: tuple[int, int] = (96, 96)
    block_channels: int = 192  # hidden width of the klt blocks at 1/8
    analysis_blocks: tuple[int, int] = (2, 2)  # at 1/8, at 1/16
    synthesis_blocks: tuple[int, int] = (2, 3)  # at 1/16, at 1/8
    fine_widths: tuple[int, int] = (40, 96)  # of the klt branches at 1/2 and 1/4
    quality_knots: int = 7

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelConfig:
        """From a file that anybody may have written: TypeError or ValueError if it is no sensible configuration."""
        if not isinstance(values, dict):
            raise TypeError("a configuration is a table of settings")
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        config = ModelConfig(**{**values, **lists})
        config.check()
        return config

    def check(self) -> None:
        """ValueError for a value of the wrong kind or out of all proportion: networks are built from these."""
        for setting in fields(self):
            value, default = getattr(self, setting.name), setting.default
            numbers = value if isinstance(value, tuple) else (value,)
            if type(value) is not type(default) or any(type(n) not in (int, str, bool) for n in numbers):
                raise ValueError(f"{setting.name} cannot be {value!r}")
            if any(type(n) is int and not 0 <= n <= 2048 for n in numbers) or len(numbers) > 8:
                raise ValueError(f"{setting.name} of {value} is not within 0 .. 2048")
            if setting.name in CHOICES and value not in CHOICES[setting.name]:
                raise ValueError(f"{setting.name} is none of {', '.join(CHOICES[setting.name])}")
        if not 1 <= self.slices <= 32 or self.latent_channels % self.slices or self.latent_channels < self.slices:
            raise ValueError(f"{self.slices} slices of {self.latent_channels} channels")
        if self.window not in (3, 5, 7, 9) or self.attention_tile % 2 or not 2 <= self.quality_knots <= 64:
            raise ValueError("window, attention tile or number of quality knots")
        if len(self.fusion_widths) != 2 or len(self.fine_widths) != 2 or not self.parameter_widths:
            raise ValueError("a list of widths of the wrong length")
        if any(len(n) != 2 or max(n) > 64 for n in (self.analysis_blocks, self.synthesis_blocks)):
            raise ValueError("numbers of blocks")
        sizes = (self.hyper_channels, self.prior_channels, self.context_channels, self.block_channels)
        if min(self.hyper_bands, *sizes, *self.parameter_widths, *self.fusion_widths, *self.fine_widths) < 1:
            raise ValueError("a width of zero")

    def coding_order(self, y: Tensor) -> list[Tensor]:
        """y [.., M, h, w] -> what each coding step of Para-EM codes of it (`checkerboard.passes`).

        Of a mask [.., 1, h, w] for all channels, what each step has of it.
        """
        slices = y.chunk(self.slices, dim=-3) if y.shape[-3] > 1 else [y] * self.slices
        return [part for i, full in enumerate(slices) for part in passes(full, self.anchor_lattice and i == 0)]

    def by_slice(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What belongs to each coding step -> to each slice."""
        rest = iter(parts)
        return [assembled(list(islice(rest, self.passes_of(i)))) for i in range(self.slices)]

    def in_place(self, parts: Sequence[Tensor]) -> Tensor:
        """Inverse of `coding_order` of a y."""
        return torch.cat(self.by_slice(parts), dim=-3)

    def passes_of(self, index: int) -> int:
        """Coding steps of a slice."""
        return 4 if self.anchor_lattice and index == 0 else 2

    def entropy_switches(self) -> dict[str, Any]:
        """What the decoded integers depend on; everything else may change without a new model id."""
        switches = {name: value for name, value in self.to_dict().items() if name in ENTROPY_SWITCHES}
        if not self.anchor_lattice:  # younger than the first files, whose ids know nothing of it
            del switches["anchor_lattice"]
        if self.hyper_bands == 1:  # as young
            del switches["hyper_bands"]
        return switches


CHOICES = {
    "transform": ("klt", "paper"),
    "channel_context": ("opam", "plain", "hpa", "vpa", "average", "attention2d"),
    "global_context": ("pgcm", "mlic"),
    "refine": ("none", "aligned"),
    "joint": ("opam", "hpa", "vpa", "attention2d", "average", "none"),
}

ENTROPY_SWITCHES = {
    "latent_channels",
    "hyper_channels",
    "hyper_bands",
    "prior_channels",
    "context_channels",
    "slices",
    "parameter_widths",
    "raw_slices",
    "window",
    "channel_context",
    "global_context",
    "shared_source",
    "attention_tile",
    "anchor_lattice",
}

PROFILES = {
    "fast": ModelConfig(refine="aligned", anchor_lattice=True, hyper_bands=7),
    "paper": ModelConfig(
        profile="paper",
        transform="paper",
        latent_channels=192,
        hyper_channels=192,
        prior_channels=384,
        context_channels=60,
        slices=8,
        parameter_widths=(320, 256, 128),
        raw_slices=False,
        shared_source=False,
        fusion_widths=(192, 192),
        refine="aligned",
    ),
    "tiny": ModelConfig(
        profile="tiny",
        latent_channels=32,
        hyper_channels=16,
        prior_channels=32,
        context_channels=16,
        slices=4,
        parameter_widths=(24,),
        fusion_widths=(16, 16),
        block_channels=16,
        analysis_blocks=(1, 1),
        synthesis_blocks=(1, 1),
        fine_widths=(8, 16),
        quality_knots=3,
        refine="aligned",
    ),
}


def config_for(profile: str, **changes: Any) -> ModelConfig:
    """The named profile with some switches changed."""
    return replace(PROFILES[profile], **changes)


class Cells(NamedTuple):
    """Where pictures lay before they were drawn back into the cells of their integers."""

    apart: Tensor  # y less y_hat, [B K, M, h, w]
    told: Told


class TrainingOutput(NamedTuple):
    """One forward pass in training."""

    pictures: Tensor  # [B, K, 3, H, W]
    bits: Tensor  # [B, K], estimated
    decoded: Tensor  # pictures before they were cleaned
    cells: Cells | None = None  # where pictures were drawn back


class ParaHydra(nn.Module):
    """The whole codec as one trainable module."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config
        coarse: nn.Module
        fine: nn.Module
        if c.transform == "klt":
            self.g_a: nn.Module = tf.KltAnalysis(
                c.latent_channels, c.block_channels, *c.analysis_blocks, c.fine_widths, c.quality_knots
            )
            coarse = tf.KltSynthesisCoarse(c.latent_channels, c.synthesis_blocks[0], c.quality_knots)
            fine = tf.KltSynthesisFine(c.block_channels, c.synthesis_blocks[1], c.fine_widths[1], c.quality_knots)
            middle = tf.PIXELS
        else:
            self.g_a = tf.PaperAnalysis(c.latent_channels)
            coarse = tf.PaperSynthesisCoarse(c.latent_channels)
            fine = tf.PaperSynthesisFine(c.latent_channels)
            middle = c.latent_channels
        self.gain = QualityGain(c.latent_channels, c.quality_knots)
        self.cells = QuantisationConstraint(c.latent_channels, c.quality_knots) if c.transform == "klt" else None
        self.h_a = hp.HyperAnalysis(c.latent_channels, c.hyper_channels)
        self.h_s = hp.HyperSynthesis(c.hyper_channels, c.prior_channels)
        self.z_prior = hp.FactorizedPrior(c.hyper_channels, bands=c.hyper_bands)
        self.para_em = ParaEM(
            c.latent_channels,
            c.prior_channels,
            c.context_channels,
            c.slices,
            c.parameter_widths,
            c.window,
            c.channel_context,
            c.global_context,
            c.raw_slices,
            c.attention_tile,
            c.shared_source,
            c.anchor_lattice,
        )
        self.para_jd = ParaJD(coarse, fine, (c.latent_channels, middle), c.fusion_widths, c.joint)
        self.refinement = AlignedRefinement() if c.refine == "aligned" else None

    def start_as_klt(self, covariance: Tensor) -> None:
        """Make the untrained `klt` model the best linear codec of pictures with this covariance [768, 768]."""
        coarse, fine = self.para_jd.coarse, self.para_jd.fine
        assert isinstance(self.g_a, tf.KltAnalysis)
        assert isinstance(coarse, tf.KltSynthesisCoarse)
        assert isinstance(fine, tf.KltSynthesisFine)
        spread = tf.start_as_klt(self.g_a, coarse, fine, covariance)
        self.para_em.ln_spread.copy_(spread.log()[:, None, None])
        middle_gain = log_gain_reference(0.5)
        self.para_em.unit.copy_(
            torch.exp2((spread.log2() + middle_gain / math.log(2)).round().clamp(min=0))[:, None, None]
        )

    def forward(
        self,
        pictures: Tensor,
        t: Tensor,
        joint: bool = True,
        fuse: bool = True,
        rate: bool = True,
        clean: bool = True,
        decode: bool = True,
        constrain: bool = False,
    ) -> TrainingOutput:
        """pictures [B, K, 3, H, W] in [0, 1], H and W multiples of 64; t [B, K] quality in [0, 1].

        clean: with the refinement's peerless part; its peers are not included, they have a stage of their own.
        rate=False leaves out the entropy model, for stage joint: y is rounded as it is, whose errors are distributed
        nearly like those of a file's integers; bits are then zero.
        decode=False leaves out the decoder, for a stage that moves bits alone: pictures are then those given.
        constrain: pictures are drawn back into the cells of y_hat, as the decoder does last of all.
        """
        batch, views = t.shape
        basis = hat_basis(t.flatten(), self.config.quality_knots)
        y = (self.g_a(pictures.flatten(0, 1), basis) * self.gain.gain(basis)).float()
        if rate:
            integers = not isinstance(self.para_em.arithmetic, Float)  # which have no room in bfloat16
            with torch.autocast(y.device.type, enabled=False) if integers else nullcontext():
                y_hat, bits, told = self._entropy(y, t.flatten())
        else:
            assert not constrain
            y_hat, bits, told = hp.straight_through(y, y.round()), torch.zeros_like(t).flatten(), None
        if not decode:
            return TrainingOutput(pictures, bits.unflatten(0, (batch, views)), pictures)
        scaled = y_hat * self.gain.inverse(basis)
        x_hat = self.para_jd(scaled.unflatten(0, (batch, views)), basis.unflatten(0, (batch, views)), joint, fuse)
        x_hat = x_hat.float()
        if constrain:  # here and below in [0, 1], as the decoder has it
            x_hat = x_hat.clamp(0, 1)
        decoded, cells = x_hat, None
        if clean and self.refinement is not None:
            x_hat = self.refinement.clean(x_hat.flatten(0, 1), t.flatten())[0].reshape(x_hat.shape)
        if told is not None and constrain and self.cells is not None and (coarse := self.cell_synthesis) is not None:
            cleaned = x_hat.flatten(0, 1).clamp(0, 1)
            cells = Cells(self.g_a(cleaned, basis).float() * self.gain.gain(basis) - y_hat, told)
            with torch.autocast(y.device.type, enabled=False):
                astray = self.cells(cells.apart, basis, told, t.flatten())
                back = correction(coarse, astray, self.gain.inverse(basis))
            x_hat = (cleaned - back).reshape(x_hat.shape)
        return TrainingOutput(x_hat, bits.unflatten(0, (batch, views)), decoded, cells)

    @property
    def cell_synthesis(self) -> tf.KltSynthesisCoarse | None:
        """What draws decoded pictures back into their cells.

        None where the synthesis has no inverse of its own (profile `paper`), and in the paper's decoder.
        """
        coarse = self.para_jd.coarse
        return coarse if self.refinement is not None and isinstance(coarse, tf.KltSynthesisCoarse) else None

    def _entropy(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Told]:
        """y [B, M, h, w], t [B] -> y_hat as the decoder will have it, bits of each view [B] (Eq. (2), (3))."""
        z = self.h_a(y).float()
        total = hp.bits(self.z_prior.likelihood(hp.noisy(z), t))
        hyper = self.h_s(hp.straight_through(z, z.round()))
        steps = self.config.coding_order(y)
        told: list[tuple[Tensor, Tensor]] = []

        def code(step: int, mu: Tensor, ln_sigma: Tensor) -> Tensor:
            nonlocal total
            residual, ln_sigma = steps[step] - mu.float(), ln_sigma.float()
            with torch.no_grad():
                symbols = rounded(residual, threshold(ln_sigma))
                told.append((symbols, ln_sigma.detach()))
            total = total + hp.gaussian_bits(residual, symbols, ln_sigma)
            return hp.straight_through(residual, symbols) + mu.float()

        low, high = log_gain_reference(0), log_gain_reference(1)
        y_hat = self.para_em(hyper, low + (high - low) * t, code)
        return y_hat, total, Told(*(self.config.in_place(parts) for parts in zip(*told, strict=True)))
