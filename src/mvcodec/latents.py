"""Between latents and symbols: the one walk through the entropy model that encoder and decoder share.

`snap` turns the networks' output into (mu, sigma index), the only numbers the coder sees; mu lies on a grid of 1/64.
Everything up to there is exact arithmetic (exact/), the same on every machine. Encoder and decoder call the same
`walk`, the encoder on its own decoded values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvcodec.container import VERSIONS, Damage, Header, Slice, Stream, integer_check, pass_names
from mvcodec.cores import cores_that_pay
from mvcodec.entropy.tables import MAX_SYMBOL, SIGMAS
from mvcodec.errors import BitstreamError, DesyncError, ModelError, MvcodecError
from mvcodec.exact.precision import strict
from mvcodec.graphs import PLAIN
from mvcodec.nn.dead_zone import rounded, threshold
from mvcodec.nn.gain import exact_log_gain
from mvcodec.nn.hyperprior import band_of, bits, gaussian_bits
from mvcodec.nn.para_em import CodeStep
from mvcodec.parahydra import PAD_MULTIPLE
from mvcodec.payload import Writer, reader_of
from mvcodec.tiling import USUAL
from mvcodec.transfers import Fetched, fetched, to_device
from mvcodec.weights import Model

MU_GRID = 64  # mu is a multiple of 1 / MU_GRID
LATENT_STRIDE, HYPER_STRIDE = 16, PAD_MULTIPLE  # pixels per y, per z
ELSEWHERE = ("cuda",)  # devices whose networks leave the processor to the coder


def snap(mu: Tensor, ln_sigma: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """(mu, ln sigma) float64 [B, C, h, w] -> mu on its grid, index int64 of its scale.

    thresholds: [63], between the logarithms of neighbouring scales.
    """
    limit = MAX_SYMBOL / 2
    mu = (mu.clamp(-limit, limit) * MU_GRID).add_(0.5).floor_().div_(MU_GRID)
    # Channels last on a processor, see `walk`, where `permute` and back copies nothing.
    return mu, torch.bucketize(ln_sigma.permute(0, 2, 3, 1).contiguous(), thresholds).permute(0, 3, 1, 2)


def quantised(y: Tensor, mu: Tensor, index: Tensor) -> Tensor:
    """y and its parameters -> symbols, as integers in float64. Those of the lowest sigma are not coded, and zero."""
    symbols = rounded(y - mu, dead_zones(y.device).take(index))
    return torch.where(index == 0, 0.0, symbols.clamp(-MAX_SYMBOL, MAX_SYMBOL))


@lru_cache
def dead_zones(device: torch.device) -> Tensor:
    """`dead_zone.threshold` of each of the coder's scales, [64] float64."""
    return threshold(torch.from_numpy(SIGMAS).log()).to(device)


def walk(model: Model, z_hat: Tensor, t: float | Sequence[float], code: CodeStep) -> Tensor:
    """z_hat [B, N, h, w] integers, qualities t -> y_hat [B, M, 4 h, 4 w] float64, exact multiples of 1/64."""
    net = model.net
    pixels = len(z_hat) * z_hat[0, 0].numel() * HYPER_STRIDE**2
    call = model.graphs if pixels <= USUAL else PLAIN  # what is large keeps a GPU busy, and would hold much memory
    qualities = [t] * len(z_hat) if isinstance(t, int | float) else t
    alone = nullcontext() if z_hat.is_cuda else cores_that_pay()
    with torch.autocast(z_hat.device.type, enabled=False), strict, alone:
        # In one order, whoever made it: one graph. Maps keep it on their way, and a processor's convolutions take
        # channels last a sixth faster; an exact sum is the same in all.
        order = torch.contiguous_format if z_hat.is_cuda else torch.channels_last
        hyper = call(net.h_s, z_hat.double().contiguous(memory_format=order))
        ln_gain = to_device(torch.tensor([exact_log_gain(q) for q in qualities], dtype=torch.float64), z_hat.device)
        y_hat: Tensor = call(net.para_em, hyper, ln_gain, code=code)
    return y_hat


