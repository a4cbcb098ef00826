"""Pictures as the codec sees them: numpy arrays with their colour profile and EXIF, read and written whole.

What the codec can keep is kept; what it cannot is refused with a sentence, never silently changed:

    grey, 1-bit             -> [H, W]     uint8, stays grey
    RGB, palette, YCbCr     -> [H, W, 3]  uint8
    16-bit grey             -> [H, W]     uint16
    12-bit grey (TIFF)      -> [H, W]     uint16, spread over the full range
    16-bit RGB (PNG, TIFF)  -> [H, W, 3]  uint16
    any of these with alpha -> refused, or flattened where the caller says how
    CMYK, Lab, float, 32-bit, animations, other kinds of deep colour (PPM, JPEG 2000, AVIF, TIFF in planes) -> refused

The EXIF orientation is baked into the pixels and its tag removed, so that no viewer turns the picture twice.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mvcodec.container import check_cap
from mvcodec.errors import MvcodecError, PictureError, UsageError
from mvcodec.files import atomic
from mvcodec.frames import MAX_PIXELS
from mvcodec.png16 import encode_png16

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Alpha = Literal["refuse", "drop", "white", "black"]

_ORIENTATION_TAG, _PLANAR_TAG, _BITS_TAG, _PHOTOMETRIC_TAG = 0x0112, 284, 258, 262
# EXIF orientation -> (transpose, flip rows, flip columns), applied in that order.
_ORIENTATIONS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
# Pillow keeps only the high byte of 16-bit colour; unpacking with the other byte order yields the low one.
_LOW_BYTE = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B" if sys.byteorder == "little" else "RGB;16L",
}
# How Pillow writes each kind: all that was decoded is kept, but by JPEG, which can only come near.
_WRITTEN: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 3},  # of zlib's: three to six times as fast as Pillow's 6, files a few per cent larger
    "TIFF": {},
    "PPM": {},
    "BMP": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "quality": 0, "method": 0},  # of what is lossless quality is how long to look
}
_SUFFIXES_16_BIT = (".png", ".tif", ".tiff")
# What a TIFF file says about the scene; its other tags describe how its own pixels are stored.
_TIFF_TAGS_KEPT = {270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, 0x8769, 0x8825}
_EXIF_PREFIX = b"Exif\0\0"


@dataclass(frozen=True, eq=False)
class Image:
    """One picture: `pixels` [H, W, 3] (RGB) or [H, W] (grey), uint8 or uint16 over its full range."""

    pixels: Pixels
    icc: bytes = b""
    exif: bytes = b""

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype not in (np.uint8, np.uint16):
            raise PictureError(f"pixels are {self.pixels.dtype}; give uint8 or uint16 over their full range")
        if not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)) or 0 in shape:
            raise PictureError(f"pixels have shape {shape}; give [H, W, 3] (RGB) or [H, W] (grey)")

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def colour(self) -> Literal["rgb", "grey"]:
        return "rgb" if self.pixels.ndim == 3 else "grey"

    @property
    def depth(self) -> Literal[8, 16]:
        return 8 if self.pixels.dtype == np.uint8 else 16

    def without_metadata(self) -> Image:
        return replace(self, icc=b"", exif=b"")


def read(source: str | os.PathLike[str] | bytes, *, alpha: Alpha = "refuse", max_pixels: int = MAX_PIXELS) -> Image:
    """Read a picture from a path or from the bytes of a file.

    Raises PictureError for anything that is no picture, is damaged, exceeds `max_pixels`, or is of a kind
    that could only be coded by changing it; OSError where the file itself cannot be opened.
    """
    if alpha not in get_args(Alpha):
        raise UsageError(f"alpha {alpha!r} is none of {', '.join(get_args(Alpha))}")
    check_cap(max_pixels)
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    with _readable(), _LIMIT.lifted_to(max_pixels), _open(data, max_pixels) as picture:
        _refuse_frames(picture)
        layout = _layout(picture)  # first of all: to load the pixels is to forget it
        _refuse_depth(picture, data)
        if picture.format in ("PNG", "TIFF"):
            # PNG: getexif() would, and take what is wrong with them for a fault of the EXIF. TIFF: Pillow turns the
            # picture as it loads it, unless the orientation is taken away, and then its size may be wrong.
            picture.load()
        orientation, exif = _exif(picture)
        icc = picture.info.get("icc_profile") or b""
        if picture.has_transparency_data:
            pixels = _flatten(picture, layout, alpha)
        elif layout in _LOW_BYTE:
            with _open(data, max_pixels) as again:
                pixels = _deep_colour(picture, again)
        else:
            pixels = _plain(picture, layout)
        return Image(_turn(pixels, orientation), icc, exif)


def read_named(path: Path, *, alpha: Alpha = "refuse") -> Image:
    """`read` for commands of many pictures: a PictureError that names the file, and no option of other commands."""
    try:
        return read(path, alpha=alpha)
    except OSError as error:
        raise PictureError(f"{path}: cannot be read as a picture: {error.strerror}") from error
    except PictureError as error:
        raise PictureError(f"{path}: {error.message}") from error


def write(target: str | os.PathLike[str], image: Image) -> None:
    """Write a picture whole or not at all; the ending of `target` chooses the format."""
    path = Path(target)
    with atomic(path) as file:
        file.write(to_bytes(image, path.suffix))


def format_of(suffix: str) -> str:
    """Pillow's name of the format that an ending stands for; PictureError for what is not written here."""
    from PIL import Image as pil

    pil.init()
    kind = pil.EXTENSION.get(suffix.lower())
    if kind not in _WRITTEN:
        raise PictureError(f"no picture is written with the ending {suffix!r}; use .png")
    return kind


