"""The hub by itself."""

from __future__ import annotations

from harken._hub.hosts import Stage

__all__ = ["Host"]


class _Move(BaseException):
    """Leaves ``Hub.run``, as what a callback raises beyond Exception does; what is due stays due."""


class Host:
    """Nobody's guest. It costs nothing: not even a look at each turn whether somebody wants to move."""

    loop = None

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._left = False

    def run(self) -> str | None:
        """Let the hub run until it is over, or a green thread needs an event loop."""
        stage = self.stage
        try:
            stage.hub.run(stage.until, stage.patience, stage.tick)
        except _Move:
            self._left = True
            return "asyncio"
        return None

    def move(self) -> bool:
        """Leave for asyncio at the next turn."""
        self.stage.hub.call_soon(self._leave)
        return True

    def _leave(self) -> None:
        if not self._left:  # several may have asked
            raise _Move
