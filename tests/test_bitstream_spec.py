"""The specification states the numbers the code uses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from mvcodec import container
from mvcodec.container import Header, Slice, Stream, pack, section_names, sections_of
from mvcodec.entropy import Tables, encode
from mvcodec.entropy.tables import MAX_LENGTH, MAX_SYMBOL, MAX_TABLES
from mvcodec.nn.checkerboard import split
from tests import spec_reader

SPEC = (Path(__file__).parent.parent / "bitstream_spec.md").read_text(encoding="utf-8")


def test_signature_and_versions() -> None:
    assert container.SIGNATURE.hex(" ").upper() in SPEC
    *others, last = (str(version) for version in container.VERSIONS)
    assert f"# The .phv bitstream, versions {', '.join(others)} and {last}" in SPEC
    assert f"| `version` | u8 | {', '.join(others)} or {last}. A reader MUST refuse any other |" in SPEC


def test_limits() -> None:
    assert container.MAX_PIXELS == 1 << 28
    assert f"1 .. {container.MAX_SIDE}; `width * height` <= 2^28" in SPEC
    assert f"varint <= {container.MAX_HEADER:,}" in SPEC
    assert f"n <= {container.MAX_CAMERA_ID}, MAY be empty" in SPEC
    assert (container.MAX_ICC, container.MAX_EXIF) == (1 << 22, 1 << 16)
    assert f"u8, 1 .. {container.MAX_SLICES}" in SPEC
    assert f"`|s|` MUST be <= {MAX_SYMBOL}" in SPEC
    assert f"{MAX_TABLES} of at most {MAX_LENGTH} entries" in SPEC


def test_profiles() -> None:
    assert ", ".join(f"{i} `{name}`" for i, name in enumerate(container.PROFILES)) in SPEC


def test_fields_have_the_names_and_the_order_of_the_grammar() -> None:
    metadata = re.findall(r"^\| `(\w+)`", SPEC.split("### 3.1")[1].split("### 3.2")[0], re.MULTILINE)
    assert metadata == [sub.name if sub.name != "size" else "width" for sub in container.METADATA.subcons]


def test_sections_have_the_names_and_the_order_of_the_grammar() -> None:
    rows = re.findall(r"^\| (\d) \| (`anchor.*?`) \| (`anchor.*?`) \|$", SPEC, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(container.VERSIONS)
    for version, *columns in rows:
        for i, column in enumerate(columns):
            names = [name.replace("non_", "non-").replace("_", " ") for name in re.findall(r"`(\w+)`", column)]
            assert section_names(int(version), 2)[i] == [f"slice {i} {name}" for name in names]
            assert sections_of(int(version), i) == len(names)


def test_passes_of_slice_0_are_those_of_the_picture_in_the_specification() -> None:
    drawn = re.search(r"```\n((?:[0-3 ]{15}\n){4})```", SPEC)
    assert drawn
    wanted = [[int(digit) for digit in line.split()] for line in drawn[1].splitlines()]
    found = [[-1] * 8 for _ in range(4)]
    for step, places in enumerate(spec_reader.passes(2, 0, 4, 8)):
        for row, column in (place for line in places for place in line):
            assert found[row][column] == -1, "no place is coded twice"
            found[row][column] = step
    assert found == wanted


def test_passes_are_packed_as_the_codec_packs_them() -> None:
    full = torch.arange(8 * 12).reshape(8, 12)
    anchors, others = split(full)
    four = [*split(anchors[0::2]), anchors[1::2], others]
    for version, index, wanted in ((1, 0, [anchors, others]), (2, 1, [anchors, others]), (2, 0, four)):
        passes = spec_reader.passes(version, index, 8, 12)
        assert len(passes) == sections_of(version, index)
        assert [[[12 * r + c for r, c in line] for line in places] for places in passes] == [x.tolist() for x in wanted]


def overhead(passes: int, slices: int) -> int:
    """Bytes of a file beside its sections, all of which hold something."""
    section = bytes(200)
    parts = [Slice((section,) * (2 if i else passes), i) for i in range(slices)]
    header = Header(b"12345678", "fast", 37.5, 1920, 1080, camera_id="cam3")
    data = pack(Stream(header, section, tuple(parts)))
    return len(data) - len(section) * (passes + 2 * slices - 1)


def test_overhead() -> None:
    text = " ".join(SPEC.split())
    assert f"version 1 has {overhead(2, 8)} with 8 slices and {overhead(2, 9)} with 9" in text
    assert f"version 3 has {overhead(4, 9)} with 9 slices and {overhead(4, 2)} where only slices 0 and 1 hold" in text


def test_example() -> None:
    tables = Tables([100, 65000, 400, 36], [4], [-1])
    section = encode(np.array([0, 1, -1, 0, 7, -3]), np.zeros(6, dtype=np.uint8), tables)
    assert f"Bytes: `{section.hex(' ').upper()}`" in SPEC
