"""The hub inside an asyncio or uvloop loop: its descriptor is watched, and timers stand for its deadlines."""

from __future__ import annotations

import asyncio
import time
from asyncio import _enter_task, _leave_task
from dataclasses import replace
from typing import Any

from harken._hub import hosts
from harken._hub.hosts import Stage, loop_factory
from harken._hub.task import of_hub, sweep, tasks

__all__ = ["Guest", "Host", "Lodger"]

# Seconds added to each timer. uvloop counts whole milliseconds and may be half a one early; the hub would find nothing
# due, and the loop spin until it is.
LATE_SECONDS = 0.0005
# Seconds between turns on a system that has neither epoll nor kqueue, where nothing tells that the hub has work.
POLL_SECONDS = 0.005
# Seconds that coroutines get to clean up once they are cancelled, since the hub ends: as a cut handler gets to notice.
CLEANUP_SECONDS = 1.0


class Guest:
    """A hub in a loop that runs in this thread.

    Attributes:
        over: a future that is done when the stage is over; it has what a turn raised.
    """

    def __init__(self, stage: Stage, loop: asyncio.AbstractEventLoop) -> None:
        self.over: asyncio.Future[None] = loop.create_future()
        self._stage = stage
        self._loop = loop
        self._fd = stage.hub.fileno()
        self._soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._armed = 0.0

    def enter(self) -> None:
        """Take the first turn soon, and each when there is something to do."""
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._turn)
        if self._stage.until():
            self._end()
        else:
            self._soon = self._loop.call_soon(self._at_once)

    def leave(self) -> None:
        """Take no more turns."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        for handle in (self._soon, self._timer):
            if handle is not None:
                handle.cancel()

    def _turn(self) -> None:
        stage = self._stage
        if self.over.done():
            return
        try:
            news = stage.hub.step(0.0) or self._timer is None
            if tasks:
                sweep(self._loop)
            if news:
                stage.tick()
                if stage.until():
                    self._end()
                    return
            self._arm(stage.hub.next_deadline(), news)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the end
            self._end(error)

    def _end(self, error: BaseException | None = None) -> None:
        self.leave()
        if self.over.done():
            return
        if error is None:
            self.over.set_result(None)
        else:
            self.over.set_exception(error)

    def _at_once(self) -> None:
        self._soon = None
        self._turn()

    def _in_time(self) -> None:
        self._timer = None
        self._turn()

    def _arm(self, deadline: float | None, news: bool) -> None:
        """See to it that the next turn is in time; without news, that the hub's own deadline is."""
        if deadline == 0.0:
            if self._soon is None:
                self._soon = self._loop.call_soon(self._at_once)
            return
        if not news and (deadline is None or deadline >= self._armed):
            return
        now = time.monotonic()
        wanted = now + (self._stage.patience() if self._fd >= 0 else POLL_SECONDS)
        if deadline is not None and deadline < wanted:
            wanted = deadline
        if self._timer is not None:
            if self._armed <= wanted:
                return  # it comes before, and asks again
            self._timer.cancel()
        self._armed = wanted
        self._timer = self._loop.call_later(max(0.0, wanted - now) + LATE_SECONDS, self._in_time)


class Host:
    """A loop of the hub's own.

    Attributes:
        loop: the loop, once it runs.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.loop: Any = None

    def run(self) -> str | None:
        """Run a loop until it is over; tasks that are left are cancelled."""
        with asyncio.Runner(loop_factory=loop_factory(self.stage.loop())) as runner:
            runner.run(self._live())
        return None

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        guest = Guest(self.stage, self.loop)
        guest.enter()
        try:
            await guest.over
        finally:
            guest.leave()
            await _finish(self.stage, self.loop)
            _close(self.stage.hub, self.loop)  # while the loop runs: what is left may be inside coroutines

    def move(self) -> bool:
        """It is there, or will be at once."""
        return True


class Lodger:
    """The host of a hub in a loop of the program's own, for as long as the program likes.

    Attributes:
        loop: the loop, which runs in this thread.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.loop: Any = asyncio.get_running_loop()
        self._guest = Guest(stage, self.loop)
        hosts.enter(self)
        self._guest.enter()

    def run(self) -> str | None:
        """Not this one's: the program runs the loop."""
        return None

    def move(self) -> bool:
        """It is there already."""
        return True

    async def leave(self) -> None:
        """Take no more turns; coroutines that are left are cancelled, and other green threads ended."""
        self._guest.leave()
        try:
            await _finish(self.stage, self.loop)
        finally:
            _close(self.stage.hub, self.loop)
            hosts.leave(self.stage.hub)
            if not self._guest.over.done():
                self._guest.over.set_result(None)
            self._guest.over.exception()  # looked at


async def _finish(stage: Stage, loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the coroutines that green threads run, and give the hub turns until they have ended; not for ever."""
    left = of_hub(stage.hub, loop)
    for task in left:
        task.cancel()
        task.add_done_callback(lambda _: stage.hub.wake())
    guest = Guest(replace(stage, until=lambda: all(task.done() for task in left)), loop)
    guest.enter()
    try:
        await asyncio.wait([guest.over], timeout=CLEANUP_SECONDS)
    finally:
        guest.leave()
        if guest.over.done():
            guest.over.exception()  # looked at


def _close(hub: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Close the hub from within a task, as none: coroutines that are left become the current one as they end."""
    current = asyncio.current_task(loop)
    if current is not None:
        _leave_task(loop, current)
    try:
        hub.close()
    finally:
        for task in of_hub(hub, loop):
            task.forget()
        sweep(loop)
        if current is not None:
            _enter_task(loop, current)
