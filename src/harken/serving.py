"""The running side of a server: what harken keeps for it beside stdlib's attributes, and the verbs that use it.

It is made when first needed and held in the server's ``__dict__``: programs skip ``__init__``, call
``BaseServer.__init__`` alone, or put harken's mix-ins in front of stdlib's own servers.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any, overload

from harken import events, plugins
from harken.acceptor import Acceptor, Readable, refuse
from harken.connection import CHILD_STATUS, REASONS, ConnectionInfo, Record, Registry, backlog_length, peer_fault
from harken.engines import ENGINE, Engine
from harken.errors import LifecycleError
from harken.lifecycle import Latch, Lifecycle, State, at_exit
from harken.settings import Profile, Settings, seconds, setting
from harken.transports import for_socket

__all__ = ["DrainReport", "RunningSide", "Serving", "background", "serving_of"]

DRAIN_TIMEOUT = setting(
    "drain_timeout",
    seconds(),
    0.0,
    serve=30.0,
    unit="seconds",
    live=True,
    meaning="how long a drain waits for connections before it cuts what is left",
    origin="gunicorn's graceful_timeout; the drop-in classes have no drain of their own",
)

# Seconds that a cut handler gets to notice that its socket is shut: it wakes within milliseconds.
CUT_GRACE = 1.0
# Seconds that a drain gives the loop to leave its poll(): it takes one turn.
LEAVE_SECONDS = 0.2

# A name that programs do not have, found by ordinary attribute access on the hot path.
_KEY = "_harken"


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How a drain went.

    Attributes:
        finished: connections that ended by themselves in time.
        left: handlers that still run although their connection was cut.
        cut: connections that were closed at the deadline.
        seconds: how long it took.
        connections: those that were cut.
    """

    finished: int
    left: int
    cut: int
    seconds: float
    connections: list[ConnectionInfo]

    def __str__(self) -> str:
        return f"{self.finished} finished, {self.cut} cut, {self.left} handlers left, {self.seconds:.2f} s"


@dataclass(frozen=True, slots=True)
class _Drain:
    """A drain under way: since when (``time.monotonic()``), and how many connections were open then."""

    since: float
    open: int


