"""Random messages in random pieces over many connections at once come back whole, whatever the engine."""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct

import pytest

from .conftest import FULL, HOSTS, PATIENCE, Serve, Served

CONNECTIONS = 200 if FULL else 100
MESSAGES = 150 if FULL else 5  # a connection: 30,000 over all
LARGEST = 100_000 if FULL else 30_000  # bytes, beyond every buffer that is involved
LENGTH = struct.Struct(">I")


def random_message(chance: random.Random) -> bytes:
    """Return a message, mostly a small one."""
    return chance.randbytes(
        chance.choice((0, 1, chance.randrange(100), chance.randrange(5000), chance.randrange(LARGEST)))
    )


async def send_in_pieces(writer: asyncio.StreamWriter, data: bytes, chance: random.Random) -> None:
    """Send some bytes at a time, now and then letting others go first."""
    while data:
        size = chance.choice((1, 3, chance.randrange(1, 2000), 70_000))
        writer.write(data[:size])
        data = data[size:]
        if chance.random() < 0.5:
            await writer.drain()
            await asyncio.sleep(0)


async def converse(served: Served, seed: int) -> int:
    """Exchange all messages of one connection; return how many came back with the right hash."""
    chance = random.Random(seed)
    reader, writer = await asyncio.open_connection(*served.address)
    right = 0
    try:
        for _ in range(MESSAGES):
            message = random_message(chance)
            await send_in_pieces(writer, LENGTH.pack(len(message)) + message, chance)
            digest = await reader.readexactly(32)
            answer = await reader.readexactly(len(message))
            right += hashlib.sha256(message).digest() == digest == hashlib.sha256(answer).digest()
    finally:
        writer.close()
        await writer.wait_closed()
    return right


async def converse_all(served: Served, seed: int) -> int:
    async with asyncio.timeout(1500 if FULL else PATIENCE):
        return sum(await asyncio.gather(*(converse(served, seed + number) for number in range(CONNECTIONS))))


CASES = [(*host.values, work) for host in HOSTS for work in ("hashes", "hashedfiles")]


@pytest.mark.parametrize("engine, hub, work", [*CASES, ("asyncio", None, "asynchashes")])
def test_every_hash_is_right(engine: str, hub: str | None, work: str, serve: Serve) -> None:
    """Of all messages over many connections each comes back unharmed, and the server saw the bytes that were sent."""
    seed = random.randrange(1 << 32)
    assert asyncio.run(converse_all(serve(engine, hub, work), seed)) == CONNECTIONS * MESSAGES, f"seed {seed}"
