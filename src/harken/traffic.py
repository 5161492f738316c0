"""What the kernel tells of a connection's traffic, at no cost to those who read and write.

Linux counts the bytes of each TCP connection and stamps the last; TCP_INFO reads it at the time of one system call.
Offsets are those of ``struct tcp_info`` in linux/tcp.h, which only ever grows at its end.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from harken.unpatched import Socket, family_of, proto_of

try:
    import fcntl
    import termios
except ImportError:  # no Unix
    _ioctl: Callable[[int, int, bytes], Any] | None = None
    _FIONREAD = _TIOCOUTQ = 0
else:
    _ioctl, _FIONREAD, _TIOCOUTQ = fcntl.ioctl, termios.FIONREAD, termios.TIOCOUTQ

__all__ = ["Queue", "Traffic", "accept_queue", "moved", "queued", "since_handshake", "tells", "traffic", "unread"]

_TCP = int(socket.IPPROTO_TCP)  # as an enum it costs a call each time
_TCP_INFO = getattr(socket, "TCP_INFO", None)
# Up to tcpi_bytes_retrans, which Linux has since 4.19.
_BYTES = 216
_STATE = struct.Struct("=B")
_TIMES = struct.Struct("=I4xI")  # tcpi_last_data_sent, tcpi_last_data_recv: milliseconds
_TIMES_AT = 44
_COUNTS = struct.Struct("=QQ8xI")  # tcpi_bytes_acked, tcpi_bytes_received, …, tcpi_notsent_bytes
_COUNTS_AT = 120
_SENT = struct.Struct("=QQ")  # tcpi_bytes_sent, tcpi_bytes_retrans
_SENT_AT = 200
_MOVED = struct.Struct("=B119xQQ8xI52xQQ")  # state, and the counts above, all at once
# Of a listener, tcpi_unacked and tcpi_sacked are its queue: tcp_get_info() in net/ipv4/tcp.c.
_QUEUE = struct.Struct("=24xII")
# A connection's tcpi_last_data_sent begins when it enters the queue: tcp_create_openreq_child() in
# net/ipv4/tcp_minisocks.c.
_FIRST_SENT = struct.Struct("=44xI")
# States in which the peer's FIN has come, which counts as a byte received: CLOSE_WAIT, LAST_ACK, CLOSING, TIME_WAIT.
_FINISHED = {8, 9, 11, 6}
# Those in which it may still come: ESTABLISHED, FIN_WAIT1, FIN_WAIT2.
_UNFINISHED = (b"\1", b"\4", b"\5")
_NOTHING = b"\0\0\0\0"
_INTERNET = (int(socket.AF_INET), int(socket.AF_INET6))
_tells = False


class Traffic(NamedTuple):
    """What has moved on one TCP connection.

    Attributes:
        state: the kernel's number for its state.
        received: bytes that came.
        sent: bytes that the handler gave to the kernel.
        out: bytes that left for the peer at least once.
        acked: bytes that the peer's kernel has.
        since_sent: seconds since data was last sent; that is also tried when a peer does not read.
        since_received: seconds since data last came.
    """

    state: int
    received: int
    sent: int
    out: int
    acked: int
    since_sent: float
    since_received: float


def tells(request: Any) -> bool:
    """Whether the kernel tells of such a connection. Of TCP it is asked until it did: then it tells of all."""
    global _tells
    plain = (
        isinstance(request, Socket) and family_of(request) in _INTERNET and proto_of(request) in (0, socket.IPPROTO_TCP)
    )
    if plain and _tells:
        return True
    told = traffic(request) is not None
    _tells = _tells or (plain and told)
    return told


def traffic(request: Any) -> Traffic | None:
    """Ask the kernel; None where it does not tell: no TCP, no Linux, closed already."""
    info = _info(request)
    return None if info is None else decode(info)


def _info(request: Any) -> bytes | None:
    """Return TCP_INFO with counts that belong to its state.

    The kernel reads the state before it locks the connection: tcp_get_info() in net/ipv4/tcp.c. A FIN that comes in
    between is among the bytes, and the state still says that none has come; so a state that lets one come is asked
    again. States only go on, so that there are a few rounds at the most.
    """
    if _TCP_INFO is None or not isinstance(request, Socket):
        return None
    try:
        while True:
            info = request.getsockopt(_TCP, _TCP_INFO, _BYTES)
            if info[:1] not in _UNFINISHED or request.getsockopt(_TCP, _TCP_INFO, 1) == info[:1]:
                return info
    except OSError:
        return None


def decode(info: bytes) -> Traffic | None:
    """Read what TCP_INFO returned."""
    if len(info) < _BYTES:
        return None
    (state,) = _STATE.unpack_from(info)
    since_sent, since_received = _TIMES.unpack_from(info, _TIMES_AT)
    acked, received, unsent = _COUNTS.unpack_from(info, _COUNTS_AT)
    sent, again = _SENT.unpack_from(info, _SENT_AT)
    return Traffic(
        state,
        received - (state in _FINISHED),
        sent - again + unsent,
        sent - again,
        acked,
        since_sent / 1000,
        since_received / 1000,
    )


def moved(request: Any) -> tuple[int, int] | None:
    """Return the bytes that came and that were sent, as ``traffic`` does, for less."""
    info = _info(request)
    if info is None or len(info) < _BYTES:  # no TCP, or closed; an old kernel
        return None
    state, _, received, unsent, sent, again = _MOVED.unpack(info)
    return received - (state in _FINISHED), sent - again + unsent


def since_handshake(request: Any) -> float | None:
    """Return the seconds that a connection just accepted, on which nothing was sent yet, has waited for that."""
    told = _tell(request, _FIRST_SENT)
    return None if told is None else told[0] / 1000


class Queue(NamedTuple):
    """The accept queue of a listener.

    Attributes:
        length: connections in it.
        limit: how many it takes.
    """

    length: int
    limit: int


def accept_queue(listener: Any) -> Queue | None:
    """Ask the kernel; None where it does not tell: no TCP, no Linux, closed already."""
    told = _tell(listener, _QUEUE)
    return None if told is None else Queue(*told)


def _tell(sock: Any, layout: struct.Struct) -> tuple[int, ...] | None:
    if _TCP_INFO is None or not isinstance(sock, (Socket, socket.socket)):
        return None
    try:
        return layout.unpack(sock.getsockopt(_TCP, _TCP_INFO, layout.size))
    except (OSError, struct.error):
        return None


def queued(request: Any) -> int:
    """Bytes that were sent and that the peer has not taken; 0 where the kernel does not tell."""
    return _ask(request, _TIOCOUTQ)


def unread(request: Any) -> int:
    """Bytes that came and that the handler has not read; 0 where the kernel does not tell."""
    return _ask(request, _FIONREAD)


def _ask(request: Any, number: int) -> int:
    if _ioctl is None:
        return 0
    try:
        told = _ioctl(request.fileno(), number, _NOTHING)
    except (OSError, AttributeError, ValueError):  # no socket, or closed
        return 0
    return 0 if told == _NOTHING else int.from_bytes(told, _ORDER)


_ORDER: Any = "little" if struct.pack("=H", 1) == b"\1\0" else "big"
