"""The wire: one accepted connection, and what may be done to its socket from outside its handler.

A :class:`Connection` is ``self.request`` in a handler: a real ``socket.socket`` whose reads and writes are untouched.
"""

from __future__ import annotations

import _socket
import errno
import select
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

from harken.traffic import accept_queue
from harken.unpatched import Socket, family_of, kind_of, original, proto_of

if TYPE_CHECKING:
    from harken.records import Record

__all__ = [
    "Connection",
    "accept",
    "backlog_length",
    "forget_unsent",
    "idle_seconds",
    "kept_open",
    "peer_fault",
    "read_off",
    "receive_now",
    "shown",
    "shut",
    "tcp_info",
]

_LINUX = sys.platform == "linux"

# struct tcp_info of linux/tcp.h: the state is its first byte, the times (milliseconds) two of its u32 fields.
_TCP_INFO = getattr(socket, "TCP_INFO", None)
_TCP_CLOSE, _TCP_CLOSE_WAIT, _TCP_LAST_ACK = 7, 8, 9
# Connections to take from a queue of unknown length before it is closed: who keeps coming must not hold it open.
MAX_BACKLOG_GUESS = 64
_LAST_DATA_SENT, _LAST_DATA_RECV, _TCP_INFO_BYTES = 44, 52, 56
# What is read off before a connection that harken ended or refused is closed: more than a receive buffer holds at rest
# (net.ipv4.tcp_rmem: 128 KiB, at most 6 MiB); who sends on and on is reset all the same.
READ_OFF_TURNS, _READ_OFF_BYTES = 16, 1 << 18


_FAMILIES: dict[int, object] = {int(family): family for family in socket.AddressFamily}
_KINDS: dict[int, object] = {int(kind): kind for kind in socket.SocketKind}


