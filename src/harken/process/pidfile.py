"""The file that tells other programs the server's pid."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from harken.errors import ConfigError
from harken.process.writable import check_file, check_folder
from harken.settings import setting, text

__all__ = ["PidFile"]

PIDFILE = setting(
    "pidfile",
    text(optional=True),
    None,
    process=True,
    meaning="the file that the server's pid is written to; an upgrade's new process takes it over",
    origin="service managers that know no better ask for one",
)


class PidFile:
    """One pid file; with no path it is none, and every verb does nothing."""

    def __init__(self, path: str | None) -> None:
        """Note where it is."""
        self.path = Path(path).absolute() if path else None  # `chdir` comes later

    def write(self, *, over: int | None = None) -> None:
        """Write this process's pid, by rename(2): nobody reads half a number.

        Args:
            over: the pid of a process whose file may be replaced though it lives.

        Raises:
            ConfigError: a living process holds the file, or it cannot be written.
        """
        if self.path is None:
            return
        self._refuse_special()
        holder = self._holder()
        if holder == os.getpid():
            return  # as a program that a reload has put into the same process
        self._refuse_held(holder, over)
        try:
            self._replace(f"{os.getpid()}\n")
        except OSError as error:
            raise self._refusal(str(error.strerror)) from None

    def check(self) -> None:
        """See that :meth:`write` would succeed, without writing anything.

        Raises:
            ConfigError: as there.
        """
        if self.path is None:
            return
        self._refuse_special()
        self._refuse_held(self._holder(), None)
        try:
            if self.path.is_dir() or not self._is_in_our_folder():
                check_file(self.path)
        except OSError as error:
            raise self._refusal(str(error.strerror)) from None

    def _is_in_our_folder(self) -> bool:
        assert self.path is not None
        try:
            check_folder(self.path.parent)
        except PermissionError:
            return False
        return True

    def _refuse_special(self) -> None:
        """Refuse a device, which would be replaced by a file, and a named pipe, which nobody may write to."""
        assert self.path is not None
        with contextlib.suppress(OSError):  # nothing is there, or write() will say what is wrong
            mode = self.path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise self._refusal("this is no file; name one")

    def _refuse_held(self, holder: int | None, over: int | None) -> None:
        if holder not in (None, over):
            raise self._refusal(f"process {holder} holds it and runs; stop that one first")

    def _refusal(self, reason: str) -> ConfigError:
        return ConfigError(f"pidfile = {str(self.path)!r}: {reason}")

    def remove(self) -> None:
        """Remove the file if it still names this process; where its directory forbids that, empty it."""
        if self.path is None or self._read() != os.getpid():
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            with contextlib.suppress(OSError):
                self._overwrite("")

    def _replace(self, text: str) -> None:
        assert self.path is not None
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            _write_new(beside, text)
            beside.rename(self.path)
        except PermissionError:  # the file is ours, and its directory is not: see privileges.give
            self._overwrite(text)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise

    def _overwrite(self, text: str) -> None:
        """Write into the file that is there, by one write(2)."""
        assert self.path is not None
        fd = os.open(self.path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def _read(self) -> int | None:
        assert self.path is not None
        try:
            return int(self.path.read_text())
        except (OSError, ValueError):
            return None

    def _holder(self) -> int | None:
        """Return the pid in the file if that process lives."""
        pid = self._read()
        if pid is None or pid <= 0:
            return None
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):  # the latter: no process has such a number
            return None
        except PermissionError:
            return pid
        return pid


def _write_new(path: Path, text: str) -> None:
    """Make a file, whatever stood there: nobody has put a link in its place, and only we may write to it later."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
