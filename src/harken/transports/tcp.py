"""TCP: ``tcp://HOST:PORT``.

``tcp://:8800`` is every IPv4 and IPv6 address by one socket, ``tcp://[::]:8800`` is IPv6 alone, port 0 is any free one.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from harken.transports import BindOptions, _inet
from harken.transports._inet import Place, describe, parse

if TYPE_CHECKING:
    from harken.listener import Listener

__all__ = ["bind", "describe", "parse", "schemes", "tune", "url"]

schemes = ("tcp",)


def bind(place: Place, options: BindOptions) -> list[Listener]:
    """Open a listening socket; a port that another server has is refused unless both set ``reuse_port``."""
    return _inet.bind(place, options, tune)


def tune(sock: socket.socket, options: BindOptions) -> None:
    """Set socket options; accepted sockets inherit TCP_NODELAY and SO_KEEPALIVE from their listener on Linux."""
    if options.reuse_address:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _inet.reuse_port(sock, options)
    if options.keepalive is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, options.keepalive)
    if options.nodelay is not None and sock.family in _inet.FAMILIES:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, options.nodelay)


def url(sock: socket.socket) -> str:
    """Return where a socket is bound: ``tcp://127.0.0.1:8800``, or ``tcp://:8800`` for IPv4 and IPv6 at once."""
    return _inet.url("tcp", sock)