def slice_checks(model: Model, y_hat: Tensor, count: int) -> list[int]:
    """16-bit checks of the first slices of one view [1, M, h, w], so many; the last is that of all that follow, too."""
    channels = model.net.config.latent_channels // model.net.config.slices
    parts = np.split(_sixty_fourths(y_hat), [channels * i for i in range(1, count)], axis=1)
    return [integer_check(part.tobytes()) for part in parts]


def integer_bytes(y_hat: Tensor) -> bytes:
    """y_hat in units of 1/64: little-endian int32 in C order."""
    return _sixty_fourths(y_hat).tobytes()


def _sixty_fourths(y_hat: Tensor) -> NDArray[np.int32]:
    return fetched((y_hat * MU_GRID).to(torch.int32)).astype("<i4", copy=False)


class EncodedLatents(NamedTuple):
    """What the file carries, what the decoder makes of it, and what it costs in theory."""

    payload: bytes
    slices: tuple[Slice, ...]
    y_hat: Tensor  # [1, M, h, w]
    estimated_bits: float  # -log2 p of its integers under the densities that training minimised; nan if not asked


def encode_latents(
    model: Model, y: Tensor, z: Tensor, t: float, estimate: bool = False, shown: Tensor | None = None
) -> EncodedLatents:
    """y [1, M, h, w] in quantiser steps, z [1, N, h/4, w/4] -> the payload.

    shown [1, 1, h, w]: 1 where a latent holds any of the picture (default: all do); the others keep the decoder's
    expectation of them, whose symbols are zero.
    """
    if not (y.isfinite().all() and z.isfinite().all()):
        raise ModelError("the encoder's networks gave numbers that are not finite; their weights are damaged")
    z_hat = z.round().clamp(-MAX_SYMBOL, MAX_SYMBOL)
    config = model.net.config
    parts = [part.double() for part in config.coding_order(y)]
    seen = None
    if shown is not None:
        seen = config.coding_order(to_device(shown.double(), y.device))
    writer, coding = Writer(model), list[Future[None]]()
    slice_of = config.slice_of_each_pass()
    estimates = [math.nan]
    if estimate:
        quality = torch.tensor([t], dtype=torch.float64, device=y.device)
        estimates = [bits(model.net.z_prior.likelihood(z_hat, quality)).item()]

    with ThreadPoolExecutor(max_workers=1) as coder:  # beside the network, which knows the next values already
        tables = _hyper_index(z_hat.shape, t, config.hyper_bands)
        coding.append(coder.submit(writer.hyper, Fetched(z_hat.short()), tables))

        def code(step: int, raw_mu: Tensor, ln_sigma: Tensor) -> Tensor:
            mu, index = snap(raw_mu, ln_sigma, model.sigma_thresholds)
            symbols = quantised(parts[step], mu, index)
            if seen is not None:
                symbols = symbols * seen[step]
            coming = Fetched(torch.stack((symbols.short(), index.short())))
            coding.append(coder.submit(writer.step, slice_of[step], coming))
            if estimate:
                estimates.append(gaussian_bits(symbols, symbols, ln_sigma).item())
            return symbols + mu

        y_hat = walk(model, z_hat, t, code)
        finish(coding)
    payload, coded = writer.finish()
    slices = tuple(Slice((), check) for check in slice_checks(model, y_hat, coded))
    return EncodedLatents(payload, slices, y_hat, sum(estimates))


def finish(coding: list[Future[None]]) -> None:
    """Wait for what the coder still has to do."""
    for done in coding:
        done.result()


def decode_latents(model: Model, stream: Stream) -> Tensor:
    """The integers of one file: y_hat [1, M, h, w] float64 on the model's device.

    Slices that a damaged file has lost are replaced by their expectation mu. Raises BitstreamError for sections
    that no encoder writes, DesyncError where the integers are not those that were encoded.
    """
    (found,) = decode_together(model, [stream])
    if isinstance(found, MvcodecError):
        raise found
    return found[0]


