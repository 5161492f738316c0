# SPDX-License-Identifier: MIT
"""harken's engine asyncio: `async def handle`, on asyncio's own loop or uvloop."""

from _work import RECEIVE_BYTES, parse, serve

import harken


class Echo(harken.AsyncRequestHandler):
    async def handle(self) -> None:
        while data := await self.request.recv(RECEIVE_BYTES):
            await self.request.sendall(data)


class Lines(harken.AsyncStreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.rfile:
            self.wfile.write(line)
            await self.wfile.drain()


options = parse(loop=("asyncio", "uvloop"))
handler = Lines if options.work == "lines" else Echo
serve(harken, "AsyncTCPServer", options=options, handler=handler, loop=options.loop)
