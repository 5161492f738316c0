"""What a loop says of itself, and a watchdog that finds what keeps it: on every kind of hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harken import events
from harken.stalls import Tally, Watchdog

AFTER = 0.1  # seconds from which on a test's handler is late
STALL = 0.4  # seconds that it keeps the hub
PATIENCE = 10.0


class Watched:
    """A stage whose hub is watched, and what was told of it."""

    def __init__(self, stage: Any, after: float | None = AFTER) -> None:
        self.told: list[events.Event] = []
        self.tally = Tally()
        self.sent: list[float] = []
        self.watchdog = Watchdog(stage.hub.beat, tally=self.tally, send=lambda: self.sent.append(time.time()))
        self.watchdog.after = after
        self._unsubscribe = events.subscribe(self.told.append, "stalled")
        self.watchdog.start()

    def stop(self) -> None:
        """End the watchdog, which tells what it knows."""
        self.watchdog.stop()
        self._unsubscribe()


@pytest.fixture
def watched(stage: Any) -> Iterator[Watched]:
    """A watched stage."""
    made = Watched(stage)
    yield made
    made.stop()


def line_of(marker: str) -> int:
    """Return the number of the line of this file that ends with a comment."""
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {marker}"))


def sleeps() -> None:
    """Stall: a plain sleep."""
    time.sleep(STALL)  # it sleeps


def computes() -> None:
    """Stall: a loop of Python code."""
    end = time.monotonic() + STALL
    while time.monotonic() < end:  # it computes
        pass


def locks() -> None:
    """Stall: a lock that another thread holds."""
    lock = threading.Lock()
    lock.acquire()
    release = threading.Timer(STALL, lock.release)
    release.start()
    lock.acquire()  # it locks
    release.join()


def holds_the_gil() -> None:
    """Stall: one call that gives nobody else a turn, of as many steps as the machine does in ``STALL``."""
    text, took = "a" * 16, 0.0
    while took < STALL:
        began = time.monotonic()
        re.match(r"(a+)+$", text + "b")  # it holds the GIL
        took = time.monotonic() - began
        text += "a"


@pytest.mark.parametrize(
    ("stall", "marker"),
    [(sleeps, "it sleeps"), (computes, "it computes"), (locks, "it locks"), (holds_the_gil, "it holds the GIL")],
)
def test_finds(stage: Any, watched: Watched, stall: Callable[[], None], marker: str) -> None:
    """Each kind of stall is told of with the line that the program's author wrote, and how long it took."""

    def timed() -> float:
        began = time.monotonic()
        stall()
        return time.monotonic() - began

    (took,) = stage.run(timed)
    watched.stop()
    told = watched.told[-1]
    assert (told.file, told.line, told.function) == (__file__, line_of(marker), stall.__name__)
    assert took * 0.9 < told.seconds < took + STALL / 2
    assert told.place == f"{told.file}:{told.line}"
    assert f'File "{__file__}", line {told.line}, in {stall.__name__}\n' in told.stack
    assert watched.tally.counts[told.place] >= 1


DNS = """
import socket, sys, time
silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
silent.bind(("127.0.0.1", 53))
from harken import _hub, events
from harken.stalls import Watchdog
hub = _hub.Hub()
watchdog = Watchdog(hub.beat)
watchdog.after = 0.1
events.subscribe(lambda event: print(event.function, event.seconds > 0.5, flush=True), "stalled")
watchdog.start()
def looks_up():
    try:
        socket.getaddrinfo("slow.example", 80)
    except OSError:
        pass
green = hub.spawn(looks_up)
hub.run(lambda: green.dead, lambda: 1.0, lambda: None)
watchdog.stop()
"""


def test_finds_a_blocking_look_up(kind: ModuleType, tmp_path: Path) -> None:
    """A name that the resolver waits for is told of at the caller's line; the name server answers nobody."""
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    prepare = f'ip link set lo up && mount --bind {resolver} /etc/resolv.conf && exec "$0" "$@"'
    command = ["unshare", "--net", "--mount", "--map-root-user", "sh", "-c", prepare, sys.executable, "-c", DNS]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, "HARKEN_HUB": kind.KIND, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
        )
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("needs a kernel that lets tests have namespaces of their own")
    assert done.stdout.splitlines() == ["looks_up True"], done.stderr


