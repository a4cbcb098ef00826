"""One picture that shows what the demo did: crops of every view, four ways."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pil
from PIL import ImageDraw

from mvcodec.errors import MvcodecError
from mvcodec.images import Image
from mvcodec.rate_control import encode_within

TILE = 320  # pixels, shown at 100 %
CAPTION = 16


def compare(name: str, original: Image, file: bytes, alone: Image, joint: Image) -> NDArray[np.uint8]:
    """The row of a view: original, JPEG of as many bytes, decoded alone, decoded jointly; the middle of each."""
    jpeg = jpeg_within(original, len(file))
    tiles = [
        (f"{name}: original", original),
        (f"JPEG, {len(jpeg)} bytes", _decoded(jpeg)),
        (f"mvcodec alone, {len(file)} bytes", alone),
        ("mvcodec joint, the same bytes", joint),
    ]
    return np.hstack([_tile(caption, image) for caption, image in tiles])


def jpeg_within(image: Image, budget_bytes: int) -> bytes:
    """Pillow JPEG (4:4:4, optimised) of the best quality within the budget, or of the lowest there is."""
    try:
        return encode_within(lambda quality: _jpeg(image, quality), budget_bytes)[0]
    except MvcodecError:
        return _jpeg(image, 0)


def _jpeg(image: Image, quality: float) -> bytes:
    stream = io.BytesIO()
    _eight_bit(image).save(stream, "JPEG", quality=max(1, round(quality)), subsampling=0, optimize=True)
    return stream.getvalue()


def _decoded(data: bytes) -> Image:
    with pil.open(io.BytesIO(data)) as picture:
        return Image(np.asarray(picture))


def _eight_bit(image: Image) -> pil.Image:
    return pil.fromarray((image.pixels >> (image.depth - 8)).astype(np.uint8))


def _tile(caption: str, image: Image) -> NDArray[np.uint8]:
    """The middle TILE x TILE pixels under a line of text, [TILE + CAPTION, TILE, 3] uint8."""
    picture = _eight_bit(image).convert("RGB")
    left, top = max(0, (image.width - TILE) // 2), max(0, (image.height - TILE) // 2)
    tile = pil.new("RGB", (TILE, TILE + CAPTION), "white")
    tile.paste(picture.crop((left, top, min(image.width, left + TILE), min(image.height, top + TILE))), (0, CAPTION))
    ImageDraw.Draw(tile).text((4, 2), caption, fill="black")
    return np.asarray(tile)
