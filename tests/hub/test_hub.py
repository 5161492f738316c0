"""The hub: green threads, calls, timers, doors, and waking it."""

from __future__ import annotations

import contextvars
import gc
import os
import select
import signal
import sys
import threading
import time
import weakref

import pytest
from greenlet import GreenletExit, getcurrent

PATIENCE = 5.0  # seconds


@pytest.fixture
def shown(monkeypatch):
    """What was given to threading.excepthook."""
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))
    return seen


# -- green threads ---------------------------------------------------------------------------------------------------


def test_green_threads_take_turns(stage):
    """Each goes on where it gave up, in order."""
    seen = []

    def count(name):
        for number in range(3):
            seen.append((name, number))
            stage.hub.sleep(0)

    stage.run(lambda: count("a"), lambda: count("b"))
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_spawn_starts_at_the_next_turn_and_tells_of_the_end(stage):
    """Not at once; ``dead`` says when it is over."""
    seen = []
    green = stage.hub.spawn(seen.append, 1)
    assert (seen, green.dead) == ([], False)
    stage.hub.step(0)
    assert (seen, green.dead) == ([1], True)


def test_what_leaves_a_green_thread_is_shown_as_a_threads(stage, shown):
    """The hook decides, as for a thread, and the others go on; GreenletExit is nobody's business."""

    def leave(error):
        raise error

    def quietly():
        raise GreenletExit

    errors = [ValueError("x"), SystemExit(3), KeyboardInterrupt()]
    for error in errors:
        stage.hub.spawn(leave, error)
    stage.hub.spawn(quietly)
    assert stage.run(lambda: "others") == ["others"]
    assert shown == errors


def test_context_variables_are_a_copy_of_the_spawners(stage):
    """A green thread sees the spawner's values, and its changes stay its own."""
    variable = contextvars.ContextVar("variable", default="nobody's")
    variable.set("spawner's")

    def change(value):
        before = variable.get()
        variable.set(value)
        stage.hub.sleep(0)
        return before, variable.get()

    assert stage.run(lambda: change("a"), lambda: change("b")) == [("spawner's", "a"), ("spawner's", "b")]
    assert variable.get() == "spawner's"


def test_exceptions_being_handled_are_each_ones_own(stage):
    """``sys.exc_info()`` survives a switch, and is not seen by others."""

    def handle(error):
        try:
            raise error
        except ValueError:
            stage.hub.sleep(0)
            return sys.exc_info()[1] is error

    assert stage.run(lambda: handle(ValueError("a")), lambda: handle(ValueError("b")), sys.exc_info) == [
        True,
        True,
        (None, None, None),
    ]


def test_park_and_unpark(stage):
    """unpark() gives park() its value, once; later ones are refused."""
    parked = []

    def sleeper():
        parked.append(getcurrent())
        return stage.hub.park()

    def waker():
        while not parked:
            stage.hub.sleep(0)
        return [stage.hub.unpark(parked[0], "first"), stage.hub.unpark(parked[0], "second")]

    assert stage.run(sleeper, waker) == ["first", [True, False]]
    assert not stage.hub.unpark(parked[0])


def test_throw_takes_the_place_of_an_unpark_under_way(stage):
    """The error comes out of park(); a dead green thread gets none."""
    parked = []

    def sleeper():
        parked.append(getcurrent())
        stage.hub.park()

    def thrower():
        stage.hub.unpark(parked[0])
        return stage.hub.throw(parked[0], LookupError("thrown"))

    outcomes = stage.run(sleeper, thrower)
    assert isinstance(outcomes[0], LookupError)
    assert outcomes[1] is True
    assert stage.hub.throw(parked[0], LookupError()) is False


def test_throw_leaves_an_error_under_way(stage):
    """Each has its own reason: the second is told so, and may try again."""
    parked = []

    def sleeper():
        parked.append(getcurrent())
        stage.hub.park()

    def thrower():
        return [stage.hub.throw(parked[0], error) for error in (LookupError(), KeyError())]

    outcomes = stage.run(sleeper, thrower)
    assert type(outcomes[0]) is LookupError
    assert outcomes[1] == [True, False]


def test_only_a_green_thread_can_park(stage):
    """Elsewhere nothing could ever switch back."""
    with pytest.raises(RuntimeError):
        stage.hub.park()
    found = []

    def call():
        with pytest.raises(RuntimeError):
            stage.hub.park()
        found.append(True)

    stage.hub.call_soon(call)
    stage.hub.step(0)
    assert found


