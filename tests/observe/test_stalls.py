"""What a command says at its end about places that stalled."""

from __future__ import annotations

from harken.events import Event
from harken.observe.stalls import StallReport


def stalled(place: str, seconds: float, *, ongoing: bool = False) -> Event:
    """Return an event of the watchdog's."""
    return Event("stalled", {"place": place, "function": "handle", "seconds": seconds, "ongoing": ongoing})


def test_says_nothing_of_nothing() -> None:
    """A run without stalls ends without a word."""
    assert StallReport().text() == ""


def test_the_costliest_come_first() -> None:
    """Places stand by the time they cost, with counts; then what to do about them."""
    report = StallReport()
    for place, seconds in (("a.py:1", 0.2), ("b.py:2", 0.5), ("a.py:1", 0.2)):
        report.note(stalled(place, seconds))
    first, *places, last = report.text().splitlines()
    assert first == "harken: 2 places kept the other connections waiting; the costliest:"
    assert places == [
        "  b.py:2 handle: 1 time, 0.50 s in all, 0.50 s at most",
        "  a.py:1 handle: 2 times, 0.40 s in all, 0.20 s at most",
    ]
    assert all(remedy in last for remedy in ("offload()", "gevent", "--engine thread", "--stall-after"))


def test_one_that_goes_on_counts_once() -> None:
    """A long stall is told twice and counted once, with the time that it took in the end."""
    report = StallReport()
    report.note(stalled("a.py:1", 5.0, ongoing=True))
    report.note(stalled("a.py:1", 7.0))
    assert "  a.py:1 handle: 1 time, 7.00 s in all, 7.00 s at most" in report.text()


def test_one_without_an_end_counts() -> None:
    """A handler that never came back is in the report."""
    report = StallReport()
    report.note(stalled("a.py:1", 5.0, ongoing=True))
    assert "  a.py:1 handle: 1 time, 5.00 s in all, 5.00 s at most" in report.text()
