"""One thread a connection.

By default a thread is new for each connection and gone after it, so that ``threading.local`` is fresh, names differ and
``threading.enumerate()`` shows who is served: programs rely on all three. With ``reuse_threads`` idle threads are taken
up again, and a connection no longer costs a thread's start.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from harken.engines import Options
from harken.engines._crew import Crew
from harken.engines._selector import SelectorEngine
from harken.engines._starting import has_begun, new_thread, start
from harken.settings import flag, setting

__all__ = ["Engine", "Threads"]

REUSE_THREADS = setting(
    "reuse_threads",
    flag(),
    False,
    serve=True,
    meaning="take up idle threads again on the thread engine; thread-locals then outlive a connection",
    origin="a thread's start and end are half of the cost of a short connection (docs/explanation/performance.md)",
)


class Threads(list[threading.Thread]):
    """The threads that ``server_close()`` waits for: ``server._threads``, as programs read it.

    Each new thread has two older ones looked at, in turn, and dropped if they have ended. That costs O(1) a connection,
    where stdlib looks at every thread at every accept, and ended threads still go soon, before they age in the garbage
    collector's books.
    """

    # More than one, so that ended threads go faster than new ones come.
    LOOKS = 2

    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    def append(self, thread: threading.Thread) -> None:
        """Add a thread that is to be waited for; daemons are not."""
        at = self._next
        for _ in range(self.LOOKS):
            if at >= len(self):
                at = 0
                if not self:
                    break
            if ended(self[at]):
                last = self.pop()
                if at < len(self):
                    self[at] = last
            else:
                at += 1
        self._next = at
        if not thread.daemon:
            super().append(thread)

    def reap(self) -> None:
        """Drop all threads that have ended."""
        self[:] = [thread for thread in self if not ended(thread)]

    def pop_all(self) -> list[threading.Thread]:
        """Empty the list and return what was in it."""
        everything = list(self)
        del self[: len(everything)]
        return everything

    def join(self, deadline: float | None = None) -> int:
        """Wait for the threads, but not for the calling one; return how many are alive at ``deadline``."""
        alive = 0
        for thread in self.pop_all():
            if thread is threading.current_thread():
                continue
            if not has_begun(thread):
                continue  # recorded, and then the system refused to start it
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self.append(thread)
                alive += 1
        return alive


def ended(thread: threading.Thread) -> bool:
    """Tell whether ``thread`` has run and is over; one that is just being started is not."""
    return has_begun(thread) and not thread.is_alive()


class Engine(SelectorEngine):
    """A thread for each connection, without bound.

    Attributes:
        threads: the running threads that are not daemons.
    """

    bursts = True
    full = False  # any number of threads: no property need say so at each connection

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.threads = Threads()
        self._crew = Crew(lambda: bool(self.options("daemon_threads"))) if options("reuse_threads") else None

    def spawn(self, function: Callable[..., object], *args: Any, done: Callable[[int], None] | None = None) -> int:
        """Run ``function`` in a thread of its own.

        Raises:
            RuntimeError: the system starts no more threads.
        """
        if self._crew is not None:
            self._crew.submit(function, *args)
            return 0
        thread = new_thread(function, args, daemon=bool(self.options("daemon_threads")))
        waited_for = self.options("block_on_close")
        if waited_for:
            self.threads.append(thread)  # before it runs: its handler may look
        try:
            start(thread)
        except RuntimeError:
            if waited_for and thread in self.threads:
                self.threads.remove(thread)
            raise
        return 0

    def show_threads(self, server: Any) -> None:
        """Let programs read the threads that are waited for from ``server``, as its ``process_request`` would."""
        if getattr(server, "block_on_close", False) and "_threads" not in vars(server):
            server._threads = self.threads

    def join(self, deadline: float | None) -> int:
        """Wait for the threads that are not daemons; see :class:`harken.engines.Engine`."""
        alive = self.threads.join(deadline)
        return alive + (self._crew.join(deadline) if self._crew is not None else 0)
