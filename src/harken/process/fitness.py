"""Whether a handler class can serve at all: what is wrong with it is told at the start, and not to the first client."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from harken.errors import ConfigError
from harken.handlers import BaseRequestHandler

__all__ = ["faults", "fit_handler"]

_HOOKS = {"setup": (), "handle": (), "finish": (), "on_drain": (), "on_timeout": ("which",)}
_YIELDS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def fit_handler(handler: object) -> None:
    """Check that ``handler`` can serve.

    Raises:
        ConfigError: it is no class with a ``handle()`` of its own, or its hooks cannot be called, or not to any effect.
    """
    if not callable(handler):
        raise ConfigError(f"{handler!r} is not a handler class; derive one from harken.BaseRequestHandler")
    if not isinstance(handler, type):
        return  # a function or a partial that makes handlers, as socketserver allows
    handle = getattr(handler, "handle", None)
    if handle is None:
        raise ConfigError(
            f"{handler.__qualname__} is not a handler class: it has no handle(); derive from harken.BaseRequestHandler"
        )
    if any(handle is caller.handle for caller in _callers(handler)):
        raise ConfigError(f"{handler.__qualname__} does not override handle(), so it would serve nobody")
    for fault in faults(handler):
        raise ConfigError(fault)


def faults(handler: type) -> Iterator[str]:
    """Say, one line each, which hooks of a handler class cannot be called, or do nothing when they are."""
    if not any(handler.__init__ is caller.__init__ for caller in _callers(handler)):  # type: ignore[misc]
        return
    awaits = getattr(handler, "is_async", False)
    for name, words in _HOOKS.items():
        hook = inspect.getattr_static(handler, name, None)
        if not isinstance(hook, FunctionType):
            continue
        written = f"{handler.__qualname__}.{name}"
        if not _takes(hook, words):
            yield f"{written}{inspect.signature(hook)} cannot be called as self.{name}({', '.join(words)})"
        elif hook.__code__.co_flags & _YIELDS:
            yield f"{written} has a yield in it, so that calling it runs nothing; take it out"
        elif inspect.iscoroutinefunction(hook) and name != "handle" and not awaits:
            yield f"{written} is async, and nobody awaits it: derive from AsyncRequestHandler, or write a plain def"


def _callers(handler: type) -> tuple[Any, ...]:
    """Whose constructors call the hooks as they are declared here; one of the user's own may call them as it likes."""
    if not getattr(handler, "is_async", False):
        stdlib = getattr(sys.modules.get("socketserver"), "BaseRequestHandler", BaseRequestHandler)  # loads nothing
        return BaseRequestHandler, stdlib
    from harken.async_handlers import AsyncRequestHandler  # loads asyncio

    return (AsyncRequestHandler,)


def _takes(hook: FunctionType, words: tuple[str, ...]) -> bool:
    """Whether a hook can be called with itself and so many arguments; what a decorator hides does not count."""
    try:
        inspect.signature(hook, follow_wrapped=False).bind("self", *words)
    except TypeError:
        return False
    return True
