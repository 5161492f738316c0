"""``start``: serve inside a running asyncio or uvloop loop, beside whatever else the program does there."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from harken.drain import Drain, DrainReport
from harken.process.worker import Worker
from harken.records import ConnectionInfo
from harken.settings import warn_of_process

if TYPE_CHECKING:
    import asyncio

__all__ = ["Started", "start"]


async def start(handler: Callable[..., Any], *addresses: str, **settings: Any) -> Started:
    """Serve ``handler`` on every address inside the running asyncio or uvloop loop; return once it serves.

    On the engines ``asyncio`` and ``green`` handlers run in this loop; on the others where they always do.

    Args:
        handler: a handler class. One with ``async def handle`` takes the engine ``asyncio`` unless told otherwise.
        addresses: URLs such as ``tcp://127.0.0.1:8800``, ``unix:/run/echo.sock``, ``udp://:8800``.
        settings: any setting by name; those not given have the defaults of ``serve``. ``loop`` is the running one.

    Returns:
        The server. ``async with`` drains it in the end.

    Raises:
        ConfigError: an address, a setting or the handler is wrong; nothing stays open.
        BindError: an address cannot be had; it is a ConfigError and an OSError; nothing stays open.
    """
    warn_of_process(settings, "harken.start()")
    _warn_of_loop(settings.get("loop"))
    started = Started(Worker(handler, addresses or ("tcp://127.0.0.1:8800",), settings))
    await started._begin()
    return started


def _warn_of_loop(name: str | None) -> None:
    """Warn of a ``loop`` that is not the one which runs, for handlers would be believed to run in it."""
    if name is None:
        return
    import asyncio

    running = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    if name != running:
        said = f"loop = {name!r} is not heeded by harken.start(): the running loop is used, which is {running}'s"
        warnings.warn(said, RuntimeWarning, stacklevel=3)


class Started:
    """A server in a running loop; made by ``harken.start``. Its verbs are for that loop's thread.

    Attributes:
        addresses: the URLs on which it listens, ports filled in.
        server_address: what the first one is bound to, as ``socketserver`` has it.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._engine = worker._engine
        self._servers = worker.servers
        self.addresses = [server.serving.address() for server in worker.servers]
        self.server_address = worker.servers[0].server_address
        self._report: asyncio.Task[DrainReport] | None = None
        worker.on_leaving = self._tell_leaving
        # It waits for the end, and accepts where the engine has no loop of its own.
        self._thread = threading.Thread(target=self._serve, name="harken-start", daemon=True)
        self._error: BaseException | None = None

    async def _begin(self) -> None:
        import asyncio  # whoever declares settings is imported by every command, and few have a loop

        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._over = asyncio.Event()
        self._leave = self._engine.move_in()
        self._thread.start()
        self._last: Any = self._end_with_loop()
        await anext(self._last)
        try:
            await self._ready
        except BaseException:
            await self.close()
            raise

    async def _end_with_loop(self) -> AsyncGenerator[None]:
        """Close a server that nobody has: ``asyncio.run``, for one, ends its loop's generators before it closes it.

        Otherwise the door would stay open, with nobody behind it.
        """
        try:
            yield
        finally:
            if not self._over.is_set():
                await self.close()

    def _serve(self) -> None:
        try:
            with ExitStack() as attached:
                for server in self._servers:
                    attached.enter_context(server.serving.attached())
                self._tell(None)
                self._engine.run(lambda: self._worker._stopping, self._worker._tick, self._worker._patience)
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the server
            self._error = error
            self._tell(error)

    def _tell(self, error: BaseException | None) -> None:
        def tell() -> None:
            if not self._ready.done():
                if error is None:
                    self._ready.set_result(None)
                else:
                    self._ready.set_exception(error)
            elif error is not None:
                self._over.set()

        try:
            self._loop.call_soon_threadsafe(tell)
        except RuntimeError:
            pass  # the loop was closed: nobody waits

    async def serve_forever(self) -> None:
        """Wait until the server is drained or closed, by another task; when this one is cancelled, close it.

        Raises:
            BaseException: what ended the server.
        """
        import asyncio

        try:
            await self._over.wait()
        except asyncio.CancelledError:
            await self.close()
            raise
        if self._error is not None:
            raise self._error

    async def drain(self, timeout: float | None = None) -> DrainReport:
        """Serve what has arrived, close the listeners, wait for open connections, cut what is left.

        When a drain is under way, wait for its end, which comes no later than asked for here.

        Args:
            timeout: seconds to wait; None takes the setting ``drain_timeout``.
        """
        import asyncio

        seconds = self._worker.settings["drain_timeout"] if timeout is None else timeout
        own = [record for server in self._servers for record in server.serving.own_records()]
        for each in self._worker.leave(seconds, own):
            each.shorten(seconds)
        return await asyncio.shield(self._follow())

    def _tell_leaving(self) -> None:
        """A drain begins: by :meth:`drain`, or by a verb of a server, in a handler or another thread."""
        try:
            self._loop.call_soon_threadsafe(self._follow)
        except RuntimeError:
            pass  # the loop was closed: nobody waits

    def _follow(self) -> asyncio.Task[DrainReport]:
        import asyncio

        if self._report is None:
            self._report = asyncio.ensure_future(self._end(self._worker.leave()))
        return self._report

    async def close(self) -> None:
        """Stop now, a drain too: cut every connection."""
        await self.drain(0.0)

    async def _end(self, drains: Sequence[Drain]) -> DrainReport:
        """Wait for the drain, which runs in a thread: the loop goes on, and its handlers with it."""
        import asyncio

        try:
            try:
                reports = [await asyncio.to_thread(each.join, math.inf, ()) for each in drains]
                if self._worker.sees_off:
                    await asyncio.to_thread(self._worker.await_end)
                await asyncio.to_thread(self._thread.join)
            finally:
                await self._leave()  # before the servers close, which looks whether handlers are left
            await asyncio.to_thread(self._worker.close)
        finally:
            self._over.set()
            if not self._last.ag_running:
                await self._last.aclose()
        return DrainReport.of_all(reports)

    def suspend(self) -> None:
        """Stop accepting; new connections wait in the backlog, open ones go on."""
        for server in self._servers:
            server.suspend()

    def resume(self) -> None:
        """Accept again after ``suspend()``."""
        for server in self._servers:
            server.resume()

    def connections(self) -> list[ConnectionInfo]:
        """Describe the open connections of all addresses, oldest first."""
        return sorted(
            (info for server in self._servers for info in server.connections()), key=lambda info: info.opened_at
        )

    def close_connection(self, id: str, reason: str = "killed") -> bool:
        """Cut the connection of this id; tell whether it was open."""
        return any(server.close_connection(id, reason) for server in self._servers)

    def configure(self, **changes: Any) -> None:
        """Change live settings.

        Raises:
            ConfigError: a setting is unknown, not live, or its value is not allowed; nothing was changed.
        """
        self._worker.configure(changes)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return figures since the start, by address; see the reference of ``stats()``."""
        return {server.serving.address(): server.stats() for server in self._servers}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain()
