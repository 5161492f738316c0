"""The books of a server: the connections that are open, what became of the others, and the events that tell of it.

The running side (``serving.py``) and the hooks (``server.py``) say here what happens to a connection, step by step.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any

from harken import events
from harken.connection import Connection, peer_fault
from harken.meter import Meter
from harken.peer import behind
from harken.records import Record, Registry
from harken.transports import for_socket

__all__ = ["Books"]

# What the kernel says of a peer that answers no more, neither to data nor to keepalives: the last thing that it heard
# from the network, which is no ConnectionError. Of who it speaks is asked of the connection: see peer_fault().
_VANISHED = [
    getattr(errno, name)
    for name in ("ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "EHOSTDOWN", "ENONET")
    if hasattr(errno, name)
]


class Counts(dict[str, int]):
    """Numbers by name; what was never counted is 0. A Counter's ``+=`` costs five times as much."""

    def __missing__(self, name: str) -> int:
        return 0


def _leaves(error: BaseException) -> bool:
    """Tell whether a handler wished to end, or was ended with its hub, rather than failed."""
    # By its name: greenlet is not loaded where nobody has green threads.
    return isinstance(error, (SystemExit, KeyboardInterrupt)) or type(error).__name__ == "GreenletExit"


class Books:
    """What one server has on record.

    Attributes:
        connections: those that are open.
        counts: what happened how often, by the event's name.
        reasons: closed connections by reason.
        refusals: connections refused before their handler, by reason.
        on_open: told of each connection that goes to its handler or its preambles, if anybody must know.
        meter: measures what is not counted; None unless somebody asks for metrics.
        interrupted: whether Ctrl-C shut the connections, and may have closed them under their handlers.
    """

    def __init__(self, server: Any, end_child: Callable[[int], None]) -> None:
        """Begin with nothing on record.

        Args:
            server: named in events.
            end_child: ends the child process that serves a connection.
        """
        self.connections = Registry(self.describe, self._closed, end_child)
        self._counts = Counts()
        self._reasons = Counts()
        self.refusals = Counts()
        self.interrupted = False
        self.meter: Meter | None = None
        self.on_open: Callable[[Record], None] | None = None
        self._server = server

    @property
    def counts(self) -> Counts:
        """What happened how often."""
        self._collect()
        return self._counts

    @property
    def reasons(self) -> Counts:
        """Closed connections by reason."""
        self._collect()
        return self._reasons

    def _collect(self) -> None:
        for lane in self.connections.lanes:
            lane.collect()

    def measure(self) -> None:
        """Begin to measure."""
        if self.meter is None:
            self.meter = Meter()
            self.connections.counts_bytes = True

    def accepted(self, request: Any, client_address: Any) -> Record | None:
        """A connection was taken from the kernel: begin its record."""
        self._counts["accepted"] += 1
        if self.meter is not None:
            self.meter.accepted(request)
        record = self.connections.add(request, client_address)
        if events.subscribers["accepted"]:
            self._tell("accepted", record, client_address)
        return record

    def let_in(
        self, taken: list[tuple[Connection, Any]], admit: Callable[[Record, Any, Any], bool] | None
    ) -> list[tuple[Connection, Any]]:
        """Connections of the engine's own kind were taken from the kernel; return those that go to their handlers.

        Args:
            taken: the connections, and their clients' addresses.
            admit: tells of each whether it may come in, and closes it if not; None lets all in.
        """
        self._counts["accepted"] += len(taken)
        if self.meter is not None and taken:
            self.meter.accepted(taken[0][0], len(taken))
        begin, on_open, wanted, now = self.connections.begin, self.on_open, events.subscribers, time.monotonic()
        admitted = []
        for request, client_address in taken:
            record = begin(request, client_address, now)
            if wanted["accepted"]:
                self._tell("accepted", record, client_address)
            if admit is not None and not admit(record, request, client_address):
                continue
            record.opened = True
            if on_open is not None:
                on_open(record)
            if wanted["opened"]:
                self._tell("opened", record, client_address)
            admitted.append((request, client_address))
        self._counts["opened"] += len(admitted)
        return admitted

    def close(self, request: Any) -> None:
        """A connection's handler is done: settle why it ends, close it, strike it off.

        Args:
            request: a :class:`Connection`, or what else tells by ``record`` and closes by ``end()``.
        """
        record = getattr(request, "record", None)
        if record is None:  # the handler has closed it
            request.end()
            return
        if record.successor is not None or record.reason is not None or self.connections.careful:  # there is more to do
            self._server.shutdown_request(request)
            return
        record.judge(request)
        if request.end():
            request.record = None
            self.connections.strike(record)

    def opened(self, record: Record | None, client_address: Any) -> None:
        """A connection goes to its handler."""
        if record is not None:
            self._counts["opened"] += 1
            record.opened = True
            if self.on_open is not None and not record.held:
                self.on_open(record)
            record.held = False
        if events.subscribers["opened"]:
            self._tell("opened", record, client_address)

    def held(self, record: Record | None) -> None:
        """A connection goes to its preambles: ``opened`` is said when they know whose it is, or when it ends."""
        if record is not None:
            record.opened = record.held = True
            if self.on_open is not None:
                self.on_open(record)

    def moved(self, request: Any, adopted: Any) -> None:
        """The engine made another object of a connection, for its handlers."""
        record = self.connections.find(request)
        if record is not None:
            record.move(adopted)

    def rejected(self, record: Record | None, client_address: Any, reason: str, detail: str | None = None) -> None:
        """A connection is refused before its handler, or a datagram dropped."""
        if record is not None and record.reason is None:
            record.reason = "rejected"
        if record is not None and record.silent:
            return  # the exit status tells our parent
        self._counts["rejected"] += 1
        self.refusals[reason] += 1
        if events.subscribers["rejected"]:
            self._tell("rejected", record, client_address, reason=reason, detail=detail)

    def preamble_failed(self, record: Record) -> None:
        """The PROXY header or the TLS handshake of a connection failed; its ``detail`` says how."""
        if record.silent:
            return  # the exit status tells our parent
        self._counts["preamble_failed"] += 1
        if events.subscribers["preamble_failed"]:
            self._tell("preamble_failed", record, record.client_address, reason=record.detail)

    def failed(self, request: Any, client_address: Any, error: BaseException) -> None:
        """A handler raised; called before ``handle_error``, to which what is no Exception does not go."""
        if _leaves(error):
            return
        record = self.connections.find(request)
        if record is not None:
            record.failed = True
        if self.excused(request, error):
            if record is not None and record.reason is None:
                record.reason = "peer_reset"  # the kernel tells it once, and the handler was told
            return
        self._counts["handler_failed"] += 1
        if events.subscribers["handler_failed"]:
            self._tell("handler_failed", record, client_address, error=error)

    def failed_elsewhere(self, times: int) -> None:
        """A handler raised so often in a child, which has told of it."""
        self._counts["handler_failed"] += times

    def alarm(self, open_now: int) -> None:
        """``alarm_connections`` are open."""
        events.emit("alarm", server=self._server, open=open_now)

    def memory(self, name: str, held: int, limit: int | None) -> None:
        """What harken holds for connections has exceeded ``max_memory_bytes``, or does so no more."""
        self._counts[name] += 1
        events.emit(name, server=self._server, held=held, limit=limit)

    def timed_out(self, record: Record | None, client_address: Any, which: str, seconds: float) -> None:
        """A deadline is over: the setting ``which``, after ``seconds``."""
        if record is not None and record.silent:
            return  # the exit status tells our parent
        self._counts["timed_out"] += 1
        if events.subscribers["timed_out"]:
            self._tell("timed_out", record, client_address, which=which, seconds=seconds)

    def hook_failed(self, record: Record, error: BaseException) -> bool:
        """A hook that is called beside a handler raised; tell whether that is anybody's fault."""
        if self.excused(record.request, error):
            return False
        self._counts["handler_failed"] += 1
        if events.subscribers["handler_failed"]:
            self._tell("handler_failed", record, record.client_address, error=error)
        return True

    def truncated(self, client_address: Any, size: int) -> None:
        """A datagram was longer than ``size`` bytes, and its end is lost."""
        self._counts["truncated"] += 1
        if events.subscribers["truncated"]:
            self._tell("truncated", None, client_address, bytes=size)

    def excused(self, request: Any, error: BaseException | None) -> bool:
        """Tell whether a handler raised only because its connection has gone: its peer left, or harken cut it."""
        if self.interrupted and isinstance(error, OSError):
            return True  # Ctrl-C shut it, and may have closed it under the handler
        if not isinstance(error, OSError):
            return False
        record = self.connections.find(request)
        wire = (record.successor if record is not None else None) or request
        if isinstance(error, ConnectionError) or error.errno in _VANISHED:
            return (record is not None and record.reason is not None) or peer_fault(wire) is not None
        own_fault = getattr(type(wire), "broken_by", None)
        return own_fault is not None and bool(own_fault(wire, error))

    def ended(self, request: Any) -> None:
        """A request object that cannot tell by itself (it has no ``record``) was closed."""
        record = self.connections.find(request)
        if record is not None:
            record.ended()

    def describe(self, request: Any, client_address: Any) -> Any:
        """Return the :class:`harken.Peer` of a connection, or of a datagram."""
        carrier = request if hasattr(request, "family") else self._server.socket
        peer = for_socket(carrier).describe(request, client_address)
        header = getattr(client_address, "proxy", None)  # of a datagram that came by a proxy
        return peer if header is None else behind(peer, header)

    def _tell(self, name: str, record: Record | None, client_address: Any, **fields: Any) -> None:
        peer = record.peer if record is not None else self.describe(None, client_address)
        events.emit(name, server=self._server, connection=record.id if record else None, peer=peer, **fields)

    def _closed(self, record: Record) -> None:
        if record.ticket is not None and (ticket := vars(record).pop("ticket", None)) is not None:
            ticket.give_back()
        if not record.opened or record.silent:
            return
        if record.held:
            self.opened(record, record.client_address)
        reason = record.reason or "handler_returned"
        self._reasons[reason] += 1
        if self.meter is not None and record.moved is not None:
            self.meter.moved(record.moved)
        if events.subscribers["closed"]:
            self._tell(
                "closed",
                record,
                record.client_address,
                reason=reason,
                detail=record.detail,
                bytes_in=record.moved[0] if record.moved is not None else None,
                bytes_out=record.moved[1] if record.moved is not None else None,
                requests=record.requests,
                seconds=time.monotonic() - record.started,
            )
