"""Serve one real connection in a child process and return the calls as they happened."""

from __future__ import annotations

import functools
import json
import os
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from typing import Any

from harken.errors import ConfigError
from harken.explain import pairing, probe
from harken.explain.lookup import transport_of, unfilled
from harken.explain.model import Call, Trace

__all__ = ["trace"]

# Seconds that a handler may take: a demonstration, in front of which somebody sits.
SECONDS = 3.0
# Seconds beyond that for the end of the loop, server_close() and the children, before all is killed.
GRACE = 1.0

_LINE = b"hello\r\n"
_HTTP = b"GET / HTTP/1.0\r\n\r\n"


def trace(
    cls: type | functools.partial[Any],
    handler: type | None = None,
    *,
    engine: str | None = None,
    seconds: float = SECONDS,
) -> Trace:
    """Serve one connection on a free loopback port (or Unix path) and return the calls of every hook.

    The client sends one line, half-closes and reads to the end. All of it happens in a child process, which is ended
    with everything that it started: nothing stays behind in this one. What handlers print goes to stderr.

    Args:
        cls: a server class, or a handler class, also one with arguments filled in by ``functools.partial``.
        handler: the handler class that a server class starts; None is one that sends back what it gets.
        engine: as for ``describe``.
        seconds: how long the handler may take until the trace is cut.

    Returns:
        The calls, each before the calls that it made.

    Raises:
        ConfigError: the class cannot be served: it is no server or handler, or its constructor wants more than an
            address and a handler class, or this system has no fork().
    """
    bare = unfilled(cls)
    server, handler = pairing.pair(bare, handler, engine)
    _refuse_impossible(server)
    message = _HTTP if _speaks_http(server, handler) else _LINE
    directory = tempfile.mkdtemp(prefix="harken-")
    try:
        plan = probe.Plan(server, cls if handler is bare else handler, directory, seconds, message)
        reports, late = _run(plan, time.monotonic() + seconds + GRACE)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return _assemble(reports, transport_of(server), message, f"{seconds:g} s" if late else "")


def _refuse_impossible(server: type) -> None:
    if not hasattr(os, "fork"):
        raise ConfigError("a trace needs fork(), which this system does not have; explain without it")
    if not hasattr(server, "socket_type"):
        raise ConfigError(f"{server.__name__} opens no socket that a client could reach; explain it without a trace")
    if probe.arguments(server, None, None) is None:
        raise ConfigError(
            f"{server.__name__}'s constructor wants more than (address, handler); "
            "derive a class whose __init__ knows the rest"
        )


def _speaks_http(*classes: type | None) -> bool:
    known = ("http.server", "wsgiref.simple_server", "xmlrpc.server")
    return any(base.__module__ in known for cls in classes if cls for base in cls.__mro__)


def _run(plan: probe.Plan, deadline: float) -> tuple[list[list[Any]], bool]:
    """Fork, collect reports until every writer is gone or time is over, and end what is left of the group."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python warns that a child forked beside threads may deadlock; this one is killed at the deadline.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _be_child(plan, reading, writing)
    os.close(writing)
    try:
        data, late = _read(reading, deadline)
    finally:
        os.close(reading)
        _end(child)
    return [json.loads(line) for line in data.split(b"\n")[:-1]], late


def _be_child(plan: probe.Plan, reading: int, writing: int) -> None:
    status = 1
    try:
        os.close(reading)
        probe.enter_child()
        probe.serve_once(plan, writing)
        status = 0
    except BaseException:  # noqa: BLE001 - the child must never return into its parent's program
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(status)


def _read(reading: int, deadline: float) -> tuple[bytes, bool]:
    data = b""
    os.set_blocking(reading, False)
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                part = os.read(reading, 65536)
                if not part:
                    return data, False
                data += part
    return data, True


def _end(child: int) -> None:
    """Kill the child's process group; the child is not reaped before, so that the group's number is still its own."""
    for kill in (functools.partial(os.killpg, child), functools.partial(os.kill, child)):
        try:
            kill(signal.SIGKILL)
        except ProcessLookupError:
            continue
    os.waitpid(child, 0)


def _assemble(reports: list[list[Any]], transport: str, message: bytes, late: str) -> Trace:
    """Make the list of calls out of the reports: each call before those that it made, by time."""
    found = Trace(transport)
    found.sent = message
    calls: dict[str, Call] = {}
    began: dict[str, float] = {}
    children: dict[str, list[str]] = {"": []}
    failed = ""
    first = min((report[6] for report in reports if report[0] == "start"), default=0.0)
    parent_process = next((report[1].partition(".")[0] for report in reports if report[0] == "start"), "")
    for kind, *fields in reports:
        if kind == "start":
            key, parent, name, owner, where, at = fields
            process = key.partition(".")[0]
            place = where if process == parent_process else f"child {process}"
            calls[key], began[key] = Call(name, owner, place, 0, (at - first) * 1000, None), at
            children.setdefault(parent if parent in calls else "", []).append(key)
        elif kind == "end" and fields[0] in calls:
            key, at, error = fields
            calls[key].took, calls[key].error = (at - began[key]) * 1000, error
        elif kind == "client":
            found.received = bytes.fromhex(fields[0])
        elif kind == "client-failed":
            failed = fields[0]
    _walk("", 0, calls, children, found)
    found.cut = _why_cut(found, late, failed)
    return found


def _why_cut(calls: Trace, late: str, failed: str) -> str:
    stuck = [call for call in calls if call.took is None]
    if stuck:
        deepest = max(stuck, key=lambda call: call.depth)
        when = f"after {late}" if late else "when its process ended"
        return f"{deepest.owner}.{deepest.name} had not returned {when}"
    if late:
        return f"something that the server started still ran after {late}"
    return f"the client failed: {failed}" if failed else ""


def _walk(key: str, depth: int, calls: dict[str, Call], children: dict[str, list[str]], found: Trace) -> None:
    last: Call | None = None
    for child in sorted(children.get(key, ()), key=lambda one: calls[one].at):
        call = calls[child]
        leaf = child not in children
        if last is not None and leaf and last.name == call.name == "service_actions" and not call.error:
            last.count += 1
            last.took = (last.took or 0) + (call.took or 0)
            continue
        call.depth = depth
        found.append(call)
        _walk(child, depth + 1, calls, children, found)
        last = call if leaf else None
