"""What a server tells of itself: events, statistics, connections."""

import contextlib
import os
import socket

import pytest
from waiting import wait_until

import harken
from harken.server import TCPServer

from .kit import LOCAL, Upper, ask, connect, named, serving


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"])
@pytest.mark.parametrize("reason", ["handler_returned", "peer_closed", "handler_failed", "killed"])
def test_each_opened_connection_is_closed_once_with_its_reason(kind, reason, told, capfd):
    """One ``closed`` for one ``opened``, of the same connection, on every engine."""

    class Handler(harken.BaseRequestHandler):
        def handle(self):
            order = self.request.recv(10)
            if order == b"fail":
                raise ZeroDivisionError
            self.request.sendall(b"ok")
            if order == b"stay":
                self.request.recv(1)

    with serving(getattr(harken, kind)(LOCAL, Handler)) as server:
        with connect(server) as client:
            if reason == "handler_failed":
                client.sendall(b"fail")
                assert client.recv(10) == b""
            elif reason == "handler_returned":
                assert ask(client, b"x") == b"ok"
                assert client.recv(10) == b""
            else:
                assert ask(client, b"stay") == b"ok"
                if reason == "peer_closed":
                    client.shutdown(socket.SHUT_WR)  # a forked child has a copy of the client's descriptor
                else:
                    (info,) = server.connections()
                    assert server.close_connection(info.id)
                    with contextlib.suppress(ConnectionError):
                        assert client.recv(10) == b""
        wait_until(lambda: named(told, "closed"))
        assert server.stats()["closed_total"] == {reason: 1}
        assert server.connections() == []
    (opened,), (closed,) = named(told, "opened"), named(told, "closed")
    assert opened.connection == closed.connection is not None
    assert (closed.reason, closed.peer.address) == (reason, "127.0.0.1")
    assert closed.seconds >= 0


def test_stats_tell_the_figures():
    """Every key of the contract, before, while and after serving."""
    server = harken.ThreadingTCPServer(LOCAL, Upper)
    assert server.stats()["state"] == "new"
    with serving(server):
        with connect(server) as client:
            ask(client)
            stats = server.stats()
            assert stats == {
                "state": "serving",
                "address": f"tcp://127.0.0.1:{server.server_address[1]}",
                "engine": "thread",
                "open": 1,
                "accepted_total": 1,
                "rejected_total": 0,
                "rejected_by_reason": {},
                "handler_failed_total": 0,
                "closed_total": {},
                "buffered_bytes": 0,
                "stalled_total": {},
                "paused": False,
                "process": os.getpid(),
            }
        wait_until(lambda: server.stats()["open"] == 0)
        assert server.stats()["closed_total"] == {"peer_closed": 1}
    assert server.stats()["state"] == "closed"


def test_connections_are_described_oldest_first():
    """Id, peer and times of each."""
    with serving(harken.ThreadingTCPServer(LOCAL, Upper)) as server:
        with connect(server) as first, connect(server) as second:
            ask(first)
            ask(second)
            infos = server.connections()
            assert [info.peer.port for info in infos] == [first.getsockname()[1], second.getsockname()[1]]
            assert len({info.id for info in infos}) == 2
            assert infos[0].opened_at <= infos[1].opened_at + 0.001  # by two clocks, read one after the other


def test_close_connection_of_nobody_says_so():
    """False for an id that is not open."""
    with serving(TCPServer(LOCAL, Upper)) as server:
        assert server.close_connection("nobody") is False


def test_listening_is_told_with_address_and_engine(told):
    """Once for each time that a server begins to serve."""
    with serving(TCPServer(LOCAL, Upper)) as server:
        (event,) = named(told, "listening")
    assert event.address == f"tcp://127.0.0.1:{server.server_address[1]}"
    assert event.engine == "inline"


def test_children_that_end_while_no_loop_turns_are_noticed(told):
    """A closed server that did not wait for them knows, when it is asked, that they have gone."""

    class Server(harken.ForkingTCPServer):
        block_on_close = False

    server = Server(LOCAL, Upper)
    with serving(server), connect(server) as client:
        assert ask(client) == b"HELLO"
        server.shutdown()
        client.shutdown(socket.SHUT_WR)  # the child has a copy of the client's descriptor
        wait_until(lambda: server.stats()["open"] == 0)
        assert server.connections() == []
    assert [event.reason for event in named(told, "closed")] == ["peer_closed"]
