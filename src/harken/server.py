"""The servers: ``socketserver``'s classes, hooks and order.

What happens to a connection stands here; when and where it happens is the engine's. Each hook says who may override
it, in which thread it runs, when, and what its failure does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Self

from harken import preambles, straight
from harken.connection import Connection, accept, read_off
from harken.drain import DrainReport
from harken.entry import refuse_unentered
from harken.errors import PreambleError
from harken.lifecycle import Latch
from harken.listener import Holding, Listener, note_inode, unlink_if_own
from harken.records import ConnectionInfo
from harken.serving import RunningSide, serving_of
from harken.settings import warn_of_process
from harken.stacks import foreign_loop
from harken.transports import bind_options, for_socket

__all__ = ["BaseServer", "TCPServer", "UDPServer", "UnixDatagramServer", "UnixStreamServer"]


class BaseServer:
    """A server without a socket: the hooks and their order.

    For the caller: ``serve_forever``, ``shutdown``, ``handle_request``, ``server_close``, ``fileno``, and harken's
    verbs ``suspend``, ``resume``, ``drain``, ``wait_ready``, ``connections``, ``close_connection``, ``configure``,
    ``stats``, which may be called from any thread, from a handler and from a signal handler.

    May be overridden: ``server_bind``, ``server_activate``, ``get_request``, ``handle_timeout``, ``verify_request``,
    ``process_request``, ``process_request_thread``, ``finish_request``, ``shutdown_request``, ``close_request``,
    ``service_actions``, ``handle_error``, ``server_close``.

    Attributes:
        timeout: seconds that ``handle_request`` waits, or None.
        server_address: what was given, then what was bound.
        RequestHandlerClass: called as ``(request, client_address, server)`` for each request.
        socket: the listening socket; may be replaced.
    """

    _harken = RunningSide()
    timeout: float | None = None
    engine: str | None = None  # ends the look-up: a mix-in that stands behind the server class has no say, as in stdlib

    def __init__(self, server_address: Any, RequestHandlerClass: Callable[..., Any], **settings: Any) -> None:
        """Make a server. May be extended.

        Args:
            server_address: kept as it is.
            RequestHandlerClass: called for each request.
            settings: any setting by name.

        Raises:
            ConfigError: a setting is unknown or has a value that is not allowed.
        """
        self.server_address = server_address
        self.RequestHandlerClass = RequestHandlerClass
        self.__is_shut_down = Latch(owned=True)
        self.__shutdown_request = False
        if settings:
            serving_of(self, settings)
            warn_of_process(settings, "a server class")

    def server_activate(self) -> None:
        """Begin to listen. May be overridden. Called by the constructor."""

    def serve_forever(self, poll_interval: float | None = 0.5) -> None:
        """Serve until ``shutdown()``.

        Several threads may serve one server at once. Each connection passes ``_handle_request_noblock``; after each,
        and at least every ``poll_interval`` seconds, ``service_actions`` is called.

        Args:
            poll_interval: seconds between calls of ``service_actions``, None for no such calls in between;
                ``shutdown()`` does not wait for it.

        Raises:
            LifecycleError: the server drains, or is closed and was given no other socket.
            OSError: the socket is no listener.
            BaseException: what a hook raises beyond ``Exception``, or ``handle_error`` raises, leaves the loop.
        """
        serving = self._harken
        self.__is_shut_down.clear()
        try:
            serving.run(lambda: self.__shutdown_request, poll_interval)
        finally:
            if serving.last_loop:
                self.__shutdown_request = False
                self.__is_shut_down.set()

    def shutdown(self) -> None:
        """Stop ``serve_forever`` and return when it has ended.

        It wakes the loop at once. Called from the serving thread itself (a handler of a plain server, a signal handler)
        or when nothing is served, it does not wait. Before ``serve_forever`` it makes that return at once.
        """
        self.__shutdown_request = True
        serving = self._harken
        serving.wake()
        done: Any = self.__is_shut_down  # an Event of stdlib's on a grafted class, a test's double …
        if serving.in_loop:
            return
        if isinstance(done, Latch) and not done.begun:
            return
        if not isinstance(done, Latch) and serving.last_loop and not foreign_loop(self):
            return
        done.wait()

    def __request_shutdown(self) -> None:
        self.__shutdown_request = True

    def service_actions(self) -> None:
        """Do regular work. May be overridden. Serving thread; once a turn of the loop and after each request."""

    def handle_request(self) -> None:
        """Serve one request, waiting for it as long as the smaller of ``timeout`` and the socket's own timeout.

        Works without ``serve_forever``. When the time is over ``handle_timeout`` is called.
        """
        timeout = self.socket.gettimeout()  # type: ignore[attr-defined]
        if timeout is None:
            timeout = self.timeout
        elif self.timeout is not None:
            timeout = min(timeout, self.timeout)
        deadline = None if timeout is None else monotonic() + timeout
        with self._harken.option("selector")() as selector:
            selector.register(self, 1)  # EVENT_READ
            while True:
                admission = self._harken.intake.admission
                if admission is not None and not admission.wait_room(timeout):
                    self.handle_timeout()
                    return
                if selector.select(timeout):
                    self._handle_request_noblock()
                    return
                if deadline is not None:
                    timeout = deadline - monotonic()
                    if timeout < 0:
                        self.handle_timeout()
                        return

    def _handle_request_noblock(self) -> bool:
        """Take one connection through the hooks. Loops of programs call it too, and programs override it.

        ``straight.py`` goes the same way without the calls where no hook is overridden: a step more here is one there.

        Returns:
            Whether a connection was taken.
        """
        serving = self._harken
        try:
            request, client_address = self.get_request()  # type: ignore[attr-defined]
        except OSError as error:
            return serving.acceptor.failed(error)
        record = serving.books.accepted(request, client_address)
        try:
            if serving.bounds.admission is not None and not serving.intake.admit(record, request, client_address):
                return True
            entry = serving.entry
            if entry is not None and entry.tells_client:
                serving.books.held(record)  # whose connection it is, and so verify_request, comes later
            elif self.verify_request(request, client_address):
                serving.books.opened(record, client_address)
            else:
                serving.books.rejected(record, client_address, "verify_request")
                self.shutdown_request(request)
                return True
            self.process_request(request, client_address)
        except Exception as error:  # noqa: BLE001 - every fault of one request is handle_error's
            serving.books.failed(request, client_address, error)
            self.handle_error(request, client_address)
            self.shutdown_request(request)
        except:
            if serving.engine.in_loop:
                self.shutdown_request(request)
            else:
                serving.intake.broken_off(request)
            raise
        return True

    def handle_timeout(self) -> None:
        """Nothing came within ``timeout``. May be overridden. Called by ``handle_request`` alone."""

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Tell whether to serve this request. May be overridden. Serving thread; after ``get_request``.

        False closes the request. What it raises goes to ``handle_error``.
        """
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand the request to where handlers run. May be overridden. Serving thread; after ``verify_request``."""
        serving = self._harken
        if not serving.engine.in_loop:
            self._process_elsewhere(request, client_address)
        elif serving.entry is None:
            begun = monotonic()
            try:
                self.finish_request(request, client_address)
            finally:
                if serving.books.meter is not None:
                    serving.books.meter.handled(begun)
            self.shutdown_request(request)
        else:
            _enter(self, BaseServer.process_request_thread.__get__(self), request, client_address)

    def _process_elsewhere(self, request: Any, client_address: Any) -> None:
        serving = self._harken
        engine = serving.engine
        serve = self.process_request_thread
        if serving.entry is not None:
            serve = partial(_enter, self, serve)
        if engine.in_child:
            try:
                serving.children.serve(serve, request, client_address)
            except OSError as error:
                serving.acceptor.starved(error)
                raise
            self.close_request(request)
        else:
            if type(request) is not engine.connection:  # a program accepted it by itself
                accepted, request = request, engine.adopt(request)
                if request is not accepted:
                    serving.books.moved(accepted, request)
            lazy = serving.entry is None and getattr(getattr(self, "RequestHandlerClass", None), "lazy", False)
            try:
                (engine.spawn_on_data if lazy else engine.spawn)(serve, request, client_address)
            except RuntimeError as error:
                serving.acceptor.starved(error)
                raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one request where the engine runs handlers: its thread, its child. May be overridden."""
        entry = self._harken.entry
        if entry is not None and not entry.passed(request):  # a program's own process_request() called this
            _enter(self, self.process_request_thread, request, client_address)
            return
        record = getattr(request, "record", None)
        if record is not None:
            record.thread = threading.get_ident()
        begun = monotonic()
        try:
            self.finish_request(request, client_address)
        except BaseException as error:
            self._harken.books.failed(request, client_address, error)
            if not isinstance(error, Exception):
                raise
            self.handle_error(request, client_address)
        finally:
            if self._harken.books.meter is not None:
                self._harken.books.meter.handled(begun)
            self.shutdown_request(request)

    def server_close(self) -> None:
        """Let go of what the server holds. May be overridden."""
        serving = self._harken
        if not serving.last_loop:  # while the loop's poll() holds the listener, its port would not be free
            self.__shutdown_request = True
            if serving.let_go():
                BaseServer.shutdown(self)  # in the loop itself, also in a handler that runs there, it does not wait
        serving.close()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Call ``RequestHandlerClass(request, client_address, self)``. May be overridden. The handler's thread."""
        if preambles.armed:
            refuse_unentered(self, request)
        deadlines = self._harken.bounds.deadlines
        if deadlines is None or not isinstance(request, tuple):
            self.RequestHandlerClass(request, client_address, self)
            return
        number = deadlines.begin_datagram(client_address)
        try:
            self.RequestHandlerClass(request, client_address, self)
        finally:
            deadlines.end_datagram(number)

    def shutdown_request(self, request: Any) -> None:
        """End a request. May be overridden. The handler's thread; after the handler and ``handle_error``."""
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Let go of a request. May be overridden. The handler's thread, or the parent's with the fork engine."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what a handler raised, the request still being open. May be overridden. The handler's thread.

        Prints to stderr as stdlib does, unless harken's log writes it. A peer that went away is one line.
        """
        if self._harken.logged:
            return
        error = sys.exc_info()[1]
        books = self._harken.books
        if books.excused(request, error):
            if not books.interrupted:  # whoever pressed Ctrl-C knows that it was not the client
                sys.stderr.write(f"harken: {client_address} went away: {error}\n")
            return
        import traceback

        print("-" * 40, file=sys.stderr)
        print("Exception occurred during processing of request from", client_address, file=sys.stderr)
        traceback.print_exc()
        print("-" * 40, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.server_close()

    # -- harken's own verbs --------------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Stop accepting; new connections wait in the backlog, open ones go on.

        Raises:
            LifecycleError: the server does not serve.
        """
        self._harken.suspend()

    def resume(self) -> None:
        """Accept again after ``suspend()``.

        Raises:
            LifecycleError: the server is not suspended.
        """
        self._harken.resume()

    def drain(self, timeout: float | None = None) -> DrainReport:
        """Serve what has arrived, close the listener, wait for open connections, cut what is left.

        Args:
            timeout: seconds to wait; None takes the setting ``drain_timeout``.

        Returns:
            A :class:`harken.DrainReport`: how many ended by themselves, how many left, and which were cut.
        """
        return self._harken.drain(timeout, partial(BaseServer.__request_shutdown, self))

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until a loop serves; tell whether one does, at the latest after ``timeout`` seconds."""
        return self._harken.ready.wait(timeout)

    def connections(self) -> list[ConnectionInfo]:
        """Describe the open connections, oldest first."""
        serving = self._harken
        serving.take_stock()
        return [record.info() for record in sorted(serving.connections, key=lambda record: record.started)]

    def close_connection(self, id: str, reason: str = "killed") -> bool:
        """Cut the connection of this id; its handler reads the end.

        Args:
            id: as in ``connections()`` and ``self.connection_id``.
            reason: one of the reasons of ``closed``; other text is its ``detail``, and the reason ``killed``.

        Returns:
            Whether it was open.
        """
        return self._harken.close_connection(id, reason)

    def configure(self, **changes: Any) -> None:
        """Change live settings.

        Raises:
            ConfigError: a setting is unknown, not live, or its value is not allowed; nothing was changed.
        """
        self._harken.configure(changes)

    def stats(self) -> dict[str, Any]:
        """Return figures since the start.

        ``state, address, engine, open, accepted_total, rejected_total, rejected_by_reason, handler_failed_total``,
        ``closed_total`` (by reason), ``buffered_bytes`` (what harken holds for connections beyond 128 KiB each, counted
        while ``max_write_buffer`` or ``max_memory_bytes`` is set), ``stalled_total`` (by place, of all servers that
        share the engine), ``paused`` and ``process``.
        """
        return self._harken.stats()


def _enter(server: BaseServer, serve: Callable[[Any, Any], object], request: Any, client_address: Any) -> None:
    """Take a connection through its preambles, there where its handler runs, and then ``serve`` it."""
    entry = server._harken.entry
    passed = entry.enter(request, client_address) if entry is not None else (request, client_address)
    if passed is not None:
        serve(*passed)


class TCPServer(BaseServer):
    """A server of stream connections.

    Attributes:
        address_family: of the listening socket.
        socket_type: of the listening socket.
        request_queue_size: the backlog. Left at 5 harken listens with SOMAXCONN: with 5, and SYN cookies, Linux can
            lose the first bytes of a stream.
        allow_reuse_address: whether to set SO_REUSEADDR.
        allow_reuse_port: whether to set SO_REUSEPORT (IPv4 and IPv6 alone).
    """

    address_family = socket.AF_INET
    socket_type = socket.SOCK_STREAM
    request_queue_size = 5
    allow_reuse_address = False
    allow_reuse_port = False

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Callable[..., Any],
        bind_and_activate: bool = True,
        **settings: Any,
    ) -> None:
        """Make a server, bind it and listen. May be extended.

        Args:
            server_address: what ``bind`` takes for this family.
            RequestHandlerClass: called for each request.
            bind_and_activate: False leaves ``server_bind`` and ``server_activate`` to the caller.
            settings: any setting by name.

        Raises:
            OSError: the address cannot be bound; nothing is left open.
            ConfigError: a setting is unknown or has a value that is not allowed.
        """
        BaseServer.__init__(self, server_address, RequestHandlerClass, **settings)
        self.socket = socket.socket(self.address_family, self.socket_type)
        if bind_and_activate:
            try:
                self.server_bind()
                self.server_activate()
                _ = self._harken.entry  # a certificate that cannot be read is told here, and not to the first client
            except:
                self.server_close()
                raise

    def server_bind(self) -> None:
        """Bind the socket. May be overridden. Called by the constructor."""
        settings = self._harken.settings
        if settings["allow_reuse_address"] and hasattr(socket, "SO_REUSEADDR"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if settings["reuse_port"] and self.address_family in (socket.AF_INET, socket.AF_INET6):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if settings["nodelay"] is not None or settings["keepalive"] is not None:
            for_socket(self.socket).tune(self.socket, bind_options(settings))
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self._harken.holding = Holding(self.socket)

    def server_activate(self) -> None:
        """Listen. May be overridden. Called by the constructor."""
        self.socket.listen(self._harken.settings["backlog"])

    def server_close(self) -> None:
        """Close the listener, so that its port is free, and wait for handlers as ``block_on_close`` says.

        May be overridden.
        """
        BaseServer.server_close(self)
        self.socket.close()
        self._harken.join()

    def fileno(self) -> int:
        """Return the listener's descriptor of the moment, for selectors."""
        return self.socket.fileno()

    def get_request(self) -> tuple[Any, Any]:
        """Take a connection: ``(request, client_address)``. May be overridden. Serving thread.

        An OSError is looked up in the acceptor's table and never leaves the loop, unless the socket is no listener.
        """
        serving = self._harken
        if serving.shared:
            return serving.intake.take_turns(partial(accept, self.socket, serving.engine.connection))
        return accept(self.socket, serving.engine.connection)

    get_request.bursts = True  # type: ignore[attr-defined]  # may be called again while the listener is readable

    def shutdown_request(self, request: Any) -> None:
        """Tell the peer that nothing more comes (SHUT_WR), then ``close_request``. May be overridden."""
        record = (
            getattr(request, "record", None)
            if isinstance(request, Connection)
            else self._harken.connections.find(request)
        )
        early = False
        if record is not None:
            request = record.successor or request
            early = record.was_ended
            record.judge(request)
        part = getattr(type(request), "part", None)  # under TLS there is a goodbye
        try:
            if part is None:
                request.shutdown(socket.SHUT_WR)
            else:
                part(request)
        except OSError:
            pass  # the peer, or the handler, was quicker
        if early:
            read_off(request)
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Close a connection. May be overridden."""
        request.close()
        if not hasattr(type(request), "record"):  # it does not tell by itself
            self._harken.books.ended(request)


straight.stock(BaseServer)
straight.stock(TCPServer)


class UDPServer(TCPServer):
    """A server of datagrams: ``request`` is ``(bytes, socket)``.

    Attributes:
        max_packet_size: largest datagram in bytes. Left at 8192 harken takes 65535, so that none is cut.
    """

    allow_reuse_address = False
    allow_reuse_port = False
    socket_type = socket.SOCK_DGRAM
    max_packet_size = 8192

    def server_activate(self) -> None:
        """Nothing: datagrams need no listen()."""

    def get_request(self) -> tuple[Any, Any]:
        """Take a datagram: ``((data, socket), client_address)``. May be overridden. Serving thread."""
        intake = self._harken.intake
        taken = intake.datagrams.fed()
        if taken is not None:
            return taken
        if self._harken.shared:
            return intake.take_turns(partial(_receive, self))
        return _receive(self)

    get_request.bursts = True  # type: ignore[attr-defined]
    get_request.batches = True  # type: ignore[attr-defined]  # several may be taken from the kernel at once

    def shutdown_request(self, request: Any) -> None:
        """Nothing to shut. May be overridden."""
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Nothing to close. May be overridden."""


