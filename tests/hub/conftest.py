"""The hub's tests run over every kind that is there: compiled and fallback."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from harken import _hub

PATIENCE = 5.0  # seconds that anything may take


@pytest.fixture(params=[*_hub.kinds(), "selectors"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that keeps the hub's contract; ``selectors`` is the fallback on a system without epoll."""
    if request.param != "selectors":
        return _hub.kinds()[request.param]
    from harken._hub import fallback, pollers

    monkeypatch.setattr(fallback, "poller", pollers.LevelPoller)
    return fallback


class Stage:
    """A hub, and how a test runs green threads on it."""

    def __init__(self, kind: ModuleType) -> None:
        self.kind = kind
        self.hub: Any = kind.Hub()
        self._sockets: list[Any] = []

    def run(self, *functions: Callable[[], object], patience: float = PATIENCE) -> list[Any]:
        """Run each function in a green thread until all have ended; return what they returned, or raised."""
        outcomes: list[Any] = [None] * len(functions)

        def act(number: int, function: Callable[[], object]) -> None:
            try:
                outcomes[number] = function()
            except BaseException as error:  # the test looks at it
                outcomes[number] = error

        greens = [self.hub.spawn(act, number, function) for number, function in enumerate(functions)]
        deadline = time.monotonic() + patience
        self.hub.run(
            lambda: all(green.dead for green in greens) or time.monotonic() > deadline, lambda: 0.05, lambda: None
        )
        assert all(green.dead for green in greens), "a green thread did not end in time"
        return outcomes

    def pair(self, family: int = socket.AF_INET, lent: bool = False) -> tuple[Any, socket.socket]:
        """Return a Connection, whose descriptor somebody has asked for if ``lent``, and the plain socket at its end."""
        if family == socket.AF_UNIX:
            near, far = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                far = socket.create_connection(listener.getsockname())
                near = listener.accept()[0]
        far.settimeout(PATIENCE)
        connection = self.hub.adopt(near)
        if lent:
            connection.fileno()
        self._sockets += [connection, far]
        return connection, far

    def close(self) -> None:
        """Let go of everything."""
        self.hub.close()
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def stage(kind: ModuleType) -> Iterator[Stage]:
    """A stage."""
    made = Stage(kind)
    yield made
    made.close()
