"""What readers hold counts, and those that grow while there is too little memory are kept waiting."""

from __future__ import annotations

from typing import Any

from harken import _hub
from harken.buffers import LOOK_SECONDS, READING, buffers_of

__all__ = ["grown"]


def grown(sock: Any, size: int) -> None:
    """A reader of ``sock`` holds so many bytes of a line or block. In the green thread that reads."""
    found = buffers_of(sock)
    if found is None:
        return
    buffers, record = found
    buffers.hold(record, READING, size)
    hub = _hub.current() if size else None
    while hub is not None and buffers.over and record.reason is None:
        hub.sleep(LOOK_SECONDS)
