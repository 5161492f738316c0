# SPDX-License-Identifier: MIT
"""asyncio's protocols: callbacks, no coroutine; on asyncio's own loop or uvloop.

With `--lines batch` the lines that one read brought are answered by one write, with the same work for each line.
"""

import asyncio
from typing import Any

from _work import BACKLOG, HOST, parse, tls_context


class Echo(asyncio.Protocol):
    """Answers what comes."""

    def connection_made(self, transport: Any) -> None:
        self.write = transport.write

    def data_received(self, data: bytes) -> None:
        self.write(data)


class Lines(asyncio.Protocol):
    """Answers line by line, a write each."""

    def connection_made(self, transport: Any) -> None:
        self.write = transport.write
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.line_received(line + b"\n")

    def line_received(self, line: bytes) -> None:
        self.write(line)


class BatchedLines(Lines):
    """Gathers the answers to what one read brought."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.answers: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.write(b"".join(self.answers))
        self.answers.clear()

    def line_received(self, line: bytes) -> None:
        self.answers.append(line)


class Datagrams(asyncio.DatagramProtocol):
    """Answers each datagram."""

    def connection_made(self, transport: Any) -> None:
        self.sendto = transport.sendto

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.sendto(data, addr)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    if options.work == "udp":
        transport, _ = await loop.create_datagram_endpoint(Datagrams, (HOST, 0))
        print(transport.get_extra_info("sockname")[1], flush=True)
        await asyncio.Event().wait()
    lines = BatchedLines if options.lines == "batch" else Lines
    protocol = lines if options.work == "lines" else Echo
    server = await loop.create_server(protocol, HOST, 0, backlog=BACKLOG, ssl=tls_context(options))
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


options = parse(loop=("asyncio", "uvloop"), lines=("each", "batch"))
if options.loop == "uvloop":
    import uvloop

    uvloop.run(serve())
else:
    asyncio.run(serve())
