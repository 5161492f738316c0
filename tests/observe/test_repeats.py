"""Warnings that repeat are counted, and the count is told."""

import os
import threading
from queue import SimpleQueue

from harken.observe.repeats import BURST, MOST_KINDS, Repeats

PATIENCE = 10.0  # seconds


def test_the_first_are_written_and_the_rest_counted():
    """Each kind by itself; what was left out is told when the window is over."""
    told, over = [], threading.Event()

    def tell(kind, count):
        told.append((kind, count))
        over.set()

    repeats = Repeats(tell, window=0.05)
    written = sum(repeats.admit(("rejected", "rate")) for _ in range(BURST + 1234))
    assert written == BURST
    assert repeats.admit(("rejected", "deny"))
    assert over.wait(PATIENCE)
    assert told == [(("rejected", "rate"), 1234)]
    assert repeats.admit(("rejected", "rate"))  # a new window
    repeats.close()


def test_one_of_a_kind_starts_no_thread():
    """Nothing repeats, so that nothing need be told."""
    before = threading.active_count()
    repeats = Repeats(lambda _kind, _count: None)
    for number in range(20):
        assert repeats.admit((f"kind {number}",))
    assert threading.active_count() == before
    repeats.close()


def test_kinds_that_a_stranger_makes_up_do_not_fill_the_memory():
    """Beyond a number they count as one."""
    told = []
    repeats = Repeats(lambda *each: told.append(each))
    written = sum(repeats.admit(("rejected", str(number))) for number in range(MOST_KINDS + 100))
    assert written == MOST_KINDS + BURST
    repeats.close()
    assert told == [(("rejected",), 90)]


def test_a_forked_child_counts_with_its_parent():
    """What one has seen is seen by the other, in either direction."""
    told = []
    repeats = Repeats(lambda *each: told.append(each), window=3600.0)
    for _ in range(BURST - 1):
        assert repeats.admit(("handler_failed", "ValueError"))
    pid = os.fork()
    if pid == 0:
        os._exit([repeats.admit(("handler_failed", "ValueError")) for _ in range(3)] != [True, False, False])
    assert os.waitpid(pid, 0)[1] == 0
    assert not repeats.admit(("handler_failed", "ValueError"))
    repeats.close()
    assert told == [(("handler_failed", "ValueError"), 3)]


def test_a_forked_child_ends_windows_itself():
    """It has neither the thread that would end its parent's window, nor the one that holds the lock."""
    repeats = Repeats(lambda *_each: None, window=3600.0)
    while repeats.admit(("reload_failed",)):
        pass
    with repeats._lock:
        pid = os.fork()
        if pid == 0:
            os._exit(_count_in_child(repeats))
    assert os.waitpid(pid, 0)[1] == 0
    repeats.close()


def _count_in_child(repeats):
    told = SimpleQueue()
    repeats._tell = lambda *_each: told.put(threading.current_thread())
    repeats._window = 0.05
    ended = threading.Event()

    def count():
        while repeats.admit(("reload_failed",)):  # in the window that was begun before
            pass
        while told.get(timeout=PATIENCE) is threading.current_thread():
            pass
        ended.set()

    threading.Thread(target=count, daemon=True).start()
    return not ended.wait(2 * PATIENCE)


def test_a_machine_without_threads(monkeypatch):
    """The line that repeats is written all the same, and the end of the window is told by whoever counts next."""

    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    told = []
    repeats = Repeats(lambda *each: told.append(each), window=3600.0)
    monkeypatch.setattr(threading.Timer, "start", refuse)
    written = sum(repeats.admit(("worker_failed",)) for _ in range(BURST + 5))
    assert written == BURST
    repeats._window = 0.0
    assert repeats.admit(("worker_failed",))
    assert told == [(("worker_failed",), 5)]
    repeats.close()
