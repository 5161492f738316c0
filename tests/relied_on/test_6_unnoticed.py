"""What CPython's own test_socketserver does not notice."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest

from .kit import LOCAL, PATIENCE, ask, join, run, serving


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", "ForkingTCPServer"])
@pytest.mark.parametrize("loop", ["serve_forever", "handle_request"])
def test_verify_request_is_asked(impl: Any, name: str, loop: str) -> None:
    """A connection that `verify_request` refuses is closed and reaches no handler; one that it takes is served."""

    class Gate(getattr(impl, name)):  # type: ignore[misc]
        welcome = False

        def verify_request(self, request: Any, client_address: Any) -> bool:
            return self.welcome

    class Greet(impl.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"welcome")

    server = Gate(LOCAL, Greet)

    def check(expected: bytes) -> None:
        answers: list[bytes] = []
        client = run(lambda: answers.append(ask(server.server_address, b"")))
        if loop == "handle_request":
            server.handle_request()
        join(client)
        assert answers == [expected]

    if loop == "serve_forever":
        with serving(server):
            check(b"")
            server.welcome = True
            check(b"welcome")
    else:
        with server:
            check(b"")
            server.welcome = True
            check(b"welcome")


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", "ForkingTCPServer"])
def test_handle_error_prints_to_stderr(impl: Any, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """By default stderr gets a line with the peer, the traceback to the handler's line, and rules around it."""

    class Fail(impl.BaseRequestHandler):
        def handle(self) -> None:
            raise LookupError("the reason")

    with serving(getattr(impl, name)(LOCAL, Fail)) as server:
        assert ask(server.server_address, b"") == b""
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(r"^-{40}\nException occurred during processing of request from \('127\.0\.0\.1', \d+\)\n", err)
    assert "in handle\n" in err
    assert err.endswith("LookupError: the reason\n" + "-" * 40 + "\n")


def test_shutdown_waits_for_a_request_in_progress(impl: Any) -> None:
    """On the plain server `shutdown` returns only when the handler has, and the loop has left."""
    started, gate = threading.Event(), threading.Event()
    done = []

    class Slow(impl.BaseRequestHandler):
        def handle(self) -> None:
            started.set()
            gate.wait(PATIENCE)
            done.append(1)

    with impl.TCPServer(LOCAL, Slow) as server:
        loop = run(server.serve_forever, 0.02)
        client = run(ask, server.server_address, b"")
        assert started.wait(PATIENCE)
        stopper = run(server.shutdown)
        stopper.join(0.2)
        assert stopper.is_alive(), "shutdown() returned while the loop was still running"
        gate.set()
        join(stopper)
        assert done
        join(loop, 1)
        join(client)


def test_shutdown_does_not_wait_for_handlers_in_threads(impl: Any) -> None:
    """On the threading server `shutdown` ends the loop alone; handlers go on and finish."""
    started, gate = threading.Event(), threading.Event()

    class Slow(impl.BaseRequestHandler):
        def handle(self) -> None:
            started.set()
            gate.wait(PATIENCE)
            self.request.sendall(b"finished")

    with impl.ThreadingTCPServer(LOCAL, Slow) as server:
        loop = run(server.serve_forever, 0.02)
        answers: list[bytes] = []
        client = run(lambda: answers.append(ask(server.server_address, b"")))
        assert started.wait(PATIENCE)
        join(run(server.shutdown), 2)
        join(loop)
        gate.set()
        join(client)
    assert answers == [b"finished"]
