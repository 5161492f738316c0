"""A server that echoes datagrams, and its clients."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import harken
from harken import green

PATIENCE = 10.0  # seconds


LOCAL = ("127.0.0.1", 0)


class Echo(harken.BaseRequestHandler):
    """Sends back what comes; what begins with ``w`` after a wait."""

    def handle(self) -> None:
        """Echo."""
        data, sock = self.request
        if data.startswith(b"w"):
            green.sleep(0.05)
        sock.sendto(data, self.client_address)


@contextlib.contextmanager
def clients(address: Any, count: int = 1, family: int = socket.AF_INET) -> Iterator[list[socket.socket]]:
    """Connected datagram sockets."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            client = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            client.settimeout(PATIENCE)
            client.connect(address)
            made.append(client)
        yield made


def ask(client: socket.socket, data: bytes) -> bytes:
    """Send and return the answer."""
    client.send(data)
    return client.recv(65536)


def soon(condition: Callable[[], bool]) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
