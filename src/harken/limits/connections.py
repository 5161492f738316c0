"""``max_connections``: how many may be open at once."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from harken import settings
from harken.limits.across import MARGIN

if TYPE_CHECKING:
    from harken.limits.across import Place
    from harken.peer import Peer
    from harken.settings import Settings

__all__ = ["MAX_CONNECTIONS", "THREAD_MAX_CONNECTIONS", "MaxConnections", "in_force"]

# The default of ``serve`` on the thread engine: a thread holds some 50 to 100 KiB, and a thousand take turns at the
# interpreter's lock; gunicorn's worker_connections is 1000 as well.
THREAD_MAX_CONNECTIONS = 1000

MAX_CONNECTIONS = settings.setting(
    "max_connections",
    settings.count(1, optional=True),
    None,
    serve=10_000,
    unit="connections",
    live=True,
    meaning="connections open at once over all listeners, also those in their preamble; beyond, `overload` says",
    origin=f"what green threads hold with ease; under serve on the thread engine it is {THREAD_MAX_CONNECTIONS} unless "
    "set, as gunicorn's worker_connections",
)


def in_force(values: Settings, engine: str) -> settings.Value:
    """Return ``max_connections`` for an engine: what was set, or else the engine's default."""
    found = values.find(MAX_CONNECTIONS.name)
    if engine != "thread" or found.value is None or not found.source.startswith("default"):
        return found
    return settings.Value(min(found.value, THREAD_MAX_CONNECTIONS), f"{found.source} with threads")


# The share of places that must be free before a full server accepts again, unless some have been free for
# SETTLE_SECONDS: so that a full server does not pause and resume for each single connection, and nobody starves.
HYSTERESIS = 0.05
# Seconds after which a single free place is enough: no client notices, and twenty pauses a second cost nothing.
SETTLE_SECONDS = 0.05


class MaxConnections:
    """Lets at most ``maximum`` in; None counts only."""

    def __init__(self, maximum: int | None, place: Place | None = None) -> None:
        """Begin with nobody inside.

        Args:
            maximum: how many.
            place: this process's among several, over all of which the number holds; None: it is alone.
        """
        self.maximum = maximum
        self._place = place
        # One entry each: append and pop are atomic, whatever thread, signal handler or collection they run in.
        self._inside: deque[None] = deque()

    @property
    def inside(self) -> int:
        """How many have been let in and not released."""
        return len(self._inside) if self._place is None else self._place.inside

    @property
    def shared(self) -> bool:
        """Whether other processes let in too, so that there may be room at any moment, or none any more."""
        return self._place is not None

    @property
    def near(self) -> bool:
        """Whether other processes may take the places that are left before this one has."""
        return self._place is not None and self.maximum is not None and self._place.near(self.maximum)

    @property
    def full(self) -> bool:
        """Whether the next one would be refused."""
        return self.maximum is not None and self.inside >= self.maximum

    @property
    def low(self) -> bool:
        """Whether so many have left that a full server may accept again at once."""
        return self.maximum is None or self.inside <= self.maximum - max(1, int(self.maximum * HYSTERESIS))

    def spare(self, most: int, parties: int) -> int:
        """How many may be let in, at most ``most``, before anybody must look again whether there is room.

        Args:
            most: no more than so many.
            parties: in this process, that let in without looking meanwhile.
        """
        if self.maximum is None:
            return most
        room = max(0, self.maximum - self.inside)
        if self._place is not None:
            parties *= self._place.processes
        if parties == 1:
            return min(most, room)
        return min(most, MARGIN) if room >= MARGIN * parties else 0

    def count(self) -> None:
        """Count one that is in already, whatever the maximum."""
        self._inside.append(None)
        if self._place is not None:
            self._place.add(1)

    def admit(self, peer: Peer | None) -> str | None:
        """Let one in while fewer than the maximum are inside."""
        if self._place is not None:
            if self.maximum is None:
                self._place.add(1)
            elif not self._place.admit(self.maximum):
                return "max_connections"
            self._inside.append(None)
            return None
        self._inside.append(None)
        if self.maximum is not None and len(self._inside) > self.maximum:
            self._inside.pop()
            return "max_connections"
        return None

    def release(self, peer: Peer | None) -> None:
        """One has left."""
        self._inside.pop()
        if self._place is not None:
            self._place.add(-1)
