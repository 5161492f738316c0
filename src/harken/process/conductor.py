"""Lets a thread act on a process's signals, whatever the main thread does meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from harken.process.signals import wakeup_pipe

__all__ = ["SIGNALS", "Abandoned", "Conductor"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Abandoned(BaseException):
    """Raised in the main thread, out of a handler that keeps it although its time is over."""


class Conductor:
    """Hands signals to a function, in a thread.

    Python runs signal handlers in the main thread, between two bytecodes: not while a handler of the inline engine
    waits there for its client, nor when the signal came just before it began to. The interpreter's own C handler,
    though, writes each signal's number to the wake-up descriptor at once, and a thread reads it from there.
    """

    def __init__(self, obey: Callable[[int], None]) -> None:
        """Heed nothing yet.

        Args:
            obey: called with each signal's number, in a thread; must not wait.
        """
        self._obey = obey
        self.afterwards: Callable[[int, FrameType | None], object] | None = None
        """What handles signals that come later still, when the process ends then; None: who did before."""
        self._conductor: threading.Thread | None = None
        self._heeding = False
        self._abandon = False
        self._own_terms = 0  # sent by us, to be obeyed by nobody
        self._numbers: Sequence[int] = ()

    @contextmanager
    def heeding(self, numbers: Sequence[int] = SIGNALS) -> Iterator[None]:
        """Heed these signals while the block runs, if that is in the main thread; obey them after :meth:`begin`."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = wakeup_pipe()
        self._conductor = threading.Thread(target=self._conduct, args=(reader,), name="harken-signals", daemon=True)
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._heeding = True
        self._numbers = numbers
        before = {number: signal.signal(number, self._in_main_thread) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, self.afterwards or handler)
            self._heeding = False
            signal.set_wakeup_fd(wakeup)
            os.close(writer)
            if self._conductor.ident is not None:
                self._conductor.join()
            self._conductor = None
            os.close(reader)

    def begin(self) -> None:
        """Obey, first what has come since the block of :meth:`heeding` began."""
        if self._conductor is not None:
            self._conductor.start()

    def be_a_child(self) -> None:
        """In a forked child: signals mean what they mean to any process."""
        if self._heeding:
            signal.set_wakeup_fd(-1)
            for number in self._numbers:
                signal.signal(number, signal.SIG_DFL)

    def abandon(self) -> None:
        """Raise :class:`Abandoned` in the main thread, if signals are heeded there. Another thread."""
        main = threading.main_thread().ident
        if self._heeding and main is not None:
            self._abandon = True
            self._own_terms += 1
            signal.pthread_kill(main, signal.SIGTERM)  # ends what it waits for, too

    def _in_main_thread(self, _number: int, _frame: FrameType | None) -> None:
        if self._abandon:
            self._abandon = False
            raise Abandoned

    def _conduct(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number == signal.SIGTERM and self._own_terms:
                    self._own_terms -= 1
                    continue
                try:
                    self._obey(number)
                except Exception:  # noqa: BLE001 - the next signal must be obeyed all the same
                    traceback.print_exc()
