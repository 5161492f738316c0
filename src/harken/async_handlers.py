"""Request handlers with ``async def handle``, for the engine ``asyncio``."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, NoReturn

from harken import preambles
from harken._hub.awaited import AsyncConnection, files
from harken._hub.task import drive
from harken.entry import refuse_unentered
from harken.errors import LifecycleError
from harken.expiry import introduce
from harken.handlers import BaseRequestHandler

__all__ = ["AsyncRequestHandler", "AsyncStreamRequestHandler"]


if TYPE_CHECKING:

    class _Base:
        """BaseRequestHandler without the promise that its hooks return None: here they may be ``async def``."""

        lazy: bool
        _is_called_from_outside: bool
        connection_id = BaseRequestHandler.connection_id
        peer = BaseRequestHandler.peer
        draining = BaseRequestHandler.draining
        logger = BaseRequestHandler.logger

        def on_drain(self) -> Any: ...
else:
    _Base = BaseRequestHandler


class AsyncRequestHandler(_Base):
    """Serve one request by coroutines: override ``async def handle``, and ``setup`` and ``finish`` if needed.

    Each of the hooks may be ``async def`` or a plain ``def`` that does not wait. ``setup``, ``handle`` and ``finish``
    run in one task of the event loop, with the connection's own context variables; ``on_drain`` and ``on_timeout`` in
    others.

    Attributes:
        request: the connection: ``await recv(n)``, ``await sendall(data)``, ``close()``, and without ``await`` what
            else a socket has; ``(bytes, socket)`` on a datagram server.
        client_address: where it came from.
        server: the server.
    """

    is_async = True

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        """Serve the request: ``setup``, ``handle``, and whatever happens ``finish``, in a task of the event loop.

        Raises:
            ConfigError: the engine is another.
        """
        self._carried = request
        self.request = request
        self.client_address = client_address
        self.server = server
        if preambles.armed:
            refuse_unentered(server, request)
        if self._is_called_from_outside:
            introduce(self, request)
        try:
            drive(self._serve())
        except asyncio.CancelledError as error:
            if not self._cancelled:
                raise RuntimeError("the handler waited for something that was cancelled") from error

    async def _serve(self) -> None:
        task: Any = asyncio.current_task()
        self._cancelled = False
        if not isinstance(self.request, tuple):
            self.request = AsyncConnection(self.request, task.driver)
        try:
            await _settle(self.setup())
            try:
                await _settle(self.handle())
            finally:
                await _settle(self.finish())
        finally:
            self._cancelled = task.cancelling() > 0

    def setup(self) -> Any:
        """Prepare. May be overridden, also by ``async def``. When it raises, the others are not called."""

    def handle(self) -> Any:
        """Do the work. To be overridden, mostly by ``async def``."""

    def on_timeout(self, which: str) -> Any:
        """Say a last word before a deadline closes the connection. May be overridden, also by ``async def``."""

    def finish(self) -> Any:
        """Clean up. May be overridden, also by ``async def``. Called even when ``handle`` raised."""

    def start_tls(self, tls: Any = None) -> NoReturn:
        """Not for async handlers.

        Raises:
            LifecycleError: always.
        """
        raise LifecycleError(
            "start_tls() needs a handler with a plain `def handle`; serve an async one on tls://, "
            "or by TLS(…, mode='optional') on one port with plain text"
        )

    def call_hook(self, name: str) -> None:
        """Call a hook that runs beside ``handle``, and wait for it if it is to be waited for. In a green thread."""
        drive(_settle(getattr(self, name)()))


async def _settle(result: Any) -> None:
    """Wait for what a hook returned, if it is to be waited for."""
    if isinstance(result, Awaitable):
        await result


class AsyncStreamRequestHandler(AsyncRequestHandler):
    """Serve a stream by ``rfile`` and ``wfile``.

    Read by ``await self.rfile.readline()``, ``read(n)`` (what is there, at most ``n``), ``readexactly(n)``, or ``async
    for line in self.rfile``. ``self.wfile.write(data)`` may be awaited or left; ``await self.wfile.drain()`` waits
    until the peer has taken most of it.

    Attributes:
        timeout: seconds that one operation on the connection may take, or None.
        disable_nagle_algorithm: whether to set TCP_NODELAY.
    """

    timeout: float | None = None
    disable_nagle_algorithm = False

    def setup(self) -> Any:
        """Make ``connection``, ``rfile`` and ``wfile``."""
        self.connection = self.request
        if self.timeout is not None:
            self.connection.settimeout(self.timeout)
        if self.disable_nagle_algorithm:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.rfile, self.wfile = files(self.connection)

    async def finish(self) -> None:
        """Send what ``wfile`` still holds, and close both files."""
        try:
            await self.wfile.sent()
        except OSError:
            pass  # the peer has gone; the handler has said what it had to say
        self.wfile.close()
        self.rfile.close()
