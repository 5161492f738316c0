"""What bounds a server's connections: the limits at its door, their deadlines, and the bytes held for them.

Each is made when it is first asked for, and only where a setting wants it: what is not bounded costs nothing.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from harken.admission import Admission, wanted
from harken.buffers import Buffers, wanted as wants_buffers
from harken.deadlines import NAMES as DEADLINES, Deadlines
from harken.expiry import Expiry

if TYPE_CHECKING:
    from harken.limits.across import Place
    from harken.records import Record
    from harken.serving import Serving

__all__ = ["Bounds"]


class Bounds:
    """The bounds of one server, which may share those of another that listens for the same handlers."""

    def __init__(self, serving: Serving) -> None:
        self.place: Place | None = None
        """This process's among several over which limits hold; given before any connection comes."""
        self._serving = serving
        self._others: Bounds | None = None
        serving.books.on_open = self._first_open

    def share(self, others: Bounds) -> None:
        """Let the limits of another server hold over this one's connections too; before any came."""
        self._others = others

    @cached_property
    def admission(self) -> Admission | None:
        """The limits that connections must pass; None when none is set, and then nothing is counted either."""
        if self._others is not None:
            made = self._others.admission
        else:
            made = Admission(self.place) if wanted(self._serving.settings) else None
        if made is not None:
            self._follow_admission(made)
        return made

    @cached_property
    def deadlines(self) -> Deadlines | None:
        """The deadlines of its connections; None when none is set."""
        serving = self._serving
        if all(serving.settings[name] is None for name in DEADLINES):
            return None
        made = Deadlines(lambda: serving.connections, Expiry(serving), self._is_entering)
        made.report = lambda address, which, seconds: serving.books.timed_out(None, address, which, seconds)
        made.refresh(serving.settings)
        serving.books.on_open = self._watch
        return made

    @cached_property
    def buffers(self) -> Buffers | None:
        """The bounds of what harken holds for connections; None when none is set, and then nothing is counted."""
        serving = self._serving
        if self._others is not None:
            made = self._others.buffers
        else:
            made = Buffers() if wants_buffers(serving.settings) else None
        if made is not None:
            made.join(serving.books.memory)
            made.refresh(serving.settings)
        serving.connections.buffers = made
        return made

    def refresh(self) -> None:
        """Follow settings that may have changed."""
        made, settings = vars(self), self._serving.settings
        for name in ("admission", "deadlines", "buffers"):
            if made.get(name) is None:
                made.pop(name, None)  # it may be wanted now
        if "admission" in made:
            self._follow_admission(made["admission"])
        for bound in (self.deadlines, self.buffers):
            if bound is not None:
                bound.refresh(settings)

    def rest(self) -> None:
        """End what watches, now that no connection is left to watch."""
        for name in ("deadlines", "buffers"):
            made = vars(self).get(name)
            if made is not None:
                made.stop()

    def _follow_admission(self, admission: Admission) -> None:
        serving = self._serving
        admission.join(serving.connections, serving.books.alarm)
        admission.refresh(serving.settings, serving.engine_name)

    def _first_open(self, record: Record) -> None:
        """Look whether there are deadlines to watch; only once, and once more when settings change."""
        self._serving.books.on_open = None
        if self.deadlines is not None:
            self._watch(record)

    def _watch(self, record: Record) -> None:
        serving = self._serving
        if self.deadlines is not None and not serving.engine.in_child:
            self.deadlines.watch(record)

    def _is_entering(self, record: Record) -> bool:
        """Whether its preambles have still to run or to end: what moves meanwhile is no request's."""
        return self._serving.entry is not None and not record.entered
