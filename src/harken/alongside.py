# SPDX-License-Identifier: MIT
"""A server that serves in a thread, beside the program that made it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from harken.errors import ConfigError, LifecycleError
from harken.server import BaseServer
from harken.serving import is_server, serving_of

__all__ = ["background"]

# Seconds between looks whether a server that is to be ready has ended instead.
_LOOK_SECONDS = 0.02

T = TypeVar("T")


@contextmanager
def background(server: T, *, timeout: float = 10.0) -> Iterator[T]:
    """Serve in a thread while the block runs: ready when entered, drained and closed when left.

    Args:
        server: any server of harken's.
        timeout: seconds to wait for it to be ready.

    Raises:
        ConfigError: it is no server of harken's.
        LifecycleError: it was not ready in time, or was shut down before.
        Exception: whatever ``serve_forever`` raised before it was ready.
    """
    made: Any = server
    if not is_server(made):
        raise ConfigError(
            f"{made!r} is no server of harken's; take one of its classes, or put a mix-in of harken's in front of yours"
        )
    serving = serving_of(made)
    failure: list[BaseException] = []

    def serve() -> None:
        try:
            made.serve_forever()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=serve, name="harken-background", daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout
    while not serving.ready.wait(_LOOK_SECONDS):
        if not thread.is_alive():
            raise failure[0] if failure else LifecycleError("the server was shut down before it served")
        if time.monotonic() >= deadline:
            raise LifecycleError(f"the server was not ready within {timeout:g} s")
    try:
        yield server
    finally:
        BaseServer.drain(made)
        made.server_close()
        thread.join(timeout)
        if failure:
            raise failure[0]
