"""What everybody in this process does at this moment: threads, green threads, and tasks of event loops.

It is asked for when something is stuck, so it needs none of the loops: it looks at the frames from a thread beside.
"""

from __future__ import annotations

import gc
import linecache
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from harken.stacks import request_in, uncollected

if TYPE_CHECKING:
    from harken.records import Record
    from harken.serving import Serving

__all__ = ["activity"]

# Green threads and tasks of which the stacks are told; enough to see what thousands of handlers wait for.
MOST = 1000

_Find = Callable[[Any], "Record | None"]
_Place = tuple[CodeType, int]


@uncollected()
def activity(servings: Iterable[Serving]) -> list[dict[str, Any]]:
    """Tell what everybody does.

    Args:
        servings: whose connections are named.

    Returns:
        An entry each, threads first: ``thread``, ``green`` or ``task`` is its name; ``process``; ``stack``, innermost
        call last; and where a handler runs the ``connection``, its ``peer`` and for how many ``seconds`` it is open.
    """
    registries = [serving.connections for serving in servings]

    def find(request: Any) -> Record | None:
        return next((record for each in registries if (record := each.find(request)) is not None), None)

    entries = [*_threads(find)]
    others = [*_green_threads(find), *_tasks()]
    left_out = len(others) - MOST
    if left_out > 0:
        others = [*others[:MOST], {"green": f"… {left_out:,} more", "process": os.getpid(), "stack": []}]
    return entries + others


def _threads(find: _Find) -> Iterator[dict[str, Any]]:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    for ident, frame in sys._current_frames().items():
        if ident != own:
            yield _entry("thread", names.get(ident, str(ident)), [frame], find)


def _green_threads(find: _Find) -> Iterator[dict[str, Any]]:
    """Those that wait; the one that runs is its thread's stack."""
    loaded = sys.modules.get("greenlet")
    if loaded is None:
        return
    for green in _instances(loaded.greenlet):
        frame = green.gr_frame
        if frame is not None and not green.dead and green.parent is not None:
            yield _entry("green", f"{id(green):#x}", [frame, *_coroutine(frame)], find)


def _coroutine(frame: FrameType) -> list[FrameType]:
    """The frames of the coroutine that a green thread drives and that waits, innermost last."""
    caller: FrameType | None = frame
    while caller is not None:
        driven = getattr(caller.f_locals.get("self"), "_coro", None) if caller.f_code.co_name == "_run" else None
        if driven is not None:
            return _waiting(driven)
        caller = caller.f_back
    return []


def _waiting(coroutine: Any) -> list[FrameType]:
    frames = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None and getattr(coroutine, "cr_running", False):
            return []  # it is on the stack already
        if frame is not None:
            frames.append(frame)
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    return frames


def _tasks() -> Iterator[dict[str, Any]]:
    """Those of event loops that wait; harken's own are green threads."""
    loaded = sys.modules.get("asyncio")
    if loaded is None:
        return
    for task in _instances(loaded.Task):
        if not task.done() and (frames := _waiting(task.get_coro())):
            yield _entry("task", task.get_name(), frames, lambda _request: None)


def _instances(kind: type) -> list[Any]:
    """Every object of a kind: neither greenlet nor asyncio knows all of its own, over all threads."""
    return [each for each in gc.get_objects() if isinstance(each, kind)]


def _entry(sort: str, name: str, frames: list[FrameType], find: _Find) -> dict[str, Any]:
    places, request = _walk(frames[0])
    places += [(frame.f_code, frame.f_lineno) for frame in frames[1:]]
    record = None if request is None else find(request)
    told = {} if record is None else _of(record)
    return {sort: name, "process": os.getpid(), **told, "stack": [_line(*place) for place in places]}


def _walk(frame: FrameType) -> tuple[list[_Place], Any]:
    """Return where a stack is, innermost last, and the request that it serves."""
    places: list[_Place] = []
    request = None
    caller: FrameType | None = frame
    while caller is not None:
        places.append((caller.f_code, caller.f_lineno))
        request = request or request_in(caller)
        caller = caller.f_back
    return places[::-1], request


def _line(code: CodeType, number: int) -> str:
    source = linecache.getline(code.co_filename, number or 0)
    return traceback.format_list([(code.co_filename, number, code.co_name, source.strip())])[0]


def _of(record: Record) -> dict[str, Any]:
    return {"connection": record.id, "peer": str(record.peer), "seconds": time.monotonic() - record.started}
