"""The hub as a guest: green threads, timers and sockets inside asyncio's and uvloop's loops."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import socket
import threading
import time

import pytest

from harken import _hub
from harken._hub import fallback, hosts
from harken.errors import ConfigError

PATIENCE = 5.0  # seconds
HOSTS = [("alone", "asyncio"), ("asyncio", "asyncio"), ("asyncio", "uvloop")]


@pytest.fixture(params=HOSTS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def run(request, kind, monkeypatch):
    """Run functions in green threads of a hub in this host; return what they returned or raised."""
    host, loop = request.param
    monkeypatch.setattr(_hub, "current", kind.current)  # of the kind under test, not the one in use
    made = []

    def run_in_host(*functions, tick=lambda: None):
        outcomes = [None] * len(functions)

        def act(number, function):
            try:
                outcomes[number] = function()
            except BaseException as error:
                outcomes[number] = error

        def serve():
            hub = kind.Hub()
            made.append(hub)
            greens = [hub.spawn(act, number, function) for number, function in enumerate(functions)]
            deadline = time.monotonic() + PATIENCE
            stage = hosts.Stage(
                hub,
                lambda: all(green.dead for green in greens) or time.monotonic() > deadline,
                lambda: 0.5,
                tick,
                lambda: loop,
            )
            try:
                hosts.run(host, stage)
            except BaseException as error:
                outcomes.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        thread.join(2 * PATIENCE)
        assert not thread.is_alive()
        return outcomes

    run_in_host.hub = lambda: made[-1]
    return run_in_host


def test_green_threads_sleep_and_wake_in_time(run):
    """Deadlines of the hub are the host's."""
    seen = []

    def nap(seconds):
        began = time.monotonic()
        run.hub().sleep(seconds)
        seen.append(seconds)
        return time.monotonic() - began

    slept = run(lambda: nap(0.1), lambda: nap(0.02), lambda: nap(0))
    assert seen == [0, 0.02, 0.1]
    assert all(0 <= late < 1 for late in (slept[0] - 0.1, slept[1] - 0.02, slept[2]))


def test_sockets_are_waited_for(run):
    """Reading and writing green threads, with a timeout too."""
    near, far = socket.socketpair()
    with far, contextlib.ExitStack() as closing:

        def read():
            connection = closing.enter_context(run.hub().adopt(near))
            first = connection.recv(10)
            connection.settimeout(0.05)
            try:
                connection.recv(10)
            except TimeoutError:
                return first, "timed out"

        def write():
            run.hub().sleep(0.01)
            far.sendall(b"hello")

        assert run(read, write)[0] == (b"hello", "timed out")


def test_another_thread_wakes_it(run):
    """``call_soon_threadsafe`` does not wait for the next timer."""

    def wait_for_thread():
        hub, green = run.hub(), __import__("greenlet").getcurrent()
        timer = threading.Timer(0.02, hub.call_soon_threadsafe, (hub.unpark, green, "woken"))
        began = time.monotonic()
        timer.start()
        got = hub.park()
        timer.join()
        return got, time.monotonic() - began < 0.4  # patience is 0.5

    assert run(wait_for_thread) == [("woken", True)]


def test_what_tick_raises_leaves(run):
    """As from the hub alone, and green threads that are left are ended."""
    ended = []

    def wait():
        try:
            run.hub().park()
        finally:
            ended.append(True)

    def tick():
        if ended is not None and run.hub() is not None:
            raise KeyError("tick")

    outcomes = run(wait, tick=tick)
    assert isinstance(outcomes[-1], KeyError)
    gc.collect()
    assert ended in ([True], [])  # it may not have begun


def test_coroutines_run_beside_green_threads(run):
    """``event_loop()`` gives a loop in every host; a hub that ran alone moves into one, once."""
    variable = contextvars.ContextVar("variable", default="nobody's")

    async def task():
        await asyncio.sleep(0.01)
        return variable.get(), asyncio.current_task() is not None

    def wait(name):
        variable.set(name)
        loop = hosts.event_loop()
        future = asyncio.ensure_future(task(), loop=loop)
        green = __import__("greenlet").getcurrent()
        future.add_done_callback(lambda _: run.hub().unpark(green))
        while not future.done():
            run.hub().park()
        return loop, future.result()

    outcomes = run(*[lambda name=name: wait(name) for name in "abc"])
    assert [result for _, result in outcomes] == [(name, True) for name in "abc"]
    assert len({id(loop) for loop, _ in outcomes}) == 1


def test_a_forked_child_goes_on(run):
    """The green thread that forked waits by poll() in the child, and the parent's loop is untouched."""
    reader, writer = os.pipe()

    def fork():
        near, far = socket.socketpair()
        with run.hub().adopt(near) as connection, far:
            pid = os.fork()
            if pid == 0:
                far.sendall(b"x")
                os.write(writer, connection.recv(1))
                os._exit(0)
            run.hub().sleep(0.05)  # the loop turns meanwhile
            os.waitpid(pid, 0)
            return os.read(reader, 1)

    try:
        assert run(fork) == [b"x"]
    finally:
        os.close(reader)
        os.close(writer)


def test_a_loop_that_is_not_installed(monkeypatch):
    """The error names the remedy."""
    monkeypatch.setitem(__import__("sys").modules, "uvloop", None)
    with pytest.raises(ConfigError, match=r"pip install harken\[uvloop\]"):
        hosts.loop_factory("uvloop")


def test_without_a_descriptor_the_loop_polls(monkeypatch):
    """On a system with neither epoll nor kqueue, where the hub is the one in Python."""
    monkeypatch.setattr(fallback.Hub, "fileno", lambda _hub: -1)
    hub = fallback.Hub()
    near, far = socket.socketpair()
    with far:
        seen = []

        def read():
            with hub.adopt(near) as connection:
                seen.append(connection.recv(1))

        green = hub.spawn(read)
        far.sendall(b"x")
        hosts.run("asyncio", hosts.Stage(hub, lambda: green.dead, lambda: 0.5, lambda: None, lambda: "asyncio"))
        assert seen == [b"x"]
