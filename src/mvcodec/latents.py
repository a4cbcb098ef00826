"""Between latents and sections: the one walk through the entropy model that encoder and decoder share.

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
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvcodec import entropy
from mvcodec.container import Damage, Header, Slice, Stream, integer_check, section_names, sections_of
from mvcodec.cores import cores_that_pay
from mvcodec.entropy.tables import MAX_SYMBOL, SIGMAS
from mvcodec.errors import BitstreamError, DesyncError, ModelError, MvcodecError
from mvcodec.exact.precision import strict
from mvcodec.nn.dead_zone import rounded, threshold
from mvcodec.nn.gain import exact_log_gain
from mvcodec.nn.hyperprior import band_of, bits, symbol_bits
from mvcodec.nn.para_em import CodeStep
from mvcodec.parahydra import PAD_MULTIPLE, ModelConfig
from mvcodec.tiling import USUAL
from mvcodec.transfers import Fetched, fetched, to_device
from mvcodec.weights import Model

Done = TypeVar("Done")

MU_GRID = 64  # mu is a multiple of 1 / MU_GRID
LATENT_STRIDE, HYPER_STRIDE = 16, PAD_MULTIPLE  # pixels per y, per z
SMALL = (-127, 127)  # symbols that are kept for what comes after decoding
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
    call = model.graphs.up_to(USUAL, pixels)
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


class Latents(NamedTuple):
    """What a file says of one view's y, [1, M, h, w] each."""

    y_hat: Tensor  # float64, exact multiples of 1/64
    symbols: Tensor  # int8: those beyond are taken for the largest there are
    scales: Tensor  # uint8, which of SIGMAS


class EncodedLatents(NamedTuple):
    """What the file carries, what the decoder makes of it, and what it costs in theory."""

    hyper: bytes
    slices: tuple[Slice, ...]
    y_hat: Tensor  # [1, M, h, w]
    estimated_bits: float  # -log2 p of its integers under the densities that training minimised; nan if not asked
    latents: Callable[[], Latents]  # put together when asked: a camera never asks


