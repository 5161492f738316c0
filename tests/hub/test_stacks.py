"""The stacks of green threads: small at first, and growing like any other's."""

from __future__ import annotations

import subprocess
import sys

import pytest
from greenlet import GreenletExit

compiled = pytest.importorskip("harken._hub.compiled")


@pytest.fixture
def hub():
    """A hub, closed in the end."""
    made = compiled.Hub()
    yield made
    made.close()


def run(hub, count):
    """Run until ``count`` green threads have ended."""
    for _ in range(100 + count):
        hub.step(0)


def deep(depth, at_bottom):
    """Call ``at_bottom`` under so many frames, and return how many there were."""
    return 1 + deep(depth - 1, at_bottom) if depth else at_bottom() or 0


def test_small_stacks_are_in_use():
    """On the versions of CPython that were tested."""
    assert (sys.version_info < (3, 14)) == compiled.STACKS_CACHED


@pytest.mark.parametrize("depth", [0, 1, 3, 10, 200, 900])
def test_frames_beyond_the_small_stack(hub, depth):
    """Deep calls work, also when they wait at the bottom, again and again."""
    seen = []

    def work():
        for _ in range(5):
            seen.append(deep(depth, lambda: hub.sleep(0)))
            seen.append(deep(depth, lambda: None))

    for _ in range(20):
        hub.spawn(work)
    run(hub, 100)
    assert seen == [depth] * 200


def test_crossings_of_the_border_in_a_loop(hub):
    """A call that just does not fit costs no memory each time."""
    done = []

    def work(padding):
        total = 0
        for number in range(2000):
            total += deep(padding, lambda: None) + len(sorted([number, 1], key=lambda x: -x))
        done.append(total)

    for padding in range(12):
        hub.spawn(work, padding)
    run(hub, 20)
    assert done == [2000 * (padding + 2) for padding in range(12)]


def test_generators_and_exceptions(hub):
    """Frames that outlive their callers, and tracebacks that keep them."""
    kept = []

    def numbers():
        try:
            for number in range(3):
                hub.sleep(0)
                yield number
        finally:
            kept.append("closed")

    def fail(depth):
        local = list(range(depth))
        if depth:
            fail(depth - 1)
        raise ValueError(local)

    def work():
        generator = numbers()
        kept.append(next(generator))
        try:
            fail(30)
        except ValueError as error:
            kept.append(error)
        kept.append(list(generator))

    hub.spawn(work)
    run(hub, 5)
    assert kept[0] == 0
    assert kept[2:] == ["closed", [1, 2]]
    frames = []
    trace = kept[1].__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_locals.get("depth"))
        trace = trace.tb_next
    assert frames[1:] == list(range(30, -1, -1))


def test_ended_from_outside(hub):
    """GreenletExit unwinds it, whatever it called."""
    ended = []

    def work(depth):
        try:
            deep(depth, lambda: hub.sleep(100))
        except GreenletExit:
            ended.append(depth)
            raise

    for depth in range(40):
        hub.spawn(work, depth)
    hub.step(0)
    hub.close()
    assert sorted(ended) == list(range(40))


ABANDONED = """
import gc, threading
from harken._hub import compiled

def deep(depth, at_bottom):
    return 1 + deep(depth - 1, at_bottom) if depth else at_bottom() or 0

def live():
    hub = compiled.Hub()
    for depth in (0, 2, 50):
        hub.spawn(deep, depth, lambda: hub.park())
    hub.step(0)

for _ in range(20):
    thread = threading.Thread(target=live)
    thread.start()
    thread.join()
    gc.collect()
print("collected")
"""


def test_parked_when_their_thread_dies():
    """The stacks of green threads that were left to themselves are given back by whoever collects them."""
    done = subprocess.run([sys.executable, "-c", ABANDONED], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("collected\n", "", 0)
