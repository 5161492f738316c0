"""Who watches the live view: one look a second for all of them, and none while nobody watches."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from harken.errors import HarkenError

__all__ = ["MAX_VIEWERS", "Viewers"]

# People who watch at once: each holds a thread, and is sent some hundred kilobytes a second at most.
MAX_VIEWERS = 16
LOOK_SECONDS = 1.0
NO_NEWS = {"error": "the server does not answer"}

Look = Callable[[], dict[str, Any]]


class Viewers:
    """Looks while somebody watches, and shares what it sees."""

    def __init__(self, look: Look) -> None:
        """Watch nothing yet.

        Args:
            look: returns what is to be shown, in what JSON can say. An OSError or HarkenError
                means that there is no news, and viewers are told so.
        """
        self._look = look
        self._news = threading.Condition()
        self._count = 0
        self._number = 0
        self._seen = b""
        self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self) -> Iterator[Iterator[bytes] | None]:
        """Watch while the block runs.

        Yields:
            What there is to see, again and again until it is over; None when too many watch already.
        """
        with self._news:
            welcome = self._count < MAX_VIEWERS and not self._closed
            self._count += welcome
            if welcome and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="harken-view", daemon=True)
                self._thread.start()
        if not welcome:
            yield None
            return
        try:
            yield self._follow()
        finally:
            with self._news:
                self._count -= 1

    def _follow(self) -> Iterator[bytes]:
        known = 0
        while True:
            with self._news:
                while self._number == known and not self._closed:
                    self._news.wait()
                if self._closed:
                    return
                known, seen = self._number, self._seen
            yield seen

    def _run(self) -> None:
        while True:
            begun = time.monotonic()
            try:
                look = self._look()
            except (OSError, HarkenError):
                look = NO_NEWS
            seen = json.dumps(look).encode()
            with self._news:
                self._seen = seen
                self._number += 1
                self._news.notify_all()
                self._news.wait_for(lambda: self._closed, max(0.0, begun + LOOK_SECONDS - time.monotonic()))
                if self._closed or not self._count:
                    self._thread = None
                    return

    def close(self) -> None:
        """Let everybody go."""
        with self._news:
            self._closed = True
            self._news.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
