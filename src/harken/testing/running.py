"""Servers and handlers for tests: on a free port, or on no port at all."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from harken import events
from harken.connection import Connection
from harken.engines import is_async
from harken.errors import ConfigError, LifecycleError
from harken.peer import Peer
from harken.preambles.proxy_header import ProxyHeader
from harken.process.worker import Worker
from harken.server import BaseServer, TCPServer
from harken.serving import serving_of
from harken.settings import warn_of_process

__all__ = ["Client", "Served", "connect", "serve"]

# Seconds for a server to be ready, and for handlers to end once their connections are cut. Both take milliseconds.
PATIENCE = 10.0
# Seconds between nudges of a loop that is to have its first turn, which it has in less.
LOOK_SECONDS = 0.002


class Served:
    """A server that runs in this process while a test talks to it.

    Attributes:
        servers: the running servers, one an address, with the verbs ``stats``, ``connections``, ``suspend`` …
        errors: what handlers raised so far (on the fork engine that stays in their processes).
    """

    def __init__(self, worker: Worker) -> None:
        self.servers: list[Any] = list(worker.servers)
        self.errors: list[BaseException] = []

    @property
    def server(self) -> Any:
        """The first server."""
        return self.servers[0]

    @property
    def address(self) -> Any:
        """Where the first server is bound, as ``socket.connect`` takes it."""
        return self.server.server_address

    @property
    def url(self) -> str:
        """Where the first server is bound, as users write it: ``tcp://127.0.0.1:40123``."""
        return self.urls[0]

    @property
    def urls(self) -> list[str]:
        """Where each server is bound."""
        return [serving_of(server).address() for server in self.servers]

    def connect(self, timeout: float | None = PATIENCE, *, proxy: ProxyHeader | None = None) -> socket.socket:
        """Return a client of the first server; the caller closes it.

        Args:
            timeout: of the socket, in seconds, so that a test of a silent server ends.
            proxy: the header to send first, as a proxy would for a client of its own.
        """
        listener = self.server.socket
        client = socket.socket(listener.family, listener.type)
        client.settimeout(timeout)
        try:
            client.connect(self.address)
            if proxy is not None:
                client.sendall(proxy.encode())
        except (OSError, ConfigError):
            client.close()
            raise
        return client

    def note(self, event: events.Event) -> None:
        """Keep what a handler of ours raised."""
        if event.server in self.servers:
            self.errors.append(event.error)


@contextlib.contextmanager
def serve(handler: Callable[..., Any], *addresses: str, **settings: Any) -> Iterator[Served]:
    """Serve ``handler`` in a thread of this process while the block runs, with the defaults of ``harken.serve``.

    In the end the server stops at once: connections that are still open are cut.

    Args:
        handler: the handler class.
        addresses: URLs; a free TCP port on 127.0.0.1 when none is given.
        settings: any setting by name.

    Raises:
        ConfigError: an address, a setting or the handler is wrong.
        LifecycleError: a handler did not end within 10 s of its connection's end.
        Exception: what ended the server while nobody asked it to.
    """
    warn_of_process(settings, "testing.serve()")
    worker = Worker(handler, addresses or ("tcp://127.0.0.1:0",), settings)
    served = Served(worker)
    loop = _Loop(worker)
    unsubscribe = events.subscribe(served.note, "handler_failed")
    try:
        loop.start()
        yield served
    finally:
        worker.stop()
        for server in served.servers:
            serving_of(server).cut("shutdown")  # an inline handler keeps the loop from doing so
        loop.join()
        worker.close()
        unsubscribe()
    loop.look_back()


