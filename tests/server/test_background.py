"""``background()``: a server that serves while a block runs."""

import socket
import socketserver
import threading

import pytest

import harken
from harken.errors import ConfigError, LifecycleError
from harken.server import TCPServer

from .kit import LOCAL, PATIENCE, Upper, ask, connect


def test_background_is_ready_when_entered_and_closed_when_left():
    """The server is what the block gets."""
    server = harken.ThreadingTCPServer(LOCAL, Upper)
    with harken.background(server) as entered:
        assert entered is server
        with connect(server) as client:
            assert ask(client) == b"HELLO"
    assert server.socket.fileno() == -1
    assert server.stats()["state"] == "closed"


def test_background_ends_with_idle_clients():
    """They are cut, since nobody waits for them."""
    server = harken.ThreadingTCPServer(LOCAL, Upper)
    with harken.background(server):
        client = connect(server)
        ask(client)
    assert client.recv(1) == b""
    client.close()


def test_background_raises_what_serving_raised():
    """A server that cannot serve fails in the caller's thread, at once."""
    server = TCPServer(LOCAL, Upper)
    server.server_close()
    with pytest.raises(LifecycleError, match="closed"), harken.background(server):
        pytest.fail("must not be entered")


def test_background_works_in_a_thread_that_has_served():
    """A program serves, stops, and then runs its server in the background."""
    server = TCPServer(LOCAL, Upper)
    server.shutdown()
    server.serve_forever()
    with harken.background(server, timeout=2.0), connect(server) as client:
        assert ask(client) == b"HELLO"
        client.shutdown(socket.SHUT_WR)


def test_background_passes_on_what_the_block_raised():
    """And closes all the same."""
    server = TCPServer(LOCAL, Upper)
    with pytest.raises(LookupError, match="block's fault"), harken.background(server):
        raise LookupError("block's fault")
    assert server.socket.fileno() == -1


@pytest.mark.parametrize("engine", ["inline", "thread", "green", "asyncio"])
def test_background_is_not_entered_by_a_server_that_was_shut_down(engine):
    """Its loop ends at once: nobody would serve in the block, and no ten seconds are waited for it."""
    server = harken.TCPServer(LOCAL, Upper, engine=engine)
    server.shutdown()
    with pytest.raises(LifecycleError, match="shut down before it served"), harken.background(server):
        pytest.fail("must not be entered")
    assert not server.wait_ready(0)
    server.server_close()


def test_a_server_that_cannot_serve_is_not_ready():
    """``wait_ready`` says so also after ``background`` has tried."""
    server = TCPServer(LOCAL, Upper)
    server.server_close()
    with pytest.raises(LifecycleError, match="closed"), harken.background(server):
        pytest.fail("must not be entered")
    assert not server.wait_ready(0)


def test_a_server_that_has_died_is_not_ready():
    """Its loop raised while it served; the block's end passes that on."""

    class Dies(TCPServer):
        def service_actions(self):
            if self.stats()["accepted_total"]:
                raise LookupError("on purpose")

    server = Dies(LOCAL, Upper)
    with pytest.raises(LookupError, match="on purpose"), harken.background(server):
        assert server.wait_ready(0)
        with connect(server) as client:
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    assert not server.wait_ready(0)


@pytest.mark.parametrize("server", [harken.TCPServer, None, object()], ids=["a class", "None", "an object"])
def test_background_refuses_what_is_no_server_of_harkens(server):
    """At once, and nothing is served."""
    with pytest.raises(ConfigError, match="is no server of harken's"), harken.background(server):
        pass


def test_background_refuses_a_server_of_the_standard_library():
    """It has none of the verbs; without the refusal it would be waited for, and go on serving for ever."""
    server = socketserver.TCPServer(LOCAL, socketserver.BaseRequestHandler)
    with server, pytest.raises(ConfigError, match="put a mix-in of harken's in front"), harken.background(server):
        pass


def test_background_says_when_a_server_is_not_ready_in_time():
    """And how long it waited."""

    class Sleeping(harken.TCPServer):
        def serve_forever(self, poll_interval=0.5):
            going.wait(PATIENCE)

    going = threading.Event()
    server = Sleeping(LOCAL, Upper)
    with pytest.raises(LifecycleError, match=r"not ready within 0\.02 s"), harken.background(server, timeout=0.02):
        pytest.fail("must not be entered")
    going.set()
    server.server_close()
