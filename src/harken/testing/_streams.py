"""Checks of an engine: what passes over connections, and what breaks them."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable

from harken.testing._census import wait_until
from harken.testing._check import STREAMS, EngineCheck, Make, expect, on
from harken.testing._clients import reset
from harken.testing._rig import PATIENCE, Rig, receive, rig
from harken.testing._wires import WIRES

__all__ = ["CHECKS"]

CLIENTS, ROUNDS = 16, 10
SHORT_CONNECTIONS, SHORT_CLIENTS = 1000, 4
# The same where each is a process: a fork copies the page tables, some ten milliseconds of a large test process's.
SHORT_CHILDREN = 80
# More than the kernel's buffers of both ends take (tcp_wmem and tcp_rmem grow to some 4 + 6 MB, but not at once).
MANY_BYTES = 8 << 20


def at_once(tested: Rig, count: int, work: Callable[[int], None]) -> None:
    """Run ``work(number)`` in ``count`` threads; one after the other where the process forks beside TLS of its own.

    A thread that begins or ends holds locks of OpenSSL's: a child that is forked meanwhile would wait for ever.

    Raises:
        AssertionError: one of them raised, or did not end.
    """
    if tested.forks_beside_tls:
        for number in range(count):
            work(number)
        return
    wrong: list[str] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - told in the caller's thread
            wrong.append(f"client {number}: {error!r}")

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 3 * PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    expect(not any(thread.is_alive() for thread in threads), "a client was not done in time")
    expect(not wrong, "; ".join(wrong[:3]))


@on(*STREAMS, behind=WIRES)
def echo(make: Make, transport: str) -> None:
    """Many clients at once, and each gets its own answers."""
    with rig(make, transport) as tested:

        def work(number: int) -> None:
            with tested.client() as client:
                for turn in range(ROUNDS):
                    data = f"client {number}, turn {turn}; ".encode() * 50
                    client.sendall(b"echo %d\n" % len(data) + data)
                    expect(receive(client, len(data)) == data, f"client {number} got another answer")

        at_once(tested, CLIENTS, work)
        tested.wait_closed(CLIENTS)


@on(*STREAMS, behind=WIRES)
def half_close(make: Make, transport: str) -> None:
    """A client that ends its side still gets all that the handler writes after that."""
    with rig(make, transport) as tested, tested.client("say_after_end 1000000") as client:
        client.shutdown(socket.SHUT_WR)
        expect(len(receive(client, 2_000_000)) == 1_000_000, "what was written after the client's end is lost")


@on(*STREAMS)
def slow_reader(make: Make, transport: str) -> None:
    """A client that reads slowly gets everything, and keeps nobody else from being served."""
    with rig(make, transport) as tested, tested.client(f"say {MANY_BYTES}") as client:
        got = len(client.recv(1000))
        others = tested.client("echo 2")
        others.sendall(b"ok")
        while got < MANY_BYTES:
            part = len(client.recv(200_000))
            expect(part, f"the connection ended after {got} bytes of {MANY_BYTES}")
            got += part
            time.sleep(0.002)
        client.close()  # an engine that serves one at a time gets to the other now
        expect(receive(others, 2) == b"ok", "another client was not served")


@on(*STREAMS, behind=WIRES)
def handler_raises(make: Make, transport: str) -> None:
    """A handler that raises ends its own connection; ``handle_error`` hears of it once, and others go on."""
    with rig(make, transport) as tested:
        for _ in range(3):
            with tested.client("fail") as client:
                expect(client.recv(1) == b"", "a connection whose handler raised was not closed")
            tested.expect_serves()
        expect(tested.failures(3) == 3, "handle_error() was not called once for each handler that raised")
        tested.wait_closed(6)


@on("tcp")
def short_connections(make: Make, transport: str) -> None:
    """A thousand short connections (80 children), one after the other from a few clients, are all served."""
    with rig(make, transport) as tested:
        count = SHORT_CHILDREN if tested.engine.in_child else SHORT_CONNECTIONS

        def work(_number: int) -> None:
            tested.expect_serves(count // SHORT_CLIENTS)

        at_once(tested, SHORT_CLIENTS, work)
        tested.wait_closed(count)


@on(*STREAMS, behind=WIRES)
def reset_in_the_middle(make: Make, transport: str) -> None:
    """Clients that vanish while a handler reads or writes disturb nobody."""
    with rig(make, transport) as tested:
        for command in ("hold", "say 3000000", "echo 1000000") * 2:
            client = tested.client(command)
            if command.startswith("echo"):
                client.sendall(bytes(1000))
            client.recv(5)
            reset(client)
        tested.expect_serves()


@on(*STREAMS)
def reset_after_connect(make: Make, transport: str) -> None:
    """Clients that reset at once, some of them before accept, disturb nobody."""
    with rig(make, transport) as tested:
        for _ in range(30):
            reset(tested.client())
        tested.expect_serves()


@on(*STREAMS)
def reset_before_accept(make: Make, transport: str) -> None:
    """Connections that were reset while they waited in the backlog disturb nobody."""
    with rig(make, transport) as tested:
        tested.server.suspend()
        for _ in range(10):
            reset(tested.client("hold"))
        tested.server.resume()
        tested.expect_serves()


@on("tcp", behind=WIRES)
def reasons(make: Make, transport: str) -> None:
    """Each opened connection is closed once, for the reason that is true."""
    for reason, end in _ENDS.items():
        with rig(make, transport) as tested:
            end(tested)
            tested.expect_closed(reason)


def _returned(tested: Rig) -> None:
    expect(tested.client("leave").recv(1) == b"", "the connection was not closed after its handler")


def _failed(tested: Rig) -> None:
    tested.client("fail").recv(1)


def _peer_closed(tested: Rig) -> None:
    tested.held()[0].close()


def _peer_reset(tested: Rig) -> None:
    reset(tested.held()[0])


def _killed(tested: Rig) -> None:
    client = tested.held()[0]
    tested.server.close_connection(tested.server.connections()[0].id)
    expect_end(client)


def _shutdown(tested: Rig) -> None:
    client = tested.held()[0]
    tested.serving.cut("shutdown")
    expect_end(client)


_ENDS = {
    "handler_returned": _returned,
    "handler_failed": _failed,
    "peer_closed": _peer_closed,
    "peer_reset": _peer_reset,
    "killed": _killed,
    "shutdown": _shutdown,
}


def expect_end(client: socket.socket) -> None:
    """Demand that the server ends a connection, by FIN or by RST; under TLS an alert may say so too."""
    try:
        rest = client.recv(1)
    except (ConnectionResetError, ssl.SSLError):
        return
    expect(rest == b"", "a connection that was cut still brings data")


@on(*STREAMS, behind=WIRES)
def close_connection(make: Make, transport: str) -> None:
    """``connections()`` lists who is served, and ``close_connection()`` wakes a handler blocked in ``recv``."""
    with rig(make, transport) as tested:
        clients = tested.held(3)
        infos = {info.id: info for info in tested.server.connections()}
        expect(set(infos) >= {event.connection for event in tested.of("opened")}, "connections() lacks an open one")
        oldest = next(iter(infos))
        expect((infos[oldest].process == os.getpid()) != tested.engine.in_child, "connections() names another process")
        expect(tested.server.close_connection(oldest), "close_connection() did not know an open connection")
        expect(not tested.server.close_connection("nobody"), "close_connection() knew a connection that is none")
        expect_end(clients[0])
        for client in clients[1:]:
            client.sendall(b"still here")  # the others' handlers read on
            client.close()
        tested.expect_serves()
        wait_until(lambda: any(event.connection == oldest for event in tested.of("closed")))
        found = [event.reason for event in tested.of("closed") if event.connection == oldest]
        expect(found == ["killed"], f"the connection that was killed was closed for {found}")


CHECKS: tuple[EngineCheck, ...] = (
    echo,
    half_close,
    slow_reader,
    handler_raises,
    short_connections,
    reset_in_the_middle,
    reset_after_connect,
    reset_before_accept,
    reasons,
    close_connection,
)
