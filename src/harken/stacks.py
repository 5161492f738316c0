"""What the threads' stacks tell: loops that are not harken's, and whose handler calls."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from harken.connection import shut
from harken.forking import in_child

__all__ = ["end_handshake", "foreign_loop", "request_in", "served_by_caller", "uncollected"]

# Functions under which a handler runs, by name since programs override them, and what they call the connection.
_SERVING, _REQUEST = {"process_request_thread", "finish_request", "serve"}, "request"


_paused = False


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the block, which looks at other threads' frames.

    Before Python 3.12 a collection may begin within ``f_back``, ``f_locals`` or ``sys._current_frames()``. What that
    finalizes can give up the GIL, the thread goes on, and the frame that was asked for is another's memory by then.
    """
    global _paused
    if sys.version_info >= (3, 12) or not gc.isenabled():
        yield
        return
    _paused = True
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        _paused = False


@in_child
def _after_fork() -> None:
    global _paused
    if _paused:  # the thread that looked stayed in the parent
        gc.enable()
        _paused = False


@uncollected()
def foreign_loop(server: Any) -> bool:
    """Tell whether a loop that is not harken's serves: on a grafted class, stdlib's, called by way of ``super()``.

    Its Event cannot tell, being unset before the first loop as well; so the threads' stacks are asked. A loop that the
    caller itself is in does not count: a thread cannot wait for its own.
    """
    for frame in sys._current_frames().values():
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_name == "serve_forever" and caller.f_locals.get("self") is server:
                return not _on_stack(caller)
            caller = caller.f_back
    return False


@uncollected()
def end_handshake(thread: int) -> None:
    """Shut the connection whose TLS handshake keeps a thread: one that is within accept() nobody else has."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "do_handshake":
            shut(frame.f_locals.get("self"))
            return
        frame = frame.f_back


def _on_stack(wanted: FrameType) -> bool:
    """Whether ``wanted`` is a caller of ours."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


def served_by_caller() -> list[Any]:
    """Return the requests whose handlers call this, directly or not: those of the functions that serve them."""
    found: list[Any] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        request = request_in(frame)
        if request is not None:
            found.append(request)
        frame = frame.f_back
    return found


def request_in(frame: FrameType) -> Any:
    """Return the request that a frame serves, or None: by itself, or as a handler that compiled code calls."""
    code = frame.f_code
    if code.co_name in _SERVING:
        return frame.f_locals.get(_REQUEST)
    if code.co_name != "handle" or not code.co_argcount:
        return None
    handler = frame.f_locals.get(code.co_varnames[0])
    return getattr(handler, "_carried", None) or getattr(handler, _REQUEST, None)  # an async handler's is another's
