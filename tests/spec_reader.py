"""A reader of .phv files written from `bitstream_spec.md` alone: plain Python, nothing of mvcodec.

Slow and simple. The tests hold the codec against it: if they agree, a stranger can write a decoder.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple


def crc(data: bytes, bits: int, polynomial: int, start: int) -> int:
    """Section 5, bit by bit."""
    value = start
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value <<= 1
            if value >> bits:
                value ^= polynomial | 1 << bits
    return value


def crc8(data: bytes) -> int:
    return crc(data, 8, 0x07, 0)


def crc16(data: bytes) -> int:
    return crc(data, 16, 0x1021, 0xFFFF)


class Table(NamedTuple):
    offset: int
    counts: list[int]


class RangeDecoder:
    """Section 6.2."""

    def __init__(self, section: bytes) -> None:
        self.section = section
        self.at = 0
        self.range = 2**64 - 1
        self.offset = self.word() * 2**32 + self.word()

    def word(self) -> int:
        word = self.section[self.at : self.at + 4].ljust(4, b"\0")
        self.at += 4
        return int.from_bytes(word, "big")

    def entry(self, cumulative: list[int]) -> int:
        scale = self.range >> 24
        q = self.offset // scale
        if q >= 2**24:
            raise ValueError("a sliver that no entry owns")
        j = max(j for j in range(len(cumulative) - 1) if cumulative[j] <= q)
        self.offset -= scale * cumulative[j]
        self.range = scale * (cumulative[j + 1] - cumulative[j])
        if self.range < 2**32:
            self.range *= 2**32
            self.offset = self.offset * 2**32 + self.word()
        return j

    def bits(self, k: int) -> int:
        return self.entry([j << (24 - k) for j in range(2**k + 1)]) if k else 0


def decode_section(section: bytes, table_index: list[int], tables: list[Table], skip_first: bool) -> list[int]:
    """Sections 6.1 and 6.3."""
    decoder = RangeDecoder(section)
    symbols = [0] * len(table_index)
    escapes = []
    for t, table in enumerate(tables):
        if t == 0 and skip_first:
            continue
        cumulative = [0]
        for count in table.counts:
            cumulative.append(cumulative[-1] + 256 * count)
        for i in range(len(table_index)):
            if table_index[i] == t:
                j = decoder.entry(cumulative)
                symbols[i] = table.offset + j
                if j == len(table.counts) - 1:
                    escapes.append(i)
    k = [decoder.bits(4) for _ in escapes]
    rest = [0] * len(escapes)
    for m in range(1, 16):
        for e in range(len(escapes)):
            if k[e] == m:
                rest[e] = decoder.bits(m)
    for e, i in enumerate(escapes):
        code = 2 ** k[e] + rest[e] - 1
        table = tables[table_index[i]]
        if code % 2 == 0:
            symbols[i] = table.offset + len(table.counts) - 1 + code // 2
        else:
            symbols[i] = table.offset - 1 - code // 2
    return symbols


class Cursor:
    """Section 1."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, n: int) -> bytes:
        assert self.at + n <= len(self.data)
        self.at += n
        return self.data[self.at - n : self.at]

    def uint(self, n: int) -> int:
        return int.from_bytes(self.take(n), "big")

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.uint(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


@dataclass
class File:
    version: int
    metadata: dict[str, object]
    sections: list[bytes]
    checks: list[int]
    size: int


def read_file(data: bytes) -> File:
    """Sections 2 to 5: the first file in data."""
    c = Cursor(data)
    assert c.take(8) == bytes.fromhex("89 50 48 56 0D 0A 1A 0A")
    version = c.uint(1)
    assert version in (1, 2, 3)
    header_end = c.varint() + c.at
    assert crc16(data[:header_end]) == int.from_bytes(data[header_end : header_end + 2], "big")
    meta: dict[str, object] = {"model_id": c.take(8), "profile": c.uint(1), "quality": c.uint(2)}
    flags = c.uint(1)
    assert flags < 64
    meta.update(grey=flags & 1, depth_16=flags >> 1 & 1)
    meta.update(width=c.varint(), height=c.varint(), camera_id=c.take(c.uint(1)).decode())
    meta["frame"] = c.varint() if flags & 4 else None
    meta["timestamp_us"] = c.varint() if flags & 8 else None
    meta["icc"] = c.take(c.varint()) if flags & 16 else b""
    meta["exif"] = c.take(c.varint()) if flags & 32 else b""

    def section() -> tuple[int, int]:
        size = c.varint()
        return size, c.uint(1) if version == 1 or size > 0 else 0

    sizes = [section()]
    checks = []
    for i in range(c.uint(1)):
        sizes += [section() for _ in range(4 if version > 1 and i == 0 else 2)]
        checks.append(c.uint(2))
    assert c.at == header_end
    c.take(2)
    sections = []
    for size, check in sizes:
        sections.append(c.take(size))
        assert crc8(sections[-1]) == check
    assert zlib.crc32(data[: c.at]) == c.uint(4)
    return File(version, meta, sections, checks, c.at)


Places = list[list[tuple[int, int]]]  # of a grid: for each value its row and column in the slice


def checkerboard(grid: Places) -> tuple[Places, Places]:
    """Section 7.2: the packed anchors and non-anchors of a grid."""
    anchors = [[row[2 * c + 1 - r % 2] for c in range(len(row) // 2)] for r, row in enumerate(grid)]
    others = [[row[2 * c + r % 2] for c in range(len(row) // 2)] for r, row in enumerate(grid)]
    return anchors, others


def passes(version: int, slice_index: int, height: int, width: int) -> list[Places]:
    """Section 7.2: where in a channel [height, width] of a slice the symbols of each pass stand."""
    anchors, others = checkerboard([[(r, c) for c in range(width)] for r in range(height)])
    if version == 1 or slice_index > 0:
        return [anchors, others]
    return [*checkerboard(anchors[0::2]), anchors[1::2], others]
