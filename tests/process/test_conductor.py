"""Signals are acted on in a thread, whatever the main thread does."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from harken.process.conductor import SIGNALS, Abandoned, Conductor

PATIENCE = 10.0


class Obedient:
    """Notes the signals that it is given."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.threads: set[str] = set()
        self.came = threading.Event()

    def __call__(self, number: int) -> None:
        """Note it."""
        self.numbers.append(number)
        self.threads.add(threading.current_thread().name)
        self.came.set()


def send(number: int) -> None:
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGHUP])
def test_a_signal_is_obeyed_in_a_thread(number):
    """Once, while the main thread is in a call that waits; afterwards all is as before."""
    before = signal.getsignal(number)
    obedient = Obedient()
    conductor = Conductor(obedient)
    with conductor.heeding((*SIGNALS, signal.SIGHUP)):
        conductor.begin()
        send(number)
        assert obedient.came.wait(PATIENCE)
    assert obedient.numbers == [number]
    assert obedient.threads == {"harken-signals"}
    assert signal.getsignal(number) is before
    assert all(thread.name != "harken-signals" for thread in threading.enumerate())


def test_the_main_thread_is_interrupted_by_none():
    """Its sleep goes on to its end (PEP 475)."""
    obedient = Obedient()
    conductor = Conductor(obedient)
    with conductor.heeding():
        conductor.begin()
        threading.Timer(0.05, send, (signal.SIGTERM,)).start()
        began = time.monotonic()
        time.sleep(0.3)
        assert time.monotonic() - began >= 0.3
        assert obedient.came.wait(PATIENCE)


def test_a_main_thread_that_does_not_come_back_is_abandoned():
    """``abandon`` raises there, out of whatever keeps it, once."""
    conductor = Conductor(Obedient())
    with conductor.heeding():
        conductor.begin()
        threading.Timer(0.05, conductor.abandon).start()
        with pytest.raises(Abandoned):
            threading.Event().wait(PATIENCE)
        send(signal.SIGTERM)
        time.sleep(0)


def test_what_comes_before_it_begins_is_obeyed_then():
    """And never when it does not begin: what was to be served failed."""
    obedient = Obedient()
    conductor = Conductor(obedient)
    with conductor.heeding():
        send(signal.SIGTERM)
        assert obedient.numbers == []
        conductor.begin()
        assert obedient.came.wait(PATIENCE)
    with conductor.heeding():
        send(signal.SIGTERM)
    assert obedient.numbers == [signal.SIGTERM]


def test_who_comes_late_is_told_apart():
    """Of a process that ends then."""
    late = []
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    conductor = Conductor(Obedient())
    conductor.afterwards = lambda number, _frame: late.append(number)
    try:
        with conductor.heeding():
            conductor.begin()
        send(signal.SIGTERM)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert late == [signal.SIGTERM]


def test_abandoning_without_heeding_does_nothing():
    """There is nobody whose signals they are."""
    Conductor(Obedient()).abandon()


def test_in_another_thread_no_signal_is_heeded():
    """Only the main thread may set handlers: the block runs all the same."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with Conductor(Obedient()).heeding():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert seen == [before]


def test_a_forked_child_dies_of_signals_as_any_process():
    """Its parent's thread does not hear of them."""
    obedient = Obedient()
    conductor = Conductor(obedient)
    with conductor.heeding():
        conductor.begin()
        pid = os.fork()
        if pid == 0:
            try:
                conductor.be_a_child()
                send(signal.SIGTERM)
                time.sleep(PATIENCE)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert obedient.numbers == []
