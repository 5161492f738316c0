"""The thread engine: one fresh thread a connection, or idle ones taken up again."""

import threading
import time

import pytest

from harken.engines import thread as thread_engine
from harken.engines.thread import Engine, Threads, ended

PATIENCE = 5.0  # seconds


def engine(**options):
    """Return an engine with stdlib's options, changed by ``options``."""
    said = {"daemon_threads": False, "block_on_close": True, "reuse_threads": False, **options}
    return Engine(said.__getitem__)


class Job:
    """A job that ends when told to."""

    def __init__(self):
        self.begun, self.going, self.thread = threading.Event(), threading.Event(), None

    def __call__(self, *_):
        self.thread = threading.current_thread()
        self.begun.set()
        assert self.going.wait(PATIENCE)


def started(engine):
    """Return a job that runs."""
    job = Job()
    assert engine.spawn(job, 1, 2) == 0
    assert job.begun.wait(PATIENCE)
    return job


def test_each_job_has_a_fresh_thread():
    """Its thread-locals are empty, and it is named for what it runs."""
    made, local, seen = engine(), threading.local(), []

    def process_request_thread():
        seen.append((threading.current_thread(), getattr(local, "here", None)))
        local.here = True

    for _ in range(3):
        made.spawn(process_request_thread)
        assert made.join(None) == 0
    assert len({thread for thread, _ in seen}) == 3
    assert [here for _, here in seen] == [None] * 3
    assert all("process_request_thread" in thread.name for thread, _ in seen)


@pytest.mark.parametrize("daemon", [True, False])
def test_daemons_as_the_server_says(daemon):
    """And daemons are not waited for."""
    made = engine(daemon_threads=daemon)
    job = started(made)
    assert job.thread.daemon is daemon
    assert list(made.threads) == ([] if daemon else [job.thread])
    assert made.join(time.monotonic()) == (0 if daemon else 1)
    job.going.set()
    job.thread.join(PATIENCE)


def test_without_block_on_close_nobody_is_waited_for():
    """``block_on_close`` is read at each connection."""
    made = engine(block_on_close=False)
    job = started(made)
    assert list(made.threads) == []
    assert made.join(None) == 0
    job.going.set()
    job.thread.join(PATIENCE)


def test_a_thread_is_recorded_before_it_runs():
    """A handler finds itself in ``server._threads``."""
    made, seen = engine(), []
    looked = threading.Event()
    made.spawn(lambda: (seen.append(threading.current_thread() in made.threads), looked.set()))
    assert looked.wait(PATIENCE)
    made.join(None)
    assert seen == [True]


def test_a_thread_that_cannot_start_is_not_recorded(monkeypatch):
    """server_close() would wait for it for ever."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    made = engine()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        made.spawn(pytest.fail)
    assert list(made.threads) == []


def test_join_waits_to_the_deadline_and_again():
    """Who is still at work is kept for the next join."""
    made = engine()
    job = started(made)
    assert made.join(time.monotonic() + 0.01) == 1
    job.going.set()
    assert made.join(None) == 0
    assert not job.thread.is_alive()


def test_join_from_a_handler_does_not_wait_for_itself():
    """A handler may close its server."""
    made, left = engine(), []
    made.spawn(lambda: left.append(made.join(None)))
    made.join(time.monotonic() + PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while not left and time.monotonic() < deadline:
        time.sleep(0.001)
    assert left == [0]


def test_it_is_never_full():
    """Any number at once."""
    made = engine()
    jobs = [started(made) for _ in range(20)]
    assert not made.full
    for job in jobs:
        job.going.set()
    assert made.join(time.monotonic() + PATIENCE) == 0


def test_reused_threads_are_the_same_threads():
    """With ``reuse_threads`` a connection costs no thread's start."""
    made, seen = engine(reuse_threads=True), []
    for _ in range(5):
        done = threading.Event()
        made.spawn(lambda done=done: (seen.append(threading.current_thread()), done.set()))
        assert done.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while made._crew._idle == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(seen) == 5
    assert len(set(seen)) == 1
    assert made.join(None) == 0


# ── the list that is server._threads ─────────────────────────────────────────────────────────────────────────────────


def ended_thread():
    """Return a thread that has ended."""
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join(PATIENCE)
    return thread


def test_ended_threads_are_dropped_now_and_then():
    """Fewer than ten are left, as CPython's own test asks."""
    threads = Threads()
    for _ in range(100):
        threads.append(ended_thread())
        assert len(threads) < 10


def test_the_living_stay_and_the_ended_go_in_turn(monkeypatch):
    """Each new thread has two older ones looked at: O(1) a connection, and the ended do not pile up."""
    threads, looks = Threads(), []
    going = threading.Event()
    living = [threading.Thread(target=going.wait, args=(PATIENCE,)) for _ in range(40)]
    monkeypatch.setattr(thread_engine, "ended", lambda thread: looks.append(thread) or ended(thread))
    for thread in living:
        thread.start()
        threads.append(thread)
    assert set(threads) == set(living)
    assert len(looks) <= 2 * len(living)
    going.set()
    for thread in living:
        thread.join(PATIENCE)
    for _ in range(40):
        over = threading.Thread(target=lambda: None)
        over.start()
        over.join(PATIENCE)
        threads.append(over)
    assert len(threads) < 10
    assert threads.join() == 0
    assert list(threads) == []


def test_a_thread_that_has_not_started_is_kept():
    """It is recorded before it runs, and a sweep must not drop it."""
    threads = Threads()
    waiting = threading.Thread(target=lambda: None)
    threads.append(waiting)
    threads.reap()
    assert list(threads) == [waiting]


def test_it_is_a_list():
    """Programs join, count and copy it."""
    threads = Threads()
    thread = ended_thread()
    threads.append(thread)
    assert isinstance(threads, list)
    assert list(threads) == [thread]
    assert threads.pop_all() == [thread]
    assert not threads


def test_daemons_are_not_taken_up():
    """server_close() does not wait for them."""
    threads = Threads()
    threads.append(threading.Thread(target=lambda: None, daemon=True))
    assert not threads


def test_closing_does_not_trip_over_a_thread_that_is_about_to_start():
    """Another thread may close the server between a thread's recording and its start."""
    threads = Threads()
    waiting = threading.Thread(target=lambda: None)
    threads.append(waiting)
    assert threads.join(time.monotonic() + 0.01) in (0, 1)
