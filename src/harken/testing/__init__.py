"""What tests of handlers, servers and engines need: servers without fuss, faults on purpose, an engine's contract.

``serve`` gives a handler a free port, ``connect`` a client and no port at all, :class:`Faulty` a wire that misbehaves.
``check_engine`` holds an engine to its contract. The fixtures ``harken_server`` and ``harken_client`` come by
:mod:`harken.testing.plugin`, which pytest loads wherever harken is installed: therefore names load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harken.testing._check import EngineCheck
    from harken.testing.engine import ENGINE_CHECKS, check_engine
    from harken.testing.faulty import Faulty
    from harken.testing.running import Client, Served, connect, serve

__all__ = ["ENGINE_CHECKS", "Client", "EngineCheck", "Faulty", "Served", "check_engine", "connect", "serve"]

_HOMES = {
    "EngineCheck": "_check",
    "Faulty": "faulty",
    **dict.fromkeys(("ENGINE_CHECKS", "check_engine"), "engine"),
    **dict.fromkeys(("Client", "Served", "connect", "serve"), "running"),
}


if not TYPE_CHECKING:  # or every misspelt name would be one

    def __getattr__(name: str) -> Any:
        """Load a public name when it is first used."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"harken.testing.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
