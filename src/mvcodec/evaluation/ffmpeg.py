"""Peers that run through ffmpeg: x265 (one picture) and VVenC (one picture, or all views of a scene as a video).

The colour transform is ours, for ffmpeg's rounds to lower precision: BT.601 over the full range, as JPEG has it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pil

from mvcodec.errors import MvcodecError

Picture = NDArray[np.uint8]  # [H, W, 3] RGB
Planes = NDArray[np.float64]  # [3, H, W] Y, Cb, Cr, each from 0 to 255

_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]])
_CENTRE = np.array([0.0, 128.0, 128.0])


def code_x265(pictures: Sequence[Picture], qp: int) -> tuple[bytes, list[Picture]]:
    """One intra picture, 4:4:4, 8 bits, as a raw HEVC stream."""
    (picture,) = pictures
    height, width, _ = picture.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "yuvj444p"]
    options = f"qp={qp}:keyint=1:info=0:aud=0:repeat-headers=0:log-level=none"
    encode = ["-c:v", "libx265", "-preset", "slow", "-tune", "psnr", "-x265-params", options]
    planes = to_ycbcr(picture).round().clip(0, 255).astype(np.uint8)
    data = _run(
        "libx265",
        [*raw, "-s", f"{width}x{height}", "-i", "-", "-frames:v", "1", *encode, "-f", "hevc", "-"],
        planes.tobytes(),
    )
    decoded = np.frombuffer(_run("libx265", ["-f", "hevc", "-i", "-", *raw, "-"], data), np.uint8)
    return data, [from_ycbcr(decoded.reshape(3, height, width))]


def code_vvenc(pictures: Sequence[Picture], qp: int) -> tuple[bytes, list[Picture]]:
    """The pictures as the frames of a raw VVC stream, 4:2:0, 10 bits: all that VVenC takes. One picture is intra."""
    height = max(p.shape[0] for p in pictures) + 1 & ~1
    width = max(p.shape[1] for p in pictures) + 1 & ~1
    raw = ["-f", "rawvideo", "-pix_fmt", "yuv420p10le"]
    encode = ["-c:v", "libvvenc", "-preset", "medium", "-qpa", "0", "-qp", str(qp)]
    data = _run(
        "libvvenc",
        [*raw, "-s", f"{width}x{height}", "-i", "-", *encode, "-f", "vvc", "-"],
        b"".join(_to_420(picture, height, width) for picture in pictures),
    )
    decoded = np.frombuffer(_run("libvvenc", ["-f", "vvc", "-i", "-", *raw, "-"], data), "<u2")
    frames = decoded.reshape(len(pictures), -1)
    return data, [
        _from_420(frame, height, width)[: p.shape[0], : p.shape[1]] for frame, p in zip(frames, pictures, strict=True)
    ]


def missing(encoder: str) -> str:
    """Why ffmpeg cannot run with this encoder, "" if it can."""
    if not _ffmpegs():
        return "ffmpeg is not on PATH and imageio-ffmpeg not installed"
    return "" if _ffmpeg_with(encoder) else f"this ffmpeg was built without {encoder}"


def _ffmpegs() -> list[str]:
    """ffmpeg of the PATH, and that of imageio-ffmpeg, which has VVenC."""
    found = [shutil.which("ffmpeg")]
    try:
        import imageio_ffmpeg

        found.append(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):  # RuntimeError: it has no program for this machine
        pass
    return [path for path in found if path]


@cache
def _ffmpeg_with(encoder: str) -> str:
    for path in _ffmpegs():
        if f" {encoder} ".encode() in _output([path, "-hide_banner", "-loglevel", "error", "-encoders"], b""):
            return path
    return ""


def _run(encoder: str, arguments: list[str], data: bytes) -> bytes:
    return _output([_ffmpeg_with(encoder), "-hide_banner", "-loglevel", "error", *arguments], data)


def _output(command: list[str], data: bytes) -> bytes:
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode:
        first = done.stderr.decode(errors="replace").strip().partition("\n")[0]  # the cause; consequences follow
        raise MvcodecError(f"ffmpeg failed: {first.rpartition('] ')[2] or f'exit code {done.returncode}'}")
    return done.stdout


def to_ycbcr(picture: Picture) -> Planes:
    """[H, W, 3] RGB -> [3, H, W]."""
    return np.ascontiguousarray((picture @ _YCBCR.T + _CENTRE).transpose(2, 0, 1))


def from_ycbcr(planes: NDArray[np.generic]) -> Picture:
    """[3, H, W] -> [H, W, 3] RGB."""
    values = (planes.transpose(1, 2, 0) - _CENTRE) @ np.linalg.inv(_YCBCR).T
    pixels: Picture = values.round().clip(0, 255).astype(np.uint8)
    return pixels


def _to_420(picture: Picture, height: int, width: int) -> bytes:
    """A frame of height x width, both even; the picture's last row and column are repeated up to there."""
    rows, columns, _ = picture.shape
    padded = np.pad(picture, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge")
    luma, *chroma = to_ycbcr(padded)
    planes = [luma, *(_resized(plane, height // 2, width // 2) for plane in chroma)]
    return b"".join((plane * 4).round().clip(0, 1023).astype("<u2").tobytes() for plane in planes)


def _from_420(frame: NDArray[np.uint16], height: int, width: int) -> Picture:
    luma, chroma = np.split(frame / 4, [height * width])
    blue, red = (_resized(plane, height, width) for plane in chroma.reshape(2, height // 2, width // 2))
    return from_ycbcr(np.stack([luma.reshape(height, width), blue, red]))


def _resized(plane: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    image = pil.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((width, height), pil.Resampling.BICUBIC), np.float64)
