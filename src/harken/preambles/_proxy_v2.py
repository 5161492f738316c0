"""PROXY protocol version 2: a binary header of 16 bytes, an address block and TLVs."""

from __future__ import annotations

import os
import socket
from struct import Struct
from typing import Any, NamedTuple

from harken.errors import ConfigError, PreambleError
from harken.preambles import _proxy_tlv as tlv
from harken.preambles._crc32c import crc32c

__all__ = ["HEAD_BYTES", "SIGNATURE", "Fields", "decode", "encode", "extent"]

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
HEAD_BYTES = 16

_HEAD = Struct("!12sBBH")
_VERSION = 2
_COMMANDS = ("local", "proxy")
_TRANSPORTS = ("unspec", "stream", "dgram")
_UNSPEC, _INET, _INET6, _UNIX = range(4)
_FAMILIES = {socket.AF_INET: _INET, socket.AF_INET6: _INET6, socket.AF_UNIX: _UNIX}
_BLOCKS = {_UNSPEC: Struct(""), _INET: Struct("!4s4sHH"), _INET6: Struct("!16s16sHH"), _UNIX: Struct("108s108s")}
_PATH_BYTES = 108
_MAX_REST = 0xFFFF


class Fields(NamedTuple):
    """What a header says; see :class:`~harken.preambles.proxy_header.ProxyHeader`."""

    command: str
    transport: str
    source: Any
    destination: Any
    tlvs: tlv.TLVs


def extent(head: bytes) -> int | None:
    """Return how many bytes the header that ``head`` begins has; None while that cannot be told.

    Raises:
        PreambleError: it can be no header any more.
    """
    if len(head) > len(SIGNATURE):
        _command(head[12])
    if len(head) < HEAD_BYTES:
        return None
    return HEAD_BYTES + _HEAD.unpack_from(head)[3]  # type: ignore[no-any-return]


def _command(byte: int) -> str:
    version, command = byte >> 4, byte & 0xF
    if version != _VERSION:
        raise PreambleError(f"PROXY v2: byte 13 says version {version}; only {_VERSION} is known")
    if command >= len(_COMMANDS):
        raise PreambleError(f"PROXY v2: command {command} is neither 0 (LOCAL) nor 1 (PROXY)")
    return _COMMANDS[command]


def decode(header: bytes) -> Fields:
    """Read a whole header.

    Raises:
        PreambleError: it is malformed, or its checksum is wrong.
    """
    _, byte, kind, _ = _HEAD.unpack_from(header)
    command = _command(byte)
    block = header[HEAD_BYTES:]
    if command == "local":  # the block is to be skipped whatever it says, its family too
        return Fields(command, "unspec", None, None, _tolerant(header, kind))
    family, transport = kind >> 4, kind & 0xF
    if family not in _BLOCKS or transport >= len(_TRANSPORTS):
        raise PreambleError(f"PROXY v2: byte 14 is {kind:#04x}, which is no family and transport of the protocol")
    if not family or not transport:
        return Fields(command, "unspec", None, None, _tolerant(header, kind))
    layout = _BLOCKS[family]
    if len(block) < layout.size:
        raise PreambleError(f"PROXY v2: {len(block)} bytes follow, and the addresses alone need {layout.size}")
    source, destination = _addresses(family, layout.unpack_from(block))
    found = _verified(header, tlv.split(block[layout.size :]))
    return Fields(command, _TRANSPORTS[transport], source, destination, tlv.check(found))


def _addresses(family: int, values: tuple[Any, ...]) -> tuple[Any, Any]:
    if family == _UNIX:
        return _path(values[0]), _path(values[1])
    source, destination, source_port, destination_port = values
    if family == _INET:
        inet = socket.AF_INET
        return (socket.inet_ntop(inet, source), source_port), (socket.inet_ntop(inet, destination), destination_port)
    inet6 = socket.AF_INET6
    return (
        (socket.inet_ntop(inet6, source), source_port, 0, 0),
        (socket.inet_ntop(inet6, destination), destination_port, 0, 0),
    )


