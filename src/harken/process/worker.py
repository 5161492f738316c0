"""A worker: one process that serves a handler on any number of listeners until a signal says otherwise."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from typing import Any

from harken.drain import CUT_GRACE, LAST_WORD_SECONDS, Drain, DrainReport, run
from harken.engines import Engine, load, suited
from harken.listener import Listener
from harken.observe.collector import Collector
from harken.preambles import refuse_plain_text
from harken.process.conductor import SIGNALS, Abandoned, Conductor
from harken.process.fitness import fit_handler
from harken.process.traces import Traces
from harken.records import Record
from harken.server import BaseServer, TCPServer, UDPServer
from harken.serving import Serving, serving_of
from harken.settings import Settings
from harken.transports import as_urls, bind_options, listen

__all__ = ["CUT", "DRAINED", "Worker"]

# Seconds between turns of the loop when nothing happens: children are reaped and pauses end without waiting for it.
TURN_SECONDS = 1.0
# Exit statuses of ``serve``.
DRAINED, CUT = 0, 3


def _nothing() -> None:
    """Stands for a callback that nobody gave."""


def _no() -> bool:
    """The same."""
    return False


class _Server:
    """What the servers of a worker have of their own: a listener that is bound already, and the worker's engine.

    Their loop is one, and so is their end: the verbs by which a handler ends its server end the worker.
    """

    daemon_threads = True  # a worker waits for handlers by itself, and not for ever
    block_on_close = False
    socket: socket.socket

    def __init__(
        self, worker: Worker, listener: Listener, handler: Callable[..., Any], settings: dict[str, Any], engine: Engine
    ) -> None:
        BaseServer.__init__(self, listener.getsockname(), handler)  # type: ignore[arg-type]
        self.socket = listener
        self.serving: Serving = serving_of(self, settings, "serve", engine)
        self.serving.holding = listener.holding
        self._worker = weakref.ref(worker)

    def shutdown(self) -> None:
        """End the worker's loop, and with it all of its servers: a drain, as by SIGTERM."""
        self._end_worker()

    def drain(self, timeout: float | None = None) -> DrainReport:
        """Drain all servers of the worker, which ends then."""
        worker = self._worker()
        if worker is None or not worker.is_here:  # in a forked child the loop is the parent's
            return BaseServer.drain(self, timeout)  # type: ignore[arg-type]
        return worker.drain(timeout)

    def server_close(self) -> None:
        """Close the listener; while the loop runs, that ends the worker too."""
        if self.serving.in_loop:  # it is inside a handler, and must not find a closed listener then; nor must a drain
            self.serving.engine.unwatch(self)  # type: ignore[arg-type]
            self.socket.close()
        self._end_worker()
        super().server_close()  # type: ignore[misc]

    def configure(self, **changes: Any) -> None:
        """Change live settings of all servers of the worker, and of what they share."""
        worker = self._worker()
        if worker is None:
            BaseServer.configure(self, **changes)  # type: ignore[arg-type]
        else:
            worker.configure(changes)

    def _end_worker(self) -> None:
        """Ask the worker to leave, and wait until its loop has ended, unless the caller keeps that."""
        worker = self._worker()
        if worker is not None and not self.serving.last_loop and worker.is_here:
            worker.leave(by_program=True)
            if not self.serving.in_loop and not worker.drains_here:
                self.serving.left.wait()


class _Stream(_Server, TCPServer):
    """Serves a stream listener."""


class _Datagram(_Server, UDPServer):
    """Serves a datagram socket."""


class _Profile:
    """The owner of a worker's settings; a handler class has none of its own."""


