"""The standard streams of a process, which may be closed."""

from __future__ import annotations

import os
import sys

__all__ = ["flush", "open_missing"]


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


def flush() -> None:
    """Write what stdout and stderr still hold, where there are any."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
