"""How the fallback asks the kernel: by epoll, edge-triggered, or by whatever ``selectors`` has.

By epoll a connection is registered once, when a green thread waits for it the first time, and told of changes from then
on. By ``selectors`` it is registered for the time of each wait.
"""

from __future__ import annotations

import selectors
from typing import Protocol

from harken.unpatched import original

__all__ = ["HUNG", "READABLE", "WRITABLE", "EdgePoller", "LevelPoller", "Poller", "poller"]

# As in epoll(7), here also where there is no epoll.
_IN, _PRI, _OUT, _ERR, _HUP, _RDHUP = 0x1, 0x2, 0x4, 0x8, 0x10, 0x2000
READABLE = _IN | _PRI | _ERR | _HUP | _RDHUP
WRITABLE = _OUT | _ERR | _HUP
# From now on a short read does not mean that there is nothing more: FIN, RST or the urgent mark may stand behind it.
HUNG = _PRI | _ERR | _HUP | _RDHUP


class Poller(Protocol):
    """What a hub asks. All methods take descriptors."""

    def fileno(self) -> int:
        """A descriptor that is readable when something is ready, or -1."""

    def watch(self, fd: int, shared: bool = False) -> None:
        """Report, while it lasts, that ``fd`` is readable; if it is ``shared`` with other processes, to one of them."""

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``, whatever it was registered for; a closed one is ignored."""

    def add(self, fd: int) -> None:
        """Report changes of ``fd``, its state of now being the first."""

    def want(self, fd: int, read: bool, write: bool) -> None:
        """Somebody waits for this of an added ``fd``; nobody when both are false."""

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """Sleep until something is ready or for ``timeout`` seconds; return descriptors and masks."""

    def close(self) -> None:
        """Give the descriptor back."""


class EdgePoller:
    """epoll, edge-triggered."""

    _CHANGES = _IN | _OUT | _RDHUP | _PRI | (1 << 31)  # EPOLLET
    _EXCLUSIVE = 1 << 28  # EPOLLEXCLUSIVE

    def __init__(self) -> None:
        self._epoll = original("select", "epoll")()
        self.fileno = self._epoll.fileno
        self.poll = self._epoll.poll
        self.close = self._epoll.close

    def watch(self, fd: int, shared: bool = False) -> None:
        self._register(fd, _IN | (shared and self._EXCLUSIVE))

    def unwatch(self, fd: int) -> None:
        try:
            self._epoll.unregister(fd)
        except (OSError, ValueError):
            pass  # closed, and so forgotten, or never added

    def add(self, fd: int) -> None:
        self._register(fd, self._CHANGES)

    def want(self, fd: int, read: bool, write: bool) -> None:
        """All changes are reported anyway."""

    def _register(self, fd: int, mask: int) -> None:
        try:
            self._epoll.register(fd, mask)
        except FileExistsError:  # its number belonged to a socket that somebody closed behind our back
            self._epoll.modify(fd, mask)


class LevelPoller:
    """``selectors``: kqueue, or poll()."""

    def __init__(self) -> None:
        self._selector = original("selectors", "DefaultSelector")()

    def fileno(self) -> int:
        inner = getattr(self._selector, "fileno", None)
        return int(inner()) if inner is not None else -1

    def watch(self, fd: int, shared: bool = False) -> None:
        self.want(fd, read=True, write=False)

    def unwatch(self, fd: int) -> None:
        self.want(fd, read=False, write=False)

    def add(self, fd: int) -> None:
        """Registered when wanted."""

    def want(self, fd: int, read: bool, write: bool) -> None:
        wanted = read * selectors.EVENT_READ | write * selectors.EVENT_WRITE
        try:
            if not wanted:
                self._selector.unregister(fd)
            elif fd in self._selector.get_map():
                self._selector.modify(fd, wanted)
            else:
                self._selector.register(fd, wanted)
        except (KeyError, ValueError):
            pass  # not registered, or closed

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        return [
            (key.fd, bool(events & selectors.EVENT_READ) * _IN | bool(events & selectors.EVENT_WRITE) * _OUT)
            for key, events in self._selector.select(timeout)
        ]

    def close(self) -> None:
        self._selector.close()


def poller() -> Poller:
    """Make the best poller of this system."""
    try:
        return EdgePoller()
    except AttributeError:  # a system without epoll
        return LevelPoller()
