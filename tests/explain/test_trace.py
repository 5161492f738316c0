"""A trace is the contract's calls in the contract's order, and leaves nothing behind."""

from __future__ import annotations

import functools
import os
import socketserver
import time
from pathlib import Path
from typing import Any

import pytest

import harken
from harken.errors import ConfigError
from harken.explain import Trace, trace

BEFORE = ["__init__", "socket", "server_bind", "server_activate"]
TAKING = ["serve_forever", "_handle_request_noblock", "get_request", "verify_request", "process_request"]
HANDLING = ["finish_request", "RequestHandlerClass", "setup", "handle", "finish", "shutdown_request", "close_request"]
LIBRARIES = pytest.mark.parametrize("library", [socketserver, harken], ids=["stdlib", "harken"])


def server(library, name: str) -> type:
    """Return a server class of a library; stdlib has some only on later Pythons."""
    if not hasattr(library, name):
        pytest.skip(f"Python 3.12 or newer has socketserver.{name}")
    cls: type = getattr(library, name)
    return cls


def names(calls: Trace) -> list[str]:
    """Return the calls but the two whose place is a matter of chance."""
    return [call.name for call in calls if call.name not in ("service_actions", "shutdown")]


class Upper(socketserver.StreamRequestHandler):
    """Sends lines back in capitals."""

    def handle(self) -> None:
        """Answer until the client has no more to say."""
        for line in self.rfile:
            self.wfile.write(line.upper())


class Stuck(socketserver.BaseRequestHandler):
    """Does not return."""

    def handle(self) -> None:
        """Take longer than any test."""
        time.sleep(60)


@LIBRARIES
@pytest.mark.parametrize("name", ["TCPServer", "UDPServer", "UnixStreamServer", "UnixDatagramServer"])
def test_order_inline(library, name: str) -> None:
    """A plain server runs every hook in one thread, in the contract's order."""
    calls = trace(server(library, name))
    assert names(calls) == [*BEFORE, *TAKING, *HANDLING, "server_close"]
    assert {call.thread for call in calls if call.name != "shutdown"} == {"MainThread"}
    assert calls.received == calls.sent
    assert calls.cut == ""


@LIBRARIES
@pytest.mark.parametrize(
    "name",
    ["ThreadingTCPServer", "ThreadingUDPServer", "ThreadingUnixStreamServer", "ThreadingUnixDatagramServer"],
)
def test_order_threading(library, name: str) -> None:
    """A threading server runs ``process_request_thread`` and what follows in another thread."""
    calls = trace(server(library, name))
    assert names(calls) == [*BEFORE, *TAKING, "process_request_thread", *HANDLING, "server_close"]
    threads = {call.name: call.thread for call in calls}
    assert threads["process_request"] == "MainThread"
    assert {threads[name] for name in HANDLING} == {threads["process_request_thread"]}
    assert threads["handle"] != "MainThread"


@LIBRARIES
@pytest.mark.parametrize("name", ["ForkingTCPServer", "ForkingUDPServer", "ForkingUnixStreamServer"])
def test_order_forking(library, name: str) -> None:
    """A forking server's child reports its calls too."""
    calls = trace(server(library, name))
    inside = [call.name for call in calls if call.thread.startswith("child ")]
    outside = [call for call in calls if not call.thread.startswith("child ")]
    assert inside == (["process_request_thread"] if library is harken else []) + HANDLING
    assert [call.name for call in outside if call.name not in ("service_actions", "shutdown")] == [
        *BEFORE,
        *TAKING,
        "close_request",
        "server_close",
    ]
    assert calls.received == calls.sent


def test_calls_are_nested_and_timed() -> None:
    """A call is one deeper than its caller, begins after it, and lasts no longer."""
    calls = {call.name: call for call in trace(socketserver.TCPServer, Upper)}
    outer, inner = calls["finish_request"], calls["RequestHandlerClass"]
    assert inner.depth == outer.depth + 1
    assert inner.at >= outer.at
    assert 0 <= inner.took <= outer.took
    assert calls["server_bind"].depth == calls["__init__"].depth + 1


