"""What a connection passes between its acceptance and its handler, there where the handler will run.

Only servers with preambles have an entry; the others keep stdlib's order, at stdlib's cost.
"""

from __future__ import annotations

import errno
import socket
from time import monotonic
from typing import TYPE_CHECKING, Any

from harken import preambles
from harken.connection import receive_now, shut
from harken.errors import ConfigError, LifecycleError, PreambleError
from harken.preambles import Preamble
from harken.records import Record
from harken.unpatched import Socket

if TYPE_CHECKING:
    from harken.books import Books
    from harken.serving import Serving

__all__ = ["Entry", "entry_of", "refuse_unentered"]

# Bytes that are read from a peer that is refused: more than one sends before it hears of that.
MAX_READ_OUT = 256 << 10


def entry_of(serving: Serving) -> Entry | None:
    """Return the entry of a server, or None when it wants no preambles.

    Raises:
        ConfigError: a setting of a preamble is wrong.
    """
    listener = getattr(serving.server, "socket", None)
    if getattr(listener, "type", socket.SOCK_STREAM) == socket.SOCK_DGRAM:
        _ = serving.datagram_proxy  # checks its settings; datagrams have nothing that comes first
        if serving.settings.find("tls").source == "keyword argument" and serving.settings.profile == "drop-in":
            raise ConfigError("tls is for streams: this server takes datagrams, which would go in plain text")
        return None
    wanted = preambles.resolve(serving.settings, listener)
    if serving.settings.profile == "drop-in":  # where there are several listeners, one of them is enough
        preambles.refuse_plain_text(serving.settings, [listener])
    if not wanted:
        return None
    preambles.arm()
    return Entry(serving, wanted, serving.settings["preamble_timeout"])


class Entry:
    """The preambles of one server, and what had to wait for them.

    Attributes:
        preambles: in the order in which they run.
        timeout: seconds that they may take together.
        tells_client: whether one of them learns the client's address; ``verify_request`` and limits by address wait.
    """

    def __init__(self, serving: Serving, wanted: tuple[Preamble, ...], timeout: float) -> None:
        self.preambles = wanted
        self.timeout = timeout
        self.tells_client = any(preamble.tells_client for preamble in wanted)
        self._serving = serving

    def refresh(self) -> None:
        """Let preambles look after what they share; before a child is forked, who would do so for itself alone."""
        for preamble in self.preambles:
            getattr(preamble, "refresh", _nothing)()

    def reload(self) -> bool:
        """Let preambles read their files anew, for connections to come; tell whether all could."""
        done = [getattr(preamble, "reload", _succeed)() for preamble in self.preambles]
        return all(done)

    def passed(self, request: Any) -> bool:
        """Tell whether the preambles of ``request`` have run, so that it may have a handler."""
        record = self._serving.connections.find(request)
        return record is not None and record.entered

    def enter(self, request: Any, client_address: Any) -> tuple[Any, Any] | None:
        """Take a connection through the preambles. In the thread, child or green thread of its handler.

        Returns:
            The request and the client's address for the handler; None when the connection was refused, and is closed.
        """
        server, books = self._serving.server, self._serving.books
        record = self._serving.connections.find(request)
        try:
            passed = self._run(record, request)
        except OSError as error:
            passed = getattr(error, "connection", None) or request
            note_failure(books, record, error, self.timeout)
        except Exception as error:  # noqa: BLE001 - a fault of ours or of the program's, as in a handler
            passed = (record is not None and record.request) or request
            books.failed(passed, client_address, error)
            try:
                server.handle_error(passed, client_address)
            except BaseException:
                server.shutdown_request(passed)
                raise
        except BaseException:
            passed = (record is not None and record.request) or request
            shut(passed)
            server.shutdown_request(passed)
            raise
        else:
            if not self.tells_client and (record is None or record.report is None):
                return passed, client_address
            return self._introduce(record, passed, client_address)
        self._drop(passed)
        return None

    def _introduce(self, record: Record | None, request: Any, client_address: Any) -> tuple[Any, Any] | None:
        """The preambles have run: ask and tell whoever had to wait for what they learned."""
        address = client_address if record is None or record.spoken_for is None else record.spoken_for
        refusal = self._refusal(record)
        self._known(record, address)
        if refusal is not None:
            self._serving.intake.refuse(record, request, address, refusal)
            return None
        if self._welcome(record, request, address):
            return request, address
        self._drop(request)
        return None

    def _drop(self, request: Any) -> None:
        _read_out(request)
        self._serving.server.shutdown_request(request)

    def _run(self, record: Record | None, request: Any) -> Any:
        if record is None or not hasattr(request, "recv"):
            raise ConfigError(
                f"a preamble (TLS, PROXY) needs a socket, and get_request() returned {type(request).__name__}; "
                "return the accepted socket, or serve without preambles"
            )
        record.in_preamble = True
        begun = monotonic()
        deadline = begun + self.timeout
        for preamble in self.preambles:
            try:
                request = preamble(request, deadline)
            except OSError as error:
                _follow(record, getattr(error, "connection", None) or request)
                raise
            _follow(record, request)
        record.entered = True
        record.in_preamble = False
        if self._serving.books.meter is not None:
            self._serving.books.meter.entered(begun)
        if self._serving.bounds.deadlines is not None:
            self._serving.bounds.deadlines.entered(record)
        return request

    def _known(self, record: Record | None, address: Any) -> None:
        """Tell that the connection opened, if that waited for the client's address; a child tells its parent."""
        if record is None:
            return
        if record.report is not None and record.silent:
            record.report.tell(record)
        elif record.held:
            self._serving.books.opened(record, address)

    def _refusal(self, record: Record | None) -> str | None:
        """Ask the limits that judge the client; return why one of them refuses it."""
        admission = self._serving.bounds.admission
        if admission is None or record is None or not self.tells_client:
            return None
        record.detail = admission.admit_client(record, record.peer)
        return record.detail

    def _welcome(self, record: Record | None, request: Any, address: Any) -> bool:
        """Ask now whoever had to know the client's address."""
        server, books = self._serving.server, self._serving.books
        if not self.tells_client:
            return True
        try:
            welcome = server.verify_request(request, address)
        except Exception as error:  # noqa: BLE001 - every fault of one request is handle_error's
            books.failed(request, address, error)
            server.handle_error(request, address)
            return False
        if not welcome:
            books.rejected(record, address, "verify_request")
        return bool(welcome)


