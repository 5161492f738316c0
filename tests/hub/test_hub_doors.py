"""A hub's doors and descriptors, and what a fork leaves of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from harken import _hub

PATIENCE = 5.0  # seconds


# -- doors -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def door():
    """A readable door: a datagram socket with two datagrams in it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for data in (b"1", b"2"):
                sender.sendto(data, receiver.getsockname())
        yield receiver


@pytest.mark.parametrize("shared", [False, True])
def test_a_door_is_level_triggered(stage, door, shared):
    """What was not taken is told again at the next turn, also when other processes watch the door too."""
    seen = []
    stage.hub.watch(door, lambda: seen.append(door.recv(10)), shared)
    for _ in range(4):
        stage.hub.step(0)
    assert seen == [b"1", b"2"]
    stage.hub.unwatch(door)
    stage.hub.unwatch(door)


def test_a_door_is_called_again_while_it_says_so_within_bounds(stage, door):
    """At most DOOR_BURST times a turn."""
    calls = []
    stage.hub.watch(door, lambda: calls.append(1) or True)
    stage.hub.step(0)
    assert len(calls) == _hub.DOOR_BURST
    stage.hub.unwatch(door)
    stage.hub.step(0)
    assert len(calls) == _hub.DOOR_BURST


def test_a_door_may_be_unwatched_from_its_own_call(stage, door):
    """The burst ends there."""
    calls = []

    def once():
        calls.append(1)
        stage.hub.unwatch(door)
        return True

    stage.hub.watch(door, once)
    stage.hub.step(0)
    stage.hub.step(0)
    assert calls == [1]


def test_doors_go_by_identity(stage, door):
    """A program's server may compare by value and be unhashable."""

    class Equal:
        __hash__ = None

        def __eq__(self, other):
            return True

        def fileno(self):
            return door.fileno()

    one, other = Equal(), Equal()
    seen = []
    stage.hub.watch(one, lambda: seen.append(door.recv(10)))
    stage.hub.unwatch(other)
    stage.hub.step(0)
    assert seen == [b"1"]
    stage.hub.unwatch(one)


def test_what_a_door_raises_leaves_run(stage, door):
    """And the hub can be run again."""

    def fail():
        raise OSError("no listener")

    stage.hub.watch(door, fail)
    with pytest.raises(OSError, match="no listener"):
        stage.hub.run(lambda: False, lambda: 1.0, lambda: None)
    stage.hub.unwatch(door)
    assert stage.run(lambda: 1) == [1]


def test_another_thread_watches_and_unwatches(stage, door):
    """Both hold when they return."""
    seen = []
    timer = threading.Timer(0.03, lambda: (stage.hub.watch(door, lambda: seen.append(door.recv(9))), stage.hub.wake()))
    timer.start()
    deadline = time.monotonic() + PATIENCE
    stage.hub.run(lambda: len(seen) == 2 or time.monotonic() > deadline, lambda: 0.05, lambda: None)
    timer.join()
    assert seen == [b"1", b"2"]
    thread = threading.Thread(target=stage.hub.unwatch, args=(door,))
    thread.start()
    thread.join()


# -- descriptors -----------------------------------------------------------------------------------------------------


def test_wait_for_a_descriptor(stage):
    """A pipe: readable, writable, too late, and two at once."""
    read_end, write_end = os.pipe()
    try:

        def read():
            stage.hub.wait(read_end)
            return os.read(read_end, 10)

        def write():
            stage.hub.wait(write_end, write=True)
            stage.hub.sleep(0.01)
            return os.write(write_end, b"hello")

        assert stage.run(read, write) == [b"hello", 5]
        (late,) = stage.run(lambda: stage.hub.wait(read_end, timeout=0.02))
        assert isinstance(late, TimeoutError)
        assert str(late) == "timed out"
    finally:
        os.close(read_end)
        os.close(write_end)


def test_wait_in_a_plain_thread_blocks_it(stage):
    """By poll()."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(TimeoutError, match="timed out"):
            stage.hub.wait(listener.fileno(), timeout=0.02)
        with socket.create_connection(listener.getsockname()):
            stage.hub.wait(listener.fileno(), timeout=PATIENCE)


# -- fork ------------------------------------------------------------------------------------------------------------

FORK = """
import os, socket, sys
from harken._hub import Hub, Connection
near, far = socket.socketpair()
hub = Hub()
connection = hub.adopt(near)
seen = []

def handler():
    data = connection.recv(10)          # parked once: it is registered
    pid = os.fork()
    if pid == 0:
        far.sendall(b"from the child's other end")
        print("child", data, connection.recv(100), flush=True)   # waits by poll()
        return                          # into the hub's loop, which is the parent's: the process ends
    _, status = os.waitpid(pid, 0)
    far.sendall(b"again")
    seen.append((data, status, connection.recv(10)))

green = hub.spawn(handler)
hub.step(0)
far.sendall(b"first")
hub.run(lambda: green.dead, lambda: 5.0, lambda: None)
print("parent", seen, flush=True)
hub.close()
"""


def test_a_forked_child_waits_for_itself_and_ends_with_its_green_thread(kind):
    """The child neither runs the parent's loop nor takes its events."""
    environment = {**os.environ, "HARKEN_HUB": kind.KIND}
    done = subprocess.run(
        [sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout.splitlines() == [
        "child b'first' b\"from the child's other end\"",
        "parent [(b'first', 0, b'again')]",
    ], done.stderr
    assert done.returncode == 0


def test_a_fork_elsewhere_leaves_the_hub_working(stage):
    """A child that waits on nothing of the hub's: the parent's events stay the parent's."""
    connection, far = stage.pair()

    def other():
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        far.sendall(b"x")

    def read():
        thread = threading.Thread(target=other)
        thread.start()
        try:
            return connection.recv(10)
        finally:
            thread.join()

    assert stage.run(read) == [b"x"]
