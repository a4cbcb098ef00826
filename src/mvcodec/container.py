"""The .phv file: one picture of one camera. This grammar and `bitstream_spec.md` share names and order.

    signature 8 | version 1 | header_size | header | header_crc 2 | payload | file_crc 4

    header  = metadata | sizes and checks of all sections
    payload = hyper | slice 0 anchor | slice 0 non-anchor | slice 1 anchor | ...

Versions 2 and 3 code slice 0 in four passes (anchor 0, anchor 1, anchor 2, non-anchor) and spend no CRC on empty
sections; version 3 ends with the last slice that holds anything.
All sizes stand in the header, so a file is cut out of a concatenation, listed or found truncated without any
decoding. Imports neither torch nor numpy: `mvcodec info` is instant.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import construct as c

from mvcodec.checksums import crc8, crc16
from mvcodec.errors import BitstreamError, UsageError
from mvcodec.files import Input, contents

SIGNATURE = b"\x89PHV\r\n\x1a\n"  # as PNG's: not text, and any newline conversion or 7-bit channel breaks it
VERSIONS = (1, 2, 3)  # all frozen
PROFILES = ("paper", "fast", "tiny")

MAX_SIDE = 65535
MAX_PIXELS = 1 << 28  # 268 MP: the decoded float picture alone takes 3 GiB; larger ones are to be tiled
MAX_CAMERA_ID = 128  # bytes of UTF-8: names output files, whose names may have 255
MAX_COUNT = (1 << 63) - 1  # of frames and microseconds: what a signed 64-bit integer holds
MAX_ICC = 1 << 22  # display profiles have kilobytes, printer tables at most a few megabytes
MAX_EXIF = 1 << 16  # what a JPEG segment can hold
MAX_SLICES = 32
MAX_SECTION = (1 << 28) - 1  # four length bytes
MAX_HEADER = MAX_ICC + MAX_EXIF + 4096
MAX_PREFIX = 16  # bytes before the header, and its CRC
PATIENCE = 16  # times a concatenation's length: bytes that are read to find where its files begin
TRY = 1024  # bytes' worth of time that a signature costs

_PASSES = ("anchor", "non-anchor")
_FOUR_PASSES = ("anchor 0", "anchor 1", "anchor 2", "non-anchor")
_FIRST_PASSES = {1: _PASSES, 2: _FOUR_PASSES, 3: _FOUR_PASSES}  # of slice 0, by version


def sections_of(version: int, slice_index: int) -> int:
    """How many sections a slice has: one for each of its passes."""
    return len(_passes(version, slice_index))


def section_names(version: int, slices: int) -> list[list[str]]:
    """The names of the sections of each slice, in coding order; the hyper-latent's is "hyper"."""
    return [[f"slice {i} {name}" for name in _passes(version, i)] for i in range(slices)]


def _passes(version: int, slice_index: int) -> tuple[str, ...]:
    return _FIRST_PASSES[version] if slice_index == 0 else _PASSES


@dataclass(frozen=True)
class Header:
    """What a file says about its picture. Raises UsageError for values that a file cannot hold."""

    model_id: bytes  # first 8 bytes of the SHA-256 of the entropy model (weights.py)
    profile: str  # "paper" | "fast" | "tiny"
    quality: float  # 0 .. 100, kept to 1/100: the encoder uses this rounded value too
    width: int  # of the original picture
    height: int
    colour: str = "rgb"  # "rgb" | "grey"
    depth: int = 8  # bits per sample of the source: 8 | 16
    camera_id: str = ""
    frame: int | None = None
    timestamp_us: int | None = None  # microseconds, since 1970 if absolute
    icc: bytes = b""
    exif: bytes = b""

    def __post_init__(self) -> None:
        if not 0 <= self.quality <= 100:
            raise UsageError("quality must be in 0 .. 100")
        object.__setattr__(self, "quality", round(self.quality * 100) / 100)
        _metadata_bytes(self)


@dataclass(frozen=True)
class Slice:
    """One latent slice: its sections and the 16-bit check of its decoded integers (`integer_check`).

    In version 3 the check of a file's last slice is that of all slices of the model from there on.
    """

    sections: tuple[bytes, ...]  # in coding order; in the last slice of a damaged file a leading run of them
    check: int


@dataclass(frozen=True)
class Damage:
    """Why a partial read stopped: what no longer follows, from which byte on."""

    reason: str
    offset: int
    missing: tuple[str, ...]  # names of the sections not delivered; () if only the file CRC is wrong


