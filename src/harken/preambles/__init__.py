"""The room of preambles: what must be read from a connection before its handler may have it.

A preamble is a callable from connection to connection. It runs where the handler will run, in the connection's thread,
child or green thread, so that it may block; all preambles of a connection share one deadline. One file a preamble; a
module of the room is imported only by servers that want it, and has ``make`` (see :class:`Module`).
"""

from __future__ import annotations

import importlib
import sys
from _socket import SOCK_STREAM
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

from harken.errors import ConfigError
from harken.listener import Listener
from harken.networks import Networks
from harken.settings import Kind, choice, listing, seconds, setting, text

if TYPE_CHECKING:
    from harken.settings import Settings

__all__ = ["PREAMBLES", "Module", "Preamble", "refuse_plain_text", "resolve"]

setting(
    "preamble_timeout",
    seconds(),
    5.0,
    unit="seconds",
    meaning="how long a PROXY header and a TLS handshake may take together, from when the connection's handler could "
    "start",
    origin="a handshake takes two round trips and some milliseconds; nginx allows 60 s, users of Go set 5 to 10",
)

setting(
    "proxy",
    choice("off", "v1", "v2", "any"),
    "off",
    meaning="the version of the PROXY header with which every connection (and every datagram) must begin; one without "
    "is closed",
    origin="HAProxy's specification: a receiver must be told, and must not guess, whether a header comes",
)


def without_unix(entries: Iterable[str]) -> list[str]:
    """Return the networks of ``proxy_from``: the word for Unix sockets, whose mode says who may connect, is none."""
    return [entry for entry in entries if entry.strip() not in ("unix", "unix:")]


def _are_proxies(value: Any) -> None:
    if not all(isinstance(entry, str) for entry in value or ()):
        raise ValueError("is wrong: a network is written as text, as in '10.0.0.0/8'")
    try:
        Networks.parse(without_unix(value or ()), "")
    except ConfigError as error:
        raise ValueError("is wrong" + str(error)) from None


setting(
    "proxy_from",
    listing(optional=True, test=_are_proxies),
    None,
    meaning="networks of the proxies whose headers are believed; needed by `proxy`, and peers outside are closed. Who "
    "may connect to a Unix socket is said by its mode",
    origin="HAProxy's specification: only trusted proxies may speak for others",
)


class _TLSKind(Kind):
    """The kind of ``tls``."""

    __slots__ = ()

    def fits(self, value: object) -> bool:
        kinds = [
            getattr(sys.modules.get(module), name, None)  # who has such a value has loaded its module
            for module, name in (("harken.preambles._declaration", "TLS"), ("ssl", "SSLContext"))
        ]
        return value is None or isinstance(value, (dict, *filter(None, kinds)))

    def check(self, value: Any) -> Any:
        if not self.fits(value):
            raise ValueError(f"is not {self.describe()}")
        return _tls()(**value) if isinstance(value, dict) else value

    def parse(self, text: str) -> Any:
        return None if text.strip().lower() == "none" else _tls().parse(text.strip())

    def describe(self) -> str:
        return "a `harken.TLS`, an `ssl.SSLContext`, `cert=FILE&key=FILE…` in text, or none"


def _tls() -> Any:
    from harken.preambles._declaration import TLS

    return TLS


setting(
    "tls",
    _TLSKind("tls", (), optional=True),
    None,
    meaning="speak TLS: with which certificate, and how (`cert=FILE&key=FILE`, and `ca`, `verify`, `alpn`, "
    "`min_version`, `password`, `mode` as wanted)",
    origin="plain text unless asked",
)
setting(
    "tls_cert",
    text(optional=True),
    None,
    meaning="PEM file of the certificate, and of those that vouch for it; speaks TLS as `tls` does",
    origin="the flags of gunicorn and uvicorn are of this form",
)


class Preamble(Protocol):
    """One preamble of one server; called for each connection."""

    tells_client: bool
    """Whether it learns the client's address, so that whoever judges that must wait for it."""

    def __call__(self, connection: Any, deadline: float) -> Any:
        """Read what comes first.

        What it learns it notes on the connection's record: ``certificate``, ``proxy``, ``spoken_for``.

        Args:
            connection: a socket that blocks, or looks as if it did.
            deadline: by ``time.monotonic()``.

        Returns:
            The connection, or what goes on in its place: then the old one is detached, and the record was moved
            (``Record.move``) before anything was waited for, so that whoever cuts the connection finds it.

        Raises:
            OSError: the peer failed. The caller closes the connection: the one that it gave, or the error's own
                (``PreambleError.connection``).
        """


class Module(Protocol):
    """What a module of the room has."""

    def make(self, values: Settings, listener: Any) -> Preamble:
        """Make the preamble of a server.

        Args:
            values: its settings.
            listener: its listening socket.

        Raises:
            ConfigError: a setting is wrong.
        """


PREAMBLES: dict[str, tuple[str, ...]] = {"proxy": ("proxy",), "tls": ("tls", "tls_cert")}
"""The modules of the room in the order in which they run; with each, the settings that ask for it, any of which do.

These are declared above, so that looking whether a server wants a preamble imports none.
"""

armed = False
"""Whether any server of this process has preambles, so that handlers must look whether they have run."""


def resolve(values: Settings, listener: Any) -> tuple[Preamble, ...]:
    """Make the preambles that a server wants, in their order.

    A listener may ask for one too, by an attribute of the preamble's name (``listener.tls``).

    Raises:
        ConfigError: a setting is wrong.
    """
    return tuple(
        cast("Module", importlib.import_module(_home(name))).make(values, listener)
        for name, asking in PREAMBLES.items()
        if _asks(listener, name) or any(values[each] not in (None, "off") for each in asking)
    )


def refuse_plain_text(values: Settings, listeners: Iterable[Any]) -> None:
    """See to it that what is said of TLS means something: whoever says it does not expect plain text.

    Args:
        values: the settings of what listens.
        listeners: all of its sockets.

    Raises:
        ConfigError: nothing speaks TLS there.
    """
    doors = list(listeners)
    streams = [door for door in doors if getattr(door, "type", SOCK_STREAM) == SOCK_STREAM]
    secured = values["tls"] is not None or values["tls_cert"] is not None
    if (secured and streams) or any(_asks(door, "tls") for door in streams) or not doors:
        return
    for declared in values.named("tls"):
        said = f"{declared.name} ({values.find(declared.name).source})"
        if not streams:
            raise ConfigError(f"{said}: TLS is for streams, and datagrams would go in plain text")
        raise ConfigError(f"{said} needs a certificate, or all goes in plain text; set tls_cert, or give a tls:// one")


def _asks(listener: object, name: str) -> bool:
    return isinstance(listener, Listener) and getattr(listener, name, None) is not None


def _home(name: str) -> str:
    return name if "." in name else f"harken.preambles.{name}"


def arm() -> None:
    """From now on handlers look whether their connection's preambles have run."""
    global armed
    armed = True
