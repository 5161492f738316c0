"""``handle_request()``: one request without a loop, or none within the timeout."""

import socket

import pytest

from harken.server import TCPServer

from .kit import LOCAL, Upper, ask, connect, in_thread, serving


def test_handle_request_serves_one_without_a_loop():
    """As logging.config.listen does it."""
    with TCPServer(LOCAL, Upper) as server, connect(server) as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        in_thread(lambda: server.handle_request() or True)
        assert client.recv(100) == b"HELLO"


@pytest.mark.parametrize("own, of_socket", [(0.01, None), (None, 0.01), (3600, 0.01), (0.01, 3600), (0, None)])
def test_handle_request_waits_for_the_smaller_timeout(own, of_socket):
    """Of the server's and its socket's; then handle_timeout() is called."""
    with TCPServer(LOCAL, Upper) as server:
        calls = []
        server.timeout = own
        server.socket.settimeout(of_socket)
        server.handle_timeout = lambda: calls.append("timeout")
        in_thread(lambda: server.handle_request() or True)
        assert calls == ["timeout"]


def test_what_went_wrong_before_listening_is_forgotten():
    """handle_request() on a socket that does not listen yet; serving it afterwards works."""
    server = TCPServer(LOCAL, Upper, bind_and_activate=False)
    server.server_bind()
    server.timeout = 0.01
    server.handle_request()
    server.server_activate()
    with serving(server):
        for _ in range(2):
            with connect(server) as client:
                assert ask(client) == b"HELLO"
                client.shutdown(socket.SHUT_WR)
