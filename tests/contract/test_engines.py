"""Every engine of the room keeps the contract, on every transport."""

from __future__ import annotations

import pytest

from harken import plugins
from harken.engines import Engine
from harken.testing import ENGINE_CHECKS, EngineCheck

CASES = [
    pytest.param(engine, check, transport, id=f"{engine}-{check}-{transport}")
    for engine in plugins.names("engines")
    for check in ENGINE_CHECKS
    for transport in check.transports
]


@pytest.mark.parametrize("engine, check, transport", CASES)
def test_engine_keeps_the_contract(engine: str, check: EngineCheck, transport: str) -> None:
    """The engine passes one check on one transport."""
    make: type[Engine] = plugins.find("engines", engine, "Engine")
    check(make, transport)
