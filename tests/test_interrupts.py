"""Ctrl-C that Python would drop, since it was raised in a finalizer or a callback, ends the loop all the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from harken.interrupts import Interrupts

PATIENCE = 15.0  # seconds
# Raised in a finalizer of the main thread, in a turn of the loop, as a signal's would be.
PROGRAM = """
import sys
import harken

class Dropped:
    def __del__(self):
        raise KeyboardInterrupt

class Server(harken.TCPServer):
    turns = 0

    def service_actions(self):
        self.turns += 1
        if self.turns == 2:
            Dropped()

server = Server(("127.0.0.1", 0), harken.BaseRequestHandler, engine=sys.argv[1])
try:
    server.serve_forever(0.05)
finally:
    print("left")
"""
ENGINES = ["inline", "thread", "pool", "fork"]  # the others' loops run in a thread of their own, and meet no signal


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupt_that_python_drops_ends_the_loop(
    run_program: Callable[..., subprocess.Popen[str]], engine: str
) -> None:
    """And it is not shown as ignored."""
    process = run_program("-c", PROGRAM, engine)
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT, errors
    assert out == "left\n"
    assert "ignored" not in errors


# The loop's thread is the hub's; the main one waits for it, and is where signals are met.
WAITING = """
import signal, sys
from types import SimpleNamespace
import harken

server = harken.TCPServer(("127.0.0.1", 0), harken.BaseRequestHandler, engine=sys.argv[1])
def drop(*_):
    if sys.unraisablehook is sys.__unraisablehook__:  # the loop has yet to begin
        signal.setitimer(signal.ITIMER_REAL, 0.2)
    else:
        sys.unraisablehook(SimpleNamespace(exc_type=KeyboardInterrupt))

signal.signal(signal.SIGALRM, drop)
signal.setitimer(signal.ITIMER_REAL, 0.2)
server.serve_forever(30)
"""


@pytest.mark.parametrize("engine", ["green", "thread"])
def test_it_is_raised_at_once_in_the_main_thread(
    run_program: Callable[..., subprocess.Popen[str]], engine: str
) -> None:
    """Whatever thread the loop runs in, and however long it sleeps."""
    process = run_program("-c", WAITING, engine)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGINT, errors


def drop(kind: type[BaseException]) -> None:
    """Tell the hook as Python does."""
    sys.unraisablehook(SimpleNamespace(exc_type=kind))  # type: ignore[arg-type]


def test_other_exceptions_go_where_they_went(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook of before is asked, and stands again after."""
    seen: list[object] = []
    woken: list[bool] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    with pytest.raises(KeyboardInterrupt), Interrupts(lambda: woken.append(True)) as interrupts:
        stopped = interrupts.before(lambda: False)
        drop(ValueError)
        assert len(seen) == 1
        assert not stopped()
        drop(KeyboardInterrupt)
        assert len(seen) == len(woken) == 1
        stopped()
    assert sys.unraisablehook == seen.append


def test_one_that_comes_last_is_raised_at_the_end() -> None:
    """The loop asks no more then."""
    with pytest.raises(KeyboardInterrupt), Interrupts(lambda: None):
        drop(KeyboardInterrupt)


def test_a_hook_that_the_program_sets_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the program's."""
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    own: list[object] = []
    with Interrupts(lambda: None):
        sys.unraisablehook = own.append
    assert sys.unraisablehook == own.append
