"""Starting a thread without waiting until it runs.

``Thread.start`` waits for the new thread's word that it has begun: two switches of context and some twenty calls before
the next connection is accepted, a tenth of what a short connection costs. Nothing here needs that word at once. Who
needs it, ``join()`` and ``is_alive()``, asks later, and then waits the microseconds that are left.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from harken.lifecycle import at_exit
from harken.unpatched import patched

__all__ = ["has_begun", "new_thread", "start"]

_Thread = threading.Thread

# The word is kept in an Event that is private to Thread, the same in these versions. On others, and without a GIL, that
# makes one attribute's store visible before the next one's load, threads are started in the plain way.
_KNOWN = sys.version_info[:2] in {(3, 11), (3, 12), (3, 13)} and getattr(sys, "_is_gil_enabled", lambda: True)()


class _Begun(threading.Event):
    """``Thread._started`` of a thread whose starter does not wait."""

    _flag: bool
    _starting = False
    _awaited = False

    def wait(self, timeout: float | None = None) -> bool:  # the last thing that Thread.start does
        self._starting = True
        return True

    def is_set(self) -> bool:
        if self._flag or not self._starting:
            return self._flag
        self._awaited = True
        return super().wait()

    def set(self) -> None:
        self._flag = True
        if self._awaited:  # stored before the waiter looked at the flag, and so seen here, or the flag was seen there
            super().set()

    def _at_fork_reinit(self) -> None:  # in a child this thread will never begin
        self._starting = False
        super()._at_fork_reinit()  # type: ignore[misc]


def new_thread(function: Callable[..., object], args: tuple[Any, ...], *, daemon: bool) -> threading.Thread:
    """Make a thread for ``function(*args)``, of whatever class ``threading.Thread`` is at the moment."""
    if threading.Thread is _Thread:
        return _Thread(target=function, args=args, daemon=daemon)
    thread = threading.Thread(target=function, args=args)  # as stdlib does: a program's own class may take no more
    thread.daemon = daemon
    return thread


def start(thread: threading.Thread) -> None:
    """Start ``thread``, without waiting until it runs where that can be had.

    Raises:
        RuntimeError: the system starts no more threads.
    """
    if _KNOWN and not patched():  # gevent's threads and events are others
        begun = getattr(thread, "_started", None)
        if type(begun) is threading.Event:
            begun.__class__ = _Begun
    thread.start()


def has_begun(thread: threading.Thread) -> bool:
    """Tell whether ``thread`` runs or has run; never waits."""
    begun = getattr(thread, "_started", None)
    if type(begun) is _Begun:
        return begun._flag
    return bool(begun.is_set()) if isinstance(begun, threading.Event) else thread.ident is not None


@at_exit
def _let_begin() -> None:
    """Before the interpreter waits for threads: those that it does not know yet must have told it of themselves."""
    for thread in threading.enumerate():
        thread.is_alive()
