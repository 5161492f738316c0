"""Whether a file could be written, without writing it, making it, or waking whoever reads a pipe."""

from __future__ import annotations

import errno
import os

__all__ = ["check_file", "check_folder"]


def check_file(path: str | os.PathLike[str]) -> None:
    """See that a file can be appended to, or made.

    Raises:
        OSError: as opening it would.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if os.path.exists(path):
        _check(path, os.W_OK)
    else:
        check_folder(os.path.dirname(os.path.realpath(path)))


def check_folder(path: str | os.PathLike[str]) -> None:
    """See that files can be made in a folder.

    Raises:
        OSError: as making one would.
    """
    _check(os.path.join(path, "."), os.W_OK | os.X_OK)


def _check(path: str | os.PathLike[str], mode: int) -> None:
    if not os.access(path, mode):
        read_only = os.statvfs(path).f_flag & os.ST_RDONLY  # which raises when there is no such path
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), path)
