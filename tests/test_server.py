"""Servers from outside: shutdown, verbs, errors, and what must never end the loop."""

import contextlib
import io
import os
import signal
import socket
import socketserver
import struct
import threading
import time

import pytest

import harken
from harken import events
from harken.errors import ConfigError, LifecycleError
from harken.server import BaseServer, TCPServer, UDPServer

LOCAL = ("127.0.0.1", 0)
PATIENCE = 10.0  # seconds


class Upper(harken.BaseRequestHandler):
    """Answers in capitals."""

    def handle(self):
        while data := self.request.recv(1024):
            self.request.sendall(data.upper())


class Nothing(harken.BaseRequestHandler):
    """Does nothing and returns."""


@contextlib.contextmanager
def serving(server, **keywords):
    """Serve in a thread; shut down and close when left."""
    thread = threading.Thread(target=server.serve_forever, kwargs=keywords, daemon=True)
    thread.start()
    assert server.wait_ready(PATIENCE)
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "serve_forever() did not return"
        for info in server.connections():
            server.close_connection(info.id)
        server.server_close()


def connect(server):
    """Return a client."""
    return socket.create_connection(server.server_address[:2], PATIENCE)


def ask(client, data=b"hello"):
    """Send and receive once."""
    client.sendall(data)
    return client.recv(1024)


def reset(client):
    """Close with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def wait_until(condition):
    """Wait, within bounds, for what no event announces."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.002)


def stop(server):
    """Call shutdown() with a bound on the time."""
    in_thread(lambda: server.shutdown() or True)


def in_thread(function, *args):
    """Run with a bound on the time; a deadlock fails instead of hanging."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert results, f"{function.__name__} did not return"
    return results[0]


@pytest.fixture
def told():
    """Every event of this test, in order."""
    seen = []
    end = events.subscribe(seen.append)
    yield seen
    end()


def named(told, name):
    """Return the events of one name."""
    return [event for event in told if event.name == name]


# ── shutdown ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shutdown_before_serving_makes_serving_return_at_once():
    """Both calls return, in whichever order they come."""
    with TCPServer(LOCAL, Upper) as server:
        stop(server)
        in_thread(lambda: server.serve_forever() or True)


def test_shutdown_does_not_wait_for_the_poll_interval():
    """The loop is woken; nothing polls."""
    with TCPServer(LOCAL, Upper) as server:
        thread = threading.Thread(target=server.serve_forever, args=(3600,), daemon=True)
        thread.start()
        assert server.wait_ready(PATIENCE)
        began = time.monotonic()
        stop(server)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert time.monotonic() - began < PATIENCE / 2


def test_shutdown_twice_and_after_the_end():
    """Each returns, also from two threads at once."""
    server = TCPServer(LOCAL, Upper)
    with serving(server):
        threads = [threading.Thread(target=server.shutdown, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
        stop(server)
    stop(server)


def test_shutdown_from_a_handler_of_a_plain_server():
    """It runs in the serving thread, which stdlib deadlocks; here the loop ends after the handler."""

    class Stopping(harken.BaseRequestHandler):
        def handle(self):
            self.server.shutdown()
            self.request.sendall(b"stopped")

    with TCPServer(LOCAL, Stopping) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with connect(server) as client:
            assert client.recv(100) == b"stopped"
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_shutdown_from_a_handler_of_a_threading_server():
    """It waits for the loop, not for itself."""

    class Stopping(harken.BaseRequestHandler):
        def handle(self):
            self.server.shutdown()
            self.request.sendall(b"stopped")

    with harken.ThreadingTCPServer(LOCAL, Stopping) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with connect(server) as client:
            assert client.recv(100) == b"stopped"
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_shutdown_from_a_signal_handler(run_program):
    """In the thread that serves: the loop ends, and what stands after serve_forever() runs."""
    program = """
