"""Who serves the address of the setting ``metrics``.

Under a supervisor, which serves nobody itself, it is a process of its own that asks the supervisor; without one it is
threads beside the server.
"""

from __future__ import annotations

import itertools
import os
import queue
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NoReturn

from harken import events, transports
from harken.errors import ConfigError, HarkenError
from harken.forking import in_child
from harken.listener import Listener
from harken.observe.collector import Collector, add_queues
from harken.observe.exposition import check_installed
from harken.observe.figures import Figures
from harken.process import inheritance
from harken.process.answers import alone_status, answer
from harken.process.channel import Channel, Message, pair
from harken.process.control import VERSION, Client, hear
from harken.process.signals import blocked
from harken.process.traces import Traces
from harken.serving import Serving
from harken.settings import Settings

__all__ = ["Attendant", "Local", "key_of", "offer", "open_listener", "read_token", "web_address"]

# Letters of the shortest token that nobody guesses.
LEAST_TOKEN = 16
# Seconds to wait for an answer: the supervisor gives its workers three.
ANSWER_SECONDS = 5.0
# Seconds between looks whether somebody still follows a connection that is silent.
SIGN_SECONDS = 0.25
# Entries of a trace that wait for a reader, before more are left out: what a tracer takes down in some seconds.
MOST_UNREAD = 1000
# Seconds until a page whose process has ended is started again.
RESTART_SECONDS = 1.0


def key_of(settings: Settings) -> str:
    """Return the key under which a successor finds the listener: another address is another listener."""
    return f"metrics {settings['metrics']}"


def open_listener(settings: Settings) -> Listener | None:
    """Open the address that the setting asks for, or take it over from a predecessor; None when there is none.

    Raises:
        ConfigError: the address cannot carry such a page, or a library is missing.
        BindError: the address cannot be had.
    """
    url = settings["metrics"]
    if url is None:
        return None
    check_address(url)
    check_installed()
    return (inheritance.take(key_of(settings), url) or transports.listen(url))[0]


def check_address(url: str) -> None:
    """Look at an address without touching the machine.

    Raises:
        ConfigError: it cannot carry a page.
    """
    transports.for_url(url).parse(url)


def web_address(listener: Listener) -> str:
    """Return what people type into a browser, or the path where browsers do not go."""
    scheme, _, where = listener.url.partition("://")
    if scheme != "tcp":
        return listener.url
    return f"http://{'localhost' if where.startswith(':') else ''}{where}/"  # every address, and no name for it


def read_token(settings: Settings) -> str | None:
    """Return the token of the file that ``metrics_token`` names, or None.

    Raises:
        ConfigError: the file cannot be read, or what stands in it can be guessed.
    """
    path = settings["metrics_token"]
    if path is None:
        return None
    try:
        with open(path, encoding="ascii") as file:
            token = file.read(1 << 12).strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"metrics_token = {path!r} cannot be read: {error}") from None
    if len(token) < LEAST_TOKEN:
        raise ConfigError(
            f"metrics_token = {path!r} has {len(token)} letters, and at least {LEAST_TOKEN} are needed; "
            "openssl rand -hex 16 makes some"
        )
    return token


