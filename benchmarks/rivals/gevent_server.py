# SPDX-License-Identifier: MIT
"""gevent's own servers: a greenlet for each connection, on libev."""

from typing import Any

from _work import BACKLOG, HOST, RECEIVE_BYTES, parse
from gevent.server import DatagramServer, StreamServer


def echo(sock: Any, _address: object) -> None:
    try:
        while data := sock.recv(RECEIVE_BYTES):
            sock.sendall(data)
    except OSError:
        pass  # the client has gone


def lines(sock: Any, _address: object) -> None:
    with sock.makefile("rb") as file:
        for line in file:
            sock.sendall(line)


class Datagrams(DatagramServer):  # type: ignore[misc]
    def handle(self, data: bytes, address: tuple[str, int]) -> None:  # type: ignore[override]
        self.socket.sendto(data, address)


options = parse()
if options.work == "udp":
    server = Datagrams((HOST, 0))
else:
    tls = {"certfile": options.certificate, "keyfile": options.key} if options.work == "tls" else {}
    server = StreamServer((HOST, 0), lines if options.work == "lines" else echo, backlog=BACKLOG, **tls)
server.start()
print(server.server_port, flush=True)
server.serve_forever()