class _Loop:
    """A worker's loop in a thread of its own."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._turned = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="harken-testing", daemon=True)

    def start(self) -> None:
        """Return once it has had a turn: from then on a listener may be replaced, by a faulty one for instance.

        Raises:
            LifecycleError: it had none within 10 s.
            Exception: what ended it at once.
        """
        self._thread.start()
        deadline = time.monotonic() + PATIENCE
        while not self._turned.wait(LOOK_SECONDS):
            if time.monotonic() >= deadline:
                raise LifecycleError(f"the server was not ready within {PATIENCE:g} s")
            self._worker._engine.wake()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._worker.run(on_turn=self._turned.set)
        except Exception as error:  # noqa: BLE001 - raised again in the test's thread
            self._error = error
        finally:
            self._turned.set()

    def join(self) -> None:
        """Wait for its end, for 10 s at the most."""
        if self._thread.ident is not None:
            self._thread.join(PATIENCE)

    def look_back(self) -> None:
        """Tell what went wrong.

        Raises:
            LifecycleError: it has not ended.
            Exception: what ended it before it was asked to.
        """
        if self._thread.is_alive():
            raise LifecycleError(f"a handler still ran {PATIENCE:g} s after its connection was cut")
        if self._error is not None:
            raise self._error


class Client(socket.socket):
    """A client of one handler, which runs in a thread. Closing it waits for the handler to end.

    Leaving a ``with`` block raises what the handler raised, so that a test notices, and rather than the OSError of a
    client whose connection ended by that; to any other exception of the block it is added as a note. ``error`` has it
    too.

    Attributes:
        error: what the handler raised, or None. That its client went away is no error.
    """

    error: BaseException | None = None
    _thread: threading.Thread | None = None
    _patience = PATIENCE

    def close(self) -> None:
        """Close, and wait for the handler.

        Raises:
            LifecycleError: it did not end within 10 s.
        """
        if self._thread is not None:
            with contextlib.suppress(OSError):
                self.shutdown(socket.SHUT_RDWR)  # a file of makefile() may keep the descriptor open
        super().close()
        thread, self._thread = self._thread, None
        if thread is None or thread is threading.current_thread():
            return
        thread.join(self._patience)
        if thread.is_alive():
            raise LifecycleError(f"the handler still ran {self._patience:g} s after its client had closed")

    def __exit__(self, *exception: object) -> None:
        self.close()
        failure: Any = exception[1]
        if self.error is None:
            return
        if failure is None or isinstance(failure, OSError):  # a handler that raises resets what it has not read
            raise self.error
        failure.add_note(f"The handler had raised:\n{''.join(traceback.format_exception(self.error)).rstrip()}")


class _Portless(TCPServer):
    """Takes one connection, which it was given, through all hooks."""

    def __init__(
        self, end: Connection, client_address: Any, handler: Callable[..., Any], client: Client, **settings: Any
    ) -> None:
        BaseServer.__init__(self, client_address, handler, **settings)
        self.socket = end
        self._client_address = client_address
        self._client = client
        registry = serving_of(self).connections
        self._plain, registry.describe = registry.describe, self._describe

    def _describe(self, request: Any, client_address: Any) -> Peer:
        """A client that is to be on the network is there for its handler: the socket pair only stands in for that."""
        match client_address:
            case (str(host), int(port), *_):
                return Peer(host, port, socket.AF_INET6 if ":" in host else socket.AF_INET)
        return self._plain(request, client_address)

    def get_request(self) -> tuple[Any, Any]:
        return self.socket, self._client_address

    def run(self) -> None:
        """Serve it. What is no Exception, ``pytest.fail()`` for one, passes ``handle_error`` by."""
        try:
            self._handle_request_noblock()
        except SystemExit:  # ends the connection alone
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._client.error = error

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self._client.error = error


def connect(
    handler: Callable[..., Any],
    *,
    client_address: Any = ("127.0.0.1", 0),
    timeout: float | None = PATIENCE,
    proxy: ProxyHeader | None = None,
) -> Client:
    """Return a client that talks to ``handler`` over a socket pair: no port, no loop, no engine.

    The handler runs in a thread, and its connection passes every hook of a server. A socket pair is a Unix socket:
    options of TCP cannot be set on it.

    Args:
        handler: the handler class.
        client_address: what the handler sees.
        timeout: of the client socket, in seconds.
        proxy: the header to send first, as a proxy would: the handler sees the client that it names.

    Raises:
        ConfigError: the handler is async.
    """
    if is_async(handler):
        name = getattr(handler, "__qualname__", handler)
        raise ConfigError(f"{name} is async, and connect() has no event loop for it; take testing.serve({name})")
    first = b"" if proxy is None else proxy.encode()
    near, far = socket.socketpair()
    client = Client(near.family, near.type, near.proto, near.detach())
    client.settimeout(timeout)
    far.setblocking(True)
    end = Connection(far.family, far.type, far.proto, far.detach())
    settings = {} if proxy is None else {"proxy": "any", "proxy_from": ("unix:",)}
    server = _Portless(end, client_address, handler, client, **settings)
    client._thread = threading.Thread(target=server.run, name="harken-testing", daemon=True)
    client._thread.start()
    if first:  # a handler that has ended already would make an empty write fail too
        client.sendall(first)
    return client
