"""Where the lines of logs go: to a file, or to a stream that somebody reads, or should."""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import sys
import time
from contextlib import suppress
from typing import TextIO

from harken.errors import ConfigError
from harken.process.writable import check_file
from harken.unpatched import original

__all__ = ["check_log", "open_log", "reopen"]

# Seconds between two words about a log that cannot be written.
COMPLAINT_SECONDS = 60.0
# Seconds to wait for the reader of a pipe that is full, once until it has read: half of what is a stall by default.
PATIENCE_SECONDS = 0.05
# What the locale's encoding has no letter for, as on stderr.
_ERRORS = "backslashreplace"
# Letters written at once: at most PIPE_BUF bytes in UTF-8, for which a pipe that can be written has room (pipe(7)).
PIECE = 1024


def open_log(path: str | None, stream: TextIO) -> logging.Handler:
    """Return what writes lines to a file, or to ``stream`` without a path.

    Raises:
        ConfigError: the file cannot be opened, or is a named pipe that nobody reads.
    """
    try:
        if not path:
            return _Stream(stream)
        return _Pipe(path) if _is_special(path) else _File(path)
    except OSError as error:
        raise _refusal(path, error) from None


def check_log(path: str) -> None:
    """See that :func:`open_log` could open a file, without making it.

    Raises:
        ConfigError: it could not.
    """
    try:
        check_file(path)
    except OSError as error:
        raise _refusal(path, error) from None


def _refusal(path: str | None, error: OSError) -> ConfigError:
    reason = "nobody reads this pipe" if error.errno == errno.ENXIO else error.strerror
    return ConfigError(f"the log {path!r} cannot be opened: {reason}")


def _is_special(path: str) -> bool:
    """Whether there is something at the path, and no file: a named pipe, ``/dev/stdout``, a terminal."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _open_special(path: str) -> TextIO:
    """Open it, without waiting for somebody who reads."""

    def opener(path: str, _flags: int) -> int:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        os.set_blocking(fd, True)
        return fd

    return open(path, "w", errors=_ERRORS, opener=opener)


class _Losing(logging.Handler):
    """Serving is worth more than its log: what cannot be written is lost, and stderr says so now and then."""

    _complained = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # a file that was to be opened anew
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._complain(error)
        else:
            super().handleError(record)

    def _complain(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._complained < COMPLAINT_SECONDS:
            return
        self._complained = now
        name = getattr(self, "baseFilename", "a stream")
        with suppress(Exception):  # stderr may be what cannot be written to
            print(f"harken: cannot write the log to {name}: {error.strerror}; lines are lost", file=sys.stderr)

    def close(self) -> None:
        with suppress(OSError):  # what is still to be written
            super().close()


class _File(_Losing, logging.FileHandler):
    def __init__(self, path: str) -> None:
        super().__init__(path, errors=_ERRORS)

    def reopen(self) -> None:
        self.acquire()
        try:
            self.close()
            self.stream = self._open()
        except OSError as error:  # the next line tries again
            self._complain(error)
        finally:
            self.release()


class _Stream(_Losing, logging.StreamHandler[TextIO]):
    """Waits for whoever reads a pipe, but not for ever: a loop would serve nobody meanwhile. Counts what is lost."""

    _full = False
    _torn = False
    _lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._lost and self._has_room():
                lost, self._lost = self._lost, 0
                name = getattr(self.stream, "name", "a stream")
                logging.getLogger("harken").warning(
                    "%s", f"{lost:,} lines to {name} are lost: nobody read them in time"
                )
            text = self.terminator * self._torn + self.format(record) + self.terminator
            self._lost += not self._write(text)
        except Exception:  # noqa: BLE001 - as every handler of logging's
            self.handleError(record)

    def _write(self, text: str) -> bool:
        for at in range(0, len(text), PIECE):
            if not self._has_room():
                self._torn = at > 0
                return False
            self.stream.write(text[at : at + PIECE])
            self.flush()
        self._torn = False
        return True

    def _has_room(self) -> bool:
        """Whether a piece can be written without waiting."""
        try:
            poll = original("select", "poll")()
            poll.register(self.stream.fileno(), select.POLLOUT)
        except (AttributeError, OSError, ValueError):  # no file, or a closed one: writing tells
            return True
        self._full = not poll.poll(0 if self._full else PATIENCE_SECONDS * 1000)
        return not self._full


class _Pipe(_Stream):
    """What has a path and is no file; it is asked for room as any stream is."""

    def __init__(self, path: str) -> None:
        self.baseFilename = os.path.abspath(path)  # the working directory may change
        super().__init__(_open_special(path))

    def reopen(self) -> None:
        try:
            stream = _open_special(self.baseFilename)
        except OSError:  # whoever reads the old one still may, and if nobody does the next line tells
            return
        self.acquire()
        try:
            self._close_stream()
            self.stream = stream
        finally:
            self.release()

    def close(self) -> None:
        super().close()
        self._close_stream()

    def _close_stream(self) -> None:
        with suppress(OSError):  # what is still to be written
            self.stream.close()


def reopen(handler: logging.Handler) -> None:
    """Open a file anew, after somebody moved it away; a stream stays as it is. Any thread."""
    if isinstance(handler, (_File, _Pipe)):
        handler.reopen()