class Attendant:
    """The supervisor's view of the page's process. The supervisor's thread."""

    def __init__(
        self,
        listener: Listener,
        token: str | None,
        selector: selectors.BaseSelector,
        ask: Callable[[Client, Message], None],
        let_go: Callable[[], None],
    ) -> None:
        """Start it.

        Args:
            listener: the page's; it stays the supervisor's to close.
            token: see :class:`harken.observe.page.Page`.
            selector: of the supervisor's loop; its keys' ``data`` are functions to call when a descriptor is ready.
            ask: answers one question, now or later.
            let_go: called in the new process, to close what is the supervisor's.
        """
        self._listener = listener
        self._token = token
        self._selector = selector
        self._ask = ask
        self._let_go = let_go
        self._pid = 0
        self._client: Client | None = None
        self._start_at = 0.0
        self.turn()

    def turn(self) -> None:
        """Once a turn of the loop: see that it runs, and send on what it has not read yet."""
        if self._pid and self._client is None:
            with suppress(ChildProcessError):  # as process 1 of a container the supervisor has reaped it
                if os.waitpid(self._pid, os.WNOHANG)[0] == 0:
                    return
            self._pid = 0
        if not self._pid and time.monotonic() >= self._start_at:
            try:
                self._start()
            except OSError as error:  # no descriptors, memory or processes left: the service serves on
                self._start_at = time.monotonic() + RESTART_SECONDS
                events.emit("worker_failed", reason=f"the page: {error.strerror}", restart_in=RESTART_SECONDS)
        if self._client is not None and self._client.channel.unsent:
            self._client.channel.flush()

    @property
    def waits(self) -> bool:
        """Whether it has not taken all yet."""
        return self._client is not None and self._client.channel.unsent

    def _start(self) -> None:
        with ExitStack() as undo:
            ours, theirs = pair()
            undo.callback(ours.close)
            undo.callback(theirs.close)
            with blocked():
                pid = os.fork()
                undo.pop_all()
                if pid == 0:
                    self._let_go()
                    ours.release()
        if pid == 0:
            _attend(theirs, self._listener, self._token)
        theirs.release()
        self._pid = pid
        client = self._client = Client(ours)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(client))

    def _hear(self, client: Client) -> None:
        if not hear(client, self._ask):
            self._drop()
            self._start_at = time.monotonic() + RESTART_SECONDS

    def _drop(self) -> None:
        if self._client is not None:
            self._selector.unregister(self._client.channel)
            self._client.gone()
            self._client = None

    def close(self) -> None:
        """End it."""
        self._drop()
        if self._pid:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._pid, signal.SIGKILL)  # it has heard, and holds nothing that needs care
                os.waitpid(self._pid, 0)
            self._pid = 0

    def release(self) -> None:
        """In a forked child: let go of what is the parent's."""
        if self._client is not None:
            self._client.channel.release()


def _attend(channel: Channel, listener: Listener, token: str | None) -> NoReturn:
    """Be the page's process, until the supervisor ends it or has ended."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # a terminal, or a service manager, sends some to every process
        events.subscribers.update(dict.fromkeys(events.subscribers, ()))
        listener.disown()
        wire = _Wire(channel)
        from harken.observe.page import Page

        Page(listener, wire, token)
        wire.listen()
    except BaseException:  # noqa: BLE001 - this process ends here, whatever it was
        import traceback

        traceback.print_exc()
    os._exit(0)


class _Box:
    """What has come for somebody and waits to be read. Any thread puts, one gets."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._left_out = 0

    def put(self, message: Message) -> None:
        """Put one in; when too many wait it is counted instead, unless it is the last."""
        if self._messages.qsize() < MOST_UNREAD or "end" in message.get("result", message):
            self._messages.put(message)
        else:
            self._left_out += 1

    def get(self, timeout: float) -> Message | None:
        """Take one out; None when none came in time."""
        with suppress(queue.Empty):
            return self._messages.get(timeout=timeout)
        return None

    def follow(self, connection: str, read: Callable[[Message], Message]) -> Iterator[Message | None]:
        """Return the entries of a trace as they come, up to its last, and None when there was none for a while."""
        while True:
            message = self.get(SIGN_SECONDS)
            left_out, self._left_out = self._left_out, 0
            if left_out:
                yield {"connection": connection, "left_out": left_out}
            entry = None if message is None else read(message)
            yield entry
            if entry is not None and "end" in entry:
                return


class _Wire:
    """Asks the supervisor. Any thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Box] = {}

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Return the answer; see :class:`harken.observe.page.Source`."""
        number = next(self._numbers)
        box = self._waiting[number] = _Box()
        try:
            self._channel.send(version=VERSION, verb=verb, arguments=arguments, number=number)
            reply = box.get(ANSWER_SECONDS)
        finally:
            del self._waiting[number]
        if reply is None:
            raise TimeoutError(f"the supervisor did not answer within {ANSWER_SECONDS:g} s")
        return _result(reply)

    def follow(self, connection: str) -> Iterator[Message | None]:
        """Return what a connection moves; see :class:`harken.observe.page.Source`."""
        number = next(self._numbers)
        box = self._waiting[number] = _Box()
        try:
            self._channel.send(version=VERSION, verb="trace", arguments={"connection": connection}, number=number)
            yield from box.follow(connection, _result)
        finally:
            del self._waiting[number]
            self._channel.send(version=VERSION, verb="untrace", arguments={"number": number}, number=0)

    def listen(self) -> None:
        """Hand answers to those who wait, until the supervisor is gone."""
        with suppress(EOFError):
            while True:
                for reply in self._channel.receive():
                    box = self._waiting.get(reply["number"])
                    if box is not None:
                        box.put(reply)


