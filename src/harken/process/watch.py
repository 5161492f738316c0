"""``--reload``: a process beside the supervisor that sends it SIGHUP when the code has changed. For development.

It is a process of its own because it has threads, and a supervisor that forks must have none.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from harken.errors import ConfigError

__all__ = ["start"]

# Files that are code or settings; what editors and interpreters leave beside them is not.
SUFFIXES = (".py", ".pyx", ".so", ".toml")
# Milliseconds between two looks whether the supervisor still runs.
LOOK_MS = 500


def start(directories: Iterable[Path]) -> None:
    """Watch directories, with all that is below them, as long as this process runs.

    Raises:
        ConfigError: watchfiles is missing.
    """
    if importlib.util.find_spec("watchfiles") is None:
        raise ConfigError("--reload needs watchfiles: pip install 'harken[reload]'")
    words = [str(os.getpid()), *{str(each.resolve()) for each in directories}]
    watcher = subprocess.Popen([sys.executable, "-m", __name__, *words], stdin=subprocess.DEVNULL)
    watcher.returncode = 0  # nobody waits for it, since it outlives us: python -X dev would warn of that


def _watch(supervisor: int, directories: list[str]) -> None:
    from watchfiles import Change, watch

    def is_code(_change: Change, path: str) -> bool:
        return path.endswith(SUFFIXES)

    told = False
    for changes in watch(
        *directories,
        watch_filter=is_code,
        rust_timeout=LOOK_MS,
        yield_on_timeout=True,
        raise_interrupt=False,
        ignore_permission_denied=True,
    ):
        if os.getppid() != supervisor:
            return
        if not told:  # the first time that it comes here it does watch
            told = True
            print(f"harken: reloading when code changes in {', '.join(directories)}", file=sys.stderr)
        if changes:
            names = sorted({_name(path) for _, path in changes})
            print(f"harken: {', '.join(names[:3])}{' …' if names[3:] else ''} changed: reloading", file=sys.stderr)
            os.kill(supervisor, signal.SIGHUP)


def _name(path: str) -> str:
    try:
        return os.path.relpath(path)
    except FileNotFoundError:  # the working directory has gone, which is no reason to look away
        return path


if __name__ == "__main__":
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a service manager sends some to every process
    _watch(int(sys.argv[1]), sys.argv[2:])