import harken, os, signal, threading
server = harken.TCPServer(("127.0.0.1", 0), harken.BaseRequestHandler)
signal.signal(signal.SIGTERM, lambda *_: server.shutdown())
threading.Thread(target=lambda: (server.wait_ready(10), os.kill(os.getpid(), signal.SIGTERM))).start()
server.serve_forever(3600)
server.server_close()
print("ended")
"""
    process = run_program("-c", program)
    assert process.communicate(timeout=20) == ("ended\n", "")


def test_a_shutdown_after_the_end_stops_the_next_serving_too():
    """As in stdlib, the wish is kept until a loop has heeded it."""
    with TCPServer(LOCAL, Upper) as server:
        stop(server)
        in_thread(lambda: server.serve_forever() or True)
        with serving(server), connect(server) as client:
            assert ask(client) == b"HELLO"
            client.shutdown(socket.SHUT_WR)


def test_a_server_serves_again_after_shutdown():
    """The listener stays open between two loops, and what came meanwhile is served by the second."""
    with TCPServer(LOCAL, Upper) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert server.wait_ready(PATIENCE)
        server.shutdown()
        thread.join(PATIENCE)
        with connect(server) as client:
            client.sendall(b"early")
            with serving(server):
                assert client.recv(100) == b"EARLY"
                client.shutdown(socket.SHUT_WR)


def test_the_thread_that_served_can_wait_for_the_next_to_be_ready():
    """wait_ready() waits in every thread, also in one that served before."""
    with TCPServer(LOCAL, Upper) as server:
        server.shutdown()
        server.serve_forever()
        timer = threading.Timer(0.05, server.serve_forever)
        timer.start()
        try:
            assert server.wait_ready(PATIENCE)
        finally:
            server.shutdown()
            timer.join(PATIENCE)


def test_two_threads_may_serve_one_server():
    """Each connection is served once, and one shutdown ends both."""

    class Thread(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(str(threading.get_ident()).encode())

    with TCPServer(LOCAL, Thread) as server:
        threads = [threading.Thread(target=server.serve_forever, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            with connect(server) as client:
                assert int(client.recv(100)) in {thread.ident for thread in threads}
        stop(server)
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
        assert server.stats()["accepted_total"] == 20


# ── closing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_a_failed_constructor_leaves_no_socket():
    """An address in use; nothing_leaks watches."""
    with TCPServer(LOCAL, Upper) as first:
        for _ in range(3):
            with pytest.raises(OSError, match="in use"):
                TCPServer(first.server_address, Upper)


# ── engines by keyword ───────────────────────────────────────────────────────────────────────────────────────────────


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


# ── handle_request ───────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── hooks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── errors of handlers ───────────────────────────────────────────────────────────────────────────────────────────────


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


def test_keyboard_interrupt_leaves_the_loop_of_a_plain_server():
    """As in stdlib, after the request was shut down."""

    class Interrupted(harken.BaseRequestHandler):
        def handle(self):
            raise KeyboardInterrupt

    with TCPServer(LOCAL, Interrupted) as server, connect(server) as client:
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()
        assert client.recv(1) == b""


# ── events and figures ───────────────────────────────────────────────────────────────────────────────────────────────


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


# ── suspend and resume ───────────────────────────────────────────────────────────────────────────────────────────────


def test_suspended_connections_wait_in_the_backlog():
    """Open ones go on; resume() takes the waiting ones."""
    with serving(harken.ThreadingTCPServer(LOCAL, Upper)) as server, connect(server) as before:
        assert ask(before) == b"HELLO"
        server.suspend()
        assert server.stats()["state"] == "suspended"
        with connect(server) as waiting:
            waiting.sendall(b"hello")
            assert ask(before) == b"HELLO"
            waiting.settimeout(0.05)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            server.resume()
            waiting.settimeout(PATIENCE)
            assert waiting.recv(100) == b"HELLO"


def test_suspending_twice_is_harmless_and_resuming_is_not():
    """resume() of a server that serves is a mistake and says so."""
    with serving(TCPServer(LOCAL, Upper)) as server:
        server.suspend()
        server.suspend()
        server.resume()
        with pytest.raises(LifecycleError, match=r"cannot resume a server that is serving; call suspend\(\) first"):
            server.resume()


def test_suspending_what_does_not_serve_says_so():
    """With the remedy."""
    with TCPServer(LOCAL, Upper) as server, pytest.raises(LifecycleError, match=r"call serve_forever\(\) first"):
        server.suspend()


def test_a_suspended_server_shuts_down():
    """And serves again afterwards."""
    server = TCPServer(LOCAL, Upper)
    with serving(server):
        server.suspend()
        server.shutdown()
    server = TCPServer(LOCAL, Upper)
    with serving(server), connect(server) as client:
        assert ask(client) == b"HELLO"
        client.shutdown(socket.SHUT_WR)


def test_room_in_the_pool_does_not_end_a_suspension():
    """The pool was full and gets room while the server is suspended: nobody is accepted until resume()."""
    server = harken.PoolTCPServer(LOCAL, Upper, pool_size=1, pool_queue=0)
    with serving(server, poll_interval=0.01), connect(server) as first:
        assert ask(first) == b"HELLO"
        with connect(server) as second:
            wait_until(lambda: server.stats()["paused"])
            server.suspend()
            first.close()
            wait_until(lambda: server.stats()["closed_total"])
            second.sendall(b"hello")
            second.settimeout(0.1)
            with pytest.raises(TimeoutError):
                second.recv(1)
            server.resume()
            second.settimeout(PATIENCE)
            assert second.recv(100) == b"HELLO"


# ── drain ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_drain_waits_for_open_connections(told):
    """The port is free at once, and the connection ends by itself."""
    with serving(harken.ThreadingTCPServer(LOCAL, Upper)) as server:
        client = connect(server)
        ask(client)
        timer = threading.Timer(0.05, client.close)
        timer.start()
        report = in_thread(server.drain, PATIENCE)
        timer.join()
    assert (report.finished, report.left, report.cut, report.connections) == (1, 0, 0, [])
    assert 0 < report.seconds < PATIENCE
    assert [event.open for event in named(told, "draining")] == [1]
    assert named(told, "drained")[0].report is report


@pytest.mark.parametrize("kind", ["ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"])
def test_a_drain_cuts_what_is_left_at_its_deadline(kind, told):
    """The report tells whom, and the reason is ``drain_deadline``."""
    with serving(getattr(harken, kind)(LOCAL, Upper)) as server, connect(server) as client:
        ask(client)
        (info,) = server.connections()
        report = in_thread(server.drain, 0.05)
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
    assert (report.finished, report.left, report.cut) == (0, 0, 1)
    assert [cut.id for cut in report.connections] == [info.id]
    assert [event.reason for event in named(told, "closed")] == ["drain_deadline"]


def test_a_drain_frees_the_port_at_once():
    """Before the connections have ended."""
    server = harken.ThreadingTCPServer(LOCAL, Upper)
    with serving(server), connect(server) as client:
        ask(client)
        drain = threading.Thread(target=server.drain, args=(PATIENCE,), daemon=True)
        drain.start()
        wait_until(lambda: server.socket.fileno() < 0)
        with pytest.raises(ConnectionRefusedError):
            connect(server)
        assert ask(client) == b"HELLO"
        client.close()
        drain.join(PATIENCE)
        assert not drain.is_alive()


def test_a_drain_of_a_server_that_is_idle():
    """Nothing to wait for, and a drained server does not serve again."""
    with TCPServer(LOCAL, Upper) as server:
        report = in_thread(server.drain, PATIENCE)
        assert (report.finished, report.cut, report.left) == (0, 0, 0)
        assert report.seconds < PATIENCE / 2
        with pytest.raises(LifecycleError):
            server.serve_forever()


def test_a_handler_sees_that_its_server_drains():
    """``self.draining`` turns true, so that a handler can come to its end."""

    class Patient(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"serving")
            wait_until(lambda: self.draining)
            self.request.sendall(b" draining")

    with serving(harken.ThreadingTCPServer(LOCAL, Patient)) as server, connect(server) as client:
        assert client.recv(100) == b"serving"
        report = in_thread(server.drain, PATIENCE)
        assert client.recv(100) == b" draining"
    assert report.finished == 1


def test_a_handler_may_drain_its_server():
    """A verb that may be called from a handler does not wait for that handler."""

    class Draining(harken.BaseRequestHandler):
        def handle(self):
            report = self.server.drain(1.0)
            self.request.sendall(f"{report.cut}".encode())

    began = time.monotonic()
    with serving(harken.ThreadingTCPServer(LOCAL, Draining)) as server, connect(server) as client:
        assert client.recv(100) == b"0"
    assert time.monotonic() - began < 1.0


# ── background ───────────────────────────────────────────────────────────────────────────────────────────────────────


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
    began = time.monotonic()
    with harken.background(server):
        client = connect(server)
        ask(client)
    assert time.monotonic() - began < PATIENCE / 2
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


# ── overload ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def full_pool(**settings):
    """Return a pool server with one thread, no queue."""
    return harken.PoolTCPServer(LOCAL, Upper, pool_size=1, pool_queue=0, **settings)


def test_overload_reset(told):
    """With the pool full the next client is reset, and the first goes on."""
    with serving(full_pool(overload="reset")) as server, connect(server) as first:
        assert ask(first) == b"HELLO"
        with pytest.raises(ConnectionResetError), connect(server) as second:  # connect() itself may be reset
            second.recv(1)
        assert ask(first) == b"HELLO"
        wait_until(lambda: server.stats()["rejected_total"] == 1)
    assert [event.reason for event in named(told, "rejected")] == ["overload"]


def test_overload_reply():
    """With the pool full the next client gets the reply and the end."""
    with serving(full_pool(overload="reply", overload_reply=b"busy\n")) as server, connect(server) as first:
        assert ask(first) == b"HELLO"
        with connect(server) as second:
            assert second.recv(100) == b"busy\n"
            assert second.recv(100) == b""


def test_overload_shed(told):
    """The longest idle client makes room for the next."""
    with serving(full_pool(overload="shed")) as server, connect(server) as first:
        assert ask(first) == b"HELLO"
        with connect(server) as second:
            assert ask(second) == b"HELLO"
            assert first.recv(1) == b""
    assert "shed" in [event.reason for event in named(told, "closed")]


def test_overload_wait(told):
    """By default the next client waits in the backlog; one event when that begins and one when it ends."""
    with serving(full_pool()) as server, connect(server) as first:
        assert ask(first) == b"HELLO"
        with connect(server) as second:
            second.sendall(b"second")
            wait_until(lambda: named(told, "paused"))
            assert server.stats()["accepted_total"] == 1
            first.close()
            assert second.recv(100) == b"SECOND"
    assert len(named(told, "paused")) == len(named(told, "resumed")) == 1


# ── datagrams ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Echo(harken.BaseRequestHandler):
    """Answers datagrams."""

    def handle(self):
        data, sock = self.request
        sock.sendto(data, self.client_address)


@pytest.mark.parametrize("kind", ["UDPServer", "ThreadingUDPServer", "PoolUDPServer", "ForkingUDPServer"])
@pytest.mark.parametrize("size", [0, 9000, 65507])
def test_datagrams_come_whole(kind, size):
    """Empty ones too, and up to the largest that UDP can carry."""
    with serving(getattr(harken, kind)(LOCAL, Echo)) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(bytes(size), server.server_address)
        assert client.recv(70000) == bytes(size)


def test_a_truncated_datagram_is_told(told):
    """The handler gets its beginning, and an event says so."""

    class Small(UDPServer):
        max_packet_size = 10

    with serving(Small(LOCAL, Echo)) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(b"0123456789abc", server.server_address)
        assert client.recv(100) == b"0123456789"
    (event,) = named(told, "truncated")
    assert (event.bytes, event.peer.address) == (10, "127.0.0.1")


def test_max_packet_size_may_change_on_the_instance():
    """python-osc and others set it after construction."""
    with serving(UDPServer(LOCAL, Echo)) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        for size in (5, 7, 3):
            server.max_packet_size = size
            client.sendto(b"0123456789", server.server_address)
            assert len(client.recv(100)) == size


# ── skipping __init__ ────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_signals_do_not_break_the_loop(run_program):
    """A signal handler that asks for figures, suspends and resumes, again and again, in the thread that serves."""
    program = """
