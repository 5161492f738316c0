"""Send each line on to everybody else, with `async def handle`: one task a connection, on an event loop.

harken serve examples/async_relay.py:Relay --bind tcp://127.0.0.1:8800
"""

from typing import ClassVar

import harken


class Relay(harken.AsyncStreamRequestHandler):
    here: ClassVar[set["Relay"]] = set()

    async def handle(self):
        self.here.add(self)
        self.wfile.write(b"%d here\n" % len(self.here))
        async for line in self.rfile:
            for other in self.here - {self}:
                other.wfile.write(line)
            await self.wfile.drain()

    async def finish(self):
        self.here.discard(self)
        await super().finish()
