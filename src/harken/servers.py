"""Stdlib's product of mix-ins and servers, by name, and the pool's, the green and the async ones.

Everything newer is a keyword of ``TCPServer``.
"""

from __future__ import annotations

import os
import socket

from harken.mixins import AsyncMixIn, GreenMixIn, PoolMixIn, ThreadingMixIn
from harken.server import TCPServer, UDPServer


class ThreadingTCPServer(ThreadingMixIn, TCPServer):
    """A thread for each connection."""


class ThreadingUDPServer(ThreadingMixIn, UDPServer):
    """A thread for each datagram."""


class PoolTCPServer(PoolMixIn, TCPServer):
    """A bounded pool of threads for connections."""


class PoolUDPServer(PoolMixIn, UDPServer):
    """A bounded pool of threads for datagrams."""


class GreenTCPServer(GreenMixIn, TCPServer):
    """A green thread for each connection."""


class GreenUDPServer(GreenMixIn, UDPServer):
    """A green thread for each datagram."""


class AsyncTCPServer(AsyncMixIn, TCPServer):
    """A task in an event loop for each connection."""


class AsyncUDPServer(AsyncMixIn, UDPServer):
    """A task in an event loop for each datagram."""


if hasattr(os, "fork"):
    from harken.mixins import ForkingMixIn

    class ForkingTCPServer(ForkingMixIn, TCPServer):
        """A child process for each connection."""

    class ForkingUDPServer(ForkingMixIn, UDPServer):
        """A child process for each datagram."""


if hasattr(socket, "AF_UNIX"):
    from harken.server import UnixDatagramServer, UnixStreamServer

    class ThreadingUnixStreamServer(ThreadingMixIn, UnixStreamServer):
        """A thread for each connection on a Unix path."""

    class ThreadingUnixDatagramServer(ThreadingMixIn, UnixDatagramServer):
        """A thread for each datagram on a Unix path."""

    class PoolUnixStreamServer(PoolMixIn, UnixStreamServer):
        """A bounded pool of threads for connections on a Unix path."""

    class GreenUnixStreamServer(GreenMixIn, UnixStreamServer):
        """A green thread for each connection on a Unix path."""

    class AsyncUnixStreamServer(AsyncMixIn, UnixStreamServer):
        """A task in an event loop for each connection on a Unix path."""

    if hasattr(os, "fork"):

        class ForkingUnixStreamServer(ForkingMixIn, UnixStreamServer):
            """A child process for each connection on a Unix path."""

        class ForkingUnixDatagramServer(ForkingMixIn, UnixDatagramServer):
            """A child process for each datagram on a Unix path."""
