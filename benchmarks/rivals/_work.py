# SPDX-License-Identifier: MIT
"""What the servers in Python share: their arguments, and the same handlers for all with socketserver's interface."""

from __future__ import annotations

import argparse
import resource
import ssl
from types import ModuleType
from typing import Any

BACKLOG = 4096  # what every server in these benchmarks asks for: no rival loses a handshake in a burst
RECEIVE_BYTES = 65536  # as floor.c
HOST = "127.0.0.1"
WORKS = ("echo", "lines", "churn", "udp", "tls")


def parse(**choices: tuple[str, ...]) -> argparse.Namespace:
    """Return the arguments that every server takes, and options of its own: their choices, the default first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", choices=WORKS, default="echo")
    parser.add_argument("--certificate", help="PEM file; for tls")
    parser.add_argument("--key", help="PEM file; for tls")
    for name, words in choices.items():
        parser.add_argument(f"--{name}", choices=words, default=words[0])
    raise_file_limit()
    return parser.parse_args()


def raise_file_limit() -> None:
    """Let the process open as many files as the hard limit permits."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def tls_context(options: argparse.Namespace) -> ssl.SSLContext | None:
    """Return the server's context, or None where the work is not tls."""
    if options.work != "tls":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options.certificate, options.key)
    context.num_tickets = 1  # as Go's and harken's: OpenSSL's two would make each handshake dearer
    return context


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

    return {"echo": Echo, "churn": Echo, "tls": Echo, "lines": Lines, "udp": Datagram}[work]


def serve(
    module: ModuleType,
    stream: str,
    datagram: str = "",
    *,
    options: argparse.Namespace | None = None,
    handler: type[Any] | None = None,
    daemon: bool = False,
    **keywords: Any,
) -> None:
    """Serve until killed: print the port, then run `serve_forever`. socketserver gets TLS as programs give it TLS.

    Args:
        module: socketserver, or what stands in for it.
        stream: the name of its server class for connections.
        datagram: the name of its server class for datagrams.
        options: the arguments, where the server has some of its own.
        handler: a handler class of its own.
        daemon: whether its threads are daemons (stdlib then keeps no list of them).
        keywords: settings that are passed to the server class.
    """
    options = options or parse()
    name = datagram if options.work == "udp" else stream
    attributes = {"request_queue_size": BACKLOG, "daemon_threads": daemon}
    knows_tls = hasattr(module, "TLS")
    if options.work == "tls" and knows_tls:
        keywords["tls"] = module.TLS(options.certificate, options.key)
    server_class = type(name, (getattr(module, name),), attributes)
    with server_class((HOST, 0), handler or make_handler(module, options.work), **keywords) as server:
        context = tls_context(options)
        if context is not None and not knows_tls:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        print(server.server_address[1], flush=True)
        server.serve_forever()
