"""States and moves, and the latch that a signal handler may use."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from harken.errors import LifecycleError
from harken.lifecycle import MOVES, Latch, Lifecycle, State, at_exit

VERBS = sorted({verb for moves in MOVES.values() for verb in moves})
ALLOWED = [(state, verb, after) for state, moves in MOVES.items() for verb, after in moves.items()]
REFUSED = [(state, verb) for state in State for verb in VERBS if verb not in MOVES[state]]
SOON = 5.0  # seconds; everything here takes milliseconds


def in_state(state):
    """Return a lifecycle that stands in ``state``."""
    life = Lifecycle()
    life.state = state
    return life


@pytest.mark.parametrize("state, verb, after", ALLOWED, ids=lambda value: getattr(value, "value", value))
def test_each_move_of_the_table_can_be_made(state, verb, after):
    """The state is then the one that the table says, and is returned."""
    life = in_state(state)
    assert life.move(verb) is after
    assert life.state is after


@pytest.mark.parametrize("state, verb", REFUSED, ids=lambda value: getattr(value, "value", value))
def test_each_other_move_is_refused_and_changes_nothing(state, verb):
    """The message names verb and state."""
    life = in_state(state)
    with pytest.raises(LifecycleError, match=f"cannot {verb} a server that is {state.value}"):
        life.move(verb)
    assert life.state is state


@pytest.mark.parametrize(
    "state, verb, remedy",
    [
        (State.DRAINING, "serve", "make a new server"),
        (State.NEW, "suspend", r"call serve_forever\(\) first"),
        (State.SERVING, "resume", r"call suspend\(\) first"),
    ],
)
def test_what_a_user_can_do_wrong_says_the_remedy(state, verb, remedy):
    """The verbs that users call tell them what to do instead."""
    with pytest.raises(LifecycleError, match=remedy):
        in_state(state).move(verb)


def test_every_state_can_be_closed():
    """server_close() is allowed anywhere, and twice."""
    assert {MOVES[state]["close"] for state in State} == {State.CLOSED}


def test_a_new_lifecycle_is_new():
    """Nothing has happened yet."""
    assert Lifecycle().state is State.NEW


# ── the latch ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_latch_is_an_event_of_threading():
    """Programs that ask for the type of ``_BaseServer__is_shut_down`` find what stdlib has."""
    latch = Latch()
    assert isinstance(latch, threading.Event)
    assert not latch.is_set()
    assert not latch.begun


def test_set_and_clear():
    """It can be set and cleared again and again."""
    latch = Latch()
    for _ in range(3):
        latch.set()
        assert latch.is_set()
        assert latch.wait(0)
        latch.clear()
        assert not latch.is_set()
        assert latch.begun


def test_waiting_ends_after_the_time():
    """wait() tells False when the time was over first."""
    began = time.monotonic()
    assert Latch().wait(0.02) is False
    assert time.monotonic() - began >= 0.02


@pytest.mark.parametrize("timeout", [0, -1])
def test_no_time_at_all_is_a_question(timeout):
    """wait(0) does not wait, nor does a time that is over already."""
    began = time.monotonic()
    assert Latch().wait(timeout) is False
    assert time.monotonic() - began < SOON


def test_everybody_who_waits_is_released():
    """Twenty waiting threads all see one set()."""
    latch = Latch()
    results = []
    threads = [threading.Thread(target=lambda: results.append(latch.wait(SOON))) for _ in range(20)]
    for thread in threads:
        thread.start()
    while len(latch._waiters) < 20:
        time.sleep(0.001)
    latch.set()
    for thread in threads:
        thread.join(SOON)
    assert results == [True] * 20


def test_the_owner_never_waits():
    """Who cleared it would wait for itself; another thread does wait."""
    latch = Latch(owned=True)
    latch.clear()
    began = time.monotonic()
    assert latch.wait() is False
    assert time.monotonic() - began < SOON
    seen = []
    other = threading.Thread(target=lambda: seen.append(latch.wait(SOON)))
    other.start()
    latch.set()
    other.join(SOON)
    assert seen == [True]


def test_a_latch_that_is_not_owned_is_waited_for_by_everybody():
    """Also by the thread that cleared it."""
    latch = Latch()
    latch.clear()
    timer = threading.Timer(0.02, latch.set)
    timer.start()
    assert latch.wait(SOON) is True
    timer.join()


def test_who_set_it_is_an_owner_no_more():
    """After set() the former owner's ident, which a new thread may get, is forgotten."""
    latch = Latch(owned=True)
    latch.clear()
    latch.set()
    assert latch.owners == set()


def test_waits_that_are_over_leave_nothing_behind():
    """A latch that is polled for hours does not grow."""
    latch = Latch()
    for _ in range(50):
        latch.wait(0)
    assert len(latch._waiters) < 10
    latch.set()
    for _ in range(50):
        latch.wait()
    assert len(latch._waiters) < 10


def test_a_signal_handler_may_set_what_its_thread_waits_for():
    """The handler runs inside wait() of the same thread; threading.Event would deadlock."""
    latch = Latch()
    before = signal.signal(signal.SIGUSR1, lambda *_: latch.set())
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        assert latch.wait(SOON) is True
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_may_do_everything_at_any_moment():
    """A storm of signals that set, clear, ask and wait, while the same thread does so too, ends."""
    program = """
import signal, sys
from harken.lifecycle import Latch
latch = Latch()
count = 0
def handler(*_):
    global count
    count += 1
    latch.clear(); latch.set(); latch.is_set(); latch.wait(0)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
while count < 200:
    latch.set(); latch.wait(0.0001); latch.clear()
signal.setitimer(signal.ITIMER_REAL, 0)
latch.set()
print("alive", latch.is_set())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout == "alive True\n", done.stderr


def test_at_exit_runs_before_threads_are_waited_for():
    """A thread that waits for work can be released; atexit would run too late."""
    program = """
import threading
from harken.lifecycle import at_exit
work = threading.Event()
thread = threading.Thread(target=work.wait)
thread.start()
at_exit(work.set)
print("main ends")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (0, "main ends\n"), done.stderr


def test_at_exit_after_the_end_is_no_error(monkeypatch):
    """Registering while the interpreter ends is refused by Python and ignored here."""

    def refuse(callback):
        raise RuntimeError("can't register after shutdown")

    monkeypatch.setattr(threading, "_register_atexit", refuse)
    assert at_exit(lambda: None) is None
