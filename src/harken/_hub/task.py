"""A coroutine that a green thread runs, as a task among asyncio's.

asyncio's own Task is resumed by its loop, a future and two callbacks for each wait. This one is resumed by its green
thread: where the coroutine waits for its connection, the green thread waits in the hub, inside ``send()``. For all that
waits for futures it does what asyncio.Task does; the functions by which a foreign task makes itself known are
documented ("Extending asyncio").
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from asyncio import _leave_task, _register_task, _unregister_task
from collections.abc import Callable, Coroutine
from functools import cache
from importlib import import_module
from typing import Any

from greenlet import GreenletExit, getcurrent

from harken import _hub
from harken._hub import hosts
from harken.errors import ConfigError

__all__ = ["Task", "aside", "drive", "of_hub", "own", "sweep", "tasks"]

tasks: set[int] = set()
"""By identity, the tasks that green threads run now. Without any there is nothing to sweep after a turn."""

# Turns of the loop in which a green thread ends that is told to: two or three, unless its hub serves no more.
MOST_TURNS = 100

_numbers = itertools.count(1)
_mine: contextvars.ContextVar[Task | None] = contextvars.ContextVar("harken_task", default=None)


@cache
def _driver_kind() -> Any:
    """The Driver in C, where the hub in use is; the one in Python beside it."""
    if _hub.kind == "compiled":
        return import_module("harken._hub.compiled").Driver
    from harken._hub.driver import Driver

    return Driver


class Task(asyncio.Future[Any]):
    """Runs a coroutine in the calling green thread; ``asyncio.current_task()`` inside.

    Attributes:
        driver: its part in the green thread.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop, hub: Any) -> None:
        super().__init__(loop=loop)
        self.driver = _driver_kind()(loop, self)
        self._hub = hub
        self._own_loop = loop
        self._coro = coroutine
        self._name = f"harken-{next(_numbers)}"
        self._requests = 0
        self._message: Any = None  # of the last request
        self._fut_waiter: Any = None  # asyncio's name, which anyio reads
        tasks.add(id(self))
        _register_task(self)  # type: ignore[arg-type]

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """Run the coroutine to its end; return what it returns, raise what it raises."""
        try:
            result = self._run()
        except asyncio.CancelledError:
            asyncio.Future.cancel(self)
            raise
        except BaseException as error:
            asyncio.Future.set_exception(self, error)
            self.exception()  # it is raised here as well: nobody need be told that it was not looked at
            raise
        finally:
            self.forget()
            self.driver.release()
        asyncio.Future.set_result(self, result)
        return result

    def forget(self) -> None:
        """It goes on no more: nobody is to wait for it at the end of the loop."""
        tasks.discard(id(self))
        _unregister_task(self)  # type: ignore[arg-type]

    def is_of(self, hub: Any) -> bool:
        """Tell whether its green thread is this hub's."""
        return self._hub is hub

    def _run(self) -> Any:
        driver = self.driver
        error: BaseException | None = None
        while True:
            if driver.must_cancel:
                driver.must_cancel = False
                error = self.cancelled_error()
            driver.enter()
            try:
                waited = self._coro.send(None) if error is None else self._coro.throw(error)
            except StopIteration as stop:
                return stop.value
            finally:
                driver.leave()
            error = self._wait(waited)

    def _wait(self, waited: Any) -> BaseException | None:
        """Wait for what the coroutine yielded; return what to throw into it, or None."""
        try:
            self.driver.flush()
            if waited is not None:
                wrong = self._fault(waited)
                return wrong if wrong is not None else self._wait_future(waited)
            self._hub.sleep(0)
        except BaseException as error:  # noqa: BLE001 - thrown into the coroutine
            return error
        return None

    def _fault(self, waited: Any) -> RuntimeError | None:
        blocking = getattr(waited, "_asyncio_future_blocking", None)
        if blocking is None:
            return RuntimeError(f"Task got bad yield: {waited!r}")
        if waited is self:
            return RuntimeError(f"Task cannot await on itself: {self!r}")
        if asyncio.futures._get_loop(waited) is not self._own_loop:  # type: ignore[attr-defined]
            return RuntimeError(f"Task {self!r} got Future {waited!r} attached to a different loop")
        return None if blocking else RuntimeError(f"yield was used instead of yield from in task {self!r}")

    def _wait_future(self, waited: Any) -> BaseException | None:
        waited._asyncio_future_blocking = False
        try:
            self._hub.settle()  # which may wait by itself
        except BaseException as error:  # noqa: BLE001 - thrown into the coroutine
            waited.cancel()
            return error
        waited.add_done_callback(self._wake)
        self._fut_waiter = waited
        if self.driver.must_cancel and waited.cancel(msg=self._message):
            self.driver.must_cancel = False
        try:
            while not waited.done():
                self._hub.park()
            waited.result()
        except BaseException as error:  # noqa: BLE001 - thrown into the coroutine
            if not waited.done():  # somebody interrupted the green thread
                waited.remove_done_callback(self._wake)
                waited.cancel()
            return error
        finally:
            self._fut_waiter = None
        return None

    def _wake(self, waited: Any) -> None:
        if self._fut_waiter is waited:
            self._hub.unpark(self.driver.green)

    # -- what asyncio.Task has -----------------------------------------------------------------------------------------

    def cancel(self, msg: Any = None) -> bool:
        """Raise CancelledError in the coroutine where it waits; see ``asyncio.Task.cancel``."""
        if self.done():
            return False
        self._requests += 1
        if self._fut_waiter is not None:
            if self._fut_waiter.cancel(msg=msg):
                return True
        elif self.driver.in_call and self._hub.throw(self.driver.green, _cancelled(msg)):
            return True
        self.driver.must_cancel = True
        self._message = msg
        return True

    def cancelled_error(self) -> asyncio.CancelledError:
        """Return what is raised where it waits next, once it was cancelled."""
        return _cancelled(self._message)

    @property
    def _must_cancel(self) -> bool:  # asyncio's name, which anyio reads
        return bool(self.driver.must_cancel)

    def cancelling(self) -> int:
        """Return how many requests to cancel it are pending."""
        return self._requests

    def uncancel(self) -> int:
        """Take back one request to cancel it; return how many are left."""
        if self._requests > 0:
            self._requests -= 1
            if self._requests == 0:
                self.driver.must_cancel = False
        return self._requests

    def get_coro(self) -> Coroutine[Any, Any, Any]:
        """Return the coroutine."""
        return self._coro

    def get_context(self) -> contextvars.Context:
        """Return a copy of the calling green thread's context variables."""
        return contextvars.copy_context()

    def get_name(self) -> str:
        """Return the task's name."""
        return self._name

    def set_name(self, value: object) -> None:
        """Name it."""
        self._name = str(value)

    def get_stack(self, *, limit: int | None = None) -> list[Any]:
        """Return the coroutine's frame in a list, or an empty one when it has ended."""
        frame = getattr(self._coro, "cr_frame", None)
        return [frame] if frame is not None else []

    def set_result(self, result: object) -> None:
        """Not for a task.

        Raises:
            RuntimeError: always, as on asyncio's.
        """
        raise RuntimeError("Task does not support set_result operation")

    def set_exception(self, exception: object) -> None:
        """Not for a task.

        Raises:
            RuntimeError: always, as on asyncio's.
        """
        raise RuntimeError("Task does not support set_exception operation")

    def __repr__(self) -> str:
        state = "finished" if self.done() else "cancelling" if self._requests else "pending"
        return f"<Task {state} name={self._name!r} coro={getattr(self._coro, '__qualname__', self._coro)!s}>"


