"""``server_close()``: the port is free, and what a closed server says."""

import socket
import threading

import pytest

from harken.errors import LifecycleError
from harken.handlers import BaseRequestHandler
from harken.server import TCPServer

from .kit import LOCAL, PATIENCE, Nothing, Upper, ask, connect, in_thread, serving, stop


def test_server_close_ends_the_loop_of_another_thread():
    """When it returns the port is free, although nobody called shutdown()."""
    server = TCPServer(LOCAL, Upper)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    assert server.wait_ready(PATIENCE)
    in_thread(lambda: server.server_close() or True)
    with socket.create_server(server.server_address):
        pass
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_server_close_twice_is_harmless():
    """As with any file."""
    server = TCPServer(LOCAL, Upper)
    server.server_close()
    server.server_close()


def test_a_closed_server_says_what_to_do():
    """serve_forever() on it is a LifecycleError with a remedy, each time."""
    server = TCPServer(LOCAL, Upper)
    server.server_close()
    for _ in range(2):
        with pytest.raises(LifecycleError, match="socket is closed; make a new server or give it another socket"):
            server.serve_forever()
    stop(server)


def test_a_closed_server_serves_another_socket():
    """Programs hand listeners around."""
    server = TCPServer(LOCAL, Upper)
    server.server_close()
    server.socket = socket.create_server(LOCAL)
    server.server_address = server.socket.getsockname()
    with serving(server), connect(server) as client:
        assert ask(client) == b"HELLO"
        client.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("cycles", [20])
def test_start_and_stop_again_and_again_on_one_port(cycles):
    """The port is free at once each time."""
    port = None
    for _ in range(cycles):
        with serving(TCPServer(("127.0.0.1", port or 0), Nothing)) as server:
            port = server.server_address[1]


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "green"])
def test_a_handler_may_close_its_server(engine):
    """The loop ends without an error, in whichever thread the handler runs."""
    ended = threading.Event()

    class Last(BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"bye")
            self.server.server_close()

    server = TCPServer(LOCAL, Last, engine=engine)

    def serve():
        server.serve_forever()
        ended.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with connect(server) as client:
        assert client.recv(10) == b"bye"
        assert ended.wait(PATIENCE)
    thread.join(PATIENCE)
