"""The asyncio engine: ``async def handle`` in an event loop, plain handlers in threads."""

from __future__ import annotations

import asyncio
import contextvars
import fcntl
import functools
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

import harken
from harken.engines.asyncio import Engine
from harken.testing._census import wait_until

PATIENCE = 10.0  # seconds
LOCAL = ("127.0.0.1", 0)


class Echo(harken.AsyncRequestHandler):
    """Sends back what comes."""

    async def handle(self):
        """Echo."""
        if isinstance(self.request, tuple):
            data, sock = self.request
            await asyncio.sleep(0)
            sock.sendto(data, self.client_address)
            return
        while data := await self.request.recv(1000):
            await self.request.sendall(data)


class Blocking(harken.BaseRequestHandler):
    """Tells in which thread it runs."""

    def handle(self):
        """Answer."""
        while self.request.recv(1000):
            self.request.sendall(f"{threading.get_ident()}\n".encode())


def ask(address, data=b"hello"):
    """Send something, end, and return all that comes back."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.settimeout(PATIENCE)
        client.connect(address)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        got = b""
        while part := client.recv(1000):
            got += part
        return got


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_tcp(loop):
    """A task for each connection, in the loop that was asked for."""
    seen = []

    class Handler(Echo):
        async def setup(self):
            seen.append((type(asyncio.get_running_loop()).__module__, threading.get_ident(), asyncio.current_task()))

    with harken.background(harken.AsyncTCPServer(LOCAL, Handler, loop=loop)) as server:
        assert [ask(server.server_address) for _ in range(3)] == [b"hello"] * 3
        assert server.stats()["engine"] == "asyncio"
    modules, threads, tasks = (set(column) for column in zip(*seen, strict=True))
    assert modules == {"uvloop" if loop == "uvloop" else "asyncio.unix_events"}
    assert len(threads) == 1
    assert len(tasks) == 3


def test_unix(tmp_path):
    """On a Unix path."""
    with harken.background(harken.AsyncUnixStreamServer(str(tmp_path / "s"), Echo)) as server:
        assert ask(server.server_address) == b"hello"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_datagrams_are_answered_from_the_address_that_was_asked(loop):
    """On a socket bound to every address, waiting or not; each has a task and a context of its own."""
    variable = contextvars.ContextVar("variable", default=b"fresh")
    tasks = set()

    class Told(harken.AsyncRequestHandler):
        async def handle(self):
            data, sock = self.request
            tasks.add(asyncio.current_task())
            before = variable.get()
            variable.set(data)
            if data == b"wait":
                await asyncio.sleep(0.001)
            sock.sendto(data + b" " + before, self.client_address)

    with harken.background(harken.AsyncUDPServer(("0.0.0.0", 0), Told, loop=loop)) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(PATIENCE)
            client.connect(("127.0.0.5", server.server_address[1]))
            for data in (b"at once", b"wait") * 3:
                client.send(data)
                assert client.recv(100) == data + b" fresh"
    assert len(tasks) == 6


def test_udp():
    """A task for each datagram."""
    with harken.background(harken.AsyncUDPServer(LOCAL, Echo)) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(PATIENCE)
            client.connect(server.server_address)
            client.send(b"hello")
            assert client.recv(100) == b"hello"


def test_plain_handlers_run_in_threads():
    """Bounded by ``pool_size``; one that blocks keeps nobody waiting."""
    with harken.background(harken.AsyncTCPServer(LOCAL, Blocking, pool_size=2)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as idle:
            idle.sendall(b"x")
            first = idle.recv(100)
            with socket.create_connection(server.server_address, PATIENCE) as other:
                other.sendall(b"x")
                second = other.recv(100)
                late = socket.create_connection(server.server_address, 0.1)
                late.sendall(b"x")
                with pytest.raises(TimeoutError):
                    late.recv(100)
            late.settimeout(PATIENCE)
            assert late.recv(100) == second  # it got that thread
            late.close()
        assert len({first, second, str(threading.get_ident()).encode()}) == 3


def test_plain_handlers_beyond_the_queue_wait_in_the_backlog():
    """And are served when there is room."""
    with harken.background(harken.AsyncTCPServer(LOCAL, Blocking, pool_size=1, pool_queue=0)) as server:
        clients = [socket.create_connection(server.server_address, PATIENCE) for _ in range(4)]
        for client in clients:
            client.sendall(b"x")
        for client in clients:
            assert client.recv(100)
            client.close()


def test_plain_handlers_have_plain_sockets():
    """They wait in threads, so their descriptor blocks: for a program that is given it, for ``os.read``, for a dup."""
    seen = []

    class Handler(harken.BaseRequestHandler):
        def handle(self):
            seen.append(fcntl.fcntl(self.request, fcntl.F_GETFL) & os.O_NONBLOCK)
            subprocess.run(["cat"], stdin=self.request, stdout=self.request, check=True, timeout=PATIENCE)

    with harken.background(harken.AsyncTCPServer(LOCAL, Handler)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            wait_until(lambda: bool(seen), PATIENCE)
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) == b""
    assert seen == [0]


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork", "green"])
def test_an_async_handler_fits_no_other_engine(engine):
    """It is said at the start: by ``serve`` before anything is bound, by ``serve_forever`` before it serves."""
    with pytest.raises(harken.ConfigError, match="engine='asyncio'"):
        harken.serve(Echo, "tcp://127.0.0.1:0", engine=engine)
    with harken.TCPServer(LOCAL, functools.partial(Echo), engine=engine) as server:
        with pytest.raises(harken.ConfigError, match="engine='asyncio'"):
            server.serve_forever()


def test_an_async_handle_on_a_blocking_handler_class():
    """It would be given a socket that blocks."""

    class Wrong(harken.BaseRequestHandler):
        async def handle(self):
            pass

    with harken.AsyncTCPServer(LOCAL, Wrong) as server:
        with pytest.raises(harken.ConfigError, match="derive it from harken.AsyncRequestHandler"):
            server.serve_forever()


def test_hooks_in_stdlibs_order():
    """Each hook of server and handler, once, also when the handler raises."""
    calls = []

    class Server(harken.AsyncTCPServer):
        def handle_error(self, request, client_address):
            calls.append("handle_error")

    def note(name):
        inner = getattr(Server, name)

        def noted(self, *args):
            calls.append(name)
            return inner(self, *args)

        setattr(Server, name, noted)

    names = ["get_request", "verify_request", "process_request", "finish_request", "shutdown_request", "close_request"]
    for name in names:
        note(name)

    class Handler(harken.AsyncRequestHandler):
        async def setup(self):
            calls.append("setup")
            await asyncio.sleep(0)

        async def handle(self):
            await asyncio.sleep(0.01)
            calls.append("handle")
            if await self.request.recv(1) == b"!":
                raise ValueError

        def finish(self):
            calls.append("finish")

    before, inside, after = names[:4], ["setup", "handle", "finish"], names[4:]
    with harken.background(Server(LOCAL, Handler)) as server:
        for data, expected in ((b"x", before + inside + after), (b"!", [*before, *inside, "handle_error", *after])):
            ask(server.server_address, data)
            assert wait_until(lambda: calls[-1:] == after[-1:])
            assert calls == expected
            calls.clear()


def test_drain_cuts_and_waits():
    """A handler in ``recv`` reads the end; one that waits for something else is told by its connection alone."""
    ended = []

    class Handler(harken.AsyncRequestHandler):
        async def handle(self):
            try:
                await self.request.sendall(b"x")
                ended.append(await self.request.recv(1))
            finally:
                ended.append("finally")

    with harken.background(harken.AsyncTCPServer(LOCAL, Handler)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(1) == b"x"
            report = server.drain(0.05)
    assert (report.cut, report.left) == (1, 0)
    assert ended == [b"", "finally"]


def test_verbs_that_a_coroutine_does_not_await():
    """``shutdown()`` returns at once; ``drain()`` gives way, and other tasks are what they were meanwhile."""
    seen = []

    class Handler(harken.AsyncRequestHandler):
        async def handle(self):
            beside = asyncio.create_task(self.beside())
            self.server.shutdown()
            self.server.drain(0.05)
            seen.append((await beside, asyncio.current_task() is not beside))

        async def beside(self):
            for _ in range(5):
                await asyncio.sleep(0.001)
            return asyncio.current_task() is not None

    with harken.AsyncTCPServer(LOCAL, Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert server.wait_ready(PATIENCE)
        ask(server.server_address)
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert seen == [(True, True)]


def test_a_handler_may_fork():
    """The child's part of the handler goes on with its connection, and the parent serves on."""

    class Handler(harken.AsyncRequestHandler):
        async def handle(self):
            data = await self.request.recv(10)
            pid = os.fork()
            if pid == 0:
                await self.request.sendall(b"child " + data)
                os._exit(0)
            await asyncio.to_thread(os.waitpid, pid, 0)
            await self.request.sendall(b", parent")

    with harken.background(harken.AsyncTCPServer(LOCAL, Handler)) as server:
        assert ask(server.server_address) == b"child hello, parent"
        assert ask(server.server_address) == b"child hello, parent"


