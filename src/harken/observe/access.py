"""The access log: one line for each connection, when it has ended.

It is a log of its own, beside the one for operators: a program reads it, so that every line has the same fields.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from harken import events
from harken.observe.log import escape
from harken.observe.outlet import open_log, reopen
from harken.settings import Settings, setting, text

__all__ = ["STDOUT", "AccessLog", "attach_if_asked"]

STDOUT = "-"

ACCESS_LOG = setting(
    "access_log",
    text(optional=True),
    None,
    meaning="the file that gets a line for each connection at its end, in `log_format`: its id, peer, listener, "
    "seconds, bytes in and out, reason and worker; `-` is stdout; none: no such log",
    origin="gunicorn's accesslog, off unless asked as well",
)


class AccessLog:
    """Writes a line for each ``closed`` event. Without the setting it subscribes to nothing and costs nothing."""

    def __init__(self, settings: Settings) -> None:
        """Open the file.

        Args:
            settings: ``access_log`` and ``log_format`` are read.

        Raises:
            ConfigError: the file cannot be opened.
        """
        path = settings["access_log"]
        self._handler: logging.Handler | None = None
        if path is not None:
            self._handler = open_log(None if path == STDOUT else path, sys.stdout)
            self._handler.setFormatter(logging.Formatter("%(message)s"))
        self._settings = settings
        self._unsubscribe: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Begin to write, in place of what was attached for a program that may have had no service."""
        while _asked:
            _asked.pop().detach()
        if self._handler is not None:
            self._unsubscribe.append(events.subscribe(self.write, "closed"))
            self._unsubscribe.append(events.subscribe(self._follow, "configured"))

    def detach(self) -> None:
        """Stop writing and close the file."""
        while self._unsubscribe:
            self._unsubscribe.pop()()
        if self._handler is not None:
            self._handler.close()

    def reopen(self) -> None:
        """Open the file anew, after somebody moved it away. Any thread."""
        if self._handler is not None:
            reopen(self._handler)

    def _follow(self, event: events.Event) -> None:
        if "log_format" in event.changes:
            self._settings.configure({"log_format": event.changes["log_format"]})

    def write(self, event: events.Event) -> None:
        """Write one connection's line."""
        assert self._handler is not None
        line = (_as_json if self._settings["log_format"] == "json" else _as_text)(event)
        self._handler.handle(logging.LogRecord("harken.access", logging.INFO, "", 0, line, None, None))


_asked: list[AccessLog] = []


def attach_if_asked() -> None:
    """Begin to write if a flag, the environment or the configuration file says where, until a service does."""
    log = AccessLog(Settings(None))
    log.attach()
    _asked.append(log)


def _fields(event: events.Event) -> dict[str, Any]:
    serving = getattr(event.server, "_harken", None)
    return {
        "connection": event.connection,
        "peer": None if event.peer is None else escape(event.peer),
        "listener": None if serving is None else escape(serving.address()),
        "seconds": round(event.seconds or 0.0, 6),
        "bytes_in": event.bytes_in,
        "bytes_out": event.bytes_out,
        "reason": event.reason,
        "detail": None if event.detail is None else escape(event.detail),
        "worker": os.getpid(),
    }


def _as_json(event: events.Event) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(event.time)) + f".{int(event.time % 1 * 1000):03}Z"
    return json.dumps({"time": stamp, **_fields(event)})


def _as_text(event: events.Event) -> str:
    """The fields in their order, as ``name=value``; ``-`` is what nobody knows, as in every web server's log."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    return stamp + "".join(f" {name}={_word(value)}" for name, value in _fields(event).items())


def _word(value: Any) -> str:
    if value is None:
        return "-"
    word = f"{value:.3f}" if isinstance(value, float) else str(value)
    return json.dumps(word, ensure_ascii=False) if " " in word or '"' in word or not word else word
