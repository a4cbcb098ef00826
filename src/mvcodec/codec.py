"""The codec in two functions: what a camera does, and what the sink does with any number of cameras' files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mvcodec.container import MAX_EXIF, MAX_ICC, MAX_PIXELS, MAX_SIDE, Damage, Header, Stream, pack, unpack
from mvcodec.cores import beside
from mvcodec.entropy.tables import SIGMAS
from mvcodec.errors import ModelError, MvcodecError, PictureError, UsageError
from mvcodec.graphs import Graphs
from mvcodec.images import Image
from mvcodec.latents import LATENT_STRIDE, Latents, Walk, decode_intact, encode_latents, of_one_size, same_size
from mvcodec.nn.aligned_refinement import AlignedRefinement
from mvcodec.nn.coefficient_estimate import Told
from mvcodec.nn.gain import hat_basis
from mvcodec.nn.quantisation_constraint import correction
from mvcodec.nn.transforms import KltAnalysis
from mvcodec.padding import extended, shown
from mvcodec.parahydra import PAD_MULTIPLE
from mvcodec.search import MOST_EFFORT, better_latents
from mvcodec.tiling import FEW, pixels_at_once, pixels_in_walks, tiled
from mvcodec.transfers import fetched, to_device
from mvcodec.weights import Model

OnFailure = Callable[[Header, MvcodecError], None]
HALF = (-6e4, 6e4)  # what half precision holds; only a file that no picture gives goes beyond
MOST_FRAME = 4  # upright and lying pictures of a camera fit a frame of 2


@dataclass(frozen=True, eq=False)
class DecodedView:
    """One reconstructed picture and how it came about."""

    header: Header
    image: Image
    peers: tuple[str, ...] = ()  # camera ids that were read as context
    # In the order of `peers`, where the aligned refinement ran: its share of each, averaged over the picture, and
    # pixel by pixel, uint8 of 255 [K - 1, H, W], if asked for. The rest of 1 is the view's own.
    weights: tuple[float, ...] | None = None
    maps: NDArray[np.uint8] | None = None
    damage: Damage | None = field(default=None)

    @property
    def pixels(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        return self.image.pixels


@dataclass(frozen=True)
class EncodedView:
    """A .phv file, and what only its encoder knows without decoding it again."""

    data: bytes
    latents: Callable[[], Latents]
    estimated_bits: float  # nan if not asked for


def encode_image(
    model: Model,
    image: Image,
    quality: float,
    *,
    camera_id: str = "",
    frame: int | None = None,
    timestamp_us: int | None = None,
    effort: int = 0,
    max_memory: int | None = None,
) -> bytes:
    """One camera's picture -> the bytes of its .phv file. quality 0..100, larger is better.

    effort: 0 is one pass; from 1 to `mvcodec.search.MOST_EFFORT` each makes twice as many trials as the one before.
    max_memory: bytes to stay within, the program's own included; see `mvcodec.tiling`.
    """
    view = encode_view(
        model,
        image,
        quality,
        camera_id=camera_id,
        frame=frame,
        timestamp_us=timestamp_us,
        effort=effort,
        max_memory=max_memory,
    )
    return view.data


@torch.inference_mode()
def encode_view(
    model: Model,
    image: Image,
    quality: float,
    *,
    camera_id: str = "",
    frame: int | None = None,
    timestamp_us: int | None = None,
    effort: int = 0,
    estimate: bool = False,
    max_memory: int | None = None,
) -> EncodedView:
    """`encode_image`, with the decoder's latents and, if asked, the estimate of the file's bits. Eq. (1)-(4)."""
    _check_quality(quality)
    check_effort(model, effort)
    quality = round(quality * 100) / 100  # as the header stores it
    _check_fits(image)
    header = Header(
        model_id=model.id,
        profile=model.net.config.profile,
        quality=quality,
        width=image.width,
        height=image.height,
        colour=image.colour,
        depth=image.depth,
        camera_id=camera_id,
        frame=frame,
        timestamp_us=timestamp_us,
        icc=image.icc,
        exif=image.exif,
    )
    model = model.within(max_memory)
    net = model.net
    t = to_device(torch.tensor([quality / 100], dtype=torch.float32), model.device)
    basis = hat_basis(t, net.config.quality_knots)
    x = samples(image)  # [1, 3, H, W] integers, multiples of 64
    most = pixels_at_once(
        net.config.transform, x[0, 0].numel(), 1, max_memory, searched=effort > 0, bfloat16=model.bfloat16
    )
    y = _analysed(model, x, basis, most)
    z = model.graphs.up_to(most, x[0, 0].numel())(net.h_a, y)  # [1, N, H/64, W/64]
    if effort and min(image.height, image.width) >= LATENT_STRIDE:  # else hardly anything that is coded is shown

        def picture(rows: slice, columns: slice) -> Tensor:
            return to_unit(to_device(x[..., rows, columns], model.device))

        y = better_latents(model, y, z, quality / 100, effort, picture, (image.height, image.width))
    coded = encode_latents(model, y, z, quality / 100, estimate, shown((image.height, image.width), y))
    data = pack(Stream(header, coded.hyper, coded.slices))
    return EncodedView(data, coded.latents, coded.estimated_bits)


def _analysed(model: Model, x: Tensor, basis: Tensor, most: int) -> Tensor:
    """y [1, M, H/16, W/16] in quantiser steps of a picture [1, 3, H, W], samples or floats in [0, 1], tile by tile."""
    net = model.net
    call = model.graphs.up_to(most, x[0, 0].numel())  # tiles measure what they see of the network itself

    def analyse(part: Tensor, views: slice) -> Tensor:
        part = part if part.is_floating_point() else to_unit(to_device(part, model.device))
        with _autocast(model):
            y: Tensor = call(net.g_a, part, basis)
            return y

    return tiled(net.g_a, analyse, x, most).float() * net.gain.gain(basis)


@torch.inference_mode()
def decode_set(
    model: Model,
    files: Sequence[bytes | Stream],
    *,
    joint: bool = True,
    refine: bool = True,
    partial: bool = False,
    on_failure: OnFailure | None = None,
    max_memory: int | None = None,
    max_peers: int | None = None,
    maps: bool = False,
) -> list[DecodedView]:
    """Files of one instant, any number, any order -> their pictures, sorted by camera id. Eq. (5), (17).

    Views of very different shapes or sizes, which no common frame holds (`in_frames`), do not help each other.

    joint=False decodes each view alone. refine=False aligns no view with others: of the aligned refinement only the
    part runs that needs no peers. max_peers: it takes only so many peers for each view, the most consistent ones.
    maps: say where each of them contributed.
    partial=True accepts damaged files as far as they are intact. on_failure is told of each view whose integers
    cannot be had, and the others are decoded without it; where it is None the first such view raises.
    max_memory: bytes to stay within, the program's own included; see `mvcodec.tiling`.
    """
    _check_peers(max_peers)
    if maps and not (joint and refine):
        raise UsageError("maps say where aligned peers contributed: not without joint and refine")
    streams = [s if isinstance(s, Stream) else unpack(s, partial=partial) for s in files]
    if not streams:
        raise UsageError("no files to decode")
    for stream in streams:
        check_model(model, stream.header)
    model = model.within(max_memory)
    # Order decides nothing: not even rounding. Ties of camera id are broken by content.
    streams.sort(
        key=lambda s: (
            s.header.camera_id,
            s.header.frame or 0,
            s.hyper,
            s.slices[0].sections if s.slices else (),
        )
    )
    results = _decoded(model, streams, max_memory)
    decoded: list[tuple[Latents, Stream]] = []
    for k, stream in enumerate(streams):
        result = results[k]
        if not isinstance(result, MvcodecError):
            latents, kept = result
            decoded.append((latents._replace(y_hat=latents.y_hat.float()), kept))
        elif on_failure is None:
            raise result
        else:
            on_failure(stream.header, result)
    if not decoded:
        return []
    return views_of(
        model,
        [stream for _, stream in decoded],
        [latents for latents, _ in decoded],
        joint=joint,
        refine=refine,
        max_memory=max_memory,
        max_peers=max_peers,
        maps=maps,
    )


def views_of(
    model: Model,
    streams: Sequence[Stream],
    latents: Sequence[Latents],
    *,
    joint: bool = True,
    refine: bool = True,
    max_memory: int | None = None,
    max_peers: int | None = None,
    maps: bool = False,
) -> list[DecodedView]:
    """What `decode_set` makes of integers: streams and what was decoded of each -> views, in that order."""
    qualities = torch.tensor([s.header.quality / 100 for s in streams], dtype=torch.float32)
    qualities = to_device(qualities, model.device)
    known = [s.damage is None or not s.damage.missing for s in streams]
    sizes = [(view.y_hat.shape[2], view.y_hat.shape[3]) for view in latents]
    views: dict[int, DecodedView] = {}
    for group in in_frames(sizes) if joint else [list(range(len(sizes)))]:
        pictures, weights, drawn = reconstruct(
            model,
            [latents[k] for k in group],
            qualities[group],
            joint,
            refine,
            max_memory,
            max_peers,
            maps,
            [known[k] for k in group],
        )
        for n, k in enumerate(group):
            header, others = streams[k].header, [m for m in range(len(group)) if m != n] if joint else []
            views[k] = DecodedView(
                header,
                to_image(pictures[n], header),
                tuple(streams[group[m]].header.camera_id for m in others),
                None if weights is None else tuple(weights[n, others].tolist()),
                None if drawn is None else drawn[n, others, : header.height, : header.width].numpy(),
                streams[k].damage,
            )
    return [views[k] for k in range(len(streams))]


def in_frames(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Places of views, by their heights and widths, that fit into common frames: those are decoded together.

    Each pair of a group costs its frame, whatever the views' own sizes. A frame is at most MOST_FRAME times the mean
    view in it, of sides averaged, so that two thin strips, one tall and one wide, do not ask for the square of their
    length, nor many tiny views beside a large one for as many large ones. The largest choose first.
    """
    groups: list[list[int]] = []
    for k in sorted(range(len(sizes)), key=lambda k: -math.prod(sizes[k])):
        for group in groups:
            together = (*group, k)
            height, width = (max(sizes[n][axis] for n in together) for axis in (0, 1))
            side = sum(math.sqrt(math.prod(sizes[n])) for n in together) / len(together)
            if height * width <= MOST_FRAME * side**2:
                group.append(k)
                break
        else:
            groups.append([k])
    return [sorted(group) for group in groups]


