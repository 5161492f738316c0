"""harken: the class with ``handle()`` that ``socketserver`` taught, and a production server under it.

Names load when they are first used, so that importing this module costs no more than importing ``socketserver``. Every
public name of the running Python's ``socketserver`` is here; see ``docs/reference`` for those that are harken's own.
"""

from __future__ import annotations

import _socket
import importlib
import os

# No typing, no socket: each would cost more than the rest of this file.
_HOMES: dict[str, str] = {
    **dict.fromkeys(("BaseServer", "TCPServer", "UDPServer"), "harken.server"),
    **dict.fromkeys(("ThreadingMixIn", "PoolMixIn", "GreenMixIn", "AsyncMixIn"), "harken.mixins"),
    **dict.fromkeys(("BaseRequestHandler", "StreamRequestHandler", "DatagramRequestHandler"), "harken.handlers"),
    **dict.fromkeys(("ThreadingTCPServer", "ThreadingUDPServer", "PoolTCPServer", "PoolUDPServer"), "harken.servers"),
    **dict.fromkeys(("GreenTCPServer", "GreenUDPServer", "AsyncTCPServer", "AsyncUDPServer"), "harken.servers"),
    **dict.fromkeys(("AsyncRequestHandler", "AsyncStreamRequestHandler"), "harken.async_handlers"),
    **dict.fromkeys(
        ("ConfigError", "ConnectionClosed", "DeadlineExceeded", "FrameError", "HandoffError", "HarkenError"),
        "harken.errors",
    ),
    **dict.fromkeys(("LifecycleError", "LimitExceeded", "PeerError", "PreambleError"), "harken.errors"),
    "background": "harken.alongside",
    "DrainReport": "harken.drain",
    **dict.fromkeys(("ProxyHeader", "ProxySSL"), "harken.preambles.proxy_header"),
    "Peer": "harken.peer",
    "TLS": "harken.preambles.tls",
    "ConnectionInfo": "harken.records",
    "serve": "harken.process.service",
    "start": "harken.process.start",
}
if hasattr(os, "fork"):
    _HOMES["ForkingMixIn"] = "harken.mixins"
    _HOMES |= dict.fromkeys(("ForkingTCPServer", "ForkingUDPServer"), "harken.servers")
if hasattr(_socket, "AF_UNIX"):
    _HOMES |= dict.fromkeys(("UnixStreamServer", "UnixDatagramServer"), "harken.server")
    _HOMES |= dict.fromkeys(
        ("ThreadingUnixStreamServer", "ThreadingUnixDatagramServer", "PoolUnixStreamServer", "GreenUnixStreamServer"),
        "harken.servers",
    )
    _HOMES["AsyncUnixStreamServer"] = "harken.servers"
    if hasattr(os, "fork"):
        _HOMES |= dict.fromkeys(("ForkingUnixStreamServer", "ForkingUnixDatagramServer"), "harken.servers")

_SUBMODULES = ("events", "explain", "green", "testing")
# Names that programs read or patch in the module they call socketserver.
_PRIVATE = {"_SocketWriter": "harken.handlers", "_NoThreads": "harken.mixins"}
_BORROWED = ("socket", "selectors", "os", "sys", "threading")
__version__ = "0.1.0.dev0"
__all__ = [*_HOMES, *_SUBMODULES]  # noqa: PLE0604 - names are loaded by __getattr__


def __getattr__(name: str) -> object:
    """Load a public name when it is first used."""
    home = _HOMES.get(name) or _PRIVATE.get(name)
    if home is not None:
        value = getattr(importlib.import_module(home), name)
    elif name in _SUBMODULES:
        return importlib.import_module(f"harken.{name}")
    elif name in _BORROWED:
        value = importlib.import_module(name)
    elif name == "_ServerSelector":
        # stdlib's choice: poll() needs no descriptor of its own and one system call.
        import selectors

        value = getattr(selectors, "PollSelector", selectors.SelectSelector)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBMODULES})
