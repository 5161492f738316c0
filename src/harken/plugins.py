"""Finding a part by its name: a module of the room, a dotted path, or an entry point. Imported only when named."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from harken.errors import ConfigError, nearest

__all__ = ["find", "names"]


def names(room: str) -> tuple[str, ...]:
    """The parts that a room of harken has, by file name (``harken.engines`` has ``thread``, ``pool`` …)."""
    package = importlib.import_module(f"harken.{room}")
    return tuple(sorted(found.name for found in pkgutil.iter_modules(package.__path__) if found.name[0] != "_"))


def find(room: str, name: str, attribute: str) -> Any:
    """Return a part.

    Args:
        room: ``engines``, ``transports`` …; also the entry point group ``harken.<room>``.
        name: a module of the room, ``package.module:Name``, or an entry point's name.
        attribute: what a module of the room calls its part.

    Raises:
        ConfigError: nothing goes by that name.
    """
    if ":" in name:
        module, _, wanted = name.partition(":")
        try:
            return getattr(importlib.import_module(module), wanted)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"cannot load {name!r} for {room}: {error}") from None
        except Exception as error:
            raise ConfigError(f"cannot load {name!r} for {room}: {type(error).__name__}: {error}") from error
    if name in names(room):
        return getattr(importlib.import_module(f"harken.{room}.{name}"), attribute)
    from importlib.metadata import entry_points

    group = entry_points(group=f"harken.{room}")
    if name in group.names:
        return group[name].load()
    raise ConfigError(f"{room} has no {name!r}{nearest(name, [*names(room), *group.names])}")
