"""The file that tells other programs the server's pid."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from harken.errors import ConfigError
from harken.settings import setting, text

__all__ = ["PidFile"]

PIDFILE = setting(
    "pidfile",
    text(optional=True),
    None,
    meaning="the file that the server's pid is written to; an upgrade's new process takes it over",
    origin="service managers that know no better ask for one",
)


class PidFile:
    """One pid file; with no path it is none, and every verb does nothing."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path).absolute() if path else None  # `chdir` comes later

    def write(self, *, over: int | None = None) -> None:
        """Write this process's pid, by rename(2): nobody reads half a number.

        Args:
            over: the pid of a process whose file may be replaced though it lives.

        Raises:
            ConfigError: a living process holds the file, or it cannot be written.
        """
        if self._path is None:
            return
        holder = self._holder()
        if holder not in (None, over, os.getpid()):
            raise ConfigError(f"pidfile = {str(self._path)!r}: process {holder} holds it and runs; stop that one first")
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            beside.write_text(f"{os.getpid()}\n")
            beside.rename(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise ConfigError(f"pidfile = {str(self._path)!r}: {error.strerror}") from None

    def remove(self) -> None:
        """Remove the file if it still names this process."""
        if self._path is not None and self._read() == os.getpid():
            self._path.unlink(missing_ok=True)

    def give_to(self, uid: int, gid: int) -> None:
        """Let the user that the server becomes remove the file later, as far as its directory allows."""
        if self._path is not None:
            os.chown(self._path, uid, gid)

    def _read(self) -> int | None:
        assert self._path is not None
        try:
            return int(self._path.read_text())
        except (OSError, ValueError):
            return None

    def _holder(self) -> int | None:
        """Return the pid in the file if that process lives."""
        pid = self._read()
        if pid is None or pid <= 0:
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return pid
        return pid
