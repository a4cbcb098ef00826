"""The small checks are the catalogued CRCs, so that a stranger's library computes the same."""

from __future__ import annotations

import os

from mvcodec.checksums import crc8, crc16
from tests import spec_reader


def test_catalogue_values() -> None:
    assert crc8(b"123456789") == 0xF4
    assert crc16(b"123456789") == 0x29B1
    assert (crc8(b""), crc16(b"")) == (0, 0xFFFF)


def test_same_as_bit_by_bit() -> None:
    for n in (1, 2, 126, 127, 128, 254, 255, 381, 2000):
        data = os.urandom(n)
        assert crc8(data) == spec_reader.crc8(data)
        assert crc16(data) == spec_reader.crc16(data)
    for n in (32766, 32767, 32768, 70000, 131071):
        data = os.urandom(n)
        assert crc16(data) == spec_reader.crc16(data)


def test_every_flip_of_one_byte_is_seen() -> None:
    data = bytes(range(40))
    for at in range(len(data)):
        for flip in range(1, 256):
            changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            assert crc8(changed) != crc8(data)
