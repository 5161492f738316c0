"""Threads that are taken up again: those of the pool engine, and of the thread engine with ``reuse_threads``."""

from __future__ import annotations

import contextvars
import itertools
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from harken.forking import in_child, told_in_child
from harken.lifecycle import at_exit

__all__ = ["Crew", "beside"]

Job = tuple[Callable[..., object], tuple[Any, ...]]

# Seconds after which an idle thread goes: long enough for the pauses within a burst, short enough that the threads of
# a rush hour do not stay. Java's cached pool keeps its own for 60 s; a thread here is started in 50 µs.
IDLE_SECONDS = 10.0

_numbers = itertools.count(1)


class Crew:
    """Reusable threads, at most ``limit`` of them, and jobs that wait for one.

    The books are exact under one lock: ``_count`` is the threads that have not been sent home, ``_idle`` those of them
    that wait and that no job was promised to. A job is put into the queue either for such a thread or, at the limit, as
    backlog that the next free thread takes; below the limit too, when the system starts no more threads. Any waiting
    thread may take any job, or the word to go home (None): promises are counted, not addressed.
    """

    def __init__(self, daemon: Callable[[], bool], limit: int | None = None, max_backlog: int = 0) -> None:
        """Make a crew with no threads yet.

        Args:
            daemon: asked at each thread's start whether it is to be a daemon.
            limit: the largest number of threads, or None.
            max_backlog: how many jobs may wait at the limit before the crew counts as full.
        """
        self.limit = limit
        self.max_backlog = max_backlog
        self.on_room: Callable[[], None] = lambda: None
        self._daemon = daemon
        self._open_books(set())
        _crews.add(self)

    def _open_books(self, threads: set[threading.Thread]) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # looked up now: gevent may have patched it
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0
        self._closing = bool(threads)
        self._threads = threads
        self._count = len(threads)
        self._idle = 0
        self._backlog = 0

    def after_fork(self) -> None:
        """In a child: the threads stayed in the parent, but for the one that forked, which goes when it is done."""
        self._open_books(self._threads & {threading.current_thread()})

    @property
    def full(self) -> bool:
        """Whether every thread is taken and the backlog is at its bound."""
        return (
            self.limit is not None
            and self._backlog >= self.max_backlog
            and self._idle <= 0
            and (self._count >= self.limit or self._backlog > 0)  # there is one below the limit if no thread can be had
        )

    @property
    def running(self) -> int:
        """Jobs that are under way or wait."""
        return self._count - self._idle + self._backlog

    def resize(self, limit: int, max_backlog: int) -> None:
        """Change the bounds; threads above a smaller limit go when they are done."""
        with self._changed:
            self.limit = limit
            self.max_backlog = max_backlog
            self._relieve(limit)
            self._changed.notify_all()

    def submit(self, function: Callable[..., object], *args: Any) -> None:
        """Run ``function(*args)`` in a thread of the crew.

        Raises:
            RuntimeError: a thread was needed and the system starts no more; the job is not run. A crew with a limit
                lets it wait instead while it has any thread.
        """
        with self._lock:
            self._place((function, args))

    def submit_when_room(self, function: Callable[..., object], *args: Any) -> None:
        """As :meth:`submit`, but wait while the crew is full."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self.full)
            self._waiting -= 1
            self._place((function, args))

    def _place(self, job: Job) -> None:
        self._closing = False
        if self._idle > 0:
            self._idle -= 1
            self._jobs.put(job)
        elif self.limit is None or not self._count:
            self._start(job)
        elif self._count >= self.limit:
            self._let_wait(job)
        elif self._backlog:  # no thread could be had, and perhaps one can now: for who has waited longest
            self._let_wait(job)
            self._relieve(self.limit)
        elif not self._try_start(job):
            self._let_wait(job)

    def _let_wait(self, job: Job) -> None:
        self._backlog += 1
        self._jobs.put(job)

    def join(self, deadline: float | None) -> int:
        """Wait until no job runs or waits, then let the threads go; return how many jobs are left at ``deadline``.

        The calling thread's own job does not count.
        """
        own = int(threading.current_thread() in self._threads)
        with self._changed:
            self._waiting += 1
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._changed.wait_for(lambda: self.running <= own, timeout)
            self._waiting -= 1
            left = self.running - own
            threads = list(self._threads)
        self.release()
        for thread in threads if left <= 0 else ():
            if thread is not threading.current_thread():
                thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return max(0, left)

    def release(self) -> None:
        """Send the idle threads home; those at work follow when nothing waits. The next job starts new ones."""
        with self._lock:
            self._closing = True
            for _ in range(self._idle):
                self._jobs.put(None)
            self._count -= self._idle
            self._idle = 0

    def _relieve(self, limit: int) -> None:
        """Start threads for those who wait, as many as there may be and can be had."""
        while self._backlog and self._count < limit and self._try_start(None):
            pass

    def _try_start(self, job: Job | None) -> bool:
        """Start a thread unless the system starts no more; tell which."""
        try:
            self._start(job)
        except RuntimeError:
            return False
        return True

    def _start(self, job: Job | None) -> None:
        """Start a thread, with a first job or, without, for one that waits in the queue.

        A signal may raise while it starts. Then the books go by whether it has taken its order, which it can no more
        once that was taken back.
        """
        order = [job]
        # "process_request_thread" is in the name because monitors of socketserver programs look for it.
        thread = threading.Thread(
            target=self._work,
            args=(order,),
            name=f"harken-{next(_numbers)} (process_request_thread)",
            daemon=self._daemon(),
        )
        self._threads.add(thread)
        self._count += 1
        self._backlog -= job is None
        try:
            thread.start()
        except BaseException:
            with suppress(IndexError):
                order.pop()
                self._threads.discard(thread)
                self._count -= 1
                self._backlog += job is None
            raise

    def _work(self, order: list[Job | None]) -> None:
        try:
            job = order.pop()  # out of the thread's own arguments, which live as long as it does
        except IndexError:
            return
        if job is None:
            job = self._jobs.get()
        while job is not None:
            function, args = job
            try:
                contextvars.Context().run(function, *args)  # fresh, as that of a thread of its own
            except BaseException:  # noqa: BLE001 - shown as in a thread of its own (SystemExit is not), and this one lives on
                _show()
            del job, function, args  # an idle thread must not keep the last connection alive
            job = self._next()
        with self._changed:
            self._threads.discard(threading.current_thread())
            if self._waiting:
                self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._lock:
            promised = self._backlog > 0
            if promised:
                self._backlog -= 1
            elif self._closing or (self.limit is not None and self._count > self.limit):
                self._count -= 1
                return None
            else:
                self._idle += 1
            if self._waiting:
                self._changed.notify_all()
        if self.limit is not None:
            self.on_room()
        while True:
            try:
                return self._jobs.get(timeout=None if promised else IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if self._idle > 0:  # nobody counts on this thread
                        self._idle -= 1
                        self._count -= 1
                        return None
                promised = True


def _show() -> None:
    import sys

    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


# Hooks that may run beside the handlers at once: each sends a line, and one whose peer does not read keeps its thread
# until the connection is cut.
MOST_BESIDE = 32


def beside(function: Callable[..., object], *args: Any) -> None:
    """Run ``function(*args)`` in a thread that goes when there is nothing more to do.

    Raises:
        RuntimeError: as :meth:`Crew.submit`.
    """
    _beside.submit(_then_leave, function, args)


def _then_leave(function: Callable[..., object], args: tuple[Any, ...]) -> None:
    try:
        function(*args)
    finally:
        _beside.release()


_crews = told_in_child(Crew)

_beside = Crew(lambda: True, limit=MOST_BESIDE)


@in_child
def _after_fork() -> None:
    global _beside
    _beside = Crew(lambda: True, limit=MOST_BESIDE)  # the threads stayed in the parent


@at_exit
def _release_all() -> None:
    for crew in list(_crews):
        crew.release()
