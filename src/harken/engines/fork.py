"""One child process a connection.

Children are waited for by pid, never ``waitpid(-1)``: other parts of the program have children too. A pidfd of each
child in the loop's selector ends its sleep when a child exits, so that a slot is free at once and no zombie stays;
where there are none (before Linux 5.3) the loop's regular turns do it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from harken.engines import Options
from harken.engines._selector import SelectorEngine
from harken.forking import told_in_child
from harken.listener import fork_without_listeners
from harken.settings import count, setting

__all__ = ["Engine"]

MAX_CHILDREN = setting(
    "max_children",
    count(1),
    40,
    unit="processes",
    live=True,
    stdlib="max_children",
    stdlib_default=40,
    meaning="children of the fork engine at once; at the limit connections wait in the backlog",
    origin="socketserver.ForkingMixIn",
)
# Seconds that a killed child may take to be gone: it takes no part in that.
KILL_SECONDS = 1.0
# Seconds between looks at the children where no pidfd can wake us.
_POLL_SECONDS = 0.05


class _Exit:
    """A pidfd, as a door: readable when the child has exited."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


class Engine(SelectorEngine):
    """A child for each connection, at most ``max_children``.

    Attributes:
        children: pids of the children that run; ``ForkingMixIn.active_children`` is this set.
    """

    in_child = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.children: set[int] = set()
        self._ends: dict[int, tuple[_Exit | None, Callable[[int], None] | None]] = {}
        self._starting: set[int] = set()  # of whom another loop must not be told the end yet
        self._reaping = threading.RLock()  # a signal handler may collect, too
        _engines.add(self)

    @property
    def full(self) -> bool:
        """Whether ``max_children`` run."""
        return bool(len(self.children) >= max(1, self.options("max_children")))

    def spawn(self, function: Callable[..., object], *args: Any, done: Callable[[int], None] | None = None) -> int:
        """Run ``function`` in a child; it must return the child's exit status. At the limit, wait for a child to exit.

        Raises:
            OSError: the system starts no more processes.
        """
        self.collect()
        while self.full:
            self._wait_for_exit()
        pid = fork_without_listeners()
        if pid == 0:
            _be_child(function, args)
        self._starting.add(pid)
        self.children.add(pid)
        end = None
        try:
            end = self._open_end(pid)
            if end is not None:
                self.watch(end, self._child_exited)
        finally:
            self._ends[pid] = (end, done)
            self._starting.discard(pid)
        return pid

    def collect(self) -> None:
        """Reap the children that have exited; never blocks."""
        for pid in list(self.children):  # also those that a program added by itself
            if pid not in self._starting:
                self._reap(pid)

    def after_fork(self) -> None:
        """In a child, also in one that the program forks: another thread may have been reaping."""
        self._reaping = threading.RLock()

    def join(self, deadline: float | None) -> int:
        """Wait for the children; see :class:`harken.engines.Engine`."""
        if deadline is None:
            for pid in list(self.children):
                with suppress(ChildProcessError):
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                self._reap(pid)
            return len(self.children)
        self.collect()
        while self.children and time.monotonic() < deadline:
            self._wait_for_exit(deadline - time.monotonic())
        return len(self.children)

    def terminate(self) -> None:
        """Send SIGTERM to the children."""
        for pid in list(self.children):
            self.end_child(pid)

    def kill(self) -> int:
        """Send SIGKILL to the children that are left, and reap them."""
        for pid in list(self.children):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has exited; join() reaps it
        return self.join(time.monotonic() + KILL_SECONDS)

    def end_child(self, pid: int) -> None:
        """Tell one of our children to terminate."""
        if pid in self.children:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                pass  # it has exited; the next collect() reaps it

    def _reap(self, pid: int) -> None:
        with self._reaping:  # of several loops that find it the one that learns its status tells it
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # somebody else reaped it, or SIGCHLD is ignored
                ended, status = pid, 0
            if ended == 0:
                return
            self.children.discard(pid)
            end, done = self._ends.pop(pid, (None, None))
        if end is not None:
            self.unwatch(end)
            os.close(end.fileno())
        if done is not None:
            done(os.waitstatus_to_exitcode(status))

    def _open_end(self, pid: int) -> _Exit | None:
        try:
            return _Exit(os.pidfd_open(pid))
        except (AttributeError, OSError):  # no such call, or no descriptor left: the regular turns reap it
            return None

    def _child_exited(self) -> bool:
        self.collect()
        return False

    def _wait_for_exit(self, timeout: float | None = None) -> None:
        """Sleep until one of our children exits, or for ``timeout`` seconds; then reap."""
        poller = select.poll()
        ends = [end for end, _ in self._ends.values()]
        for end in ends:
            if end is not None:
                poller.register(end, select.POLLIN)
        if None in ends or not ends:
            timeout = _POLL_SECONDS if timeout is None else min(timeout, _POLL_SECONDS)
        poller.poll(None if timeout is None else max(0.0, timeout) * 1000)
        self.collect()
        if not self._ends:  # children that a program added to the set by itself
            self.children.clear()


_engines = told_in_child(Engine)


def _be_child(function: Callable[..., object], args: tuple[Any, ...]) -> None:
    """The child's life. It never returns: no ``finally`` of the parent's frames, no atexit, no second loop may run."""
    status = 1
    try:
        status = int(function(*args) or 0)  # type: ignore[call-overload]
    except BaseException:  # noqa: BLE001 - as stdlib: the exit status says it
        pass
    finally:
        os._exit(status)
