"""Threads that are started without waiting for their word, and whoever asks for it later."""

import os
import subprocess
import sys
import threading

import pytest

from harken.engines import _starting
from harken.engines._starting import has_begun, new_thread, start

PATIENCE = 10.0  # seconds


@pytest.fixture
def held(monkeypatch):
    """An event before which no thread begins that was started without waiting."""
    let = threading.Event()
    bootstrap = threading.Thread._bootstrap

    def wait_first(thread):
        if type(thread._started) is _starting._Begun:
            let.wait(PATIENCE)
        bootstrap(thread)

    monkeypatch.setattr(threading.Thread, "_bootstrap", wait_first)
    yield let
    let.set()


def test_start_does_not_wait(held):
    """It returns although the thread has not begun."""
    thread = new_thread(lambda: None, (), daemon=False)
    start(thread)
    assert not has_begun(thread)
    held.set()
    thread.join(PATIENCE)
    assert has_begun(thread)


def test_it_may_be_joined_right_after(held):
    """``server._threads[0].join()`` waits for the thread's beginning, and for its end."""
    ran = []
    thread = new_thread(ran.append, (1,), daemon=False)
    start(thread)
    threading.Timer(0.05, held.set).start()
    thread.join()
    assert ran == [1]
    assert not thread.is_alive()


@pytest.mark.parametrize("ask", [threading.Thread.is_alive, repr], ids=["is_alive", "repr"])
def test_who_asks_whether_it_lives_waits_for_its_beginning(held, ask):
    """It never looks as if it had not been started."""
    going = threading.Event()
    thread = new_thread(going.wait, (PATIENCE,), daemon=False)
    start(thread)
    threading.Timer(0.05, held.set).start()
    answer = ask(thread)
    going.set()
    thread.join(PATIENCE)
    assert answer is True or "started" in answer


def test_many_ask_at_once(held):
    """Every waiter is released by the one beginning."""
    thread = new_thread(lambda: None, (), daemon=False)
    start(thread)
    waiters = [threading.Thread(target=thread.join) for _ in range(8)]
    for waiter in waiters:
        waiter.start()
    held.set()
    for waiter in waiters:
        waiter.join(PATIENCE)
    assert not any(waiter.is_alive() for waiter in waiters)


def test_a_storm_of_starts_and_joins():
    """No word is lost when the question comes at the moment of the beginning."""
    ran = []
    for number in range(500):
        thread = new_thread(ran.append, (number,), daemon=False)
        start(thread)
        thread.join()
    assert ran == list(range(500))


def test_before_its_start_it_is_what_it_was():
    """Not alive, not to be joined, and startable once."""
    thread = new_thread(lambda: None, (), daemon=True)
    assert thread.daemon
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="before it is started"):
        thread.join()
    start(thread)
    with pytest.raises(RuntimeError, match="only be started once"):
        thread.start()
    thread.join(PATIENCE)


def test_a_thread_that_the_system_refuses_looks_never_started(monkeypatch):
    """And nobody waits for its beginning."""

    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    monkeypatch.setattr(threading, name, refuse)
    thread = new_thread(lambda: None, (), daemon=False)
    with pytest.raises(RuntimeError, match="can't start"):
        start(thread)
    assert not thread.is_alive()
    assert not has_begun(thread)


def test_a_class_of_the_programs_own_is_used(monkeypatch):
    """``socketserver.threading.Thread`` is patched in the wild; such a class need not know ``daemon``."""

    class Own(threading.Thread):
        def __init__(self, target, args):
            super().__init__(target=target, args=args)

    monkeypatch.setattr(threading, "Thread", Own)
    ran = []
    thread = new_thread(ran.append, (1,), daemon=True)
    start(thread)
    thread.join(PATIENCE)
    assert type(thread) is Own
    assert thread.daemon
    assert ran == [1]


def test_elsewhere_threads_start_in_the_plain_way(monkeypatch):
    """On a version that these tests have not seen."""
    monkeypatch.setattr(_starting, "_KNOWN", False)
    thread = new_thread(lambda: None, (), daemon=False)
    start(thread)
    assert type(thread._started) is threading.Event
    thread.join(PATIENCE)


def test_the_interpreter_waits_for_a_thread_that_has_not_begun():
    """A program whose last act is to start one still gets its work done."""
    program = (
        "import threading, time\n"
        "from harken.engines._starting import new_thread, start\n"
        "bootstrap = threading.Thread._bootstrap\n"
        "threading.Thread._bootstrap = lambda thread: (time.sleep(0.2), bootstrap(thread))\n"
        "start(new_thread(print, ('done',), daemon=False))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert ran.stdout == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_child_nobody_waits_for_what_will_never_begin(held):
    """A thread that had not begun at the fork is not there in the child."""
    thread = new_thread(lambda: None, (), daemon=False)
    start(thread)
    pid = os.fork()
    if pid == 0:
        os._exit(1 if thread.is_alive() else 0)
    held.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    thread.join(PATIENCE)