def _cancelled(message: Any) -> asyncio.CancelledError:
    return asyncio.CancelledError() if message is None else asyncio.CancelledError(message)


def sweep(loop: asyncio.AbstractEventLoop) -> None:
    """Whatever task is current in ``loop`` has given up its turn: it is current no more."""
    current = asyncio.current_task(loop)
    if current is not None:
        _leave_task(loop, current)


def of_hub(hub: Any, loop: asyncio.AbstractEventLoop) -> list[Task]:
    """Return the tasks that green threads of ``hub`` run in ``loop`` and that have not ended."""
    return [task for task in asyncio.all_tasks(loop) if isinstance(task, Task) and task.is_of(hub)]


def own() -> Task | None:
    """Return the task of the calling green thread, whose coroutine calls; None in a task of asyncio's."""
    task = _mine.get()
    return task if task is not None and task.driver.green is getcurrent() else None


def drive(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end in this green thread, as a task of the loop that the hub is in.

    Raises:
        ConfigError: this is no green thread in an event loop.
    """
    hub = _hub.current()
    host = hosts.host_of(hub)
    loop = None if host is None else host.loop
    if loop is None:
        coroutine.close()
        raise ConfigError(
            "a handler with `async def handle` needs engine='asyncio', and a connection that waits in its loop: "
            "get_request() must return a plain socket, and not one of a class of its own"
        )
    task = Task(coroutine, loop, hub)
    _mine.set(task)
    return task.run()


async def aside(
    function: Callable[..., Any], *args: Any, give_back: Callable[[Any], object] = lambda result: None
) -> Any:
    """Return ``function(*args)``, which waits as green threads do, from a coroutine that is no green thread's own.

    When it is cancelled, ``function`` is ended by GreenletExit, and has ended before the cancellation goes on: whoever
    calls it next is alone. What it had returned already is given back.
    """
    hub = hosts.any_host().stage.hub
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    over = False

    def work() -> None:
        nonlocal over
        try:
            if future.done():  # cancelled before this green thread's first turn
                return
            result = function(*args)
        except Exception as error:  # noqa: BLE001 - raised again where it is awaited
            if not future.done():
                future.set_exception(error)
        else:
            if future.done():
                give_back(result)
            else:
                future.set_result(result)
        finally:
            over = True

    green = hub.spawn(work)
    try:
        return await future
    except asyncio.CancelledError:
        if over and not future.cancelled() and future.exception() is None:
            give_back(future.result())
        for _ in range(MOST_TURNS):
            if over:
                break
            hub.throw(green, GreenletExit())  # in vain when it is about to run; then it may wait again
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                pass  # it is being raised
        raise
