"""What programs rely on at the loop's end: how it is stopped, what ends it, and what does not."""

from __future__ import annotations

import ssl
import threading
from typing import Any

import pytest
import trustme
from waiting import wait_until

from .kit import LOCAL, PATIENCE, ask, connect, echo_handler, is_open, join, read_all, run, serving

# --- shutdown ---------------------------------------------------------------------------------------------------------


def test_shutdown_waits_for_the_last_service_actions(impl: Any) -> None:
    """`shutdown` returns only when the loop has left, its running `service_actions` included."""
    inside, release = threading.Event(), threading.Event()
    left = []

    class Slow(impl.TCPServer):
        def service_actions(self) -> None:
            inside.set()
            release.wait(PATIENCE)
            left.append(1)

    with Slow(LOCAL, None) as server:
        loop = run(server.serve_forever, 0.01)
        assert inside.wait(PATIENCE)
        stopper = run(server.shutdown)
        stopper.join(0.2)
        assert stopper.is_alive(), "shutdown() returned while the loop was still running"
        release.set()
        join(stopper)
        assert left
        join(loop)


def test_shutdown_before_serve_forever_ends_both(impl: Any) -> None:
    """A `shutdown` that comes too early makes the later `serve_forever` return at once, and both threads end."""
    with impl.TCPServer(LOCAL, None) as server:
        early = run(server.shutdown)
        wait_until(lambda: server._BaseServer__shutdown_request or not early.is_alive())
        join(run(server.serve_forever), 2)
        join(early)


def test_shutdown_several_times_and_after_the_end(impl: Any) -> None:
    """Second and later calls return at once."""
    with impl.TCPServer(LOCAL, echo_handler(impl)) as server:
        loop = run(server.serve_forever, 0.02)
        assert ask(server.server_address) == b"hello\n"
        stoppers = [run(server.shutdown) for _ in range(3)]
        for stopper in stoppers:
            join(stopper)
        join(loop)
        join(run(server.shutdown), 2)
    join(run(server.shutdown), 2)


def test_shutdown_overridden_with_another_signature(impl: Any) -> None:
    """`shutdown(wait=False)` in a subclass, and one that closes as well, work and are nobody else's business."""

    class Sites(impl.ThreadingTCPServer):
        def shutdown(self, wait: bool = False) -> None:
            self.waited = wait
            super().shutdown()
            self.server_close()

    with Sites(LOCAL, echo_handler(impl)) as server:
        loop = run(server.serve_forever, 0.02)
        assert ask(server.server_address) == b"hello\n"
        server.shutdown(wait=True)
        join(loop)
    assert server.waited
    assert not is_open(server.server_address)


