"""The contract of an engine, as checks that anybody can run on an engine of theirs."""

from __future__ import annotations

from harken.testing import _datagrams, _stops, _streams
from harken.testing._check import EngineCheck, Make

__all__ = ["ENGINE_CHECKS", "check_engine"]

ENGINE_CHECKS: tuple[EngineCheck, ...] = (*_streams.CHECKS, *_stops.CHECKS, *_datagrams.CHECKS)
"""Every check, by name, for ``pytest.mark.parametrize("check", ENGINE_CHECKS, ids=str)``."""


def check_engine(make: Make) -> None:
    """Hold an engine to its contract: run every check on every transport. Takes some thirty seconds.

    Each check opens servers of its own on loopback addresses and leaves nothing behind. Call it in the main thread:
    one check sends this process SIGUSR1.

    Args:
        make: takes options and returns an engine: an engine's class, mostly.

    Raises:
        AssertionError: the engine breaks a clause; the message names it.
    """
    for check in ENGINE_CHECKS:
        for transport in (*check.transports, *check.behind):
            try:
                check(make, transport)
            except (AssertionError, OSError) as error:
                raise AssertionError(f"{check.name} on {transport}: {error} ({check.meaning})") from error
