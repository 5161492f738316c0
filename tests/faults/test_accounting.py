"""What is known of each connection: while it is open, and in the event that tells of its end."""

from __future__ import annotations

import pytest

import harken

from .kit import LOCAL, Echo, connect, exchange, running, seeing, wait_until


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "green"])
def test_bytes_are_counted_and_the_end_tells_them(engine: str) -> None:
    """Exactly, both ways; an open connection says for what it waits."""
    server = harken.TCPServer(LOCAL, Echo, engine=engine)
    with seeing("closed") as seen, running(server):
        with connect(server.server_address) as client:
            exchange(client, b"hello")
            exchange(client, b"again!")
            (info,) = server.connections()
            assert (info.bytes_in, info.bytes_out) == (11, 11)
            wait_until(lambda: server.connections()[0].waits_for == "reading")
        (closed,) = seen.wait("closed")
        assert (closed.bytes_in, closed.bytes_out) == (11, 11)


def test_one_that_is_killed_tells_them_too() -> None:
    """The figures are those of the moment in which it was cut."""
    server = harken.TCPServer(LOCAL, Echo, engine="thread")
    with seeing("closed") as seen, running(server), connect(server.server_address) as client:
        exchange(client, b"hello")
        server.close_connection(server.connections()[0].id)
        (closed,) = seen.wait("closed")
        assert (closed.reason, closed.bytes_in, closed.bytes_out) == ("killed", 5, 5)