SIGNALS = """
import signal, sys, threading, time
import harken

class Handler(harken.AsyncRequestHandler):
    async def handle(self):
        while data := await self.request.recv(100):
            await self.request.sendall(data)

def heed(signum, frame):
    print("heeded", threading.current_thread() is threading.main_thread(), flush=True)
    if signum == signal.SIGTERM:
        server.shutdown()

with harken.AsyncTCPServer(("127.0.0.1", 0), Handler, loop=sys.argv[1]) as server:
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, heed)
    print(server.server_address[1], flush=True)
    server.serve_forever(30)
print("over", flush=True)
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_signals_are_heeded_at_once(run_program, loop):
    """In the main thread, whatever loop the hub is in; ``shutdown()`` in one ends the server."""
    process = run_program("-c", SIGNALS, loop)
    port = int(process.stdout.readline())
    assert ask(("127.0.0.1", port)) == b"hello"
    for signum in ("SIGUSR1", "SIGUSR1", "SIGTERM"):
        began = time.monotonic()
        process.send_signal(getattr(__import__("signal"), signum))
        assert process.stdout.readline() == "heeded True\n"
        assert time.monotonic() - began < PATIENCE / 2
    assert process.stdout.readline() == "over\n"
    assert process.wait(PATIENCE) == 0


def test_the_environment_and_the_command(run_program, tmp_path):
    """``HARKEN_ENGINE=asyncio`` runs a threading server's blocking handlers in threads."""
    program = tmp_path / "program.py"
    program.write_text(
        "import socketserver, threading\n"
        "class H(socketserver.StreamRequestHandler):\n"
        "    def handle(self):\n"
        "        self.wfile.write(self.server._harken.engine_name.encode())\n"
        "with socketserver.ThreadingTCPServer(('127.0.0.1', 0), H) as server:\n"
        "    print(server.server_address[1], flush=True)\n"
        "    server.serve_forever()\n"
    )
    process = run_program("-m", "harken", "run", program, env={"HARKEN_ENGINE": "asyncio"})
    assert ask(("127.0.0.1", int(process.stdout.readline())), b"") == b"asyncio"


