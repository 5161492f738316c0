"""Where harken differs from stdlib on purpose, and its mix-ins in front of stdlib's own classes."""

from __future__ import annotations

import http.client
import http.server
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import wsgiref.simple_server
import xmlrpc.client
import xmlrpc.server
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from .kit import LOCAL, PATIENCE, ask, connect, echo_handler, is_open, join, python, read_all, run, serving


def backlog(listener: socket.socket) -> int:
    """Ask the kernel for a listener's queue length: `tcpi_sacked`, at 28 in struct tcp_info (linux/tcp.h)."""
    return int.from_bytes(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)[28:32], "little")


def test_shutdown_before_serve_forever_does_not_block(harken: Any) -> None:
    """`shutdown` returns at once; the later `serve_forever` returns at once; the next one serves."""
    with harken.TCPServer(LOCAL, echo_handler(harken)) as server:
        start = time.monotonic()
        join(run(server.shutdown), 1)
        join(run(server.serve_forever), 1)
        assert time.monotonic() - start < 1
        loop = run(server.serve_forever)
        assert ask(server.server_address) == b"hello\n"
        server.shutdown()
        join(loop)


def test_shutdown_needs_no_poll(harken: Any) -> None:
    """`shutdown` returns in far less than the poll interval."""
    with harken.ThreadingTCPServer(LOCAL, echo_handler(harken)) as server:
        loop = run(server.serve_forever, 30)
        assert ask(server.server_address) == b"hello\n"
        start = time.monotonic()
        join(run(server.shutdown), 5)
        join(loop)
        assert time.monotonic() - start < 1


UNPOLLED = """
import socket, threading, socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline())
for name in "TCPServer", "ThreadingTCPServer", "PoolTCPServer", "GreenTCPServer":
    with getattr(socketserver, name)(("127.0.0.1", 0), Echo) as server:
        loop = threading.Thread(target=server.serve_forever, args=(None,), daemon=True)
        loop.start()
        with socket.create_connection(server.server_address, 5) as client:
            client.sendall(b"hello\\n")
            assert client.recv(6) == b"hello\\n", name
        server.shutdown()
        loop.join(5)
        assert not loop.is_alive(), name
"""


