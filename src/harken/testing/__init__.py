"""What tests of handlers, servers and engines need: servers without fuss, faults on purpose, an engine's contract.

``serve`` gives a handler a free port, ``connect`` a client and no port at all, :class:`Faulty` a wire that misbehaves.
``check_engine`` holds an engine to its contract. The fixtures ``harken_server`` and ``harken_client`` come by
:mod:`harken.testing.plugin`.
"""

from __future__ import annotations

from harken.testing._check import EngineCheck
from harken.testing.engine import ENGINE_CHECKS, check_engine
from harken.testing.faulty import Faulty
from harken.testing.running import Client, Served, connect, serve

__all__ = ["ENGINE_CHECKS", "Client", "EngineCheck", "Faulty", "Served", "check_engine", "connect", "serve"]
