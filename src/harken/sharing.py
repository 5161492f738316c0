"""A door that several processes share: nobody is to wait there for one that cannot come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from harken.acceptor import WAITING
from harken.lifecycle import State

if TYPE_CHECKING:
    from harken.serving import Serving

__all__ = ["NO_HANDLER", "Sharing"]

# Seconds between looks at the door: a little less than between the turns of an idle loop.
LOOK_SECONDS = 0.9
# Seconds that a client may wait for another process that has a handler free, which looks in half of them.
OTHERS_SECONDS = 2 * LOOK_SECONDS
NO_HANDLER = "no handler is free: pool or max_children in use"
"""Why a door is left alone, in the words of ``paused``."""


class Sharing:
    """What one process does for those who wait at a door that others have, too.

    EPOLLEXCLUSIVE wakes one process, and no other hears of whom it was woken for. One that has no handler free would
    keep the others asleep, so it leaves the door before the next one comes. One that is killed, or is kept by a thread
    that holds the interpreter's lock, cannot, so the others look once a second.
    """

    def __init__(self, serving: Serving, readable: Callable[[], bool], watch: Callable[[], None]) -> None:
        """Prepare.

        Args:
            serving: the server.
            readable: tells whether somebody waits at its door.
            watch: watches it, from now on or anew.
        """
        self._serving = serving
        self._readable = readable
        self._watch = watch
        self._look_at = 0.0
        self._awaited_at = math.inf
        self._refuses_until = 0.0
        self._said_free = False

    def turn(self) -> None:
        """Once a turn: leave the door if no handler is free, and else look who waits there."""
        serving = self._serving
        full, serves = serving.engine.full, serving.lifecycle.state is State.SERVING
        self._say_free(serves and not full)
        if full:
            if self.may_rest():
                serving.acceptor.rest(NO_HANDLER)
            return
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            if serves and self._readable():
                self._watch()

    def may_rest(self) -> bool:
        """Tell whether who comes while no handler is free here waits, if only for another process that has one."""
        serving = self._serving
        if not serving.engine.shares_doors:
            return False
        if serving.settings["overload"] == "wait":
            return True
        place, now = serving.bounds.place, time.monotonic()
        return place is not None and now >= self._refuses_until and place.others_are_free

    def is_awaited(self, policy: str) -> bool:
        """Tell whether somebody has waited at a door that was left, for as long as another process may take to come."""
        now = time.monotonic()
        if not self._readable():
            self._awaited_at = math.inf
            return False
        self._awaited_at = min(self._awaited_at, now + (OTHERS_SECONDS if policy != "wait" else 0.0))
        if now < self._awaited_at:
            return False
        self._awaited_at, self._refuses_until = math.inf, now + LOOK_SECONDS
        if policy in WAITING:
            self._serving.acceptor.awaited()
        return True

    def _say_free(self, free: bool) -> None:
        place = self._serving.bounds.place
        if place is not None and self._said_free is not free:
            self._said_free = free
            place.say_free(free)
