"""The two small checks of a .phv file; its large one is zlib.crc32. All start from the highest bit."""

from __future__ import annotations

import binascii


def crc16(data: bytes) -> int:
    """CRC-16/IBM-3740: x^16 + x^12 + x^5 + 1, start 0xFFFF. "123456789" gives 0x29B1."""
    return binascii.crc_hqx(data, 0xFFFF)


def crc8(data: bytes) -> int:
    """CRC-8/SMBUS: x^8 + x^2 + x + 1, start 0. "123456789" gives 0xF4."""
    crc = 0
    for byte in data:
        crc = _CRC8[crc ^ byte]
    return crc


def _crc8_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = (byte << 1) ^ (0x107 if byte & 128 else 0)
    return byte


_CRC8 = bytes(map(_crc8_of_byte, range(256)))