@dataclass(frozen=True)
class Stream:
    """The content of one file; `damage` is set only where partial=True was asked and something was lost.

    `version` follows from slice 0: 3 where that has more sections than version 1 knows; `unpack` sets it for others.
    `count`: slices that the file has, or had before some were lost.
    """

    header: Header
    hyper: bytes
    slices: tuple[Slice, ...]
    damage: Damage | None = None
    version: int = 1
    count: int = 0

    def __post_init__(self) -> None:
        if self.version == 1 and self.slices and len(self.slices[0].sections) > sections_of(1, 0):
            object.__setattr__(self, "version", 3)
        if not self.count:
            object.__setattr__(self, "count", len(self.slices))


@dataclass(frozen=True)
class _Section:
    name: str
    start: int
    stop: int
    crc: int


@dataclass(frozen=True)
class _Layout:
    """Everything the header tells: metadata, where each section lies, checks of the slices, file size."""

    version: int
    header: Header
    sections: tuple[_Section, ...]  # hyper, then those of all slices
    checks: tuple[int, ...]
    size: int


class _Checked(c.Subconstruct):  # type: ignore[misc]
    """A field with a rule: BitstreamError with the byte offset when parsed, UsageError when built."""

    def __init__(self, subcon: Any, sentence: str, rule: Callable[[Any], bool]) -> None:
        super().__init__(subcon)
        self.sentence = sentence
        self.rule = rule

    def _parse(self, stream: Any, context: Any, path: str) -> Any:
        start = stream.tell()
        value = self.subcon._parsereport(stream, context, path)
        if not self.rule(value):
            raise BitstreamError(self.sentence, start)
        return value

    def _build(self, value: Any, stream: Any, context: Any, path: str) -> Any:
        if not self.rule(value):
            raise UsageError(self.sentence)
        return self.subcon._build(value, stream, context, path)


