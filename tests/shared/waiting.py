"""Waiting, within bounds, for what no event announces: imported by tests of every folder (``pythonpath`` of pytest)."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 20.0  # seconds: a busy machine may take some; who waits so long fails


def wait_until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait until ``condition()`` is true, asking every few milliseconds.

    Raises:
        AssertionError: it did not come true in ``patience`` seconds.
    """
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"it did not come true in {patience:g} s"
        time.sleep(0.003)
