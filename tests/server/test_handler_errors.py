"""What handlers raise: whose fault it was, what is printed, and what ends the loop."""

import contextlib
import io
import socket
import socketserver

import pytest
from waiting import wait_until

import harken
from harken.server import TCPServer

from .kit import LOCAL, Upper, ask, connect, named, reset, serving


class Failing:
    """A handler that raises."""

    def __init__(self, request, client_address, server):
        raise ZeroDivisionError("handler's fault")


def printed_by(module):
    """Return what ``module``'s plain server prints when a handler fails, with what differs by run left out."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        with module.TCPServer(LOCAL, Failing) as server, connect(server) as client:
            server.handle_request()
            address = repr(client.getsockname())
    lines = printed.getvalue().replace(address, "ADDRESS").splitlines()
    return [line for line in lines if not line.startswith("  ")]


def test_handle_error_prints_what_stdlib_prints():
    """The same lines around the same kind of traceback."""
    assert printed_by(harken) == printed_by(socketserver)
    assert "Exception occurred during processing of request from ADDRESS" in printed_by(harken)


@pytest.mark.parametrize("kind", ["TCPServer", "ThreadingTCPServer", "PoolTCPServer"])
def test_a_peers_fault_is_one_line_and_no_traceback(kind, capfd, told):
    """A client that resets while its handler reads."""
    with serving(getattr(harken, kind)(LOCAL, Upper)) as server:
        client = connect(server)
        assert ask(client) == b"HELLO"
        reset(client)
        wait_until(lambda: named(told, "closed"))
    printed = capfd.readouterr().err
    assert len(printed.splitlines()) == 1
    assert "went away" in printed
    assert named(told, "handler_failed") == []
    assert [event.reason for event in named(told, "closed")] == ["peer_reset"]


def test_a_peer_that_left_while_it_was_written_to_is_no_failed_handler(tmp_path, told, capfd):
    """On a Unix socket a write to a peer that closed is a broken pipe: the peer's doing, in reason and count."""

    class Flood(harken.BaseRequestHandler):
        def handle(self):
            while True:
                self.request.sendall(bytes(65536))

    with serving(harken.ThreadingUnixStreamServer(str(tmp_path / "s"), Flood)) as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            client.recv(10)
        wait_until(lambda: named(told, "closed"))
        assert server.stats()["handler_failed_total"] == 0
    assert named(told, "handler_failed") == []
    assert named(told, "closed")[0].reason in ("peer_closed", "peer_reset")
    assert "Traceback" not in capfd.readouterr().err


def test_a_connection_error_of_somebody_elses_is_the_handlers(told, capfd):
    """The handler's own database is down; its client is still there."""

    class Relay(harken.BaseRequestHandler):
        def handle(self):
            raise ConnectionRefusedError(111, "the database is down")

    with serving(TCPServer(LOCAL, Relay)) as server, connect(server) as client:
        assert client.recv(1) == b""
        wait_until(lambda: named(told, "closed"))
    assert [event.reason for event in named(told, "closed")] == ["handler_failed"]
    assert len(named(told, "handler_failed")) == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # pytest minds SystemExit, too
def test_system_exit_in_a_threads_handler_ends_that_connection_only(capfd):
    """The loop goes on."""

    class Leaving(harken.BaseRequestHandler):
        def handle(self):
            if self.request.recv(10) == b"exit":
                raise SystemExit(3)
            self.request.sendall(b"here")

    with serving(harken.ThreadingTCPServer(LOCAL, Leaving)) as server:
        with connect(server) as client:
            client.sendall(b"exit")
            assert client.recv(10) == b""
        with connect(server) as client:
            assert ask(client) == b"here"


class Odd(BaseException):
    """What is no Exception, as gevent.Timeout and what pytest.fail() raises are."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("engine", ["thread", "pool", "fork", "green", "asyncio"])
@pytest.mark.parametrize("heard", [False, True], ids=["unheard", "heard"])
def test_what_is_no_exception_is_a_failed_handlers_too(engine, heard, request):
    """It counts as one and is told of, though ``handle_error`` does not hear of it; who leaves has not failed."""
    if heard:
        request.getfixturevalue("told")
    handled = []

    class Server(harken.TCPServer):
        def handle_error(self, request, client_address):
            handled.append(client_address)

    class Raising(harken.BaseRequestHandler):
        def handle(self):
            raise Odd if self.request.recv(10) == b"odd" else SystemExit

    class AsyncRaising(harken.AsyncRequestHandler):
        async def handle(self):
            raise Odd if await self.request.recv(10) == b"odd" else SystemExit

    with serving(Server(LOCAL, AsyncRaising if engine == "asyncio" else Raising, engine=engine)) as server:
        for word in (b"odd", b"exit"):
            with connect(server) as client:
                client.sendall(word)
                assert client.recv(10) == b""
        wait_until(lambda: server.stats()["closed_total"] == {"handler_failed": 1, "handler_returned": 1})
        assert server.stats()["handler_failed_total"] == 1
    assert handled == []


def test_keyboard_interrupt_leaves_the_loop_of_a_plain_server():
    """As in stdlib, after the request was shut down."""

    class Interrupted(harken.BaseRequestHandler):
        def handle(self):
            raise KeyboardInterrupt

    with TCPServer(LOCAL, Interrupted) as server, connect(server) as client:
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()
        assert client.recv(1) == b""


def test_what_ctrl_c_cuts_is_not_told_as_the_clients_doing(capfd):
    """Its connection may be closed under a handler that has just begun; as if by Ctrl-C."""

    class Server(harken.ThreadingTCPServer):
        def process_request(self, request, client_address):
            super().process_request(request, client_address)
            raise KeyboardInterrupt

    with Server(LOCAL, Upper) as server, connect(server) as client:
        with pytest.raises(KeyboardInterrupt):
            server.handle_request()
        assert client.recv(1) == b""
    assert capfd.readouterr().err == ""
