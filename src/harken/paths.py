"""Where relative paths in settings lead: from where the process was started, also once it has changed its directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["change_directory", "from_start", "returning"]

_start = ""  # while the directory is the one that we were started in


def change_directory(path: str) -> None:
    """Change the working directory, as the setting ``chdir`` asks.

    Raises:
        OSError: as chdir(2).
    """
    global _start
    try:
        start = _start or os.getcwd()
    except OSError:  # it was removed, and no relative path leads anywhere
        start = ""
    os.chdir(path)
    _start = start


@contextmanager
def returning() -> Iterator[None]:
    """Be back, when the block ends, in the directory that it began in; paths then lead as before."""
    global _start
    # Where there is O_PATH, `x` on the folder is enough.
    here = os.open(".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_CLOEXEC)
    before = _start
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)
        _start = before


def from_start(path: str | os.PathLike[str]) -> str:
    """Return ``path`` as an absolute one."""
    return os.path.abspath(os.path.join(_start, path))
