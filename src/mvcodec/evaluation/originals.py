"""Pictures to measure against."""

from __future__ import annotations

from pathlib import Path

from mvcodec import images
from mvcodec.errors import PictureError
from mvcodec.images import Image

_ADVICE = {"say --alpha drop, white or black": "flatten it first", "raise it with --max-pixels": "scale it down first"}


def read_original(path: Path) -> Image:
    """`images.read` for commands of many pictures and without its options: a PictureError names file and way out."""
    try:
        return images.read(path)
    except PictureError as error:
        sentence = str(error)
        for option, way_out in _ADVICE.items():
            sentence = sentence.replace(option, way_out)
        raise PictureError(f"{path}: {sentence}") from error
