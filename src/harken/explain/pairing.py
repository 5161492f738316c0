"""Find the other half: the server class for a handler class, the plain handler for a server class."""

from __future__ import annotations

import importlib
import socketserver

from harken.errors import ConfigError, nearest
from harken.explain.lookup import engine_of, is_async, is_handler, is_server

__all__ = ["ENGINES", "pair", "plain_handler"]

# The mix-in that names each engine; ``inline`` is a server class without one.
ENGINES = {
    "inline": "",
    "thread": "Threading",
    "pool": "Pool",
    "fork": "Forking",
    "green": "Green",
    "asyncio": "Async",
}


def pair(cls: type, handler: type | None, engine: str | None) -> tuple[type, type | None]:
    """Return the server class to explain and its handler class, if one is known.

    Args:
        cls: a server class or a handler class.
        handler: the handler class that goes with a server class.
        engine: a name of :data:`ENGINES` whose mix-in is put in front, or None.

    Raises:
        ConfigError: the classes are of the wrong kind or the engine has no mix-in.
    """
    if engine is not None and engine not in ENGINES:
        raise ConfigError(f"no engine is called {engine!r}; take one of {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    if handler is not None and not is_handler(handler):
        raise ConfigError(f"{handler!r} is not a handler class; derive it from harken.BaseRequestHandler")
    if is_server(cls):
        return (_in_front(engine, cls) if engine else cls), handler
    if is_handler(cls):
        return _server_for(cls, engine), cls
    raise ConfigError(
        f"{getattr(cls, '__name__', cls)!r} is neither a server class nor a handler class; "
        "name a subclass of BaseServer or of BaseRequestHandler"
    )


def plain_handler(server: type) -> type:
    """Return the handler class that does nothing, of the library that the server class comes from."""
    if any(base.__module__.partition(".")[0] == "harken" for base in server.__mro__):
        found: type = _harken("BaseRequestHandler")
        return found
    return socketserver.BaseRequestHandler


def _server_for(handler: type, engine: str | None) -> type:
    fitting = "asyncio" if is_async(getattr(handler, "handle", None)) else "thread"
    datagrams = any(base.__name__ == "DatagramRequestHandler" for base in handler.__mro__)
    name = f"{ENGINES[engine or fitting]}{'UDP' if datagrams else 'TCP'}Server"
    try:
        return _harken(name)
    except ConfigError:
        return _in_front(engine or fitting, _harken("UDPServer" if datagrams else "TCPServer"))


def _in_front(engine: str, server: type) -> type:
    if engine == engine_of(server):
        return server
    if engine == "inline":
        raise ConfigError(
            f"{server.__name__} has an engine of its own, {engine_of(server)!r}; "
            "for 'inline' take the mix-in out of its bases"
        )
    return type(server.__name__, (_harken(f"{ENGINES[engine]}MixIn"), server), {"__module__": server.__module__})


def _harken(name: str) -> type:
    try:
        found = getattr(importlib.import_module("harken"), name)
    except AttributeError:
        raise ConfigError(f"this harken has no {name}; choose another engine") from None
    if not isinstance(found, type):
        raise ConfigError(f"harken.{name} is {found!r}, which is not a class")
    return found
