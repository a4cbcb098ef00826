"""Other codecs under the same ruler: each codes one picture at one setting, and its bytes are decoded again.

Every peer gets its best common setting for fidelity in RGB: full chroma where the format has it, slow search, no
metadata. A peer whose library or program is not here says so through `missing`; nothing is installed or required.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pil
from PIL import features

from mvcodec.errors import MvcodecError

Picture = NDArray[np.uint8]  # [H, W, 3] RGB
Coder = Callable[[Picture, int], tuple[bytes, Picture]]  # picture, setting -> file, decoded picture


@dataclass(frozen=True)
class Peer:
    """A codec, how it was set, and the settings that trace its curve from about 0.1 to 2 bits per pixel."""

    name: str
    about: str
    settings: tuple[int, ...]  # in order of rising rate
    code: Coder
    missing: Callable[[], str]  # why it cannot run here, "" if it can


def _by_pillow(form: str, **options: Any) -> Coder:
    def code(picture: Picture, quality: int) -> tuple[bytes, Picture]:
        file = io.BytesIO()
        pil.fromarray(picture).save(file, form, quality=quality, **options)
        with pil.open(file) as decoded:
            return file.getvalue(), np.asarray(decoded.convert("RGB"))

    return code


def _code_x265(picture: Picture, qp: int) -> tuple[bytes, Picture]:
    """One intra picture as a raw HEVC stream. The colour transform is ours: ffmpeg's rounds to lower precision."""
    height, width, _ = picture.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "yuvj444p"]
    options = f"qp={qp}:keyint=1:info=0:aud=0:repeat-headers=0:log-level=none"
    encode = ["-c:v", "libx265", "-preset", "slow", "-tune", "psnr", "-x265-params", options]
    data = _ffmpeg(
        [*raw, "-s", f"{width}x{height}", "-i", "-", "-frames:v", "1", *encode, "-f", "hevc", "-"],
        _to_ycbcr(picture).tobytes(),
    )
    planes = np.frombuffer(_ffmpeg(["-f", "hevc", "-i", "-", *raw, "-"], data), np.uint8)
    return data, _from_ycbcr(planes.reshape(3, height, width))


def _ffmpeg(arguments: list[str], data: bytes) -> bytes:
    done = subprocess.run(
        ["ffmpeg", "-hide_banner", "-loglevel", "error", *arguments], input=data, capture_output=True, check=False
    )
    if done.returncode:
        raise MvcodecError(f"ffmpeg failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


# BT.601 over the full range, as JPEG has it; rows Y, Cb, Cr.
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]])
_CENTRE = np.array([0.0, 128.0, 128.0])


def _to_ycbcr(picture: Picture) -> NDArray[np.uint8]:
    """[H, W, 3] RGB -> [3, H, W] planes."""
    planes = (picture @ _YCBCR.T + _CENTRE).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(planes.transpose(2, 0, 1))


def _from_ycbcr(planes: NDArray[np.uint8]) -> Picture:
    values = (planes.transpose(1, 2, 0) - _CENTRE) @ np.linalg.inv(_YCBCR).T
    pixels: Picture = values.round().clip(0, 255).astype(np.uint8)
    return pixels


def _without_feature(feature: str) -> Callable[[], str]:
    return lambda: "" if features.check(feature) else f"this Pillow was built without {feature}"


@cache
def _without_jxl() -> str:
    try:
        import pillow_jxl  # noqa: F401 (importing it registers the format)
    except ImportError:
        return "pillow-jxl-plugin is not installed"
    return ""


@cache
def _without_x265() -> str:
    if shutil.which("ffmpeg") is None:
        return "ffmpeg is not on PATH"
    return "" if b"libx265" in _ffmpeg(["-encoders"], b"") else "this ffmpeg was built without libx265"


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
            _code_x265,
            _without_x265,
        ),
    )
}