def _decoded(
    model: Model, streams: Sequence[Stream], max_memory: int | None
) -> dict[int, tuple[Latents, Stream] | MvcodecError]:
    """`decode_intact` of all: on a GPU those of one size together, on a processor beside each other."""
    room, cpu = pixels_in_walks(max_memory), model.device.type == "cpu"
    walks = same_size(streams, min(room, FEW), torch.get_num_threads()) if cpu else same_size(streams, room)

    def decode(walk: Walk) -> dict[int, tuple[Latents, Stream] | MvcodecError]:
        return dict(zip(walk.places, decode_intact(model, [streams[k] for k in walk.places]), strict=True))

    found = beside(decode, walks, model.device, room // max(walk.pixels for walk in walks))
    return {k: result for walk in found for k, result in walk.items()}


class Reconstruction(NamedTuple):
    """Pictures [3, H, W] of K views; if they were refined with peers, the shares of `RefinedViews`, and its maps."""

    pictures: list[Tensor]
    weights: Tensor | None = None  # [K, K]
    maps: Tensor | None = None  # [K, K, H, W] uint8


@torch.inference_mode()
def reconstruct(
    model: Model,
    latents: Sequence[Latents],
    qualities: Tensor,
    joint: bool = True,
    refine: bool = True,
    max_memory: int | None = None,
    max_peers: int | None = None,
    maps: bool = False,
    known: Sequence[bool] | None = None,
) -> Reconstruction:
    """Latents of K views, each [1, M, h_k, w_k] -> pictures [3, 16 h_k, 16 w_k] in [0, 1], by Para-JD.

    known: of which views all integers have been read (default: of all); what is guessed of the others binds nothing.
    """
    net = model.net
    basis = hat_basis(qualities, net.config.quality_knots)  # [K, knots]
    scaled = [view.y_hat.float() * net.gain.inverse(b[None]) for view, b in zip(latents, basis, strict=True)]
    sizes = [(y.shape[2], y.shape[3]) for y in scaled]
    groups = [list(range(len(sizes)))] if joint else of_one_size(sizes)
    decoded: list[Tensor] = [torch.empty(0)] * len(sizes)
    shares: tuple[Tensor | None, Tensor | None] = (None, None)
    for group in groups:
        height, width = (max(sizes[k][axis] for k in group) for axis in (0, 1))
        views = [scaled[k] for k in group]
        views = [F.pad(y, (0, width - y.shape[3], 0, height - y.shape[2]), mode="replicate") for y in views]
        together = net.refinement if joint and refine and len(group) > 1 else None
        pixels = LATENT_STRIDE**2 * height * width
        peers = 0 if together is None else min(max_peers or len(group), len(group) - 1)
        most = pixels_at_once(net.config.transform, pixels, len(group), max_memory, peers, bfloat16=model.bfloat16)
        pictures = _synthesise(model, torch.cat(views), basis[group], qualities[group], joint, together is None, most)

        cells = {
            n: _Cells(model, latents[k], basis[k : k + 1], qualities[k : k + 1], most, helped=together is not None)
            for n, k in enumerate(group)
            if known is None or known[k]
        }

        def draw_back(n: int, frame: Tensor, cells: dict[int, _Cells] = cells) -> None:
            if n in cells:
                cells[n].draw_back(frame)

        def draw_back_again(n: int, frame: Tensor, shown: Tensor, cells: dict[int, _Cells] = cells) -> None:
            if n in cells:
                cells[n].draw_back_again(frame, shown)

        if together is None:
            beside(lambda view: draw_back(*view), list(enumerate(pictures)), model.device, most // pixels)
        else:
            with _autocast(model):
                # Peers, too, are drawn back before they are seen; what none of them changed is then as it shall be.
                refined = together(
                    pictures,
                    qualities[group],
                    max_peers=max_peers,
                    maps=maps,
                    most=most,
                    settle=draw_back,
                    finish=draw_back_again,
                    call=model.graphs.up_to(most, pixels),
                )
            pictures, shares = refined.pictures, refined[1:]
        for k, picture in zip(group, pictures, strict=True):
            decoded[k] = _own(picture, sizes[k])
    return Reconstruction(decoded, *shares)


def _own(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """What of a picture [3, H, W] in a common frame belongs to a view of h x w latents."""
    height, width = (LATENT_STRIDE * side for side in size)
    return frame[:, :height, :width]


def _synthesise(
    model: Model, y: Tensor, basis: Tensor, qualities: Tensor, joint: bool, clean: bool, most: int
) -> Tensor:
    """y [K, M, h, w], gain undone -> pictures [K, 3, 16 h, 16 w] in [0, 1], at most so many pixels at a time.

    clean: by the refinement, each view alone. The aligned refinement cleans pictures itself.
    """
    net = model.net
    pixels = LATENT_STRIDE**2 * y.shape[2] * y.shape[3]
    call = model.graphs.up_to(most, pixels)  # as in `_analysed`

    def in_tiles(stage: nn.Module, x: Tensor, quality: Tensor) -> Tensor:
        area = x.shape[2] * x.shape[3]
        return tiled(stage, lambda part, views: call(stage, part, quality[views]), x, most * area // pixels)

    with _autocast(model):
        pictures = net.para_jd(y[None], basis[None], joint, model.fuses, in_tiles)[0].float().clamp_(0, 1)
        return cleaned(net.refinement, pictures, qualities, most, call) if clean and net.refinement else pictures


def cleaned(refinement: AlignedRefinement, pictures: Tensor, qualities: Tensor, most: int, call: Graphs) -> Tensor:
    """Pictures [K, 3, H, W] and their qualities [K] -> the same cleaned, each view alone, in [0, 1]."""

    def clean(part: Tensor, views: slice) -> Tensor:
        picture, _ = call(refinement.clean, part, qualities[views])
        return picture

    return tiled(refinement, clean, pictures, most).float().clamp_(0, 1)


class _Left(NamedTuple):
    """Of a view that was drawn back, for when peers have changed it: [1, M, h, w] in quantiser steps."""

    elsewhere: Tensor  # of y less y_hat, what the KLT of the picture does not say
    before: Tensor  # y less y_hat before it was drawn back, half precision
    apart: Tensor  # and after


class _Cells:
    """Draws decoded pictures of one view back into the cells of its y_hat, in place, where they lie in a common frame.

    frame: [3, H, W] in [0, 1], whose top left part the view fills;
    latents, quality [1] and basis [1, knots] of the view; most: so many pixels at a time; helped: peers may change
    what was drawn back.
    """

    def __init__(
        self, model: Model, latents: Latents, basis: Tensor, quality: Tensor, most: int, helped: bool = False
    ) -> None:
        self.model, self.latents, self.basis, self.quality = model, latents, basis, quality
        self.most, self.helped = most, helped
        self.left: _Left | None = None

    def draw_back(self, frame: Tensor) -> None:
        """By the curves of lone views, and what the file tells of each coefficient."""
        net, picture = self.model.net, self._picture(frame)
        if net.cells is None or net.cell_synthesis is None:
            return
        with torch.autocast(self.model.device.type, enabled=False):
            before = _analysed(self.model, picture, self.basis, self.most).sub_(self.latents.y_hat.float())
            astray = net.cells(before, self.basis, self._told(), self.quality)
            self._take(astray, picture)
            if self.helped:
                apart = before - astray
                self.left = _Left(apart - self._klt(picture), *(x.clamp(*HALF).half() for x in (before, apart)))

    def draw_back_again(self, frame: Tensor, shown: Tensor) -> None:
        """Once peers have changed what `draw_back` left; shown: how what they show differs from that, [3, H, W].

        They change so little that the blocks of g_a hardly answer: y follows by the KLT alone, a hundredth of the work.
        """
        left, self.left = self.left, None
        if left is None:
            return
        net, picture = self.model.net, self._picture(frame)
        assert net.cells is not None
        with torch.autocast(self.model.device.type, enabled=False):
            apart = self._klt(picture).add_(left.elsewhere)
            if net.cells.helped is None:
                astray = net.cells.plain(apart, self.quality)
            else:
                found = (apart, left.before, apart - left.apart, self._klt(self._picture(shown)))
                astray = net.cells.helped(self._told(), self.quality, *found).neg_()
            self._take(astray, picture)

    def _told(self) -> Told:
        ln_sigma = to_device(torch.from_numpy(SIGMAS).log().float(), self.latents.scales.device)
        return Told(self.latents.symbols, ln_sigma[self.latents.scales.int()])

    def _picture(self, frame: Tensor) -> Tensor:
        height, width = self.latents.y_hat.shape[2:]
        return _own(frame, (height, width))[None]

    def _klt(self, picture: Tensor) -> Tensor:
        """In quantiser steps [1, M, h, w]."""
        g_a = self.model.net.g_a
        assert isinstance(g_a, KltAnalysis)
        return tiled(g_a.klt, lambda x, _: g_a.linear(x), picture, self.most) * self.model.net.gain.gain(self.basis)

    def _take(self, astray: Tensor, picture: Tensor) -> None:
        net = self.model.net
        coarse, inverse = net.cell_synthesis, net.gain.inverse(self.basis)
        assert coarse is not None
        most = max(self.most // LATENT_STRIDE**2, 1)
        picture.sub_(tiled(coarse.klt, lambda x, _: correction(coarse, x, inverse), astray, most)).clamp_(0, 1)


def _check_fits(image: Image) -> None:
    """PictureError for what no file can hold, before any work is done."""
    for name, data, limit in (("EXIF data", image.exif, MAX_EXIF), ("colour profile", image.icc, MAX_ICC)):
        if len(data) > limit:
            raise PictureError(f"has {len(data)} bytes of {name}, over the {limit} of a file", "say --strip")
    if max(image.height, image.width) > MAX_SIDE or image.height * image.width > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise PictureError(f"has {size}; a file holds {MAX_SIDE} a side and {MAX_PIXELS} in all")


def check_model(model: Model, header: Header) -> None:
    """Refuse a file that other weights have written: its integers could not be decoded."""
    if header.model_id != model.id:
        raise ModelError(
            f"file was written with {header.profile} model {header.model_id.hex()}, "
            f"but {model.name} is {model.id.hex()}; pass the model it was written with"
        )


def _check_quality(quality: Any) -> None:
    if not isinstance(quality, Real) or not 0 <= float(quality) <= 100:
        raise UsageError(f"quality {quality} is no number between 0 and 100")


def _check_peers(max_peers: Any) -> None:
    if max_peers is not None and not (isinstance(max_peers, Integral) and int(max_peers) >= 1):
        raise UsageError(f"max_peers {max_peers!r} is no number of peers, 1 or more")


def check_effort(model: Model, effort: Any) -> None:
    """UsageError for an effort that there is not, or not with this model."""
    if not isinstance(effort, Integral) or not 0 <= int(effort) <= MOST_EFFORT:
        raise UsageError(f"effort {effort} is no whole number between 0 and {MOST_EFFORT}")
    if effort and (sought := model.about.get("distortion", "mse")) != "mse":
        raise UsageError(f"effort {effort} would lower squared error, but {model.name} was trained for {sought}; use 0")


def samples(image: Image) -> Tensor:
    """[H, W, 3] or [H, W] -> its integers [1, 3, H', W'], extended right and bottom to multiples of 64; grey thrice.

    A view wherever it can be, channels last: the picture is never held as floats but tile by tile.
    """
    pixels = extended(image.pixels, -image.height % PAD_MULTIPLE, -image.width % PAD_MULTIPLE)
    foreign = not pixels.flags.writeable or min(pixels.strides) < 0  # torch knows neither
    x = torch.from_numpy(pixels.copy() if foreign else pixels)
    return x.permute(2, 0, 1)[None] if x.ndim == 3 else x.expand(1, 3, -1, -1)


def to_unit(x: Tensor) -> Tensor:
    """Samples uint8 or uint16 -> float32 in [0, 1]."""
    return x.float().div_(255 if x.dtype == torch.uint8 else 65535)


def to_image(picture: Tensor, header: Header) -> Image:
    """[3, H, W] in [0, 1] -> the kind of picture that was encoded, cropped to its size."""
    pixels = picture[:, : header.height, : header.width]
    if header.colour == "grey":
        pixels = pixels.mean(dim=0, keepdim=True)
    peak, dtype = (255, torch.uint8) if header.depth == 8 else (65535, torch.uint16)
    array = fetched((pixels * peak).round_().to(dtype).permute(1, 2, 0).contiguous())
    return Image(array[..., 0] if header.colour == "grey" else array, header.icc, header.exif)


def _autocast(model: Model) -> torch.autocast:
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.bfloat16)
