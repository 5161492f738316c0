"""Checks of an engine: datagrams."""

from __future__ import annotations

import socket

from harken.testing._census import wait_until
from harken.testing._check import DATAGRAMS, EngineCheck, Make, expect, on
from harken.testing._rig import PATIENCE, Draining, Rig, bounded, rig

__all__ = ["CHECKS"]


@on(*DATAGRAMS)
def datagram_echo(make: Make, transport: str) -> None:
    """Each datagram is a request, and each client gets its own answers."""
    with rig(make, transport) as tested:
        clients = [tested.client() for _ in range(5)]
        for turn in range(10):
            for number, client in enumerate(clients):
                client.send(b"client %d, turn %d" % (number, turn))
            for number, client in enumerate(clients):
                answer = client.recv(1000)
                expect(answer == b"client %d, turn %d" % (number, turn), f"client {number} got {answer!r}")


@on(*DATAGRAMS)
def datagram_handler_raises(make: Make, transport: str) -> None:
    """A handler that raises is reported once, and the next datagram is served."""
    with rig(make, transport) as tested:
        client = tested.client()
        client.send(b"fail")
        _expect_echo(tested, client)
        expect(tested.failures(1) == 1, "handle_error() was not called once for a handler that raised")


@on(*DATAGRAMS)
def datagram_shutdown(make: Make, transport: str) -> None:
    """``shutdown()`` wakes the loop, and a datagram that came after it is served by the next ``serve_forever()``."""
    with rig(make, transport) as tested:
        client = tested.client()
        _expect_echo(tested, client)
        bounded("shutdown()", tested.server.shutdown)
        tested.expect_ended()
        client.send(b"later")
        tested.start()
        expect(client.recv(100) == b"later", "a datagram that waited between two serve_forever() was lost")


@on(*DATAGRAMS)
def datagram_drain(make: Make, transport: str) -> None:
    """A drain waits for handlers, which have the server's socket to answer on until they end."""
    with rig(make, transport) as tested:
        client = tested.client()
        client.send(b"hold")
        expect(client.recv(100) == b"hold", "a handler did not start")
        drainer = Draining(tested, PATIENCE)
        expect(wait_until(lambda: tested.serving.draining), "drain() did not begin")
        tested.ended_without_door()
        tested.open_gate()
        report = drainer.report()
        expect(drainer.running == 0, f"{drainer.running} handlers were said to run that had ended")
        expect(report.seconds < PATIENCE / 2, "drain() waited although no handler ran")
        expect(client.recv(100) == b"let go", "an answer was lost that a handler sent during a drain")
        expect(tested.server.socket.fileno() < 0, "the socket was not closed at the end of a drain")


def _expect_echo(tested: Rig, client: socket.socket) -> None:
    client.send(b"hello")
    expect(client.recv(100) == b"hello", f"a datagram was not answered by {tested.server.server_address!r}")


CHECKS: tuple[EngineCheck, ...] = (datagram_echo, datagram_handler_raises, datagram_shutdown, datagram_drain)
