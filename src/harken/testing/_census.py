"""What a process holds: descriptors, threads, children. Counted before and after, it tells what was left behind."""

from __future__ import annotations

import contextlib
import gc
import glob
import os
import re
import threading
import time

__all__ = ["Census", "wait_until"]

# Seconds that a thread or child that was told to end has to be gone; on a busy machine it is some 10 ms.
SETTLE_SECONDS = 3.0
# What the standard library opens once and keeps.
_LASTING = re.compile(r"/dev/u?random|resource_tracker|\.pyc?$")


def wait_until(condition: object, patience: float = SETTLE_SECONDS) -> bool:
    """Wait until ``condition()`` is true; tell whether that came in time.

    Args:
        condition: called again and again, every few milliseconds.
        patience: seconds.
    """
    assert callable(condition)
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.003)
    return True


class Census:
    """The descriptors, threads and children of this process at one moment. Descriptors and children on Linux alone."""

    def __init__(self) -> None:
        self.descriptors = _descriptors()
        self.threads = set(threading.enumerate())
        self.children = _children()

    def leaks(self) -> list[str]:
        """Say what is there now and was not then."""
        now = Census()
        return [
            *(
                f"descriptor {fd} -> {to}"
                for fd, to in now.descriptors.items()
                if self.descriptors.get(fd) != to and not _LASTING.search(to)
            ),
            *(f"thread {thread.name}" for thread in now.threads - self.threads),
            *(f"child {pid}" for pid in now.children - self.children),
        ]

    def expect_no_leaks(self) -> None:
        """Wait a moment for what is about to go.

        Raises:
            AssertionError: something is left, and what.
        """
        if not self.leaks():
            return
        gc.collect()  # an exception's traceback may hold a socket in a cycle
        if not wait_until(lambda: not self.leaks()):
            raise AssertionError("left behind: " + "; ".join(self.leaks()))


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the one that lists the folder
                found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _children() -> set[int]:
    found: set[int] = set()
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError), open(path) as file:  # that thread has ended
            found.update(map(int, file.read().split()))
    return found
