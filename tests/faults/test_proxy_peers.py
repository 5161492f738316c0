"""Peers of a server behind proxies that are silent, slow, or send anything but a header."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from waiting import wait_until

import harken

from .kit import LOCAL, PATIENCE, Echo, connect, running, seeing

SILENT = 300
SLOW = 100
HEADER = b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 443\r\n"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


class AsyncEcho(harken.AsyncRequestHandler):
    """Sends back what it gets."""

    async def handle(self) -> None:
        """Echo."""
        while data := await self.request.recv(65536):
            await self.request.sendall(data)


ENGINES = [("thread", Echo), ("green", Echo), ("asyncio", AsyncEcho)]


def behind_proxies(engine: str, handler: Any, **settings: Any) -> Any:
    """Make a server that believes this machine's proxies."""
    return harken.TCPServer(LOCAL, handler, engine=engine, proxy="any", proxy_from=["127.0.0.0/8"], **settings)


def ask(server: Any) -> float:
    """Have one good client served; return how long that took."""
    begun = time.monotonic()
    with connect(server.server_address) as client:
        client.sendall(HEADER + b"hello")
        assert client.recv(100) == b"hello"
    return time.monotonic() - begun


@pytest.mark.parametrize("engine, handler", ENGINES)
def test_silent_and_slow_peers_delay_nobody(engine: str, handler: Any) -> None:
    """Hundreds say nothing, others a byte now and then: a good client is served at once, and they are closed."""
    server = behind_proxies(engine, handler, preamble_timeout=1.0)
    with seeing("closed") as seen, running(server), contextlib.ExitStack() as crowd:
        silent = [crowd.enter_context(connect(server.server_address)) for _ in range(SILENT)]
        slow = [crowd.enter_context(connect(server.server_address)) for _ in range(SLOW)]
        begun = time.monotonic()
        for byte in HEADER[:5]:
            for client in slow:
                with contextlib.suppress(ConnectionError):  # its time is over, on a machine as slow as that
                    client.send(bytes((byte,)))
            assert ask(server) < PATIENCE / 3
        wait_until(lambda: len(seen.of("closed")) >= SILENT + SLOW + 5)
        assert time.monotonic() - begun < PATIENCE
        reasons = [event.reason for event in seen.of("closed")]
        assert reasons.count("preamble_failed") == SILENT + SLOW
        for client in (*silent, *slow):
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        ask(server)
        wait_until(lambda: not server.connections())


@pytest.mark.parametrize("engine, handler", ENGINES)
def test_peers_that_reset_in_the_middle_of_their_header(engine: str, handler: Any) -> None:
    """Wherever the reset comes, it is a failed preamble, no handler runs, and nothing is left."""
    server = behind_proxies(engine, handler)
    with seeing("closed", "handler_failed") as seen, running(server):
        for cut in range(len(HEADER)):
            with connect(server.server_address) as client:
                client.sendall(HEADER[:cut])
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        closed = seen.wait("closed", len(HEADER))
        assert {event.reason for event in closed} <= {"preamble_failed", "peer_reset"}
        assert seen.of("handler_failed") == []
        ask(server)


@pytest.fixture(scope="module", params=ENGINES, ids=lambda param: param[0])
def fed(request: pytest.FixtureRequest) -> Any:
    """A server of each engine that is fed whatever hypothesis thinks of."""
    server = behind_proxies(*request.param, preamble_timeout=0.2)
    with running(server):
        yield server


@pytest.mark.no_leak_check  # the server is the module's
@given(
    head=st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", HEADER[:-2], SIGNATURE, SIGNATURE + b"\x21\x11"]),
    rest=st.binary(max_size=60),
)
@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_whatever_comes_is_served_or_closed(fed: Any, head: bytes, rest: bytes) -> None:
    """No bytes at the door make a handler fail, keep a connection open, or harm the next client."""
    with connect(fed.server_address) as client:
        with contextlib.suppress(OSError):  # refused already
            client.sendall(head + rest)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while client.recv(1000):
                pass
    assert ask(fed) < PATIENCE
    wait_until(lambda: not fed.connections())
    assert fed.stats()["handler_failed_total"] == 0
