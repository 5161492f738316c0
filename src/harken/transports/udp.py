"""UDP: ``udp://HOST:PORT``, with hosts and ports as for TCP."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from harken import settings
from harken.transports import BindOptions, _filters, _inet
from harken.transports._inet import Place, describe, parse, suits

if TYPE_CHECKING:
    from harken.listener import Listener

__all__ = ["bind", "describe", "parse", "schemes", "shut_out", "suits", "tune", "url"]

schemes = ("udp",)

settings.setting(
    "max_packet_size",
    settings.size(1),
    65535,
    unit="bytes",
    meaning="the longest datagram taken whole; the end of a longer one is lost, and an event says so",
    origin="udp(7): the length field has 16 bits; stdlib's 8192 cuts datagrams silently",
    stdlib="max_packet_size",
    stdlib_default=8192,
)


def bind(place: Place, options: BindOptions) -> list[Listener]:
    """Open a bound socket; a port that another server has is refused unless both set ``reuse_port``."""
    return _inet.bind(place, options, tune)


def tune(sock: socket.socket, options: BindOptions) -> None:
    """Set socket options.

    SO_REUSEADDR is left out: UDP has no TIME_WAIT to get past, and with it Linux lets a second server take the port,
    and the datagrams, away from the first.
    """
    _inet.reuse_port(sock, options)


def shut_out(sock: socket.socket) -> float | None:
    """Let the kernel drop what comes; a sender does not learn of it, as with any datagram."""
    return 0.0 if _filters.drop_all(sock) else None


def url(sock: socket.socket) -> str:
    """Return where a socket is bound: ``udp://127.0.0.1:53``."""
    return _inet.url("udp", sock)
