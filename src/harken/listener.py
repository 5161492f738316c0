"""The open door: a bound socket that can be handed on by its descriptor."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import weakref
from collections import deque
from itertools import accumulate
from operator import not_
from typing import NamedTuple

from harken.errors import ConfigError
from harken.unpatched import original

__all__ = [
    "LOST_SECONDS",
    "NO_ROOM",
    "AddressInUse",
    "BindError",
    "Holding",
    "Inode",
    "Listener",
    "fork_without_listeners",
    "note_inode",
    "unlink_if_own",
]

# What epoll_ctl(2) says when the kernel has no room for a door: of memory, or below max_user_watches.
NO_ROOM = (errno.ENOMEM, errno.ENOSPC)
# Seconds after which it is asked again; an acceptor's first pause.
LOST_SECONDS = 0.1


class BindError(ConfigError, OSError):
    """An address is well-formed but cannot be had now.

    Both a :class:`~harken.errors.ConfigError` and an :class:`OSError`: older code catches the second and looks at
    ``errno``, and a command tells by it a wrong value from a machine on which the value does not work.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno
        self.strerror = os.strerror(errno)

    def __str__(self) -> str:
        return str(self.args[0])  # and not OSError's, which speaks of errno alone

    def __reduce__(self) -> tuple[type[BindError], tuple[str, int]]:
        return type(self), (str(self), self.errno or 0)


class AddressInUse(BindError):
    """Another socket has the address; ``errno`` is EADDRINUSE."""


class Inode(NamedTuple):
    """Which file a path leads to, whatever name it goes by: ``st_dev`` and ``st_ino`` of stat(2)."""

    device: int
    number: int


def note_inode(path: str | bytes) -> Inode | None:
    """Return the inode of the socket at ``path``, for :func:`unlink_if_own` later.

    Call it right after ``bind``. None means that no socket is there, so that nothing will be unlinked either.
    """
    try:
        found = os.lstat(path)
    except (OSError, ValueError):  # ValueError: an abstract address, which starts with a null byte
        return None
    return Inode(found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None


def unlink_if_own(path: str | bytes, inode: Inode | None) -> bool:
    """Remove ``path`` if it still leads to ``inode``; a file that somebody else put there since is left.

    Call it before the socket is closed: an open socket keeps its inode, so that nobody else can be given its number.

    Returns:
        Whether the path was removed.
    """
    if inode is None or note_inode(path) != inode:
        return False
    with contextlib.suppress(OSError):  # gone in this moment, or the folder is no longer ours to write
        os.unlink(path)
        return True
    return False


_get_ident = original("_thread", "get_ident")  # gevent's is no C
# Threads that fork a child of the other kind at this moment.
_apart: set[int] = set()

# How often this process has forked children that may hold its listeners. Counted by iterators, so in C alone: os.fork()
# shows and drops what its hooks raise, and Ctrl-C raises in whatever Python code runs next. It would be lost.
_forks: deque[int] = deque([0], maxlen=1)
_forks_apart = map(_apart.__contains__, iter(_get_ident, None))  # of each fork, whether it is of that kind
_count_fork = map(_forks.append, accumulate(map(not_, _forks_apart))).__next__

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_count_fork)


def fork_without_listeners() -> int:
    """As ``os.fork()``, for a child that will close its copies of all listeners at once."""
    here = _get_ident()
    _apart.add(here)
    try:
        return os.fork()
    finally:
        _apart.discard(here)


