"""The log: events as lines of text or JSON, on stderr or in a file.

Of warnings and errors that repeat the first few are written and the rest counted: see ``repeats.py``.

What comes from peers and from exceptions is escaped, so that no client can write a line of its own into the log or a
control sequence onto the operator's terminal.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from harken import events
from harken.observe.outlet import open_log, reopen
from harken.observe.repeats import WINDOW_SECONDS, Repeats
from harken.settings import Settings, choice, operator, setting, text

__all__ = ["LogObserver", "attach_if_asked", "escape"]

LOG_LEVEL = setting(
    "log_level",
    choice("debug", "info", "warning", "error"),
    "warning",
    serve="info",
    live=True,
    meaning="the least severe line that is logged; connections are `debug`",
    origin="gunicorn logs at info",
)
LOG_FORMAT = setting(
    "log_format",
    choice("text", "json"),
    "text",
    live=True,
    meaning="`text` for people or `json` for machines: one object a line with `time`, `level`, `event`, `connection`, "
    "`peer`, `message`",
    origin="text is read first",
)
LOG_FILE = setting(
    "log_file",
    text(optional=True),
    None,
    meaning="the file that the log is appended to; none: stderr",
    origin="service managers collect stderr",
)

_LEVELS = dict.fromkeys(("handler_failed", "reload_failed", "upgrade_failed", "worker_failed"), logging.ERROR)
_LEVELS |= dict.fromkeys(
    ("listening", "page_opened", "draining", "drained", "reloaded", "worker_started", "worker_exited", "resumed"),
    logging.INFO,
)
_LEVELS |= dict.fromkeys(("paused", "stalled", "truncated", "alarm", "timed_out", "rejected"), logging.WARNING)
_LEVELS["control_failed"] = logging.WARNING
_LEVELS |= {"memory_exceeded": logging.WARNING, "memory_recovered": logging.INFO, "preamble_failed": logging.INFO}
_LEVELS |= dict.fromkeys(("accepted", "opened", "closed", "configured"), logging.DEBUG)

# The settings that a running log follows.
_FOLLOWED = ("log_level", "log_format")

# C0, DEL and C1 control characters move cursors and begin lines; some readers break lines at the two separators.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {0x2028: "\\u2028", 0x2029: "\\u2029"}


def escape(value: object) -> str:
    """Return ``value`` as one line of harmless text."""
    return str(value).translate(_CONTROL).encode("utf-8", "backslashreplace").decode()


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        where = "".join(f" {name}={escape(value)}" for name, value in _where(record) if value)
        line = f"{stamp} {record.levelname.lower():7} {escape(record.getMessage())}{where}"
        error = _error(record)
        return line if error is None else line + "\n" + _indented(error)


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "log"),
            **dict(_where(record)),
            "message": escape(record.getMessage()),
            **getattr(record, "fields", {}),
        }
        error = _error(record)
        if error is not None:
            entry["traceback"] = "".join(traceback.format_exception(error))
        return json.dumps(entry, default=str)


def _where(record: logging.LogRecord) -> list[tuple[str, str | None]]:
    connection, peer = getattr(record, "connection", None), getattr(record, "peer", None)
    return [("connection", connection), ("peer", None if peer is None else escape(peer))]


def _error(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


def _indented(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
    return "\n".join("    " + escape(line) for line in lines)


_asked: list[LogObserver] = []


def attach_if_asked() -> None:
    """Begin to log if a flag, the environment or the configuration file speaks of it.

    Until a service of the program's own begins to, which knows more about its log.
    """
    if any(operator.find(declared) for declared in (LOG_LEVEL, LOG_FORMAT, LOG_FILE)):
        observer = LogObserver(Settings(None))
        observer.attach()
        _asked.append(observer)


def _formatter(settings: Settings) -> logging.Formatter:
    return _JSONFormatter() if settings["log_format"] == "json" else _TextFormatter()


class LogObserver:
    """Writes events to the logger ``harken``, with a handler of its own. Follows ``log_level`` and ``log_format``."""

    def __init__(self, settings: Settings) -> None:
        """Open the log.

        Args:
            settings: ``log_level``, ``log_format`` and ``log_file`` are read.

        Raises:
            ConfigError: the file cannot be opened.
        """
        self.handler = open_log(settings["log_file"], sys.stderr)
        self.handler.setFormatter(_formatter(settings))
        self.logger = logging.getLogger("harken")
        self._settings = settings
        self._level = logging.INFO
        self._unsubscribe: list[Callable[[], None]] = []
        self._repeats = Repeats(self._tell_left_out)

    def attach(self) -> None:
        """Begin to write, in place of what was attached for a program that may have had no service."""
        while _asked:
            _asked.pop().detach()
        self.logger.addHandler(self.handler)
        self.logger.propagate = False
        self._obey()
        events.logged = True

    def detach(self) -> None:
        """Stop writing and close the file."""
        self._leave()
        self._repeats.close()
        self.logger.removeHandler(self.handler)
        self.logger.propagate = True
        self.logger.setLevel(logging.NOTSET)
        self.handler.close()
        events.logged = False

    def reopen(self) -> None:
        """Open the file anew, after somebody moved it away. Any thread."""
        reopen(self.handler)

    def _obey(self) -> None:
        """Do as the settings say now."""
        self._level = getattr(logging, self._settings["log_level"].upper())
        self.logger.setLevel(self._level)
        self.handler.setFormatter(_formatter(self._settings))
        names = [name for name in events.NAMES if _LEVELS[name] >= self._level]
        self._leave()
        self._unsubscribe.append(events.subscribe(self._follow, "configured"))
        if names:
            self._unsubscribe.append(events.subscribe(self.write, *names))

    def _leave(self) -> None:
        while self._unsubscribe:
            self._unsubscribe.pop()()

    def reread(self) -> None:
        """Do as the settings say now that they were read anew."""
        if self._unsubscribe:
            self._obey()

    def _follow(self, event: events.Event) -> None:
        changes: Mapping[str, Any] = event.changes
        own = {name: value for name, value in changes.items() if name in _FOLLOWED}
        if own:
            self._settings.configure(own)
            self._obey()

    def write(self, event: events.Event) -> None:
        """Log one event, or count it among those that repeat."""
        level = _LEVELS[event.name]
        if (level >= logging.WARNING or event.name == "preamble_failed") and not self._repeats.admit(_kind(event)):
            return
        fields = {name: _plain(value) for name, value in event.fields.items() if name not in _OWN}
        self.logger.log(
            level,
            "%s",
            _sentence(event.name, fields),
            exc_info=event.error,
            extra={"event": event.name, "connection": event.connection, "peer": event.peer, "fields": fields},
        )

    def _tell_left_out(self, kind: tuple[str, ...], count: int) -> None:
        name = kind[0]
        what = " ".join(kind).replace("_", " ")
        self.logger.log(
            _LEVELS.get(name, logging.WARNING),  # two processes that noted a new kind at once may have mixed it up
            "%s",
            f"{what}: … {count:,} more like this in {WINDOW_SECONDS:g} s",
            extra={"event": name, "fields": {"left_out": count}},
        )


def _kind(event: events.Event) -> tuple[str, ...]:
    """What makes two events alike: the name, and what it says of the cause, but not of whom it befell."""
    told = [event.fields.get(name) for name in ("reason", "which", "place", "what")]
    error = event.error
    if error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        told += [type(error).__name__, f"at line {trace.tb_lineno}" if trace is not None else None]
    return (event.name, *(escape(word) for word in told if word))


_OWN = {"server", "connection", "peer", "error"}


def _plain(value: Any) -> Any:
    if isinstance(value, str) and "\n" in value:  # a stack: for machines, a line at a time
        return [escape(line) for line in value.splitlines()]
    return value if isinstance(value, (int, float, bool, type(None))) else escape(value)


def _sentence(name: str, fields: dict[str, Any]) -> str:
    if name == "stalled":
        still = "keeps" if fields.get("ongoing") else "kept"
        where = " in ".join(filter(None, (str(fields.get("place")), fields.get("function"))))
        return f"stalled: {where} {still} other connections waiting for {fields.get('seconds', 0.0):.2f} s"
    words = name.replace("_", " ")
    told = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in fields.items()
    )
    return f"{words}: {told}" if told else words
