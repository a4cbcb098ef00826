"""Writes 16-bit RGB PNG files, which Pillow reads but cannot write (PNG specification, third edition)."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FILTER_SUB = 1


def encode_png16(pixels: NDArray[np.uint16], *, icc: bytes = b"", exif: bytes = b"") -> bytes:
    """A PNG file of `pixels` [H, W, 3] uint16; `exif` is a bare TIFF stream, as the eXIf chunk wants it."""
    height, width, _ = pixels.shape
    samples = pixels.astype(">u2").view(np.uint8).reshape(height, width, 6)
    # Filter type 1: each byte minus the byte one pixel (6 bytes) to the left, modulo 256.
    filtered = samples.copy()
    filtered[:, 1:] -= samples[:, :-1]
    rows = np.full((height, 1 + width * 6), _FILTER_SUB, np.uint8)
    rows[:, 1:] = filtered.reshape(height, width * 6)
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))]
    if icc:
        chunks.append(_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
    if exif:
        chunks.append(_chunk(b"eXIf", exif))
    chunks += [_chunk(b"IDAT", zlib.compress(rows.tobytes())), _chunk(b"IEND", b"")]
    return _SIGNATURE + b"".join(chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
