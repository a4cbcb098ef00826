"""A .phv file is exactly what the specification says, and every damage is refused, located or cut off."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvcodec import container
from mvcodec.checksums import crc16
from mvcodec.container import (
    SIGNATURE,
    VERSIONS,
    Header,
    Slice,
    Stream,
    describe,
    pack,
    section_names,
    sections_of,
    split,
    unpack,
    unpack_header,
)
from mvcodec.entropy import SIGMAS, encode, gaussian_tables
from mvcodec.errors import BitstreamError, UsageError
from tests import spec_reader

PLAIN = Header(b"12345678", "fast", 37.5, 1920, 1080, camera_id="cam3")
FULL = Header(
    b"\0\1\2\3\4\5\6\xff",
    "tiny",
    99.99,
    1,
    65535,
    colour="grey",
    depth=16,
    camera_id="Südkurve 北",
    frame=1995,
    timestamp_us=1763673600000000,
    icc=b"icc profile",
    exif=b"exif block",
)


@cache
def coded(header: Header = FULL, n_slices: int = 3, symbols: int = 150, version: int = 1) -> Stream:
    """A stream with real entropy-coded sections."""
    tables, r = gaussian_tables(), np.random.default_rng(7)

    def section() -> bytes:
        index = r.integers(0, 20, symbols)
        values = np.where(index == 0, 0, np.rint(r.standard_normal(symbols) * SIGMAS[index])).astype(np.int32)
        return encode(values, index, tables)

    slices = tuple(
        Slice(tuple(section() for _ in range(sections_of(version, i))), int(r.integers(1 << 16)))
        for i in range(n_slices)
    )
    return Stream(header, section(), slices, version=version)


@cache
def sparse() -> Stream:
    """A stream some of whose sections are empty."""
    first, second, third = coded(version=3).slices
    slices = (
        replace(first, sections=(first.sections[0], b"", first.sections[2], b"")),
        replace(second, sections=(b"", second.sections[1])),
        replace(third, sections=(b"", b"")),
    )
    return replace(coded(version=3), slices=slices)


kinds = pytest.mark.parametrize(
    "stream", [coded(), coded(version=2), coded(version=3), sparse()], ids=["1", "2", "3", "sparse"]
)


def with_header(body: bytes, payload: bytes = b"", version: int = 1) -> bytes:
    """A file whose checks are all right around any header: what a hostile writer sends."""
    size = b""
    rest = len(body)
    while rest >= 128:
        size += bytes([rest & 127 | 128])
        rest >>= 7
    start = container.SIGNATURE + bytes([version]) + size + bytes([rest]) + body
    data = start + crc16(start).to_bytes(2, "big") + payload
    return data + zlib.crc32(data).to_bytes(4, "big")


META = b"12345678" + b"\1" + b"\x0e\xa6" + b"\0" + b"\x40\x40" + b"\2C1"  # fast, 37.5, 64 x 64, "C1"
EMPTY = b"\0\0" + b"\1" + b"\0\0" + b"\0\0" + b"\xff\xff"  # empty hyper, one slice of empty sections
EMPTY_2 = b"\0" + b"\1" + b"\0" * 4 + b"\xff\xff"  # the same in version 2


# --- what is written is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", [(FULL,), (PLAIN, 8), (PLAIN, 1, 0), (FULL, 32, 4)])
def test_round_trip(shape: tuple[Any, ...], version: int) -> None:
    stream = coded(*shape, version=version)
    data = pack(stream)
    assert data[8] == stream.version == describe(data)["version"] == version
    assert unpack(data) == stream
    assert unpack_header(data) == stream.header
    assert unpack(data, partial=True) == stream


headers = st.builds(
    Header,
    model_id=st.binary(min_size=8, max_size=8),
    profile=st.sampled_from(container.PROFILES),
    quality=st.floats(0, 100),
    width=st.integers(1, 65535),
    height=st.integers(1, 4096),
    colour=st.sampled_from(["rgb", "grey"]),
    depth=st.sampled_from([8, 16]),
    camera_id=st.text(st.characters(min_codepoint=48, exclude_categories=["C"], exclude_characters="/\\"), max_size=32),
    frame=st.none() | st.integers(0, 2**63 - 1),
    timestamp_us=st.none() | st.integers(0, 2**63 - 1),
    icc=st.binary(max_size=200),
    exif=st.binary(max_size=200),
)
content = st.just(b"") | st.binary(max_size=300)
checks = st.integers(0, 65535)


def slices_of(passes: int) -> st.SearchStrategy[Slice]:
    return st.builds(Slice, sections=st.tuples(*[content] * passes), check=checks)


first_slices = st.sampled_from([2, 4]).flatmap(slices_of)


@given(headers, content, first_slices, st.lists(slices_of(2), max_size=31))
def test_every_legal_stream_survives(header: Header, hyper: bytes, first: Slice, others: list[Slice]) -> None:
    parts = [first, *others]
    stream = Stream(header, hyper, tuple(parts))
    data = pack(stream)
    assert unpack(data) == stream
    assert list(split(data + data)) == [(0, data), (len(data), data)]
    read = spec_reader.read_file(data)
    assert read.version == stream.version == (1 if len(first.sections) == 2 else 3)
    assert read.size == len(data)
    assert read.sections == [hyper, *(section for part in parts for section in part.sections)]
    assert read.checks == [part.check for part in parts]
    expected: dict[str, Any] = {
        "model_id": header.model_id,
        "profile": container.PROFILES.index(header.profile),
        "quality": round(header.quality * 100),
        "grey": header.colour == "grey",
        "depth_16": header.depth == 16,
        **{
            name: getattr(header, name)
            for name in ("width", "height", "camera_id", "frame", "timestamp_us", "icc", "exif")
        },
    }
    assert read.metadata == expected


SMALL = Header(b"12345678", "fast", 37.5, 640, 480, camera_id="C1", frame=300)


def test_exact_bytes_of_version_1() -> None:
    stream = Stream(SMALL, b"hyper", (Slice((b"anchor", b""), 0xBEEF), Slice((b"", b"non-anchor"), 1)))
    golden = (
        "895048560d0a1a0a 01 24"
        "3132333435363738 01 0ea6 04 8005 e003 02 4331 ac02"
        "05 ab 02 06 0e 00 00 beef 00 00 0a 4a 0001"
        "88ee"
        "6879706572 616e63686f72 6e6f6e2d616e63686f72"
        "a56e9d95"
    )
    assert pack(stream).hex() == golden.replace(" ", "")


def test_exact_bytes_of_version_2() -> None:
    first = Slice((b"anchor 0", b"", b"anchor 2", b"non-anchor"), 0xBEEF)
    stream = Stream(SMALL, b"hyper", (first, Slice((b"", b"last"), 1)), version=2)
    golden = (
        "895048560d0a1a0a 02 26"
        "3132333435363738 01 0ea6 04 8005 e003 02 4331 ac02"
        "05 ab 02 08 e8 00 08 e6 0a 4a beef 00 04 c5 0001"
        "6b6d"
        "6879706572 616e63686f722030 616e63686f722032 6e6f6e2d616e63686f72 6c617374"
        "000f0e6a"
    )
    assert pack(stream).hex() == golden.replace(" ", "")
    assert unpack(bytes.fromhex(golden)) == stream


def test_a_file_of_version_2_spends_nothing_on_checks_of_empty_sections() -> None:
    data = with_header(META + EMPTY_2, version=2)
    stream = unpack(data)
    assert (stream.hyper, stream.slices) == (b"", (Slice((b"",) * 4, 0xFFFF),))
    assert pack(stream) == data


def test_version_1_has_the_check_of_an_empty_section_and_it_counts() -> None:
    wrong = EMPTY[:4] + b"\1" + EMPTY[5:]
    with pytest.raises(BitstreamError, match="CRC mismatch in slice 0 anchor"):
        unpack(with_header(META + wrong))


def test_section_names() -> None:
    others = [[f"slice {i} anchor", f"slice {i} non-anchor"] for i in (0, 1, 2)]
    first = ["slice 0 anchor 0", "slice 0 anchor 1", "slice 0 anchor 2", "slice 0 non-anchor"]
    assert section_names(1, 3) == others
    assert section_names(2, 3) == [first, *others[1:]]
    assert section_names(2, 0) == []
    assert section_names(3, 3) == section_names(2, 3)
    assert [sections_of(v, i) for v in VERSIONS for i in range(3)] == [2, 2, 2, 4, 2, 2, 4, 2, 2]


def test_overhead_of_a_plain_picture() -> None:
    for version, overhead in ((1, 105), (2, 111), (3, 111)):
        stream = coded(PLAIN, 8, 8000, version)
        data = pack(stream)
        payload = len(stream.hyper) + sum(len(section) for part in stream.slices for section in part.sections)
        assert all(len(part.sections[0]) >= 128 for part in stream.slices), "lengths take two bytes"
        assert len(data) - payload == overhead
        timed = replace(PLAIN, frame=12, timestamp_us=1763673600000000)
        assert len(pack(replace(stream, header=timed))) - payload == overhead + 9


def test_description_is_json_and_adds_up() -> None:
    data = pack(coded())
    fields = json.loads(json.dumps(describe(data)))
    assert fields["camera_id"] == "Südkurve 北"
    assert fields["model_id"] == "00010203040506ff"
    assert (fields["width"], fields["height"], fields["colour"], fields["depth"]) == (1, 65535, "grey", 16)
    assert (fields["quality"], fields["frame"], fields["slices"]) == (99.99, 1995, 3)
    assert fields["file_bytes"] == len(data) == fields["payload_bytes"] + fields["overhead_bytes"]
    assert [s["name"] for s in fields["sections"]][:3] == ["hyper", "slice 0 anchor", "slice 0 non-anchor"]
    first = fields["sections"][1]
    assert data[first["offset"] : first["offset"] + first["bytes"]] == coded().slices[0].sections[0]
    assert not fields["truncated"]


def test_description_of_version_3_names_its_sections() -> None:
    fields = describe(pack(sparse()))
    assert (fields["version"], fields["slices"]) == (3, 3)
    assert [s["name"] for s in fields["sections"]] == ["hyper", *chain(*section_names(2, 3))]
    sizes = [len(section) for part in sparse().slices for section in part.sections]
    assert [s["bytes"] for s in fields["sections"]] == [len(sparse().hyper), *sizes]


def test_description_needs_only_the_header() -> None:
    data = pack(coded())
    end = describe(data)["sections"][0]["offset"]
    fields = describe(data[:end])
    assert fields.pop("truncated")
    assert fields == {k: v for k, v in describe(data).items() if k != "truncated"}


# --- what a header can hold ------------------------------------------------------------------------------


def test_quality_is_what_the_file_holds() -> None:
    assert replace(PLAIN, quality=33.33333).quality == 33.33


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_id": b"1234567"}, "8 bytes"),
        ({"profile": "slow"}, "profile"),
        ({"quality": 100.01}, "quality"),
        ({"quality": -1}, "quality"),
        ({"quality": float("nan")}, "quality"),
        ({"width": 0}, "width and height"),
        ({"height": 65536}, "width and height"),
        ({"width": 65535, "height": 65535}, "width and height"),
        ({"colour": "rgba"}, "rgba"),
        ({"depth": 12}, "12 bits"),
        ({"camera_id": "a/b"}, "camera id"),
        ({"camera_id": "a\\b"}, "camera id"),
        ({"camera_id": ".."}, "camera id"),
        ({"camera_id": "a\nb"}, "camera id"),
        ({"camera_id": "\x1b[2J"}, "camera id"),
        ({"camera_id": "\x9b"}, "camera id"),
        ({"camera_id": "\udcff"}, "camera id"),
        ({"camera_id": "é" * 65}, "camera id"),
        ({"frame": -1}, "-1 in frame"),
        ({"frame": 1 << 63}, "in frame"),
        ({"timestamp_us": -1}, "-1 in timestamp_us"),
        ({"icc": bytes(container.MAX_ICC + 1)}, "ICC"),
        ({"exif": bytes(container.MAX_EXIF + 1)}, "EXIF"),
    ],
)
def test_a_header_that_no_file_holds_is_refused_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(PLAIN, **change)


def test_a_stream_that_no_file_holds_is_not_written() -> None:
    stream, four = coded(PLAIN, 2), coded(PLAIN, 2, version=2)
    lost = unpack(pack(stream)[:-10], partial=True)
    for bad in (replace(stream, slices=()), replace(stream, slices=stream.slices * 17), lost):
        with pytest.raises(UsageError):
            pack(bad)
    for version in (0, 4):
        with pytest.raises(UsageError, match=f"no format version {version}"):
            pack(replace(stream, version=version))
    for whole, twice in (four, (four.slices[0], *four.slices)), (stream, (*stream.slices, four.slices[0])):
        with pytest.raises(UsageError, match=r"slice [12] has 4 sections, but 2 in format version [12]"):
            pack(replace(whole, slices=twice))


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_a_first_slice_that_no_version_has_is_not_written(count: int) -> None:
    first, second = coded(PLAIN, 2).slices
    odd = Stream(PLAIN, b"hyper", (replace(first, sections=(b"x",) * count), second))
    with pytest.raises(UsageError, match=rf"slice 0 has {count} sections, but {2 if count < 2 else 4} in"):
        pack(odd)


def test_a_damaged_file_of_version_2_is_not_written_as_one_of_version_1() -> None:
    stream = coded(PLAIN, 1, version=2)
    end = describe(pack(stream))["sections"][3]["offset"]
    lost = unpack(pack(stream)[:end], partial=True)
    assert (lost.version, lost.slices[0].sections) == (2, stream.slices[0].sections[:2])
    with pytest.raises(UsageError, match="2 sections, but 4 in format version 2"):
        pack(replace(lost, damage=None))


# --- damage ----------------------------------------------------------------------------------------------


def assert_leading_run(part: Stream, whole: Stream) -> None:
    assert part.damage is not None
    assert part.header == whole.header
    assert part.hyper == whole.hyper
    assert part.version == whole.version
    names = ["hyper", *chain(*section_names(whole.version, len(whole.slices)))]
    delivered = 1 + sum(len(s.sections) for s in part.slices)
    assert part.damage.missing == tuple(names[delivered:])
    for i, (got, sent) in enumerate(zip(part.slices, whole.slices, strict=False)):
        count = len(got.sections)
        assert count == len(sent.sections) or (count > 0 and i == len(part.slices) - 1)
        assert (got.sections, got.check) == (sent.sections[:count], sent.check)


@kinds
def test_every_truncation(stream: Stream) -> None:
    data = pack(stream)
    sections = describe(data)["sections"]
    hyper_end = sections[1]["offset"]
    delivered = []
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            unpack(data[:length])
        if length < hyper_end:
            with pytest.raises(BitstreamError):
                unpack(data[:length], partial=True)
            continue
        part = unpack(data[:length], partial=True)
        assert_leading_run(part, stream)
        assert part.damage is not None
        assert part.damage.offset == length
        delivered.append(sum(len(s.sections) for s in part.slices))
    assert delivered == sorted(delivered)
    everything = sum(len(s.sections) for s in stream.slices)
    assert delivered[-1] == everything, "every byte but the file CRC is there: all sections are delivered"


@kinds
def test_every_flip(stream: Stream) -> None:
    data = pack(stream)
    sections = describe(data)["sections"]
    filled = [s for i, s in enumerate(sections) if i == 0 or s["bytes"]]  # nothing in the others can be hit
    for at in range(len(data)):
        where = sum(at >= s["offset"] for s in filled)  # 0 header, 1 hyper, 2.. slices
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            with pytest.raises(BitstreamError) as caught:
                unpack(changed)
            assert caught.value.offset is not None
            if where < 2:
                with pytest.raises(BitstreamError):
                    unpack(changed, partial=True)
                continue
            part = unpack(changed, partial=True)
            assert_leading_run(part, stream)
            assert part.damage is not None
            if at < len(data) - 4:
                assert part.damage.missing[0] == filled[where - 1]["name"]
                assert part.damage.offset == filled[where - 1]["offset"]
            else:
                assert part.damage.missing == ()


@kinds
def test_bytes_lost_added_or_swapped_in_the_middle_are_refused(stream: Stream) -> None:
    data = pack(stream)
    for at in range(0, len(data), 5):
        for changed in (
            data[:at] + data[at + 1 :],
            data[:at] + b"\0" + data[at:],
            data[:at] + data[at:][::-1],
        ):
            if changed != data:
                with pytest.raises(BitstreamError):
                    unpack(changed)


def test_trailing_bytes_are_refused_also_when_partial() -> None:
    data = pack(coded())
    for tail in (b"\0", b"\n", data):
        for partial in (False, True):
            with pytest.raises(BitstreamError, match=f"follow the end of the file .at byte {len(data)}."):
                unpack(data + tail, partial=partial)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"", "empty"),
        (lambda d: d[:5], "inside the signature"),
        (lambda d: b"\xff\xd8\xff\xe0" + d, "not a .phv file"),
        (lambda d: d.replace(b"\r\n", b"\n"), "binary"),
        (lambda d: d.replace(b"\n", b"\r\n"), "binary"),
        (lambda d: bytes(b & 127 for b in d), "binary"),
        (lambda d: d[:8] + b"\4" + d[9:], "format version 4, but this mvcodec reads versions 1, 2 and 3"),
        (lambda d: d[:8] + b"\0" + d[9:], "format version 0"),
        (lambda d: d[:8] + b"\2" + d[9:], "header CRC"),
        (lambda d: d[:30], "inside the header"),
        (lambda d: d[:9], "ends too early"),
    ],
)
def test_common_accidents_are_named(change: Any, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        unpack(change(pack(coded())), partial=True)


# --- concatenations --------------------------------------------------------------------------------------


def pieces(data: bytes) -> list[bytes]:
    return [piece for _, piece in split(data)]


def test_concatenated_files_are_cut_apart() -> None:
    streams = coded(), coded(version=2), coded(PLAIN, 8), sparse(), coded(PLAIN, 1, 0), coded(PLAIN, 1, 0, 2)
    files = [pack(s) for s in streams]
    assert pieces(b"".join(files)) == files
    assert pieces(b"") == []


@kinds
def test_a_truncated_file_ends_where_the_next_one_begins(stream: Stream) -> None:
    data = pack(stream)
    cut = data[:-10]
    assert pieces(cut + data + cut) == [cut, data, cut]
    with pytest.raises(BitstreamError, match="truncated"):
        unpack(cut)


def test_damage_in_a_payload_does_not_stop_the_cutting() -> None:
    data = pack(coded())
    changed = data[:-20] + bytes(10) + data[-10:]
    assert pieces(changed + data) == [changed, data]


@pytest.mark.parametrize("rubbish", [b"rubbish", SIGNATURE, SIGNATURE + b"\x01\x10" + bytes(40)])
def test_rubbish_between_files_comes_as_it_is(rubbish: bytes) -> None:
    data = pack(coded())
    assert list(split(data + rubbish + data)) == [
        (0, data),
        (len(data), rubbish),
        (len(data) + len(rubbish), data),
    ]
    assert pieces(rubbish) == [rubbish]


def test_a_damaged_header_costs_its_own_file_alone() -> None:
    data = pack(coded())
    damaged = data[:20] + bytes([data[20] ^ 1]) + data[21:]
    assert pieces(damaged + data) == [damaged, data]
    assert pieces(data + damaged + data) == [data, damaged, data]


@pytest.mark.parametrize("kind", ["signatures", "headers"])
def test_what_looks_like_many_files_is_read_a_few_times_at_most(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = container.PREFIX.build({"signature": SIGNATURE, "version": 1, "header_size": 1 << 16})
    whole = pack(Stream(PLAIN, bytes(1 << 16), (Slice((b"", b""), 0),)))
    data = {"signatures": start, "headers": whole[: -(1 << 16)]}[kind]
    data *= (1 << 17) // len(data)
    read = 0

    def counted(check: Callable[[bytes], int], piece: bytes) -> int:
        nonlocal read
        read += len(piece)
        return check(piece)

    for name in ("crc8", "crc16"):
        check = getattr(container, name)
        monkeypatch.setattr(container, name, lambda piece, check=check: counted(check, piece))
    assert b"".join(pieces(data)) == data
    assert read < (container.PATIENCE + 2) * len(data)


def test_a_whole_file_may_hold_another_ones_header() -> None:
    inner = pack(coded())
    outer = pack(Stream(replace(coded().header, exif=inner), b"h", coded().slices))
    assert pieces(outer + inner) == [outer, inner]


# --- hostile headers: every check is right, the content is not -------------------------------------------


def test_the_frame_of_the_following_tests_is_legal() -> None:
    for version, table in ((1, EMPTY), (2, EMPTY_2), (3, EMPTY_2)):
        assert unpack(with_header(META + table, version=version)).header.camera_id == "C1"


@pytest.mark.parametrize(
    ("body", "message", "offset"),
    [
        (b"12345678\3" + META[9:] + EMPTY, "profile", 18),
        (META[:9] + b"\x27\x11" + META[11:] + EMPTY, "quality", 19),
        (META[:11] + b"\x40" + META[12:] + EMPTY, "reserved", 21),
        (META[:12] + b"\0\1" + META[14:] + EMPTY, "width and height", 22),
        (META[:12] + b"\x80\x80\4\1" + META[14:] + EMPTY, "above 65535", 22),
        (META[:12] + b"\xff\xff\3\xff\xff\3" + META[14:] + EMPTY, "width and height", 22),
        (META[:12] + b"\xc0\0\1" + META[14:] + EMPTY, "shortest", 22),
        (META[:12] + b"\xff" * 60 + META[14:] + EMPTY, "above 65535", 22),
        (META[:12] + b"\x80" * 60 + META[14:] + EMPTY, "above 65535", 22),
        (META[:14] + b"\2\xc3\x28" + EMPTY, "camera id", 24),
        (META[:14] + b"\2.." + EMPTY, "camera id", 24),
        (META[:11] + b"\x10" + META[12:] + b"\0" + EMPTY, "ICC", 27),
        (META[:11] + b"\x20" + META[12:] + b"\0" + EMPTY, "EXIF", 27),
        (META[:11] + b"\x20" + META[12:] + b"\xff\xff\x07" + EMPTY, "above 65536", 27),
        (META + EMPTY[:2] + b"\0", "slices", 29),
        (META + EMPTY[:2] + b"\x21" + EMPTY[3:], "slices", 29),
        (META + b"\xff\xff\xff\xff\1" + EMPTY[1:], "above 268435455", 27),
        (META + EMPTY + b"\0", "no meaning", 36),
        (META + EMPTY[:-1], "ends too early", None),
        (META, "ends too early", None),
        (b"", "ends too early", None),
    ],
)
def test_illegal_values_are_refused_at_their_byte(body: bytes, message: str, offset: int | None) -> None:
    with pytest.raises(BitstreamError, match=message) as caught:
        unpack(with_header(body))
    assert caught.value.offset is not None
    assert offset is None or caught.value.offset == offset


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (EMPTY_2 + b"\0", "no meaning"),
        (EMPTY_2[:-1], "ends too early"),
        (EMPTY_2[:1] + b"\0", "slices"),
        (EMPTY_2[:1] + b"\x21" + EMPTY_2[2:], "slices"),
        (EMPTY_2[:2] + b"\x80\0" + EMPTY_2[3:], "shortest"),
        (b"\1" + EMPTY_2[1:], "slices"),  # a hyper of one byte has a CRC: that is where the count was
        (EMPTY, "slices"),  # version 1 has a CRC there
    ],
)
def test_illegal_tables_of_version_2_are_refused(table: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message) as caught:
        unpack(with_header(META + table, version=2))
    assert caught.value.offset is not None


@pytest.mark.parametrize(
    "data",
    [
        container.SIGNATURE + b"\1" + b"\xff\xff\xff\1",  # header of 4 MB
        container.SIGNATURE + b"\1" + b"\xff" * 100_000,
        with_header(META[:11] + b"\x10" + META[12:] + b"\xff\xff\xff\1"),  # ICC of 4 MB
        with_header(META + b"\xff\xff\xff\x7f\0" + EMPTY[2:]),  # hyper of 256 MB
        with_header(META + EMPTY[:2] + b"\x20" + b"\xff\xff\xff\x7f\0" * 64),
        with_header(META + EMPTY_2[:1] + b"\x20" + b"\xff\xff\xff\x7f\0" * 66, version=2),
        with_header(META[:12] + b"\x80\x80\1\x80\x80\1" + META[14:]),  # 16384 x 16384
    ],
)
def test_sizes_are_not_believed(data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(BitstreamError):
        unpack(data, partial=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@given(st.sampled_from([(1, EMPTY), (2, EMPTY_2), (3, EMPTY_2)]), st.binary(max_size=120), st.binary(max_size=40))
def test_any_header_is_read_or_refused(kind: tuple[int, bytes], body: bytes, payload: bytes) -> None:
    version, table = kind
    for data in (
        with_header(body, payload, version),
        with_header(META + body, payload, version),
        with_header(META + table + body, version=version),
    ):
        for partial in (False, True):
            try:
                stream = unpack(data, partial=partial)
            except BitstreamError:
                continue
            assert stream.damage or pack(stream) == data, "one form for every content"


@kinds
def test_many_changes_at_once(stream: Stream) -> None:
    r = random.Random(5)
    data = pack(stream)
    for _ in range(700):
        changed = bytearray(data)
        for _ in range(r.randrange(1, 6)):
            at = r.randrange(len(changed))
            changed[at : at + r.randrange(3)] = r.randbytes(r.randrange(3))
        if changed == data:
            continue
        with pytest.raises(BitstreamError):
            unpack(bytes(changed))


def test_neither_torch_nor_numpy_is_needed() -> None:
    program = (
        "import sys, mvcodec.container, mvcodec.errors; "
        "heavy = {'torch', 'numpy', 'compressai', 'constriction', 'PIL'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
