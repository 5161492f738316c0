"""The fallback's Driver: the part of a task that runs in its green thread; ``awaited.c`` is the same in C."""

from __future__ import annotations

import asyncio
from asyncio import _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from greenlet import getcurrent, greenlet

__all__ = ["Driver"]


class Driver:
    """Runs a task in the calling green thread.

    Attributes:
        green: that green thread; None when the task is over.
        before_wait: called once before the green thread next waits, or None.
        in_call: whether it waits in a call, to be cancelled by an exception there.
        must_cancel: whether to raise CancelledError at the next wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, task: Any) -> None:
        self.green: greenlet | None = getcurrent()
        self.before_wait: Callable[[], object] | None = None
        self.in_call = False
        self.must_cancel = False
        self._loop = loop
        self._task = task

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``, which waits as green threads do. Only for the task's own coroutine.

        Raises:
            CancelledError: the task was cancelled.
        """
        if self.must_cancel:
            self.must_cancel = False
            raise self._task.cancelled_error()
        self.flush()
        self.leave()
        self.in_call = True
        try:
            return function(*args)
        finally:
            self.in_call = False
            if self._task is not None:
                self.enter()

    def enter(self) -> None:
        """Be the current task."""
        try:
            _enter_task(self._loop, self._task)
        except RuntimeError:  # a task waited by a call that it did not await: harken.green's, a server's drain()
            from harken._hub.task import sweep

            sweep(self._loop)
            _enter_task(self._loop, self._task)

    def leave(self) -> None:
        """Be the current task no more."""
        try:
            _leave_task(self._loop, self._task)
        except RuntimeError:
            pass  # it was swept away while it waited

    def flush(self) -> None:
        """Call ``before_wait``, once."""
        before, self.before_wait = self.before_wait, None
        if before is not None:
            before()

    def release(self) -> None:
        """The task is over."""
        self.green = self._task = self.before_wait = None

    async def wait(self, owner: Any, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``: by ``call`` in the task's own green thread, as the owner says elsewhere."""
        if self.green is getcurrent():
            return self.call(function, *args)
        return await owner.elsewhere(function, *args)

    async def next(self, owner: Any, function: Callable[[], bytes]) -> bytes:
        """As ``wait``; nothing read ends an iteration."""
        data: bytes = await self.wait(owner, function)
        if not data:
            raise StopAsyncIteration
        return data

    def done(self, value: Any) -> Coroutine[Any, Any, Any]:
        """Return an awaitable that gives ``value`` at once. It may be left, and be awaited again."""
        return _Done(value)


class _Done(Coroutine[Any, Any, Any]):
    """Has happened already."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from ()
        return self._value

    def send(self, value: Any) -> Any:
        """Give the value."""
        raise StopIteration(self._value)

    def throw(self, error: Any, value: Any = None, trace: Any = None) -> Any:
        """Raise the error."""
        raise error

    def close(self) -> None:
        """Nothing to end."""
