"""Between latents and sections: the one walk through the entropy model that encoder and decoder share.

`snap` turns the networks' output into (mu, sigma index), the only numbers the coder sees; mu lies on a grid of 1/64.
Everything up to there is exact arithmetic (exact/), the same on every machine. Encoder and decoder call the same
`walk`, the encoder on its own decoded values.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvcodec import entropy
from mvcodec.container import Damage, Slice, Stream, integer_check
from mvcodec.entropy.tables import MAX_SYMBOL
from mvcodec.errors import BitstreamError, DesyncError, ModelError
from mvcodec.exact.conv import strict
from mvcodec.nn.checkerboard import merge, split
from mvcodec.nn.gain import exact_log_gain
from mvcodec.nn.hyperprior import bits, gaussian_bits
from mvcodec.nn.para_em import CodeStep
from mvcodec.parahydra import PAD_MULTIPLE
from mvcodec.weights import Model

MU_GRID = 64  # mu is a multiple of 1 / MU_GRID
LATENT_STRIDE, HYPER_STRIDE = 16, PAD_MULTIPLE  # pixels per y, per z
HALVES = ("anchor", "non-anchor")


def snap(mu: Tensor, ln_sigma: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """(mu, ln sigma) float64 -> mu on its grid, index int64 of its scale.

    thresholds: [63], between the logarithms of neighbouring scales.
    """
    limit = MAX_SYMBOL / 2
    return (mu.clamp(-limit, limit) * MU_GRID + 0.5).floor() / MU_GRID, torch.bucketize(
        ln_sigma.contiguous(), thresholds
    )


def quantised(y: Tensor, mu: Tensor, index: Tensor) -> Tensor:
    """y and its parameters -> symbols, as integers in float64. Those of the lowest sigma are not coded, and zero."""
    return torch.where(index == 0, 0.0, (y - mu).round().clamp(-MAX_SYMBOL, MAX_SYMBOL))


def walk(model: Model, z_hat: Tensor, t: float, code: CodeStep) -> Tensor:
    """z_hat [B, N, h, w] integers, quality t -> y_hat [B, M, 4 h, 4 w] float64, exact multiples of 1/64."""
    net = model.net
    with torch.autocast(z_hat.device.type, enabled=False), strict():
        hyper = net.h_s(z_hat.double())
        ln_gain = torch.full((z_hat.shape[0],), exact_log_gain(t), dtype=torch.float64, device=z_hat.device)
        y_hat: Tensor = net.para_em(hyper, ln_gain, code)
    return y_hat


def slice_check(y_hat: Tensor) -> int:
    """16-bit check of a slice [1, C, h, w]."""
    return integer_check(integer_bytes(y_hat))


def integer_bytes(y_hat: Tensor) -> bytes:
    """y_hat in units of 1/64: little-endian int32 in C order."""
    return (y_hat * MU_GRID).to(torch.int32).cpu().numpy().astype("<i4").tobytes()


class EncodedLatents(NamedTuple):
    """What the file carries, what the decoder makes of it, and what it costs in theory."""

    hyper: bytes
    slices: tuple[Slice, ...]
    y_hat: Tensor  # [1, M, h, w]
    estimated_bits: float  # -log2 p of its integers under the densities that training minimised; nan if not asked


def encode_latents(model: Model, y: Tensor, z: Tensor, t: float, estimate: bool = False) -> EncodedLatents:
    """y [1, M, h, w] in quantiser steps, z [1, N, h/4, w/4] -> sections."""
    if not (y.isfinite().all() and z.isfinite().all()):
        raise ModelError("the encoder's networks gave numbers that are not finite; their weights are damaged")
    z_hat = z.round().clamp(-MAX_SYMBOL, MAX_SYMBOL)
    hyper = entropy.encode(_integers(z_hat), _hyper_index(z_hat.shape), model.hyper)
    halves = [half.double() for part in y.chunk(model.net.config.slices, dim=1) for half in split(part)]
    sections: list[bytes] = []
    estimates = [bits(model.net.z_prior.likelihood(z_hat)).item() if estimate else math.nan]

    def code(step: int, raw_mu: Tensor, ln_sigma: Tensor) -> Tensor:
        mu, index = snap(raw_mu, ln_sigma, model.sigma_thresholds)
        symbols = quantised(halves[step], mu, index)
        sections.append(entropy.encode(_integers(symbols), _integers(index), model.gaussian))
        if estimate:
            estimates.append(gaussian_bits(symbols, ln_sigma).item())
        return symbols + mu

    y_hat = walk(model, z_hat, t, code)
    checks = [slice_check(part) for part in y_hat.chunk(model.net.config.slices, dim=1)]
    slices = tuple(Slice(sections[2 * i], sections[2 * i + 1], check) for i, check in enumerate(checks))
    return EncodedLatents(hyper, slices, y_hat, sum(estimates))


def decode_latents(model: Model, stream: Stream) -> Tensor:
    """The sections of one file -> y_hat [1, M, h, w] float64 on the model's device.

    Slices that a damaged file has lost are replaced by their expectation mu. Raises BitstreamError for sections
    that no encoder writes, DesyncError where the integers are not those that were encoded.
    """
    config, header = model.net.config, stream.header
    height, width = (-(-side // HYPER_STRIDE) for side in (header.height, header.width))
    shape = (1, config.hyper_channels, height, width)
    symbols = entropy.decode(stream.hyper, _hyper_index(shape), model.hyper)
    z_hat = torch.from_numpy(symbols.reshape(shape)).to(model.device)
    payloads: list[bytes | None] = []
    for part in stream.slices:
        payloads += [part.anchor, part.non_anchor]
    missing = 2 * config.slices - len(payloads)
    if missing < 0 or (missing and stream.damage is None):
        raise BitstreamError(f"file has {len(stream.slices)} slices where the model has {config.slices}")
    payloads += [None] * missing
    halves: list[Tensor] = []

    def code(step: int, mu: Tensor, ln_sigma: Tensor) -> Tensor:
        mu, index = snap(mu, ln_sigma, model.sigma_thresholds)
        payload = payloads[step]
        if payload is None:
            halves.append(mu)
            return mu
        try:
            values = entropy.decode(payload, _integers(index), model.gaussian)
        except BitstreamError as error:
            # The section's own CRC was right: the coder went astray because (mu, sigma) differ.
            sentence = f"{error}; its parameters differ from the encoder's"
            raise _WrongIntegers(step // 2, sentence) from error
        halves.append(torch.from_numpy(values).to(model.device).reshape(mu.shape) + mu)
        if step % 2:
            _verify(step // 2)
        return halves[-1]

    def _verify(i: int) -> None:
        found, wanted = slice_check(merge(*halves[-2:])), stream.slices[i].check
        if found != wanted:
            sentence = f"decoded integers have check {found:#06x}, the encoder's had {wanted:#06x}"
            raise _WrongIntegers(i, f"{sentence}; the two machines' arithmetic differs")

    return walk(model, z_hat, header.quality / 100, code)


def decode_intact(model: Model, stream: Stream) -> tuple[Tensor, Stream]:
    """`decode_latents` for files that may be damaged -> y_hat and the stream that it really stands for.

    A section's CRC-8 misses one random damage in 256. The check of the decoded integers then finds it, and the file
    is cut before that slice, as if its CRC had been wrong; `damage` says so. Where already slice 0 fails, the
    hyper-latent may be what is damaged: nothing is certain any more, and the file is refused with BitstreamError.
    A file that was read as intact is never cut: its wrong integers are a DesyncError.
    """
    while True:
        try:
            return decode_latents(model, stream), stream
        except _WrongIntegers as error:
            if stream.damage is None:
                raise
            if error.slice == 0:
                raise BitstreamError(f"hyper-latent or first slice is corrupt ({error})") from error
            lost = [f"slice {i} {half}" for i in range(error.slice, model.net.config.slices) for half in HALVES]
            damage = Damage(f"wrong integers in slice {error.slice}: corrupt", stream.damage.offset, tuple(lost))
            stream = replace(stream, slices=stream.slices[: error.slice], damage=damage)


class _WrongIntegers(DesyncError):
    """A slice whose integers cannot be those that were encoded."""

    def __init__(self, index: int, sentence: str) -> None:
        super().__init__(f"slice {index}: {sentence}")
        self.slice = index


def _integers(values: Tensor) -> NDArray[np.int32]:
    return values.to(torch.int32).flatten().cpu().numpy()


def _hyper_index(shape: tuple[int, ...] | torch.Size) -> NDArray[np.int32]:
    """Table of each z in C order: its channel."""
    _, channels, height, width = shape
    return np.repeat(np.arange(channels, dtype=np.int32), height * width)