def test_tells_once(stage: Any, watched: Watched) -> None:
    """A stall is one event, and the next one another."""
    stage.run(sleeps, sleeps)
    watched.stop()
    assert [event.ongoing for event in watched.told] == [False, False]
    assert watched.tally.counts == {watched.told[0].place: 2}


def test_is_silent_when_all_have_their_turns(stage: Any, watched: Watched) -> None:
    """Green threads that work a little and wait keep nobody, however long they live and many they are."""

    def works() -> None:
        for _ in range(60):
            end = time.monotonic() + 0.001
            while time.monotonic() < end:
                pass
            stage.hub.sleep(0.001)

    stage.run(works, works, works)
    watched.stop()
    assert watched.told == []


def test_tells_when_a_stall_goes_on(stage: Any, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is late when the watchdog has to go is told of as going on."""
    from harken import stalls

    monkeypatch.setattr(stalls, "LEAVE_SECONDS", PATIENCE)

    def stops_the_watchdog() -> None:
        end = time.monotonic() + PATIENCE
        while watched.watchdog._seen is None and time.monotonic() < end:
            time.sleep(0.01)
        watched.stop()
        assert [event.ongoing for event in watched.told] == [True]

    assert stage.run(stops_the_watchdog) == [None]


def test_can_be_told_to_look_later(stage: Any, watched: Watched) -> None:
    """``after`` changes while the loop runs; None ends the looking."""
    watched.watchdog.after = None
    stage.run(sleeps)
    watched.watchdog.after = 10 * STALL
    stage.run(sleeps)
    assert watched.told == []
    watched.watchdog.after = AFTER
    stage.run(sleeps)
    watched.stop()
    assert len(watched.told) == 1


def test_sleeps_while_the_loop_sleeps(stage: Any, watched: Watched) -> None:
    """An idle machine is not woken: while the hub waits, its watchdog is not scheduled once."""
    stage.run(lambda: stage.hub.sleep(0.01))
    switches = []

    def count() -> None:
        watchdog = watched.watchdog._thread
        assert watchdog is not None
        status = Path(f"/proc/self/task/{watchdog.native_id}/status").read_text()
        switches.append(int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)[1]))  # type: ignore[index]

    timers = [threading.Timer(seconds, count) for seconds in (0.3, 0.8)]
    for timer in timers:
        timer.start()
    stage.hub.step(1.2)
    for timer in timers:
        timer.join()
    assert len(switches) == 2
    assert switches[0] == switches[1]


def test_serves_any_loop(kind: ModuleType) -> None:
    """A loop that is no hub says itself when a piece of its work begins and when it sleeps."""
    told: list[events.Event] = []
    unsubscribe = events.subscribe(told.append, "stalled")
    beat = kind.Beat()
    watchdog = Watchdog(beat)
    watchdog.after = AFTER
    watchdog.start()
    for _ in range(2):
        beat.enter()
        sleeps()
        beat.leave()
        time.sleep(STALL)  # in its select(): nobody is kept
    watchdog.stop()
    unsubscribe()
    assert [event.function for event in told] == ["sleeps", "sleeps"]


def test_two_loops_are_told_apart(kind: ModuleType) -> None:
    """Each hub has a watchdog of its own, which looks at its own thread."""
    told: list[events.Event] = []
    unsubscribe = events.subscribe(told.append, "stalled")

    def serve(work: Callable[[], None]) -> None:
        hub = kind.Hub()
        watchdog = Watchdog(hub.beat)
        watchdog.after = AFTER
        watchdog.start()
        green = hub.spawn(work)
        hub.run(lambda: green.dead, lambda: 0.05, lambda: None)
        hub.close()
        watchdog.stop()

    threads = [threading.Thread(target=serve, args=(work,)) for work in (sleeps, locks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    unsubscribe()
    assert sorted(event.function for event in told) == ["locks", "sleeps"]
