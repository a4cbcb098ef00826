"""Other codecs under the same ruler: each codes pictures at one setting, and its bytes are decoded again.

Every peer gets its best common setting for fidelity in RGB: full chroma where the format has it, slow search, no
metadata. A peer whose library or program is not here says so through `missing`; nothing is installed or required.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image as pil
from PIL import features

from mvcodec.evaluation import ffmpeg
from mvcodec.evaluation.ffmpeg import Picture

Coder = Callable[[Sequence[Picture], int], tuple[bytes, list[Picture]]]  # pictures, setting -> file, decoded pictures


@dataclass(frozen=True)
class Peer:
    """A codec, how it was set, and the settings that trace its curve from about 0.1 to 2 bits per pixel."""

    name: str
    about: str
    settings: tuple[int, ...]  # in order of rising rate
    code: Coder
    missing: Callable[[], str]  # why it cannot run here, "" if it can
    together: bool = False  # all views of a scene in one file, by an encoder that sees them all; else one view a file


def _by_pillow(form: str, **options: Any) -> Coder:
    def code(pictures: Sequence[Picture], quality: int) -> tuple[bytes, list[Picture]]:
        (picture,) = pictures
        file = io.BytesIO()
        pil.fromarray(picture).save(file, form, quality=quality, **options)
        with pil.open(file) as decoded:
            return file.getvalue(), [np.asarray(decoded.convert("RGB"))]

    return code


def _without_feature(feature: str) -> Callable[[], str]:
    return lambda: "" if features.check(feature) else f"this Pillow was built without {feature}"


@cache
def _without_jxl() -> str:
    try:
        import pillow_jxl  # noqa: F401 (importing it registers the format)
    except ImportError:
        return "pillow-jxl-plugin is not installed"
    return ""


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "jpeg",
            "Pillow JPEG, 4:4:4, optimised",
            (3, 6, 10, 16, 25, 42, 65, 85),
            _by_pillow("JPEG", subsampling=0, optimize=True),
            lambda: "",
        ),
        Peer(
            "webp",
            "Pillow WebP, method 6 (4:2:0)",
            (0, 10, 30, 55, 78, 90),
            _by_pillow("WEBP", method=6),
            _without_feature("webp"),
        ),
        Peer(
            "avif",
            "Pillow AVIF, libaom, 4:4:4, speed 6, tune psnr",
            (8, 22, 38, 54, 70, 84),
            _by_pillow("AVIF", codec="aom", subsampling="4:4:4", speed=6, advanced={"tune": "psnr"}),
            _without_feature("avif"),
        ),
        Peer(
            "jxl",
            "JPEG XL, libjxl, VarDCT, effort 7",
            (1, 12, 30, 52, 74, 90),
            _by_pillow("JXL", effort=7),
            _without_jxl,
        ),
        Peer(
            "x265",
            "x265 intra, 4:4:4 8 bit, preset slow, tune psnr",
            (47, 42, 37, 32, 27, 22, 17),
            ffmpeg.code_x265,
            lambda: ffmpeg.missing("libx265"),
        ),
        Peer(
            "vvc",
            "VVenC intra, 4:2:0 10 bit, preset medium, no qpa",
            (47, 42, 37, 32, 27),
            ffmpeg.code_vvenc,
            lambda: ffmpeg.missing("libvvenc"),
        ),
        Peer(
            "vvc-video",
            "VVenC, all views of a scene as one video, 4:2:0 10 bit, preset medium, no qpa",
            (47, 42, 37, 32, 27),
            ffmpeg.code_vvenc,
            lambda: ffmpeg.missing("libvvenc"),
            together=True,
        ),
    )
}