def note_failure(books: Books, record: Record | None, error: OSError, timeout: float) -> None:
    """The peer failed: one reason, one event, and no traceback."""
    if record is None or record.reason is not None:
        return  # harken cut it: that is why
    record.reason = "preamble_failed"
    record.detail = reason_of(error, timeout)
    books.preamble_failed(record)
    if record.report is not None and record.silent:
        record.report.tell(record)


def _nothing() -> None:
    """For preambles that share nothing."""


def _succeed() -> bool:
    return True


def _follow(record: Record, request: Any) -> None:
    """See to it that the record is of what a preamble made: one of a socket without records knows of none."""
    if record.request is not request:
        record.move(request)


def _read_out(request: Any) -> None:
    """Take what the peer has sent already: unread, it would turn the close into a reset, which overtakes our alert."""
    if not isinstance(request, Socket):
        return
    try:
        for _ in range(MAX_READ_OUT // 65536):
            if not receive_now(request, 65536):
                return
    except OSError:
        pass  # nothing more


def reason_of(error: OSError, timeout: float) -> str:
    """Say in one line why a preamble failed."""
    if isinstance(error, PreambleError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"the peer was not ready within {timeout:g} s (preamble_timeout)"
    if isinstance(error, ConnectionError) or error.errno == errno.ENOTCONN:
        return "the peer went away before it was ready"
    return str(error)


def refuse_unentered(server: Any, request: Any) -> None:
    """Refuse a connection that came to its handler by a way around the preambles.

    Raises:
        LifecycleError: it did.
    """
    entry = getattr(getattr(server, "_harken", None), "entry", None)
    if not isinstance(entry, Entry):  # asked first: a connection of such a server may need no record
        return
    record = getattr(request, "record", None)
    if (record is None or not record.entered) and not entry.passed(request):
        raise LifecycleError(
            f"{type(server).__name__} hands its handler a connection whose preambles (TLS, PROXY) have not run; "
            "an overridden hook must end in harken's process_request() or process_request_thread()"
        )
