"""The hub inside gevent's loop: what gevent's monkey patching made cooperate gives way to harken's connections, too.

Turns are taken in gevent's hub greenlet, which so becomes the own greenlet of harken's hub: a green thread that waits
in gevent switches there, and gevent switches straight back to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
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
        fd = self.stage.hub.fileno()
        self._watched = fd >= 0
        watcher = self._home.loop.io(fd, _READ) if self._watched else None
        if watcher is not None:
            watcher.start(self._turn)
        self._home.loop.run_callback(self._turn)
        try:
            self._over.wait()
        finally:
            self._ended = True
            self._disarm()
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


def offload(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, run by a thread of gevent's pool: its patched threads would block one another."""
    return import_module("gevent").get_hub().threadpool.apply(function, args)


def is_inside(hub: Any) -> bool:
    """Whether ``hub`` or one of its green threads calls."""
    host = hosts.host_of(hub)
    return isinstance(host, Host) and host.is_inside()