def test_current_says_whether_a_hub_runs_this(stage):
    """The hub in its green threads; None in its own greenlet and elsewhere."""
    seen = []
    stage.hub.call_soon(lambda: seen.append(stage.kind.current()))
    assert stage.run(stage.kind.current) == [stage.hub]
    assert seen == [None]
    assert stage.kind.current() is None


def test_close_ends_the_green_threads_that_are_left(kind):
    """Their finally blocks run, even if one waits there again; what never started is forgotten."""
    hub, seen = kind.Hub(), []

    def stubborn():
        try:
            hub.park()
        finally:
            seen.append("ended")

    def never():
        seen.append("never")

    green = hub.spawn(stubborn)
    hub.step(0)
    hub.spawn(never)
    hub.close()
    assert seen == ["ended"]
    assert green.dead
    hub.wake()


def test_close_lets_go_of_what_has_not_begun(kind):
    """Also when somebody holds the green thread: what it would have run never will."""

    class Thing:
        def __call__(self):
            """Never called."""

    thing = Thing()
    gone = weakref.ref(thing)
    hub = kind.Hub()
    green = hub.spawn(thing)
    del thing
    hub.close()
    assert gone() is None
    assert not green


@pytest.mark.parametrize("how", ["run", "step", "occupy", "close"])
def test_a_hub_that_does_not_run_holds_no_greenlet_of_its_thread(kind, how):
    """A thread that ends would take that along, whoever holds it, if a collection of garbage is under way elsewhere."""
    hub = kind.Hub()
    if how == "run":
        hub.run(lambda: bool(hub.step), lambda: 0.0, lambda: None)
    elif how == "step":
        hub.step(0)
    elif how == "occupy":
        hub.occupy(True)
        hub.step(0)
        hub.occupy(False)
    if how != "close":
        assert hub not in gc.get_referrers(getcurrent())
    hub.close()
    assert hub not in gc.get_referrers(getcurrent())


def test_ended_green_threads_are_forgotten(stage):
    """Nothing of the hub's keeps a function or its arguments alive."""

    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    stage.hub.spawn(lambda thing: stage.hub.sleep(0.001), thing)
    del thing
    stage.run(lambda: stage.hub.sleep(0.01))
    gc.collect()
    assert gone() is None


# -- calls and timers ------------------------------------------------------------------------------------------------


def test_calls_run_in_order_in_the_hubs_own_greenlet(stage):
    """And one that raises is shown and stops nobody."""
    seen = []
    own = getcurrent()
    stage.hub.call_soon(lambda: seen.append(getcurrent() is own))
    stage.hub.call_soon(seen.append, 2)
    stage.hub.call_soon_threadsafe(seen.append, 3)
    stage.hub.step(0)
    assert seen == [True, 2, 3]


def test_a_call_that_raises_is_shown(stage, shown):
    """It does not end the hub."""
    seen = []
    stage.hub.call_soon([].pop)
    stage.hub.call_soon(seen.append, 1)
    stage.hub.step(0)
    assert seen == [1]
    assert [type(error) for error in shown] == [IndexError]


def test_timers_fire_in_order_and_not_before_their_time(stage):
    """Whatever order they were made in; a cancelled one never."""
    seen = []
    began = time.monotonic()
    for delay in (0.03, 0.01, 0.02):
        stage.hub.call_at(began + delay, lambda delay=delay: seen.append((delay, time.monotonic() - began >= delay)))
    cancelled = stage.hub.call_at(began + 0.015, seen.append, "cancelled")
    cancelled.cancel()
    cancelled.cancel()
    stage.run(lambda: stage.hub.sleep(0.05))
    assert seen == [(0.01, True), (0.02, True), (0.03, True)]


def test_a_timeout_that_is_due_ends_no_later_wait(stage):
    """Its own wait was ended by something else in the same turn."""
    connection, far = stage.pair()
    waiting = []

    def reader():
        waiting.append(getcurrent())
        connection.settimeout(0.02)
        with pytest.raises(LookupError):
            connection.recv(1)
        connection.settimeout(None)
        return connection.recv(1)

    def interrupter():
        time.sleep(0.03)  # keeps the hub until the timeout is due
        stage.hub.throw(waiting[0], LookupError())
        stage.hub.sleep(0.02)
        far.sendall(b"x")

    assert stage.run(reader, interrupter) == [b"x", None]


@pytest.mark.parametrize("what", ["sleep", "call_at"])
def test_what_is_no_number_is_no_time(stage, what):
    """A timer that is never due would keep all others from their turn."""
    nan = float("nan")
    act = {"sleep": lambda: stage.hub.sleep(nan), "call_at": lambda: stage.hub.call_at(nan, print)}[what]
    assert isinstance(stage.run(act)[0], ValueError)


