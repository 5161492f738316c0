"""Starting threads, with a cheaper wait for their word."""

import os
import threading
import time

import pytest

from harken.engines import _starting
from harken.engines._starting import has_begun, new_thread, start

PATIENCE = 10.0  # seconds


@pytest.fixture
def late(monkeypatch):
    """Threads begin late: whoever does not wait for their word goes on before it."""
    bootstrap = threading.Thread._bootstrap

    def wait_first(thread):
        if type(thread._started) is _starting._Begun:
            time.sleep(0.05)
        bootstrap(thread)

    monkeypatch.setattr(threading.Thread, "_bootstrap", wait_first)


@pytest.mark.usefixtures("late")
def test_a_started_thread_has_begun():
    """It is alive, and may be joined."""
    go = threading.Event()
    thread = new_thread(go.wait, (PATIENCE,), daemon=False)
    assert not has_begun(thread)
    start(thread)
    assert has_begun(thread)
    assert thread.is_alive()
    assert "started" in repr(thread)
    go.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


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


@pytest.mark.usefixtures("late")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_child_forked_meanwhile_nobody_waits_for_what_will_never_begin():
    """A thread that had not begun at the fork is not there in the child."""
    thread = new_thread(lambda: None, (), daemon=False)
    starter = threading.Thread(target=start, args=(thread,))
    starter.start()
    while type(thread._started) is not _starting._Begun:
        time.sleep(0.001)
    pid = os.fork()
    if pid == 0:
        os._exit(1 if thread.is_alive() else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    starter.join(PATIENCE)
    thread.join(PATIENCE)