def _receive(server: UDPServer) -> tuple[Any, Any]:
    listener = server.socket
    serving = serving_of(server)
    size = serving.packet_size(server.max_packet_size)
    if hasattr(listener, "recvmsg"):
        # Of several processes that wait for one datagram all wake, and only one gets it; a program's own socket waits.
        wait = socket.MSG_DONTWAIT if isinstance(listener, Listener) else 0
        data, _, flags, address = listener.recvmsg(size, 0, wait)
        if flags & socket.MSG_TRUNC:
            serving.books.truncated(address, size)
    else:
        data, address = listener.recvfrom(size)
    proxy = serving.datagram_proxy
    if proxy is None:
        return (data, listener), address
    try:
        data, client = proxy.take(data, address)
    except PreambleError as error:
        serving.books.rejected(None, address, "preamble_failed", str(error))
        raise BlockingIOError(str(error)) from None  # as if it had not come
    return (data, proxy.answering(listener)), client


if hasattr(socket, "AF_UNIX"):

    def _bind_path(server: TCPServer, bind: Callable[[], None]) -> None:
        from harken.transports import unix

        path = server.server_address
        unix.claim(path)
        bind()
        vars(server)["_harken_inode"] = note_inode(path), os.getpid()

    def _unlink_path(server: TCPServer) -> None:
        inode, process = vars(server).pop("_harken_inode", (None, 0))
        if process == os.getpid():  # a child that lets go of the listener leaves it to the parent
            unlink_if_own(server.server_address, inode)

    class UnixStreamServer(TCPServer):
        """A server of stream connections on a Unix path.

        A path that a dead server left is taken over; on close the path is removed if it is still this server's.
        """

        address_family = socket.AF_UNIX

        def server_bind(self) -> None:
            """Bind the path. May be overridden."""
            _bind_path(self, lambda: TCPServer.server_bind(self))

        def server_close(self) -> None:
            """Remove the path and close the listener. May be overridden."""
            _unlink_path(self)
            super().server_close()

    class UnixDatagramServer(UDPServer):
        """A server of datagrams on a Unix path; see :class:`UnixStreamServer`."""

        address_family = socket.AF_UNIX

        def server_bind(self) -> None:
            """Bind the path. May be overridden."""
            _bind_path(self, lambda: TCPServer.server_bind(self))

        def server_close(self) -> None:
            """Remove the path and close the socket. May be overridden."""
            _unlink_path(self)
            super().server_close()
