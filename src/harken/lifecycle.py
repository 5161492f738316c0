"""The states of a server and the moves between them, and the two things that waiting for a move needs."""

from __future__ import annotations

import _thread
import atexit
import threading
from collections import deque
from collections.abc import Callable
from enum import Enum

from harken.errors import LifecycleError

__all__ = ["MOVES", "Latch", "Lifecycle", "State", "at_exit"]


class State(Enum):
    """Where a server stands."""

    NEW = "new"
    SERVING = "serving"
    SUSPENDED = "suspended"
    STOPPED = "stopped"
    DRAINING = "draining"
    CLOSED = "closed"


# Every move there is. Two loops may serve one server, so serving again is a move; a closed server serves again when it
# was given another socket, as programs that hand listeners around do.
MOVES: dict[State, dict[str, State]] = {
    State.NEW: {"serve": State.SERVING, "drain": State.DRAINING, "close": State.CLOSED},
    State.SERVING: {
        "serve": State.SERVING,
        "suspend": State.SUSPENDED,
        "stop": State.STOPPED,
        "drain": State.DRAINING,
        "close": State.CLOSED,
    },
    State.SUSPENDED: {
        "suspend": State.SUSPENDED,
        "resume": State.SERVING,
        "stop": State.STOPPED,
        "drain": State.DRAINING,
        "close": State.CLOSED,
    },
    State.STOPPED: {"serve": State.SERVING, "drain": State.DRAINING, "close": State.CLOSED},
    State.DRAINING: {"drain": State.DRAINING, "stop": State.DRAINING, "close": State.CLOSED},
    State.CLOSED: {"serve": State.SERVING, "stop": State.CLOSED, "drain": State.CLOSED, "close": State.CLOSED},
}

_REMEDY = {
    "serve": "make a new server",
    "suspend": "call serve_forever() first",
    "resume": "call suspend() first",
}


class Lifecycle:
    """The state of one server."""

    def __init__(self) -> None:
        self.state = State.NEW

    def move(self, verb: str) -> State:
        """Make a move and return the new state.

        Raises:
            LifecycleError: the table has no such move from here; the state is left as it was.
        """
        after = MOVES[self.state].get(verb)
        if after is None:
            remedy = _REMEDY.get(verb)
            raise LifecycleError(
                f"cannot {verb} a server that is {self.state.value}" + (f"; {remedy}" if remedy else "")
            )
        self.state = after
        return after


class Latch(threading.Event):
    """An event that a signal handler may set, read and wait for.

    ``threading.Event`` guards itself by a lock that is not re-entrant: a signal handler that runs while the same
    thread is inside ``set()`` or ``wait()`` deadlocks. Here every step is one atomic operation on a deque or a lock.

    Attributes:
        begun: whether ``clear()`` was ever called: whether there is anything to wait for.
        owners: identifiers of the threads that called ``clear()`` and not yet ``set()``; they never wait.
    """

    def __init__(self, *, owned: bool = False) -> None:
        """Make a latch that is not set.

        Args:
            owned: whether a thread that cleared it is refused to wait for it: only that thread will ever set it.
        """
        super().__init__()
        self._owned = owned
        self._on = False
        self._waiters: deque[_thread.LockType] = deque()
        self.begun = False
        self.owners: set[int] = set()

    def is_set(self) -> bool:
        """Tell whether the latch is set."""
        return self._on

    def clear(self) -> None:
        """Unset it; the calling thread becomes an owner, if it can be owned."""
        self._on = False
        self.begun = True
        if self._owned:
            self.owners.add(threading.get_ident())

    def set(self) -> None:
        """Set it and release everybody who waits."""
        self._on = True
        self.owners.clear()
        while True:
            try:
                self._waiters.popleft().release()
            except IndexError:
                return

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; tell whether it is. An owner never waits."""
        waiter = _thread.allocate_lock()
        waiter.acquire()
        self._waiters.append(waiter)
        if self._on or threading.get_ident() in self.owners:
            timeout = 0
        if not waiter.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            try:
                self._waiters.remove(waiter)
            except (ValueError, IndexError, RuntimeError):
                pass  # set() is releasing it at this moment
        return self._on


def at_exit(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the interpreter ends, before it waits for threads that are not daemons.

    ``atexit`` runs after that wait, too late to release a thread that waits for work or for a silent client.
    ``threading._register_atexit`` (3.9 on, used by ``concurrent.futures``) runs before it.
    """
    register = getattr(threading, "_register_atexit", atexit.register)
    try:
        register(callback)
    except RuntimeError:  # the interpreter is ending already: nothing will be waited for anew
        pass