def encode_latents(
    model: Model, y: Tensor, z: Tensor, t: float, estimate: bool = False, shown: Tensor | None = None
) -> EncodedLatents:
    """y [1, M, h, w] in quantiser steps, z [1, N, h/4, w/4] -> sections.

    shown [1, 1, h, w]: 1 where a latent makes any of the picture (default: all do); the others keep the decoder's
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
    sections: list[Future[_Coded]] = []
    estimates = [math.nan]
    if estimate:
        quality = torch.tensor([t], dtype=torch.float64, device=y.device)
        estimates = [bits(model.net.z_prior.likelihood(z_hat, quality)).item()]

    with ThreadPoolExecutor(max_workers=1) as coder:  # beside the network, which knows the next values already
        tables = _hyper_index(z_hat.shape, t, config.hyper_bands)
        hyper = coder.submit(_encode_hyper, Fetched(z_hat.short()), tables, model)

        steps: list[Tensor] = []

        def code(step: int, raw_mu: Tensor, ln_sigma: Tensor) -> Tensor:
            mu, index = snap(raw_mu, ln_sigma, model.sigma_thresholds)
            symbols = quantised(parts[step], mu, index)
            if seen is not None:
                symbols = symbols * seen[step]
            steps.append(torch.stack((symbols.short(), index.short())))
            sections.append(coder.submit(_encode_section, Fetched(steps[-1]), model))
            if estimate:
                estimates.append(symbol_bits(symbols, ln_sigma).item())
            return symbols + mu

        y_hat = walk(model, z_hat, t, code)
        (first,), passes = finish([hyper]), iter(finish(sections))
    coded = [list(islice(passes, config.passes_of(i))) for i in range(config.slices)]
    if config.anchor_lattice:  # version 3 of the format: slices at the end that hold nothing are not in the file
        coded = coded[: max((i for i, part in enumerate(coded) if any(one.holds for one in part)), default=0) + 1]
    checks = slice_checks(model, y_hat, len(coded))
    slices = tuple(Slice(tuple(one.section for one in part), check) for part, check in zip(coded, checks, strict=True))
    return EncodedLatents(first, slices, y_hat, sum(estimates), partial(_told, config, y_hat, steps))


def _told(config: ModelConfig, y_hat: Tensor, steps: Sequence[Tensor]) -> Latents:
    """steps: symbols and indices of scales as each step coded them, [2, B, C, ..] int16."""
    symbols, scales = config.in_place(steps)
    return Latents(y_hat, small(symbols), scales.to(torch.uint8))


def small(symbols: Tensor) -> Tensor:
    """As `Latents` has them."""
    return symbols.clamp(*SMALL).to(torch.int8)


class _Coded(NamedTuple):
    """One pass."""

    section: bytes
    holds: bool  # a symbol other than zero


def _encode_hyper(coming: Fetched, tables: NDArray[np.int32], model: Model) -> bytes:
    return entropy.encode(coming.wait().ravel(), tables, model.hyper)


def _encode_section(coming: Fetched, model: Model) -> _Coded:
    symbols, index = coming.wait()
    return _Coded(entropy.encode(symbols.ravel(), index.ravel(), model.gaussian), bool(symbols.any()))


def finish(sections: list[Future[Done]]) -> list[Done]:
    """Wait for what the coder still has to do."""
    return [section.result() for section in sections]


def decode_latents(model: Model, stream: Stream) -> Latents:
    """The sections of one file -> what they say of y, on the model's device.

    Slices that a damaged file has lost are replaced by their expectation mu. Raises BitstreamError for sections
    that no encoder writes, DesyncError where the integers are not those that were encoded.
    """
    (found,) = decode_together(model, [stream])
    if isinstance(found, MvcodecError):
        raise found
    return found


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


def decode_together(model: Model, streams: Sequence[Stream]) -> list[Latents | MvcodecError]:
    """`decode_latents` of views of one size in one walk: of each its latents, or what is wrong with it.

    A GPU is then as busy with all as with one, and their sections are decoded beside one another, a thread for each
    view. Each is coded once more, to see that it is the code of its symbols: with a GPU, while the network goes on with
    them. What one view holds changes no integer of another.
    """
    found: dict[int, Latents | MvcodecError] = {}
    opened: list[_Opened] = []
    for place, stream in enumerate(streams):
        try:
            opened.append(_Opened(model, stream, place))
        except BitstreamError as error:
            found[place] = error
    if not opened:
        return list(found.values())
    steps: list[Tensor] = []
    with ThreadPoolExecutor(max_workers=2 * len(opened)) as coders:

        def code(step: int, raw_mu: Tensor, ln_sigma: Tensor) -> Tensor:
            mu, index = snap(raw_mu, ln_sigma, model.sigma_thresholds)
            symbols = to_device(decode_sections(opened, step, Fetched(index.int()).wait(), coders), mu.device)
            steps.append(torch.stack((symbols.short(), index.short())))
            return mu + symbols

        z_hat = to_device(torch.from_numpy(np.concatenate([view.z_hat for view in opened])), model.device)
        y_hat = walk(model, z_hat, [view.stream.header.quality / 100 for view in opened], code)
        verify_sections(opened)
    views = zip(*(x.split(1) for x in _told(model.net.config, y_hat, steps)), strict=True)
    for view, decoded in zip(opened, views, strict=True):
        found[view.place] = view.verified(Latents(*decoded))
    return [found[place] for place in range(len(streams))]


def decode_sections(opened: Sequence[_Opened], step: int, tables: NDArray[np.int32], coders: Executor) -> Tensor:
    """The symbols of one step of all views [B, C, h, w], from the tables of each: beside one another."""
    run = map if len(opened) == 1 else coders.map
    return torch.from_numpy(np.stack(list(run(lambda view, table: view.section(step, table, coders), opened, tables))))


def verify_sections(opened: Sequence[_Opened]) -> None:
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
        self.z_hat = entropy.decode(stream.hyper, tables, model.hyper).reshape(shape)
        self.passes = [config.passes_of(i) for i in range(config.slices)]
        found = [len(part.sections) for part in stream.slices]
        fits = stream.count == config.slices or (stream.version == 3 and stream.count < config.slices)
        if not fits or (len(found) < stream.count and stream.damage is None):
            raise BitstreamError(f"file has {len(found)} slices where the model has {config.slices}")
        if sections_of(stream.version, 0) != self.passes[0]:
            raise BitstreamError(f"file is of version {stream.version}, which this model does not write")
        self.payloads: list[bytes | None] = [section for part in stream.slices for section in part.sections]
        self.payloads += [None] * (sum(self.passes) - sum(found))
        self.holding = 0  # slices up to the last that turned out to hold a symbol other than zero
        self.slice_of = [i for i, passes in enumerate(self.passes) for _ in range(passes)]  # by step
        self.wrong: _WrongIntegers | None = None
        self.verifying: dict[int, Future[None]] = {}  # by step

    def section(self, step: int, table: NDArray[np.int32], coders: Executor) -> NDArray[np.int32]:
        """The symbols of a step, shaped as `table`; zeros for what is lost or not to be believed: mu then stands."""
        payload = self.payloads[step]
        if payload is None or self.wrong is not None:
            return np.zeros_like(table)
        try:
            symbols, verify = entropy.decode_ahead(payload, table.ravel(), self.model.gaussian)
            if self.model.device.type in ELSEWHERE:
                self.verifying[step] = coders.submit(verify)
            else:
                verify()
        except BitstreamError as error:
            self._distrust(step, error)
            return np.zeros_like(table)
        if symbols.any():
            self.holding = self.slice_of[step] + 1
        return symbols.reshape(table.shape)

    def verify(self) -> None:
        """What the threads made of the sections: the first that is wrong counts, what came after it is as wrong."""
        for step, verified in self.verifying.items():
            try:
                verified.result()
            except BitstreamError as error:
                self._distrust(step, error)
                break

    def _distrust(self, step: int, error: BitstreamError) -> None:
        # The section's own CRC was right: the coder went astray because (mu, sigma) differ.
        self.wrong = _WrongIntegers(self.slice_of[step], f"{error}; its parameters differ from the encoder's")

    def verified(self, latents: Latents) -> Latents | MvcodecError:
        """They themselves if the checks of all slices that were decoded are those of the encoder."""
        stream = self.stream
        checks = slice_checks(self.model, latents.y_hat, stream.count)
        whole = len(stream.slices) if self.wrong is None else self.wrong.slice
        for i, (found, part) in enumerate(zip(checks[:whole], stream.slices, strict=False)):
            if len(part.sections) == self.passes[i] and found != part.check:
                sentence = f"decoded integers have check {found:#06x}, the encoder's had {part.check:#06x}"
                return _WrongIntegers(i, f"{sentence}; the two machines' arithmetic differs")
        if self.wrong is None and stream.version == 3 and stream.damage is None and max(self.holding, 1) < stream.count:
            return BitstreamError("the last slice of the file holds nothing")
        return self.wrong or latents


def decode_intact(model: Model, streams: Sequence[Stream]) -> list[tuple[Latents, Stream] | MvcodecError]:
    """`decode_together` for files that may be damaged -> each one's latents and the stream that it really stands for.

    A section's CRC-8 misses one random damage in 256. The check of the decoded integers then finds it, and the file
    is cut before that slice, as if its CRC had been wrong; `damage` says so. Where already slice 0 fails, the
    hyper-latent may be what is damaged: nothing is certain any more, and the file is refused with BitstreamError.
    A file that was read as intact is never cut: its wrong integers are a DesyncError.
    """
    results: list[tuple[Latents, Stream] | MvcodecError] = []
    for stream, first in zip(streams, decode_together(model, streams), strict=True):
        kept, found = stream, first
        while isinstance(found, _WrongIntegers) and kept.damage is not None:
            if found.slice == 0:
                found = BitstreamError(f"hyper-latent or first slice is corrupt ({found})")
                break
            names = section_names(kept.version, kept.count)
            lost = tuple(name for part in names[found.slice :] for name in part)
            damage = Damage(f"wrong integers in slice {found.slice}: corrupt", kept.damage.offset, lost)
            kept = replace(kept, slices=kept.slices[: found.slice], damage=damage)
            (found,) = decode_together(model, [kept])
        results.append(found if isinstance(found, MvcodecError) else (found, kept))
    return results


class _WrongIntegers(DesyncError):
    """A slice whose integers cannot be those that were encoded."""

    def __init__(self, index: int, sentence: str) -> None:
        super().__init__(f"slice {index}: {sentence}")
        self.slice = index
        self.sentence = sentence

    def __reduce__(self) -> tuple[type[_WrongIntegers], tuple[int, str]]:
        return type(self), (self.slice, self.sentence)  # worker processes send errors by pickle


def _sides(header: Header) -> tuple[int, int]:
    return header.height, header.width


def _hyper_index(shape: tuple[int, ...] | torch.Size, t: float, bands: int) -> NDArray[np.int32]:
    """Table of each z in C order: that of its channel in the band of quality t."""
    _, channels, height, width = shape
    first = channels * band_of(round(10000 * t), bands)
    return np.repeat(np.arange(first, first + channels, dtype=np.int32), height * width)