class Serving:
    """State and verbs of one server; the server's own methods of these names call them here.

    All verbs may be called from any thread, from a handler and from a signal handler.
    """

    def __init__(
        self,
        server: Any,
        keywords: Mapping[str, Any] | None = None,
        profile: Profile = "drop-in",
        engine: Engine | None = None,
    ) -> None:
        self.server = server
        self.settings = Settings(server, keywords, profile)
        self.lifecycle = Lifecycle()
        self.ready = Latch()
        self.left = Latch(owned=True)
        self.left.set()
        self.connections = Registry(self.describe, self._closed, self._end_child)
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.acceptor = Acceptor(
            listener=lambda: getattr(server, "socket", None),
            pause=lambda: self.engine.unwatch(server),
            resume=self._watch,
            address=self.address,
        )
        self.interrupted = False
        self.abandoned = False
        self.hurried: list[ConnectionInfo] = []
        self.on_child: Callable[[], None] = lambda: None
        """Called in a child of the fork engine before its handler."""
        self.loops: set[int] = set()
        self.shared = False
        """Whether several threads run loops of this server."""
        if engine is not None:
            self.engine = engine
        self._readable = Readable()
        self._packet_size = (-1, 0)
        self._guard = threading.RLock()
        self._accept_lock = threading.Lock()
        self._loop_count = 0

    # -- what engines and handlers ask ---------------------------------------------------------------------------------

    @cached_property
    def engine(self) -> Engine:
        """The engine, made when first needed."""
        with self._guard:
            made = vars(self).get("engine")
            return made or plugins.find("engines", self.engine_name, "Engine")(self.option)  # type: ignore[no-any-return]

    @property
    def started(self) -> bool:
        """Whether an engine was needed yet."""
        return "engine" in vars(self)

    @property
    def engine_name(self) -> str:
        """The engine's name: as asked, or ``inline``.

        The environment moves only servers that were concurrent already: a plain server's handler may rely on being
        alone.
        """
        movable = self.settings.profile == "serve" or getattr(self.server, "_engine_from_environment", False)
        asked = self.settings.find("engine", environment=movable).value
        return asked or ENGINE.fallback(self.settings.profile) or "inline"

    def option(self, name: str) -> Any:
        """Answer an engine: a setting, an attribute of stdlib's, or the selector class of the module."""
        if name == "selector":
            return sys.modules["harken"]._ServerSelector
        if name in ("daemon_threads", "block_on_close"):
            return getattr(self.server, name, name == "block_on_close")
        return self.settings[name]

    def packet_size(self, attribute: int) -> int:
        """Return ``max_packet_size``; looked up anew when the server's attribute has changed, not for each datagram."""
        if self._packet_size[0] != attribute:
            self._packet_size = (attribute, self.settings["max_packet_size"])
        return self._packet_size[1]

    def address(self) -> str:
        """Name the listener as one would type it."""
        listener: Any = getattr(self.server, "socket", None)
        url = getattr(listener, "url", None)
        if url:
            return str(url)
        try:
            return for_socket(listener).url(listener)
        except (OSError, AttributeError, ValueError):
            return str(getattr(self.server, "server_address", "?"))

    @property
    def logged(self) -> bool:
        """Whether a log writes what handlers raise, so that ``handle_error`` need not print it."""
        return events.logged

    @property
    def draining(self) -> bool:
        """Whether a drain is under way."""
        return self.lifecycle.state is State.DRAINING

    # -- the loop ------------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the server's door while the block runs; several loops may."""
        if self.server.fileno() < 0:
            raise LifecycleError(
                "cannot serve: the server's socket is closed; make a new server or give it another socket"
            )
        engine = self.engine  # may raise: before anything has changed
        with self._guard:
            self.lifecycle.move("serve")
            self._loop_count += 1
            self.shared = self._loop_count > 1
            self.loops.add(threading.get_ident())
            self.left.clear()
            if self._loop_count == 1:
                self.interrupted = False
                self.acceptor.open()
                self._watch()
                events.emit("listening", address=self.address(), engine=self.engine_name, server=self.server)
        self.ready.set()
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.interrupted = True
            _interrupted.add(self)
            raise
        finally:
            with self._guard:
                self._loop_count -= 1
                self.shared = self._loop_count > 1
                self.loops.discard(threading.get_ident())
                if self._loop_count == 0:
                    engine.unwatch(self.server)
                    self.acceptor.close()
                    self.ready.clear()
                    self.lifecycle.move("stop")
                    self.left.set()

    def run(self, stopped: Callable[[], bool], interval: float) -> None:
        """Serve until ``stopped``, turning at least every ``interval`` seconds."""
        with self.attached():
            self.engine.run(stopped, self.tick, lambda: self.acceptor.patience(interval))

    @property
    def in_loop(self) -> bool:
        """Whether the calling thread runs a loop of this server, and so must not wait for its end."""
        return threading.get_ident() in self.loops or (self.started and self.engine.in_loop_thread)

    @property
    def last_loop(self) -> bool:
        """Whether no other thread runs a loop of this server."""
        return self._loop_count == 0

    def foreign_loop(self) -> bool:
        """Tell whether a loop that is not harken's serves: on a grafted class, stdlib's, called by way of ``super()``.

        Its Event cannot tell, being unset before the first loop as well; so the threads' stacks are asked.
        """
        for frame in sys._current_frames().values():
            caller: FrameType | None = frame
            while caller is not None:
                if caller.f_code.co_name == "serve_forever" and caller.f_locals.get("self") is self.server:
                    return not _on_stack(caller)
                caller = caller.f_back
        return False

    def tick(self) -> None:
        """One turn: stdlib's hook, children and threads that have ended, pauses that are over."""
        self.server.service_actions()
        if self.engine.in_child:
            self.engine.collect()
        if self.acceptor.paused and self._loop_count:
            self.acceptor.turn(room=not self.engine.full)

    def wake(self) -> None:
        """Make the loop take a turn at once, if one runs."""
        if self.started:
            self.engine.wake()

    def _watch(self) -> None:
        """Watch the door, unless the server is suspended: room in the pool does not end a suspension."""
        if self.lifecycle.state is State.SERVING:
            self.engine.watch(self.server, self._accept_ready)

    def _accept_ready(self) -> bool:
        """Take one connection of the readable door through the hooks; tell whether there is another.

        Only our own ``get_request`` is called twice in a turn: an overridden one may do anything in between. The
        listener is asked by poll() and not made non-blocking, since its flags belong to all processes that share it.

        Raises:
            OSError: the door is no listener any more.
        """
        engine, server = self.engine, self.server
        if engine.full and not self._make_room():
            return False
        taken = server._handle_request_noblock()
        if self.acceptor.troubled:
            self.acceptor.settle(taken=bool(taken))
        if taken is not True or not getattr(server.get_request, "bursts", False):
            return False
        return not engine.full and not self.shared and self._readable(server.fileno())

    def _make_room(self) -> bool:
        """The engine is full: do as ``overload`` says. True when a connection may be accepted all the same."""
        policy = self.settings["overload"]
        if policy in ("reset", "reply"):
            self._turn_away(policy)
        else:
            if policy == "shed":
                self._shed()
            self.acceptor.hold("no handler is free: pool or max_children in use")
        return False

    def _turn_away(self, policy: str) -> None:
        try:
            request, client_address = self.server.get_request()
        except OSError as error:
            self.acceptor.failed(error)
            return
        reply = self.settings["overload_reply"] if policy == "reply" else b""
        refuse(request, reply.encode() if isinstance(reply, str) else reply)
        self.rejected(None, client_address, "overload")

    def _shed(self) -> None:
        idle = [
            (record.idle_seconds() or 0.0, -record.started, record) for record in self.connections if not record.reason
        ]
        if idle:
            max(idle, key=lambda entry: entry[:2])[2].cut("shed")

    # -- one connection ------------------------------------------------------------------------------------------------

    def take_turns(self, get: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Call ``get`` as the only one of several loops, and only while a connection is there.

        Raises:
            BlockingIOError: another loop was quicker.
        """
        with self._accept_lock:
            if not self._readable(self.server.fileno()):
                raise BlockingIOError("another thread took the connection")
            return get()

    def accepted(self, request: Any, client_address: Any) -> Record | None:
        """A connection was taken from the kernel: begin its record."""
        self.counts["accepted"] += 1
        record = self.connections.add(request, client_address)
        if events.subscribers["accepted"]:
            self._tell("accepted", record, client_address)
        return record

    def opened(self, record: Record | None, client_address: Any) -> None:
        """A connection goes to its handler."""
        if record is not None:
            record.opened = True
        if events.subscribers["opened"]:
            self._tell("opened", record, client_address)

    def moved(self, request: Any, adopted: Any) -> None:
        """The engine made another object of a connection, for its handlers."""
        record = self.connections.find(request)
        if record is not None:
            record.move(adopted)

    def rejected(self, record: Record | None, client_address: Any, reason: str) -> None:
        """A connection is refused before its handler."""
        self.counts["rejected"] += 1
        if record is not None and record.reason is None:
            record.reason = "rejected"
        if events.subscribers["rejected"]:
            self._tell("rejected", record, client_address, reason=reason)

    def failed(self, request: Any, client_address: Any, error: BaseException) -> None:
        """A handler raised; called before ``handle_error``."""
        record = self.connections.find(request)
        if record is not None:
            record.failed = True
        if self.excused(request, error):
            if record is not None and record.reason is None:
                record.reason = "peer_reset"  # the kernel tells it once, and the handler was told
            return
        self.counts["handler_failed"] += 1
        if events.subscribers["handler_failed"]:
            self._tell("handler_failed", record, client_address, error=error)

    def truncated(self, client_address: Any, size: int) -> None:
        """A datagram was longer than ``size`` bytes, and its end is lost."""
        self.counts["truncated"] += 1
        if events.subscribers["truncated"]:
            self._tell("truncated", None, client_address, bytes=size)

    def excused(self, request: Any, error: BaseException | None) -> bool:
        """Tell whether a handler raised only because its connection has gone: its peer left, or harken cut it."""
        if self.interrupted and isinstance(error, OSError):
            return True  # Ctrl-C shut it, and may have closed it under the handler
        if not isinstance(error, ConnectionError):
            return False
        record = self.connections.find(request)
        return (record is not None and record.reason is not None) or peer_fault(request) is not None

    def ended(self, request: Any) -> None:
        """A request object that cannot tell by itself (it is no :class:`Connection`) was closed."""
        record = self.connections.find(request)
        if record is not None:
            record.ended()

    def hand_to_child(self, function: Callable[..., object], request: Any, client_address: Any) -> None:
        """Run ``function(request, client_address)`` in a child; its record lasts until the child exits."""
        record = self.connections.find(request)

        def done(status: int) -> None:
            self.connections.child_ended(record, status)

        pid = self.engine.spawn(self._in_child, function, request, client_address, done=done)
        self.connections.hand_over(record, pid)

    def _in_child(self, function: Callable[..., object], request: Any, client_address: Any) -> int:
        """The child's part: the listener is the parent's alone, and so are the books."""
        self.on_child()
        record = self.connections.find(request)
        if record is not None:
            record.silent = True
        if not isinstance(request, tuple) and hasattr(self.server, "socket"):
            self.server.socket.close()
        function(request, client_address)
        return CHILD_STATUS.get((record and record.reason) or "handler_returned", 0)

    def describe(self, request: Any, client_address: Any) -> Any:
        """Return the :class:`harken.Peer` of a connection, or of a datagram."""
        return for_socket(request if hasattr(request, "family") else self.server.socket).describe(
            request, client_address
        )

    def _tell(self, name: str, record: Record | None, client_address: Any, **fields: Any) -> None:
        peer = record.peer if record is not None else self.describe(None, client_address)
        events.emit(name, server=self.server, connection=record.id if record else None, peer=peer, **fields)

    def _closed(self, record: Record) -> None:
        if not record.opened or record.silent:
            return
        reason = record.reason or "handler_returned"
        self.reasons[reason] += 1
        if events.subscribers["closed"]:
            self._tell(
                "closed",
                record,
                record.client_address,
                reason=reason,
                detail=record.detail,
                seconds=time.monotonic() - record.started,
            )

    def _end_child(self, pid: int) -> None:
        end = getattr(self.engine, "end_child", None)
        if end is not None:
            end(pid)

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Wait for handlers as ``server_close()`` does.

        Without end if ``block_on_close``, but not for daemon threads; after Ctrl-C they are cut first.
        """
        if not self.started:
            return
        if self.interrupted:
            self.cut("shutdown")
        block = self.option("block_on_close") and not self.option("daemon_threads") and not self.abandoned
        self.engine.join(None if block else time.monotonic())

    def cut(self, reason: str, besides: list[Record] | None = None) -> list[Record]:
        """Shut the sockets of all open connections, so that their handlers wake; return the records not cut before."""
        records = [record for record in self.connections if record.reason is None and record not in (besides or ())]
        for record in records:
            record.cut(reason)
        if self.started:
            self.engine.terminate()
        return records

    def drain(self, timeout: float | None, stop: Callable[[], None]) -> DrainReport:
        """Stop accepting, wait for connections, cut what is left.

        Args:
            timeout: seconds to wait; None takes the setting ``drain_timeout``.
            stop: asks the loop to end, without waiting for it.
        """
        timeout = self.settings["drain_timeout"] if timeout is None else timeout
        return self.engine.aside(self._drain, timeout, stop)  # type: ignore[no-any-return]

    def _drain(self, timeout: float, stop: Callable[[], None]) -> DrainReport:
        began = self.begin_drain(timeout, stop)
        return self.end_drain(began, began.since + timeout)

    def begin_drain(self, timeout: float, stop: Callable[[], None]) -> _Drain:
        """Stop accepting and close the listener."""
        began = _Drain(time.monotonic(), len(self.connections))
        self.lifecycle.move("drain")
        events.emit("draining", server=self.server, open=began.open, timeout=timeout)
        stop()
        self.wake()
        # Its poll() would hold the listener's port; a loop that is inside a handler holds nothing, and may stay there.
        self.left.wait(LEAVE_SECONDS)
        self._serve_backlog(began.since + timeout)
        listener = getattr(self.server, "socket", None)
        if listener is not None:
            listener.close()
        return began

    def _serve_backlog(self, deadline: float) -> None:
        """Take what has reached the backlog, which closing would reset; inline there is no place to serve it."""
        if not self.started or self.engine.in_loop or not getattr(self.server.get_request, "bursts", False):
            return
        for _ in range(backlog_length(getattr(self.server, "socket", None))):
            if self.engine.full or time.monotonic() >= deadline or not self._readable(self.server.fileno()):
                return
            self.server._handle_request_noblock()

    def end_drain(self, began: _Drain, deadline: float) -> DrainReport:
        """Wait for connections until ``deadline`` (``time.monotonic()``), then cut what is left."""
        if self.started and self.engine.in_child:
            self.engine.join(deadline)  # nobody else reaps now, and a connection lasts until its child is reaped
        own = self._own()
        self.connections.wait_empty(max(0.0, deadline - time.monotonic()), besides=len(own))
        cut = [record.info() for record in self.cut("drain_deadline", besides=own)]
        left = self.engine.join(time.monotonic() + CUT_GRACE) if self.started else 0
        left += not self.left.wait(CUT_GRACE) and not self.in_loop
        self.abandoned = left > 0
        cut += self.hurried
        report = DrainReport(
            max(0, began.open - len(cut) - len(own)), left, len(cut), time.monotonic() - began.since, cut
        )
        events.emit("drained", server=self.server, report=report)
        return report

    def _own(self) -> list[Record]:
        """The connections whose handler is the caller: a verb that a handler calls does not wait for that handler."""
        here = threading.get_ident()
        return [record for record in self.connections if record.thread == here]

    def hurry(self, reason: str) -> None:
        """Cut what is open now, before a drain's time is over; its report will count them. Any thread."""
        # Noted before their handlers wake, and with them whoever reports the drain.
        self.hurried += [record.info() for record in self.connections if record.reason is None]
        self.cut(reason)

    def suspend(self) -> None:
        """Leave new connections in the backlog; open ones go on.

        Raises:
            LifecycleError: the server does not serve.
        """
        with self._guard:
            self.lifecycle.move("suspend")
            self.engine.unwatch(self.server)

    def resume(self) -> None:
        """Accept again.

        Raises:
            LifecycleError: the server is not suspended.
        """
        with self._guard:
            self.lifecycle.move("resume")
            self._watch()

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change live settings.

        Raises:
            ConfigError: a setting is unknown, not live, or its value is not allowed; nothing was changed.
        """
        self.settings.configure(changes)
        if self.started:
            self.engine.refresh()

    def close_connection(self, connection_id: str, reason: str) -> bool:
        """Cut one connection; tell whether it was open."""
        record = self.connections.by_id(connection_id)
        if record is None:
            return False
        record.detail = None if reason in REASONS else reason
        record.cut(reason if reason in REASONS else "killed")
        return True

    def stats(self) -> dict[str, Any]:
        """Figures since the start; see ``BaseServer.stats``."""
        return {
            "state": self.lifecycle.state.value,
            "address": self.address(),
            "engine": self.engine_name,
            "open": len(self.connections),
            "accepted_total": self.counts["accepted"],
            "rejected_total": self.counts["rejected"],
            "handler_failed_total": self.counts["handler_failed"],
            "closed_total": dict(self.reasons),
            "paused": self.acceptor.paused,
            "process": os.getpid(),
        }


def _on_stack(wanted: FrameType) -> bool:
    """Whether ``wanted`` is a caller of ours: a thread cannot wait for its own loop."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


def serving_of(
    server: Any, keywords: Mapping[str, Any] | None = None, profile: Profile = "drop-in", engine: Engine | None = None
) -> Serving:
    """Return the running side of ``server``, making it when there is none yet."""
    held = vars(server).get(_KEY)
    if held is None:
        held = vars(server).setdefault(_KEY, Serving(server, keywords, profile, engine))
    return held  # type: ignore[no-any-return]


class RunningSide:
    """The attribute ``_harken`` of a server: made at the first reading, then found in the instance at no cost."""

    @overload
    def __get__(self, server: None, owner: type) -> RunningSide: ...
    @overload
    def __get__(self, server: object, owner: type) -> Serving: ...
    def __get__(self, server: object | None, owner: type) -> Serving | RunningSide:
        return self if server is None else serving_of(server)


_interrupted: weakref.WeakSet[Serving] = weakref.WeakSet()


@at_exit
def _end_interrupted() -> None:
    """Ctrl-C means now: the interpreter must not wait for handlers whose clients are silent."""
    for serving in list(_interrupted):
        serving.cut("shutdown")


@contextmanager
def background(server: Any, *, timeout: float = 10.0) -> Iterator[Any]:
    """Serve in a thread while the block runs: ready when entered, drained and closed when left.

    Args:
        server: any server of harken's.
        timeout: seconds to wait for it to be ready.

    Raises:
        LifecycleError: it was not ready in time.
        Exception: whatever ``serve_forever`` raised before it was ready.
    """
    serving = serving_of(server)
    failure: list[BaseException] = []

    def serve() -> None:
        try:
            server.serve_forever()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failure.append(error)
            serving.ready.set()

    thread = threading.Thread(target=serve, name="harken-background", daemon=True)
    thread.start()
    if not serving.ready.wait(timeout):
        raise LifecycleError(f"the server was not ready within {timeout:g} s")
    if failure:
        raise failure[0]
    try:
        yield server
    finally:
        from harken.server import BaseServer

        BaseServer.drain(server)
        server.server_close()
        thread.join(timeout)
        if failure:
            raise failure[0]
