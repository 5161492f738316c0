"""A door that closes: who waits is let in, nobody new comes, and then the listener has gone."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import pytest

import harken
from harken import closing as room
from harken.closing import Closing
from harken.serving import serving_of

PATIENCE = 10.0
LOCAL = ("127.0.0.1", 0)


class Hello(harken.BaseRequestHandler):
    """Says hello."""

    def handle(self) -> None:
        """Say it."""
        self.request.sendall(b"hello")


@pytest.fixture
def server():
    """A server that does not serve yet."""
    with harken.ThreadingTCPServer(LOCAL, Hello) as made:
        yield made


def dial(server: Any) -> socket.socket:
    """Return a client that is in the backlog."""
    return socket.create_connection(server.server_address, PATIENCE)


def wait_empty(closing: Closing) -> None:
    """Look at the door as a drain does, until nobody waits there."""
    end = time.monotonic() + PATIENCE
    while not closing.is_empty(time.monotonic()):
        assert time.monotonic() < end, "somebody always waits"
        time.sleep(room.DOOR_SECONDS)


def test_who_waits_is_let_in_where_no_loop_runs(server):
    """In the thread that closes; each is served before the listener goes."""
    serving = serving_of(server)
    _ = serving.engine  # as one that has served has
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(server)) for _ in range(5)]
        closing = Closing(serving)
        closing.shut_out()
        wait_empty(closing)
        closing.close()
        assert [client.recv(10) for client in clients] == [b"hello"] * 5
    assert closing.closed
    assert serving.books.counts["accepted"] == 5
    with pytest.raises(ConnectionRefusedError):
        dial(server)


def test_the_loop_lets_them_in_where_one_runs(server):
    """Also when it was suspended: nobody who is in the backlog is reset."""
    loop = threading.Thread(target=server.serve_forever, args=(30.0,), daemon=True)
    loop.start()
    assert server.wait_ready(PATIENCE)
    server.suspend()
    serving = serving_of(server)
    with dial(server) as client:
        closing = Closing(serving)
        serving.lifecycle.move("drain")
        closing.shut_out()
        wait_empty(closing)
        assert client.recv(10) == b"hello"
        server.shutdown()
        closing.close()
    loop.join(PATIENCE)
    assert closing.closed


def test_nobody_new_comes_where_the_door_is_ours_alone(server):
    """Connections that begin meanwhile are not answered; they are on nobody's conscience."""
    serving = serving_of(server)
    _ = serving.engine
    closing = Closing(serving)
    closing.shut_out()
    if not closing._rest:
        pytest.skip("needs a kernel with socket filters")
    with socket.socket() as late:
        late.setblocking(False)
        late.connect_ex(server.server_address)
        wait_empty(closing)
        assert serving.books.counts["accepted"] == 0
        closing.close()


def test_a_closed_door_is_empty(server):
    """Whoever closed it: there is nothing to be done."""
    server.socket.close()
    closing = Closing(serving_of(server))
    closing.shut_out()
    assert closing.closed
    assert closing.is_empty(time.monotonic())
    closing.close()


def test_a_server_without_a_socket_has_no_door():
    """A test's double, for one."""
    server = object.__new__(harken.TCPServer)
    closing = Closing(serving_of(server))
    assert closing.closed
    assert closing.is_empty(time.monotonic())
