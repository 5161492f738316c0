# SPDX-License-Identifier: MIT
"""asyncio's streams as people write them: a coroutine for each connection; on asyncio's own loop or uvloop."""

import asyncio

from _work import BACKLOG, HOST, RECEIVE_BYTES, parse, tls_context


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(RECEIVE_BYTES):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def serve(work: str) -> None:
    handler = lines if work == "lines" else echo
    server = await asyncio.start_server(handler, HOST, 0, backlog=BACKLOG, ssl=tls_context(options))
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


options = parse(loop=("asyncio", "uvloop"))
if options.loop == "uvloop":
    import uvloop

    uvloop.run(serve(options.work))
else:
    asyncio.run(serve(options.work))
