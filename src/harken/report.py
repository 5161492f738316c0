"""What a child of the fork engine tells its parent, who keeps the books: what the preambles learned of a connection."""

from __future__ import annotations

import marshal
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harken.records import Record

__all__ = ["Report"]

# Bytes that a pipe takes at once, so that the parent reads all of a message or nothing: PIPE_BUF of pipe(7).
MAX_BYTES = 4096
MAX_DETAIL = 500  # letters of up to 4 bytes: with names and lengths they stay below MAX_BYTES


class Report:
    """One message from a child to its parent, by a pipe whose reading end is watched like a door."""

    def __init__(self, record: Record, on_told: Callable[[Record], None]) -> None:
        """Open the pipe, in the parent.

        Args:
            record: of the connection; what the child tells is noted there.
            on_told: called in the parent when it has been.
        """
        self._record = record
        self._on_told = on_told
        try:
            self._reader, self._writer = os.pipe()
        except OSError:  # no descriptor is left: the exit status alone must do
            self._reader = self._writer = -1

    @property
    def open(self) -> bool:
        """Whether the parent may still hear something."""
        return self._reader >= 0

    def fileno(self) -> int:
        """Return the parent's end."""
        return self._reader

    def tell(self, record: Record) -> None:
        """Tell the parent, once; in the child."""
        if self._writer < 0:
            return
        detail = record.detail and record.detail[:MAX_DETAIL]
        header = record.proxy.encode() if record.proxy is not None else None
        message = marshal.dumps((detail, header, record.certificate))
        if len(message) > MAX_BYTES:  # the addresses are at the head of the header, and are what events show
            short = record.proxy.bare().encode() if record.proxy is not None else None
            message = marshal.dumps((detail, short, None))
        os.write(self._writer, message)
        os.close(self._writer)
        self._writer = -1

    def hand_on(self) -> None:
        """The child has its copy of the writing end, or there is no child: close ours."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def close(self) -> None:
        """There is no child: close the parent's end."""
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    def hear(self) -> None:
        """Note what the child told, if it told anything; in the parent, when the pipe is readable or the child gone."""
        if self._reader < 0:
            return
        os.set_blocking(self._reader, False)
        try:
            message = os.read(self._reader, MAX_BYTES)
        except BlockingIOError:  # the child's own child may still hold the other end
            message = b""
        finally:
            self.close()
        if message:
            self._note(*marshal.loads(message))  # noqa: S302 - our own child wrote it
        self._on_told(self._record)

    def _note(self, detail: str | None, header: bytes | None, certificate: dict[str, Any] | None) -> None:
        record = self._record
        record.detail = record.detail or detail
        record.certificate = certificate
        if header is not None:
            from harken.preambles.proxy_header import ProxyHeader

            record.proxy, _ = ProxyHeader.parse(header)
            if record.proxy.forwarded:
                record.spoken_for = record.proxy.client_address
