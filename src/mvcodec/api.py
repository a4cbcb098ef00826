"""The Python interface: arrays or files in, bytes out, and back. The command line calls the same."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mvcodec import codec, images, latents, weights
from mvcodec.codec import DecodedView, OnFailure
from mvcodec.container import Header, Stream, refuse_larger, unpack
from mvcodec.errors import ModelError, MvcodecError, UsageError
from mvcodec.files import Input, contents
from mvcodec.frames import MAX_PIXELS, name_of
from mvcodec.images import Image
from mvcodec.runtime import give_back
from mvcodec.weights import Model

Picture = Image | NDArray[np.uint8] | NDArray[np.uint16] | str | os.PathLike[str]
File = Stream | Input
Weights = Model | str | os.PathLike[str] | None


def encode(
    picture: Picture,
    *,
    quality: float = 50.0,
    camera_id: str | None = None,
    frame: int | None = None,
    timestamp_us: int | None = None,
    alpha: Literal["refuse", "drop", "white", "black"] = "refuse",
    max_pixels: int = MAX_PIXELS,
    effort: int = 0,
    max_memory: int | None = None,
    model: Weights = None,
    device: str = "auto",
) -> bytes:
    """One camera's picture -> the bytes of its .phv file.

    picture: a file, an `Image`, or an array [H, W, 3] (RGB) or [H, W] (grey), uint8 or uint16, full range.
    quality: 0 .. 100, larger is better and costs more bytes.
    camera_id, frame, timestamp_us: where and when. Of a file, what is not given is taken from its name, as
        `mvcodec.frames.name_of` reads it; an array has none.
    alpha, max_pixels: see `mvcodec.images.read`; for files only.
    effort: 0 to 5, how long to look for a better trade: of about as many bytes a better picture; see `mvcodec.search`.
    max_memory: bytes to stay within, the program's own included; UsageError where that cannot be. Freed memory goes
        back to the system from then on, whatever `mvcodec.runtime.prepare` has said.

    Raises PictureError for a picture that is damaged or cannot be kept, ModelError for weights that are not there,
    UsageError for other arguments, OSError where the file cannot be opened.
    """
    if isinstance(picture, str | os.PathLike):
        name = name_of(Path(picture))
        camera_id = name.camera_id if camera_id is None else camera_id
        frame = name.frame if frame is None else frame
        picture = images.read(picture, alpha=alpha, max_pixels=max_pixels)
    if not isinstance(picture, Image | np.ndarray):
        raise UsageError(f"picture is a {type(picture).__name__}: give a path, an array, or mvcodec.images.read(bytes)")
    image = picture if isinstance(picture, Image) else Image(picture)
    _keep_within(max_memory)
    return codec.encode_image(
        load_model(model, device),
        image,
        quality,
        camera_id=camera_id or "",
        frame=frame,
        timestamp_us=timestamp_us,
        effort=effort,
        max_memory=max_memory,
    )


def decode(
    file: File, *, partial: bool = False, max_pixels: int = MAX_PIXELS, model: Weights = None, device: str = "auto"
) -> DecodedView:
    """One .phv file (its bytes or its path) -> its picture, without other views; else as `decode_set`."""
    return decode_set([file], partial=partial, max_pixels=max_pixels, model=model, device=device)[0]


def decode_set(
    files: Sequence[File],
    *,
    joint: bool = True,
    refine: bool = True,
    max_peers: int | None = None,
    maps: bool = False,
    partial: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_memory: int | None = None,
    model: Weights = None,
    device: str = "auto",
    on_failure: OnFailure | None = None,
) -> list[DecodedView]:
    """The .phv files of one instant, in any order -> their pictures, sorted by camera id.

    Each view's `pixels` are [H, W, 3] (RGB) or [H, W] (grey) of the size that was encoded, uint8 or, of 16-bit
    pictures, uint16 over their full range.

    joint=False decodes each view alone. partial=True takes of a damaged file what is intact.
    refine=False aligns no view with others at pixel level; max_peers aligns each with its so many most consistent ones.
    maps=True says in every view's `maps` where each of its peers contributed.
    max_pixels: of a view; BitstreamError for a file that says it has more: a few bytes can say so.
    max_memory: bytes to stay within, the program's own included; UsageError where that cannot be. Freed memory goes
        back to the system from then on, whatever `mvcodec.runtime.prepare` has said.
    model: None finds the weights that the files name; views of one model help each other.
    on_failure: see `mvcodec.codec.decode_set`. Damaged files, and those whose weights are missing, raise all the same.
    Every file is a view of its own: what the command `decode` knows of cameras that are there twice is not asked here.

    Raises BitstreamError for a file that is damaged, ModelError for weights that are not there, DesyncError where the
    integers are not those that were encoded, UsageError for other arguments, OSError where a file cannot be opened.
    """
    one = isinstance(files, Stream | bytes | bytearray | memoryview | str | os.PathLike)
    if one or not isinstance(files, Iterable):
        raise UsageError("decode_set takes a list of files; decode takes one")
    streams = [_stream(file, partial) for file in files]
    if not streams:
        raise UsageError("there are no files to decode")
    for stream in streams:
        refuse_larger(stream.header, max_pixels)
    _keep_within(max_memory)
    views: list[DecodedView] = []
    for of_one_model in by_model(streams):
        views += codec.decode_set(
            model_for(of_one_model[0].header, model, device),
            of_one_model,
            joint=joint,
            refine=refine,
            on_failure=on_failure,
            max_memory=max_memory,
            max_peers=max_peers,
            maps=maps,
        )
    return sorted(views, key=lambda view: view.header.camera_id)


def by_model(streams: Sequence[Stream]) -> list[list[Stream]]:
    """Streams that were written with one model together: they are decoded together."""
    names = sorted({stream.header.model_id for stream in streams})
    return [[stream for stream in streams if stream.header.model_id == name] for name in names]


def check_integers(
    stream: Stream, *, max_pixels: int = MAX_PIXELS, model: Weights = None, device: str = "auto"
) -> None:
    """Decode a stream as far as its integers; DesyncError where they are not those that were encoded.

    max_pixels: as in `decode_set`.
    """
    refuse_larger(stream.header, max_pixels)
    loaded = model_for(stream.header, model, device)  # kept for others, who may want gradients: not in inference mode
    with torch.inference_mode():
        latents.decode_latents(loaded, stream)


def load_model(model: Weights = None, device: str = "auto") -> Model:
    """Weights by name or path (default: the ones the package recommends), loaded once per device."""
    if isinstance(model, Model):
        return model
    if not isinstance(model, str | os.PathLike | None):
        raise UsageError(f"model is a {type(model).__name__}: give a name, a path, or what load_model returned")
    return _loaded(weights.DEFAULT_MODEL if model is None else os.fspath(model), resolve_device(device))


def _keep_within(max_memory: Any) -> None:
    if max_memory is None:
        return
    if isinstance(max_memory, bool) or not isinstance(max_memory, Real) or not 0 < float(max_memory) < math.inf:
        raise UsageError(f"max_memory {max_memory!r} is no number of bytes; None is no limit")
    give_back()


def model_for(header: Header, model: Weights = None, device: str = "auto") -> Model:
    """The weights a file was written with: those given, or those available that bear its model id."""
    if model is None:
        model = _name_of_id(header.model_id, header.profile)
    loaded = load_model(model, device)
    codec.check_model(loaded, header)
    return loaded


def resolve_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:1 -> a device that is there; asking for an absent one is an error."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    none = UsageError(f"device {name!r} is none of auto, cpu, cuda, cuda:1")
    if not isinstance(name, str | torch.device):
        raise none
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise none from error
    if device.type not in ("cpu", "cuda"):
        raise none
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MvcodecError(f"device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


@lru_cache(maxsize=4)
def _loaded(name: str, device: torch.device) -> Model:
    return weights.load_model(name, device)


@lru_cache(maxsize=16)
def _name_of_id(model_id: bytes, profile: str) -> str:
    """The available model of this id, looking first where the profile's name points."""
    paths = sorted(weights.available_models(), key=lambda path: not path.stem.startswith(profile))
    for path in paths:
        with suppress(ModelError):  # of another that cannot be read; whoever names it is told why
            tensors, config, _ = weights.read_model_file(path)
            if weights.entropy_id(tensors, config) == model_id:
                return str(path)
    known = ", ".join(path.stem for path in paths) or "none"
    raise ModelError(f"was written with the {profile} model {model_id.hex()}, which is not here (available: {known})")


def _stream(file: File, partial: bool) -> Stream:
    return file if isinstance(file, Stream) else unpack(contents(file), partial=partial)