def test_handle_request_without_serve_forever():
    """One request is served, by a loop that lasts as long as it."""
    with harken.AsyncTCPServer(LOCAL, Echo) as server:
        server.timeout = PATIENCE
        with socket.create_connection(server.server_address, PATIENCE) as client:
            server.handle_request()
            client.sendall(b"x")
            assert client.recv(10) == b"x"


def test_an_engine_made_by_hand():
    """Jobs are green threads unless a blocking handler was announced."""
    said = {
        "daemon_threads": False,
        "loop": "asyncio",
        "pool_size": 2,
        "pool_queue": 2,
        "stall_after": None,
        "max_memory_bytes": None,
    }
    engine = Engine(said.__getitem__)
    seen = []
    engine.spawn(lambda: seen.append(asyncio.get_running_loop() is not None))
    assert engine.join(time.monotonic() + PATIENCE) == 0
    engine.prepare(Blocking)
    engine.spawn(lambda: seen.append(asyncio._get_running_loop()))
    assert engine.join(time.monotonic() + PATIENCE) == 0
    assert seen == [True, None]


@pytest.mark.parametrize(("kind", "handler"), [(harken.GreenTCPServer, Blocking), (harken.AsyncTCPServer, Echo)])
def test_an_event_loop_that_is_not_there_is_told_at_the_start(monkeypatch, kind, handler):
    """And not by the first client that needs it."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with kind(LOCAL, handler, loop="uvloop") as refused:
        with pytest.raises(harken.ConfigError, match="uvloop is not installed"):
            refused.serve_forever()
    monkeypatch.setenv("HARKEN_LOOP", "uvlop")
    with kind(LOCAL, handler) as misspelt:
        with pytest.raises(harken.ConfigError, match="uvlop"):
            misspelt.serve_forever()