def to_bytes(image: Image, suffix: str = ".png") -> bytes:
    """The picture as the bytes of a file of this kind. JPEG alone loses something: quality 95, colours in full."""
    from PIL import Image as pil

    kind = format_of(suffix)
    suffix = suffix.lower()
    if image.depth == 16 and suffix not in _SUFFIXES_16_BIT:
        raise PictureError(f"a 16-bit picture cannot be kept in a {suffix} file; use .png")
    if image.depth == 16 and image.colour == "rgb":
        if suffix != ".png":
            raise PictureError(f"16-bit colour cannot be written to a {suffix} file here; use .png")
        return encode_png16(image.pixels.astype(np.uint16, copy=False), icc=image.icc, exif=image.exif)
    options = dict(_WRITTEN[kind])
    if image.icc:
        options["icc_profile"] = image.icc
    if image.exif:
        options["exif"] = _EXIF_PREFIX + image.exif
    stream = io.BytesIO()
    try:
        pil.fromarray(image.pixels).save(stream, kind, **options)
    except (ValueError, SyntaxError, struct.error, OSError) as error:  # EXIF and profile are whatever a file brought
        raise PictureError(f"cannot be written as {suffix} ({error})") from error
    return stream.getvalue()


class _PillowsLimit:
    """Pillow's own limit, one for all threads, out of the way while a caller's cap is higher."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.own: int | None = None

    @contextmanager
    def lifted_to(self, max_pixels: int) -> Iterator[None]:
        from PIL import Image as pil

        with self.lock:
            own = self.own if self.users else pil.MAX_IMAGE_PIXELS
            lifts = own is not None and max_pixels > 2 * own  # beyond twice as many it raises
            if lifts:
                self.own, self.users, pil.MAX_IMAGE_PIXELS = own, self.users + 1, None
        try:
            yield
        finally:
            if lifts:
                with self.lock:
                    self.users -= 1
                    if not self.users:
                        pil.MAX_IMAGE_PIXELS = self.own


_LIMIT = _PillowsLimit()


@contextmanager
def _readable() -> Iterator[None]:
    """Turn whatever Pillow raises on a bad file into a PictureError; its warnings help nobody here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (MvcodecError, MemoryError):
            raise
        except Exception as error:
            raise PictureError(f"cannot be read as a picture ({error or type(error).__name__})") from error


def _open(data: bytes, max_pixels: int) -> ImageFile:
    """Parse the header only: nothing is allocated before the size is known to be under the cap."""
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        picture = pil.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise PictureError("is not a picture of a known format") from error
    except pil.DecompressionBombError as error:  # of Pillow's limit, which was left where it is beyond ours
        raise PictureError(f"has more pixels than the cap of {max_pixels}", "raise it with --max-pixels") from error
    width, height = picture.size
    if width * height > max_pixels:
        size = f"{width} x {height} pixels"
        raise PictureError(f"has {size}, over the cap of {max_pixels}", "raise it with --max-pixels")
    return picture


def _refuse_frames(picture: ImageFile) -> None:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # MPO: a photograph whose further frames are previews
        raise PictureError(f"holds {frames} pictures; split it into one file each")


