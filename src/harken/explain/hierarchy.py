"""Describe a server class: its ancestors with their methods, its hooks, and what looks wrong."""

from __future__ import annotations

from harken.errors import ConfigError
from harken.explain import advice, hooks, lookup, pairing
from harken.explain.model import ClassBox, Explanation, Family

__all__ = ["describe", "family"]

_ORDER = {hook.name: place for place, hook in enumerate(hooks.HOOKS)}


def describe(cls: type, handler: type | None = None, engine: str | None = None) -> Explanation:
    """Explain a server class, or the server that would run a handler class.

    Nothing is started and no instance is made. Any thread may call it.

    Args:
        cls: a server class, or a handler class (then a server class is made for it).
        handler: the handler class that the server starts, if one is known.
        engine: the engine to put in front; None keeps the server's own, and gives a handler a thread per connection.

    Raises:
        ConfigError: ``cls`` is neither, or no engine has that name.
    """
    server, handler = pairing.pair(cls, handler, engine)
    running = lookup.engine_of(server)
    families = [family("server", server)]
    if handler is not None:
        families.append(family("handler", handler))
    assumed = handler or pairing.plain_handler(server)
    return Explanation(
        server=server.__name__,
        handler=assumed.__name__,
        engine=running,
        transport=lookup.transport_of(server),
        families=tuple(families),
        hooks=hooks.rows(server, assumed, running),
        warnings=tuple(advice.find(server, handler, running)),
    )


def family(title: str, cls: type) -> Family:
    """Return a class and its ancestors, without ``object``.

    Raises:
        ConfigError: it has no ancestors to show, being ``object`` itself.
    """
    order = [base for base in cls.__mro__ if base is not object and base.__name__ not in ("Generic", "Protocol")]
    if not order:
        raise ConfigError(f"{cls!r} has no classes to explain; give a server class or a handler class")
    keys = {base: _key(base, place) for place, base in enumerate(order)}
    return Family(title, tuple(_box(base, keys) for base in order))


def _key(cls: type, place: int) -> str:
    return f"{cls.__module__}.{cls.__qualname__}#{place}"


def _box(cls: type, keys: dict[type, str]) -> ClassBox:
    names = lookup.method_names(cls)
    names.sort(key=lambda name: _ORDER.get(name, len(_ORDER)))
    return ClassBox(
        key=keys[cls],
        name=cls.__name__,
        place=lookup.place_of_class(cls),
        bases=tuple(keys[base] for base in cls.__bases__ if base in keys),
        methods=tuple(names),
        yours=not lookup.is_library(cls),
    )
