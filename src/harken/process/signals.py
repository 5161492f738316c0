"""Signals as messages: a handler only enqueues, and a loop reads the numbers when it has time.

Python runs signal handlers in the main thread between two bytecodes; its C handler, though, writes each signal's number
to the wake-up descriptor at once. Reading the numbers from there, a selector wakes without delay and nothing of ours
runs at a bad moment.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["Inbox", "blocked"]


class Inbox:
    """The signals that came since it was last read. Main thread only."""

    def __init__(self, numbers: Iterable[int]) -> None:
        """Begin to collect signals; each of ``numbers`` loses its default action.

        Args:
            numbers: which signals.
        """
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._numbers = tuple(numbers)
        self._before = {number: signal.signal(number, _ignore) for number in self._numbers}

    def fileno(self) -> int:
        """Return the descriptor that is readable when signals have come."""
        return self._reader.fileno()

    def read(self) -> list[int]:
        """Return the numbers of the signals that came, in order."""
        try:
            return [number for number in self._reader.recv(4096) if number in self._before]
        except BlockingIOError:
            return []

    def close(self) -> None:
        """Put everything back as it was."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()

    def leave_to_parent(self) -> None:
        """In a forked child: take the default actions again, and no longer write into the parent's inbox."""
        signal.set_wakeup_fd(-1)
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)
        self._reader.close()
        self._writer.close()


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