def _refuse_depth(picture: ImageFile, data: bytes) -> None:
    """Colour of more than eight bits that Pillow would cut down to eight, or shuffle."""
    deep = False
    if picture.format == "TIFF":
        tags = picture.tag_v2  # type: ignore[attr-defined]
        deep = tags.get(_PLANAR_TAG) == 2 and max(tags.get(_BITS_TAG, (1,))) > 8
    elif picture.format == "JPEG2000" and picture.mode not in ("I;16", "I"):
        size = data.find(b"\xff\x4f\xff\x51")  # its codestream begins with the marker segment SIZ
        deep = size >= 0 and len(data) > size + 42 and data[size + 42] & 127 > 7
    elif picture.format == "AVIF":
        settings = data.find(b"av1C")
        deep = settings >= 0 and len(data) > settings + 6 and bool(data[settings + 6] & 64)  # high_bitdepth
    if deep:
        raise PictureError("is of more than 8 bits a sample, in a form that would lose some; convert it to 16-bit PNG")


def _layout(picture: ImageFile) -> str:
    """How the samples lie in the file ("RGB;16B", "RGB > 255"), which `picture.mode` does not tell."""
    if not picture.tile:
        return picture.mode
    codec, _, _, arguments = picture.tile[0]
    if codec == "ppm" and isinstance(arguments, tuple) and int(arguments[1]) > 255:
        return f"{arguments[0]};16"
    return arguments if isinstance(arguments, str) else str((arguments or [picture.mode])[0])


def _exif(picture: ImageFile) -> tuple[int, bytes]:
    """Orientation, to be baked in, and the EXIF data as a bare TIFF stream without it and without a preview."""
    orientation = 1
    with suppress(Exception):  # whatever stands there: a picture is none the worse for it
        exif = picture.getexif()
        orientation = exif.pop(_ORIENTATION_TAG, 1)
        if picture.format == "TIFF":
            for tag in set(exif) - _TIFF_TAGS_KEPT:
                del exif[tag]
        return orientation, exif.tobytes().removeprefix(_EXIF_PREFIX) if len(exif) else b""
    return orientation, b""


def _flatten(picture: ImageFile, layout: str, alpha: Alpha) -> Pixels:
    from PIL import Image as pil

    if alpha == "refuse":
        raise PictureError("has an alpha channel, which is not coded", "say --alpha drop, white or black")
    if _is_deep(layout):
        raise PictureError("is 16-bit with an alpha channel; flatten it first")
    grey = picture.mode in ("1", "L", "LA")
    rgba = picture.convert("RGBA")
    if alpha != "drop":
        rgba = pil.alpha_composite(pil.new("RGBA", rgba.size, alpha), rgba)
    rgb = np.asarray(rgba)[..., :3]
    return np.ascontiguousarray(rgb[..., 0] if grey else rgb)


def _deep_colour(high: ImageFile, low: ImageFile) -> NDArray[np.uint16]:
    """All 16 bits of RGB: `high` and `low` are the same file, opened twice.

    Pillow has no 16-bit colour mode and drops the low bytes. Told that the samples have the opposite byte
    order, its own decoders deliver exactly those, so two readings make the whole.
    """
    low.tile = [tile._replace(args=_opposite(tile.args)) for tile in low.tile]
    pixels: NDArray[np.uint16] = (np.asarray(high).astype(np.uint16) << 8) | np.asarray(low)
    return pixels


def _opposite(arguments: Any) -> Any:
    """Decoder arguments of a Pillow tile (a raw mode, or a tuple led by one) with the other byte order."""
    if isinstance(arguments, str):
        return _LOW_BYTE[arguments]
    return (_LOW_BYTE[arguments[0]], *arguments[1:])


def _plain(picture: ImageFile, layout: str) -> Pixels:
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM")):
        pixels: NDArray[np.uint16] = np.asarray(picture).astype(np.uint16)
        if layout == "I;12":
            pixels = pixels << np.uint16(4) | pixels >> np.uint16(8)
        if picture.format == "TIFF" and picture.tag_v2.get(_PHOTOMETRIC_TAG) == 0:  # type: ignore[attr-defined]
            pixels = ~pixels  # white is zero
        return pixels
    if _is_deep(layout):
        raise PictureError("is 16-bit of a kind that would lose its low bits; convert it to 16-bit PNG")
    if mode in ("1", "L"):
        return np.asarray(picture.convert("L"))
    if mode in ("RGB", "P", "RGBX", "YCbCr"):
        return np.asarray(picture.convert("RGB"))
    if mode == "CMYK":
        raise PictureError("is CMYK, which only its printer's profile can turn into RGB; convert it first")
    raise PictureError(f"has samples of kind {mode!r}; convert it to 8 or 16-bit grey or RGB first")


def _is_deep(layout: str) -> bool:
    """Whether samples have 16 bits: in BMP, pixels may."""
    return "16" in layout and not layout.startswith("BGR;16")


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    transpose, flip_rows, flip_columns = _ORIENTATIONS.get(orientation, _ORIENTATIONS[1])
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])
