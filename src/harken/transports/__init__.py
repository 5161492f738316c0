"""The room of transports: what each kind of address can do, and how one is found.

An address is a URL. Its scheme names a module of this room, which is imported only then. A module that implements
:class:`Scheme` can open listeners; one that implements :class:`Transport` also knows the sockets of its family, however
they came into being. No verb cleans up: a :class:`~harken.listener.Listener` removes what is its own when it closes.
"""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from harken import settings
from harken.errors import ConfigError, nearest

if TYPE_CHECKING:
    from harken.listener import Listener
    from harken.peer import Peer
    from harken.settings import Settings

__all__ = [
    "SCHEMES",
    "BindOptions",
    "Scheme",
    "Transport",
    "as_urls",
    "bind_options",
    "for_socket",
    "for_url",
    "listen",
]

# socketserver writes its switches as 1 as often as True (http.server does).
_SWITCH = settings.Kind("flag", (bool, int), minimum=0)

settings.setting(
    "backlog",
    settings.count(maximum=(1 << 31) - 1),  # a C int
    max(128, socket.SOMAXCONN),
    serve=4096,
    unit="connections",
    meaning="connections that may wait in the kernel to be accepted",
    origin="listen(2): 4096 is Linux's own cap, net.core.somaxconn, since 5.4; with stdlib's 5 and SYN cookies Linux "
    "can lose the first bytes of a stream",
    stdlib="request_queue_size",
    stdlib_default=5 if sys.version_info < (3, 15) else socket.SOMAXCONN,
)
settings.setting(
    "reuse_port",
    _SWITCH,
    False,
    meaning="let other servers that say so too bind the same port (SO_REUSEPORT)",
    origin="socket(7); off, so that a second server on one port is refused",
    stdlib="allow_reuse_port",
    stdlib_default=False,
)
settings.setting(
    "allow_reuse_address",
    _SWITCH,
    False,
    serve=True,
    meaning="bind a TCP port whose last connections are still in TIME_WAIT (SO_REUSEADDR)",
    origin="socketserver has it off; servers that restart have it on",
    stdlib="allow_reuse_address",
    stdlib_default=False,
)
settings.setting(
    "nodelay",
    settings.flag(optional=True),
    None,
    serve=True,
    meaning="send small writes at once (TCP_NODELAY); none leaves the socket as stdlib does",
    origin="tcp(7); Nagle's algorithm and delayed acknowledgements together cost 40 ms an answer",
)
settings.setting(
    "keepalive",
    settings.flag(optional=True),
    None,
    serve=True,
    meaning="let the kernel notice peers that vanished (SO_KEEPALIVE); none leaves the socket as stdlib does",
    origin="tcp(7): the first probe goes out after two hours, net.ipv4.tcp_keepalive_time",
)


@dataclass(frozen=True, slots=True)
class BindOptions:
    """How to bind; see the settings of the same names. None leaves an option as the kernel has it."""

    backlog: int = max(128, socket.SOMAXCONN)
    reuse_port: bool = False
    reuse_address: bool = True
    nodelay: bool | None = None
    keepalive: bool | None = None


class Scheme(Protocol):
    """What a module must have to open the addresses of a scheme."""

    schemes: tuple[str, ...]
    """The words before ``:`` in its addresses."""

    def parse(self, url: str) -> Any:
        """Read an address, without touching the machine.

        Raises:
            ConfigError: one line that names the address and what is wrong with it.
        """

    def bind(self, place: Any, options: BindOptions) -> list[Listener]:
        """Open what :meth:`parse` returned. On an error nothing stays open or behind.

        Raises:
            BindError: the address cannot be had now.
            ConfigError: it can never be.
        """


class Bequeathed(Scheme, Protocol):
    """What a module may have, for sockets that are handed on from one process to the next."""

    def suits(self, place: Any, sock: socket.socket) -> bool:
        """Tell whether a socket is bound where an address says, however that was spelled.

        Raises:
            ConfigError: that can never be had.
        """

    def take_over(self, place: Any, listener: Listener, *, changed: bool) -> None:
        """Note on a listener what its address says beyond its socket, as :meth:`bind` does.

        Args:
            place: what :meth:`parse` returned.
            listener: bound there.
            changed: whether the address was another when it was bound.

        Raises:
            BindError: it cannot be had as the address says now.
        """


class Transport(Scheme, Protocol):
    """What a module must have to know the sockets of a family and type, too."""

    def tune(self, sock: socket.socket, options: BindOptions) -> None:
        """Set socket options: on a listener, before it is bound; what it accepts inherits them on Linux."""

    def url(self, sock: socket.socket) -> str:
        """Return the address to which a socket is bound, with the real port."""

    def describe(self, connection: socket.socket, client_address: Any) -> Peer:
        """Return the far end of an accepted connection, or of a datagram that came in on ``connection``."""

    def shut_out(self, sock: socket.socket) -> float | None:
        """Let nobody new come to a door that no other process holds; who has come can still be taken.

        It cannot be undone: the door is closed after that. Where it was done so that nobody can come any more, errors
        of accept(2) mean that nobody is left.

        Returns:
            For how many seconds somebody who was on the way may still come; None when it cannot be done here.
        """


