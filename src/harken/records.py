"""What harken remembers of its connections.

Beside each stands a :class:`Record`, whatever its request object is: programs override ``get_request`` and return TLS
sockets, tuples and objects of their own. The open ones of a server are in its :class:`Registry`.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from harken import events
from harken.connection import Connection, forget_unsent, idle_seconds, peer_fault, shut
from harken.forking import in_child
from harken.peer import Peer, behind
from harken.stamps import Stamps, stamp
from harken.tracing import Tracer, mark
from harken.traffic import moved, queued, traffic, unread

if TYPE_CHECKING:
    from harken.admission import Ticket
    from harken.buffers import Buffers
    from harken.preambles.proxy_header import ProxyHeader
    from harken.report import Report

__all__ = ["CHILD_STATUS", "REASONS", "YOUNG_SECONDS", "ConnectionInfo", "Record", "Registry"]

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
    "killed": "`close_connection()` or an operator closed it, or `handler_timeout`, which is its `detail` then",
    "drained": "it left when the server drained",
    "drain_deadline": "it was cut when the drain's time was over",
    "shed": "it was the longest idle when room was needed, or harken held most for it when memory was",
    "shutdown": "the server stopped at once; in `/metrics` also: the worker that served it was killed",
}

# Seconds for which a connection counts as busy after it was accepted, unless its first byte comes sooner.
YOUNG_SECONDS = 1.0

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


@in_child
def _reseed() -> None:
    _firsts.append(next(_count))
    _prefixes.append(os.urandom(3).hex())


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
    """The request object was dropped, unclosed."""
    reference.record.ended()


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
    def begun(self) -> bool:
        """Whether its handler, or a preamble before that, has begun."""
        return bool(self.thread or self.in_preamble or self.process)

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
        if self.moved is not None:
            return self.moved  # when both sides have ended the kernel tells no more that it counts a FIN as a byte
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
        accepted: Any = self._request()
        if hasattr(type(accepted), "record"):  # the type is asked: gevent's socket, closed, answers by an error
            accepted.record = None
        tells = hasattr(type(request), "record")
        key = self._number if tells else -id(request)
        if key != self.key:
            self._registry.rename(self, key)
        self._request = _refer(self, request)
        if tells:
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
        return idle_seconds(self.request)

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


class Lane(Protocol):
    """What lets connections in by itself, as far as records go."""

    closed: bool

    def __len__(self) -> int: ...

    def connections(self) -> list[Any]:
        """Return the open ones that have no record."""

    def collect(self) -> object:
        """Tell the books what was counted since."""


class Registry:
    """The open connections of one server. Safe from every thread and from signal handlers: single dict operations.

    Attributes:
        careful: whether a connection is closed only after what its client sent was read off, since the server drains.
        counts_bytes: whether somebody wants to know of each connection that ends what has moved on it.
        buffers: who is told what harken holds for connections, if that is bounded.
        waiting: how many wait for connections to end.
        filed: the records.
        lanes: those whose connections get a record when it is first read; see ``Lane`` in :mod:`harken._hub`.
    """

    # In slots, where compiled code finds them.
    __slots__ = (
        "_changed",
        "_on_close",
        "buffers",
        "careful",
        "counts_bytes",
        "describe",
        "end_child",
        "filed",
        "lanes",
        "waiting",
    )

    buffers: Buffers | None

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
        self.filed: dict[int, Record] = {}
        self.lanes: list[Lane] = []
        self._changed = threading.Condition()
        self.careful = False
        self.counts_bytes = False
        self.waiting = 0
        self.buffers = None

    def __len__(self) -> int:
        return len(self.filed) + sum(map(len, self.lanes))

    def __iter__(self) -> Iterator[Record]:
        for lane in self.lanes:
            for connection in lane.connections():
                getattr(connection, "record", None)  # makes it
        return iter([*self.filed.values()])

    def use(self, lane: Lane) -> None:
        """Connections of ``lane`` are ours too; those of lanes that are closed and empty are forgotten."""
        if lane not in self.lanes:
            for known in self.lanes:
                known.collect()
            self.lanes = [other for other in self.lanes if len(other) or not other.closed]
            self.lanes.append(lane)

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
        self.filed[record.key] = record
        return record

    def begin(self, request: Connection, client_address: Any, now: float) -> Record:
        """Begin the record of a :class:`Connection`; as ``add``, without its calls."""
        number = next(_count)
        record = request.record = self.filed[number] = self._make(request, client_address, number, now)
        return record

    def remember(self, request: Connection, client_address: Any, started: float) -> Record:
        """Return a record for a connection that is open and has none yet; who wants it files it by its ``key``."""
        record = self._make(request, client_address, next(_count), started)
        record.opened = True
        return record

    def _make(self, request: Connection, client_address: Any, number: int, started: float) -> Record:
        record = _new(Record)
        record._number = record.key = number
        record.client_address = client_address
        record.started = started
        record.reason = None
        record.opened = False
        record.thread = 0
        record._registry = self
        handle = getattr(request, "handle", None)
        record._request = _refer(record, request) if handle is None else handle()
        return record

    def find(self, request: object) -> Record | None:
        """Return the record of ``request``, if it is open."""
        if hasattr(type(request), "record"):
            return getattr(request, "record", None)
        record = self.filed.get(-id(request))
        return record if record is not None and record.request is request else None

    def holds(self, record: Record) -> bool:
        """Tell whether ``record`` is open."""
        return self.filed.get(record.key) is record

    def by_id(self, connection_id: str) -> Record | None:
        """Return the open record of this id."""
        return next((record for record in self if record.id == connection_id), None)

    def rename(self, record: Record, key: int) -> None:
        """File an open record under another key."""
        if self.holds(record):
            self.filed[key] = record
            del self.filed[record.key]
            record.key = key

    def strike(self, record: Record) -> None:
        """Forget an ended record and tell ``on_close``, once."""
        records, key = self.filed, record.key
        if records.get(key) is not record or records.pop(key, None) is not record:
            return
        self._on_close(record)
        if self.buffers is not None:
            self.buffers.forget(record)
        record._request = _gone  # or its callback would run for nothing when the request object goes
        if self.waiting:
            self.nudge()

    def hand_over(self, record: Record | None, pid: int) -> None:
        """Child ``pid`` serves this connection from now on; the caller closes its own copy."""
        if record is None or self.filed.pop(record.key, None) is not record:
            return
        request = record.request
        if isinstance(request, Connection):
            request.record = None
        record.process = pid
        record.key = record._number  # the request object goes, and another may get its id()
        # No callback is to run when it goes: Ctrl-C raises in whatever Python code runs next, and a callback's is lost.
        record._request = _gone
        self.filed[record.key] = record

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
            self.waiting += 1
            try:
                return self._changed.wait_for(condition, timeout)
            finally:
                self.waiting -= 1

    def await_ends(self, change: int) -> None:
        """So many more wait for connections to end, or fewer, and are told otherwise than by :meth:`nudge`."""
        with self._changed:
            self.waiting += change

    def nudge(self) -> None:
        """Let those who wait ask their condition."""
        with self._changed:
            self._changed.notify_all()
