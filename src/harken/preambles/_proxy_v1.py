"""PROXY protocol version 1: one line of text, of which nothing may differ."""

from __future__ import annotations

import re
import socket
from typing import Any

from harken.errors import PreambleError

__all__ = ["MAX_BYTES", "SIGNATURE", "decode", "encode", "extent"]

SIGNATURE = b"PROXY "
MAX_BYTES = 107  # the specification's worst case, its CRLF included

_FAMILIES = {b"TCP4": socket.AF_INET, b"TCP6": socket.AF_INET6}
_PORT = rb"(0|[1-9][0-9]{0,4})"
_LINE = re.compile(rb"PROXY (TCP[46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) " + _PORT + b" " + _PORT + rb"\r\n")
_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?\r\n")  # whatever follows the word is to be ignored
_SHAPE = "'PROXY TCP4 SOURCE DESTINATION PORT PORT' and CRLF"


def extent(head: bytes) -> int | None:
    """Return how many bytes the line that ``head`` begins has; None while its end has not come.

    Raises:
        PreambleError: it can be no line any more.
    """
    line = head[:MAX_BYTES]
    end = line.find(b"\n")
    body = line[: end - 1] if end > 0 else line[:-1] if end < 0 else b""
    if b"\r" in body or (end >= 0 and line[end - 1 : end] != b"\r"):
        raise PreambleError(f"PROXY v1: {line!r} has a CR or LF outside the CRLF that ends the line")
    if end >= 0:
        return end + 1
    if len(line) == MAX_BYTES:
        raise PreambleError(f"PROXY v1: no CRLF in the first {MAX_BYTES} bytes, which begin {line[:40]!r}")
    return None


def decode(line: bytes) -> tuple[Any, Any]:
    """Read a whole line: source and destination as ``socket`` spells them, or None twice for UNKNOWN.

    Raises:
        PreambleError: the line is not exactly as specified.
    """
    if _UNKNOWN.fullmatch(line):
        return None, None
    found = _LINE.fullmatch(line)
    if found is None:
        raise PreambleError(f"PROXY v1: {line!r} is not {_SHAPE}")
    word, source, destination, source_port, destination_port = found.groups()
    family = _FAMILIES[word]
    return _address(line, family, source, source_port), _address(line, family, destination, destination_port)


def _address(line: bytes, family: int, host: bytes, port: bytes) -> Any:
    text = host.decode("ascii")
    try:
        spelt = socket.inet_ntop(family, socket.inet_pton(family, text))
    except OSError:
        spelt = ""
    if not spelt or (family == socket.AF_INET and spelt != text):  # some C libraries take leading zeros
        raise PreambleError(f"PROXY v1: {text!r} in {line!r} is no IPv{4 if family == socket.AF_INET else 6} address")
    number = int(port)
    if number > 0xFFFF:
        raise PreambleError(f"PROXY v1: port {number} in {line!r} is above 65535")
    return (spelt, number) if family == socket.AF_INET else (spelt, number, 0, 0)


def encode(family: int, source: Any, destination: Any) -> bytes:
    """Write the line for two addresses of ``family`` in numbers; UNKNOWN for any family but IPv4 and IPv6."""
    for word, known in _FAMILIES.items():
        if family == known:
            line = f"PROXY {word.decode()} {source[0]} {destination[0]} {source[1]} {destination[1]}\r\n"
            return line.encode("ascii")
    return b"PROXY UNKNOWN\r\n"