def of_one_size(sizes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The places of the views of each size: they are computed in one batch."""
    return [[k for k, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)]


class Walk(NamedTuple):
    """Views that are decoded together, by their places."""

    places: list[int]
    pixels: int  # of all of them, as they are padded


def same_size(streams: Sequence[Stream], most: int, walks: int = 1) -> list[Walk]:
    """Views that may be decoded together, of at most so many pixels; those of a size in no fewer walks, if they can."""
    sizes = [tuple(-(-side // HYPER_STRIDE) for side in _sides(stream.header)) for stream in streams]
    found: list[Walk] = []
    for places in of_one_size(sizes):
        pixels = math.prod(sizes[places[0]]) * HYPER_STRIDE**2
        many = max(1, min(most // pixels, -(-len(places) // walks)))
        parts = [places[k : k + many] for k in range(0, len(places), many)]
        found += [Walk(part, len(part) * pixels) for part in parts]
    return found


Decoded = tuple[Tensor, Stream] | MvcodecError  # y_hat and the stream that it really stands for, or what is wrong


def decode_together(model: Model, streams: Sequence[Stream]) -> list[Decoded]:
    """`decode_latents` of views of one size in one walk.

    A GPU is then as busy with all as with one, and their symbols are decoded beside one another, a thread for each
    view. They are coded once more, to see that a file is the code of its symbols: with a GPU, while the network goes on
    with them. What one view holds changes no integer of another.
    """
    found: dict[int, Decoded] = {}
    opened: list[_Opened] = []
    for place, stream in enumerate(streams):
        try:
            opened.append(_Opened(model, stream, place))
        except BitstreamError as error:
            found[place] = error
    if not opened:
        return list(found.values())
    with ThreadPoolExecutor(max_workers=2 * len(opened)) as coders:

        def code(step: int, raw_mu: Tensor, ln_sigma: Tensor) -> Tensor:
            mu, index = snap(raw_mu, ln_sigma, model.sigma_thresholds)
            return mu + to_device(decode_symbols(opened, step, Fetched(index.int()).wait(), coders), mu.device)

        z_hat = to_device(torch.from_numpy(np.concatenate([view.z_hat for view in opened])), model.device)
        y_hat = walk(model, z_hat, [view.stream.header.quality / 100 for view in opened], code)
        verify_symbols(opened)
    for view, decoded in zip(opened, y_hat.split(1), strict=True):
        found[view.place] = view.verified(decoded)
    return [found[place] for place in range(len(streams))]


def decode_symbols(opened: Sequence[_Opened], step: int, tables: NDArray[np.int32], coders: Executor) -> Tensor:
    """The symbols of one step of all views [B, C, h, w], from the tables of each: beside one another."""
    run = map if len(opened) == 1 else coders.map
    return torch.from_numpy(np.stack(list(run(lambda view, table: view.symbols(step, table, coders), opened, tables))))


def verify_symbols(opened: Sequence[_Opened]) -> None:
    """Wait for what the threads still have to look at."""
    for view in opened:
        view.verify()


class _Opened:
    """One of several views that are decoded together, and the first thing found to be wrong with it."""

    def __init__(self, model: Model, stream: Stream, place: int) -> None:
        self.model, self.stream, self.place = model, stream, place
        config = model.net.config
        shape = (1, config.hyper_channels, *(-(-side // HYPER_STRIDE) for side in _sides(stream.header)))
        tables = _hyper_index(shape, stream.header.quality / 100, config.hyper_bands)
        self.slice_of = config.slice_of_each_pass()
        self.source = reader_of(model, stream)
        self.z_hat = self.source.hyper(tables).reshape(shape)
        self.wrong: _WrongIntegers | None = None
        self.verifying: dict[int, Future[None]] = {}  # by step

    def symbols(self, step: int, table: NDArray[np.int32], coders: Executor) -> NDArray[np.int32]:
        """The symbols of a step, shaped as `table`; zeros for what is lost or not to be believed: mu then stands."""
        if self.wrong is not None or not self.source.holds(step):
            return np.zeros_like(table)
        try:
            found, verify = self.source.take(step, table.ravel())
            if self.model.device.type in ELSEWHERE:
                self.verifying[step] = coders.submit(_in_turn, self.verifying.get(step - 1), verify)
            else:
                verify()
        except BitstreamError as error:
            self._distrust(step, error)
            return np.zeros_like(table)
        return found.reshape(table.shape)

    def verify(self) -> None:
        """What the threads made of the symbols: the first that is wrong counts, what came after it is as wrong."""
        for step, verified in self.verifying.items():
            try:
                verified.result()
            except BitstreamError as error:
                self._distrust(step, error)
                break

    def _distrust(self, step: int, error: BitstreamError) -> None:
        # What arrived is what was written: the coder went astray because (mu, sigma) differ.
        self.wrong = _WrongIntegers(self.slice_of[step], f"{error}; its parameters differ from the encoder's")

    def verified(self, y_hat: Tensor) -> Decoded:
        """y_hat [1, M, h, w], if the checks of all slices that were decoded are those of the encoder."""
        parts = self.stream.slices
        whole = self.source.whole if self.wrong is None else min(self.wrong.slice, self.source.whole)
        for i, (found, part) in enumerate(
            zip(slice_checks(self.model, y_hat, self.source.checked)[:whole], parts, strict=False)
        ):
            if found != part.check:
                sentence = f"decoded integers have check {found:#06x}, the encoder's had {part.check:#06x}"
                return _WrongIntegers(i, f"{sentence}; the two machines' arithmetic differs")
        return self.wrong or self.source.wrong() or (y_hat, self.source.stream)


def decode_intact(model: Model, streams: Sequence[Stream]) -> list[Decoded]:
    """`decode_together` for files that may be damaged.

    Of version 3 the checks of the decoded integers tell how far a file is intact; in versions 1 and 2 a section's CRC-8
    does, and they find the one random damage in 256 that it misses. The file is cut before that slice, and `damage`
    says so; one that is only truncated is good for all passes that have arrived. Where already slice 0 fails, the
    hyper-latent may be what is damaged: nothing is certain any more, and the file is refused with BitstreamError.
    A file that was read as intact is never cut: its wrong integers are a DesyncError.
    """
    config = model.net.config
    names = pass_names([config.passes_of(i) for i in range(config.slices)])
    results: list[Decoded] = []
    for stream, first in zip(streams, decode_together(model, streams), strict=True):
        kept, found = stream, first
        while isinstance(found, _WrongIntegers) and kept.damage is not None:
            if found.slice == 0:
                found = BitstreamError(f"hyper-latent or first slice is corrupt ({found})")
                break
            lost = tuple(chain(*names[found.slice :]))
            damage = Damage(f"wrong integers in slice {found.slice}: corrupt", kept.damage.offset, lost)
            if kept.version == VERSIONS[-1]:
                kept = replace(kept, kept=found.slice, damage=damage)
            else:
                kept = replace(kept, slices=kept.slices[: found.slice], damage=damage)
            (found,) = decode_together(model, [kept])
        results.append(found)
    return results


def _in_turn(before: Future[None] | None, verify: Callable[[], None]) -> None:
    """Passes are coded one after another, whichever thread has time for the next."""
    if before is not None:
        before.result()
    verify()


class _WrongIntegers(DesyncError):
    """A slice whose integers cannot be those that were encoded."""

    def __init__(self, index: int, sentence: str) -> None:
        super().__init__(f"slice {index}: {sentence}")
        self.slice = index


def _sides(header: Header) -> tuple[int, int]:
    return header.height, header.width


def _hyper_index(shape: tuple[int, ...] | torch.Size, t: float, bands: int) -> NDArray[np.int32]:
    """Table of each z in C order: that of its channel in the band of quality t."""
    _, channels, height, width = shape
    first = channels * band_of(round(10000 * t), bands)
    return np.repeat(np.arange(first, first + channels, dtype=np.int32), height * width)