import harken, os, signal, socket, threading
class Upper(harken.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(100):
            self.request.sendall(data.upper())
server = harken.ThreadingTCPServer(("127.0.0.1", 0), Upper)
count = 0
def storm(*_):
    global count
    count += 1
    if count >= 300:  # the next signal may come within this very call
        signal.setitimer(signal.ITIMER_REAL, 0)
    server.stats(); server.connections(); server.suspend()
    try:
        server.resume()
    except harken.LifecycleError:
        pass  # a signal that came since has done it
    server.wait_ready(0)
def clients():
    server.wait_ready(10)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    while count < 300:
        with socket.create_connection(server.server_address, 10) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"X"
    server.shutdown()
signal.signal(signal.SIGALRM, storm)
threading.Thread(target=clients).start()
server.serve_forever()
server.server_close()
print("survived", count)
"""
    process = run_program("-c", program)
    output, errors = process.communicate(timeout=30)
    assert (output.startswith("survived 30"), errors) == (True, "")


def test_interrupting_the_loop_cuts_idle_clients(run_program):
    """Ctrl-C ends a program at once, also when handlers wait for silent clients in threads that are no daemons."""
    program = """
import harken
class Reading(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"hi")
        self.request.recv(1)
server = harken.ThreadingTCPServer(("127.0.0.1", 0), Reading)
print(server.server_address[1], flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    print("interrupted", flush=True)
server.server_close()
print("closed", flush=True)
"""
    process = run_program("-c", program)
    port = int(process.stdout.readline())
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        assert client.recv(10) == b"hi"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == ("interrupted\nclosed\n", "")
        assert process.returncode == 0
