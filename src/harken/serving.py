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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from harken import events, plugins
from harken.acceptor import Acceptor
from harken.books import Books
from harken.bounds import Bounds
from harken.children import Children
from harken.closing import LEAVE_SECONDS
from harken.drain import Drain, DrainReport, drain
from harken.engines import ENGINE, Engine, load
from harken.entry import Entry, entry_of
from harken.errors import ConfigError, LifecycleError
from harken.forking import told_in_child
from harken.intake import Intake
from harken.interrupts import Interrupts
from harken.lifecycle import Latch, Lifecycle, State, at_exit
from harken.listener import Holding
from harken.records import REASONS, Record
from harken.settings import Profile, Settings
from harken.stacks import served_by_caller
from harken.transports import for_socket

if TYPE_CHECKING:
    from harken.preambles.proxy_datagrams import DatagramProxy

__all__ = ["DrainReport", "RunningSide", "Serving", "is_server", "serving_of"]

# A name that programs do not have, found by ordinary attribute access on the hot path.
_KEY = "_harken"

_A_DAY = 86400.0  # what None for a poll interval comes to: loops compute with it


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
        self.books = Books(server, self._end_child)
        self.connections = self.books.connections
        self.bounds = Bounds(self)
        self.intake = Intake(self)
        self.acceptor = Acceptor(
            listener=lambda: getattr(server, "socket", None),
            pause=lambda: self.engine.unwatch(server),
            resume=self.intake.watch,
            address=self.address,
        )
        self.abandoned = False
        self.under_way: Drain | None = None
        """The drain that is under way, or was the last."""
        self.door_stays: Callable[[], bool] = lambda: False
        """Tells whether others will take whom a drain of a suspended server leaves at its door."""
        self.holding: Holding | None = None
        """What is known of the socket that the server bound by itself."""
        self.on_child: Callable[[], None] = lambda: None
        """Called in a child of the fork engine before its handler."""
        self.loops: set[int] = set()
        self.offers_page = True
        """Whether it opens by itself the page that ``metrics`` names; a service does that for its servers."""
        self._leave_page: Callable[[], None] | None = None
        self.shared = False
        """Whether several threads run loops of this server."""
        if engine is not None:
            self.engine = engine
        self._packet_size = (-1, 0)
        self._address = ""  # as the socket told it when it was last open
        self.guard = threading.RLock()
        self._loop_count = 0
        _servings.add(self)

    # -- what engines and handlers ask ---------------------------------------------------------------------------------

    @cached_property
    def engine(self) -> Engine:
        """The engine, made when first needed."""
        with self.guard:
            made: Engine | None = vars(self).get("engine")
            if made is None:
                made = load(self.engine_name)(self.option)
                self._prepare(made)
            return made

    def _prepare(self, engine: Engine) -> None:
        engine.prepare(getattr(self.server, "RequestHandlerClass", None))

    @cached_property
    def children(self) -> Children:
        """Those in which an engine that forks serves connections, made when first needed."""
        with self.guard:
            made: Children | None = vars(self).get("children")
            if made is None:
                made = vars(self)["children"] = Children(self)
            return made

    @cached_property
    def entry(self) -> Entry | None:
        """What stands between acceptance and handler, made when first needed; None without preambles."""
        return entry_of(self)

    @cached_property
    def datagram_proxy(self) -> DatagramProxy | None:
        """What takes the PROXY header off datagrams; None when none is to be there.

        Raises:
            ConfigError: ``proxy_from`` is missing or wrong.
        """
        if self.settings["proxy"] == "off":
            return None
        from harken.preambles import proxy_datagrams

        return proxy_datagrams.make(self.settings)

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
        if name in ("daemon_threads", "block_on_close"):
            return getattr(self.server, name, name == "block_on_close")
        if name == "selector":
            return sys.modules["harken"]._ServerSelector
        return self.settings[name]

    def packet_size(self, attribute: int) -> int:
        """Return ``max_packet_size``; looked up anew when the server's attribute has changed, not for each datagram."""
        if self._packet_size[0] != attribute:
            self._packet_size = (attribute, self.settings["max_packet_size"])
        return self._packet_size[1]

    def address(self) -> str:
        """Name the listener as one would type it."""
        listener: Any = getattr(self.server, "socket", None)
        try:
            url = getattr(listener, "url", None)  # closed, gevent's socket answers by an OSError
            if url:
                return str(url)
            self._address = for_socket(listener).url(listener)
        except (OSError, AttributeError, ValueError):
            pass  # closed, or no socket yet
        return self._address or str(getattr(self.server, "server_address", "?"))

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
    def attached(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Watch the server's door while the block runs; several loops may.

        Args:
            stopped: whether the loop is to end before it began: then nobody is told that it serves.
        """
        if self.server.fileno() < 0:
            raise LifecycleError(
                "cannot serve: the server's socket is closed; make a new server or give it another socket"
            )
        engine, _ = self.engine, self.entry  # may raise: before anything has changed
        self._prepare(engine)
        self._check_fit()
        self._let_observers_in()
        with self.guard:
            self.lifecycle.move("serve")
            self._loop_count += 1
            self.shared = self._loop_count > 1
            self.loops.add(threading.get_ident())
            self.left.clear()
            if self._loop_count == 1:
                self.books.interrupted = False
                _interrupted.discard(self)
                self.acceptor.open()
                self.bounds.refresh()
                self.intake.watch()
                events.emit("listening", address=self.address(), engine=self.engine_name, server=self.server)
        if engine.shares_doors:
            self.intake.sharing.turn()
        if not stopped():
            self.ready.set()
        try:
            yield
        except KeyboardInterrupt:  # SystemExit, of a SIGTERM handler say, leaves handlers their time, as stdlib does
            self.books.interrupted = True
            _interrupted.add(self)
            raise
        finally:
            with self.guard:
                self._loop_count -= 1
                self.shared = self._loop_count > 1
                self.loops.discard(threading.get_ident())
                if self._loop_count == 0:
                    engine.unwatch(self.server)
                    self.acceptor.close()
                    self.ready.clear()
                    self.lifecycle.move("stop")
                    self.left.set()

    def _let_observers_in(self) -> None:
        """Make spans where OpenTelemetry is at work; measure, and show it, if the setting ``metrics`` asks for that."""
        if "opentelemetry.trace" in sys.modules and self.settings.profile != "private":
            plugins.find("observe", "spans", "attach")()
        if self.settings["metrics"] is None:
            return
        self.books.measure()
        if self.offers_page and self._leave_page is None:
            # By name, as plug-ins are: it stands above the servers.
            self._leave_page = plugins.find("process", "page", "offer")(self)

    def close(self) -> None:
        """The server is closed."""
        self.lifecycle.move("close")
        if self._leave_page is not None:
            leave, self._leave_page = self._leave_page, None
            leave()

    def _check_fit(self) -> None:
        if (
            self.engine.in_child
            and self.entry is not None
            and self.entry.tells_client
            and self.settings["max_connections_per_peer"] is not None
        ):
            raise ConfigError(
                "the fork engine learns the client behind a PROXY header in the child, where it cannot count for "
                "max_connections_per_peer; take another engine, or let the proxy limit its clients"
            )

    def after_fork(self) -> None:
        """In a child: the loops of other threads stayed in the parent. Whoever forked may run one, and goes on."""
        self.loops.intersection_update({threading.get_ident()})
        self._loop_count = len(self.loops)
        self.shared = False
        self.guard = threading.RLock()
        self.intake.after_fork()
        if self.loops:
            return
        self.acceptor.close()
        self.ready.clear()
        self.left.set()
        if self.lifecycle.state in (State.SERVING, State.SUSPENDED):
            self.lifecycle.move("stop")
        shut_down = vars(self.server).get("_BaseServer__is_shut_down")
        if isinstance(shut_down, Latch):
            shut_down.set()

    def run(self, stopped: Callable[[], bool], interval: float | None) -> None:
        """Serve until ``stopped``, turning at least every ``interval`` seconds, or with None when there is cause."""
        longest = _A_DAY if interval is None else interval
        with self.attached(stopped), Interrupts(self.wake) as interrupts:
            self.engine.run(interrupts.before(stopped), self.tick, lambda: self.acceptor.patience(longest))

    @property
    def in_loop(self) -> bool:
        """Whether the calling thread runs a loop of this server, and so must not wait for its end."""
        return threading.get_ident() in self.loops or (self.started and self.engine.in_loop_thread)

    @property
    def last_loop(self) -> bool:
        """Whether no other thread runs a loop of this server."""
        return self._loop_count == 0

    def tick(self) -> None:
        """One turn: stdlib's hook, children and threads that have ended, pauses that are over."""
        self.server.service_actions()
        if self.books.meter is not None:
            self.books.meter.turned()
        if self.engine.in_child:
            self.engine.collect()
        if self.acceptor.paused and self._loop_count:
            self.intake.turn()
        elif self.engine.shares_doors:
            self.intake.sharing.turn()

    def ask_turn(self) -> None:
        """Ask the loop for a turn, whose delay is measured; not while an earlier one is owed, or nobody serves."""
        meter = self.books.meter
        if meter is not None and not meter.asked and not self.last_loop:
            meter.asked = time.monotonic()
            self.wake()

    def overdue(self) -> float:
        """Seconds since the loop was asked for a turn that it has not taken; 0 when it is not, or may be busy."""
        meter = self.books.meter
        owed = meter.asked if meter is not None and not self.engine.in_loop else 0.0
        return time.monotonic() - owed if owed else 0.0

    def wake(self) -> None:
        """Make the loop take a turn at once, if one runs."""
        if self.started:
            self.engine.wake()

    def _end_child(self, pid: int) -> None:
        end = getattr(self.engine, "end_child", None)
        if end is not None:
            end(pid)

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Wait for handlers as ``server_close()`` does.

        Without end if ``block_on_close``, but not for daemon threads; after Ctrl-C they are cut first.
        """
        if self.started:
            self._join_handlers()
        if not self.connections:
            self.bounds.rest()

    def _join_handlers(self) -> None:
        if self in _interrupted:
            self.cut("shutdown")
        if "children" in vars(self):
            self.children.serve_on()
        block = self.option("block_on_close") and not self.option("daemon_threads") and not self.abandoned
        self.engine.join(None if block else time.monotonic())

    def cut(self, reason: str) -> None:
        """Shut the sockets of all open connections, so that their handlers wake."""
        for record in self.connections:
            record.cut(reason)
        if self.started:
            self.engine.terminate()

    def drain(self, timeout: float | None, stop: Callable[[], None]) -> DrainReport:
        """Stop accepting, wait for connections, cut what is left.

        Args:
            timeout: seconds to wait; None takes the setting ``drain_timeout``.
            stop: asks the loop to end, without waiting for it.
        """
        timeout = self.settings["drain_timeout"] if timeout is None else timeout
        return self.engine.aside(drain, self, timeout, stop, self.own_records())  # type: ignore[no-any-return]

    def own_records(self) -> list[Record]:
        """The connections whose handler is the caller: a verb that a handler calls does not wait for that handler."""
        found = [self.connections.find(request) for request in served_by_caller()]
        own = [record for record in found if record is not None]
        if not own and not self.engine.shares_threads:
            here = threading.get_ident()
            own = [record for record in self.connections if record.thread == here]
        return own

    def tell_children(self) -> None:
        """Let forked children know that the server drains."""
        if "children" in vars(self):
            self.children.tell_of_drain()

    def let_go(self) -> bool:
        """Make loops that were asked to end leave the door, so that it can be closed (*any thread*).

        Returns:
            Whether they end; False while one is inside a handler, or a hook. That holds no door, and may stay there.
        """
        self.wake()
        while not self.in_loop and not self.left.wait(LEAVE_SECONDS):
            if not self.engine.holds_doors:
                self.acceptor.last = True  # it will find the door closed, and is not to wonder
                return False
        return True

    def suspend(self) -> None:
        """Leave new connections in the backlog; open ones go on.

        Raises:
            LifecycleError: the server does not serve.
        """
        with self.guard:
            self.lifecycle.move("suspend")
            self.engine.unwatch(self.server)

    def resume(self) -> None:
        """Accept again.

        Raises:
            LifecycleError: the server is not suspended.
        """
        with self.guard:
            self.lifecycle.move("resume")
            self.intake.watch()

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change live settings.

        Raises:
            ConfigError: a setting is unknown, not live, or its value is not allowed; nothing was changed.
        """
        self.settings.configure(changes)
        self.bounds.refresh()
        if self.started:
            self.engine.refresh()
        if self.acceptor.paused:
            self.wake()  # what it waits for may have changed
        events.emit("configured", server=self.server, changes=dict(changes))

    def reload(self) -> bool:
        """Read certificates anew, for connections to come; what does not load stays as it was (*any thread*)."""
        return self.entry is None or self.entry.reload()

    def close_connection(self, connection_id: str, reason: str) -> bool:
        """Cut one connection; tell whether it was open."""
        record = self.connections.by_id(connection_id)
        if record is None:
            return False
        record.detail = None if reason in REASONS else reason
        record.cut(reason if reason in REASONS else "killed")
        return True

    def take_stock(self) -> None:
        """Notice the children that have ended since the loop, which would have, took its last turn."""
        if self.last_loop and self.started and self.engine.in_child:
            self.engine.collect()

    def stats(self) -> dict[str, Any]:
        """Figures since the start; see ``BaseServer.stats``."""
        self.take_stock()
        return {
            "state": self.lifecycle.state.value,
            "address": self.address(),
            "engine": self.engine_name,
            "open": len(self.connections),
            "accepted_total": self.books.counts["accepted"],
            "rejected_total": self.books.counts["rejected"],
            "rejected_by_reason": dict(self.books.refusals),
            "handler_failed_total": self.books.counts["handler_failed"],
            "closed_total": dict(self.books.reasons),
            "buffered_bytes": self.bounds.buffers.total if self.bounds.buffers is not None else 0,
            "stalled_total": dict(self.engine.stalls) if self.started else {},
            "paused": self.acceptor.paused,
            "process": os.getpid(),
        }


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


def is_server(it: object) -> bool:
    """Tell whether ``it`` is a server of harken's: it has, or will have, a running side."""
    return isinstance(getattr(type(it), _KEY, None), RunningSide)


_servings = told_in_child(Serving)
_interrupted: weakref.WeakSet[Serving] = weakref.WeakSet()


@at_exit
def _end_interrupted() -> None:
    """Ctrl-C means now: the interpreter must not wait for handlers whose clients are silent."""
    for serving in list(_interrupted):
        serving.cut("shutdown")
