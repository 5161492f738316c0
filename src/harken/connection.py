"""The wire, and what harken remembers of it.

A :class:`Connection` is ``self.request`` in a handler: a real ``socket.socket`` whose reads and writes are untouched.
Beside it stands a :class:`Record`, one for each connection whatever its request object is: programs override
``get_request`` and return TLS sockets, tuples and objects of their own.
"""

from __future__ import annotations

import _socket
import errno
import itertools
import os
import select
import socket
import struct
import sys
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harken import events
from harken.peer import Peer, behind
from harken.stamps import Stamps, stamp
from harken.tracing import Tracer, mark
from harken.traffic import accept_queue, moved, queued, traffic, unread
from harken.unpatched import Socket, family_of, kind_of, original, proto_of

if TYPE_CHECKING:
    from harken.admission import Ticket
    from harken.buffers import Buffers
    from harken.preambles.proxy_header import ProxyHeader
    from harken.report import Report

__all__ = [
    "CHILD_STATUS",
    "REASONS",
    "Connection",
    "ConnectionInfo",
    "Record",
    "Registry",
    "accept",
    "backlog_length",
    "forget_unsent",
    "read_off",
    "receive_now",
    "shown",
    "shut",
    "tcp_info",
]

REASONS: dict[str, str] = {
    "handler_returned": "the handler was done",
    "handler_failed": "the handler raised",
    "peer_closed": "the peer had closed its side when the handler returned",
    "peer_reset": "the peer reset the connection",
    "idle_timeout": "no byte moved either way for `idle_timeout`",
    "read_timeout": "one read took longer than `read_timeout`",
    "write_timeout": "the peer did not read for `write_timeout`",
    "lifetime": "the connection was open for `lifetime`",
    "preamble_failed": "the PROXY header or the TLS handshake failed",
    "rejected": "a limit refused it after its preamble",
    "killed": "`close_connection()` or an operator closed it",
    "drained": "it left when the server drained",
    "drain_deadline": "it was cut when the drain's time was over",
    "shed": "it was the longest idle when room was needed, or harken held most for it when memory was",
    "shutdown": "the server stopped at once",
}

# How a forked child tells its parent, by exit status, why the connection ended. 0 and 1 are stdlib's.
CHILD_STATUS = {
    "handler_returned": 0,
    "handler_failed": 1,
    "peer_closed": 10,
    "peer_reset": 11,
    "preamble_failed": 12,
    "rejected": 13,
    "idle_timeout": 14,
    "read_timeout": 15,
    "write_timeout": 16,
    "lifetime": 17,
    "handler_timeout": 18,  # its reason is "killed"
    "drained": 19,
}

_LINUX = sys.platform == "linux"

# struct tcp_info of linux/tcp.h: the state is its first byte, the times (milliseconds) two of its u32 fields.
_TCP_INFO = getattr(socket, "TCP_INFO", None)
_TCP_CLOSE, _TCP_CLOSE_WAIT, _TCP_LAST_ACK = 7, 8, 9
# Connections to take from a queue of unknown length before it is closed: who keeps coming must not hold it open.
MAX_BACKLOG_GUESS = 64
_LAST_DATA_SENT, _LAST_DATA_RECV, _TCP_INFO_BYTES = 44, 52, 56
# What is read off before a connection that harken ended is closed: more than a receive buffer holds at rest
# (net.ipv4.tcp_rmem: 128 KiB, at most 6 MiB); who sends on and on is reset all the same.
READ_OFF_TURNS, _READ_OFF_BYTES = 16, 1 << 18


_FAMILIES: dict[int, object] = {int(family): family for family in socket.AddressFamily}
_KINDS: dict[int, object] = {int(kind): kind for kind in socket.SocketKind}