def test_many_cancelled_timers_do_not_pile_up(stage):
    """A recv with a timeout leaves one each time: memory must not wait for their deadlines."""

    class Thing:
        def __call__(self):
            """Never called."""

    things = [Thing() for _ in range(5000)]
    gone = [weakref.ref(thing) for thing in things]
    timers = [stage.hub.call_at(time.monotonic() + 3600, thing) for thing in things]
    del things
    for timer in timers:
        timer.cancel()
    del timers, timer
    gc.collect()
    assert sum(ref() is not None for ref in gone) <= 1
    assert stage.hub.next_deadline() is None


def test_sleep_lasts_and_lets_others_run(stage):
    """Two sleepers take the time of one."""
    began = time.monotonic()
    stage.run(lambda: stage.hub.sleep(0.1), lambda: stage.hub.sleep(0.1))
    assert 0.1 <= time.monotonic() - began < 0.19


def test_next_deadline_is_for_hosts(stage):
    """None: nothing; a time: a timer; 0.0: at once."""
    assert stage.hub.next_deadline() is None
    stage.hub.call_at(12345.0, print)
    assert stage.hub.next_deadline() == 12345.0
    stage.hub.call_soon(int)
    assert stage.hub.next_deadline() == 0.0


# -- run, step, wake -------------------------------------------------------------------------------------------------


def test_run_ticks_and_has_patience(stage):
    """tick() comes each turn, and without events after patience() seconds."""
    ticks = []
    began = time.monotonic()
    stage.hub.run(lambda: len(ticks) >= 3, lambda: 0.02, lambda: ticks.append(1))
    assert 0.04 <= time.monotonic() - began < PATIENCE


def test_what_tick_raises_leaves_run_and_it_runs_again(stage):
    """The hub is whole after that."""
    with pytest.raises(ZeroDivisionError):
        stage.hub.run(lambda: False, lambda: 0.0, lambda: 1 // 0)
    assert stage.run(lambda: 1) == [1]


@pytest.mark.parametrize("how", ["wake", "call_soon_threadsafe"])
def test_another_thread_ends_the_sleep(stage, how):
    """Within milliseconds, not at the end of patience()."""
    seen = []

    def wake():
        if how == "wake":
            seen.append(1)
            stage.hub.wake()
        else:
            stage.hub.call_soon_threadsafe(seen.append, 1)

    timer = threading.Timer(0.05, wake)
    timer.start()
    began = time.monotonic()
    stage.hub.run(lambda: bool(seen), lambda: 30.0, lambda: None)
    timer.join()
    assert time.monotonic() - began < 2


def test_calls_from_many_threads_all_arrive(stage):
    """None is lost, each thread's own in order."""
    seen = []

    def call(name):
        for number in range(500):
            stage.hub.call_soon_threadsafe(seen.append, (name, number))

    threads = [threading.Thread(target=call, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    stage.hub.run(lambda: len(seen) == 2000 or time.monotonic() > deadline, lambda: 1.0, lambda: None)
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(name, number) for name in range(4) for number in range(500)]
    assert [number for name, number in seen if name == 2] == list(range(500))


def test_a_signal_handler_runs_at_once_and_may_wake(stage):
    """In the main thread, while the hub sleeps."""
    seen = []

    def handler(*_):
        seen.append(time.monotonic())
        stage.hub.wake()

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        began = time.monotonic()
        stage.hub.run(lambda: bool(seen), lambda: 10.0, lambda: None)
        assert time.monotonic() - began < 2
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_what_a_signal_handler_raises_leaves_run(stage):
    """As Ctrl-C does."""

    def handler(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            stage.hub.run(lambda: False, lambda: 10.0, lambda: None)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_host_sees_when_the_hub_wants_a_turn(stage):
    """fileno() is readable exactly when something is ready."""
    fd = stage.hub.fileno()
    if fd < 0:
        return
    connection, far = stage.pair()
    green = stage.hub.spawn(connection.recv, 10)
    stage.hub.step(0)
    stage.hub.step(0)
    assert not select.select([fd], [], [], 0)[0]
    far.sendall(b"x")
    assert select.select([fd], [], [], PATIENCE)[0]
    stage.hub.step(0)
    assert green.dead


def test_hubs_of_two_threads_do_not_meet(stage):
    """One hub a thread."""
    seen = []

    def other():
        hub = stage.kind.Hub()
        hub.spawn(lambda: seen.append(stage.kind.current() is hub))
        hub.step(0)
        hub.close()

    def own():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return stage.kind.current() is stage.hub

    assert stage.run(own) == [True]
    assert seen == [True]
