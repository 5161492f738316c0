"""The hooks in the order in which they are called, and which method of a class answers each.

The order is stdlib's (``Lib/socketserver.py``): construction, then one connection, then what happens now and then.
"""

from __future__ import annotations

from typing import NamedTuple

from harken.explain.lookup import author_of, defines, is_library, is_yours, mentions, owner_of, place_of
from harken.explain.model import HookRow

__all__ = ["HANDLER_HOOKS", "HOOKS", "SERVER_HOOKS", "calls_request_thread", "rows", "socket_maker"]

CONSTRUCTION = "Construction"
CONNECTION = "One connection"
SOMETIMES = "Now and then"
END = "The end"

# Where a hook runs.
CALLER, LOOP, RUNNER, ANYWHERE = "caller", "loop", "runner", "anywhere"


class Hook(NamedTuple):
    """A hook: who calls it (``parent``), whose it is, and in which kind of thread it runs."""

    name: str
    group: str
    parent: str
    runs_in: str
    of_handler: bool = False
    remark: str = ""


HOOKS = (
    Hook("__init__", CONSTRUCTION, "", CALLER),
    Hook("socket", CONSTRUCTION, "__init__", CALLER),
    Hook("server_bind", CONSTRUCTION, "__init__", CALLER),
    Hook("server_activate", CONSTRUCTION, "__init__", CALLER),
    Hook("serve_forever", CONNECTION, "", LOOP),
    Hook("_handle_request_noblock", CONNECTION, "serve_forever", LOOP),
    Hook("get_request", CONNECTION, "_handle_request_noblock", LOOP),
    Hook("verify_request", CONNECTION, "_handle_request_noblock", LOOP),
    Hook("process_request", CONNECTION, "_handle_request_noblock", LOOP),
    Hook("process_request_thread", CONNECTION, "process_request", RUNNER),
    Hook("finish_request", CONNECTION, "process_request_thread", RUNNER),
    Hook("RequestHandlerClass", CONNECTION, "finish_request", RUNNER, of_handler=True),
    Hook("setup", CONNECTION, "RequestHandlerClass", RUNNER, of_handler=True),
    Hook("handle", CONNECTION, "RequestHandlerClass", RUNNER, of_handler=True),
    Hook("finish", CONNECTION, "RequestHandlerClass", RUNNER, of_handler=True),
    Hook("shutdown_request", CONNECTION, "process_request_thread", RUNNER),
    Hook("close_request", CONNECTION, "shutdown_request", RUNNER),
    Hook("service_actions", SOMETIMES, "", LOOP, remark="each turn"),
    Hook("handle_timeout", SOMETIMES, "", CALLER, remark="handle_request"),
    Hook("handle_error", SOMETIMES, "", RUNNER, remark="on failure"),
    Hook("shutdown", END, "", ANYWHERE),
    Hook("server_close", END, "", CALLER),
)
SERVER_HOOKS = tuple(hook.name for hook in HOOKS if not hook.of_handler and hook.name not in ("__init__", "socket"))
HANDLER_HOOKS = ("setup", "handle", "finish")

_RUNNERS = {
    "inline": "serving thread",
    "thread": "a thread of its own",
    "pool": "a pool thread",
    "fork": "a child process",
    "green": "a green thread",
    "asyncio": "a task",
    "own": "as you decide",
}
_PLACES = {CALLER: "caller's thread", LOOP: "serving thread", ANYWHERE: "any thread"}


def rows(server: type, handler: type, engine: str) -> tuple[HookRow, ...]:
    """Return, for every hook that this server has, the method that runs and where.

    Args:
        server: a server class.
        handler: the handler class that it starts.
        engine: the name that :func:`harken.explain.lookup.engine_of` gave.
    """
    present = [hook for hook in HOOKS if _is_called(hook, server, engine)]
    depths: dict[str, int] = {}
    found = []
    for hook in present:
        depths[hook.name] = _depth(hook, depths)
        found.append(_row(hook, handler if hook.of_handler else server, engine, depths[hook.name]))
    return tuple(found)


def _is_called(hook: Hook, server: type, engine: str) -> bool:
    if hook.name == "process_request_thread" and not calls_request_thread(server, engine):
        return False
    if hook.name == "socket":
        return socket_maker(server) is not None
    return hook.of_handler or owner_of(server, hook.name) is not None


def calls_request_thread(server: type, engine: str) -> bool:
    """Tell whether ``process_request_thread`` is called: by every engine of harken's but ``inline``.

    Of stdlib's mix-ins only the threading one calls it. Where the user's own ``process_request`` decides, it is called
    if any method of the user's uses its name.
    """
    if engine == "own":
        return mentions(server, "process_request_thread")
    if engine in ("inline", "fork"):
        asked = (owner for owner in server.__mro__ if is_library(owner) and defines(owner, "process_request"))
        return engine == "fork" and next(asked).__module__ != "socketserver"
    return owner_of(server, "process_request_thread") is not None


def socket_maker(server: type) -> type | None:
    """The constructor that opens the socket is that of ``TCPServer``; a bare ``BaseServer`` has none."""
    return next((cls for cls in server.__mro__ if is_library(cls) and cls.__name__ == "TCPServer"), None)


def _depth(hook: Hook, depths: dict[str, int]) -> int:
    parent = hook.parent
    while parent and parent not in depths:
        parent = next(other.parent for other in HOOKS if other.name == parent)
    return depths[parent] + 1 if parent else 0


def _row(hook: Hook, cls: type, engine: str, depth: int) -> HookRow:
    method = "__init__" if hook.name in ("RequestHandlerClass", "socket") else hook.name
    owner = socket_maker(cls) if hook.name == "socket" else owner_of(cls, method)
    where = _RUNNERS.get(engine, engine) if hook.runs_in == RUNNER else _PLACES[hook.runs_in]
    return HookRow(
        name=hook.name,
        group=hook.group,
        depth=depth,
        owner=author_of(owner, method) if owner else "",
        place=place_of(owner if owner and defines(owner, method) else None, method),
        where=where,
        remark=hook.remark,
        yours=owner is not None and is_yours(owner, method),
    )
