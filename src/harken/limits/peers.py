"""``max_connections_per_peer``: how many one client may have open at once."""

from __future__ import annotations

import socket
import threading
from collections import deque
from typing import TYPE_CHECKING

from harken import settings

if TYPE_CHECKING:
    from harken.peer import Peer

__all__ = ["MAX_CONNECTIONS_PER_PEER", "MaxConnectionsPerPeer"]

MAX_CONNECTIONS_PER_PEER = settings.setting(
    "max_connections_per_peer",
    settings.count(1, optional=True),
    None,
    unit="connections",
    live=True,
    meaning="connections that one client address may have open at once (of IPv6 one /64, of Unix sockets one user); "
    "those beyond are reset, or get `overload_reply`",
    origin="off: behind an address may be a whole office; RFC 6177 gives each site at least a /64",
)

_V6_PREFIX_BYTES = 8  # /64: within it a client chooses its addresses freely


def origin_of(peer: Peer) -> object:
    """Return what counts as one client: an address, the /64 of an IPv6 address, the user on a Unix socket."""
    if peer.family == socket.AF_INET6:
        try:
            return socket.inet_pton(socket.AF_INET6, peer.address.partition("%")[0])[:_V6_PREFIX_BYTES]
        except OSError:
            return peer.address
    # The user first: on a Unix socket a client may choose its address, and another one each time.
    return peer.credentials.uid if peer.credentials else peer.address


class MaxConnectionsPerPeer:
    """Lets at most ``maximum`` in from each client; None counts only."""

    def __init__(self, maximum: int | None) -> None:
        """Begin with nobody inside."""
        self.maximum = maximum
        self._lock = threading.Lock()
        self._inside: dict[object, int] = {}
        # Who left since. A release may come at any point, even inside admit() by a garbage collection: it only notes.
        self._left: deque[object] = deque()

    @property
    def clients(self) -> int:
        """How many clients have connections."""
        with self._lock:
            self._settle()
            return len(self._inside)

    def count(self, peer: Peer) -> None:
        """Count one that is in already, whatever the maximum."""
        origin = origin_of(peer)
        with self._lock:
            self._inside[origin] = self._inside.get(origin, 0) + 1

    def admit(self, peer: Peer) -> str | None:
        """Let one in while its client has fewer than the maximum."""
        origin = origin_of(peer)
        with self._lock:
            self._settle()
            inside = self._inside.get(origin, 0)
            if self.maximum is not None and inside >= self.maximum:
                return "max_connections_per_peer"
            self._inside[origin] = inside + 1
        return None

    def release(self, peer: Peer) -> None:
        """One has left."""
        self._left.append(origin_of(peer))

    def _settle(self) -> None:
        while self._left:
            origin = self._left.popleft()
            rest = self._inside[origin] - 1
            if rest:
                self._inside[origin] = rest
            else:
                del self._inside[origin]
