"""How servers are made: engines by keyword, constructors that fail, and those that were skipped."""

import os
import socket
import threading

import pytest
from waiting import wait_until

import harken
from harken.errors import ConfigError
from harken.server import BaseServer, TCPServer

from .kit import LOCAL, PATIENCE, Upper, ask, connect, in_thread, serving


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork"])
def test_an_engine_by_keyword_serves_and_leaves_nothing(engine):
    """``TCPServer(…, engine=…)`` has its threads and children gone when it is closed, as the mix-ins have."""
    with serving(TCPServer(LOCAL, Upper, engine=engine)) as server:
        assert server.stats()["engine"] == engine
        with connect(server) as client:
            assert ask(client) == b"HELLO"
            client.shutdown(socket.SHUT_WR)


def test_a_fork_server_by_keyword_reaps_a_child_that_outlives_the_loop():
    """The child still works when the loop has ended; closing the server leaves no zombie."""
    server = TCPServer(LOCAL, Upper, engine="fork")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with connect(server) as client:
        assert ask(client) == b"HELLO"
        server.shutdown()
        thread.join(PATIENCE)
        client.shutdown(socket.SHUT_WR)
        in_thread(lambda: server.server_close() or True)


def test_an_unknown_engine_is_refused_with_the_nearest_name():
    """At construction, before anything is bound."""
    with pytest.raises(ConfigError, match=r"engine = 'thred' \(keyword argument\).*did you mean 'thread'\?"):
        TCPServer(LOCAL, Upper, engine="thred")


def test_a_failed_constructor_leaves_no_socket():
    """An address in use; nothing_leaks watches."""
    with TCPServer(LOCAL, Upper) as first:
        for _ in range(3):
            with pytest.raises(OSError, match="in use"):
                TCPServer(first.server_address, Upper)


@pytest.mark.parametrize("kind", [TCPServer, harken.ThreadingTCPServer, harken.PoolTCPServer, harken.ForkingTCPServer])
def test_methods_work_where_init_was_skipped(kind, capfd):
    """Unit tests make servers by ``__new__`` and call one method at a time."""
    server = kind.__new__(kind)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert server.verify_request(ours, "address") is True
        server.RequestHandlerClass = lambda request, address, made: request.sendall(b"made")
        server.finish_request(ours, "address")
        assert theirs.recv(100) == b"made"
        try:
            raise LookupError("it happened")
        except LookupError:
            server.handle_error(ours, "address")
        server.shutdown_request(ours)
        assert theirs.recv(100) == b""
        assert ours.fileno() == -1
    assert "LookupError: it happened" in capfd.readouterr().err


def test_a_base_server_with_nothing_of_a_socket():
    """``fileno`` and ``get_request`` of the program's own, and BaseServer.__init__ alone."""

    class Pipes(BaseServer):
        def __init__(self):
            BaseServer.__init__(self, "nowhere", lambda request, address, server: server.got.append((request, address)))
            self.reader, self.writer = os.pipe()
            self.got = []

        def fileno(self):
            return self.reader

        def get_request(self):
            return os.read(self.reader, 1), "pipe"

    server = Pipes()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    os.write(server.writer, b"ab")
    wait_until(lambda: len(server.got) == 2)
    server.shutdown()
    thread.join(PATIENCE)
    assert server.got == [(b"a", "pipe"), (b"b", "pipe")]
    os.close(server.reader)
    os.close(server.writer)
