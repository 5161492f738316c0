"""STARTTLS: a handler puts its connection under TLS in the middle of the conversation."""

from __future__ import annotations

import socket
import ssl
from time import monotonic
from typing import Any

from harken.entry import note_failure, reason_of
from harken.errors import LifecycleError, PreambleError
from harken.preambles._handshake import Handshake, secure
from harken.preambles._secured import SSLSocket
from harken.preambles.tls import certificates_of
from harken.serving import serving_of
from harken.settings import UNSET

__all__ = ["start_tls"]


def start_tls(handler: Any, tls: Any = None) -> socket.socket:
    """Do the handshake of a handler's connection, as the server; see ``BaseRequestHandler.start_tls``."""
    if isinstance(handler.request, (ssl.SSLSocket, SSLSocket)) and handler.request.version() is not None:
        raise LifecycleError("start_tls(): the connection is under TLS already")
    serving = serving_of(handler.server)
    certificates = certificates_of(tls) if tls is not None else _of_server(serving)
    request, files = handler.request, _files(handler)
    record = serving.connections.find(request)
    timeout = serving.settings["preamble_timeout"]
    if "wfile" in files:
        files["wfile"].flush()
    made: Any = None
    try:
        _expect_nothing_read_ahead(files.get("rfile"))
        nodelay = serving.settings["nodelay"] is not False
        made = secure(request, certificates.current(), monotonic() + timeout, nodelay=nodelay)
    except OSError as error:
        made = getattr(error, "connection", None)
        note_failure(serving.books, record, error, timeout)
        raise PreambleError(reason_of(error, timeout)) from None
    finally:
        if made is not None:
            for file in files.values():
                file.close()
            if record is not None:
                record.successor = made  # hooks know the old one, and end the connection by that
                if record.handler is not None and hasattr(made, "share"):
                    made.share()
                request.record = record
                if serving.bounds.deadlines is not None:
                    serving.bounds.deadlines.entered(record)  # the new one is to stamp, too
            handler.request = made
            if hasattr(handler, "connection"):
                handler.connection = made
                handler._open_files()
    return made  # type: ignore[no-any-return]


def _of_server(serving: Any) -> Any:
    entry = serving.entry
    for preamble in entry.preambles if entry is not None else ():
        if isinstance(preamble, Handshake):
            return preamble.certificates
    raise LifecycleError(
        "start_tls(): the server has no certificate; give it tls=TLS(cert, key, mode='starttls'), or pass a TLS here"
    )


def _files(handler: Any) -> dict[str, Any]:
    named = ((name, getattr(handler, name, UNSET)) for name in ("wfile", "rfile"))
    return {name: file for name, file in named if file is not UNSET and not file.closed}


def _expect_nothing_read_ahead(rfile: Any) -> None:
    """Refuse plain text that came behind the request for TLS: somebody in between may have put it there.

    It would be taken for something that the peer said under TLS (CVE-2011-0411 was this fault).

    Raises:
        PreambleError: there is some.
    """
    size = _unread(rfile)
    if size:
        raise PreambleError(f"{size} bytes of plain text followed the request for TLS")


def _unread(rfile: Any) -> int:
    """How many bytes a file holds that were received and not read; never receives any."""
    if rfile is None or not hasattr(rfile, "peek"):
        return 0  # unbuffered
    raw = getattr(rfile, "raw", None)
    if raw is None:
        return len(rfile)  # a hub's reader
    raw.readinto = lambda buffer: None  # "nothing is there at the moment", so that peek() tells what it holds
    try:
        return len(rfile.peek())
    finally:
        del raw.readinto
