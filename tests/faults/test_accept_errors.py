"""Each error of accept(2), injected into a running server, has the effect that the acceptor's table promises."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import threading
import time
from typing import Any

import pytest

import harken
from harken.acceptor import ACCEPT_ERRORS, FIRST_PAUSE, Verdict
from harken.testing import Faulty

from .kit import LOCAL, PATIENCE, Echo, connect, ends, exchange, fate, running, seeing


def of(verdict: Verdict) -> list[str]:
    """Return the names of the errors that the table judges so."""
    return sorted({errno.errorcode[number] for number, found in ACCEPT_ERRORS.items() if found is verdict})


def faulty(*errors: str) -> harken.ThreadingTCPServer:
    """Return a server whose next accepts fail."""
    server = harken.ThreadingTCPServer(LOCAL, Echo)
    server.socket = Faulty(server.socket, accept=errors)
    return server


def exchange_at_last(address: Any) -> None:
    """Connect until a connection is not reset, and send something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionResetError), connect(address) as client:
            exchange(client)
            return
    pytest.fail("every connection was reset")


@pytest.mark.parametrize("name", [*of(Verdict.NEXT), *of(Verdict.STOP)])
def test_error_of_one_peer_does_not_disturb_the_next(name: str) -> None:
    """After three such errors the client that waits is served at once, and no pause was made."""
    with (
        seeing("paused") as seen,
        running(faulty(name, name, name)) as server,
        connect(server.server_address) as client,
    ):
        exchange(client)
        assert seen == []


@pytest.mark.parametrize("name", of(Verdict.PAUSE))
def test_our_own_trouble_pauses_and_resets_the_queue(name: str) -> None:
    """The listener pauses, what waits is reset, and after the pause clients are served: one event each way."""
    with seeing("paused", "resumed") as seen, running(faulty(name)) as server:
        assert fate(server.server_address) == "reset"
        seen.wait("paused")  # until then whoever comes is reset too
        began = time.monotonic()
        with connect(server.server_address) as client:
            exchange(client)
        assert time.monotonic() - began > FIRST_PAUSE / 2
        (resumed,) = seen.wait("resumed")
        (paused,) = seen.of("paused")
        assert name in paused.reason
        assert resumed.shed == 1
        assert resumed.seconds >= FIRST_PAUSE


def test_pauses_double_and_are_told_once() -> None:
    """Four failures in a row double the pause each time, but make one event each way."""
    with seeing("paused", "resumed") as seen, running(faulty(*["EMFILE"] * 4)) as server:
        exchange_at_last(server.server_address)
        (resumed,) = seen.wait("resumed")
        assert len(seen.of("paused")) == 1
        assert resumed.shed >= 4
        assert resumed.seconds >= FIRST_PAUSE * (1 + 2 + 4 + 8)


def test_open_connections_are_served_during_a_pause() -> None:
    """While the listener pauses, a client that is in goes on."""
    with seeing("paused") as seen, running(faulty()) as server, connect(server.server_address) as client:
        exchange(client)
        server.socket._accept_errors.extend([errno.EMFILE] * 2)
        assert fate(server.server_address) == "reset"
        assert seen.wait("paused")
        exchange(client)


def test_a_number_that_the_table_lacks_pauses() -> None:
    """An error that nobody has foreseen becomes a pause and not a spin."""
    assert errno.EIO not in ACCEPT_ERRORS
    with seeing("paused") as seen, running(faulty("EIO")) as server:
        assert fate(server.server_address) == "reset"
        exchange_at_last(server.server_address)
        assert len(seen.of("paused")) == 1


@pytest.mark.parametrize("name", of(Verdict.FAIL))
def test_a_listener_that_is_none_ends_the_loop_loudly(name: str) -> None:
    """``serve_forever`` raises the error; the server can be closed after it."""
    server = faulty(name)
    caught: list[OSError] = []

    def serve() -> None:
        try:
            server.serve_forever(30.0)
        except OSError as error:
            caught.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert server.wait_ready(PATIENCE)
    with connect(server.server_address):
        thread.join(PATIENCE)
    server.server_close()
    assert [error.errno for error in caught] == [getattr(errno, name)]


@pytest.mark.parametrize("error", [ssl.SSLError(1, "bad hello"), TimeoutError("timed out"), OSError("no number")])
def test_error_from_above_accept_is_that_connections_trouble(error: OSError) -> None:
    """What a TLS listener or an overridden ``get_request`` raises costs one connection, whatever its number says."""

    class Server(harken.ThreadingTCPServer):
        errors = [error] * 2

        def get_request(self) -> Any:
            request, address = super().get_request()
            if self.errors:
                request.close()
                raise self.errors.pop()
            return request, address

    with seeing("paused") as seen, running(Server(LOCAL, Echo)) as server:
        for _ in range(2):
            assert fate(server.server_address) == "closed"
        with connect(server.server_address) as client:
            exchange(client)
        assert seen == []


def test_accept_error_on_a_unix_listener() -> None:
    """The table holds for every transport: a Unix listener pauses too."""
    path = f"\0harken-{time.monotonic_ns()}"
    server = harken.ThreadingUnixStreamServer(path, Echo)
    server.socket = Faulty(server.socket, accept=["ENFILE"])
    with seeing("paused", "resumed") as seen, running(server), socket.socket(socket.AF_UNIX) as unlucky:
        unlucky.settimeout(PATIENCE)
        unlucky.connect(path)
        ends(unlucky)
        exchange_at_last(path)
        assert len(seen.wait("resumed")) == len(seen.of("paused")) == 1
