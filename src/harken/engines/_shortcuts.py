"""Ways past a hub's loops: compiled code that goes on serving a door as Python last said, until it is told to ask."""

from __future__ import annotations

from typing import Any

from harken.engines import Door
from harken.engines._datagrams import Datagrams

__all__ = ["Shortcuts"]


class Shortcuts:
    """Those of one hub."""

    def __init__(self) -> None:
        self.datagrams: dict[int, Datagrams] = {}
        """By ``id()`` of the socket."""
        self.lanes: dict[int, Any] = {}
        """By ``id()`` of the door; see :class:`harken.engines.Lane`."""
        self.crowds = 0
        """Sockets with as many datagram handlers that wait as may."""

    def distrust(self) -> None:
        """Something may have changed: ask before more is taken. Any thread."""
        for each in (*self.datagrams.values(), *self.lanes.values()) if self.datagrams or self.lanes else ():
            each.distrust()

    def drop(self, door: Door) -> None:
        """Nobody watches ``door`` any more."""
        lane = self.lanes.pop(id(door), None)
        if lane is not None:
            lane.close()

    def close(self) -> None:
        """The hub is given up. In its thread."""
        for each in (*self.datagrams.values(), *self.lanes.values()):
            each.close()
        self.forget()

    def forget(self) -> None:
        """In a forked child: they are the parent's."""
        self.datagrams.clear()
        self.lanes.clear()
        self.crowds = 0
