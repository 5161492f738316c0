"""The standard streams of a process: that they lead somewhere, and that output which cannot be written ends nothing."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

__all__ = ["flush", "open_missing", "settle"]


def open_missing() -> None:
    """Let descriptors 0, 1 and 2 lead nowhere if they are closed, before anything else gets these numbers.

    Or else what a child of the program writes to its stdout would go to whatever is open there: a client, the log.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free: this one
            if getattr(sys, name) is None:
                mode = "w" if fd else "r"
                setattr(sys, name, open(fd, mode, errors="backslashreplace", closefd=False))  # noqa: SIM115


def flush() -> list[TextIO]:
    """Write what stdout and stderr still hold; say in a line what cannot be written, which is lost.

    Returns:
        The streams that cannot be written.
    """
    failed = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            continue
        try:
            stream.flush()
        except ValueError:
            pass  # it is closed, and holds nothing
        except OSError as error:
            failed.append(stream)
            with suppress(Exception):  # stderr may be what cannot be written to
                print(f"harken: cannot write to {name}: {error.strerror}; output is lost", file=sys.stderr)
    return failed


def settle() -> None:
    """Flush for the last time: what cannot be written leads nowhere from now on.

    The interpreter flushes once more when it ends, and a failure would become its exit status, 120.
    """
    for stream in flush():
        with suppress(OSError, ValueError):  # a stream of the program's own that is no file
            fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.dup2(fd, stream.fileno())
            finally:
                os.close(fd)
