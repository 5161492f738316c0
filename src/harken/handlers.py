"""The request handlers: one instance a request, whose constructor runs ``setup``, ``handle`` and ``finish``."""

from __future__ import annotations

import socket
from collections.abc import Callable
from io import BufferedIOBase, BytesIO
from typing import Any, Generic, TypeVar, overload

import harken
from harken import preambles
from harken.entry import refuse_unentered
from harken.expiry import introduce
from harken.peer import Peer
from harken.records import Record
from harken.serving import Serving
from harken.transports import for_socket

__all__ = ["BaseRequestHandler", "DatagramRequestHandler", "StreamRequestHandler"]

T = TypeVar("T")

# Where the hooks stand that do nothing.
_OWN = ("harken.handlers", "harken.async_handlers")


class _Lazy(Generic[T]):
    """An attribute worked out when first read. A handler that sets one of the same name for itself wins.

    None before ``BaseRequestHandler.__init__``: there programs look through ``dir(self)``, for their commands.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> _Lazy[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return self
        return self._function(instance) if hasattr(instance, "request") else None


class _Kept(_Lazy[T]):
    """The same, kept: it is worked out once."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> Any:
        value = super().__get__(instance, owner)
        return value if instance is None or value is None else vars(instance).setdefault(self._name, value)


def _serving(handler: Any) -> Serving | None:
    """The running side of the handler's server; None on a server that is not harken's, and in unit tests on fakes."""
    serving = getattr(handler.server, "_harken", None)
    return serving if isinstance(serving, Serving) else None


def _carrier(handler: Any) -> Any:
    """The request as the server knows it: an async handler's own is another around it."""
    return getattr(handler, "_carried", handler.request)


def _record(handler: Any) -> Record | None:
    serving = _serving(handler)
    return serving.connections.find(_carrier(handler)) if serving is not None else None


def _peer(handler: Any) -> Peer:
    record, serving = _record(handler), _serving(handler)
    if record is not None:
        return record.peer
    if serving is not None:
        return serving.books.describe(handler.request, handler.client_address)  # type: ignore[no-any-return]
    carrier = handler.request[-1] if isinstance(handler.request, tuple) else _carrier(handler)
    return for_socket(carrier).describe(carrier, handler.client_address)


class BaseRequestHandler:
    """Serve one request: override ``handle``, and ``setup`` and ``finish`` if needed.

    Attributes:
        request: the connection, or ``(bytes, socket)`` on a datagram server.
        client_address: where it came from.
        server: the server.
        lazy: whether the handler waits for the client to speak first in any case, and so need not be started before:
            on the green engine a connection then costs a tenth until its first bytes come.
    """

    lazy = False

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        """Serve the request: ``setup``, ``handle``, and whatever happens ``finish``, in the engine's thread."""
        self.request = request
        self.client_address = client_address
        self.server = server
        if preambles.armed:
            refuse_unentered(server, request)
        if self._is_called_from_outside:
            introduce(self, request)
        self.setup()
        try:
            self.handle()
        finally:
            self.finish()

    _is_called_from_outside = False
    """Whether the class overrides a hook that others than its own thread call."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls._is_called_from_outside = any(hook.__module__ not in _OWN for hook in (cls.on_timeout, cls.on_drain))

    def on_timeout(self, which: str) -> Any:
        """Say a last word before the connection is closed because a deadline is over. May be overridden.

        It is called beside ``handle``, which still waits: in a thread of harken's own, or in a green thread. After it
        has returned, or after a second, the connection is closed, and ``handle`` reads the end.

        Args:
            which: ``idle_timeout``, ``read_timeout``, ``write_timeout``, ``lifetime`` or ``handler_timeout``.
        """

    def setup(self) -> None:
        """Prepare. May be overridden. When it raises, ``handle`` and ``finish`` are not called."""

    def handle(self) -> None:
        """Do the work. To be overridden."""

    def finish(self) -> None:
        """Clean up. May be overridden. Called even when ``handle`` raised."""

    def start_tls(self, tls: Any = None) -> socket.socket:
        """Go on under TLS, as the server; the client has been told to begin (STARTTLS).

        Replaces ``self.request``, and on a stream handler ``connection``, ``rfile`` and ``wfile``. The handshake must
        be done within ``preamble_timeout``.

        Args:
            tls: a :class:`harken.TLS` or an ``ssl.SSLContext``; None takes what the server was given.

        Returns:
            The new ``self.request``, an ``ssl.SSLSocket``.

        Raises:
            PreambleError: the handshake failed, or plain text had been sent ahead of it. Let it pass: it ends the
                connection, for the reason ``preamble_failed`` and without a traceback.
            LifecycleError: the connection is under TLS already, or the server has no certificate.
        """
        from harken.starttls import start_tls

        return start_tls(self, tls)

    def on_drain(self) -> Any:
        """The server drains: say goodbye to the client, or note that ``handle`` is to end soon. May be overridden.

        It is called once for each open connection, while ``handle`` goes on: on the green engine in a green thread
        beside the handler's, with ``asyncio`` in a task of the loop, elsewhere in another thread; so it may send on
        ``request``, and must not read. After it, an idle connection is asked to leave. What it raises is reported as
        what ``handle`` raises, and ends nothing.
        """

    def call_hook(self, name: str) -> None:
        """Call a hook that runs beside ``handle``."""
        getattr(self, name)()

    @_Lazy
    def connection_id(self) -> str | None:
        """The connection's id, as in events, logs and ``connections()``; None for a datagram."""
        record = _record(self)
        return record.id if record else None

    @_Lazy
    def peer(self) -> Peer:
        """The far end, a :class:`harken.Peer`."""
        return _peer(self)

    @_Lazy
    def draining(self) -> bool:
        """Whether the server drains, so that a handler should come to its end."""
        serving = _serving(self)
        return serving is not None and serving.draining

    @_Lazy
    def logger(self) -> Any:
        """A logger whose records carry the connection's id and peer."""
        import logging

        return logging.LoggerAdapter(
            logging.getLogger("harken.handler"), {"connection": self.connection_id, "peer": str(self.peer)}
        )


