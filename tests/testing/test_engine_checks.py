"""``check_engine`` finds out an engine that breaks its contract. Each of these is broken in one place."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from harken.engines import thread
from harken.testing import ENGINE_CHECKS, _rig, check_engine, engine
from harken.testing._check import EngineCheck


class Deaf(thread.Engine):
    """Cannot be woken."""

    def wake(self) -> None:
        """Do nothing."""


class Greedy(thread.Engine):
    """Goes on accepting when told not to."""

    def unwatch(self, door: Any) -> None:
        """Do nothing."""


class Impatient(thread.Engine):
    """Waits for no handler."""

    def join(self, deadline: float | None) -> int:
        """Return at once."""
        return 0


class Careless(thread.Engine):
    """Closes every connection and runs no handler."""

    def spawn(self, function: Callable[..., object], *args: Any, done: Any = None) -> int:
        """Close it."""
        for each in args:
            if isinstance(each, socket.socket):
                each.close()
        return 0


class Leaky(thread.Engine):
    """Opens a descriptor for each connection and forgets it."""

    opened: list[int] = []

    def spawn(self, function: Callable[..., object], *args: Any, done: Any = None) -> int:
        """Leak."""
        self.opened.append(os.open(os.devnull, os.O_RDONLY))
        return super().spawn(function, *args, done=done)


def named(name: str) -> EngineCheck:
    """Return a check by its name."""
    return next(check for check in ENGINE_CHECKS if check.name == name)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the checks lose patience soon, since they are to fail."""
    monkeypatch.setattr(_rig, "PATIENCE", 1.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its handlers may fail
@pytest.mark.usefixtures("hasty")
@pytest.mark.no_leak_check  # the broken engines leave behind what they do not stop
@pytest.mark.parametrize(
    "make, name",
    [
        pytest.param(Deaf, "shutdown_while_idle", id="deaf"),
        pytest.param(Greedy, "suspend_and_resume", id="greedy"),
        pytest.param(Impatient, "close_waits_for_handlers", id="impatient"),
        pytest.param(Careless, "handler_raises", id="careless"),
        pytest.param(Leaky, "echo", id="leaky"),
    ],
)
def test_a_broken_engine_is_found_out(make: Any, name: str) -> None:
    """The check that speaks of the broken clause fails."""
    with pytest.raises((AssertionError, OSError)):
        named(name)(make, "tcp")
    while Leaky.opened:
        os.close(Leaky.opened.pop())


def test_check_engine_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which check failed, on which transport, and what it demands."""

    def fail(_make: object, _transport: str) -> None:
        raise AssertionError("nobody answered")

    broken = EngineCheck("echo", "Many clients at once.", ("tcp", "unix"), fail)
    monkeypatch.setattr(engine, "ENGINE_CHECKS", (broken,))
    with pytest.raises(AssertionError, match=r"^echo on tcp: nobody answered \(Many clients at once\.\)$"):
        check_engine(thread.Engine)


def test_check_engine_passes_a_sound_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the checks, through the one call that users make; all of them run one by one in tests/contract."""
    monkeypatch.setattr(engine, "ENGINE_CHECKS", (named("half_close"), named("datagram_echo")))
    check_engine(thread.Engine)


def test_every_check_has_a_name_and_a_meaning() -> None:
    """A failure can be told and picked: names are unique, meanings are sentences."""
    assert len({check.name for check in ENGINE_CHECKS}) == len(ENGINE_CHECKS) > 20
    assert [str(check) for check in ENGINE_CHECKS if not check.meaning.endswith(".")] == []
    assert {transport for check in ENGINE_CHECKS for transport in check.transports} == {
        "tcp",
        "unix",
        "udp",
        "unixgram",
    }


def test_checks_of_signals_want_the_main_thread() -> None:
    """Elsewhere that check says so instead of hanging."""
    said: list[str] = []

    def run() -> None:
        try:
            named("shutdown_from_signal_handler")(thread.Engine, "tcp")
        except AssertionError as error:
            said.append(str(error))

    other = threading.Thread(target=run, daemon=True)
    other.start()
    other.join(10)
    assert said == ["run this check in the main thread"]
