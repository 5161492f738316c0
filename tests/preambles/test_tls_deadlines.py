"""Deadlines under TLS: what is read counts, and what waits is timed, as on a plain connection."""

import contextlib
import socket
import threading

import pytest
from waiting import wait_until

import harken

from .tls_kit import BESIDE, ENGINES, PATIENCE, plain


class Taciturn(harken.BaseRequestHandler):
    """Takes what comes, and never answers."""

    def handle(self):
        while self.request.recv(100):
            pass


class TaciturnInto(harken.BaseRequestHandler):
    """As Taciturn, into a buffer."""

    def handle(self):
        while self.request.recv_into(bytearray(100)):
            pass


class TaciturnTask(harken.AsyncRequestHandler):
    """As Taciturn, in a task."""

    async def handle(self):
        while await self.request.recv(100):
            pass


@pytest.mark.parametrize(
    ("engine", "handler"),
    [
        *((engine, handler) for engine in BESIDE if engine != "fork" for handler in (Taciturn, TaciturnInto)),
        ("asyncio", TaciturnTask),
    ],
)
def test_what_is_received_begins_a_request(engine, handler, serving, dial, closed):
    """It is counted, and who is not answered in time is timed out."""
    with serving(engine, handler, handler_timeout=0.5) as server, dial(server) as client:
        client.sendall(b"half a request")
        (event,) = closed.wait(1)
        assert (event.detail, event.requests) == ("handler_timeout", 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_handshake_begins_no_request(engine, serving, trusting, closed):
    """Nor does a PROXY header: who sends nothing more has no request that could take too long."""
    trusted = {"proxy": "v1", "proxy_from": ["127.0.0.1"]}
    with serving(engine, Taciturn, handler_timeout=0.1, lifetime=0.4, **trusted) as server:
        with socket.create_connection(server.server_address) as wire:
            wire.sendall(b"PROXY UNKNOWN\r\n")
            with trusting().wrap_socket(wire, server_hostname="localhost") as client:
                (event,) = closed.wait(1)
                assert event.reason == "lifetime"
                socket.socket.shutdown(client, socket.SHUT_RDWR)


def test_a_handshake_begins_no_request_where_deadlines_came_while_it_waited(serving, dial, trusting):
    """A connection waits for a thread of the pool when the first deadline is set."""
    serves = threading.Semaphore(0)

    class Announced(Taciturn):
        def handle(self):
            serves.release()
            super().handle()

    with serving("pool", Announced, pool_size=1) as server:
        with dial(server), socket.create_connection(server.server_address) as waiting:
            assert serves.acquire(timeout=PATIENCE)
            wait_until(lambda: len(server.connections()) == 2)
            server.configure(handler_timeout=60)
            secured = trusting().wrap_socket(waiting, server_hostname="localhost", do_handshake_on_connect=False)
        with secured:
            secured.do_handshake()
            assert serves.acquire(timeout=PATIENCE)
            assert [info.requests for info in server.connections()] == [0]


def test_who_waits_for_a_thread_does_not_leave_for_another(serving, dial, trusting, closed):
    """Only who has one makes room by leaving, deadlines or not."""
    pool = {"pool_size": 1, "pool_queue": 1, "overload": "shed", "idle_timeout": 300}
    with serving("pool", **pool) as server, dial(server) as served, plain(server) as waiting:
        wait_until(lambda: [info for info in server.connections()[1:] if info.idle_seconds > 0.1])
        served.sendall(b"hello")
        assert served.recv(5) == b"hello"
        with plain(server):
            event = closed.wait(1)[0]
            assert (event.reason, event.peer.port) == ("shed", served.getsockname()[1])
            with trusting().wrap_socket(waiting, server_hostname="localhost") as client:
                client.sendall(b"hello")
                assert client.recv(5) == b"hello"


@pytest.mark.parametrize(
    ("engine", "handler"), [*((engine, Taciturn) for engine in BESIDE if engine != "fork"), ("asyncio", TaciturnTask)]
)
def test_a_deadline_that_comes_later_holds_from_the_next_read_on(engine, handler, serving, dial, closed):
    """For connections that are open already."""
    with serving(engine, handler) as server, dial(server) as client:
        wait_until(lambda: [info for info in server.connections() if info.waits_for != "preamble"])
        server.configure(read_timeout=0.1)
        client.sendall(b"x")
        (event,) = closed.wait(1)
        assert event.reason == "read_timeout"


class Lines(harken.StreamRequestHandler):
    """Reads lines."""

    def handle(self):
        while self.rfile.readline():
            pass


class LinesAfterStartTls(Lines):
    """As Lines, from the middle of a connection on."""

    def handle(self):
        self.start_tls()
        super().handle()


class LinesTask(harken.AsyncStreamRequestHandler):
    """As Lines, in a task."""

    async def handle(self):
        while await self.rfile.readline():
            pass


def dribble(client, closed):
    """Send a line without an end, until the connection is closed; return the event that tells."""

    def is_closed():
        with contextlib.suppress(OSError):
            client.sendall(b".")
        return closed.events

    wait_until(is_closed)
    return closed.events[0]


@pytest.mark.parametrize(
    ("engine", "handler"),
    [*((engine, Lines) for engine in ("thread", "green", "green-asking", "green-fallback")), ("asyncio", LinesTask)],
)
def test_a_line_that_dribbles_in_is_one_read(engine, handler, serving, dial, closed):
    """``read_timeout`` ends it, however often something comes."""
    with serving(engine, handler, read_timeout=0.3) as server, dial(server) as client:
        assert dribble(client, closed).reason == "read_timeout"


@pytest.mark.parametrize(
    ("limit", "ending"), [("read_timeout", "reason"), ("handler_timeout", "detail")], ids=["read", "handler"]
)
@pytest.mark.parametrize("engine", ["thread", "green", "green-asking", "green-fallback"])
def test_deadlines_hold_after_start_tls(engine, limit, ending, pki, serving, dial, closed):
    """The connection that goes on under TLS is timed as the one before."""
    tls = harken.TLS(pki.cert, mode="starttls")
    with serving(engine, LinesAfterStartTls, tls=tls, **{limit: 0.3}) as server, dial(server) as client:
        client.sendall(b"half a line")
        (event,) = closed.wait(1)
        assert getattr(event, ending) == limit


class EndThenRead(harken.BaseRequestHandler):
    """Ends its side, and reads on."""

    def handle(self):
        self.request.shutdown(socket.SHUT_WR)
        self.request.recv(1)


@pytest.mark.parametrize("engine", [engine for engine in BESIDE if engine != "fork"])
def test_read_timeout_holds_after_our_end(engine, serving, dial, closed):
    """Who has ended its side and reads on does not wait for ever."""
    with serving(engine, EndThenRead, read_timeout=0.3) as server, dial(server):
        (event,) = closed.wait(1)
        assert event.reason == "read_timeout"