class Connection(Socket):
    """One accepted connection: a ``socket.socket`` that tells its record when it closes.

    No method that moves data is overridden, so a read costs what it costs on a plain socket.
    """

    __slots__ = ("_exposed", "record")
    record: Record | None
    _exposed: bool  # set once the descriptor was given out
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

    def fileno(self) -> int:
        """Return the descriptor, as any socket; others may hold the connection open by it from now on."""
        self._exposed = True
        return super().fileno()

    def end(self) -> bool:
        """Tell the peer that nothing more comes, and close; tell whether it is closed, or a file of it still open.

        For the way on which no hook is overridden: the caller has the record. close() alone tells the peer as much,
        where it has closed its side already and nobody else can hold the descriptor.
        """
        record, self.record = self.record, None
        if record is None or record.reason != "peer_closed" or _forked or getattr(self, "_exposed", False):
            try:
                self.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the peer, or the handler, was quicker
        self._closed = True
        if self._io_refs > 0:  # the last makefile() closes it
            self.record = record
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

    gevent's too, unless it is the hub that waits for what was accepted.
    """
    accepts = getattr(type(listener), "accept", None)
    return accepts is Socket.accept or (accepts is socket.socket.accept and kind is not Connection)


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
        try:
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


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """What ``connections()`` says of one open connection.

    Attributes:
        id: the connection's id, as in events and logs.
        peer: the far end.
        opened_at: when it was accepted, in seconds since the epoch.
        seconds: how long it has been open.
        idle_seconds: how long no byte moved either way, as far as the kernel tells; None when it does not.
        process: the pid of the process that serves it.
        bytes_in: bytes that came; None where nobody counts: on a Unix socket without deadlines, and while a child
            serves it, whose figures are known at its end.
        bytes_out: bytes that its handler sent; None as before.
        requests: how many have begun, the first and each that came after an answer; None unless ``read_timeout`` or
            ``handler_timeout`` wants to know where they begin.
        waits_for: ``preamble``, ``reading`` (for the client to speak), ``writing`` (for the client to read) or
            ``handler``; on blocking engines as far as the kernel tells.
        reason: why harken ended it, in the report of a drain; None while it is open.
    """

    id: str
    peer: Peer
    opened_at: float
    seconds: float
    idle_seconds: float | None
    process: int
    bytes_in: int | None = None
    bytes_out: int | None = None
    requests: int | None = None
    waits_for: str = "handler"
    reason: str | None = None


# Ids that no other process and no other start of this one gives: a random prefix, and a count. A forked child counts on
# by a prefix of its own; what it inherited keeps the one that it had.
_count = itertools.count(1)
_firsts = [0]  # the first number of each prefix
_prefixes = [os.urandom(3).hex()]


_forked = False  # whether this process ever had a child, which may hold what it has


def _note_fork() -> None:
    global _forked
    _forked = True


def _reseed() -> None:
    _firsts.append(next(_count))
    _prefixes.append(os.urandom(3).hex())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_note_fork, after_in_child=_reseed)


def _gone() -> None:
    """Stands for a weak reference to what is no more."""


class _Reference(weakref.ref[Any]):
    """A weak reference that knows its record: a bound method for each would cost another object."""

    __slots__ = ("record",)
    record: Record


def _refer(record: Record, request: object) -> Callable[[], Any]:
    handle = getattr(type(request), "handle", None)
    if handle is not None:
        return handle(request)  # type: ignore[no-any-return]
    reference = _Reference(request, _collected)
    reference.record = record
    return reference


def _collected(reference: Any) -> None:
    reference.record.collected()


_new: Callable[[type[Record]], Record] = object.__new__


class Record:
    """What harken remembers of one connection, from accept to close.

    Attributes:
        client_address: what ``get_request`` returned.
        started: ``time.monotonic()`` at accept.
        reason: one of :data:`REASONS`, once known; the first to know wins.
        detail: what who killed it had to say.
        failed: whether the handler raised.
        opened: whether it went to its handler, or to the preambles before it.
        held: whether the event that says so waits until a preamble has learned the client's address.
        thread: identifier of the thread that serves it, once known.
        process: pid of the child that serves it, or 0 for this process.
        key: its place in the registry: its number, or -id(request) where the request object does not know its record.
        silent: in a forked child, where the parent keeps the books.
        entered: whether its preambles have run, on a server that has any.
        spoken_for: the client's address as a preamble learned it, to be given to hooks and handler, or None.
        proxy: the header by which the peer spoke for that client, or None.
        certificate: the peer's TLS certificate, or None.
        successor: what the connection went on as in the middle of its handler, which hooks do not know; or None.
        report: how a forked child tells its parent what the preambles learned; else None.
        ticket: what limits let it in by, or None. Whoever takes it out of ``__dict__`` gives it back: nobody else can.
        handler: the handler, if it has hooks that may be called from outside its thread.
        in_preamble: whether its preambles run at the moment.
        stamps: what is known of its traffic beside what the kernel knows, or None.
        seen: the deadlines' own: what moved last, and when.
        cut_already: whether its deadline has cut it.
        requests: how many requests had begun at its end, as ``moved``.
        moved: the bytes that had come and been sent at its end, if somebody wants to know and they are counted.
        tracer: takes down what it moves while somebody follows it; else None.
    """

    # What each record has costs a place in it; the rest is the class's, and the record's own once it happens.
    __slots__ = (
        "__dict__",
        "_number",
        "_registry",
        "_request",
        "client_address",
        "key",
        "opened",
        "reason",
        "started",
        "thread",
    )

    reason: str | None
    detail: str | None = None
    failed = False
    held = False
    process = 0
    silent = False
    entered = False
    spoken_for: Any = None
    proxy: ProxyHeader | None = None
    certificate: dict[str, Any] | None = None
    successor: Any = None
    report: Report | None = None
    ticket: Ticket | None = None
    handler: Any = None
    in_preamble = False
    stamps: Stamps | None = None
    seen: tuple[object, float] = (None, 0.0)
    cut_already = False
    moved: tuple[int, int] | None = None
    requests: int | None = None
    tracer: Tracer | None = None

    def __init__(self, request: object, client_address: Any, registry: Registry) -> None:
        self._number = next(_count)
        self.client_address = client_address
        self.started = time.monotonic()
        self.key = self._number if isinstance(request, Connection) else -id(request)
        self.reason = None
        self.opened = False
        self.thread = 0
        self._registry = registry
        # Weak: a program that drops a connection without closing it must still get its descriptor back by collection.
        self._request: Callable[[], object] = _refer(self, request)

    @property
    def id(self) -> str:
        """The connection's id, unique over processes and restarts."""
        return f"{_prefixes[bisect_right(_firsts, self._number) - 1]}-{self._number}"

    @property
    def request(self) -> Any:
        """The request object, or None when it is gone."""
        return self._request()

    @property
    def buffers(self) -> Buffers | None:
        """Who is to be told what harken holds for it, if that is bounded."""
        return self._registry.buffers

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self._registry.holds(self)

    @property
    def peer(self) -> Peer:
        """The far end, or the client for which it speaks."""
        told = self.spoken_for if self.proxy is None else None
        peer = self._registry.describe(self.request, self.client_address if told is None else told)
        if self.certificate is not None:
            peer = replace(peer, certificate=self.certificate)
        return peer if self.proxy is None else behind(peer, self.proxy)

    def bytes_moved(self) -> tuple[int, int] | None:
        """Return the bytes that came and that were sent, if anybody counts them."""
        told = moved(self.request)
        if told is not None:
            return told
        stamps = self.stamped()
        return (stamps.received, stamps.sent) if stamps is not None else None

    def requests_begun(self) -> int | None:
        """Return how many requests have begun, if anybody looks where they do."""
        stamps = self.stamped()
        return stamps.requests if stamps is not None and stamps.moved else None

    def _count(self) -> None:
        """Note what was counted so far, if somebody will want to know at the end."""
        if events.subscribers["closed"]:
            self.moved, self.requests = self.bytes_moved(), self.requests_begun()
        elif self._registry.counts_bytes:
            self.moved = self.bytes_moved()

    def waits_for(self) -> str:
        """Tell for what it waits; see :class:`ConnectionInfo`."""
        if self.in_preamble:
            return "preamble"
        request, stamps = self.request, self.stamped()
        if (stamps and stamps.writing) or queued(request):
            return "writing"
        if stamps and stamps.reading:
            return "reading"
        told = traffic(request)
        if told is None or unread(request):
            return "handler"
        return "handler" if told.received and told.since_received < told.since_sent else "reading"

    def stamped(self) -> Stamps | None:
        """Return the stamps of its traffic: the connection's own where it keeps some."""
        request = self.request
        return Stamps.of(request.stamps()) if hasattr(type(request), "stamps") else self.stamps

    def judge(self, request: Any) -> str:
        """Settle the reason, while the socket is still open, from what the kernel says; the first judgement holds."""
        if self.moved is None:
            self._count()
        if self.reason is None:
            far_end = getattr(request, "far_end", None) or peer_fault(request)
            self.reason = "handler_failed" if self.failed and far_end != "peer_reset" else far_end or "handler_returned"
        return self.reason

    def move(self, request: Any) -> None:
        """The same connection goes on as another object, which an engine or a preamble made of the one accepted."""
        accepted: Any = self.request
        if hasattr(type(accepted), "record"):  # the type is asked: gevent's socket, closed, answers by an error
            accepted.record = None
        self._registry.rename(self, self._number if isinstance(request, Connection) else -id(request))
        self._request = _refer(self, request)
        if hasattr(type(request), "record"):
            request.record = self
        if self.stamps is not None and not self.in_preamble:
            stamp(request, self)
        if self.tracer is not None:
            mark(self)
        if self.reason is not None:
            shut(request)  # who cut it meanwhile found the old object, which has nothing to shut any more

    @property
    def was_ended(self) -> bool:
        """Whether harken ends it, or its server: its handler may leave unread what its client has sent."""
        return self.reason is not None or self._registry.careful

    def ended(self) -> None:
        """The connection is closed: strike it off. Only the first call counts."""
        self._registry.strike(self)

    def collected(self) -> None:
        """The request object was dropped, unclosed."""
        if not self.process:
            self.ended()

    def cut(self, reason: str) -> None:
        """End the connection from outside its handler; any thread may call it."""
        if self.reason is None:
            self.reason = reason
        self._count()
        if self.process:
            self._registry.end_child(self.process)
        else:
            shut(self.request)

    def abandon(self, reason: str, detail: str | None = None) -> None:
        """End the connection as :meth:`cut` does, and throw away what its peer has not taken."""
        if self.reason is None:
            self.reason, self.detail = reason, detail
        forget_unsent(self.request)
        self.cut(reason)

    def leave(self, reason: str) -> None:
        """Ask the handler to come to its end: it reads the end of what its client sent. Any thread may call it."""
        if self.reason is None:
            self.reason = reason
        shut(self.request, socket.SHUT_RD)

    def idle_seconds(self) -> float | None:
        """How long no byte moved either way; None where the kernel does not tell (Unix sockets)."""
        times = tcp_info(self.request, _TCP_INFO_BYTES)
        if len(times) < _TCP_INFO_BYTES:
            return None
        sent: int
        received: int
        (sent,) = struct.unpack_from("=I", times, _LAST_DATA_SENT)
        (received,) = struct.unpack_from("=I", times, _LAST_DATA_RECV)
        return min(sent, received) / 1000

    def info(self) -> ConnectionInfo:
        """Describe the connection for ``connections()``."""
        seconds, now = time.monotonic() - self.started, time.time()
        received, sent = self.bytes_moved() or (None, None)
        return ConnectionInfo(
            id=self.id,
            peer=self.peer,
            opened_at=now - seconds,
            seconds=seconds,
            idle_seconds=self.idle_seconds(),
            process=self.process or os.getpid(),
            bytes_in=received,
            bytes_out=sent,
            requests=self.requests_begun(),
            waits_for=self.waits_for(),
        )


