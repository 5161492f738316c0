"""How async handlers end that are cut: by cancellation, with time to clean up."""

from __future__ import annotations

import pytest

# The handler waits for what nobody sends, so that only its cancellation ends it.
HANDLER = """
import asyncio, sys
import harken
from harken import _hub
said = []

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        try:
            await self.rfile.readline()
            self.wfile.write(b"begun")
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            said.append("cancelled")
            raise
        finally:
            await clean_up()

    async def finish(self):
        said.append("finish")
        await super().finish()
        said.append("finished")

async def quickly():
    await asyncio.sleep(0)
    said.append("cleaned up")

async def never():
    await asyncio.get_running_loop().create_future()

clean_up = globals()[sys.argv[1]]
"""

STARTED = (
    HANDLER
    + """
async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: said.append(repr(context)))
    server = await harken.start(Handler, "tcp://127.0.0.1:0")
    reader, writer = await asyncio.open_connection(*server.server_address)
    writer.write(b"line\\n")
    await reader.readexactly(5)
    report = await server.drain(0)
    assert asyncio.current_task() is not None
    writer.close()
    print(_hub.kind, report.cut, *said)

with asyncio.Runner(loop_factory=__import__(sys.argv[2]).new_event_loop) as runner:
    runner.run(main())
"""
)

# The thread is a daemon's: at the end of the process it is told to leave.
PLAIN = (
    HANDLER
    + """
import atexit, socket, threading
atexit.register(lambda: print(_hub.kind, *said))  # after harken's own end
server = harken.AsyncTCPServer(("127.0.0.1", 0), Handler, loop=sys.argv[2])
server.daemon_threads = True
serving = threading.Thread(target=server.serve_forever, daemon=True)
serving.start()
client = socket.create_connection(server.server_address, 10)
client.sendall(b"line\\n")
assert client.recv(5) == b"begun"
server.drain(0)
server.server_close()
serving.join()
assert not said
"""
)

WAYS = {"quickly": "cancelled cleaned up finish finished", "never": "cancelled finish finished"}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_in_a_loop_of_the_programs_own(run_program, kind, loop, how):
    """It is cancelled and cleans up, within bounds; the loop has nothing to complain of."""
    out, errors = run_program("-c", STARTED, how, loop, env={"HARKEN_HUB": kind}).communicate(timeout=40)
    assert (out, errors) == (f"{kind} 1 {WAYS[how]}\n", "")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_at_the_end_of_the_process(run_program, kind, loop, how):
    """The same in the loop of the engine's own."""
    out, errors = run_program("-c", PLAIN, how, loop, env={"HARKEN_HUB": kind}).communicate(timeout=40)
    assert (out, errors) == (f"{kind} {WAYS[how]}\n", "")