SCHEMES: dict[str, str] = {
    "tcp": "harken.transports.tcp",
    "tls": "harken.transports.tls",
    "udp": "harken.transports.udp",
    "unix": "harken.transports.unix",
    "unixgram": "harken.transports.unix",
    "fd": "harken.transports.inherited",
    "systemd": "harken.transports.inherited",
}
"""Which module opens the addresses of a scheme."""

_BY_FAMILY: dict[object, str] = {socket.AF_UNIX: "harken.transports.unix"}
_BY_TYPE: dict[object, str] = {socket.SOCK_STREAM: "harken.transports.tcp"}


def bind_options(values: Settings) -> BindOptions:
    """Return what a server's settings say about binding."""
    return BindOptions(
        backlog=values["backlog"],
        reuse_port=bool(values["reuse_port"]),
        reuse_address=bool(values["allow_reuse_address"]),
        nodelay=values["nodelay"],
        keepalive=values["keepalive"],
    )


def as_urls(addresses: Iterable[Any]) -> tuple[str, ...]:
    """Return addresses that are text.

    Raises:
        ConfigError: one is something else, such as socketserver's pair of host and port.
    """
    urls = tuple(addresses)
    for url in urls:
        if isinstance(url, tuple) and len(url) == 2 and isinstance(url[0], str):
            host = f"[{url[0]}]" if ":" in url[0] else url[0]
            raise ConfigError(f"{url!r} is no address here: write 'tcp://{host}:{url[1]}'")
        if not isinstance(url, str):
            raise ConfigError(f"{url!r} is no address: each is a text of its own, such as 'tcp://127.0.0.1:8800'")
    return urls


def for_url(url: str) -> Scheme:
    """Return the module that opens an address, of this room or of the entry points ``harken.transports``.

    Raises:
        ConfigError: no transport has that scheme.
    """
    scheme, colon, _ = url.partition(":")
    if scheme in SCHEMES and colon:
        return cast("Scheme", importlib.import_module(SCHEMES[scheme]))
    from importlib.metadata import entry_points

    for plugin in entry_points(group="harken.transports", name=scheme):
        return cast("Scheme", plugin.load())
    if "://" in url or (colon and nearest(scheme, SCHEMES)):
        raise ConfigError(f"{url!r}: no transport is called {scheme!r}{nearest(scheme, SCHEMES) or _known()}")
    if url.startswith(("/", "@", ".")):
        meant = "unix:" + url
        raise ConfigError(f"{url!r} has no scheme; did you mean {meant!r}?")
    place = url if colon else f":{url}" if url.isdecimal() else "HOST:PORT"
    meant = "tcp://" + place
    raise ConfigError(f"{url!r} has no scheme; did you mean {meant!r}?")


def _known() -> str:
    return "; known are " + ", ".join(SCHEMES)


def listen(url: str, options: BindOptions | None = None) -> list[Listener]:
    """Open an address.

    Args:
        url: an address, ``tcp://:8800`` for one.
        options: how to bind.

    Returns:
        The listeners: one, but all that were passed for ``systemd:``.

    Raises:
        BindError: the address cannot be had now; AddressInUse when another socket has it.
        ConfigError: the address is wrong.
    """
    scheme = for_url(url)
    return scheme.bind(scheme.parse(url), options or BindOptions())


def is_bound_to(url: str, fd: int) -> bool:
    """Tell whether a socket is bound where an address says.

    Raises:
        ConfigError: the address is wrong.
    """
    scheme: Any = for_url(url)
    if not hasattr(scheme, "suits"):
        return False
    sock = socket.socket(fileno=fd)
    try:
        return bool(scheme.suits(scheme.parse(url), sock))
    finally:
        sock.detach()


def take_over(url: str, listener: Listener, options: BindOptions | None = None, *, changed: bool = False) -> None:
    """Make of a socket that another process has bound what :func:`listen` would make of it.

    Args:
        url: an address.
        listener: bound there.
        options: how to bind; what can change on an open socket applies.
        changed: whether the address was another when it was bound.

    Raises:
        BindError: it cannot be had as the address says now.
        ConfigError: the address is wrong.
    """
    scheme: Any = for_url(url)
    place = scheme.parse(url)
    adjust(listener, options or BindOptions())
    if hasattr(scheme, "take_over"):
        scheme.take_over(place, listener, changed=changed)


def adjust(listener: Listener, options: BindOptions) -> None:
    """Give an open socket of somebody else's what can change on it, and its address."""
    transport = for_socket(listener)
    transport.tune(listener, replace(options, reuse_address=False, reuse_port=False))
    listener.url = transport.url(listener)


def for_socket(sock: socket.socket) -> Transport:
    """Return the transport that knows a socket, by its family and type.

    A family of which harken knows nothing is treated as TCP (streams) or UDP (all else) is, without its options.
    """
    name = _BY_FAMILY.get(getattr(sock, "family", None))  # a test's double may have neither
    if name is None:
        name = _BY_TYPE.get(getattr(sock, "type", None), "harken.transports.udp")
    found: Any = sys.modules.get(name) or importlib.import_module(name)
    transport: Transport = found
    return transport
