"""What a command says at its end about handlers that kept the hub from other connections."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from harken import events
from harken.observe.log import escape
from harken.unpatched import patched

__all__ = ["StallReport", "joined", "report_at_exit"]

# Places shown: enough to act upon; the log has every stall.
MOST_SHOWN = 5
# Places remembered; more than a program of any size has.
MOST_KEPT = 256
REMEDY = (
    "give what blocks there to harken.green.offload(), let gevent patch it (python -m gevent.monkey), or take "
    "--engine thread"
)
REMEDY_IN_GEVENT = "give what blocks there, which gevent could not patch, to harken.green.offload()"


@dataclass(slots=True)
class _Place:
    """What was seen of one place."""

    function: str
    times: int = 0
    seconds: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        self.times += 1
        self.seconds += seconds
        self.longest = max(self.longest, seconds)


class StallReport:
    """Gathers ``stalled`` events; :meth:`text` says which places cost most."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._ongoing: dict[str, events.Event] = {}

    def note(self, event: events.Event) -> None:
        """Take in one event."""
        place = str(event.place)
        if event.ongoing:  # told again when it is over, if it ever is
            self._ongoing[place] = event
            return
        self._ongoing.pop(place, None)
        self._add(place, event)

    def _add(self, place: str, event: events.Event) -> None:
        if place in self._places or len(self._places) < MOST_KEPT:
            self._places.setdefault(place, _Place(event.function)).add(event.seconds)

    def rows(self) -> list[dict[str, Any]]:
        """Return what is known of each place, costliest first; what goes on still has no seconds yet. Any thread."""
        known = {place: asdict(seen) for place, seen in list(self._places.items())}
        for place, event in list(self._ongoing.items()):
            known.setdefault(place, asdict(_Place(event.function)))
        return joined({"place": place, **seen} for place, seen in known.items())

    def text(self) -> str:
        """Return what there is to say; empty when nothing stalled."""
        for place, event in self._ongoing.items():
            self._add(place, event)
        self._ongoing.clear()
        if not self._places:
            return ""
        worst = sorted(self._places.items(), key=lambda entry: -entry[1].seconds)
        lines = [f"harken: {_count(len(worst), 'place')} kept the other connections waiting; the costliest:"]
        lines += [
            f"  {escape(place)} {escape(seen.function)}: {_count(seen.times, 'time')}, "
            f"{seen.seconds:.2f} s in all, {seen.longest:.2f} s at most"
            for place, seen in worst[:MOST_SHOWN]
        ]
        remedy = REMEDY_IN_GEVENT if patched() else REMEDY
        return "\n".join((*lines, f"harken: {remedy}; --stall-after says from when on it counts"))


def joined(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add up what several processes know of the same places; costliest first."""
    total: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = total.setdefault(row["place"], {**row, "times": 0, "seconds": 0.0, "longest": 0.0})
        known["times"] += row["times"]
        known["seconds"] += row["seconds"]
        known["longest"] = max(known["longest"], row["longest"])
    return sorted(total.values(), key=lambda row: -row["seconds"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def report_at_exit() -> None:
    """Gather from now on, and write the report to stderr when this process ends."""
    report, process = StallReport(), os.getpid()
    events.subscribe(report.note, "stalled")

    def write() -> None:
        text = report.text()
        if text and os.getpid() == process:  # not in a forked child, which ran none of it
            print(text, file=sys.stderr)

    atexit.register(write)