def _path(raw: bytes) -> str | bytes:
    """Return a path as ``getpeername`` does: an abstract one as bytes, "" for a socket without a name."""
    if raw.startswith(b"\0"):
        return raw.rstrip(b"\0") or ""
    return os.fsdecode(raw.partition(b"\0")[0])


def _tolerant(header: bytes, kind: int) -> tlv.TLVs:
    """Return the TLVs of a header whose block may hold anything: none when it holds anything else.

    Raises:
        PreambleError: a checksum is among them and wrong.
    """
    layout = _BLOCKS.get(kind >> 4, _BLOCKS[_UNSPEC])
    try:
        found = tlv.check(tlv.split(header[HEAD_BYTES + layout.size :]))
    except PreambleError:
        return ()
    return _verified(header, found)


def _verified(header: bytes, tlvs: tlv.TLVs) -> tlv.TLVs:
    sums = [value for kind, value in tlvs if kind == tlv.CRC32C]
    if not sums:
        return tlvs
    if len(sums) > 1 or len(sums[0]) != 4:
        raise PreambleError(f"PROXY v2: {len(sums)} checksums, the first of {len(sums[0])} bytes; one of 4 is allowed")
    computed = crc32c(_without_sum(header, tlvs)).to_bytes(4)
    if computed != sums[0]:
        raise PreambleError(f"PROXY v2: the CRC-32C is {sums[0].hex()}, and {computed.hex()} would be right")
    return tlvs


def _without_sum(header: bytes, tlvs: tlv.TLVs) -> bytes:
    """Return the header with zeros for its checksum. The TLVs end it, so their sizes say where they are."""
    at = len(header) - len(tlv.join(tlvs))
    zeroed = tlv.join((kind, bytes(4) if kind == tlv.CRC32C else value) for kind, value in tlvs)
    return header[:at] + zeroed


def encode(fields: Fields, family: int) -> bytes:
    """Write a header; a checksum among the TLVs is computed, whatever its value.

    Raises:
        ConfigError: something has no room in it.
    """
    code, transport = _FAMILIES.get(family, _UNSPEC), _TRANSPORTS.index(fields.transport)  # type: ignore[call-overload]
    if not code or not transport or fields.command == "local":
        code = transport = _UNSPEC
    tlvs = tuple((kind, bytes(4) if kind == tlv.CRC32C else value) for kind, value in fields.tlvs)
    rest = _block(code, fields) + tlv.join(tlvs)
    if len(rest) > _MAX_REST:
        raise ConfigError(f"PROXY v2: addresses and TLVs have {len(rest)} bytes, and {_MAX_REST} is the most; say less")
    byte = _VERSION << 4 | _COMMANDS.index(fields.command)
    header = _HEAD.pack(SIGNATURE, byte, code << 4 | transport, len(rest)) + rest
    sums = sum(kind == tlv.CRC32C for kind, _ in tlvs)
    if not sums:
        return header
    if sums > 1:
        raise ConfigError(f"PROXY v2: {sums} checksums among the TLVs; give one")
    checksum = crc32c(header).to_bytes(4)
    tlvs = tuple((kind, checksum if kind == tlv.CRC32C else value) for kind, value in tlvs)
    return header[: len(header) - len(tlv.join(tlvs))] + tlv.join(tlvs)


def _block(code: int, fields: Fields) -> bytes:
    if code == _UNSPEC:
        return b""
    if code == _UNIX:
        return _BLOCKS[code].pack(_room(fields.source), _room(fields.destination))
    inet = socket.AF_INET if code == _INET else socket.AF_INET6
    source, destination = (socket.inet_pton(inet, address[0].partition("%")[0]) for address in fields[2:4])
    return _BLOCKS[code].pack(source, destination, fields.source[1], fields.destination[1])


def _room(path: str | bytes) -> bytes:
    raw = os.fsencode(path)
    if len(raw) > _PATH_BYTES:
        raise ConfigError(f"PROXY v2: the path {path!r} has {len(raw)} bytes, and {_PATH_BYTES} is the most")
    return raw
