"""Deadlines on every engine: each ends what it is meant to end, in time, for the right reason, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

import harken
from harken.errors import ConfigError

from .kit import LOCAL, PATIENCE, Seen, connect, ends, exchange, receive, running, seeing

ENGINES = ("inline", "thread", "pool", "green", "fork", "asyncio")
BESIDE = tuple(engine for engine in ENGINES if engine != "inline")  # which serve others meanwhile
HUBS = ("green", "asyncio")
SPAN = 0.6  # seconds of the deadlines here
# How exact a deadline is: 50 ms or 2 %; and what a busy machine adds to what a test can see of it.
EARLY, LATE = 0.05, 2.0
BIG = 50_000_000  # more than any kernel buffers


class Words(harken.StreamRequestHandler):
    """Answers a line as it is told to."""

    def handle(self) -> None:
        """Read lines."""
        for line in self.rfile:
            if line == b"big\n":
                self.wfile.write(bytes(BIG))
            elif line == b"work\n":
                threading.Event().wait((8 if self.server.patient else 2) * SPAN)
            self.wfile.write(line)


class Polite(Words):
    """Has a last word."""

    def on_timeout(self, which: str) -> None:
        """Say it."""
        self.wfile.write(b"bye: %s\n" % which.encode())


class AsyncWords(harken.AsyncStreamRequestHandler):
    """Answers a line as it is told to, as a coroutine."""

    async def handle(self) -> None:
        """Read lines."""
        async for line in self.rfile:
            if line == b"big\n":
                await self.request.sendall(bytes(BIG))
            elif line == b"work\n":
                await asyncio.sleep((8 if self.server.patient else 2) * SPAN)
            await self.wfile.write(line)


class AsyncPolite(AsyncWords):
    """Has a last word."""

    async def on_timeout(self, which: str) -> None:
        """Say it."""
        await self.wfile.write(b"bye: %s\n" % which.encode())


COROUTINES = {Words: AsyncWords, Polite: AsyncPolite}


@contextlib.contextmanager
def serving(
    engine: str, handler: Any = Words, kind: Any = harken.TCPServer, where: Any = LOCAL, **settings: Any
) -> Iterator[tuple[Any, Seen]]:
    """Serve; give the server and its events."""
    handler = COROUTINES.get(handler, handler) if engine == "asyncio" else handler
    server = kind(where, handler, engine=engine, **settings)
    server.patient = False
    with seeing("opened", "closed", "timed_out") as seen, running(server):
        seen.engine = engine
        yield server, seen


@contextlib.contextmanager
def client_of(server: Any) -> Iterator[socket.socket]:
    """Give a client; at the end it is shut, since forked children hold copies of it."""
    with connect(server.server_address) as client:
        yield client
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def expect(seen: Seen, which: str, began: float, span: float = SPAN) -> None:
    """Wait for the end of the one connection, and check the events that tell of it.

    Raises:
        AssertionError: another deadline, at another time.
    """
    (timed_out,) = seen.wait("timed_out")
    ended = time.monotonic() - began
    assert timed_out.which == which
    assert span - EARLY <= timed_out.seconds <= ended + EARLY
    # A child's end is told by its exit, and a handler that works on is given a second.
    late = LATE + (1.0 if seen.engine == "fork" and which == "handler_timeout" else 0.0)
    assert span - EARLY <= ended <= span + late
    (closed,) = seen.wait("closed")
    assert closed.connection == timed_out.connection
    assert (closed.reason, closed.detail) == (("killed", which) if which == "handler_timeout" else (which, None))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_silent_connection_is_idle(engine: str) -> None:
    """It ends when no byte has moved for the time: the handler reads the end, and the client too."""
    with serving(engine, idle_timeout=SPAN) as (server, seen), client_of(server) as client:
        exchange(client, b"hello\n")
        began = time.monotonic()
        assert ends(client) == "closed"
        expect(seen, "idle_timeout", began)


@pytest.mark.parametrize("engine", ENGINES)
def test_bytes_either_way_keep_a_connection_from_being_idle(engine: str) -> None:
    """Words now and then, for three times the time: it lives, and dies when they stop."""
    with serving(engine, idle_timeout=SPAN) as (server, seen), client_of(server) as client:
        end = time.monotonic() + 3 * SPAN
        while time.monotonic() < end:
            exchange(client, b"hello\n")
            began = time.monotonic()
            time.sleep(SPAN / 4)
        assert seen.of("timed_out") == []
        assert ends(client) == "closed"
        expect(seen, "idle_timeout", began)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("deadline", ["idle_timeout", "read_timeout", "write_timeout", "lifetime", "handler_timeout"])
def test_on_a_unix_socket_too(engine: str, deadline: str, tmp_path: Path) -> None:
    """Where the kernel tells no times, harken's own stamps do."""
    where = str(tmp_path / "s")
    with serving(engine, kind=harken.UnixStreamServer, where=where, **{deadline: SPAN}) as (server, seen):
        with client_of(server) as client:
            server.patient = deadline == "handler_timeout"
            exchange(client, b"hello\n")
            if deadline == "idle_timeout":
                time.sleep(SPAN / 2)
                exchange(client, b"hello\n")
            began = time.monotonic()
            if deadline == "handler_timeout":
                client.sendall(b"x\n" if engine in HUBS else b"work\n")
                assert receive(client, 2) == b"x\n" if engine in HUBS else True
                if engine in HUBS:  # its only thread must not be kept: a request that never ends is begun instead
                    client.sendall(b"never ends")
                began = time.monotonic()
            elif deadline == "write_timeout":
                client.sendall(b"big\n")
            (timed_out,) = seen.wait("timed_out")
            assert timed_out.which == deadline
            assert time.monotonic() - began >= (0 if deadline == "lifetime" else SPAN - EARLY)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dribble_is_one_read(engine: str) -> None:
    """A byte now and then never completes the line: ``read_timeout`` ends that; a timeout of the socket would not."""
    with serving(engine, read_timeout=SPAN) as (server, seen), client_of(server) as client:
        exchange(client, b"hello\n")
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while not seen.of("timed_out") and time.monotonic() < began + PATIENCE:
                client.send(b"a")
                time.sleep(SPAN / 10)
        expect(seen, "read_timeout", began)