def test_the_users_methods_are_named(program) -> None:
    """The class whose method ran is shown, and the handler's answer reaches the client."""
    calls = trace(program.Careful, program.Upper)
    owners = {call.name: call.owner for call in calls}
    assert owners["verify_request"] == "Careful"
    assert owners["handle"] == "Upper"
    assert owners["socket"] == "TCPServer"
    assert calls.received == calls.sent.upper()


def test_a_refused_request_is_closed() -> None:
    """Where ``verify_request`` says no, ``shutdown_request`` follows and no handler runs."""
    cls = type("Refusing", (socketserver.TCPServer,), {"verify_request": lambda *_: False})
    ran = names(trace(cls))
    assert ran[ran.index("verify_request") + 1 :] == ["shutdown_request", "close_request", "server_close"]


def test_a_failing_handler_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """What a handler raises stands beside its call, and ``handle_error`` follows before the request is closed."""

    def fail(_self: object) -> None:
        raise ValueError("no such meter")

    calls = trace(socketserver.ThreadingTCPServer, type("Failing", (Upper,), {"handle": fail}))
    ran = names(calls)
    assert next(call for call in calls if call.name == "handle").error == "ValueError: no such meter"
    assert ran.index("finish") < ran.index("handle_error") < ran.index("shutdown_request")
    assert "no such meter" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", "ForkingTCPServer"])
def test_a_stuck_handler_is_cut(name: str) -> None:
    """A handler that never returns is cut after its time and named; its process is gone, whatever the engine."""
    began = time.monotonic()
    calls = trace(getattr(socketserver, name), Stuck, seconds=0.3)
    assert time.monotonic() - began < 5
    assert calls.cut == "Stuck.handle had not returned after 0.3 s"
    assert next(call for call in calls if call.name == "handle").took is None
    for pid in {int(call.thread.split()[1]) for call in calls if call.thread.startswith("child ")}:
        assert is_gone(pid)


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended within a second; one that only its own parent can bury counts."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_arguments_that_are_filled_in_stay_so() -> None:
    """``harken serve`` takes such a handler; without its word this one could not be made."""

    class Greet(harken.StreamRequestHandler):
        """Sends a word of its own."""

        def __init__(self, word: bytes, *args: Any) -> None:
            self.word = word
            super().__init__(*args)

        def handle(self) -> None:
            """Greet."""
            self.wfile.write(self.word)

    assert trace(functools.partial(Greet, b"good day")).received == b"good day"


def test_constructors_with_fewer_arguments() -> None:
    """A server that knows its address and handler itself is traced with that handler."""

    def knows_all(self: socketserver.TCPServer) -> None:
        socketserver.TCPServer.__init__(self, ("127.0.0.1", 0), Upper)

    calls = trace(type("Ready", (socketserver.TCPServer,), {"__init__": knows_all}))
    assert calls.received == calls.sent.upper()
    assert "handle" in names(calls)


def test_constructors_with_more_arguments_are_refused() -> None:
    """A server that wants what a trace cannot know is refused by name."""
    cls = type("Demanding", (socketserver.TCPServer,), {"__init__": lambda self, address, handler, database: None})
    with pytest.raises(ConfigError, match="Demanding's constructor wants more"):
        trace(cls)


def test_a_server_without_a_socket_is_refused() -> None:
    """Nobody can connect to a bare ``BaseServer``."""
    with pytest.raises(ConfigError, match="BaseServer opens no socket"):
        trace(socketserver.BaseServer)


def test_a_constructor_that_fails_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """A server that cannot bind ends the trace at once, with the error at its call."""

    def refuse(_self: object) -> None:
        raise OSError("no room")

    calls = trace(type("Unlucky", (socketserver.TCPServer,), {"server_bind": refuse}))
    assert next(call for call in calls if call.name == "server_bind").error == "OSError: no room"
    assert "serve_forever" not in names(calls)
    assert "no room" in capfd.readouterr().err


def test_unix_paths_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of a Unix socket goes with the trace."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trace(socketserver.UnixStreamServer)
    assert os.listdir(tmp_path) == []


def test_the_pool_engine_is_traced() -> None:
    """harken's pool runs the handler in one of its threads, after ``process_request``."""
    calls = trace(Upper, engine="pool")
    assert names(calls) == [*BEFORE, *TAKING, "process_request_thread", *HANDLING, "server_close"]
    assert calls.received == calls.sent.upper()
