"""Long runs, and the short form of each that CI makes: ``make soak`` sets HARKEN_SOAK=full."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harken import _hub, plugins

PATIENCE = 30.0  # seconds that an answer may take
FULL = os.environ.get("HARKEN_SOAK") == "full"
SERVER = Path(__file__).with_name("server.py")
# Every engine, and those that run on a hub once more on each kind of hub.
HOSTS = [
    pytest.param(engine, hub, id=f"{engine}-{hub}" if hub else engine)
    for engine in plugins.names("engines")
    for hub in (sorted(_hub.kinds()) if engine == "green" else [None])
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give long runs the time they need."""
    for item in items:
        if FULL and SERVER.parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True)
def _no_stacks_of_long_runs() -> None:
    """A long run is no hang; and showing the stacks of what runs on meanwhile has ended the interpreter."""
    if FULL:
        faulthandler.cancel_dump_traceback_later()


class Served:
    """A server in a process of its own."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.address = ("127.0.0.1", int(self.read()))

    def read(self) -> str:
        """Return its next line, which must come in time."""
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        line = self._process.stdout.readline() if ready else ""
        assert line, f"it said nothing; status {self._process.poll()}, {self.complaints()}"
        return line.strip()

    def complaints(self) -> str:
        """Return what it wrote to stderr, if it has ended."""
        return self._process.stderr.read() if self._process.poll() is not None else ""

    def ask(self, word: str) -> Any:
        """Say a word and return the answer."""
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return json.loads(self.read())

    @staticmethod
    def wait_until(condition: Callable[[], object]) -> None:
        """Wait for what it does not announce; it must come in time."""
        deadline, pause = time.monotonic() + PATIENCE, threading.Event()
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            pause.wait(0.01)

    def signal(self) -> int:
        """Send it SIGUSR1 and return how many it has had by its own count."""
        self._process.send_signal(signal.SIGUSR1)
        return int(self.read())

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        """Return a client, from an address of its own if one is given."""
        return socket.create_connection(self.address, PATIENCE, source_address=(source, 0))


Serve = Callable[..., Served]


@pytest.fixture
def serve(run_program: Any) -> Serve:
    """Return a function that starts server.py: ``serve(engine, hub, work, **settings)``."""

    def start(engine: str, hub: str | None, work: str, **settings: Any) -> Served:
        env = {"HARKEN_HUB": hub} if hub else {}
        return Served(run_program(SERVER, engine, work, json.dumps(settings), env=env, stdin=-1, bufsize=1))

    return start