class StreamRequestHandler(BaseRequestHandler):
    """Serve a stream by ``rfile`` and ``wfile``.

    Attributes:
        rbufsize: buffer of ``rfile`` in bytes; -1 takes the default, 0 reads unbuffered.
        wbufsize: buffer of ``wfile`` in bytes; 0 sends each write at once.
        timeout: seconds that one operation on the connection may take, or None.
        disable_nagle_algorithm: whether to set TCP_NODELAY.
    """

    rbufsize = -1
    wbufsize = 0
    timeout: float | None = None
    disable_nagle_algorithm = False

    def setup(self) -> None:
        """Make ``connection``, ``rfile`` and ``wfile``."""
        self.connection = self.request
        if self.timeout is not None:
            self.connection.settimeout(self.timeout)
        if self.disable_nagle_algorithm:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self._open_files()

    def _open_files(self) -> None:
        self.rfile = _reader(self.connection, self.rbufsize)
        if self.wbufsize == 0:
            self.wfile: Any = _writer(self.connection, self.rfile)
        else:
            self.wfile = self.connection.makefile("wb", self.wbufsize)

    def finish(self) -> None:
        """Send what ``wfile`` still holds, and close both files."""
        if not self.wfile.closed:
            try:
                self.wfile.flush()
            except OSError:
                pass  # the peer has gone; the handler has said what it had to say
        self.wfile.close()
        self.rfile.close()


class _SocketWriter(BufferedIOBase):
    """``wfile`` without a buffer: each write is a ``sendall``."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, b: Any) -> int:
        """Send all of ``b``; return its length in bytes."""
        self._sock.sendall(b)
        with memoryview(b) as view:
            return view.nbytes

    def fileno(self) -> int:
        """Return the connection's descriptor."""
        return self._sock.fileno()


_plain_write = _SocketWriter.write


def _reader(connection: Any, size: int) -> Any:
    """``rfile``: of the connection's own kind where it has one, unless nothing may be read ahead."""
    open_reader = getattr(type(connection), "open_reader", None)  # of the type: a test's double has every attribute
    if open_reader is None or size == 0:
        return connection.makefile("rb", size)
    return open_reader(connection, size)


def _writer(connection: Any, reader: Any) -> Any:
    """``wfile`` without a buffer: of the connection's own kind where it has one.

    Programs replace ``_SocketWriter`` in the module they call ``socketserver``, and its ``write``: then it is theirs.
    """
    kind: Any = harken._SocketWriter
    if kind is _SocketWriter and kind.write is _plain_write:
        open_writer = getattr(type(connection), "open_writer", None)
        if open_writer is not None:
            return open_writer(connection, reader)
    return kind(connection)


class DatagramRequestHandler(BaseRequestHandler):
    """Serve a datagram by ``rfile`` and ``wfile``; what was written is sent back as one datagram by ``finish``."""

    def setup(self) -> None:
        """Make ``packet``, ``socket`` and ``wfile``; ``rfile`` comes into being when it is first read."""
        self.packet, self.socket = self.request
        self.wfile = BytesIO()

    @_Kept
    def rfile(self) -> BytesIO:
        """The datagram as a file."""
        return BytesIO(self.packet)

    def finish(self) -> None:
        """Send the answer, empty or not. A client that has gone, or has no address to answer to, is no error."""
        if not self.client_address:
            return
        try:
            self.socket.sendto(self.wfile.getvalue(), self.client_address)
        except (ConnectionRefusedError, FileNotFoundError):
            pass
