"""The hub inside gevent's loop: what gevent's monkey patching made cooperate gives way to harken's connections, too.

Turns are taken in gevent's hub greenlet, which so becomes the own greenlet of harken's hub: a green thread that waits
in gevent switches there, and gevent switches straight back to it.

So the hub does not see all that keeps it waiting. For the watchdog a round of gevent's loop is one piece of work, but
for what of it is the hub's own turn.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

from greenlet import getcurrent

from harken import _hub
from harken._hub import hosts
from harken._hub.hosts import Stage

__all__ = ["Host", "offload"]

_READ = 1  # gevent's loop: watch for reading
# Seconds between turns on a system that has neither epoll nor kqueue, where nothing tells that the hub has work.
POLL_SECONDS = 0.005


class Host:
    """A guest of the gevent hub of this thread. There is no asyncio loop beside it."""

    loop = None

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._error: BaseException | None = None
        self._ended = False
        self._occupies = False
        self._armed = 0.0
        self._timer: Any = None

    def run(self) -> str | None:
        """Wait, in a greenlet of gevent's, while the hub is given its turns."""
        self._home = import_module("gevent").get_hub()
        self._over = import_module("gevent.event").Event()
        self._rounds = _Rounds(self._home.loop, self.stage.hub.beat)
        fd = self.stage.hub.fileno()
        self._watched = fd >= 0
        watcher = self._home.loop.io(fd, _READ) if self._watched else None
        if watcher is not None:
            watcher.start(self._turn)
        self._home.loop.run_callback(self._turn)
        try:
            with _interruptible():
                self._over.wait()
        finally:
            self._ended = True
            self._disarm()
            self._rounds.close()
            if watcher is not None:
                watcher.stop()
                watcher.close()
            self.stage.hub.occupy(False)
        if self._error is not None:
            raise self._error
        return None

    def move(self) -> bool:
        """It stays."""
        return False

    def is_inside(self) -> bool:
        """Whether the hub or one of its green threads calls, rather than a greenlet of gevent's."""
        return getcurrent() is self._home or _hub.current() is self.stage.hub

    def _turn(self) -> None:
        if self._ended:
            return
        stage = self.stage
        try:
            if not self._occupies:
                self._occupies = True
                stage.hub.occupy(True)
            news = stage.hub.step(0.0) or self._timer is None
            self._rounds.resume()
            if news:
                stage.tick()
                if stage.until():
                    self._end()
                    return
            self._arm(stage.hub.next_deadline(), news)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the end
            self._error = error
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._over.set()

    def _arm(self, deadline: float | None, news: bool) -> None:
        """See to it that the next turn is in time; without news, that the hub's own deadline is."""
        if deadline == 0.0:
            self._home.loop.run_callback(self._turn)
            return
        if not news and (deadline is None or deadline >= self._armed):
            return
        now = time.monotonic()
        wanted = now + (self.stage.patience() if self._watched else POLL_SECONDS)
        if deadline is not None and deadline < wanted:
            wanted = deadline
        if self._timer is not None:
            if self._armed <= wanted:
                return
            self._disarm()
        self._armed = wanted
        self._timer = self._home.loop.timer(max(0.0, wanted - now))
        self._timer.start(self._in_time)

    def _in_time(self) -> None:
        self._disarm()
        self._turn()

    def _disarm(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()


class _Rounds:
    """Tells a watchdog when the loop begins a round of callbacks, and when it sleeps; libuv's has no such news."""

    def __init__(self, loop: Any, beat: Any) -> None:
        self._beat = beat
        self._watchers: list[Any] = []
        self.resume: Callable[[], None] = _nothing
        """To be called after a turn, which ends with the hub's own leave()."""
        try:
            ends = loop.prepare(ref=False, priority=loop.MINPRI)  # after those by which gevent runs what is ready
        except TypeError:
            return
        self._begins = loop.check(ref=False, priority=loop.MAXPRI)
        self._watchers = [self._begins, ends]
        ends.start(beat.leave)
        self._begins.start(self._first)

    def _first(self) -> None:
        """Watch from here: of a round that is under way already the end may not be told."""
        self._begins.callback = self.resume = self._beat.enter
        self._beat.enter()

    def close(self) -> None:
        """Watch no longer."""
        for watcher in self._watchers:
            watcher.stop()
            watcher.close()
        self.resume = _nothing
        self._beat.leave()


def _nothing() -> None:
    pass


_guests = 0  # hubs that have turns by gevent, in whatever thread


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the program, as ever, and not the handler that it happens to interrupt."""
    global _guests
    _guests += 1
    _heed(signal.default_int_handler, _interrupt)
    try:
        yield
    finally:
        _guests -= 1
        if not _guests:
            _heed(_interrupt, signal.default_int_handler)


def _heed(before: Callable[..., object], after: Callable[..., object]) -> None:
    """Put one handler of Ctrl-C in the place of another; one of the program's own stays: it knows what to do."""
    try:
        if signal.getsignal(signal.SIGINT) is before:
            signal.signal(signal.SIGINT, after)
    except ValueError:  # not the main thread, which alone runs handlers
        pass


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt where gevent raises what ends the program: in the main greenlet.

    And not in the midst of a turn, which may have taken a lock at that very moment.
    """
    home = import_module("gevent").get_hub()
    if _hub.current() is None and getcurrent() is not home:
        signal.default_int_handler(number, frame)
    home.handle_system_error(KeyboardInterrupt, KeyboardInterrupt())


def offload(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, run by a thread of gevent's pool: its patched threads would block one another."""
    result, error = import_module("gevent").get_hub().threadpool.apply(_outcome, (function, args))
    if error is None:
        return result
    try:
        raise error
    finally:
        del error  # or its traceback would hold itself


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    """Return what came of it: what a function raises in the pool is shown there, also when somebody waits for it."""
    try:
        return function(*args), None
    except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
        return None, error


def is_inside(hub: Any) -> bool:
    """Whether ``hub`` or one of its green threads calls."""
    host = hosts.host_of(hub)
    return isinstance(host, Host) and host.is_inside()