class Connection(Socket):
    """One accepted connection: a ``socket.socket`` that tells its record when it closes.

    No method that moves data is overridden, so a read costs what it costs on a plain socket.
    """

    __slots__ = ("record",)
    record: Record | None
    _closed: bool  # socket.socket's own, with _io_refs: the same since Python 3.0
    _io_refs: int

    @classmethod
    def take(cls, door: Any, most: int) -> list[tuple[Any, Any]]:
        """Accept what waits at a door that was found readable, at most ``most``: ``(connection, address)`` each.

        A door that blocks is asked before each further one: its flags are shared with other processes.

        Raises:
            OSError: as accept(2), for the first; a later one ends the list, and is met again.
        """
        taken: list[tuple[Any, Any]] = []
        blocking = not _LINUX or (door.gettimeout() and socket.getdefaulttimeout() is None)
        asked = None
        while True:
            try:
                fd, address = door._accept()
            except OSError:
                if taken:
                    return taken
                raise
            connection = cls(family_of(door), kind_of(door), proto_of(door), fd)
            if blocking:
                connection.setblocking(True)  # BSD's accept() hands O_NONBLOCK on
            taken.append((connection, address))
            if len(taken) == most:
                return taken
            if asked is None:
                asked = _poll()
                asked.register(door, select.POLLIN)
            if not asked.poll(0):
                return taken

    def end(self) -> bool:
        """Tell the peer that nothing more comes, and close; tell whether it is closed, or a file of it still open.

        For the way on which no hook is overridden: the caller has the record. close() alone is not enough where the
        peer has closed its side either: it resets the connection when some of what had come is unread.
        """
        record, self.record = self.record, None
        try:
            self.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the peer, or the handler, was quicker
        if kept_open(self, record):
            return False
        _socket.socket.close(self)
        return True

    @property
    def family(self) -> Any:
        """The address family, as on any socket."""
        number = family_of(self)
        return _FAMILIES.get(number, number)

    @property
    def type(self) -> Any:
        """The socket's type, as on any socket."""
        number = kind_of(self)
        return _KINDS.get(number, number)

    def _real_close(self, *_: Any) -> None:  # the one place through which close() and the last makefile() end a socket
        record = getattr(self, "record", None)
        if record is not None and record.successor is not None:
            self.record = None
            _socket.socket.close(self)
            record.successor.close()
            return
        if record is not None and record.reason is None:
            record.judge(self)
        _socket.socket.close(self)
        if record is not None:
            self.record = None
            record._registry.strike(record)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Travel to another process as ``multiprocessing`` lets a plain socket (it knows those by exact type)."""
        from multiprocessing import reduction

        return _rebuild, (reduction.DupFd(self.fileno()), int(self.family), int(self.type), self.proto)


_poll = original("select", "poll")


def kept_open(sock: Any, record: Record | None) -> bool:
    """Mark a socket as closed whose record was taken from it; tell whether a file of it keeps the descriptor open.

    Then it has its record again: the last makefile() closes it, and tells.
    """
    sock._closed = True
    if sock._io_refs > 0:
        sock.record = record
        return True
    return False


def accept(listener: socket.socket, kind: type[Connection] = Connection) -> tuple[socket.socket, Any]:
    """Take one connection from ``listener``, as ``socket.accept`` does, but as the engine's kind of connection.

    A listener with an ``accept`` of its own (a TLS socket, a test's double) answers for itself. Peers of a dual-stack
    listener that harken opened are shown by the IPv4 address that they have.

    Raises:
        OSError: as accept(2).
    """
    if not is_plain_door(listener, kind):
        return listener.accept()
    taken = kind.take(door_of(listener), 1)
    if not taken:
        raise BlockingIOError(errno.EAGAIN, "nobody waits at the door")
    connection, address = taken[0]
    return connection, shown(listener, address)


def is_plain_door(listener: Any, kind: type[Connection]) -> bool:
    """Tell whether ``listener`` accepts as a socket does: TLS sockets and a test's doubles have ways of their own.

    gevent's too, unless it is the hub that waits for what was accepted. And where a program has put a class of its own
    in the place of ``socket.socket``, to count bytes say, it means accepted connections as well.
    """
    accepts = getattr(type(listener), "accept", None)
    if accepts is Socket.accept:
        return socket.socket is Socket or not isinstance(listener, socket.socket)
    return accepts is socket.socket.accept and kind is not Connection


def door_of(listener: Any) -> Any:
    """Return the socket that accepts: ``listener``, or the one in it where gevent has made it."""
    return listener if isinstance(listener, _socket.socket) else listener._sock


def shown(listener: object, address: Any) -> Any:
    """Return an accepted address as hooks get it: peers of a dual-stack listener of harken's by their IPv4 address."""
    if len(address) == 4 and address[0].startswith("::ffff:") and hasattr(listener, "url"):
        return address[0][7:], address[1]
    return address


def _rebuild(duplicate: Any, family: int, kind: int, proto: int) -> socket.socket:
    return socket.socket(family, kind, proto, fileno=duplicate.detach())


# What the programs' `socket.socket` may be: ours, and gevent's where that patched it after us.
_SOCKETS: Any = (Socket, socket.socket)


def shut(request: Any, how: int = socket.SHUT_RDWR) -> None:
    """Wake whoever reads or writes on ``request`` by shutting the socket both ways, or one; never raises.

    The raw call is used on every type: ``SSLSocket.shutdown`` would drop its TLS state, and a handler's next ``recv``
    would return ciphertext.
    """
    if isinstance(request, _SOCKETS):
        settle = getattr(request, "settle", None)
        try:
            if settle is not None:
                settle()  # what a handler has said is on its way, as far as it knows
            if isinstance(request, Socket):
                Socket.shutdown(request, how)
            else:  # gevent's
                socket.socket.shutdown(request, how)
        except OSError:
            pass  # it has closed already


def forget_unsent(request: Any) -> None:
    """Let close() throw away what the peer will not take; else the kernel would keep it for minutes."""
    try:
        Socket.setsockopt(request, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except (OSError, TypeError):
        pass  # it has closed


def read_off(request: object) -> None:
    """Take out what the client has sent and nobody will read, so that closing does not reset the connection.

    Linux answers unread input by a reset, at which the client's kernel may throw away the last of what was sent to it.
    """
    if not isinstance(request, Socket):
        return
    try:
        for _ in range(READ_OFF_TURNS):
            if not receive_now(request, _READ_OFF_BYTES):
                return
    except OSError:
        pass  # nothing left, or it has closed


def tcp_info(request: object, length: int) -> bytes:
    """Return the first ``length`` bytes of the kernel's struct tcp_info; none where there is no such thing."""
    if not isinstance(request, (Socket, socket.socket)) or _TCP_INFO is None:
        return b""
    try:
        return request.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, length)
    except OSError:  # not TCP, or closed
        return b""


def idle_seconds(request: object) -> float | None:
    """How long no byte moved either way; None where the kernel does not tell."""
    times = tcp_info(request, _TCP_INFO_BYTES)
    if len(times) < _TCP_INFO_BYTES:
        return None
    sent: int
    received: int
    (sent,) = struct.unpack_from("=I", times, _LAST_DATA_SENT)
    (received,) = struct.unpack_from("=I", times, _LAST_DATA_RECV)
    return min(sent, received) / 1000


def peer_fault(request: object) -> str | None:
    """Tell from the kernel whether the peer has closed (``peer_closed``) or reset (``peer_reset``); None if neither."""
    try:
        state = request.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1)[0]  # type: ignore[attr-defined]
    except (OSError, AttributeError, TypeError):  # not TCP, or closed, or no socket
        state = 0
    if state:
        if state == _TCP_CLOSE:
            return "peer_reset"
        return "peer_closed" if state in (_TCP_CLOSE_WAIT, _TCP_LAST_ACK) else None
    if not isinstance(request, Socket):
        return None
    try:
        seen = receive_now(request, 1, socket.MSG_PEEK)
    except ConnectionError:
        return "peer_reset"
    except OSError:  # nothing to read, or closed
        return None
    return None if seen else "peer_closed"


def receive_now(request: socket.socket, size: int, flags: int = 0) -> bytes:
    """Receive what has come already, past any TLS. MSG_DONTWAIT does not do: with a timeout, Python waits all the same.

    Raises:
        BlockingIOError: nothing has come.
        OSError: as recv(2).
    """
    timeout = _socket.socket.gettimeout(request)
    if not timeout:
        return _socket.socket.recv(request, size, flags | socket.MSG_DONTWAIT)
    _socket.socket.settimeout(request, 0.0)
    try:
        return _socket.socket.recv(request, size, flags)
    finally:
        _socket.socket.settimeout(request, timeout)


def backlog_length(listener: object) -> int:
    """How many connections wait to be accepted; where the kernel does not tell (Unix sockets), the most to assume."""
    queue = accept_queue(listener)
    return queue.length if queue is not None else MAX_BACKLOG_GUESS
