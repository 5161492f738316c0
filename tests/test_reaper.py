"""Calls at a time."""

import os
import threading
import time

from harken.reaper import GRACE_SECONDS, LATE_SECONDS, Reaper

PATIENCE = 10.0


def test_calls_come_in_order_and_in_time():
    """Whatever the order in which they were asked for; each once, never early."""
    reaper, came, over = Reaper(), [], threading.Event()
    now = time.monotonic()

    def call(name, deadline):
        came.append((name, time.monotonic() - deadline))
        if len(came) == 3:
            over.set()

    for name, after in (("last", 0.15), ("first", 0.05), ("second", 0.1)):
        reaper.call_at(now + after, lambda name=name, deadline=now + after: call(name, deadline))
    assert over.wait(PATIENCE)
    assert [name for name, _ in came] == ["first", "second", "last"]
    assert all(0 <= late < 0.5 for _, late in came)


class Stopped(threading.Condition):
    """A condition whose first wait ends as if the process had been stopped meanwhile."""

    stops = 1

    def wait(self, timeout=None):
        result = super().wait(timeout)
        if self.stops:
            self.stops -= 1
            time.sleep(LATE_SECONDS + 0.05)
            self.ended = time.monotonic()
        return result


def test_after_a_stop_of_the_process_everybody_gets_a_moment_first():
    """What was due meanwhile is called after it."""
    reaper, came, over = Reaper(), [], threading.Event()
    reaper._changed = condition = Stopped(threading.RLock())
    reaper.call_at(time.monotonic() + 0.01, lambda: (came.append(time.monotonic()), over.set()))
    assert over.wait(PATIENCE)
    assert came[0] >= condition.ended + GRACE_SECONDS


def test_a_cancelled_call_does_not_come_and_the_thread_goes():
    """With nothing to do there is no thread; the next call brings another."""
    reaper, came = Reaper(), threading.Event()
    number = reaper.call_at(time.monotonic() + PATIENCE, came.set)
    thread = reaper._thread
    reaper.cancel(number)
    reaper.cancel(number)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not came.is_set()
    reaper.call_at(time.monotonic(), came.set)
    assert came.wait(PATIENCE)


def test_what_a_call_raises_stops_no_other(monkeypatch):
    """It is shown as a thread's is."""
    reaper, came, shown = Reaper(), threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", shown.append)

    def fail():
        raise ValueError("as the test wants it")

    reaper.call_at(time.monotonic(), fail)
    reaper.call_at(time.monotonic() + 0.01, came.set)
    assert came.wait(PATIENCE)
    assert [hooked.exc_type for hooked in shown] == [ValueError]


def test_calls_from_many_threads_are_all_made():
    """A thousand from eight threads."""
    reaper, over, lock = Reaper(), threading.Event(), threading.Lock()
    left = [1000]

    def call():
        with lock:
            left[0] -= 1
            if not left[0]:
                over.set()

    def ask():
        for number in range(125):
            reaper.call_at(time.monotonic() + number % 7 / 100, call)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert over.wait(PATIENCE)


def test_a_forked_child_begins_with_none():
    """The calls are the parent's; the child's own are made."""
    from harken.reaper import reaper

    number = reaper.call_at(time.monotonic() + PATIENCE, lambda: None)
    pid = os.fork()
    if pid == 0:
        came = threading.Event()
        fresh = not reaper._heap and reaper._thread is None
        reaper.call_at(time.monotonic(), came.set)
        os._exit(0 if fresh and came.wait(PATIENCE) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    reaper.cancel(number)
