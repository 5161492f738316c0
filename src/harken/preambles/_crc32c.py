"""CRC-32C (Castagnoli; RFC 9260, appendix A): the checksum that a PROXY header may carry.

A header that carries one must be refused when it is wrong, so the checksum may not hang on what happens to be
installed. Headers have a few hundred bytes: 50 µs in Python, for the few proxies that send one.
"""

from __future__ import annotations

__all__ = ["crc32c"]

_POLYNOMIAL = 0x82F63B78  # 0x1EDC6F41 with its bits reversed
_ONES = 0xFFFF_FFFF
_BITS = 8


def _entry(value: int) -> int:
    for _ in range(_BITS):
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    return value


_TABLE = tuple(_entry(byte) for byte in range(256))


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of ``data``."""
    table, value = _TABLE, _ONES
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ _ONES
