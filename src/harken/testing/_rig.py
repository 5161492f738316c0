"""A server on the engine under test, its clients, and the books kept of it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from harken import events
from harken.drain import DrainReport
from harken.handlers import BaseRequestHandler
from harken.mixins import ThreadingMixIn
from harken.server import TCPServer, UDPServer, UnixDatagramServer, UnixStreamServer
from harken.serving import serving_of
from harken.settings import Settings
from harken.testing._census import Census, wait_until
from harken.testing._check import DATAGRAMS, Make, expect
from harken.testing._clients import Client, opening, shake
from harken.testing._obedient import Obedient, ObedientToDatagrams
from harken.testing._wires import connected, settings_of

__all__ = ["PATIENCE", "Draining", "Rig", "bounded", "rig"]

T = TypeVar("T")

# Seconds that anything may take before the check fails: far more than it takes on a busy machine.
PATIENCE = 15.0
# Seconds between the loop's own turns: so long that what only works because a loop polls, fails.
TURN_SECONDS = 30.0
# Seconds for further handlers to start beside the first; an engine that runs one at a time starts none.
BESIDE_SECONDS = 0.5

_KINDS: dict[str, Any] = {
    "tcp": TCPServer,
    "unix": UnixStreamServer,
    "udp": UDPServer,
    "unixgram": UnixDatagramServer,
}


def bounded(what: str, function: Callable[..., T], *args: Any) -> T:
    """Call ``function`` in a thread and return what it returns.

    Raises:
        AssertionError: it had not returned in time.
    """
    outcome: Future[T] = Future()

    def call() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            outcome.set_exception(error)

    thread = threading.Thread(target=call, name=f"check: {what}", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise AssertionError(f"{what} did not return within {PATIENCE:g} s")
    return outcome.result()


class Rig:
    """One server of a check. What it reports is gathered here, from whatever process.

    Attributes:
        server: the server.
        engine: its engine.
    """

    def __init__(
        self, make: Make, transport: str, handler: type[BaseRequestHandler] | None, keywords: dict[str, Any]
    ) -> None:
        transport, _, self._wire = transport.partition("+")
        keywords = settings_of(self._wire) | keywords
        self._folder = tempfile.TemporaryDirectory(prefix="harken-") if transport.startswith("unix") else None
        address: Any = os.path.join(self._folder.name, "server") if self._folder else ("127.0.0.1", 0)
        if handler is None:
            handler = ObedientToDatagrams if transport in DATAGRAMS else Obedient
        self._datagrams = transport in DATAGRAMS
        self._count = 0
        self._errors, self._error_writer = os.pipe()
        os.set_blocking(self._errors, False)
        self._gate, self._gate_opener = os.pipe()
        self._loops: list[threading.Thread] = []
        self._clients: list[socket.socket] = []
        self._seen: list[events.Event] = []
        self._unsubscribe = events.subscribe(self._see, "accepted", "opened", "closed")
        self.server: Any = _server_class(transport, self)(address, handler, bind_and_activate=False)
        settings = Settings(self.server, keywords)
        self.engine = make(lambda name: _option(self.server, settings, name))
        self.serving = serving_of(self.server, keywords, "drop-in", self.engine)
        self.server.server_bind()
        self.server.server_activate()

    # -- the server ----------------------------------------------------------------------------------------------------

    def start(self, loops: int = 1) -> None:
        """Serve in ``loops`` threads; return when the first is ready."""
        for _ in range(loops):
            loop = threading.Thread(target=self._loop, name="check: serve_forever()", daemon=True)
            self._loops.append(loop)
            loop.start()
        expect(self.server.wait_ready(PATIENCE), "serve_forever() was not ready in time")

    def stop(self) -> None:
        """Close the clients, shut down, close; the books must be balanced.

        Raises:
            AssertionError: something of this hangs, or an opened connection has not exactly one ``closed``.
        """
        for client in self._clients:
            client.close()
        bounded("shutdown()", self.server.shutdown)
        bounded("server_close()", self.server.server_close)
        self.expect_ended()
        expect(wait_until(lambda: len(self.of("closed")) >= self._opened()), self._balance())
        counts = Counter(event.connection for event in self.of("closed"))
        expect(set(counts.values()) <= {1} and len(counts) == self._opened(), self._balance())

    def close(self) -> None:
        """Let go of everything, whatever happened before."""
        self._unsubscribe()
        for client in self._clients:
            client.close()
        with contextlib.suppress(AssertionError):
            bounded("shutdown()", self.server.shutdown)
            bounded("server_close()", self.server.server_close)
        self.server.socket.close()
        for end in (self._errors, self._error_writer, self._gate, self._gate_opener):
            os.close(end)
        if self._folder is not None:
            self._folder.cleanup()

    def expect_ended(self) -> None:
        """Wait for the loops.

        Raises:
            AssertionError: one still runs.
        """
        for loop in self._loops:
            loop.join(PATIENCE)
            expect(not loop.is_alive(), "serve_forever() did not return")
        self._loops.clear()

    def failed(self) -> None:
        """Note a call of ``handle_error``; any process."""
        os.write(self._error_writer, b".")

    @property
    def gate(self) -> int:
        """A descriptor that is readable once :meth:`open_gate` was called; any process."""
        return self._gate

    def open_gate(self) -> None:
        """Let handlers that hold go on."""
        os.write(self._gate_opener, b".")

    def ended_without_door(self) -> None:
        """Give the loops time to end in a drain, and the door to be closed, whether that is right or wrong."""
        for loop in self._loops:
            loop.join(BESIDE_SECONDS)
        wait_until(lambda: self.server.socket.fileno() < 0, BESIDE_SECONDS)

    def failures(self, wanted: int) -> int:
        """Return how often ``handle_error`` was called since the last look, waiting until it was ``wanted`` times."""
        seen = 0

        def look() -> bool:
            nonlocal seen
            with contextlib.suppress(BlockingIOError):
                seen += len(os.read(self._errors, 4096))
            return seen >= wanted

        wait_until(look, PATIENCE)
        return seen

    # -- events --------------------------------------------------------------------------------------------------------

    def of(self, name: str) -> list[events.Event]:
        """Return the events of this name so far."""
        return [event for event in list(self._seen) if event.name == name]

    def expect_closed(self, *reasons: str) -> None:
        """Wait for as many ``closed`` events as there are reasons.

        Raises:
            AssertionError: their reasons are others.
        """
        wait_until(lambda: len(self.of("closed")) >= len(reasons), PATIENCE)
        found = [event.reason for event in self.of("closed")]
        expect(sorted(found) == sorted(reasons), f"closed for {found}, not for {list(reasons)}")

    def wait_closed(self, count: int) -> None:
        """Wait until so many connections were closed."""
        expect(
            wait_until(lambda: len(self.of("closed")) >= count, PATIENCE),
            f"{len(self.of('closed'))} of {count} connections were closed",
        )

    @property
    def forks_beside_tls(self) -> bool:
        """Whether connections are children of the process in which the clients do TLS."""
        return self.engine.in_child and "tls" in self._wire

    # -- clients -------------------------------------------------------------------------------------------------------

    def client(self, *commands: str) -> socket.socket:
        """Connect, and send ``commands``. The check closes the client, or the rig does."""
        listener = self.server.socket
        with opening() as ours:
            client: socket.socket = Client(listener.family, listener.type)
            ours.add(client)
        self._clients.append(client)
        client.settimeout(PATIENCE)
        if self._datagrams and self._folder is not None:  # a datagram client needs a path to be answered at
            self._count += 1
            client.bind(os.path.join(self._folder.name, f"client-{self._count}"))
        client.connect(self.server.server_address)
        if self._wire:
            client = self._prepared(client)
        for command in commands:
            client.sendall(command.encode() + b"\n")
        return client

    def _prepared(self, client: socket.socket) -> socket.socket:
        with opening() as ours:
            self._clients.remove(client)
            client = connected(client, self._wire)
            ours.add(client)
            self._clients.append(client)
        if isinstance(client, ssl.SSLSocket):
            shake(client, PATIENCE)
        return client

    def held(self, count: int = 1, verb: str = "hold") -> list[socket.socket]:
        """Return clients whose handlers are under way: ``count`` of them, or one if the engine runs one at a time."""
        first = self.client(verb)
        expect(receive(first, 5) == b"held\n", "a handler did not start")
        if self._wire and self.engine.in_loop:  # a handshake beside it would wait for its end
            return [first]
        rest = [self.client(verb) for _ in range(count - 1)]
        if rest and not select.select([rest[0]], [], [], BESIDE_SECONDS)[0]:
            for client in rest:
                client.close()
            return [first]
        for client in rest:
            expect(receive(client, 5) == b"held\n", "a handler did not start beside another")
        return [first, *rest]

    def expect_serves(self, times: int = 1) -> None:
        """Send something through a new connection, ``times`` times.

        Raises:
            AssertionError: it does not come back.
        """
        for _ in range(times):
            with self.client("echo 5") as client:
                client.sendall(b"hello")
                expect(receive(client, 5) == b"hello", "a new client was not served")
            self._clients.remove(client)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            self.server.serve_forever(TURN_SECONDS)
        except BaseException as error:  # noqa: BLE001 - told by the check that misses the loop
            print(f"harken.testing: serve_forever() raised {error!r}", file=sys.stderr)

    def _see(self, event: events.Event) -> None:
        if event.server is self.server:
            self._seen.append(event)

    def _opened(self) -> int:
        return 0 if self._datagrams else len(self.of("opened"))

    def _balance(self) -> str:
        closed = [f"{event.connection} {event.reason}" for event in self.of("closed")]
        opened = [event.connection for event in self.of("opened")]
        return f"{len(opened)} connections were opened ({opened}), and closed were {len(closed)} ({closed})"


@contextlib.contextmanager
def rig(
    make: Make,
    transport: str,
    handler: type[BaseRequestHandler] | None = None,
    *,
    start: bool = True,
    **keywords: Any,
) -> Iterator[Rig]:
    """Give a server on the engine under test; stop it in the end, and see to it that nothing is left behind.

    Args:
        make: makes the engine.
        transport: ``tcp``, ``unix``, ``udp`` or ``unixgram``, and behind a ``+`` what stands before the handler.
        handler: the handler class; by default the obedient one.
        start: whether it serves already.
        keywords: settings.

    Raises:
        AssertionError: it does not end, its books are not balanced, or something is left behind.
    """
    before = Census()
    tested = Rig(make, transport, handler, keywords)
    try:
        if start:
            tested.start()
        yield tested
        tested.stop()
    finally:
        tested.close()
    before.expect_no_leaks()


class Draining:
    """A drain under way in a thread."""

    def __init__(self, tested: Rig, timeout: float) -> None:
        self._tested = tested
        self._reports: list[DrainReport] = []
        self._thread = threading.Thread(target=lambda: self._reports.append(tested.server.drain(timeout)), daemon=True)
        self._thread.start()

    def report(self) -> DrainReport:
        """Wait for the report."""
        self._thread.join(2 * PATIENCE)
        expect(self._reports, "drain() did not return")
        return self._reports[0]

    @property
    def running(self) -> int:
        """How many handlers were left running."""
        drained = self._tested.serving.under_way
        return drained.running if drained is not None else 0


def receive(client: socket.socket, size: int) -> bytes:
    """Read ``size`` bytes, or to the end if that comes before."""
    data = bytearray()
    while len(data) < size and (part := client.recv(min(65536, size - len(data)))):
        data += part
    return bytes(data)


def _server_class(transport: str, tested: Rig) -> Any:
    kind = _KINDS[transport]

    class Server(ThreadingMixIn, kind):  # type: ignore[misc, valid-type]
        """A mix-in sends each request to the engine, whichever it is."""

        gate = tested.gate

        def handle_error(self, request: Any, client_address: Any) -> None:
            tested.failed()

    return Server


def _option(server: Any, settings: Settings, name: str) -> Any:
    if name == "selector":
        return sys.modules["harken"]._ServerSelector
    if name in ("daemon_threads", "block_on_close"):
        return getattr(server, name)
    return settings[name]