@pytest.mark.parametrize("engine", ["thread", "pool", "green"])
def test_a_handler_that_computes_does_not_read(engine: str) -> None:
    """``read_timeout`` counts while the handler reads, not while it works."""
    with serving(engine, Slow, read_timeout=SPAN) as (server, seen), client_of(server) as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        assert seen.of("timed_out") == []


@pytest.mark.parametrize("engine", ENGINES)
def test_lifetime_ends_the_liveliest(engine: str) -> None:
    """Whatever it does."""
    with serving(engine, lifetime=SPAN) as (server, seen), client_of(server) as client:
        began = time.monotonic()
        with contextlib.suppress(OSError, AssertionError):
            while time.monotonic() < began + PATIENCE:
                exchange(client, b"hello\n")
        expect(seen, "lifetime", began)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "green"])
def test_a_request_that_takes_too_long(engine: str) -> None:
    """Counted from its first byte; the time before, and requests that are answered, do not count."""
    with serving(engine, handler_timeout=SPAN) as (server, seen), client_of(server) as client:
        time.sleep(SPAN)
        end = time.monotonic() + 2 * SPAN
        while time.monotonic() < end:
            exchange(client, b"hello\n")
            time.sleep(SPAN / 5)
        assert seen.of("timed_out") == []
        began = time.monotonic()
        client.sendall(b"work\n")
        assert ends(client) == "closed"
        expect(seen, "handler_timeout", began)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_request_that_never_ends(engine: str) -> None:
    """A slow request is as long as it takes to come, whoever is slow."""
    with serving(engine, handler_timeout=SPAN) as (server, seen), client_of(server) as client:
        exchange(client, b"hello\n")
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while not seen.of("timed_out") and time.monotonic() < began + PATIENCE:
                client.send(b"a")
                time.sleep(SPAN / 10)
        expect(seen, "handler_timeout", began)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slow_datagram_is_reported(engine: str) -> None:
    """Its handler cannot be ended; the event says so, once."""
    server = harken.UDPServer(LOCAL, SlowDatagram, engine=engine, handler_timeout=SPAN / 2)
    with seeing("timed_out") as seen, running(server), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        for _ in range(2):
            client.sendto(b"quick", server.server_address)
            assert client.recv(10) == b"quick"
        if engine != "fork":  # a child's events are its own
            client.sendto(b"slow", server.server_address)
            assert client.recv(10) == b"slow"
            (event,) = seen.wait("timed_out")
            assert (event.which, event.peer.port) == ("handler_timeout", client.getsockname()[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_peer_that_never_reads_is_closed(engine: str) -> None:
    """The handler's write ends, what the kernel had buffered is thrown away, and memory stayed bounded."""
    with serving(engine, write_timeout=SPAN) as (server, seen), client_of(server) as client:
        client.sendall(b"big\n")
        select.select([client], [], [], PATIENCE)
        (timed_out,) = seen.wait("timed_out")
        assert timed_out.which == "write_timeout"
        assert timed_out.seconds >= SPAN - EARLY
        (closed,) = seen.wait("closed")
        assert closed.reason == "write_timeout"
        assert ends(client) == "reset"


@pytest.mark.parametrize("engine", ["thread", "green", "fork"])
def test_a_peer_that_reads_slowly_is_not_closed(engine: str) -> None:
    """It takes some of it within every span; the whole takes many."""
    with serving(engine, write_timeout=SPAN) as (server, seen), client_of(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.sendall(b"big\n")
        end = time.monotonic() + 4 * SPAN
        while time.monotonic() < end:
            assert client.recv(65536)
            time.sleep(SPAN / 10)
        assert seen.of("timed_out") == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("which", ["idle_timeout", "read_timeout", "lifetime"])
def test_a_handler_may_have_a_last_word(engine: str, which: str) -> None:
    """``on_timeout`` is told which deadline it is, what it writes arrives, then comes the end."""
    with serving(engine, Polite, **{which: SPAN}) as (server, seen), client_of(server) as client:
        exchange(client, b"hello\n")
        assert receive(client, 100) == b"bye: %s\n" % which.encode()
        assert seen.wait("closed")[0].reason == which


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_a_last_word_that_takes_for_ever_is_cut(engine: str) -> None:
    """A hook that hangs, or raises, does not keep the connection open."""
    with serving(engine, Rambling, idle_timeout=SPAN) as (server, seen), client_of(server) as client:
        began = time.monotonic()
        assert ends(client) == "closed"
        assert time.monotonic() - began < SPAN + 2.0
        assert seen.wait("closed")[0].reason == "idle_timeout"


@pytest.mark.parametrize("engine", BESIDE)
def test_deadlines_change_on_the_running_server(engine: str) -> None:
    """They hold for the connections that are open (in children: for new ones), and can be taken off."""
    with serving(engine) as (server, seen):
        with client_of(server) as client:
            exchange(client, b"hello\n")
            server.configure(idle_timeout=SPAN)
            with client_of(server) as later:
                assert ends(later) == "closed"
            if engine != "fork":
                assert ends(client) == "closed"
            seen.wait("timed_out", 1 if engine == "fork" else 2)
        server.configure(idle_timeout=None)
        before = len(seen.of("timed_out"))
        with client_of(server) as client:
            time.sleep(1.5 * SPAN)
            exchange(client, b"hello\n")
        assert len(seen.of("timed_out")) == before
        with pytest.raises(ConfigError):
            server.configure(idle_timeout=-1)


@pytest.mark.parametrize("engine", BESIDE)
def test_many_end_in_time_and_the_good_one_beside_them_is_served(engine: str) -> None:
    """A hundred silent ones end within a short time of each other; a lively one goes on; nothing is left."""
    count = 30 if engine == "fork" else 100
    with serving(engine, idle_timeout=SPAN, pool_size=count + 5, max_children=count + 5) as (server, seen):
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(client_of(server)) for _ in range(count)]
            good = stack.enter_context(client_of(server))
            while len(seen.of("timed_out")) < count:
                exchange(good, b"hello\n")
                time.sleep(0.02)
            exchange(good, b"hello\n")
            late = [event.seconds - SPAN for event in seen.of("timed_out")]
            assert min(late) >= -0.02
            assert max(late) < LATE
            assert all(ends(client) == "closed" for client in silent)
        wait_until(lambda: not server.connections())


def test_no_thread_is_left_when_nobody_is_watched() -> None:
    """The reaper's thread comes with the first deadline and goes with the last."""
    with (
        serving("thread", idle_timeout=PATIENCE, write_timeout=PATIENCE) as (server, _seen),
        client_of(server) as client,
    ):
        exchange(client, b"hello\n")
        assert any(thread.name == "harken-reaper" for thread in threading.enumerate())
    wait_until(lambda: all(thread.name != "harken-reaper" for thread in threading.enumerate()))


def test_a_server_without_deadlines_pays_for_none() -> None:
    """No thread, no stamps, no change of class."""
    with serving("thread") as (server, _seen), client_of(server) as client:
        exchange(client, b"hello\n")
        (record,) = server._harken.connections
        assert record.stamps is None
        assert type(record.request).recv is socket.socket.recv
        assert server._harken.bounds.deadlines is None


class Slow(harken.BaseRequestHandler):
    """Works, then answers."""

    def handle(self) -> None:
        """Work for longer than a read may take."""
        data = self.request.recv(10)
        wait = getattr(harken.green, "sleep", time.sleep) if self.server._harken.engine_name == "green" else time.sleep
        wait(2 * SPAN)
        self.request.sendall(data)


class SlowDatagram(harken.DatagramRequestHandler):
    """Answers, slowly if told to."""

    def handle(self) -> None:
        """Answer."""
        if self.packet == b"slow":
            time.sleep(SPAN)
        self.wfile.write(self.packet)


class Rambling(Words):
    """Does not come to an end."""

    def on_timeout(self, which: str) -> None:
        """Wait for what does not come."""
        if self.server._harken.engine_name == "green":
            harken.green.sleep(PATIENCE)
        else:
            threading.Event().wait(1.5)  # longer than it is given, shorter than a test waits for threads to go