class _VarUInt(c.Construct):  # type: ignore[misc]
    """Unsigned LEB128: 7 bits a byte, lowest first, high bit = more follows; the shortest form only."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def _parse(self, stream: Any, context: Any, path: str) -> int:
        start, value, shift = stream.tell(), 0, 0
        while True:
            byte: int = c.stream_read(stream, 1, path)[0]
            value |= (byte & 127) << shift
            shift += 7
            too_long = byte >= 128 and self.limit >> shift == 0  # whatever follows is too large, or zeros
            if value > self.limit or too_long or (byte == 0 and shift > 7):
                raise BitstreamError(f"number above {self.limit} or not in its shortest form", start)
            if byte < 128:
                return value

    def _build(self, value: Any, stream: Any, context: Any, path: str) -> Any:
        if not 0 <= value <= self.limit:
            raise UsageError(f"{value} in {path.split(' -> ')[-1]} must be in 0 .. {self.limit}")
        rest = value
        while rest >= 128:
            stream.write(bytes([rest & 127 | 128]))
            rest >>= 7
        stream.write(bytes([rest]))
        return value


def _is_camera_id(raw: bytes) -> bool:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return False
    if len(raw) > MAX_CAMERA_ID or text in (".", ".."):
        return False
    return all(ch >= " " and not "\x7f" <= ch <= "\x9f" and ch not in "/\\" for ch in text)


def _is_size(size: tuple[int, int]) -> bool:
    width, height = size
    return 1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= MAX_PIXELS


def _blob(name: str, limit: int) -> Any:
    sentence = f"{name} must have 1 to {limit} bytes where present"
    return _Checked(c.Prefixed(_VarUInt(limit), c.GreedyBytes), sentence, lambda b: 1 <= len(b) <= limit)


PREFIX = c.Struct(
    "signature" / c.Bytes(len(SIGNATURE)),
    "version" / c.Byte,
    "header_size" / _VarUInt(MAX_HEADER),
)
METADATA = c.Struct(
    "model_id" / _Checked(c.Bytes(8), "model id must have 8 bytes", lambda b: len(b) == 8),
    "profile" / _Checked(c.Byte, f"profile must be one of {PROFILES}", lambda v: v < len(PROFILES)),
    "quality" / _Checked(c.Int16ub, "quality must be in 0 .. 100", lambda v: 0 <= v <= 10000),
    "flags" / c.FlagsEnum(
        _Checked(c.Byte, "reserved flags must be zero", lambda v: v < 64),
        grey=1, depth_16=2, frame=4, timestamp=8, icc=16, exif=32,
    ),
    "size" / _Checked(
        c.Sequence(_VarUInt(MAX_SIDE), _VarUInt(MAX_SIDE)),
        f"width and height must be in 1 .. {MAX_SIDE}, width x height at most {MAX_PIXELS}", _is_size,
    ),
    "camera_id" / _Checked(
        c.Prefixed(c.Byte, c.GreedyBytes),
        f"camera id must be UTF-8, at most {MAX_CAMERA_ID} bytes, no control character, / or \\",
        _is_camera_id,
    ),
    "frame" / c.If(c.this.flags.frame, _VarUInt(MAX_COUNT)),
    "timestamp_us" / c.If(c.this.flags.timestamp, _VarUInt(MAX_COUNT)),
    "icc" / c.If(c.this.flags.icc, _blob("ICC profile", MAX_ICC)),
    "exif" / c.If(c.this.flags.exif, _blob("EXIF", MAX_EXIF)),
)  # fmt: skip
# Of an empty section there is nothing that could be damaged: from version 2 on no byte is spent on it (its CRC-8 is 0).
_SPARING = c.Struct("size" / _VarUInt(MAX_SECTION), "crc" / c.IfThenElse(c.this.size > 0, c.Byte, c.Computed(0)))
SECTION = {1: c.Struct("size" / _VarUInt(MAX_SECTION), "crc" / c.Byte), 2: _SPARING, 3: _SPARING}


def _slice(version: int) -> Any:
    sections = c.Array(lambda context: sections_of(version, context._index), SECTION[version])
    return c.Struct("sections" / sections, "check" / c.Int16ub)


SECTIONS = {
    version: c.Struct(
        "hyper" / SECTION[version],
        "slices" / c.PrefixedArray(
            _Checked(c.Byte, f"a file must have 1 to {MAX_SLICES} slices", lambda v: 1 <= v <= MAX_SLICES),
            _slice(version),
        ),
    )
    for version in VERSIONS
}  # fmt: skip


def pack(stream: Stream) -> bytes:
    """The file of a complete stream, of the version that the number of sections of slice 0 asks for.

    Raises UsageError for a stream that is damaged or breaks a cap.
    """
    if stream.damage:
        raise UsageError("a damaged stream cannot be written again as a whole one")
    if stream.version not in VERSIONS:
        raise UsageError(f"there is no format version {stream.version} to write")
    for i, part in enumerate(stream.slices):
        found, wanted = len(part.sections), sections_of(stream.version, i)
        if found != wanted:
            raise UsageError(f"slice {i} has {found} sections, but {wanted} in format version {stream.version}")
    payload = [stream.hyper, *chain(*(part.sections for part in stream.slices))]
    rows = [{"sections": [_seal(section) for section in part.sections], "check": part.check} for part in stream.slices]
    table = SECTIONS[stream.version].build({"hyper": _seal(stream.hyper), "slices": rows})
    header = _metadata_bytes(stream.header) + table
    start = PREFIX.build({"signature": SIGNATURE, "version": stream.version, "header_size": len(header)}) + header
    body = b"".join([start, crc16(start).to_bytes(2, "big"), *payload])
    return body + zlib.crc32(body).to_bytes(4, "big")


def unpack(data: bytes | memoryview, *, partial: bool = False) -> Stream:
    """Read exactly one file: nothing may be wrong, nothing may follow.

    partial: of a truncated or damaged file return the leading run of intact sections, and say so in `damage`;
    the last slice may then come without its last sections. Header and hyper-latent must be intact.
    Raises BitstreamError, with the byte offset.
    """
    layout = _layout(data)
    if len(data) > layout.size:
        raise BitstreamError(f"{len(data) - layout.size} bytes follow the end of the file", layout.size)
    intact, damage = _intact(data, layout)
    if damage and not (partial and intact):
        raise BitstreamError(damage.reason, damage.offset)
    hyper, *rest = intact
    slices = []
    for i, check in enumerate(layout.checks):
        count = sections_of(layout.version, i)
        sections, rest = tuple(rest[:count]), rest[count:]
        if sections:
            slices.append(Slice(sections, check))
    return Stream(layout.header, hyper, tuple(slices), damage, layout.version, len(layout.checks))


def unpack_header(data: bytes) -> Header:
    """The header alone; the payload need not be there. Raises BitstreamError."""
    return _layout(data).header


def split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut concatenated files apart by their headers, nothing decoded: where each begins, and its bytes.

    What is cut short or damaged ends where the next header stands, and comes as it is: whoever reads it is told. Where
    so much looks like headers that to tell them apart would take long, the rest comes in one piece.
    """
    view, start = memoryview(data), 0
    patience = PATIENCE * len(data)  # time to look grows as the data does, whatever stands there

    def next_header(at: int) -> int:
        """Where the next whole header begins; the end of the data if there is none."""
        nonlocal patience
        while patience > 0 and (at := data.find(SIGNATURE, at)) >= 0:
            with suppress(BitstreamError):
                patience -= TRY + min(_prefix(view[at:]).stop, len(data) - at)
                _layout(view[at:])
                return at
            at += 1
        return len(data)

    def is_whole(piece: memoryview) -> bool:
        nonlocal patience
        patience -= len(piece)
        try:
            unpack(piece)
        except BitstreamError:
            return False
        return True

    while start < len(data):
        following = next_header(start + 1)
        try:
            end = start + _layout(view[start:]).size
        except BitstreamError:
            end = following
        if following < end and is_whole(view[start:end]):  # a header that stands in this file's own data
            following = end
        yield start, data[start : min(end, following)]
        start = min(end, following)


