"""The fork engine: a child a connection, reaped by pid, at once, and never somebody else's."""

import os
import selectors
import signal
import subprocess
import sys
import threading
import time

import pytest
from waiting import wait_until

from harken.engines import fork
from harken.engines.fork import Engine

PATIENCE = 10.0  # seconds
FOREVER = 3600.0  # seconds that the loop may sleep


@pytest.fixture(params=["pidfd", "polling"])
def said(request, monkeypatch):
    """What the server says; with and without pidfd_open(2)."""
    if request.param == "polling":
        monkeypatch.delattr(os, "pidfd_open")
    return {"max_children": 2, "selector": selectors.DefaultSelector}


@pytest.fixture
def engine(said):
    """An engine whose children are gone when the test ends."""
    made = Engine(said.__getitem__)
    yield made
    for pid in list(made.children):
        os.kill(pid, signal.SIGKILL)
    made.join(None)


class Pipe:
    """A child that waits for a byte from the parent."""

    def __init__(self):
        self.reader, self.writer = os.pipe()

    def wait(self):
        os.read(self.reader, 1)

    def end(self):
        os.write(self.writer, b"x")
        self.close()

    def close(self):
        os.close(self.writer)
        os.close(self.reader)


def exited(pid):
    """Tell whether a child has exited, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_the_function_runs_in_another_process(engine):
    """spawn() returns its pid, and ``children`` holds it."""
    reader, writer = os.pipe()
    pid = engine.spawn(lambda: os.write(writer, str(os.getpid()).encode()) and 0)
    assert engine.children == {pid}
    assert engine.in_child
    assert engine.join(None) == 0
    assert int(os.read(reader, 100)) == pid
    assert engine.children == set()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    "function, status",
    [
        (lambda: 0, 0),
        (lambda: None, 0),
        (lambda: 3, 3),
        (lambda: 1 // 0, 1),
        (lambda: sys.exit(0), 1),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    ],
    ids=["0", "None", "3", "raises", "SystemExit", "killed"],
)
def test_the_status_is_told(engine, function, status):
    """``done`` learns how the child ended; a signal is its negative number."""
    told = []
    engine.spawn(function, done=told.append)
    engine.join(None)
    assert told == [status]


def test_a_child_never_returns(run_program):
    """No ``finally`` of the parent, no atexit and no second loop runs in it."""
    program = """
