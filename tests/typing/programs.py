"""What users write, as type checkers see it: ``make types`` reads this file, and nobody runs it."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import ssl
from typing import Any

import harken
from harken import events, explain, green, testing


class Echo(harken.BaseRequestHandler):
    """A plain handler, with what harken gives it."""

    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)
        who: harken.Peer = self.peer
        self.logger.info("%s:%s", who.address, who.port)
        if who.credentials is not None:
            print(who.credentials.pid, self.connection_id)
        if who.proxy is not None and who.proxy.ssl is not None:
            print(who.proxy.authority, who.proxy.ssl.common_name)
        if self.draining:
            return

    def on_drain(self) -> None:
        self.request.sendall(b"bye\n")

    def on_timeout(self, which: str) -> None:
        self.logger.warning(which)


class Lines(harken.StreamRequestHandler):
    """A handler by files, with stdlib's attributes."""

    timeout = 5
    rbufsize = -1
    disable_nagle_algorithm = True
    lazy = True

    def setup(self) -> None:
        super().setup()
        self.lines = 0

    def handle(self) -> None:
        for line in self.rfile:
            self.lines += 1
            self.wfile.write(line.upper())
        self.start_tls()

    def finish(self) -> None:
        super().finish()


class Datagram(harken.BaseRequestHandler):
    """A handler of datagrams."""

    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(data, self.client_address)


class Coroutine(harken.AsyncStreamRequestHandler):
    """Every hook may be ``async def``."""

    async def setup(self) -> None:
        super().setup()

    async def handle(self) -> None:
        async for line in self.rfile:
            await asyncio.sleep(0)
            self.wfile.write(line.upper())
            await self.wfile.drain()
        head: bytes = await self.rfile.readexactly(3)
        await self.wfile.write(head + await self.rfile.readline())
        print(self.peer.address, self.connection_id, self.draining)

    async def finish(self) -> None:
        await super().finish()

    async def on_drain(self) -> None:
        await self.request.sendall(b"bye\n")


class PlainSetup(harken.AsyncRequestHandler):
    """Or a plain ``def``."""

    def setup(self) -> None:
        self.request.settimeout(5)

    async def handle(self) -> None:
        while data := await self.request.recv(100):
            await self.request.sendall(data)


class Server(harken.ThreadingTCPServer):
    """A server class with settings as attributes, and hooks."""

    allow_reuse_address = True
    daemon_threads = True
    max_connections = 5

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return super().verify_request(request, client_address)

    def hello(self) -> None:
        """A method of its own."""


class Web(harken.GreenMixIn, http.server.ThreadingHTTPServer):
    """A mix-in in front of the standard library's server."""


def run() -> int:
    """Every way to serve in a program."""
    with Server(("127.0.0.1", 0), Echo) as server:
        server.hello()
    with Web(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as web:
        web.serve_forever()
    tls = harken.TLS("site.pem", "site.key", alpn=["h2"])
    with harken.background(Server(("127.0.0.1", 0), Lines, engine="green", tls=tls)) as running:
        running.hello()
        running.configure(max_connections=6)
        for connection in running.connections():
            running.close_connection(connection.id, "killed")
        report: harken.DrainReport = running.drain(5)
        print(report.finished, report.left, report.cut, report.seconds)
    stop = events.subscribe(lambda event: print(event.peer, event.reason), "closed")
    stop()
    print(explain.render_text(explain.describe(Server)))
    try:
        return harken.serve(Coroutine, "tcp://127.0.0.1:0", tls=ssl.create_default_context())
    except harken.ConfigError as error:
        print(error)
        return 1


async def run_async() -> None:
    """Within a loop."""
    async with await harken.start(Coroutine, "tcp://127.0.0.1:0", drain_timeout=5) as server:
        print(server.addresses, server.server_address)
        await server.drain()


def wait() -> None:
    """Green threads keep the types of what they run."""
    queue = green.Queue[int](3)
    green.spawn(queue.put, 1)
    number: int = queue.get()
    digest: bytes = green.offload(hashlib.pbkdf2_hmac, "sha256", b"word", b"salt", number)
    with green.timeout(5), green.connect(("127.0.0.1", 1), timeout=5) as other:
        other.sendall(digest)


def test() -> None:
    """What tests use."""
    with testing.connect(Echo) as client:
        client.sendall(b"hello")
    with testing.serve(Coroutine, engine="asyncio") as served, served.connect() as client:
        print(served.url, served.errors, served.server.stats(), client.recv(5))
