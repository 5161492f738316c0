"""Signals as messages: a handler only enqueues, and a loop reads the numbers when it has time.

Python runs signal handlers in the main thread between two bytecodes; its C handler, though, writes each signal's number
to the wake-up descriptor at once. Reading the numbers from there, a selector wakes without delay and nothing of ours
runs at a bad moment.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

__all__ = ["COMMANDS", "ENDINGS", "MEANINGS", "Early", "Inbox", "Meaning", "blocked", "hold_back", "wakeup_pipe"]

ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
COMMANDS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH)


class Meaning(NamedTuple):
    """What a signal does to a service."""

    supervisor: str
    """Sent to a supervisor."""
    alone: str
    """Sent to the only process, ``workers=0``."""


_SAME = "the same"

MEANINGS: dict[signal.Signals, Meaning] = {
    signal.SIGTERM: Meaning(
        "drain: serve what is there and what has reached the backlog, then end, with status 0, or with 3 when "
        "connections were cut after `drain_timeout`",
        _SAME,
    ),
    signal.SIGINT: Meaning(
        "stop now, a drain too: every connection is shut; status 0, or 3 when a drain was cut short", _SAME
    ),
    signal.SIGQUIT: Meaning("as INT", _SAME),
    signal.SIGHUP: Meaning(
        "load code, settings and certificates anew: the old workers drain once as many new ones are ready; when the "
        "new code does not start, the old ones stay. A program that calls `harken.serve()` itself has its code in "
        "memory: there it is USR2",
        "drain, then become the new program, with the same pid; who connects meanwhile waits in the backlog. A program "
        "that cannot begin ends, with status 1",
    ),
    signal.SIGUSR1: Meaning("open the log files anew, after a rotation; workers do too", _SAME),
    signal.SIGUSR2: Meaning(
        "start a new copy of the program, with the listeners; this one drains once that is ready. A copy that ends, or "
        "is not ready within `upgrade_timeout` seconds, is killed, and this one serves on; a HUP that came meanwhile "
        "is obeyed then. Refused by process 1 of a container",
        _SAME,
    ),
    signal.SIGTTIN: Meaning("one worker more", "nothing"),
    signal.SIGTTOU: Meaning("one worker less, but never less than one", "nothing"),
    signal.SIGWINCH: Meaning(
        "let all workers drain and keep the listeners, unless a terminal is there; HUP brings workers back", "nothing"
    ),
}
"""What `serve` heeds, in the words of `docs/reference/signals.md`. The names and meanings are gunicorn's."""


class Early:
    """Commands that come before a service heeds any, or when it does no more: by default most would end it.

    Main thread only.
    """

    def __init__(self) -> None:
        """Begin to note them, and let those in that a predecessor held back; see :func:`hold_back`."""
        self._came: list[int] = []
        self._before = {number: signal.signal(number, self._note) for number in COMMANDS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, COMMANDS)

    def _note(self, number: int, _frame: object) -> None:
        self._came.append(number)

    def repeat(self) -> None:
        """Send again what has come, now that it is heeded."""
        came, self._came = self._came, []
        for number in came:
            os.kill(os.getpid(), number)

    def over(self, status: int) -> None:
        """The service is over and its process ends: signals that still come leave its exit status as it is.

        A second one that ends cuts short what the program does yet, and its threads.
        """

        def end(_number: int, _frame: object) -> None:
            os._exit(status)

        for number in MEANINGS:
            signal.signal(number, end if number in ENDINGS else _ignore)
        atexit.register(_ignore_all)  # when the interpreter goes, it gives up its handlers
        self._before = {}

    def close(self) -> None:
        """Put everything back as it was, unless all is over."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def hold_back() -> None:
    """Just before exec: let commands wait for the new program, which has no handlers yet. Main thread only.

    Those that end have had their handlers called when this returns, and from now on they end the process at once.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, COMMANDS)
    with blocked():
        for number in ENDINGS:
            signal.signal(number, signal.SIG_DFL)


def _ignore_all() -> None:
    with blocked():  # Python complains with a traceback of one that comes while its handler is taken away
        for number in MEANINGS:
            signal.signal(number, signal.SIG_IGN)


def wakeup_pipe() -> tuple[int, int]:
    """Make what signals' numbers are written to: a pipe's reader, and its writer, which never waits.

    It holds 65,536 of them, pipe(7). A pair of sockets holds 278, which a storm of HUPs fills, and TERM would be lost.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    return reader, writer


class Inbox:
    """The signals that came since it was last read. Main thread only."""

    def __init__(self, numbers: Iterable[int]) -> None:
        """Begin to collect signals; each of ``numbers`` loses its default action.

        Args:
            numbers: which signals.
        """
        self._reader, self._writer = wakeup_pipe()
        os.set_blocking(self._reader, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._numbers = tuple(numbers)
        self._before = {number: signal.signal(number, _ignore) for number in self._numbers}

    def fileno(self) -> int:
        """Return the descriptor that is readable when signals have come."""
        return self._reader

    def read(self) -> list[int]:
        """Return the numbers of the signals that came, in order."""
        try:
            return [number for number in os.read(self._reader, 4096) if number in self._before]
        except BlockingIOError:
            return []

    def close(self, *, last: bool = False) -> None:
        """Put everything back as it was.

        Args:
            last: the process ends, and signals that still come do nothing.
        """
        for number, handler in self._before.items():
            signal.signal(number, _ignore if last else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def leave_to_parent(self) -> None:
        """In a forked child: take the default actions again, and no longer write into the parent's inbox."""
        signal.set_wakeup_fd(-1)
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)
        os.close(self._reader)
        os.close(self._writer)


def _ignore(signum: int, frame: object) -> None:
    """The number is in the inbox already."""


@contextmanager
def blocked() -> Iterator[None]:
    """Let no signal in while the block runs: around fork(), until the child has an inbox of its own or none.

    A signal that a child got before would be written into its parent's inbox, which both share.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
