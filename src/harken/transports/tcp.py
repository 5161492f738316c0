"""TCP: ``tcp://HOST:PORT``.

``tcp://:8800`` is every IPv4 and IPv6 address by one socket, ``tcp://[::]:8800`` is IPv6 alone, port 0 is any free one.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from harken.transports import BindOptions, _filters, _inet
from harken.transports._inet import Place, describe, parse, suits

if TYPE_CHECKING:
    from harken.listener import Listener

__all__ = ["bind", "describe", "parse", "schemes", "shut_out", "suits", "tune", "url"]

schemes = ("tcp",)

# Seconds that a handshake under way gets to come to its end: the round trip to the far side of the earth takes 0.3 at
# worst, and 0.1 seldom; a client that is slower than that is told by a reset, and tries again.
HANDSHAKE_SECONDS = 0.1
# Within this machine a handshake takes microseconds, and who cares for the port should not have to wait for it.
LOCAL_HANDSHAKE_SECONDS = 0.005


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


def shut_out(sock: socket.socket) -> float | None:
    """Leave new clients unanswered, so that they try again a second later; handshakes under way come to their end."""
    if sock.family not in _inet.FAMILIES or not _filters.drop_syns(sock):
        return None
    host = sock.getsockname()[0]
    return LOCAL_HANDSHAKE_SECONDS if host.startswith("127.") or host == "::1" else HANDSHAKE_SECONDS


def url(sock: socket.socket) -> str:
    """Return where a socket is bound: ``tcp://127.0.0.1:8800``, or ``tcp://:8800`` for IPv4 and IPv6 at once."""
    return _inet.url("tcp", sock)
