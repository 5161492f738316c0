"""``allow`` and ``deny``: which client addresses may come in."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from harken import settings
from harken.errors import ConfigError
from harken.networks import Networks

if TYPE_CHECKING:
    from harken.peer import Peer

__all__ = ["ALLOW", "DENY", "Addresses"]


def _are_networks(value: tuple[object, ...] | None) -> None:
    if not all(isinstance(entry, str) for entry in value or ()):
        raise ValueError("is wrong: a network is written as text, as in '10.0.0.0/8'")
    try:
        Networks.parse(value or (), "")  # type: ignore[arg-type]
    except ConfigError as error:
        raise ValueError("is wrong" + str(error)) from None


_NETWORKS = settings.listing(optional=True, test=_are_networks)

ALLOW = settings.setting(
    "allow",
    _NETWORKS,
    None,
    live=True,
    meaning="networks whose clients may come in (10.0.0.0/8,2001:db8::/32); others are reset, or get `overload_reply`; "
    "none: everybody, and an empty list: nobody; Unix sockets have no addresses and are not judged",
    origin="nginx's and esockd's allow",
)
DENY = settings.setting(
    "deny",
    _NETWORKS,
    None,
    live=True,
    meaning="networks whose clients may not come in, even if `allow` has them",
    origin="nginx's and esockd's deny",
)


_JUDGED = (socket.AF_INET, socket.AF_INET6)  # a port does not tell: the client behind a proxy may have 0


class Addresses:
    """Lets those in that ``allow`` has, if there is such a list, and ``deny`` has not."""

    def __init__(self, allow: Iterable[str] | None = None, deny: Iterable[str] | None = None) -> None:
        """Read both lists.

        Raises:
            ConfigError: an entry is no network.
        """
        self._allow = None if allow is None else Networks.parse(allow, "allow")
        self._deny = Networks.parse(deny or (), "deny")

    def admit(self, peer: Peer) -> str | None:
        """Look the address up."""
        if peer.family not in _JUDGED:
            return None
        if peer.address in self._deny:
            return "deny"
        if self._allow is not None and peer.address not in self._allow:
            return "allow"
        return None

    def release(self, peer: Peer) -> None:
        """Nothing is held."""
