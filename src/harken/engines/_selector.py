"""The loop that the blocking engines share: a selector over the doors, and a waker."""

from __future__ import annotations

import selectors
import threading
from collections.abc import Callable

from harken.engines import Door, Engine, Options
from harken.engines._exclusive import ExclusiveSelector
from harken.listener import LOST_SECONDS, NO_ROOM
from harken.waker import Waker

__all__ = ["SelectorEngine"]

# Connections taken from one door in one turn: the other doors, and service_actions(), get theirs.
MAX_BURST = 64


class SelectorEngine(Engine):
    """``watch``, ``unwatch``, ``run`` and ``wake`` for engines whose handlers block."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        # By identity: a program's server class may compare by value and be unhashable.
        self._doors: dict[int, tuple[Door, Callable[[], bool | None]]] = {}
        self._anew: set[int] = set()
        self._generation = 0
        self._wakers: list[Waker] = []
        self._waiting: set[int] = set()  # threads that are at the doors, or on their way

    def watch(self, door: Door, on_readable: Callable[[], bool | None]) -> None:
        """Watch ``door``; see :class:`Engine`."""
        if self.shares_doors and id(door) in self._doors:
            self._anew.add(id(door))
        self._doors[id(door)] = (door, on_readable)
        self._generation += 1
        self.wake()

    def unwatch(self, door: Door) -> None:
        """Stop watching ``door``; see :class:`Engine`."""
        if self._doors.pop(id(door), None) is not None:
            self._generation += 1
            self.wake()

    def wake(self) -> None:
        """Make every thread in ``run`` take a turn."""
        for waker in list(self._wakers):
            waker.wake()

    def run(self, stopped: Callable[[], bool], tick: Callable[[], None], patience: Callable[[], float]) -> None:
        """Serve the doors until ``stopped``; see :class:`Engine`."""
        waker, thread = Waker(), threading.get_ident()
        self._wakers.append(waker)
        try:
            with ExclusiveSelector() if self.shares_doors else self.options("selector")() as selector:
                selector.register(waker, selectors.EVENT_READ)
                generation, lost = -1, False
                while True:
                    self._waiting.add(thread)  # first: whoever stops us and does not find us here need not wait for us
                    if stopped():
                        return
                    if lost or generation != self._generation:
                        first, generation = generation < 0, self._generation
                        lost = not self._register(selector, first)
                    ready = selector.select(min(patience(), LOST_SECONDS) if lost else patience())
                    self._waiting.discard(thread)
                    if stopped():
                        self._take_last(ready)
                        return
                    for key, _ in ready:
                        if key.fileobj is waker:
                            waker.drain()
                        elif not self._serve(key.data, stopped, tick):
                            return
                    tick()
        finally:
            self._waiting.discard(thread)
            self._wakers.remove(waker)
            waker.close()

    @property
    def holds_doors(self) -> bool:
        """Whether a thread in ``run`` is in its poll(); see :class:`Engine`."""
        return bool(self._waiting)

    def _take_last(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        """Take the one for whom we were woken, at a door that others share: by EPOLLEXCLUSIVE they were not."""
        for key, _ in ready if self.shares_doors else ():
            _, on_readable = self._doors.get(key.data, (None, None))
            if on_readable is not None:
                on_readable()

    def _register(self, selector: selectors.BaseSelector, first: bool) -> bool:
        """Bring the selector's doors up to date with ours. A selector may be the program's own: public methods only.

        A shared door that is watched once more is registered anew: the kernel looks then who waits there already.

        Returns:
            Whether the kernel had room for all; asked the ``first`` time, it must.
        """
        wanted, anew, self._anew = dict(self._doors), self._anew, set()
        for key in list(selector.get_map().values()):
            if key.data is not None and (key.data in anew or wanted.pop(key.data, None) is None):
                selector.unregister(key.fileobj)
        complete = True
        for number, (door, _) in wanted.items():
            try:
                selector.register(door, selectors.EVENT_READ, number)
            except OSError as error:
                if first or error.errno not in NO_ROOM:
                    raise
                complete = False
        return complete

    def _serve(self, number: int, stopped: Callable[[], bool], tick: Callable[[], None]) -> bool:
        """Take a burst from one door while it is watched; False when the loop must end."""
        for _ in range(MAX_BURST):
            _, on_readable = self._doors.get(number, (None, None))
            if on_readable is None or not on_readable():
                break
            if stopped():
                return False
            tick()
        return True
