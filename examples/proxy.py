"""A TCP proxy that tells the server behind it who its clients are, by a PROXY header.

BACKEND=tcp://127.0.0.1:9000 harken serve examples/proxy.py:Proxy --engine green
Behind it, on harken:        harken serve examples/echo.py:Echo --bind tcp://:9000 --proxy v2 --proxy-from 127.0.0.1
"""

import contextlib
import os
import socket
import threading

import harken
from harken import green

BACKEND = os.environ.get("BACKEND", "tcp://127.0.0.1:9000")
CHUNK = 65536  # bytes held for each direction: a slow reader slows its sender down, and costs no more memory


class Proxy(harken.BaseRequestHandler):
    def handle(self):
        with green.connect(BACKEND, timeout=10) as backend:
            backend.settimeout(None)
            backend.sendall(self.header().encode())
            answers = beside(copy, backend, self.request)
            copy(self.request, backend)
            answers.join()

    def header(self):
        proxy = self.peer.proxy  # there may be another proxy in front of this one
        destination = proxy.destination if proxy and proxy.forwarded else self.request.getsockname()
        return harken.ProxyHeader(self.client_address, destination)


def copy(source, sink):
    """Copy to the end, and hand the end on: the other direction may go on after it."""
    try:
        while data := source.recv(CHUNK):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # one of them is gone, and what the other says is of no more use
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def beside(function, *args):
    """Run a function beside the handler, in a thread of the handler's own kind."""
    if green.current() is not None:
        return green.spawn(function, *args)
    thread = threading.Thread(target=function, args=args)
    thread.start()
    return thread
