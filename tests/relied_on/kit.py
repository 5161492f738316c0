"""Clients, running servers and bounded waits for the tests beside this file."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LOCAL = ("127.0.0.1", 0)
PATIENCE = 10.0  # seconds that anything may take before the test fails
SOURCE = Path(__file__).parents[2] / "src"


def echo_handler(impl: Any) -> Any:
    """A handler that answers one line."""

    class Echo(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    return Echo


def run(function: Callable[..., Any], *args: Any, **keywords: Any) -> threading.Thread:
    """Start a daemon thread."""
    thread = threading.Thread(target=function, args=args, kwargs=keywords, daemon=True)
    thread.start()
    return thread


def join(thread: threading.Thread, patience: float = PATIENCE) -> None:
    """Wait for a thread to end.

    Raises:
        AssertionError: it still runs after ``patience`` seconds.
    """
    thread.join(patience)
    assert not thread.is_alive(), "a thread did not end in time"


@contextlib.contextmanager
def serving(server: Any, poll_interval: float = 0.05) -> Iterator[Any]:
    """Run ``serve_forever`` in a thread; shut down and close when left."""
    thread = run(server.serve_forever, poll_interval)
    try:
        yield server
    finally:
        stopper = run(server.shutdown)
        stopper.join(PATIENCE)
        thread.join(PATIENCE)
        server.server_close()
        assert not stopper.is_alive(), "shutdown() did not return"
        assert not thread.is_alive(), "serve_forever() did not return"


def connect(address: Any) -> socket.socket:
    """Return a connected stream with a timeout."""
    if isinstance(address, str):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        client.connect(address)
        return client
    return socket.create_connection(address[:2], PATIENCE)


def read_all(client: socket.socket) -> bytes:
    """Read until the other end closes."""
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def ask(address: Any, data: bytes = b"hello\n") -> bytes:
    """Send ``data``, end the sending side, and return all that comes back."""
    with connect(address) as client:
        if data:
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


def is_open(address: Any) -> bool:
    """Tell whether somebody listens at an address."""
    try:
        connect(address).close()
    except OSError:
        return False
    return True


def open_fds() -> int:
    """Count this process's descriptors."""
    return len(os.listdir("/proc/self/fd"))


def python(name: str, program: str, *args: str, **keywords: Any) -> subprocess.Popen[str]:
    """Start a program in a child process, with ``name`` (``stdlib`` or ``harken``) as its ``socketserver``."""
    stand_in = "import sys, harken\nsys.modules['socketserver'] = harken\n" if name == "harken" else "import sys\n"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", stand_in + program, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **keywords,
    )


def free_port() -> int:
    """Return a port that was free a moment ago, for programs that cannot bind port 0."""
    with socket.socket() as probe:
        probe.bind(LOCAL)
        return int(probe.getsockname()[1])