def test_shutdown_from_a_handlers_thread(impl: Any) -> None:
    """A handler of a threading server may call `shutdown`, which returns, and finish its answer."""

    class Quit(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.server.shutdown()
            self.wfile.write(b"stopped")

    with impl.ThreadingTCPServer(LOCAL, Quit) as server:
        loop = run(server.serve_forever, 0.02)
        assert ask(server.server_address, b"") == b"stopped"
        join(loop)


# --- orders in which programs end a server ----------------------------------------------------------------------------


def test_close_then_shutdown(impl: Any) -> None:
    """`server_close` first and `shutdown` after it (websocket-server) ends the loop."""
    server = impl.ThreadingTCPServer(LOCAL, echo_handler(impl))
    loop = run(server.serve_forever, 0.02)
    assert ask(server.server_address) == b"hello\n"
    server.server_close()
    join(run(server.shutdown))
    join(loop)
    assert not is_open(server.server_address)


def test_close_alone_from_another_thread(impl: Any) -> None:
    """`server_close` while the loop runs in another thread (impacket) returns, and the port is free."""
    server = impl.ThreadingTCPServer(LOCAL, echo_handler(impl))
    loop = run(server.serve_forever, 0.02)
    assert ask(server.server_address) == b"hello\n"
    try:
        join(run(server.server_close))
        # A poll in progress keeps stdlib's port until it ends; harken's own tests ask for more.
        wait_until(lambda: not is_open(server.server_address))
    finally:
        server._BaseServer__shutdown_request = True
    join(loop)


@pytest.mark.parametrize("stuck", ["handler", "hook", "handshake"])
def test_close_while_the_loop_waits_for_a_client(impl: Any, stuck: str) -> None:
    """`server_close` from another thread (werkzeug's reloader) does not wait for what keeps the loop."""
    begun = threading.Event()

    class Silent(impl.StreamRequestHandler):
        def handle(self) -> None:
            begun.set()
            self.wfile.write(self.rfile.readline())

    class Alone(impl.ThreadingTCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            self.finish_request(request, client_address)
            self.shutdown_request(request)

    class Shaking(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            begun.set()
            super().do_handshake(block)

    server = (Alone if stuck == "hook" else impl.TCPServer)(LOCAL, Silent)
    if stuck == "handshake":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sslsocket_class = Shaking
        server.socket = context.wrap_socket(server.socket, server_side=True)
    loop = run(server.serve_forever, 0.02)
    with connect(server.server_address) as client:
        assert begun.wait(PATIENCE)
        join(run(server.server_close))
        assert not is_open(server.server_address)
        assert loop.is_alive()
        server._BaseServer__shutdown_request = True
        client.sendall(b"hello\n")
        if stuck != "handshake":
            assert read_all(client) == b"hello\n"
    join(loop)


def test_close_that_shuts_down(impl: Any) -> None:
    """A `server_close` that calls `shutdown` first (jsonrpclib's pooled server) ends everything."""

    class Pooled(impl.ThreadingTCPServer):
        def server_close(self) -> None:
            self.shutdown()
            super().server_close()

    server = Pooled(LOCAL, echo_handler(impl))
    loop = run(server.serve_forever, 0.02)
    assert ask(server.server_address) == b"hello\n"
    join(run(server.server_close))
    join(loop)


def test_serve_forever_whose_finally_closes(impl: Any) -> None:
    """werkzeug's `serve_forever` closes in its `finally`; a later close is harmless."""

    class Tidy(impl.ThreadingTCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            try:
                super().serve_forever(poll_interval=poll_interval)
            except KeyboardInterrupt:
                pass
            finally:
                self.server_close()

    server = Tidy(LOCAL, echo_handler(impl))
    loop = run(server.serve_forever, 0.02)
    assert ask(server.server_address) == b"hello\n"
    server.shutdown()
    join(loop)
    server.server_close()
    assert not is_open(server.server_address)


# --- what ends the loop and what does not -----------------------------------------------------------------------------


def raising_handler(impl: Any, error: type[BaseException]) -> Any:
    """A handler that raises."""

    class Raise(impl.BaseRequestHandler):
        def handle(self) -> None:
            raise error("on purpose")

    return Raise


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_base_exceptions_leave_the_loop(impl: Any, error: type[BaseException]) -> None:
    """On the plain server other errors leave `serve_forever`, after `shutdown_request`, without `handle_error`."""
    calls = []

    class Plain(impl.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            calls.append("handle_error")

        def shutdown_request(self, request: Any) -> None:
            calls.append("shutdown_request")
            super().shutdown_request(request)

    with Plain(LOCAL, raising_handler(impl, error)) as server:
        client = connect(server.server_address)
        with pytest.raises(error):
            server.serve_forever(0.02)
        assert client.recv(1) == b""
        client.close()
        assert calls == ["shutdown_request"]
        assert server._BaseServer__is_shut_down.is_set()


def test_exceptions_go_to_handle_error_and_the_loop_goes_on(impl: Any) -> None:
    """An Exception of a handler goes to `handle_error`; the next connection is served."""
    errors = []

    class Plain(impl.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            import sys

            errors.append(sys.exc_info()[0])

    with serving(Plain(LOCAL, raising_handler(impl, ValueError))) as server:
        assert ask(server.server_address, b"") == b""
        assert ask(server.server_address, b"") == b""
    assert errors == [ValueError, ValueError]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_handle_error_that_raises_leaves_the_loop(impl: Any, error: type[BaseException]) -> None:
    """What `handle_error` raises (werkzeug's passthrough_errors, Paste's ServerExit) leaves `serve_forever`."""

    class Pass(impl.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            self.shutdown_request(request)
            raise error("through")

    with Pass(LOCAL, raising_handler(impl, ValueError)) as server:
        client = connect(server.server_address)
        with pytest.raises(error, match="through"):
            server.serve_forever(0.02)
        client.close()


def test_os_error_of_get_request_is_skipped(impl: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """An OSError of `get_request` is skipped in silence, and the loop goes on."""
    failures = [OSError("odd"), ssl.SSLError("bad handshake"), ConnectionAbortedError("gone")]

    class Flaky(impl.TCPServer):
        def get_request(self) -> Any:
            got = super().get_request()
            if failures:
                got[0].close()
                raise failures.pop()
            return got

    with serving(Flaky(LOCAL, echo_handler(impl))) as server:
        for _ in range(3):
            with connect(server.server_address) as client:
                assert client.recv(1) == b""
        assert ask(server.server_address) == b"hello\n"
    assert capfd.readouterr() == ("", "")


def test_plain_client_on_a_tls_listening_socket(impl: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """On a TLS-wrapped listening socket a client that speaks no TLS is skipped, and the next one is served."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    server = impl.ThreadingTCPServer(LOCAL, echo_handler(impl))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        with connect(server.server_address) as rude:
            rude.sendall(b"GET / HTTP/1.0\r\n\r\n")
            try:
                rude.recv(100)
            except ConnectionResetError:
                pass
        raw = connect(server.server_address)
        with trust.wrap_socket(raw, server_hostname="localhost") as client:
            client.sendall(b"secret\n")
            assert client.recv(100) == b"secret\n"
    assert "Traceback" not in capfd.readouterr().err


# --- several loops on one server --------------------------------------------------------------------------------------


def test_several_serve_forever_in_parallel(impl: Any) -> None:
    """The Cookbook's pre-threaded server: `serve_forever` in many threads on one plain server serves many at once."""
    together = threading.Barrier(3)

    class Meet(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())
            together.wait(PATIENCE)

    server = impl.TCPServer(LOCAL, Meet)
    server.socket.settimeout(0.2)  # a loop that loses the race for a connection must not block in accept
    loops = [run(server.serve_forever, 0.05) for _ in range(4)]
    answers: list[bytes] = []
    clients = [run(lambda: answers.append(ask(server.server_address))) for _ in range(6)]
    for client in clients:
        join(client)
    assert answers == [b"hello\n"] * 6
    for _ in loops:  # each loop that ends takes the request to end with it
        if any(loop.is_alive() for loop in loops):
            join(run(server.shutdown))
    wait_until(lambda: stop_all(server, loops))
    server.server_close()


def stop_all(server: Any, loops: list[threading.Thread]) -> bool:
    """Ask again until every loop has ended; tell whether it is so."""
    if all(not loop.is_alive() for loop in loops):
        return True
    server._BaseServer__shutdown_request = True
    return False
