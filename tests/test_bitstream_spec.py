"""The specification states the numbers the code uses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mvcodec import container
from mvcodec.entropy import Tables, encode
from mvcodec.entropy.tables import MAX_LENGTH, MAX_SYMBOL, MAX_TABLES

SPEC = (Path(__file__).parent.parent / "bitstream_spec.md").read_text(encoding="utf-8")


def test_signature_and_version() -> None:
    assert container.SIGNATURE.hex(" ").upper() in SPEC
    assert f"# The .phv bitstream, version {container.VERSION}" in SPEC


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


def test_example() -> None:
    tables = Tables([100, 65000, 400, 36], [4], [-1])
    section = encode(np.array([0, 1, -1, 0, 7, -3]), np.zeros(6, dtype=np.uint8), tables)
    assert f"Bytes: `{section.hex(' ').upper()}`" in SPEC
