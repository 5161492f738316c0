"""The pool engine: bounded threads, a bounded queue, and a loop that knows when both are full."""

import threading
import time

import pytest

from harken.engines.pool import Engine

PATIENCE = 5.0  # seconds


class Job:
    """A job that ends when told to."""

    def __init__(self):
        self.begun, self.going = threading.Event(), threading.Event()

    def __call__(self, *_):
        self.begun.set()
        assert self.going.wait(PATIENCE)


@pytest.fixture
def said():
    """What the server says, changed by the test."""
    return {"pool_size": 2, "pool_queue": 1, "daemon_threads": False}


@pytest.fixture
def engine(said):
    """An engine whose threads are gone when the test ends."""
    made = Engine(said.__getitem__)
    yield made
    assert made.join(time.monotonic() + PATIENCE) == 0


def fill(engine, count):
    """Return jobs, submitted; those that find a thread run."""
    jobs = [Job() for _ in range(count)]
    for job in jobs:
        engine.spawn(job)
    return jobs


def test_it_is_full_when_threads_and_queue_are(engine):
    """Two run and one waits: the loop must not accept a fourth."""
    jobs = fill(engine, 2)
    assert all(job.begun.wait(PATIENCE) for job in jobs)
    assert not engine.full
    jobs += fill(engine, 1)
    assert engine.full
    assert not jobs[2].begun.is_set()
    for job in jobs:
        job.going.set()
    assert jobs[2].begun.wait(PATIENCE)


def test_the_loop_is_woken_when_there_is_room_again(engine, monkeypatch):
    """Only after it was told "full": otherwise a wake-up a connection would cost more than it gains."""
    woken = threading.Event()
    monkeypatch.setattr(engine, "wake", woken.set)
    jobs = fill(engine, 1)
    jobs[0].going.set()
    assert not woken.wait(0.01)
    jobs = fill(engine, 3)
    assert engine.full
    jobs[0].going.set()
    assert woken.wait(PATIENCE)
    assert not engine.full
    for job in jobs:
        job.going.set()


def test_room_that_comes_while_it_is_looked_for_wakes_too(engine, monkeypatch):
    """A thread gets free between the look at the books and the note that they were full: no wake-up is lost."""
    woken = threading.Event()
    monkeypatch.setattr(engine, "wake", woken.set)
    crew = engine._crew

    class Looking(type(crew)):
        @property
        def full(self):
            found = super().full
            if found:
                crew.on_room()  # the thread is quicker than the caller that was told
            return found

    jobs = fill(engine, 3)
    crew.__class__ = Looking
    try:
        assert engine.full
        assert woken.is_set()
    finally:
        for job in jobs:
            job.going.set()


def test_a_foreign_loop_is_held_in_spawn(engine):
    """A loop of the program's own does not ask ``full``."""
    jobs = fill(engine, 3)
    done = threading.Event()
    spawner = threading.Thread(target=engine.spawn, args=(done.set,))
    spawner.start()
    spawner.join(0.02)
    assert spawner.is_alive()
    for job in jobs:
        job.going.set()
    spawner.join(PATIENCE)
    assert done.wait(PATIENCE)


def test_sizes_are_read_anew(engine, said):
    """configure() makes room for who waits, without a connection ending first."""
    jobs = fill(engine, 3)
    assert engine.full
    said.update(pool_size=4)
    engine.refresh()
    assert not engine.full
    jobs += fill(engine, 1)
    assert jobs[3].begun.wait(PATIENCE)
    for job in jobs:
        job.going.set()


def test_more_room_releases_a_foreign_loop(engine, said):
    """Who is held in spawn() goes on as soon as a larger pool has room."""
    jobs = fill(engine, 3)
    begun = threading.Event()
    spawner = threading.Thread(target=engine.spawn, args=(begun.set,), daemon=True)
    spawner.start()
    spawner.join(0.02)
    said.update(pool_size=8)
    engine.refresh()
    try:
        assert begun.wait(1.0)
    finally:
        for job in jobs:
            job.going.set()
        spawner.join(PATIENCE)


def test_refresh_wakes_the_loop(engine, monkeypatch):
    """A door that is held for want of room is looked at again."""
    woken = threading.Event()
    monkeypatch.setattr(engine, "wake", woken.set)
    engine.refresh()
    assert woken.is_set()


def test_join_counts_running_and_queued(engine):
    """At the deadline, and returns in time."""
    jobs = fill(engine, 3)
    assert jobs[1].begun.wait(PATIENCE)
    assert engine.join(time.monotonic() + 0.01) == 3
    for job in jobs:
        job.going.set()


def test_threads_are_daemons_as_the_server_says(said):
    """``daemon_threads`` is read when a thread starts."""
    said["daemon_threads"] = True
    made, seen = Engine(said.__getitem__), []
    made.spawn(lambda: seen.append(threading.current_thread().daemon))
    assert made.join(time.monotonic() + PATIENCE) == 0
    assert seen == [True]
