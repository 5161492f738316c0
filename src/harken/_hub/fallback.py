"""The hub in Python, on greenlet: for systems without epoll or without a compiler. The contract is the room's."""

from __future__ import annotations

import _thread
import contextvars
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from greenlet import GreenletExit, getcurrent, greenlet

from harken._hub import BUSY, DOOR_BURST, adopt
from harken._hub.beat import Beat
from harken._hub.datagrams import Answers, Batch
from harken._hub.files import Reader, on_growth
from harken._hub.pending import Pending
from harken._hub.pollers import HUNG, READABLE, WRITABLE, poller
from harken._hub.sockets import Connection
from harken._hub.timers import Timer, Timers
from harken._hub.wire import Wire, closed, here, wait
from harken.forking import told_in_child
from harken.listener import LOST_SECONDS, NO_ROOM
from harken.waker import Waker

if TYPE_CHECKING:
    from harken.engines import Door

__all__ = [
    "KIND",
    "Answers",
    "Batch",
    "Beat",
    "Connection",
    "Guard",
    "Hub",
    "Lane",
    "Reader",
    "current",
    "on_growth",
    "quicken",
]

KIND: Final = "fallback"
_EXPIRED = object()
# Seconds that a host without patience may let step() sleep at most: some kernels' poll() takes no more (2^31 ms).
LONGEST = 86400.0


Lane = None  # harken.straight does as well
Guard = _thread.allocate_lock


def quicken(kind: type) -> None:
    """Leave the connection under TLS as it is: its methods in Python are this kind's."""


def current() -> Hub | None:
    """The hub whose green thread calls; None in its own greenlet and in plain threads."""
    hub, me = here.hub, getcurrent()
    if hub is None or me is hub.own or (hub.occupies and me not in hub._greens):
        return None
    return hub


