"""What the tests of preambles share: an echo handler, clients, and what was closed."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator

import harken
from harken import events

PATIENCE = 10.0  # seconds that anything may take
LOCAL = ("127.0.0.1", 0)
ENGINES = ("inline", "thread", "pool", "fork", "green", "green-asking", "green-fallback", "asyncio")
BESIDE = ENGINES[1:]  # those that serve several at once


class Echo(harken.BaseRequestHandler):
    """Sends back what it gets."""

    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)


class Closed:
    """The ``closed`` events of a server, and a way to wait for them."""

    def __init__(self) -> None:
        self.events: list[events.Event] = []
        self._came = threading.Condition()

    def note(self, event: events.Event) -> None:
        """Keep an event."""
        with self._came:
            self.events.append(event)
            self._came.notify_all()

    def wait(self, count: int) -> list[events.Event]:
        """Wait until there are so many, and return them."""
        with self._came:
            found = self._came.wait_for(lambda: len(self.events) >= count, PATIENCE)
            assert found, f"{len(self.events)} of {count} were closed: {self.events}"
            return list(self.events)

    def failures(self, count: int) -> list[str]:
        """Wait until so many preambles failed, and return what was wrong with them."""
        with self._came:
            assert self._came.wait_for(lambda: len(self._failed()) >= count, PATIENCE), self.events
            return [event.detail for event in self._failed()]

    def _failed(self) -> list[events.Event]:
        return [event for event in self.events if event.reason == "preamble_failed"]


@contextlib.contextmanager
def plain(server: harken.TCPServer) -> Iterator[socket.socket]:
    """Give a client that speaks no TLS. In the end it is shut: a forked child has a copy that nobody closes."""
    address = server.server_address
    client = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    with client:
        client.settimeout(PATIENCE)
        client.connect(address)
        yield client
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


class Wire:
    """A TLS client that can end its side and read on, which ``ssl.SSLSocket`` cannot."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        self._until_done(self._tls.do_handshake)

    def _until_done(self, call, *args):
        while True:
            try:
                found = call(*args)
            except ssl.SSLWantReadError:
                self._flush()
                data = self.sock.recv(65536)
                self._in.write(data) if data else self._in.write_eof()
            else:
                self._flush()
                return found

    def _flush(self) -> None:
        if self._out.pending:
            self.sock.sendall(self._out.read())

    def send(self, data: bytes) -> None:
        """Send all of ``data``."""
        self._until_done(self._tls.write, data)

    def send_apart(self, pieces: Iterable[bytes]) -> None:
        """Send each as a record of its own, all at once."""
        for piece in pieces:
            self._tls.write(piece)
        self._flush()

    def piece(self) -> bytes:
        """Receive once, and return what that holds, decrypted."""
        self._in.write(self.sock.recv(1 << 20))
        found = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            while data := self._tls.read(1 << 20):
                found += data
        return found

    def end(self) -> None:
        """Send close_notify, and FIN behind it."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._flush()
        self.sock.shutdown(socket.SHUT_WR)

    @property
    def session(self) -> ssl.SSLSession:
        """By which one comes back."""
        assert self._tls.session is not None
        return self._tls.session

    def read(self) -> bytes:
        """Read something; an empty answer is a proper end.

        Raises:
            ssl.SSLEOFError: the server cut the connection without close_notify.
        """
        try:
            return self._until_done(self._tls.read, 65536)
        except ssl.SSLZeroReturnError:
            return b""

    def read_all(self) -> bytes:
        """Read to the proper end."""
        found = bytearray()
        while data := self.read():
            found += data
        return bytes(found)