def _result(reply: Message) -> Any:
    if "error" in reply:
        raise HarkenError(reply["error"])
    return reply["result"]


class Local:
    """The page of servers in this process, which answers for them.

    Attributes:
        servers: those it answers for.
        collector: collects their figures.
        traces: those of their connections.
        settings: that speak for all of them.
    """

    def __init__(self, settings: Settings, listener: Listener) -> None:
        """Take over the listener; nothing is served yet.

        Args:
            settings: of the first server, or of all.
            listener: of the page.

        Raises:
            ConfigError: the token is wrong; the listener is closed.
        """
        self.servers: list[Any] = []
        self.settings = settings
        self.collector = Collector(self.servings)
        self.traces = Traces()
        self.traces.push = self._push
        self._numbers = itertools.count(1)
        self._following: dict[str, _Box] = {}
        self._listener = listener
        try:
            self._token = read_token(settings)
        except ConfigError:
            listener.close()
            raise
        self._page: Any = None

    def servings(self) -> list[Serving]:
        """The running sides of the servers."""
        return [server._harken for server in self.servers]

    def start(self) -> None:
        """Begin to serve the page."""
        from harken.observe.page import Page

        self._page = Page(self._listener, self, self._token)
        self.collector.start()
        _running.add(self)
        events.emit("page_opened", address=web_address(self._listener))

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Answer for the servers; see :class:`harken.observe.page.Source`."""
        told = answer(self, verb, arguments)
        if verb == "figures":
            figures = Figures(told)
            add_queues(figures, [server.socket for server in self.servers])
            figures.add("harken_ready", (), float(answer(self, "health", {})["ready"]))
            figures.add("harken_workers_wanted", (), 0)
            return figures.plain()
        return alone_status(told) if verb == "status" else told

    def follow(self, connection: str) -> Iterator[Message | None]:
        """Return what a connection moves; see :class:`harken.observe.page.Source`."""
        token = f"page-{next(self._numbers)}"
        box = self._following[token] = _Box()
        try:
            if not self.ask("trace", connection=connection, token=token):
                raise ConfigError(f"no connection {connection!r} is open")
            yield from box.follow(connection, lambda entry: entry)
        finally:
            del self._following[token]
            self.traces.end(token)

    def _push(self, token: str, entries: list[Message]) -> None:
        box = self._following.get(token)
        if box is not None:
            for entry in entries:
                box.put(entry)

    def configure(self, changes: dict[str, Any]) -> None:
        """Change live settings of all servers."""
        for server in self.servers:
            server.configure(**changes)

    def close(self) -> None:
        """End it; harmless when it has ended."""
        if self._page is None:
            self._listener.close()
            return
        _running.discard(self)
        self._page.close()
        self._page = None
        self.collector.stop()

    def after_fork(self) -> None:
        """In a child of this process, which holds the page's listener and must not keep it open."""
        if self._page is not None:
            self._page.after_fork()


_running: set[Local] = set()
_offered: dict[str, Local] = {}
_guard = threading.Lock()


def offer(serving: Serving) -> Callable[[], None]:
    """Show a server at the address that its setting names, together with others of this process that name the same.

    Returns:
        What ends that.

    Raises:
        ConfigError: a setting is wrong.
        BindError: the address cannot be had.
    """
    key = key_of(serving.settings)
    with _guard:
        local = _offered.get(key)
        if local is None:
            listener = open_listener(serving.settings)
            assert listener is not None
            local = Local(serving.settings, listener)
            local.servers.append(serving.server)
            local.start()
            _offered[key] = local
        else:
            local.servers.append(serving.server)

    def leave() -> None:
        with _guard:
            local.collector.leave(serving, partial(local.servers.remove, serving.server))
            over = not local.servers
            if over:
                del _offered[key]
        if over:
            local.close()

    return leave


@in_child
def _after_fork() -> None:
    global _guard
    _guard = threading.Lock()
    for local in _running:
        local.after_fork()
    _running.clear()
    _offered.clear()