class _Failure:
    """What ``throw`` leaves for ``park`` to raise."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Door:
    """A watched door."""

    def __init__(self, fd: int, on_readable: Callable[[], bool | None], shared: bool) -> None:
        self.fd = fd
        self.on_readable = on_readable
        self.shared = shared


class Hub:
    """See :mod:`harken._hub`.

    Attributes:
        beat: what the loop says of itself.
        own: the greenlet in which the hub itself runs, while it does. Not longer: a thread that ends takes its main
            greenlet along when no collection of garbage finds who else holds it, and one that is under way does not.
        occupies: whether others share its thread, in whose waits a green thread may give up its turn unseen.
        pending: what the running green thread has written and not sent.
        asks_at_ends: as the contract has it; this hub asks in each turn.
    """

    def __init__(self) -> None:
        self.beat = Beat(lambda: self.pending.sock is not None)
        self.own: Any = None
        self.pending = Pending()
        self._thread = threading.get_ident()
        self._ready: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._timers = Timers()
        self._greens: set[greenlet] = set()
        self._parked: set[greenlet] = set()
        self._waking: dict[greenlet, Any] = {}
        self._wires: dict[int, Wire] = {}
        self._doors: dict[int, _Door] = {}  # by the identity of the door
        self._turning = self.occupies = False
        self.asks_at_ends = True
        self._lent = False  # whether a fork carried this hub's green thread into a child
        self._open()
        _hubs.add(self)

    def _open(self) -> None:
        self._waker = Waker()
        self._poller = poller()
        self._poller.watch(self._waker.fileno())
        self._fds: dict[int, _Door] = {self._waker.fileno(): _Door(self._waker.fileno(), self._drain, False)}

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self, until: Callable[[], bool], patience: Callable[[], float], tick: Callable[[], None]) -> None:
        """Run green threads until ``until()``; see the contract."""
        with self._on_stage():
            while not until():
                self._turn(patience())
                tick()

    def step(self, timeout: float) -> bool:
        """Take one turn; see the contract."""
        with self._on_stage():
            self._turn(timeout)
        return True

    def fileno(self) -> int:
        """The poller's descriptor, or -1."""
        return self._poller.fileno()

    def next_deadline(self) -> float | None:
        """When the hub wants a turn without a descriptor's being ready."""
        return 0.0 if self._ready else self._timers.next()

    def wake(self) -> None:
        """End the sleep. Any thread."""
        self._waker.wake()

    def flush_pending_nowait(self) -> int:
        """Send what the running green thread has written; see the contract. Any thread."""
        return self.pending.flush_nowait()

    def close(self) -> None:
        """End the green threads that are left, and give the descriptors back."""
        with self._on_stage():
            for green in list(self._greens):
                self._parked.discard(green)
                self._waking.pop(green, None)
                if green:  # it was started
                    green.parent = self.own
                    green.throw(GreenletExit)
            self._greens.clear()
        self._ready.clear()
        self._timers.clear()
        self._poller.close()
        self._waker.close()
        _hubs.discard(self)

    @contextmanager
    def _on_stage(self) -> Iterator[None]:
        before, here.hub = here.hub, self
        own, self.own = self.own, getcurrent()
        self._turning = True
        self.beat.enter()
        try:
            yield
        finally:
            self.beat.leave()
            self._turning = False
            if not self.occupies:
                here.hub, self.own = before, own

    def occupy(self, yes: bool) -> None:
        """Keep the thread between turns, too; see the contract."""
        if yes != self.occupies:
            here.occupy(self, yes)
        self.occupies = yes
        if self._turning:
            return
        if yes:
            here.hub, self.own = self, getcurrent()
        else:
            if here.hub is self:
                here.hub = here.occupants[-1] if here.occupants else None
            self.own = None

    def _turn(self, timeout: float) -> None:
        ready = self._ready
        if ready:
            timeout = 0.0
        else:
            deadline = self._timers.next()
            if deadline is not None:
                timeout = min(timeout, deadline - time.monotonic())
        enter = self.beat.enter
        if timeout > 0.0:
            self.beat.leave()
        events = iter(self._poller.poll(min(max(0.0, timeout), LONGEST)))
        enter()
        try:
            self._dispatch(events)
        except BaseException:  # the loop ends; edges come once, and a later run would wait in vain for these
            self._dispatch(event for event in events if event[0] in self._wires)
            raise
        if self._timers.next() is not None:
            ready.extend((timer.fire, ()) for timer in self._timers.pop_due(time.monotonic()))
        for _ in range(len(ready)):
            function, args = ready.popleft()
            enter()
            try:
                function(*args)
            except Exception:  # noqa: BLE001 - a callback's fault must not end everybody
                show()

    def _dispatch(self, events: Iterator[tuple[int, int]]) -> None:
        wires, parked, enter = self._wires, self._parked, self.beat.enter
        for fd, mask in events:
            wire = wires.get(fd)
            if wire is None:
                self._open_door(fd)
                continue
            if mask & HUNG:
                wire.wet = True
            if mask & READABLE:
                wire.dry = False
                if wire.guest is not None:
                    self.call_soon(self._dislodge(wire))
                green = wire.reader
                if green is not None and green in parked:
                    parked.discard(green)
                    enter()
                    green.switch()
            if mask & WRITABLE:
                green = wire.writer
                if green is not None and green in parked:
                    parked.discard(green)
                    enter()
                    green.switch()

    # -- green threads -------------------------------------------------------------------------------------------------

    def spawn(self, function: Callable[..., object], *args: Any) -> greenlet:
        """Make a green thread; it starts at the next turn."""
        return self._spawn(None, function, args)

    def spawn_into(self, busy: set[Any], function: Callable[..., object], *args: Any) -> greenlet:
        """The same; the set ``busy`` holds it until it has ended."""
        return self._spawn(busy, function, args)

    def _spawn(self, busy: set[Any] | None, function: Callable[..., object], args: tuple[Any, ...]) -> greenlet:
        green = greenlet(self._live)
        green.gr_context = contextvars.copy_context()
        self._greens.add(green)
        if busy is not None:
            busy.add(green)
        self._make_due(self._start, (green, busy, function, args))
        return green

    def _start(self, green: greenlet, *what: Any) -> None:
        green.parent = self.own
        green.switch(*what)

    def _live(self, busy: set[Any] | None, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            function(*args)
        except GreenletExit:
            pass
        except BaseException:  # noqa: BLE001 - shown as a thread's would be
            show()
        finally:
            try:
                self.pending.flush()
            except OSError:
                pass  # a handler that did not close its file does not learn that the peer has gone
            if busy is not None:
                busy.discard(getcurrent())
            self._greens.discard(getcurrent())
            if self._lent:
                _end_process()

    def settle(self) -> None:
        """Send what the calling green thread has written; see the contract."""
        if self.pending.sock is not None:
            self.pending.flush()

    def park(self) -> Any:
        """Give up the calling green thread; see the contract."""
        green = getcurrent()
        if here.hub is not self or green is self.own:
            raise RuntimeError("nothing can wait here: this is no green thread of a running hub")
        if self.pending.sock is not None:
            self.pending.flush()
        self._parked.add(green)
        return self._give_up(green)

    def _give_up(self, green: greenlet) -> Any:
        """Let the hub go on; return what it resumes the calling green thread with, or raise what it is to raise."""
        try:
            got = self.own.switch()
        except BaseException:  # of gevent's, which knows nothing of what was due: the next wait may be anything else
            self._parked.discard(green)
            due = self._waking.pop(green, None)
            if type(due) is _Failure:
                self._make_due(_throw, (green, due.error))
            raise
        if type(got) is _Failure:
            raise got.error
        return got

    def resume(self, green: greenlet) -> None:
        """Let a parked green thread go on now; see the contract."""
        if current() is self or here.hub is not self or green not in self._parked:
            raise RuntimeError("only the hub itself can resume a green thread, and only a parked one")
        self._parked.discard(green)
        self.beat.enter()
        green.switch()

    def unpark(self, green: greenlet, value: Any = None) -> bool:
        """Let a parked green thread go on; see the contract."""
        if green not in self._parked:
            return False
        self._parked.discard(green)
        self._waking[green] = value
        self._make_due(self._resume, (green,))
        return True

    def throw(self, green: greenlet, error: BaseException) -> bool:
        """Raise ``error`` in a parked green thread; see the contract."""
        failure = _Failure(error)
        if green in self._waking:
            if type(self._waking[green]) is _Failure:
                return False
            self._waking[green] = failure
            return True
        if self.occupies and green and green not in self._parked and green is not getcurrent():
            return self._throw_into_host(green, error)
        return self.unpark(green, failure)

    def _throw_into_host(self, green: greenlet, error: BaseException) -> bool:
        """Raise ``error`` in a green thread that waits in the host, which may resume it at any moment: so now."""
        if getcurrent() is not self.own:
            self._make_due(_throw, (green, error))
        else:
            self.beat.enter()
            _throw(green, error)
        return True

    def _resume(self, green: greenlet) -> None:
        if green in self._waking:
            green.switch(self._waking.pop(green))

    def sleep(self, seconds: float) -> None:
        """Park for ``seconds``; outside a green thread ``time.sleep``."""
        if current() is not self:
            time.sleep(seconds)
            return
        self.pending.flush()
        green = getcurrent()
        if seconds <= 0:
            self._waking[green] = None
            self._make_due(self._resume, (green,))
            self._give_up(green)
            return
        timer = self.call_at(time.monotonic() + seconds, self.unpark, green)
        try:
            self.park()
        finally:
            timer.cancel()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Call at the next turn."""
        self._make_due(function, args)

    def call_soon_threadsafe(self, function: Callable[..., object], *args: Any) -> None:
        """Call at the next turn. Any thread."""
        self._ready.append((function, args))
        self._waker.wake()

    def call_at(self, deadline: float, function: Callable[..., object], *args: Any) -> Timer:
        """Call once after ``deadline``."""
        timer = self._timers.add(deadline, function, args)
        if here.hub is not self or not self._turning:
            self._waker.wake()  # whoever hosts the loop asks for the next deadline then
        return timer

    def _make_due(self, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._ready.append((function, args))
        if here.hub is not self or not self._turning:
            self._waker.wake()  # between two turns: a host has to be told

    # -- descriptors ---------------------------------------------------------------------------------------------------

    def watch(self, door: Door, on_readable: Callable[[], bool | None], shared: bool = False) -> None:
        """Call ``on_readable`` while ``door`` is readable; see :class:`harken.engines.Engine`."""
        self.unwatch(door)
        entry = _Door(door.fileno(), on_readable, shared)
        self._poller.watch(entry.fd, shared)
        self._doors[id(door)] = self._fds[entry.fd] = entry

    def unwatch(self, door: Door) -> None:
        """Stop watching ``door``."""
        entry = self._doors.pop(id(door), None)
        if entry is not None and self._fds.get(entry.fd) is entry:
            del self._fds[entry.fd]
            if entry.fd not in self._wires:  # or its number is a connection's by now
                self._poller.unwatch(entry.fd)

    def _open_door(self, fd: int) -> None:
        entry = self._fds.get(fd)
        self._take_from_door(fd, entry)
        if entry is not None and entry.shared and self._fds.get(fd) is entry:
            self._poller.unwatch(fd)  # and to the end of the queue of those who wait
            self._watch_again(entry)

    def _watch_again(self, entry: _Door) -> None:
        """Watch a door that was; later where the kernel has no room for it, or nobody would come in for ever."""
        if self._fds.get(entry.fd) is not entry:
            return
        try:
            self._poller.watch(entry.fd, entry.shared)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.call_at(time.monotonic() + LOST_SECONDS, self._watch_again, entry)

    def _take_from_door(self, fd: int, entry: _Door | None) -> None:
        for _ in range(DOOR_BURST):
            self.beat.enter()
            if entry is None or self._fds.get(fd) is not entry or not entry.on_readable():
                return

    def _drain(self) -> bool:
        self._waker.drain()
        return False

    def lodge(self, connection: Connection, starter: Callable[[Connection], object]) -> None:
        """Let a Connection wait without a green thread; see the contract."""
        wire = connection._wire
        if wire.reader is not None or wire.guest is not None:
            raise RuntimeError(BUSY)
        if wire.hub is self:
            self._poller.add(wire.fd)  # anew: tells its state of now
        else:
            self._take(wire)
        wire.guest = partial(starter, connection)
        self._poller.want(wire.fd, read=True, write=wire.writer is not None)

    def _dislodge(self, wire: Wire) -> Callable[[], object]:
        guest, wire.guest = wire.guest, None
        assert guest is not None
        if wire.hub is self:
            self._poller.want(wire.fd, read=False, write=wire.writer is not None)
        return guest

    def adopt(self, sock: Any) -> Connection:
        """Take over a socket; see the contract."""
        return adopt(sock, Connection)  # type: ignore[no-any-return]

    def wait(self, fd: Any, write: bool = False, timeout: float | None = None) -> None:
        """Park until a descriptor or socket is ready; see the contract."""
        number = fd if isinstance(fd, int) else fd.fileno()
        known = fd._wire if isinstance(fd, Connection) else self._wires.get(number)
        if known is not None:
            if known.hub is self:
                self._poller.add(number)  # anew: tells its state of now, also when somebody has closed and reopened it
            wait(known, write, timeout)
            return
        wire = Wire(number)
        try:
            wait(wire, write, timeout)
        except PermissionError:
            pass  # epoll(7) takes no regular files, which are always ready
        finally:
            wire.release()

    def wait_wire(self, wire: Wire, write: bool, timeout: float | None) -> None:
        """Park the calling green thread until ``wire`` may be ready; see :func:`harken._hub.wire.wait`."""
        if (wire.writer if write else wire.reader or wire.guest) is not None:
            raise RuntimeError(BUSY)
        if self.pending.sock is not None:
            self.pending.flush()  # it may wait as well
        if wire.hub is not self:
            self._take(wire)
        green = getcurrent()
        if write:
            wire.writer = green
        else:
            wire.reader = green
        timer = None
        try:
            self._poller.want(wire.fd, wire.reader is not None, wire.writer is not None)
            if timeout is not None:
                timer = self.call_at(time.monotonic() + timeout, self.unpark, green, _EXPIRED)
            if self.park() is _EXPIRED:
                raise TimeoutError("timed out")
        finally:
            if write:
                wire.writer = None
            else:
                wire.reader = None
            if timer is not None:
                timer.cancel()
            if wire.hub is self:
                self._poller.want(wire.fd, wire.reader is not None, wire.writer is not None)

    def _take(self, wire: Wire) -> None:
        if wire.fd < 0:
            raise closed()
        if wire.hub is not None:
            if wire.reader or wire.writer:  # of another hub
                raise RuntimeError(BUSY)
            wire.hub.forget(wire)
        self._poller.add(wire.fd)
        self._wires[wire.fd] = wire
        wire.hub = self

    def forget(self, wire: Wire) -> None:
        """``wire`` is about to be closed or to leave; whoever waits for it gets EBADF. Any thread."""
        wire.hub = None
        if self._wires.get(wire.fd) is wire:
            del self._wires[wire.fd]
            self._poller.unwatch(wire.fd)
        if wire.guest is not None:
            self.call_soon_threadsafe(self._dislodge(wire))  # it will find that out by itself
        if wire.reader is None and wire.writer is None:
            return
        if self._thread == threading.get_ident():
            self._abandon(wire)
        else:
            self.call_soon_threadsafe(self._abandon, wire)

    def _abandon(self, wire: Wire) -> None:
        for green in (wire.reader, wire.writer):
            if green is not None:
                self.throw(green, closed())

    # -- fork ----------------------------------------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In a child: nothing of the parent's is watched or runs here."""
        for wire in self._wires.values():
            wire.hub = wire.reader = wire.writer = wire.guest = wire.pending = None
        for books in (self._wires, self._doors, self._fds, self._parked, self._waking, self._greens, self._ready):
            books.clear()
        self._timers.clear()
        if self.pending.sock is not None:
            self.pending.sock._wire.pending = None
        self.pending = Pending()  # the parent sends it
        self.beat.forget()
        self._poller.close()
        self._waker.close()
        if self._thread == threading.get_ident():
            self._open()
            if current() is self:
                self._lent = True
                here.hub = None


_hubs = told_in_child(Hub)


def _send_before_fork() -> None:
    """The child may be the next to write to the connection for which this green thread has joined answers."""
    if here.hub is not None:
        here.hub.pending.flush_nowait()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_send_before_fork)


def _throw(green: greenlet, error: BaseException) -> None:
    if not green.dead:
        green.throw(error)


def _end_process() -> None:
    """The green thread that forked has ended in the child; the loop below it is the parent's."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed, or none
    os._exit(0)


def show() -> None:
    """Show what was raised as a thread's would be."""
    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
