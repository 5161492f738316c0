"""Record the calls of hooks by standing in front of them: subclasses whose methods report and pass on.

Every report is one line of JSON written to a pipe in one piece, so that forked children report by the same pipe.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from harken.explain.hooks import HANDLER_HOOKS, HOOKS, socket_maker
from harken.explain.lookup import author_of, owner_of

__all__ = ["Recorder"]

# PIPE_BUF, below which pipe(7) writes in one piece, is at least 512 by POSIX; the fixed fields need about 200.
ERROR_CHARACTERS = 120
# More calls than a connection with a chatty handler makes; a loop that runs wild must not fill memory.
MAX_CALLS = 5000

# Calls that do not belong to a connection.
_LASTING = {"__init__", "serve_forever", "service_actions", "shutdown"}
_RUNNERS_OWN = {hook.name for hook in HOOKS if hook.runs_in == "runner"}


class Recorder:
    """Makes recording subclasses and reports each call.

    Attributes:
        changed: notified of every call and return in this process, those of the loop left out; guards what follows.
        running: how many calls have not returned.
        taken: how often ``get_request`` has returned.
        closed: how often ``close_request`` has returned.
        moves: how many calls and returns there were.
    """

    def __init__(self, pipe: int) -> None:
        """Report to the file descriptor ``pipe``, which stays the caller's."""
        self._pipe = pipe
        self._process = os.getpid()
        self._numbers = itertools.count()
        self._current: ContextVar[str] = ContextVar("harken_explain_call", default="")
        self._handed_over = ""
        self.changed = threading.Condition()
        self.running = self.taken = self.closed = self.moves = 0

    def report(self, *fields: Any) -> None:
        """Send one report; dropped when nobody reads any more."""
        try:
            os.write(self._pipe, json.dumps(fields).encode() + b"\n")
        except OSError:
            pass

    def server(self, cls: type) -> type:
        """Return a subclass of a server class whose hooks report."""
        members: dict[str, Any] = {"__setattr__": self._watch_socket(cls)}
        for hook in HOOKS:
            if not hook.of_handler and hook.name != "socket":
                members |= self._member(cls, hook.name, hook.name)
        return _subclass(cls, members)

    def handler(self, cls: Any) -> Any:
        """Return a subclass of a handler class whose methods report; for another callable, one that reports."""
        if isinstance(cls, functools.partial):
            return functools.partial(self.handler(cls.func), *cls.args, **cls.keywords)
        if not isinstance(cls, type):
            return self._recorded(cls, "RequestHandlerClass", getattr(cls, "__name__", type(cls).__name__))
        members = self._member(cls, "__init__", "RequestHandlerClass")
        for name in HANDLER_HOOKS:
            members |= self._member(cls, name, name)
        return _subclass(cls, members)

    def _member(self, cls: type, name: str, shown: str) -> dict[str, Any]:
        owner = owner_of(cls, name)
        if owner is None or not inspect.isroutine(vars(owner)[name]) or isinstance(vars(owner)[name], staticmethod):
            return {}
        return {name: self._recorded(getattr(cls, name), shown, author_of(owner, name))}

    def _recorded(self, function: Callable[..., Any], name: str, owner: str) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **keywords: Any) -> Any:
                with self.call(name, owner):
                    return await function(*args, **keywords)

            return awaited

        def called(*args: Any, **keywords: Any) -> Any:
            with self.call(name, owner):
                return function(*args, **keywords)

        return functools.update_wrapper(called, function) if hasattr(function, "__name__") else called

    def _watch_socket(self, cls: type) -> Callable[[Any, str, Any], None]:
        """The constructor opens the socket by no hook, so its assignment is what can be seen."""
        seen: list[bool] = []
        maker = socket_maker(cls)

        assign: Any = cls.__setattr__

        def set_attribute(this: Any, name: str, value: Any) -> None:
            assign(this, name, value)
            if name == "socket" and not seen and hasattr(value, "fileno"):
                seen.append(True)
                with self.call("socket", maker.__name__ if maker else cls.__name__):
                    pass

        return set_attribute

    @contextmanager
    def call(self, name: str, owner: str) -> Iterator[None]:
        """Report that a hook is called, and when it returns or raises."""
        number = next(self._numbers)
        if number > MAX_CALLS:
            yield
            return
        key = f"{os.getpid()}.{number}"
        parent = self._current.get() or (self._handed_over if name in _RUNNERS_OWN else "")
        if name == "process_request":
            self._handed_over = key
        self.report("start", key, parent, name, owner, _where(), time.monotonic())
        self._note(name, +1)
        token = self._current.set(key)
        error = ""
        try:
            yield
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"[:ERROR_CHARACTERS]
            raise
        finally:
            self._current.reset(token)
            self.report("end", key, time.monotonic(), error)
            self._note(name, -1)

    def _note(self, name: str, change: int) -> None:
        """Keep count of what runs. Not in a forked child, where the lock may be held by a thread that is not there."""
        if name in _LASTING or os.getpid() != self._process:
            return
        with self.changed:
            self.running += change
            self.taken += name == "get_request" and change < 0
            self.closed += name == "close_request" and change < 0
            self.moves += 1
            self.changed.notify_all()


def _subclass(cls: type, members: dict[str, Any]) -> type:
    """Make a subclass that looks like the class itself in every message."""
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__} | members
    return types.new_class(cls.__name__, (cls,), {}, lambda namespace: namespace.update(members))


def _where() -> str:
    """Name the thread, child, green thread or task that runs this."""
    thread = threading.current_thread().name
    greenlet = sys.modules.get("greenlet")
    if greenlet is not None and greenlet.getcurrent().parent is not None:
        return f"green thread in {thread}"
    asyncio = sys.modules.get("asyncio")
    try:
        task = asyncio.current_task() if asyncio is not None else None
    except RuntimeError:  # no loop runs in this thread
        task = None
    return f"{task.get_name()} in {thread}" if task is not None else thread
