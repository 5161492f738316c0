"""Hooks that write under TLS beside a handler that reads."""

import socket
import ssl
import threading

import pytest

import harken

from .tls_kit import BESIDE, PATIENCE


@pytest.mark.parametrize("engine", [engine for engine in BESIDE if engine != "asyncio"])
def test_a_goodbye_comes_while_the_handler_reads(engine, serving, dial):
    """``on_timeout`` writes at once, whole and readable, though ``handle`` waits in ``recv`` for ever."""

    class Silent(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"hello\n")
            while self.request.recv(100):
                pass

        def on_timeout(self, which):
            self.request.sendall(which.encode() + b"\n")

    with serving(engine, Silent, idle_timeout=0.3) as server, dial(server) as client:
        client.sendall(b"x")
        got = b""
        while piece := client.recv(100):
            got += piece
        assert got == b"hello\nidle_timeout\n"


class Flood(harken.BaseRequestHandler):
    """Reads all that comes, while a thread of its own writes."""

    received: bytes
    told: threading.Event

    def handle(self):
        """Read to the end, and tell."""
        writer = threading.Thread(target=self.write)
        writer.start()
        got = bytearray()
        while len(got) < len(DATA) and (piece := self.request.recv(7000)):
            got += piece
        type(self).received = bytes(got)
        writer.join(PATIENCE)
        self.told.set()

    def write(self):
        """Write the data in small pieces."""
        for at in range(0, len(DATA), 997):
            self.request.sendall(DATA[at : at + 997])

    def on_timeout(self, which):
        """Say that others than the handler's thread use the connection."""


DATA = bytes(range(256)) * 4000


@pytest.mark.parametrize("engine", ["thread", "pool"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_two_threads_read_and_write_one_connection(engine, version, serving, dial, trusting):
    """A million bytes each way, at once, with no record damaged."""
    Flood.told = threading.Event()
    context = trusting()
    context.maximum_version = version
    with serving(engine, Flood) as server, dial(server, context=context) as client:
        client.sendall(DATA)  # and then receives, in one thread: it has nobody to give it turns
        got = bytearray()
        while len(got) < len(DATA) and (piece := client.recv(65536)):
            got += piece
        assert bytes(got) == DATA
        assert Flood.told.wait(PATIENCE)
        assert Flood.received == DATA


def test_a_shared_connection_keeps_its_timeouts(serving, dial):
    """A read's timeout ends it, and 0 does not wait; a write of somebody else goes through all the while."""
    seen = []

    class Timed(harken.BaseRequestHandler):
        def handle(self):
            self.request.settimeout(0.05)
            with pytest.raises(TimeoutError):
                self.request.recv(10)
            self.request.settimeout(0.0)
            with pytest.raises(ssl.SSLWantReadError):
                self.request.recv(10)
            self.request.settimeout(None)
            seen.append(self.request.gettimeout())
            self.request.sendall(b"now")
            seen.append(self.request.recv(10))

        def on_drain(self):
            """Say that others than the handler's thread use the connection."""

    with serving("thread", Timed) as server, dial(server) as client:
        assert client.recv(10) == b"now"
        client.sendall(b"well")
        assert client.recv(10) == b""
    assert seen == [None, b"well"]


@pytest.mark.parametrize("engine", [engine for engine in BESIDE if engine not in ("fork", "asyncio")])
def test_a_hook_may_end_our_side_while_the_handler_reads(engine, serving, dial_wire, closed, capfd):
    """``on_drain`` says the last word; the handler reads on, to an end like any other."""
    read = []

    class Until(harken.BaseRequestHandler):
        def handle(self):
            while True:
                read.append(self.request.recv(100))
                if not read[-1]:
                    break
                self.request.sendall(b"go on")

        def on_drain(self):
            self.request.sendall(b"bye")
            self.request.shutdown(socket.SHUT_WR)

    with serving(engine, Until) as server, dial_wire(server) as client:
        client.send(b"first")
        assert client.read() == b"go on"
        drain = threading.Thread(target=server.drain, args=(PATIENCE,))
        drain.start()
        assert client.read_all() == b"bye"
        client.end()
        drain.join(PATIENCE)
        closed.wait(1)
    assert read == [b"first", b""]
    assert "Traceback" not in capfd.readouterr().err


class Unread(harken.StreamRequestHandler):
    """Writes more than its client ever reads, and would say a last word."""

    told: threading.Event

    def handle(self):
        """Write until it is ended."""
        self.wfile.write(DATA * 20)

    def on_timeout(self, which):
        """Write behind that."""
        try:
            self.wfile.write(b"bye")
        finally:
            self.told.set()


class UnreadTask(harken.AsyncStreamRequestHandler):
    """As Unread, in a task."""

    told: threading.Event

    async def handle(self):
        """Write until it is ended."""
        await self.request.sendall(DATA * 20)

    async def on_timeout(self, which):
        """Write behind that."""
        try:
            await self.wfile.write(b"bye")
        finally:
            self.told.set()


@pytest.mark.parametrize("limit", ["write_timeout", "idle_timeout"])
@pytest.mark.parametrize(
    ("engine", "handler"), [*((engine, Unread) for engine in ("green", "green-fallback")), ("asyncio", UnreadTask)]
)
def test_a_last_word_that_nobody_can_hear_is_no_failure(engine, handler, limit, serving, dial, closed, capfd):
    """The peer does not read: the connection is closed already, or the handler is in the middle of a write."""
    handler.told = threading.Event()
    with serving(engine, handler, **{limit: 0.3}) as server, dial(server):
        assert handler.told.wait(PATIENCE)
        (event,) = closed.wait(1)
        assert event.reason == limit
        stats = server.stats
    assert stats()["handler_failed_total"] == 0
    assert "Traceback" not in capfd.readouterr().err