class Holding:
    """Tells whether a socket that this process bound is still held by it alone, as far as that can be known."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = weakref.ref(sock)
        self._process = os.getpid()
        self._forks = _forks[0]

    def alone(self, sock: object) -> bool:
        """Whether ``sock`` is that socket, and neither a child nor a program that was started can have it as well."""
        own = self._sock()
        if own is None or own is not sock or getattr(own, "shared", False):
            return False
        try:
            inheritable = own.get_inheritable()
        except OSError:  # closed
            return False
        return not inheritable and (self._process, self._forks) == (os.getpid(), _forks[0])


class Listener(socket.socket):
    """An open, bound socket that takes connections or datagrams.

    A stream's descriptor is O_NONBLOCK while its Python timeout stays None: ``accept`` then never waits, not even for a
    connection that another process took since the readiness report, and raises BlockingIOError instead. A datagram
    socket stays blocking, since handlers answer on it: ``sendto`` must wait for a slow reader as it does in stdlib (a
    Unix one's queue holds net.unix.max_dgram_qlen datagrams, 10). Read it with MSG_DONTWAIT.

    Attributes:
        url: the address with the real port, as users write addresses (``tcp://127.0.0.1:8800``).
        shared: whether others hold the socket too: it was inherited, or is being handed on.
        owned_path: the Unix path that :meth:`close` removes, or None.
        tls: how TLS is to be spoken here, True as the settings say, None as they say whether at all.
    """

    __slots__ = ("_inode", "_owner_pid", "holding", "owned_path", "shared", "tls", "url")

    url: str
    tls: object
    shared: bool
    owned_path: str | None
    _inode: Inode | None
    _owner_pid: int

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        super().__init__(family, type, proto, fileno)
        self.url = ""
        self.tls = None
        self.shared = False
        self.holding = Holding(self)
        self.disown()
        self.settimeout(None)  # socket.setdefaulttimeout() may be in force
        if self.type != socket.SOCK_DGRAM:
            os.set_blocking(self.fileno(), False)

    @classmethod
    def adopt(cls, fd: int) -> Listener:
        """Take over an inherited descriptor.

        Takes ownership of ``fd`` and makes it close-on-exec. On an error the descriptor is left as it was.

        Args:
            fd: a bound socket, and a listening one if it is a stream.

        Raises:
            ConfigError: ``fd`` is not open, is not a socket, has no address, does not listen, or keeps messages apart.
        """
        try:
            mode = os.fstat(fd).st_mode
        except (OSError, OverflowError):
            raise ConfigError(f"fd {fd} is not open; was it passed to this process?") from None
        if not stat.S_ISSOCK(mode):
            raise ConfigError(f"fd {fd} is not a socket; pass a bound socket")
        probe = socket.socket(fileno=fd)  # finds family, type and protocol out
        try:
            if probe.type == socket.SOCK_SEQPACKET:
                raise ConfigError(f"fd {fd} is a SOCK_SEQPACKET socket; pass a stream or a datagram socket")
            if probe.type != socket.SOCK_DGRAM and not probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise ConfigError(f"fd {fd} is a socket that does not listen; call listen() before passing it")
            if probe.family in (socket.AF_INET, socket.AF_INET6) and not probe.getsockname()[1]:
                raise ConfigError(f"fd {fd} is a socket that has no port; call bind() before passing it")
            if probe.family == socket.AF_UNIX and not probe.getsockname():
                raise ConfigError(f"fd {fd} is a socket that has no address; call bind() before passing it")
        finally:
            probe.detach()
        listener = cls(fileno=fd)
        listener.shared = True
        listener.set_inheritable(False)
        return listener

    def share(self) -> int:
        """Let programs that this process starts inherit the descriptor; return its number.

        A forked child has it in any case; this is for ``exec``.
        """
        self.set_inheritable(True)
        self.shared = True
        return self.fileno()

    def own(self, path: str) -> None:
        """Answer for the file at ``path``: :meth:`close` in this process removes it if it is still the same inode."""
        self.owned_path = os.path.abspath(path)  # the working directory may change
        self._inode = note_inode(path)
        self._owner_pid = os.getpid()

    def disown(self) -> None:
        """Leave the file where it is on :meth:`close`; a successor that was handed the socket answers for it."""
        self.owned_path = None
        self._inode = None
        self._owner_pid = 0

    def close(self) -> None:
        """Close the door, and remove its Unix path if it is still its own and this process bound it."""
        if self.owned_path is not None and self._owner_pid == os.getpid():
            unlink_if_own(self.owned_path, self._inode)
        self.disown()
        super().close()

    def detach(self) -> int:
        """Give the descriptor away, and with it the care for its Unix path."""
        self.disown()
        return super().detach()

    def __repr__(self) -> str:
        return f"<Listener {self.url or 'unbound'} fd={self.fileno()}>"
