"""Starting a thread, and waiting for its word that it runs by one lock.

``Thread.start`` returns when the new thread has begun, and programs rely on that: they ``join()`` what they find in
``server._threads``. It waits by an Event, and the Condition under that costs some twenty calls and a lock made anew: a
twentieth of what a short connection costs. (Not to wait at all is dearer: threads then run many at a time, and glibc
keeps the stacks of few: twice the page faults.)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from harken.unpatched import patched

__all__ = ["has_begun", "new_thread", "start"]

_Thread = threading.Thread

# The word is kept in an Event that is private to Thread, the same in these versions; on others Thread.start waits.
_KNOWN = sys.version_info[:2] in {(3, 11), (3, 12), (3, 13)}


class _Begun(threading.Event):
    """``Thread._started`` with a lock that its one waiter and its one setter share: it is held until the word comes."""

    _flag: bool
    _cond: Any

    def wait(self, timeout: float | None = None) -> bool:  # the last thing that Thread.start does
        if not self._flag:
            with self._cond._lock:
                pass
        return True

    def set(self) -> None:  # the first thing that the new thread does, and once
        self._flag = True
        self._cond._lock.release()


def new_thread(function: Callable[..., object], args: tuple[Any, ...], *, daemon: bool) -> threading.Thread:
    """Make a thread for ``function(*args)``, of whatever class ``threading.Thread`` is at the moment."""
    if threading.Thread is _Thread:
        return _Thread(target=function, args=args, daemon=daemon)
    thread = threading.Thread(target=function, args=args)  # as stdlib does: a program's own class may take no more
    thread.daemon = daemon
    return thread


def start(thread: threading.Thread) -> None:
    """Start ``thread``, and return when it has begun.

    Raises:
        RuntimeError: the system starts no more threads.
    """
    if _KNOWN and not patched():  # gevent's threads and events are others
        begun = getattr(thread, "_started", None)
        if type(begun) is threading.Event:
            begun.__class__ = _Begun
            begun._cond._lock.acquire()  # type: ignore[attr-defined]
    thread.start()


def has_begun(thread: threading.Thread) -> bool:
    """Tell whether ``thread`` runs or has run; never waits."""
    begun = getattr(thread, "_started", None)
    return begun.is_set() if isinstance(begun, threading.Event) else thread.ident is not None