def tcp_info(request: object, length: int) -> bytes:
    """Return the first ``length`` bytes of the kernel's struct tcp_info; none where there is no such thing."""
    if not isinstance(request, (Socket, socket.socket)) or _TCP_INFO is None:
        return b""
    try:
        return request.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, length)
    except OSError:  # not TCP, or closed
        return b""


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


class Registry:
    """The open connections of one server. Safe from every thread and from signal handlers: single dict operations."""

    def __init__(
        self,
        describe: Callable[[Any, Any], Peer],
        on_close: Callable[[Record], None],
        end_child: Callable[[int], None],
    ) -> None:
        """Make an empty registry.

        Args:
            describe: (request, client_address) to the peer.
            on_close: told once of each record that ends.
            end_child: ends the child process that serves a connection.
        """
        self.describe = describe
        self.end_child = end_child
        self._on_close = on_close
        self._records: dict[int, Record] = {}
        self._changed = threading.Condition()
        self.careful = False
        """Whether a connection is closed only after what its client sent was read off, since the server drains."""
        self.counts_bytes = False
        """Whether somebody wants to know of each connection that ends what has moved on it."""
        self._waiting = 0
        self.buffers: Buffers | None = None
        """Who is told what harken holds for connections, if that is bounded."""

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def add(self, request: object, client_address: Any) -> Record | None:
        """Begin a record; None for what is no connection (a datagram's pair, an object without weak references)."""
        if isinstance(request, tuple):
            return None
        try:
            record = Record(request, client_address, self)
        except TypeError:
            return None
        if isinstance(request, Connection):
            request.record = record
        self._records[record.key] = record
        return record

    def begin(self, request: Connection, client_address: Any, now: float) -> Record:
        """Begin the record of a :class:`Connection`; as ``add``, without its calls."""
        record = request.record = _new(Record)
        record._number = record.key = number = next(_count)
        record.client_address = client_address
        record.started = now
        record.reason = None
        record.opened = False
        record.thread = 0
        record._registry = self
        handle = getattr(request, "handle", None)
        record._request = _refer(record, request) if handle is None else handle()
        self._records[number] = record
        return record

    def find(self, request: object) -> Record | None:
        """Return the record of ``request``, if it is open."""
        if isinstance(request, Connection):
            return getattr(request, "record", None)
        record = self._records.get(-id(request))
        return record if record is not None and record.request is request else None

    def holds(self, record: Record) -> bool:
        """Tell whether ``record`` is open."""
        return self._records.get(record.key) is record

    def by_id(self, connection_id: str) -> Record | None:
        """Return the open record of this id."""
        return next((record for record in self if record.id == connection_id), None)

    def rename(self, record: Record, key: int) -> None:
        """File an open record under another key."""
        if key != record.key and self.holds(record):
            self._records[key] = record
            del self._records[record.key]
            record.key = key

    def strike(self, record: Record) -> None:
        """Forget an ended record and tell ``on_close``, once."""
        records, key = self._records, record.key
        if records.get(key) is not record or records.pop(key, None) is not record:
            return
        self._on_close(record)
        if self.buffers is not None:
            self.buffers.forget(record)
        record._request = _gone  # or its callback would run for nothing when the request object goes
        if self._waiting:
            self.nudge()

    def hand_over(self, record: Record | None, pid: int) -> None:
        """Child ``pid`` serves this connection from now on; the caller closes its own copy."""
        if record is None or self._records.pop(record.key, None) is not record:
            return
        request = record.request
        if isinstance(request, Connection):
            request.record = None
        record.process = pid
        record.key = record._number  # the request object goes, and another may get its id()
        self._records[record.key] = record

    def child_ended(self, record: Record | None, status: int) -> None:
        """The child that served this connection has exited."""
        if record is not None:
            told = {code: reason for reason, code in CHILD_STATUS.items()}
            reason = told.get(status, "handler_failed")
            if reason == "handler_timeout":
                record.detail = record.detail or reason
                reason = "killed"
            record.reason = record.reason or reason
            self.strike(record)

    def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until ``condition()``, asked whenever a connection ends; tell whether it came true in time."""
        with self._changed:
            self._waiting += 1
            try:
                return self._changed.wait_for(condition, timeout)
            finally:
                self._waiting -= 1

    def nudge(self) -> None:
        """Let those who wait ask their condition."""
        with self._changed:
            self._changed.notify_all()
