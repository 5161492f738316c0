"""A worker: one process that serves a handler on any number of listeners until a signal says otherwise."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

from harken import plugins
from harken.drain import CUT_GRACE, Drain, hurry
from harken.engines import Engine
from harken.errors import ConfigError
from harken.handlers import BaseRequestHandler
from harken.listener import Listener
from harken.server import BaseServer, TCPServer, UDPServer
from harken.serving import Serving, serving_of
from harken.settings import Settings
from harken.transports import bind_options, listen

__all__ = ["CUT", "DRAINED", "Worker", "fit_handler"]

# Seconds between turns of the loop when nothing happens: children are reaped and pauses end without waiting for it.
TURN_SECONDS = 1.0
# Exit statuses of ``serve``.
DRAINED, CUT = 0, 3
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


def _nothing() -> None:
    """Stands for a callback that nobody gave."""


class _Server:
    """What the servers of a worker have of their own: a listener that is bound already, and the worker's engine."""

    daemon_threads = True  # a worker waits for handlers by itself, and not for ever
    block_on_close = False
    socket: socket.socket

    def __init__(
        self, listener: Listener, handler: Callable[..., Any], settings: dict[str, Any], engine: Engine
    ) -> None:
        BaseServer.__init__(self, listener.getsockname(), handler)  # type: ignore[arg-type]
        self.socket = listener
        self.serving: Serving = serving_of(self, settings, "serve", engine)


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
        self.settings = Settings(_Profile(), settings, "serve")
        self.servers: list[_Stream | _Datagram] = []
        self._stopping = False
        self._left_loop = False
        self._heeding = False
        self._draining = False
        self._deadline = 0.0
        self._on_turn: Callable[[], None] = _nothing
        self.obeys: dict[int, Callable[[], None]] = {}
        """What more signals do, besides ending the worker: called in the thread that acts on signals."""
        make = plugins.find("engines", self.settings["engine"] or "inline", "Engine")
        make.fit(handler)
        self._engine: Engine = make(self._option)
        self._engine.shares_doors = shares_listeners
        options = bind_options(self.settings)
        with ExitStack() as undo:
            for listener in chain(listeners, chain.from_iterable(listen(address, options) for address in addresses)):
                undo.callback(listener.close)
                kind = _Stream if listener.type == socket.SOCK_STREAM else _Datagram
                server = kind(listener, handler, settings, self._engine)
                server.serving.on_child = partial(self._be_a_child, server)
                self.servers.append(server)
                _ = server.serving.entry  # a certificate that cannot be read is told now
                if server is not self.servers[0]:
                    server.serving.share_admission(self.servers[0].serving)
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

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change live settings of every server.

        Raises:
            ConfigError: a setting is unknown, not live, or its value is not allowed; nothing was changed.
        """
        self.settings.configure(changes)
        for server in self.servers:
            server.configure(**changes)

    def run(self, *, on_ready: Callable[[], object] = _nothing, on_turn: Callable[[], None] = _nothing) -> int:
        """Serve until a signal; return the exit status.

        Args:
            on_ready: called once, when every listener is accepted from.
            on_turn: called once a turn of the loop, at least once a second.
        """
        self._on_turn = on_turn
        with self._heeding_signals():
            with ExitStack() as attached:
                for server in self.servers:
                    attached.enter_context(server.serving.attached())
                on_ready()
                self._engine.run(lambda: self._stopping, self._tick, self._patience)
                self._left_loop = True
            return self._drain() if self._draining else self._stop()

    def stop(self) -> None:
        """Make ``run`` return. Any thread, any signal handler."""
        self._stopping = True
        self._engine.wake()

    def close(self) -> None:
        """Close every listener, after ``run`` or instead of it."""
        for server in self.servers:
            server.server_close()
        self._engine.join(time.monotonic())

    def _tick(self) -> None:
        for server in self.servers:
            server.serving.tick()
        self._on_turn()

    def _patience(self) -> float:
        return min(server.serving.acceptor.patience(TURN_SECONDS) for server in self.servers)

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """Let a thread act on signals while the block runs.

        Python runs signal handlers in the main thread, between two bytecodes: not while a handler of the inline engine
        waits there for its client, nor when the signal came just before it began to. The interpreter's own C handler,
        though, writes each signal's number to the wake-up descriptor at once, and a thread reads it from there.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        conductor = threading.Thread(target=self._conduct, args=(reader,), name="harken-signals", daemon=True)
        conductor.start()
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._heeding = True
        before = {number: signal.signal(number, lambda signum, frame: None) for number in (*_SIGNALS, *self.obeys)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._heeding = False
            signal.set_wakeup_fd(wakeup)
            writer.close()
            conductor.join()
            reader.close()

    def _conduct(self, reader: socket.socket) -> None:
        """Act on signals: the first TERM drains, anything else, or the end of the drain's time, cuts."""
        while True:
            try:
                numbers = reader.recv(64)
            except TimeoutError:  # a handler that keeps the loop itself busy has had its time
                numbers = bytes((signal.SIGALRM,))
            if not numbers:
                return
            for signum in numbers:
                self._obey(signum, reader)

    def _obey(self, signum: int, reader: socket.socket) -> None:
        if signum == signal.SIGTERM:
            if not self._stopping:
                self._draining = True
                patience = self.settings["drain_timeout"]
                self._deadline = time.monotonic() + patience
                reader.settimeout(max(patience, 0.001))  # 0 would mean "do not block"
        elif signum == signal.SIGALRM:
            reader.settimeout(None)
            if not self._left_loop:  # else the drain itself cuts what is left
                self._hurry("drain_deadline")
        elif signum in _SIGNALS:
            reader.settimeout(None)
            self._hurry("shutdown")
        else:
            self.obeys.get(signum, _nothing)()  # or a signal of the program's own
            return
        self.stop()

    def _hurry(self, reason: str) -> None:
        for server in self.servers:
            hurry(server.serving, reason)

    def _be_a_child(self, own: _Stream | _Datagram) -> None:
        """In a forked child: signals mean what they mean to any process, and the other listeners are the parent's."""
        if self._heeding:
            signal.set_wakeup_fd(-1)
            for number in (*_SIGNALS, *self.obeys):
                signal.signal(number, signal.SIG_DFL)
        for server in self.servers:
            if server is not own:
                server.socket.close()

    def _drain(self) -> int:
        """Close the doors, wait for connections, cut what is left."""
        drains = [Drain(server.serving) for server in self.servers]
        for drain in drains:
            drain.begin(self._deadline - time.monotonic(), lambda: None)
        reports = [drain.end(self._deadline) for drain in drains]
        return CUT if any(report.cut for report in reports) else DRAINED

    def _stop(self) -> int:
        """Stop now: shut every connection, and give handlers a moment to notice."""
        for server in self.servers:
            server.socket.close()
        self._hurry("shutdown")
        self._engine.join(time.monotonic() + CUT_GRACE)
        return DRAINED


def fit_handler(handler: object) -> None:
    """Check that ``handler`` can serve.

    Raises:
        ConfigError: it is no class with a ``handle()`` of its own.
    """
    if not callable(handler):
        raise ConfigError(f"{handler!r} is not a handler class; derive one from harken.BaseRequestHandler")
    if not isinstance(handler, type):
        return  # a function or a partial that makes handlers, as socketserver allows
    handle = getattr(handler, "handle", None)
    if handle is None:
        raise ConfigError(
            f"{handler.__qualname__} is not a handler class: it has no handle(); derive from harken.BaseRequestHandler"
        )
    if handle is BaseRequestHandler.handle:
        raise ConfigError(f"{handler.__qualname__} does not override handle(), so it would serve nobody")
