"""Ctrl-C that Python would drop.

KeyboardInterrupt is raised in whatever Python code the main thread runs next. Where that is a weak reference's callback
(the threading module has one for each thread that goes), a finalizer or a hook of os.fork(), Python shows the exception
and goes on: the program would serve as if nobody had pressed the keys.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

__all__ = ["Interrupts"]


class Interrupts:
    """While the block runs in the main thread, an interrupt that Python drops there is kept for the loop to raise."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """Keep none yet; ``wake`` makes the loop take a turn."""
        self._wake = wake
        self._kept = False
        self._before: Callable[[Any], object] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before, sys.unraisablehook = sys.unraisablehook, self._look
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None and sys.unraisablehook == self._look:  # else a program has put its own above it
            sys.unraisablehook = self._before
        if kind is None:
            self.heed()

    def _look(self, unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt and threading.current_thread() is threading.main_thread():
            self._kept = True
            self._wake()
        elif self._before is not None:
            self._before(unraisable)

    def heed(self) -> None:
        """Raise the interrupt that was kept, if one was; in the main thread alone, since other threads ask, too.

        Raises:
            KeyboardInterrupt: Ctrl-C came.
        """
        if self._kept and threading.current_thread() is threading.main_thread():
            self._kept = False
            raise KeyboardInterrupt

    def before(self, stopped: Callable[[], bool]) -> Callable[[], bool]:
        """Return what asks ``stopped``, and heeds interrupts before."""
        if self._before is None:
            return stopped

        def heeding() -> bool:
            self.heed()
            return stopped()

        return heeding
