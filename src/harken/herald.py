"""Tells forked children that their server drains: they have copies of everything and see no change in the parent."""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading
from collections.abc import Callable

from harken.unpatched import original

__all__ = ["Herald"]

_JITTER = struct.Struct("=d")


class Herald:
    """A pipe with a byte in it that nobody reads, so that all children see it, and those forked later too.

    What is to be said besides stands on a page of memory that parent and children share.
    """

    def __init__(self) -> None:
        """Open the pipe.

        Raises:
            OSError: no descriptor is left.
        """
        self._reader, self._writer = os.pipe()
        self._page = mmap.mmap(-1, _JITTER.size)
        self._told = False

    def tell(self, jitter: float) -> None:
        """Say that the server drains, with goodbyes spread over ``jitter`` seconds. The parent; once counts."""
        if not self._told:
            self._told = True
            self._page[:] = _JITTER.pack(jitter)
            os.write(self._writer, b"!")

    def listen(self, act: Callable[[float], None]) -> None:
        """Call ``act(jitter)`` in a thread when that is said. The child."""
        threading.Thread(target=self._listen, args=(act,), name="harken-herald", daemon=True).start()

    def _listen(self, act: Callable[[float], None]) -> None:
        poller = original("select", "poll")()
        poller.register(self._reader, select.POLLIN)
        poller.poll()
        (jitter,) = _JITTER.unpack(self._page[:])
        act(jitter)

    def __del__(self) -> None:
        for name in ("_reader", "_writer"):
            if name in vars(self):
                os.close(vars(self).pop(name))
