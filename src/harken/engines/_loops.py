"""Threads that are in ``run`` of an engine whose handlers are served elsewhere: each waits, and is told of its end."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator

__all__ = ["Loop", "Loops"]

# Seconds between turns when no loop asks for any.
LONG = 3600.0
# Seconds between looks of a loop's caller. It is nudged when there is news; but a signal that arrives in the moment
# between Python's last look and its falling asleep wakes nobody. stdlib's loop wakes as often.
SIGNAL_SECONDS = 0.5


class Loop:
    """A thread that is in ``run``."""

    def __init__(self, stopped: Callable[[], bool], tick: Callable[[], None], patience: Callable[[], float]) -> None:
        self.stopped = stopped
        self.tick = tick
        self.patience = patience
        self.error: BaseException | None = None
        self.over = False
        self.daemon = threading.current_thread().daemon
        self._nudge = _thread.allocate_lock()
        self._nudge.acquire()

    def nudge(self) -> None:
        """Let it ask whether it is stopped. Any thread, any signal handler."""
        try:
            self._nudge.release()
        except RuntimeError:
            pass  # nudged already

    def finish(self, error: BaseException | None = None) -> None:
        """It is over."""
        self.error = error
        self.over = True
        self.nudge()

    def wait(self) -> None:
        """Wait for the end, by whoever sees it first: a handler that keeps the hub cannot delay it."""
        while not self.over and not self.stopped():
            self._nudge.acquire(timeout=SIGNAL_SECONDS)


class Loops:
    """All of them. The lock under which doors and loops have their turns is the engine's, and its caller's to hold."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        """Begin without any; ``on_end`` is called when one is over."""
        self._loops: list[Loop] = []
        self._on_end = on_end

    def __bool__(self) -> bool:
        return bool(self._loops)

    def __iter__(self) -> Iterator[Loop]:
        return iter(tuple(self._loops))

    def add(self, loop: Loop) -> None:
        """One more."""
        self._loops.append(loop)

    def discard(self, loop: Loop) -> None:
        """One that leaves by itself, if it was not finished."""
        if loop in self._loops:
            self._loops.remove(loop)

    def clear(self) -> None:
        """Forget all, in a forked child."""
        self._loops.clear()

    def finish(self, loop: Loop, error: BaseException | None = None) -> None:
        """It is over, by an error or not."""
        self.discard(loop)
        self._on_end()
        loop.finish(error)

    def fail(self, error: BaseException) -> None:
        """What a door raises ends one of them, which raises it again."""
        for loop in self._loops[:1]:
            self.finish(loop, error)

    def drop_stopped(self) -> None:
        """Finish those that are to stop."""
        for loop in self:
            if loop.stopped():
                self.finish(loop)

    def tick(self) -> None:
        """Give each its turn."""
        for loop in self:
            if loop.stopped():
                self.finish(loop)
                continue
            try:
                loop.tick()
            except BaseException as error:  # noqa: BLE001 - raised again by the loop's caller
                self.finish(loop, error)

    def patience(self) -> float:
        """How long, in seconds, may be slept before the next turn."""
        loops = tuple(self._loops)
        return loops[0].patience() if len(loops) == 1 else min((loop.patience() for loop in loops), default=LONG)
