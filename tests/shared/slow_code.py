"""Code that takes its time to load, and whether a process has ended: imported by tests of processes."""

from __future__ import annotations

import pathlib

# Loading, it makes the file ``loading``, with its pid, and waits for the file ``go``.
SLOW = """
import os, pathlib, time
pathlib.Path("loads").write_text(str(os.getpid()))
pathlib.Path("loads").rename("loading")
while not pathlib.Path("go").exists():
    time.sleep(0.01)
"""


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, if only as a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
