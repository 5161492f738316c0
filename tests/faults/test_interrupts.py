"""Ctrl-C on a plain program, and the signals of ``harken.serve``, with clients connected."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from .kit import Program, connect, ends, exchange, is_silent, receive

AT_ONCE = 15.0  # seconds, on a busy machine; it is some 0.1, and what is not ended waits for 20 or for ever
CONCURRENT = ["thread", "pool", "fork"]

TEN_LINES = """
server = getattr(harken, sys.argv[1])(("127.0.0.1", 0), Echo)
server.serve_forever()
"""
TEN_LINES_WITH = """
with getattr(harken, sys.argv[1])(("127.0.0.1", 0), Echo) as server:
    server.serve_forever()
"""
EXITS = """
class Busy(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"at work")
        self.request.recv(100)
        self.request.sendall(b"done")

signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
with getattr(harken, sys.argv[1])(("127.0.0.1", 0), Busy) as server:
    server.serve_forever()
"""
# C's raise(): the signal is there before the next of Python's code runs. The hook stands between fork and harken's own.
IN_FORK = """
import ctypes, functools, os, signal, sys
hook = {sys.argv[1]: functools.partial(ctypes.CDLL(None)["raise"], signal.SIGINT)}
if sys.argv[1] == "after_in_parent":
    os.register_at_fork(**hook)
import harken
if sys.argv[1] == "before":  # these are called in the reverse order
    os.register_at_fork(**hook)

class Waiting(harken.BaseRequestHandler):
    def handle(self):
        self.request.recv(1)

server = harken.ForkingTCPServer(("127.0.0.1", 0), Waiting)
print(server.server_address[1], flush=True)
server.serve_forever()
"""
# What a signal handler raises the moment that the handler's thread, or child, has begun.
EXITS_AT_A_START = """
import threading

class Raising(threading.Thread):
    def start(self):
        super().start()
        if "process_request_thread" in self.name:
            raise SystemExit(5)

class Busy(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"at work")
        self.request.recv(100)
        self.request.sendall(b"done")

threading.Thread = Raising
os.pidfd_open = lambda pid: sys.exit(5)
try:
    with getattr(harken, sys.argv[1])(("127.0.0.1", 0), Busy) as server:
        server.serve_forever()
except SystemExit as end:
    os._exit(end.code)  # without the wait for threads at the interpreter's end
"""
SERVE = """
class Handler(harken.BaseRequestHandler):
    def handle(self):
        while word := self.request.recv(100):
            if word == b"busy":      # works until its client says so, then answers and is done
                self.request.sendall(b"at work")
                self.request.recv(100)
                self.request.sendall(b"done")
                return
            self.request.sendall(word)

