"""Questions about a class that are answered by looking at it, without making an instance."""

from __future__ import annotations

import functools
import inspect
import socket
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

from harken.explain.model import Place
from harken.settings import Settings

__all__ = [
    "author_of",
    "code_of",
    "defines",
    "engine_of",
    "is_async",
    "is_grafted",
    "is_handler",
    "is_harkens",
    "is_library",
    "is_server",
    "is_yours",
    "mentions",
    "method_names",
    "owner_of",
    "owner_of_next",
    "place_of",
    "place_of_class",
    "transport_of",
    "unfilled",
    "yields_to_next",
]

_STDLIB_ENGINES = {"ThreadingMixIn": "thread", "ForkingMixIn": "fork", "BaseServer": "inline"}


def unfilled(found: Any) -> Any:
    """Return the class of which ``functools.partial`` filled in some arguments; another thing as it is."""
    while isinstance(found, functools.partial):
        found = found.func
    return found


def is_library(cls: type) -> bool:
    """Tell whether a class comes with Python or with harken."""
    return _is_harkens(cls.__module__) or (cls.__module__ or "").partition(".")[0] in sys.stdlib_module_names


def _descends(cls: type, *names: str) -> bool:
    return any(is_library(base) and base.__name__ in names for base in cls.__mro__)


def is_server(thing: object) -> bool:
    """Tell whether it is a server class: a descendant of stdlib's or of harken's ``BaseServer``."""
    return isinstance(thing, type) and _descends(thing, "BaseServer")


def is_handler(thing: object) -> bool:
    """Tell whether it is a handler class: one with ``handle()`` that is no server class."""
    if not isinstance(thing, type) or is_server(thing):
        return False
    return callable(getattr(thing, "handle", None))


def defines(cls: type, name: str) -> bool:
    """Tell whether the class itself, not an ancestor, defines the name."""
    return name in vars(cls)


def owner_of(cls: type, name: str) -> type | None:
    """Return the class whose attribute ``cls().name`` finds, or None."""
    return next((base for base in cls.__mro__ if defines(base, name)), None)


def method_names(cls: type) -> list[str]:
    """Return the names of the methods that a class defines itself, in the order of their definition."""
    return [
        name
        for name, value in vars(cls).items()
        if (isinstance(value, classmethod) or inspect.isroutine(value)) and not is_grafted(cls, name)
    ]


def is_grafted(cls: type, name: str) -> bool:
    """Tell whether harken put this method into somebody else's class, as its mix-ins do before stdlib's servers."""
    return _is_harkens(getattr(_function(cls, name), "__module__", "")) and not _is_harkens(cls.__module__)


def is_yours(cls: type, name: str) -> bool:
    """Tell whether the method ``name`` that ``cls`` itself defines is the user's own."""
    return not is_library(cls) and not is_grafted(cls, name)


def author_of(cls: type, name: str) -> str:
    """Return the name of the class that the method was written in: ``cls``, unless it is grafted."""
    qualified = str(getattr(_function(cls, name), "__qualname__", ""))
    return qualified.rpartition(".")[0] if is_grafted(cls, name) and "." in qualified else cls.__name__


def mentions(cls: type, name: str) -> bool:
    """Tell whether any method of the user's, in a class or its ancestors, uses an attribute of this name."""
    codes = (code_of(base, method) for base in cls.__mro__ if not is_library(base) for method in method_names(base))
    return any(code is not None and name in code.co_names for code in codes)


def is_harkens(cls: type) -> bool:
    """Tell whether a class comes with harken."""
    return _is_harkens(cls.__module__)


def _is_harkens(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "harken"


def _function(cls: type, name: str) -> Any:
    value = vars(cls).get(name)
    value = getattr(value, "__func__", value)
    return inspect.unwrap(value) if callable(value) else value


def code_of(cls: type, name: str) -> CodeType | None:
    """Return the code of the method that ``cls`` itself defines, or None for compiled ones."""
    return getattr(_function(cls, name), "__code__", None)


def place_of(cls: type | None, name: str) -> Place:
    """Return where the method ``name`` that ``cls`` itself defines stands."""
    code = code_of(cls, name) if cls else None
    return Place(code.co_filename, code.co_firstlineno) if code else Place()


def place_of_class(cls: type) -> Place:
    """Return where a class statement stands; the file alone when its line cannot be found."""
    try:
        file = inspect.getsourcefile(cls) or ""
        return Place(file, inspect.findsource(cls)[1] + 1)
    except (OSError, TypeError):
        return Place(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")


def yields_to_next(cls: type, name: str, following: type | None = None) -> bool:
    """Tell whether a method calls the one that it overrides, by ``super()`` or by naming the class.

    Read off the names that its code uses: right for every method written in the usual ways.
    """
    code = code_of(cls, name)
    if code is None:
        return False
    used = set(code.co_names) | set(code.co_freevars)
    by_class = following is not None and following.__name__ in used
    return name in used and ("super" in used or "__class__" in used or by_class)


def engine_of(server: type) -> str:
    """Return the engine that runs the handlers of a server class.

    ``own`` means that a ``process_request`` of the user's hides the one that would have asked an engine.

    Raises:
        ConfigError: the setting ``engine`` of a harken class has a value that is not allowed.
    """
    for cls in server.__mro__:
        if not defines(cls, "process_request"):
            continue
        if is_library(cls):
            return _STDLIB_ENGINES.get(cls.__name__, "inline") if cls.__module__ == "socketserver" else _setting(server)
        if not yields_to_next(cls, "process_request", owner_of_next(server, cls, "process_request")):
            return "own"
    return "inline"


def _setting(server: type) -> str:
    """Ask as a running server would; reading settings needs an instance, but not an initialised one."""
    movable = getattr(server, "_engine_from_environment", False)
    return str(Settings(object.__new__(server)).find("engine", environment=movable).value or "inline")


def owner_of_next(server: type, cls: type, name: str) -> type | None:
    """Return the class that ``super().name`` finds from ``cls`` within the order of ``server``."""
    order = server.__mro__
    return next((base for base in order[order.index(cls) + 1 :] if defines(base, name)), None)


def transport_of(server: type) -> str:
    """Return the kind of socket that a server class opens: ``tcp``, ``udp``, ``unix`` or ``unixgram``."""
    datagram = getattr(server, "socket_type", None) == socket.SOCK_DGRAM
    if getattr(server, "address_family", None) == getattr(socket, "AF_UNIX", object()):
        return "unixgram" if datagram else "unix"
    return "udp" if datagram else "tcp"


def is_async(function: Callable[..., object] | None) -> bool:
    """Tell whether a method is a coroutine function."""
    return function is not None and inspect.iscoroutinefunction(inspect.unwrap(function))
