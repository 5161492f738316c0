"""Every engine keeps the contract behind preambles too: TLS, a PROXY header, and both."""

from __future__ import annotations

import pytest

from harken import plugins
from harken.engines import Engine
from harken.testing import ENGINE_CHECKS, EngineCheck

CASES = [
    pytest.param(engine, check, transport, id=f"{engine}-{check}-{transport}")
    for engine in plugins.names("engines")
    for check in ENGINE_CHECKS
    for transport in check.behind
]


@pytest.mark.parametrize("engine, check, transport", CASES)
def test_engine_keeps_the_contract_behind_preambles(engine: str, check: EngineCheck, transport: str) -> None:
    """The engine passes one check on one transport, with preambles before the handler."""
    make: type[Engine] = plugins.find("engines", engine, "Engine")
    check(make, transport)