@pytest.mark.parametrize("hub", ["compiled", "fallback"])
def test_poll_interval_may_be_none(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve_forever(None)` serves on every engine, as stdlib's does, and `shutdown` ends it."""
    monkeypatch.setenv("HARKEN_HUB", hub)
    with python("harken", UNPOLLED) as process:
        _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_private_shutdown_flag_ends_the_loop_without_a_poll(harken: Any, name: str) -> None:
    """`_BaseServer__shutdown_request = True` is seen within the poll interval, or sooner."""
    with getattr(harken, name)(LOCAL, echo_handler(harken)) as server:
        loop = run(server.serve_forever, 0.2)
        assert ask(server.server_address) == b"hello\n"
        server._BaseServer__shutdown_request = True
        join(loop, 1)


def test_shutdown_from_the_serving_thread(harken: Any) -> None:
    """On the plain server a handler may call `shutdown`, which does not deadlock, and the loop ends after it."""

    class Quit(harken.StreamRequestHandler):
        def handle(self) -> None:
            self.server.shutdown()
            self.wfile.write(b"stopped")

    with harken.TCPServer(LOCAL, Quit) as server:
        loop = run(server.serve_forever, 30)
        assert ask(server.server_address, b"") == b"stopped"
        join(loop, 2)


def test_exception_in_verify_request_goes_to_handle_error(harken: Any) -> None:
    """An exception of `verify_request` closes that connection after `handle_error`; the loop goes on."""
    calls = []

    class Picky(harken.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            if not calls:
                raise ValueError("cannot tell")
            return True

        def handle_error(self, request: Any, client_address: Any) -> None:
            calls.append(request.getsockname())

    with serving(Picky(LOCAL, echo_handler(harken))) as server:
        assert ask(server.server_address, b"") == b""
        assert ask(server.server_address) == b"hello\n"
        assert calls == [server.server_address]


def test_backlog_is_at_least_128_unless_changed(harken: Any) -> None:
    """`request_queue_size` stays 5 to look at, and listen(2) gets 128 or more, until somebody sets it."""
    small = type("Small", (harken.TCPServer,), {"request_queue_size": 3})
    with harken.TCPServer(LOCAL, None) as plain, small(LOCAL, None) as changed:
        assert plain.request_queue_size == 5
        assert backlog(plain.socket) >= 128
        assert backlog(changed.socket) == 3


def test_datagrams_are_whole_unless_changed(harken: Any) -> None:
    """A datagram of 65,507 bytes arrives whole; a subclass that sets `max_packet_size` gets no more than that."""
    got = []
    arrived = threading.Semaphore(0)

    class Take(harken.BaseRequestHandler):
        def handle(self) -> None:
            got.append(len(self.request[0]))
            arrived.release()

    small = type("Small", (harken.UDPServer,), {"max_packet_size": 8192})
    for kind in (harken.UDPServer, small):
        with serving(kind(LOCAL, Take)) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            client.sendto(bytes(65507), server.server_address)
            assert arrived.acquire(timeout=PATIENCE)
    assert got == [65507, 8192]


@pytest.mark.parametrize("name", ["UnixStreamServer", "ThreadingUnixStreamServer", "UnixDatagramServer"])
def test_unix_path_is_unlinked_on_close(harken: Any, name: str, tmp_path: Path) -> None:
    """`server_close` removes the path, so that the next server can bind it; not a path that is another's by now."""
    path = tmp_path / "socket"
    for _ in range(2):
        with getattr(harken, name)(str(path), None):
            assert path.is_socket()
        assert not path.exists()
    with getattr(harken, name)(str(path), None):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


RESETTING = """
import socket, sys
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10)
client.sendall(b"x")
assert client.recv(1) == b"x"
client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
client.close()
"""


@pytest.mark.parametrize("verb", ["recv", "sendall", "readline"])
@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", "ForkingTCPServer"])
def test_connection_errors_print_no_traceback(
    harken: Any, name: str, verb: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A peer that resets in the middle is no news: no traceback wherever the handler notices; the server goes on."""

    class Cut(harken.StreamRequestHandler):
        def handle(self) -> None:
            word = self.request.recv(1)
            self.request.sendall(word)
            while word == b"x":
                if verb == "sendall":
                    self.request.sendall(bytes(1 << 16))
                elif verb == "recv":
                    self.request.recv(1)
                else:
                    self.rfile.readline()

    with serving(getattr(harken, name)(LOCAL, Cut)) as server:
        # In a process of its own: a forked handler would inherit the client's descriptor and hold its reset back.
        subprocess.run([sys.executable, "-c", RESETTING, str(server.server_address[1])], check=True, timeout=PATIENCE)
        assert ask(server.server_address, b"y") == b"y"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_system_exit_in_a_handlers_thread_ends_that_connection_only(harken: Any, error: Any) -> None:
    """SystemExit or KeyboardInterrupt in a thread closes that connection; `handle_error` is not called."""
    errors = []

    class Server(harken.ThreadingTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append(client_address)

    class Leave(harken.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline()
            if line == b"exit\n":
                raise error
            self.wfile.write(line)

    with serving(Server(LOCAL, Leave)) as server:
        assert ask(server.server_address, b"exit\n") == b""
        assert ask(server.server_address) == b"hello\n"
    assert errors == []


def test_server_close_returns_when_the_port_is_free(harken: Any) -> None:
    """Closed from another thread while the loop waits, the port is free when `server_close` returns."""
    for _ in range(10):
        server = harken.ThreadingTCPServer(LOCAL, echo_handler(harken))
        loop = run(server.serve_forever, 30)
        with connect(server.server_address) as client:
            client.sendall(b"x\n")
            assert read_all(client) == b"x\n"
        server.server_close()
        assert not is_open(server.server_address)
        server.shutdown()
        join(loop)


def test_ctrl_c_ends_the_ten_lines_with_idle_clients() -> None:
    """The unchanged program with idle clients connected ends at once by Ctrl-C, though its threads are no daemons."""
    text = """
import socketserver
class MyServer(socketserver.BaseRequestHandler):
    def handle(self):
        while True:
            data = self.request.recv(1024)
            if not data:
                break
            self.request.sendall(data.upper())
server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), MyServer)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
    child = python("harken", text)
    clients: list[socket.socket] = []
    try:
        assert child.stdout is not None
        address = ("127.0.0.1", int(child.stdout.readline()))
        clients = [connect(address) for _ in range(3)]
        clients[0].sendall(b"x")
        assert clients[0].recv(1) == b"X"
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=PATIENCE)
        assert time.monotonic() - start < 3
    finally:
        child.kill()
        child.communicate()
        for client in clients:
            client.close()


def test_client_that_resets_at_once_does_not_end_the_loop(harken: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Connections that are reset before and after accept leave the loop serving and print no traceback."""
    with serving(harken.ThreadingTCPServer(LOCAL, echo_handler(harken))) as server:
        for _ in range(20):
            client = connect(server.server_address)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        assert ask(server.server_address) == b"hello\n"
    assert "Traceback" not in capfd.readouterr().err


def test_forked_child_does_not_hold_the_listener(harken: Any) -> None:
    """While a child still works, the closed server's port is free."""

    class Slow(harken.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"started")
            self.rfile.readline()

    server = type("Server", (harken.ForkingTCPServer,), {"block_on_close": False})(LOCAL, Slow)
    loop = run(server.serve_forever, 0.05)
    with connect(server.server_address) as client:
        assert client.recv(100) == b"started"
        server.shutdown()
        join(loop)
        server.server_close()
        assert not is_open(server.server_address)
        client.sendall(b"go\n")  # the child holds a copy of this end too, so closing it would not end the handler
        server.collect_children(blocking=True)


def test_forked_children_of_the_program_are_not_reaped_at_the_limit(harken: Any) -> None:
    """At `max_children` only the server's own children are waited for, never `waitpid(-1)`."""
    other = os.fork()
    if other == 0:
        os._exit(7)

    class Say(harken.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"hi")

    server = harken.ForkingTCPServer(LOCAL, Say)
    server.max_children = 1
    with serving(server, poll_interval=0.02):
        for _ in range(4):
            assert ask(server.server_address, b"") == b"hi"
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 7


def test_module_offers_more_on_every_version(harken: Any) -> None:
    """The forking Unix servers are there whatever the version of Python, and no public name of stdlib is missing."""
    assert issubclass(harken.ForkingUnixStreamServer, harken.ForkingMixIn)
    assert issubclass(harken.ForkingUnixDatagramServer, harken.UnixDatagramServer)
    assert set(socketserver.__all__) <= set(dir(harken))


# --- mix-ins in front of stdlib's own classes -------------------------------------------------------------------------


class Hello(http.server.BaseHTTPRequestHandler):
    """Answers with the thread and process that it runs in."""

    def do_GET(self) -> None:
        body = f"{threading.current_thread().name} {os.getpid()}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        """Say nothing."""


def get(address: Any, path: str = "/") -> tuple[int, bytes]:
    """Fetch by HTTP."""
    client = http.client.HTTPConnection(*address[:2], timeout=PATIENCE)
    try:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read()
    finally:
        client.close()


MIXINS = ["PoolMixIn", "ThreadingMixIn", "ForkingMixIn"]


@pytest.mark.parametrize("mixin", MIXINS)
@pytest.mark.parametrize("base", [http.server.HTTPServer, http.server.ThreadingHTTPServer])
def test_mixin_on_stdlibs_http_server(harken: Any, mixin: str, base: Any) -> None:
    """`class Web(harken.PoolMixIn, http.server.ThreadingHTTPServer)` serves, where the mix-in says."""
    web = type("Web", (getattr(harken, mixin), base), {})
    with serving(web(LOCAL, Hello)) as server:
        assert isinstance(server, socketserver.TCPServer)
        answers = [get(server.server_address) for _ in range(5)]
        assert {status for status, _ in answers} == {200}
        places = [body.rpartition(b" ") for _, body in answers]
        forked = {int(pid) for _, _, pid in places} != {os.getpid()}
        assert forked is (mixin == "ForkingMixIn")
        assert all(name != threading.main_thread().name.encode() for name, _, _ in places) or forked
    assert not is_open(server.server_address)


@pytest.mark.parametrize("mixin", MIXINS)
def test_mixin_on_stdlib_serves_many_at_once(harken: Any, mixin: str) -> None:
    """Idle clients do not keep others from being served."""
    web = type("Web", (getattr(harken, mixin), http.server.HTTPServer), {})
    with serving(web(LOCAL, Hello)) as server:
        idle = [connect(server.server_address) for _ in range(5)]
        assert get(server.server_address)[0] == 200
        for client in idle:
            client.shutdown(socket.SHUT_RDWR)  # forked children hold copies, so close() alone would not end it
            client.close()


@pytest.mark.parametrize("mixin", MIXINS)
def test_mixin_on_xmlrpc_and_wsgi(harken: Any, mixin: str) -> None:
    """The same on `SimpleXMLRPCServer` and `WSGIServer`."""
    kind = getattr(harken, mixin)
    calls = type("Calls", (kind, xmlrpc.server.SimpleXMLRPCServer), {})
    with serving(calls(LOCAL, logRequests=False)) as server:
        server.register_function(pow)
        with xmlrpc.client.ServerProxy("http://{}:{}".format(*server.server_address)) as client:
            assert client.pow(2, 10) == 1024

    def app(_environ: Any, start: Any) -> list[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"wsgi"]

    class Quiet(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, *_args: Any) -> None:
            """Say nothing."""

    wsgi = type("Wsgi", (kind, wsgiref.simple_server.WSGIServer), {})
    with serving(wsgi(LOCAL, Quiet)) as server:
        server.set_app(app)
        assert get(server.server_address) == (200, b"wsgi")


def test_pool_mixin_on_stdlib_bounds_the_threads(harken: Any) -> None:
    """With `pool_size` 2 on stdlib's class two handlers run at once and the third waits."""
    gate = threading.Event()
    running: list[int] = []

    class Wait(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            running.append(threading.get_ident())
            gate.wait(PATIENCE)
            self.wfile.write(b"done")

    small = type("Small", (harken.PoolMixIn, socketserver.TCPServer), {"pool_size": 2})
    with serving(small(LOCAL, Wait)) as server:
        clients = [connect(server.server_address) for _ in range(3)]
        wait_until(lambda: len(running) == 2)
        threading.Event().wait(0.1)
        assert len(running) == 2
        gate.set()
        assert [read_all(client) for client in clients] == [b"done"] * 3
        for client in clients:
            client.close()


def test_mixin_on_stdlib_shuts_down_at_once(harken: Any) -> None:
    """harken's loop comes with the mix-in: `shutdown` needs no poll, before `serve_forever` it does not block."""
    web = type("Web", (harken.PoolMixIn, http.server.ThreadingHTTPServer), {})
    with web(LOCAL, Hello) as server:
        loop = run(server.serve_forever, 30)
        assert get(server.server_address)[0] == 200
        start = time.monotonic()
        join(run(server.shutdown), 5)
        join(loop)
        assert time.monotonic() - start < 1
