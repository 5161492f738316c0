"""Waiting for coroutines from code that is none: in the loop under the hub, or in one that serves all plain threads."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any

from harken import _hub
from harken._hub import hosts
from harken._hub.bell import Bell
from harken.forking import in_child

__all__ = ["wait"]

_IN_ITS_LOOP = "green.wait() would keep this thread's event loop from running what it waits for; await it"


def wait(awaitable: Awaitable[Any]) -> Any:
    """See :func:`harken.green.wait`."""
    try:
        loop = hosts.event_loop()
        if loop is None and _hub.current() is None and asyncio._get_running_loop() is not None:
            raise RuntimeError(_IN_ITS_LOOP)
        elsewhere = _shared.loop() if loop is None else None
    except BaseException:  # a deadline, too, while the hub moves into a loop, or another one starts
        if asyncio.iscoroutine(awaitable):
            awaitable.close()
        raise
    awaitable = _contained(awaitable)
    try:
        if elsewhere is not None:
            return _wait_elsewhere(awaitable, elsewhere)
        return _wait_beside(asyncio.ensure_future(awaitable, loop=loop))
    except _Ending as ending:
        raise ending.reason from None


class _Ending(Exception):
    """No error: it carries SystemExit or KeyboardInterrupt out of a task."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(reason)
        self.reason = reason


class _Contained(Coroutine[Any, Any, Any]):
    """A coroutine whose SystemExit or KeyboardInterrupt is for who waits for it alone.

    asyncio lets them end the loop, and with it everybody who waits there: here, the server.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def send(self, value: Any) -> Any:
        """Go on."""
        try:
            return self._inner.send(value)
        except (SystemExit, KeyboardInterrupt) as reason:
            raise _Ending(reason) from None

    def throw(self, *error: Any) -> Any:
        """Go on by an error."""
        try:
            return self._inner.throw(*error)
        except (SystemExit, KeyboardInterrupt) as reason:
            raise _Ending(reason) from None

    def close(self) -> None:
        """End it."""
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:  # ``__qualname__``, ``cr_frame`` …: what debuggers ask for
        return getattr(self._inner, name)


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _contained(awaitable: Any) -> Any:
    if asyncio.isfuture(awaitable) or not hasattr(awaitable, "__await__"):
        return awaitable  # another's task; or what asyncio will refuse
    return _Contained(awaitable if asyncio.iscoroutine(awaitable) else _await(awaitable))


def _wait_beside(task: asyncio.Future[Any]) -> Any:
    """Wait for a future of the loop in which this green thread's hub is a guest."""
    try:
        _until_done(task)
    except Exception:
        task.cancel()
        _until_done(task)  # its `finally` blocks are this green thread's business
        if not task.cancelled():
            task.exception()  # looked at: this green thread goes on with what interrupted it
        raise
    except BaseException:  # this green thread is to end now
        task.cancel()
        raise
    try:
        return task.result()
    finally:
        del task  # or the error's traceback would hold itself


def _until_done(task: asyncio.Future[Any]) -> None:
    if task.done():
        return
    bell = Bell()

    def ring(_task: object) -> None:
        bell.ring()

    task.add_done_callback(ring)
    try:
        bell.wait()
    finally:
        task.remove_done_callback(ring)


def _wait_elsewhere(awaitable: Awaitable[Any], loop: asyncio.AbstractEventLoop) -> Any:
    """Wait for what runs in the loop for plain threads."""
    bell = Bell()
    started: list[asyncio.Future[Any]] = []
    outcome: list[Callable[[], Any]] = []

    def over(task: asyncio.Future[Any]) -> None:
        outcome.append(task.result)
        bell.ring()

    def start() -> None:
        try:
            started.append(asyncio.ensure_future(awaitable))
        except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
            failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            started.append(failed)
        started[0].add_done_callback(over)

    def give_up() -> None:
        for task in started:
            task.cancel()

    loop.call_soon_threadsafe(start, context=contextvars.copy_context())
    try:
        bell.wait()
    except Exception:
        loop.call_soon_threadsafe(give_up)
        bell.wait()  # its `finally` blocks are this green thread's business
        with suppress(BaseException):  # looked at: this green thread goes on with what interrupted it
            outcome[0]()
        raise
    except BaseException:  # this one is to end now
        loop.call_soon_threadsafe(give_up)
        raise
    try:
        return outcome[0]()
    finally:
        outcome.clear()  # or the error's traceback would hold itself
        started.clear()


class _Shared:
    """One event loop, in a thread of its own, for all plain threads.

    What they share (a pool of connections to a database, say) belongs to one loop. It lives as long as the process:
    clients outlive the calls.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop, started when first needed."""
        with self._guard:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._run, args=(self._loop,), name="harken-asyncio", daemon=True
                )
                self._thread.start()
            return self._loop

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(self._live())

    async def _live(self) -> None:
        self._over = asyncio.get_running_loop().create_future()
        await self._over

    def stop(self) -> None:
        """End it: what still runs there is cancelled."""
        with self._guard:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(self._end)
            thread.join(STOP_SECONDS)

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)


# Seconds that the shared loop gets to cancel what is left when the process ends; it is a daemon's, and no one's loss.
STOP_SECONDS = 1.0

_shared = _Shared()


@atexit.register  # the threads that are no daemons have ended then: what they wait for goes on until they have it
def _stop() -> None:
    _shared.stop()


@in_child
def _after_fork() -> None:
    global _shared
    _shared = _Shared()
