"""The hooks that programs override: in stdlib's order, and no error of theirs ends the loop."""

import contextlib
import socket
import threading

import pytest
from waiting import wait_until

from harken.server import TCPServer

from .kit import LOCAL, Nothing, Upper, ask, connect, named, serving


def test_the_hooks_run_in_stdlibs_order():
    """Once each, on the instance."""
    order = []

    def note(name):
        def method(self, *args):
            order.append(name)
            return getattr(TCPServer, name)(self, *args)

        return method

    hooks = "get_request verify_request process_request finish_request shutdown_request close_request".split()
    noting = type("Noting", (TCPServer,), {name: note(name) for name in hooks})
    with noting(LOCAL, Nothing) as server, connect(server):
        server.handle_request()
    assert order == hooks


def test_what_verify_request_raises_goes_to_handle_error(capfd):
    """And does not end the loop, as it does in stdlib."""

    class Server(TCPServer):
        def verify_request(self, request, client_address):
            raise LookupError("no such client")

    with serving(Server(LOCAL, Upper)) as server:
        for _ in range(2):
            with connect(server) as client:
                assert client.recv(100) == b""
    assert capfd.readouterr().err.count("LookupError: no such client") == 2


def test_a_refused_request_is_closed_and_counted(told):
    """verify_request() says no: an event with the reason, and no ``opened`` or ``closed``."""

    class Server(TCPServer):
        def verify_request(self, request, client_address):
            return False

    with serving(Server(LOCAL, Upper)) as server, connect(server) as client:
        assert client.recv(100) == b""
        wait_until(lambda: not server.connections())
        assert server.stats()["rejected_total"] == 1
    assert [event.reason for event in named(told, "rejected")] == ["verify_request"]
    assert named(told, "opened") == named(told, "closed") == []


@pytest.mark.parametrize(
    "error", [ConnectionAbortedError(103, "aborted"), TimeoutError("slow"), OSError("odd")], ids=repr
)
def test_an_error_of_get_request_is_skipped(error):
    """Nothing that a client does ends the loop."""

    class Server(TCPServer):
        first = True

        def get_request(self):
            request, address = super().get_request()
            if self.first:
                self.first = False
                request.close()
                raise error
            return request, address

    with serving(Server(LOCAL, Upper)) as server:
        with connect(server) as client, contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
        with connect(server) as client:
            assert ask(client) == b"HELLO"
            client.shutdown(socket.SHUT_WR)


def test_service_actions_runs_each_turn_in_the_loops_thread():
    """At least every poll_interval, and after each request."""
    calls = []

    class Server(TCPServer):
        def service_actions(self):
            calls.append(threading.get_ident())

    with serving(Server(LOCAL, Nothing), poll_interval=0.005):
        wait_until(lambda: len(calls) > 3)
    assert len(set(calls)) == 1
    assert calls[0] != threading.get_ident()
