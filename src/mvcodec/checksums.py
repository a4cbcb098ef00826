"""The two small checks of a .phv file; its large one is zlib.crc32. All start from the highest bit."""

from __future__ import annotations

import binascii


def crc16(data: bytes) -> int:
    """CRC-16/IBM-3740: x^16 + x^12 + x^5 + 1, start 0xFFFF. "123456789" gives 0x29B1.

    x has order 32767 modulo the polynomial, so bytes 32767 apart count alike, and the decoded integers of a slice are
    added up in blocks of that many first: eight times faster. To start at 0xFFFF is to start at 0 with those bits
    added to the first two bytes.
    """
    if len(data) <= _LONG_PERIOD:
        return binascii.crc_hqx(data, 0xFFFF)
    import numpy as np  # here alone: who holds so many integers has it, and `mvcodec info` stays instant

    blocks = np.zeros(-(-len(data) // _LONG_PERIOD) * _LONG_PERIOD, dtype=np.uint8)  # zeros in front change nothing
    placed = blocks[-len(data) :]
    placed[:] = np.frombuffer(data, dtype=np.uint8)
    placed[:2] ^= 0xFF
    return binascii.crc_hqx(np.bitwise_xor.reduce(blocks.reshape(-1, _LONG_PERIOD)).tobytes(), 0)


def crc8(data: bytes) -> int:
    """CRC-8/SMBUS: x^8 + x^2 + x + 1, start 0. "123456789" gives 0xF4.

    x has order 127 modulo the polynomial, so bytes 127 apart count alike and blocks of 127 bytes can be added
    up first, as one large integer: 10 to 30 times faster than byte by byte.
    """
    blocks = -(-len(data) // _PERIOD)
    total = int.from_bytes(data, "big")  # zeros in front change nothing
    while blocks > 1:
        blocks -= blocks // 2
        bits = 8 * _PERIOD * blocks
        total = (total >> bits) ^ (total & ((1 << bits) - 1))
    crc = 0
    for byte in total.to_bytes(_PERIOD, "big"):
        crc = _CRC8[crc ^ byte]
    return crc


def _crc8_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = (byte << 1) ^ (0x107 if byte & 128 else 0)
    return byte


_PERIOD, _LONG_PERIOD = 127, 32767
_CRC8 = bytes(map(_crc8_of_byte, range(256)))