class Worker:
    """Servers that share an engine and a loop, one for each listener."""

    def __init__(
        self,
        handler: Callable[..., Any],
        addresses: tuple[str, ...],
        settings: dict[str, Any],
        listeners: Sequence[Listener] = (),
        *,
        shares_listeners: bool = False,
    ) -> None:
        """Bind every address.

        Args:
            handler: the handler class.
            addresses: URLs to bind.
            settings: settings by name.
            listeners: sockets that are open already; they are the worker's from now on.
            shares_listeners: whether other processes accept from them too.

        Raises:
            ConfigError: an address, a setting or the handler is wrong; nothing stays open.
            BindError: an address cannot be had; nothing stays open.
        """
        fit_handler(handler)
        addresses = as_urls(addresses)
        settings = suited(handler, settings)
        self.settings = Settings(_Profile(), settings, "serve")
        self.servers: list[_Stream | _Datagram] = []
        self._stopping = False
        self._left_loop = False
        self._process = os.getpid()
        self.sees_off = False
        """Whether handlers that ask for a drain, and have their report, are waited for before the worker ends."""
        self._leaving = threading.RLock()  # a program's signal handler may ask, whatever it interrupts
        self._drainer: threading.Thread | None = None
        self._drains: Sequence[Drain] = ()
        self._drained = threading.Event()
        self._status = DRAINED
        self._on_turn: Callable[[], None] = _nothing
        self.collector: Collector | None = None
        """Who collects this process's figures, if anybody does."""
        self.obeys: dict[int, Callable[[], None]] = {}
        """What more signals do, besides ending the worker: called in the thread that acts on signals."""
        self.turn_seconds = TURN_SECONDS
        """How long a turn of the loop may take when nothing happens."""
        self.on_leaving: Callable[[], object] = _nothing
        """Called when the worker begins to end, by a signal or a verb of its servers, in the thread that asks."""
        self.on_own_end: Callable[[], object] = _nothing
        """Called when a verb of its servers begins to end the worker, in the thread that calls it."""
        self.on_told: Callable[[], object] = _nothing
        """Called whenever a signal says that the worker shall end, also when it is about to."""
        self.doors_stay: Callable[[], bool] = _no
        """Tells whether others will take whom this worker leaves at its doors, where it is suspended."""
        self.traces = Traces()
        self._conductor = Conductor(self._obey)
        make = load(self.settings["engine"] or "inline")
        make.fit(handler)
        self._engine: Engine = make(self._option)
        self._engine.shares_doors = shares_listeners
        options = bind_options(self.settings)
        with ExitStack() as undo:
            for listener in chain(listeners, chain.from_iterable(listen(address, options) for address in addresses)):
                undo.callback(listener.close)
                kind = _Stream if listener.type == socket.SOCK_STREAM else _Datagram
                server = kind(self, listener, handler, settings, self._engine)
                server.serving.on_child = partial(self._be_a_child, server)
                server.serving.door_stays = self._leaves_door
                self.servers.append(server)
                _ = server.serving.entry  # a certificate that cannot be read is told now
                if server is not self.servers[0]:
                    server.serving.bounds.share(self.servers[0].serving.bounds)
            refuse_plain_text(self.settings, (server.socket for server in self.servers))
            undo.pop_all()

    def _option(self, name: str) -> Any:
        if name in ("daemon_threads", "block_on_close"):
            return getattr(_Server, name)
        if name == "selector":
            return sys.modules["harken"]._ServerSelector
        return self.settings[name]

    @property
    def open_connections(self) -> int:
        """How many connections are open."""
        return sum(len(server.serving.connections) for server in self.servers)

    @property
    def accepted(self) -> int:
        """How many connections and datagrams were accepted so far."""
        return sum(server.serving.books.counts["accepted"] for server in self.servers)

    def servings(self) -> list[Serving]:
        """The running sides of all servers."""
        return [server.serving for server in self.servers]

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change live settings of every server.

        Raises:
            ConfigError: a setting is unknown, not live, or its value is not allowed; nothing was changed.
        """
        self.settings.configure(changes)
        for server in self.servers:
            BaseServer.configure(server, **changes)

    def run(self, *, on_ready: Callable[[], object] = _nothing, on_turn: Callable[[], None] = _nothing) -> int:
        """Serve until a signal; return the exit status.

        Args:
            on_ready: called once, when every listener is accepted from.
            on_turn: called once a turn of the loop, at least once a second.
        """
        self._on_turn = on_turn
        self.sees_off = True
        with self._conductor.heeding((*SIGNALS, *self.obeys)):
            with ExitStack() as attached, suppress(Abandoned):
                for server in self.servers:
                    attached.enter_context(server.serving.attached())
                    _ = server.serving.bounds.admission  # a limit that cannot be loaded is told now
                on_ready()
                self._conductor.begin()  # a drain before would have left nothing to attach to
                self._engine.run(lambda: self._stopping, self._tick, self._patience)
                self._left_loop = True
            if self._drainer is None:
                return self._stop()
            while not self._drained.wait(self.turn_seconds):
                on_turn()  # the loop has ended, and we wait by intent
            return self._status

    def await_end(self) -> None:
        """Wait until a drain is over, and nobody is waited for any more. Any thread."""
        self._drained.wait()

    def ends_with_process(self) -> None:
        """Say that the process ends when ``run`` has returned: signals that come then do no more than ``on_told``."""
        self._conductor.afterwards = self._told_late

    @property
    def is_here(self) -> bool:
        """Whether this is the process that serves, and not one that was forked from it."""
        return self._process == os.getpid()

    @property
    def drains_here(self) -> bool:
        """Whether the calling thread is the one that drains."""
        return threading.current_thread() is self._drainer

    def leave(
        self,
        timeout: float | None = None,
        own: Sequence[Record] = (),
        *,
        by_program: bool = False,
        here: bool = False,
    ) -> Sequence[Drain]:
        """Drain, and make ``run`` return, as SIGTERM does. Any thread.

        Args:
            timeout: seconds until what is left is cut; None takes the setting ``drain_timeout``.
            own: the connections of the handler that asks, which are not waited for until it has its report.
            by_program: whether the program says so, and not an operator.
            here: whether to drain in the calling thread, and return when that is done.

        Returns:
            What is under way, one drain a server; empty when the worker stops already.
        """
        with self._leaving:
            if self._stopping or self._drainer is not None:
                return self._drains
            if by_program:
                self.sees_off = True
                self.on_own_end()
            self.on_leaving()
            seconds = self.settings["drain_timeout"] if timeout is None else timeout
            self._drains = [Drain(server.serving, seconds, own) for server in self.servers]
            self._drainer = threading.current_thread()
        if here:
            try:
                self._drain_all(self._drains)
            finally:
                self._begin(partial(self._see_off, CUT_GRACE))
        else:
            self._begin(self._drain)
        return self._drains

    def drain(self, timeout: float | None) -> DrainReport:
        """Drain for somebody who waits for the report: a handler, or another thread of the program."""
        seconds = self.settings["drain_timeout"] if timeout is None else timeout
        own = [record for serving in self.servings() for record in serving.own_records()]
        return self._engine.aside(self._drain_for, seconds, own)  # type: ignore[no-any-return]

    def _drain_for(self, seconds: float, own: Sequence[Record]) -> DrainReport:
        drains = self.leave(seconds, own, by_program=True, here=True)  # in its own thread, which is not waited for
        for each in drains:
            each.shorten(seconds)
        return DrainReport.of_all([each.join(seconds, own) for each in drains])

    def stop(self) -> None:
        """Make ``run`` return. Any thread, any signal handler."""
        self._stopping = True
        self._engine.wake()

    def close(self) -> None:
        """Close every listener, after ``run`` or instead of it."""
        self.traces.close()
        for server in self.servers:
            server.server_close()
        self._engine.join(time.monotonic())

    def _leaves_door(self) -> bool:
        return self.doors_stay()

    def _tick(self) -> None:
        for server in self.servers:
            server.serving.tick()
        self._on_turn()

    def _patience(self) -> float:
        return min(server.serving.acceptor.patience(self.turn_seconds) for server in self.servers)

    def _obey(self, number: int) -> None:
        """Act on a signal: the first TERM drains, INT and QUIT end at once, a drain too."""
        if number in SIGNALS:
            self.on_told()
        if number == signal.SIGTERM:
            self.leave()
        elif number in SIGNALS:
            with self._leaving:
                if self._drainer is None:
                    self.on_leaving()
                self._hurry("shutdown")
                self.stop()
        else:
            self.obeys.get(number, _nothing)()  # or a signal of the program's own

    def _told_late(self, number: int, _frame: object) -> None:
        if number in SIGNALS:
            self.on_told()

    def _hurry(self, reason: str) -> None:
        for server in self.servers:
            under_way = server.serving.under_way
            if under_way is not None:
                under_way.hurry(reason)
            else:
                server.serving.cut(reason)

    def _be_a_child(self, own: _Stream | _Datagram) -> None:
        """In a forked child: signals mean what they mean to any process, and the other listeners are the parent's."""
        self._conductor.be_a_child()
        for server in self.servers:
            if server is not own:
                server.socket.close()

    def _begin(self, drain: Callable[[], None]) -> None:
        """Drain in a thread: the loop goes on until nobody waits at the doors."""
        drainer = threading.Thread(target=drain, name="harken-drain", daemon=True)
        self._drainer = drainer
        try:
            drainer.start()
        except RuntimeError:  # the machine has no threads left: here, then, and other signals wait
            self._drainer = threading.current_thread()
            drain()

    def _drain(self) -> None:
        try:
            self._drain_all(self._drains)
        finally:
            self._see_off(0.0)

    def _see_off(self, patience: float) -> None:
        """Let handlers that asked, and have their report now, come to their end as all others do; then end the loop.

        Args:
            patience: seconds for the loop to end, where it was kept by the drain itself.
        """
        try:
            if self.sees_off and any(each.spared() for each in self._drains):
                left = self._drains[0].since + self.settings["drain_timeout"] - time.monotonic()
                self._drain_all([Drain(server.serving, max(LAST_WORD_SECONDS, left)) for server in self.servers])
            else:
                self.servers[0].serving.left.wait(patience)
            if not self._left_loop:  # a handler of the inline engine does not heed that its connection has ended
                self._conductor.abandon()
        finally:
            self.stop()  # whatever went wrong
            self._drained.set()

    def _drain_all(self, drains: Sequence[Drain]) -> None:
        reports = run(list(drains), self.stop)
        if any(report.cut for report in reports) or any(each.running for each in drains):
            self._status = CUT

    def _stop(self) -> int:
        """Stop now: shut every connection, and give handlers a moment to notice."""
        for server in self.servers:
            server.socket.close()
        self._hurry("shutdown")
        self._engine.join(time.monotonic() + CUT_GRACE)
        return DRAINED