def check_cap(max_pixels: Any) -> None:
    """UsageError for what is no cap on the pixels of a picture."""
    if not isinstance(max_pixels, int):
        raise UsageError(f"max_pixels {max_pixels!r} is no number of pixels")


def refuse_larger(header: Header, max_pixels: int) -> None:
    """BitstreamError for a picture of more pixels: a few bytes can claim to be one."""
    check_cap(max_pixels)
    if header.width * header.height > max_pixels:
        size = f"{header.width} x {header.height} pixels"
        raise BitstreamError(f"has {size}, over the cap of {max_pixels}; raise it with --max-pixels")


def describe(file: Input) -> dict[str, Any]:
    """What `mvcodec info` prints, from the header alone: JSON-ready fields and the size of every section.

    file: its path or its bytes.
    """
    data = contents(file)
    layout = _layout(data)
    header = layout.header
    payload = sum(s.stop - s.start for s in layout.sections)
    return {
        "version": layout.version,
        "model_id": header.model_id.hex(),
        "profile": header.profile,
        "quality": header.quality,
        "width": header.width,
        "height": header.height,
        "colour": header.colour,
        "depth": header.depth,
        "camera_id": header.camera_id,
        "frame": header.frame,
        "timestamp_us": header.timestamp_us,
        "icc_bytes": len(header.icc),
        "exif_bytes": len(header.exif),
        "slices": len(layout.checks),
        "file_bytes": layout.size,
        "payload_bytes": payload,
        "overhead_bytes": layout.size - payload,
        "bpp": round(8 * layout.size / (header.width * header.height), 6),
        "truncated": len(data) < layout.size,
        "sections": [{"name": s.name, "offset": s.start, "bytes": s.stop - s.start} for s in layout.sections],
    }


def integer_check(integers: bytes) -> int:
    """16-bit check of a slice's decoded integers: CRC-16 of 64 y_hat, int32 little-endian, [C, h, w]."""
    return crc16(integers)


class _Prefix(NamedTuple):
    version: int
    start: int  # of the header
    stop: int  # where its CRC stands


def _prefix(data: bytes | memoryview) -> _Prefix:
    head = bytes(data[:MAX_PREFIX])
    _check_signature(head)
    if len(head) > 8 and head[8] not in VERSIONS:
        versions = f"{', '.join(map(str, VERSIONS[:-1]))} and {VERSIONS[-1]}"
        raise BitstreamError(f"format version {head[8]}, but this mvcodec reads versions {versions}", 8)
    stream = io.BytesIO(head)
    prefix = _parse(PREFIX, stream, "signature")
    return _Prefix(prefix.version, stream.tell(), stream.tell() + prefix.header_size)


