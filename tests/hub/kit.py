"""What tests of the hub's connection share."""

from __future__ import annotations

import socket
import threading

import pytest

PATIENCE = 5.0  # seconds
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
LENT = pytest.mark.parametrize("lent", [False, True], ids=["own", "lent"])
BIG = 12_000_000  # bytes: more than the buffers of both ends can take (tcp_wmem and tcp_rmem: some 10 MB)


def drain(far, size):
    """Read ``size`` bytes in a thread; return the thread and where they will be."""
    got = bytearray()

    def read():
        while len(got) < size and (part := far.recv(65536)):
            got.extend(part)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, got


def later(function, *args):
    """Call soon, from another thread, which the test must join."""
    timer = threading.Timer(0.03, function, args)
    timer.start()
    return timer
