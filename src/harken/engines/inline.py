"""One handler at a time, in the thread of the loop: what a plain ``TCPServer`` has always done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harken.engines._selector import SelectorEngine

__all__ = ["Engine"]


class Engine(SelectorEngine):
    """Runs a handler to its end before the next connection is accepted."""

    in_loop = True

    def spawn(self, function: Callable[..., object], *args: Any, done: Callable[[int], None] | None = None) -> int:
        """Run ``function`` here and now; what it raises leaves the loop, as stdlib has it."""
        function(*args)
        return 0

    def join(self, deadline: float | None) -> int:
        """Nothing runs beside the loop: return 0."""
        return 0