import atexit, os
from harken.engines.fork import Engine
atexit.register(os.write, 1, b"atexit ")
engine = Engine({"max_children": 2}.__getitem__)
try:
    engine.spawn(lambda: 1 // 0)
    engine.join(None)
finally:
    os.write(1, b"finally ")
"""
    process = run_program("-c", program)
    assert process.communicate(timeout=20)[0] == "finally atexit "


def test_children_of_others_are_not_reaped(engine):
    """``waitpid(-1)`` would take them from a program that waits for them itself."""
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    wait_until(lambda: exited(other.pid))
    engine.spawn(lambda: 0)
    engine.collect()
    engine.join(None)
    assert other.wait(PATIENCE) == 7


def test_a_child_that_somebody_else_reaped_is_no_error(engine):
    """A program may wait for every child by itself."""
    told = []
    pid = engine.spawn(lambda: 5, done=told.append)
    os.waitpid(pid, 0)
    engine.collect()
    assert engine.children == set()
    assert told == [0]


def test_collect_does_not_wait(engine):
    """A child at work is left alone; one that has ended is reaped."""
    pipe = Pipe()
    pid = engine.spawn(pipe.wait)
    began = time.monotonic()
    engine.collect()
    assert time.monotonic() - began < PATIENCE / 2
    assert engine.children == {pid}
    pipe.end()
    wait_until(lambda: exited(pid))
    engine.collect()
    assert engine.children == set()


@pytest.mark.parametrize("said", ["pidfd"], indirect=True)
def test_an_idle_loop_reaps_at_once(said):
    """A child's exit ends the loop's sleep, so that no zombie waits for the next client."""
    made, told = Engine(said.__getitem__), threading.Event()
    loop = threading.Thread(target=made.run, args=(told.is_set, lambda: None, lambda: FOREVER))
    pipe = Pipe()
    made.spawn(pipe.wait, done=lambda status: told.set())
    loop.start()
    assert not told.wait(0.02)
    pipe.end()
    assert told.wait(PATIENCE)
    loop.join(PATIENCE)
    assert not loop.is_alive()


def test_it_is_full_at_max_children(engine, said):
    """Read late: a larger number makes room at once."""
    pipes = [Pipe(), Pipe()]
    for pipe in pipes:
        engine.spawn(pipe.wait)
    assert engine.full
    said["max_children"] = 3
    assert not engine.full
    for pipe in pipes:
        pipe.end()
    assert engine.join(None) == 0


def test_spawn_at_the_limit_waits_for_a_child(engine):
    """A loop of the program's own is held until one of the children has exited."""
    pipes = [Pipe(), Pipe()]
    pids = [engine.spawn(pipe.wait) for pipe in pipes]
    timer = threading.Timer(0.03, pipes[0].end)
    timer.start()
    third = engine.spawn(lambda: 0)
    assert pids[0] not in engine.children
    assert {pids[1], third} >= engine.children
    timer.join()
    pipes[1].end()
    assert engine.join(None) == 0


def test_children_left_at_the_deadline_are_counted_and_can_be_told_to_end(engine):
    """join() returns in time and touches nobody; terminate() sends SIGTERM."""
    told = []
    pipes = [Pipe(), Pipe()]
    for pipe in pipes:
        engine.spawn(pipe.wait, done=told.append)
    assert engine.join(time.monotonic() + 0.02) == 2
    assert told == []
    engine.terminate()
    assert engine.join(time.monotonic() + PATIENCE) == 0
    assert told == [-signal.SIGTERM] * 2
    for pipe in pipes:
        pipe.close()


def test_end_child_leaves_strangers_alone(engine, monkeypatch):
    """Only children of this engine are told to end."""
    monkeypatch.setattr(os, "kill", pytest.fail)
    engine.end_child(os.getpid())


def test_no_process_to_be_had_leaves_the_books_as_they_were(engine, monkeypatch):
    """The caller learns it."""

    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(BlockingIOError):
        engine.spawn(pytest.fail)
    assert engine.children == set()
    assert not engine._doors


def test_pids_that_a_program_added_do_not_stop_the_loop(engine):
    """``active_children`` is a set that programs write into."""
    engine.children |= {2**22 - 1, 2**22 - 2}
    assert engine.full
    engine.spawn(lambda: 0)
    assert engine.join(None) == 0


def test_the_default_is_stdlibs():
    """Forty children."""
    assert fork.MAX_CHILDREN.default == fork.MAX_CHILDREN.serve == 40


def test_a_child_is_not_collected_before_all_is_known_of_it(engine, monkeypatch):
    """Another loop may collect while a child is being started: its end is told, and its door does not stay."""
    told, opened = [], engine._open_end

    def open_late(pid):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is over by now
        engine.collect()  # as another loop does
        return opened(pid)

    monkeypatch.setattr(engine, "_open_end", open_late)
    pid = engine.spawn(lambda: 3, done=told.append)
    engine.collect()
    assert told == [3]
    assert pid not in engine.children
    assert not engine._doors


def test_children_of_the_program_are_reaped_too(engine):
    """A program that forks by itself adds its children to ``active_children``, and relies on their being collected."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    engine.children.add(pid)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    engine.collect()
    assert pid not in engine.children
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_the_status_is_told_however_many_loops_find_an_end(engine):
    """Of those that ask the kernel for it one is answered; what it learned is told, once."""
    told = []
    for status in range(1, 21):
        pid = engine.spawn(lambda status=status: status, done=told.append)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        loops = [threading.Thread(target=engine.collect) for _ in range(4)]
        for loop in loops:
            loop.start()
        for loop in loops:
            loop.join(PATIENCE)
    assert told == list(range(1, 21))