settings = json.loads(sys.argv[1])
sys.exit(harken.serve(Handler, "tcp://127.0.0.1:0", log_level="error", **settings))
"""


@contextlib.contextmanager
def clients(started: Program, count: int = 3) -> Iterator[list[socket.socket]]:
    """Give clients that are served and idle."""
    with contextlib.ExitStack() as leaving:
        found = [leaving.enter_context(connect(started.address)) for _ in range(count)]
        for client in found:
            exchange(client)
        yield found


@pytest.mark.parametrize("group", [True, False], ids=["group", "process"])
@pytest.mark.parametrize("text", [TEN_LINES, TEN_LINES_WITH], ids=["bare", "with"])
@pytest.mark.parametrize("kind", ["ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"])
def test_ctrl_c_ends_the_program_at_once(program: Callable[..., Program], kind: str, text: str, group: bool) -> None:
    """With idle clients connected the program ends as Ctrl-C ends any, and its clients read the end."""
    started = program(text, kind)
    with clients(started) as idle:
        if group:  # as a terminal does
            os.killpg(started.process.pid, signal.SIGINT)
        else:
            started.send(signal.SIGINT)
        started.expect_exit(-signal.SIGINT, AT_ONCE)
        assert [ends(client) for client in idle] == ["closed"] * 3


def test_ctrl_c_on_a_plain_server_with_a_client(program: Callable[..., Program]) -> None:
    """The plain server is inside its handler then, and ends all the same."""
    started = program(TEN_LINES, "TCPServer")
    with clients(started, 1) as (idle,):
        started.send(signal.SIGINT)
        started.expect_exit(-signal.SIGINT, AT_ONCE)
        assert ends(idle) == "closed"


@pytest.mark.parametrize("when", ["before", "after_in_parent"])
def test_ctrl_c_while_it_forks_is_not_lost(run_program: Callable[..., subprocess.Popen[str]], when: str) -> None:
    """os.fork() drops what Python's hooks raise, and none of harken's is there to meet the interrupt."""
    process = run_program("-c", IN_FORK, when)
    assert process.stdout is not None
    with connect(("127.0.0.1", int(process.stdout.readline()))) as client:
        assert process.wait(AT_ONCE) == -signal.SIGINT
        assert ends(client) == "closed"


@pytest.mark.parametrize("kind", ["ThreadingTCPServer", "PoolTCPServer", "GreenTCPServer", "ForkingTCPServer"])
def test_a_program_that_exits_on_term_waits_for_its_handlers(program: Callable[..., Program], kind: str) -> None:
    """``sys.exit()`` in a handler of SIGTERM is no Ctrl-C: ``server_close()`` waits, and the answer arrives."""
    started = program(EXITS, kind)
    with connect(started.address) as busy:
        assert receive(busy, 7) == b"at work"
        started.send(signal.SIGTERM)
        expect_shut(started)
        busy.sendall(b"go")
        assert receive(busy, 100) == b"done"
        started.expect_exit(5, AT_ONCE)


@pytest.mark.parametrize("kind", ["ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"])
def test_an_exit_while_a_thread_is_started_leaves_the_handler_its_time(
    program: Callable[..., Program], kind: str
) -> None:
    """The connection is the thread's by then, or the child's: the loop leaves it open, and ``server_close()`` waits."""
    started = program(EXITS_AT_A_START, kind)
    with connect(started.address) as busy:
        assert receive(busy, 7) == b"at work"
        expect_shut(started)
        busy.sendall(b"go")
        assert receive(busy, 100) == b"done"
        started.expect_exit(5, AT_ONCE)


def serving(program: Callable[..., Program], engine: str, drain_timeout: float) -> Program:
    """Start ``harken.serve`` on an engine."""
    return program(SERVE, f'{{"engine": "{engine}", "drain_timeout": {drain_timeout}}}')


@pytest.mark.parametrize("engine", ["inline", *CONCURRENT])
def test_term_lets_a_busy_handler_finish(program: Callable[..., Program], engine: str) -> None:
    """SIGTERM: the handler under way answers, nobody new is let in, and the status is 0."""
    started = serving(program, engine, 20)
    with connect(started.address) as busy:
        busy.sendall(b"busy")
        assert receive(busy, 7) == b"at work"
        started.send(signal.SIGTERM)
        if engine != "inline":  # its loop is in the handler, and the door still open
            expect_shut(started)
        busy.sendall(b"go")
        assert receive(busy, 100) == b"done"
        started.expect_exit(0, AT_ONCE)


def expect_shut(started: Program) -> None:
    """Wait until connections are refused."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            connect(started.address).close()
        except ConnectionError:
            return
    pytest.fail("the listener is still open")


@pytest.mark.parametrize("engine", ["inline", *CONCURRENT])
def test_term_cuts_at_the_deadline(program: Callable[..., Program], engine: str) -> None:
    """SIGTERM with a handler that does not end: after ``drain_timeout`` its connection is cut, and the status is 3."""
    started = serving(program, engine, 0.2)  # by far less than makes a handler that waits for its client idle
    with connect(started.address) as stuck:
        stuck.sendall(b"busy")
        assert receive(stuck, 7) == b"at work"
        began = time.monotonic()
        started.send(signal.SIGTERM)
        started.expect_exit(3, 0.2 + AT_ONCE)
        assert time.monotonic() - began > 0.15
        assert ends(stuck) in ("closed", "reset")


@pytest.mark.parametrize("engine", ["inline", *CONCURRENT])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGQUIT])
def test_int_stops_at_once(program: Callable[..., Program], engine: str, signum: int) -> None:
    """SIGINT or SIGQUIT with an idle client connected: the end at once, with status 0."""
    started = serving(program, engine, 20)
    with clients(started, 1) as (idle,):
        started.send(signum)
        started.expect_exit(0, AT_ONCE)
        assert ends(idle) in ("closed", "reset")


@pytest.mark.parametrize("engine", ["inline", *CONCURRENT])
def test_int_ends_a_drain(program: Callable[..., Program], engine: str) -> None:
    """SIGTERM, then SIGINT while it drains: the end at once, with status 3 since a connection was cut."""
    started = serving(program, engine, 20)
    with connect(started.address) as stuck:
        stuck.sendall(b"busy")
        assert receive(stuck, 7) == b"at work"
        started.send(signal.SIGTERM)
        assert is_silent(stuck)  # also: two signals that wait together come in the order of their numbers
        started.send(signal.SIGINT)
        started.expect_exit(3, AT_ONCE)
        assert ends(stuck) in ("closed", "reset")


@pytest.mark.parametrize("engine", ["inline", *CONCURRENT])
def test_term_on_an_idle_server(program: Callable[..., Program], engine: str) -> None:
    """SIGTERM with nobody connected ends at once, with status 0 and nothing on stderr."""
    started = serving(program, engine, 20)
    with clients(started, 1) as (gone,):
        gone.close()
    started.wait("closed")
    started.send(signal.SIGTERM)
    assert started.expect_exit(0, AT_ONCE) == ""
