"""A server whose connections compiled code takes from door to end, and its clients."""

from __future__ import annotations

import socket
from typing import Any

from waiting import wait_until

import harken
from harken.serving import serving_of

PATIENCE = 10.0  # seconds


class Echo(harken.BaseRequestHandler):
    """Sends back what comes, but no answer to a question mark."""

    def handle(self) -> None:
        """Echo."""
        while data := self.request.recv(1000):
            if data != b"?":
                self.request.sendall(data)


def connect(server: Any) -> socket.socket:
    """Return a connection that has had an answer."""
    client = socket.create_connection(server.server_address, PATIENCE)
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    return client


def visit(server: Any) -> None:
    """Come, and leave when the server has nothing left of it."""
    connect(server).close()
    wait_until(lambda: not len(serving_of(server).connections))