def _layout(data: bytes | memoryview) -> _Layout:
    """Read prefix and header. Looks at no byte behind the header's CRC."""
    version, start, stop = _prefix(data)
    if len(data) < stop + 2:
        raise BitstreamError(f"truncated inside the header, which ends at byte {stop + 2}", len(data))
    head = bytes(data[: stop + 2])
    if crc16(head[:stop]) != int.from_bytes(head[stop:], "big"):
        raise BitstreamError("header CRC mismatch: the header is corrupt", stop)
    stream = io.BytesIO(head[:stop])
    stream.seek(start)
    meta = _parse(METADATA, stream, "header")
    table = _parse(SECTIONS[version], stream, "section table")
    if stream.tell() != stop:
        raise BitstreamError(f"{stop - stream.tell()} bytes of the header have no meaning", stream.tell())

    names = ["hyper", *chain(*section_names(version, len(table.slices)))]
    rows = [table.hyper, *chain(*(part.sections for part in table.slices))]
    sections, at = [], stop + 2
    for name, row in zip(names, rows, strict=True):
        sections.append(_Section(name, at, at + row.size, row.crc))
        at += row.size
    checks = tuple(part.check for part in table.slices)
    return _Layout(version, _header(meta), tuple(sections), checks, at + 4)


def _intact(data: bytes | memoryview, layout: _Layout) -> tuple[list[bytes], Damage | None]:
    """The leading run of intact sections, and what is wrong if anything is."""
    intact: list[bytes] = []
    for i, section in enumerate(layout.sections):
        missing = tuple(s.name for s in layout.sections[i:])
        if len(data) < section.stop:
            reason = f"truncated inside {section.name}, the file has {layout.size} bytes when whole"
            return intact, Damage(reason, len(data), missing)
        raw = bytes(data[section.start : section.stop])
        if crc8(raw) != section.crc:
            return intact, Damage(f"CRC mismatch in {section.name}: corrupt", section.start, missing)
        intact.append(raw)
    end = layout.size - 4
    if len(data) < layout.size:
        return intact, Damage("truncated inside the file CRC", len(data), ())
    if zlib.crc32(data[:end]) != int.from_bytes(data[end:], "big"):
        return intact, Damage("file CRC mismatch, though no single section is found corrupt", end, ())
    return intact, None


def _check_signature(head: bytes) -> None:
    if head[:8] == SIGNATURE:
        return
    if not head:
        raise BitstreamError("the file is empty", 0)
    if SIGNATURE.startswith(head):
        raise BitstreamError("truncated inside the signature", len(head))
    if head[1:4] == b"PHV":
        raise BitstreamError("damaged like a text file (newlines or 8th bit changed); transfer it as binary", 0)
    raise BitstreamError("not a .phv file: the signature is missing", 0)


def _parse(grammar: Any, stream: io.BytesIO, what: str) -> Any:
    try:
        return grammar.parse_stream(stream)
    except c.ConstructError as error:  # each rule raises BitstreamError itself: only the end is left
        raise BitstreamError(f"the {what} ends too early", stream.tell()) from error


def _header(meta: Any) -> Header:
    return Header(
        model_id=meta.model_id,
        profile=PROFILES[meta.profile],
        quality=meta.quality / 100,
        width=meta.size[0],
        height=meta.size[1],
        colour="grey" if meta.flags.grey else "rgb",
        depth=16 if meta.flags.depth_16 else 8,
        camera_id=meta.camera_id.decode(),
        frame=meta.frame,
        timestamp_us=meta.timestamp_us,
        icc=meta.icc or b"",
        exif=meta.exif or b"",
    )


def _metadata_bytes(header: Header) -> bytes:
    for count in (header.frame, header.timestamp_us):
        if count is not None and not hasattr(count, "__index__"):
            raise UsageError(f"{count!r} is no whole number: frame and timestamp_us are")
    if not isinstance(header.camera_id, str):
        raise UsageError(f"camera id {header.camera_id!r} is not a str")
    if header.colour not in ("rgb", "grey") or header.depth not in (8, 16):
        raise UsageError(f"colour {header.colour!r} with {header.depth} bits is none of rgb, grey with 8 or 16")
    flags = {
        "grey": header.colour == "grey",
        "depth_16": header.depth == 16,
        "frame": header.frame is not None,
        "timestamp": header.timestamp_us is not None,
        "icc": bool(header.icc),
        "exif": bool(header.exif),
    }
    fields = {
        "model_id": header.model_id,
        "profile": PROFILES.index(header.profile) if header.profile in PROFILES else len(PROFILES),
        "quality": round(header.quality * 100),
        "flags": flags,
        "size": (header.width, header.height),
        "camera_id": header.camera_id.encode("utf-8", "surrogatepass"),  # then refused by the rule
        "frame": header.frame,
        "timestamp_us": header.timestamp_us,
        "icc": header.icc,
        "exif": header.exif,
    }
    built: bytes = METADATA.build(fields)
    return built


def _seal(section: bytes) -> dict[str, int]:
    return {"size": len(section), "crc": crc8(section)}
