"""The child process of a trace: it serves one connection of its own with recording classes.

A process of its own can be ended whatever the handler does, and leaves no thread, socket or child behind.
"""

from __future__ import annotations

import functools
import inspect
import os
import socket
import sys
import threading
import time
import warnings
from typing import Any, NamedTuple

from harken.explain.lookup import transport_of
from harken.explain.pairing import plain_handler
from harken.explain.recorder import Recorder

__all__ = ["Plan", "arguments", "enter_child", "serve_once"]

# Seconds between turns of the loop: the shorter, the sooner an stdlib server notices shutdown().
POLL_INTERVAL = 0.05
# Seconds without any call after which a connection that nobody closes counts as done.
QUIET = 0.5
# Seconds for the answer to a datagram, which may never come; a forked child on a busy machine needs some.
ANSWER = 1.0


class Plan(NamedTuple):
    """What to serve.

    Attributes:
        server: a server class.
        handler: its handler class, perhaps with arguments filled in, or None.
        directory: an empty directory for Unix sockets.
        seconds: how long the handler may take.
        message: what the client sends.
    """

    server: type
    handler: Any
    directory: str
    seconds: float
    message: bytes


def arguments(server: type, address: Any, handler: Any) -> tuple[Any, ...] | None:
    """Return what the constructor takes: the address and the handler, only the address, or nothing; None if more."""
    signature = inspect.signature(server)
    for offered in ((address, handler), (address,), ()):
        try:
            signature.bind(*offered)
        except TypeError:
            continue
        return offered
    return None


def serve_once(plan: Plan, pipe: int) -> None:
    """Serve one connection and report every call to ``pipe``; takes as long as the handler, at most the plan's time."""
    recorder = Recorder(pipe)
    chosen = recorder.handler(plan.handler or _echo(plan.server))
    given = arguments(plan.server, _address(plan), chosen)
    server = recorder.server(plan.server)(*(given or ()))
    if given is not None and len(given) < 2:
        server.RequestHandlerClass = recorder.handler(server.RequestHandlerClass)
    client = threading.Thread(target=_converse, args=(server, plan, recorder), name="client", daemon=True)
    client.start()
    try:
        if "poll_interval" in inspect.signature(server.serve_forever).parameters:
            server.serve_forever(poll_interval=POLL_INTERVAL)
        else:
            server.serve_forever()
    finally:
        server.server_close()
        client.join(QUIET)  # it may still be on its way out of shutdown()


def _echo(server: type) -> type:
    """A handler for a server class that was given none: it sends back what comes, as every first example does."""

    def handle(self: Any) -> None:
        if isinstance(self.request, tuple):
            self.request[1].sendto(self.request[0], self.client_address)
        else:
            while data := self.request.recv(65536):
                self.request.sendall(data)

    return type("Echo", (plain_handler(server),), {"handle": handle})


def _address(plan: Plan) -> Any:
    if transport_of(plan.server).startswith("unix"):
        return os.path.join(plan.directory, "server")
    family = getattr(plan.server, "address_family", socket.AF_INET)
    return ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0)


def _converse(server: Any, plan: Plan, recorder: Recorder) -> None:
    """Be the client: send, half-close, read to the end; then wait until the calls are over and stop the server."""
    deadline = time.monotonic() + plan.seconds
    try:
        with socket.socket(server.socket.family, server.socket.type) as client:
            client.settimeout(plan.seconds)
            received = _exchange(client, _reachable(server.socket.getsockname()), plan, recorder, deadline)
        recorder.report("client", received.hex())
    except OSError as error:
        recorder.report("client-failed", str(error))
    finally:
        _wait_until_done(recorder, deadline)
        recorder.report("done")
        server.shutdown()


def _exchange(client: socket.socket, address: Any, plan: Plan, recorder: Recorder, deadline: float) -> bytes:
    if client.type == socket.SOCK_DGRAM:
        if address and not isinstance(address, tuple):
            client.bind(os.path.join(plan.directory, "client"))
        client.sendto(plan.message, address)
        _wait_until_done(recorder, deadline)
        client.settimeout(ANSWER)
        try:
            return client.recv(65536)
        except TimeoutError:
            return b""
    client.connect(address)
    client.sendall(plan.message)
    client.shutdown(socket.SHUT_WR)
    received = b""
    while len(received) < 65536 and time.monotonic() < deadline:
        data = client.recv(65536)
        if not data:
            break
        received += data
    return received


def _reachable(address: Any) -> Any:
    """A server that listens everywhere is reached on loopback."""
    if isinstance(address, tuple) and address[0] in ("0.0.0.0", "::"):
        return ("127.0.0.1" if address[0] == "0.0.0.0" else "::1", *address[1:])
    return address


def _wait_until_done(recorder: Recorder, deadline: float) -> None:
    """Wait until the request is closed and no hook of it runs, or until nothing runs and nothing more happens."""
    with recorder.changed:
        while (left := deadline - time.monotonic()) > 0:
            if recorder.closed and not recorder.running:
                return
            before, idle = recorder.moves, recorder.taken and not recorder.running
            moved = recorder.changed.wait_for(functools.partial(_has_moved, recorder, before), min(QUIET, left))
            if idle and not moved:
                return


def _has_moved(recorder: Recorder, before: int) -> bool:
    return recorder.moves != before


def enter_child() -> None:
    """Make a fresh child harmless: own process group, no terminal input, its output to stderr."""
    # A forking server forks beside the client's thread, of which Python warns; its child takes no lock of that thread.
    warnings.simplefilter("ignore", DeprecationWarning)
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
