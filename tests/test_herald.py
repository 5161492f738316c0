"""What is told to forked children: once, to each, also to those that are forked later."""

from __future__ import annotations

import os
import signal
import struct
import threading

import pytest

from harken import herald as heralds
from harken.herald import Herald

PATIENCE = 10.0


def child(herald: Herald, ready: int, answer: int) -> int:
    """Fork a child that listens, and writes what it hears."""
    pid = os.fork()
    if pid:
        return pid
    try:
        heard = threading.Event()

        def act(jitter: float) -> None:
            os.write(answer, struct.pack("=d", jitter))
            heard.set()

        herald.listen(act)
        os.write(ready, b".")
        for _ in range(int(PATIENCE * 20)):  # the signal is heard between two bytecodes of the main thread
            if heard.wait(0.05):
                os._exit(0)
    finally:
        os._exit(1)


@pytest.fixture
def pipes():
    """Two pipes: one by which a child says that it listens, and one by which it says what it heard."""
    ends = [*os.pipe(), *os.pipe()]
    yield ends
    for end in ends:
        os.close(end)


def test_a_child_hears_it_once(pipes):
    """By a signal, and with how far the goodbyes are spread; a second word is not another."""
    ready, tell_ready, answer, tell_answer = pipes
    herald = Herald()
    pid = child(herald, tell_ready, tell_answer)
    assert os.read(ready, 1) == b"."
    herald.tell(2.5, [pid])
    herald.tell(2.5, [pid])
    assert struct.unpack("=d", os.read(answer, 100)) == (2.5,)
    assert os.waitpid(pid, 0)[1] == 0


def test_who_is_still_there_is_told_again(monkeypatch):
    """Python 3.13 may leave the signal lying, in a child that another thread forked; but not at every turn."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: sent.append(pid))
    herald = Herald()
    herald.tell(0.0, [1])
    herald.tell(0.0, [1, 2])
    assert sent == [1, 2]
    monkeypatch.setattr(heralds, "AGAIN_SECONDS", 0.0)
    herald.tell(0.0, [2])
    assert sent == [1, 2, 2]


def test_a_child_that_comes_late_hears_it_at_once(pipes):
    """It looks when it begins to listen: no signal is sent to it before it is known."""
    ready, tell_ready, answer, tell_answer = pipes
    herald = Herald()
    herald.tell(0.0, [])
    pid = child(herald, tell_ready, tell_answer)
    assert struct.unpack("=d", os.read(answer, 100)) == (0.0,)
    assert os.read(ready, 1) == b"."
    assert os.waitpid(pid, 0)[1] == 0


def test_a_child_that_has_gone_is_no_error():
    """Whoever reaps it is told."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    Herald().tell(1.0, [pid])


def test_the_programs_own_handler_of_the_signal_stays():
    """It is looked at once, and not replaced."""
    before = signal.signal(signal.SIGURG, lambda number, frame: None)
    try:
        own = signal.getsignal(signal.SIGURG)
        Herald().listen(lambda jitter: None)
        assert signal.getsignal(signal.SIGURG) is own
    finally:
        signal.signal(signal.SIGURG, before)
