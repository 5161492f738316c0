# SPDX-License-Identifier: MIT
"""What every server written for socketserver's interface shares: the same handlers, so that only the engine differs."""

from __future__ import annotations

import argparse
import resource
from types import ModuleType
from typing import Any

BACKLOG = 4096  # what every server in these benchmarks asks for: no rival loses a handshake in a burst
RECEIVE_BYTES = 65536  # as floor.c
WORKS = ("echo", "lines", "churn", "udp")


def parse_work() -> str:
    """Return the kind of work that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", choices=WORKS, default="echo")
    return str(parser.parse_args().work)


def raise_file_limit() -> None:
    """Let the process open as many files as the hard limit permits."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_handler(module: ModuleType, work: str) -> type[Any]:
    """Return the handler class for `work`, built on the handler classes of `module` (socketserver or harken)."""

    class Echo(module.BaseRequestHandler):  # type: ignore[misc,name-defined]
        def handle(self) -> None:
            receive, send = self.request.recv, self.request.sendall
            while data := receive(RECEIVE_BYTES):
                send(data)

    class Lines(module.StreamRequestHandler):  # type: ignore[misc,name-defined]
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line)

    class Datagram(module.BaseRequestHandler):  # type: ignore[misc,name-defined]
        def handle(self) -> None:
            data, sock = self.request
            sock.sendto(data, self.client_address)

    return {"echo": Echo, "churn": Echo, "lines": Lines, "udp": Datagram}[work]


def serve(module: ModuleType, stream: str, datagram: str, *, daemon: bool = False, **keywords: Any) -> None:
    """Serve until killed: print the port, then run `serve_forever`.

    Args:
        module: socketserver, or what stands in for it.
        stream: the name of its server class for connections.
        datagram: the name of its server class for datagrams.
        daemon: whether its threads are daemons (stdlib then keeps no list of them).
        keywords: settings that are passed to the server class.
    """
    work = parse_work()
    raise_file_limit()
    name = datagram if work == "udp" else stream
    attributes = {"request_queue_size": BACKLOG, "daemon_threads": daemon}
    server_class = type(name, (getattr(module, name),), attributes)
    with server_class(("127.0.0.1", 0), make_handler(module, work), **keywords) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
