# SPDX-License-Identifier: MIT
"""EasyNetwork's standalone servers on asyncio: a generator of packets for each connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import Any

from _work import BACKLOG, HOST, RECEIVE_BYTES, parse, tls_context
from easynetwork.protocol import DatagramProtocol, StreamProtocol
from easynetwork.serializers import StringLineSerializer
from easynetwork.serializers.abc import AbstractIncrementalPacketSerializer
from easynetwork.servers import AsyncTCPNetworkServer, AsyncUDPNetworkServer
from easynetwork.servers.handlers import AsyncDatagramRequestHandler, AsyncStreamRequestHandler


class Raw(AbstractIncrementalPacketSerializer[bytes, bytes]):
    """What one read brought is a packet."""

    def serialize(self, packet: bytes) -> bytes:
        return packet

    def deserialize(self, data: bytes) -> bytes:
        return data

    def incremental_serialize(self, packet: bytes) -> Generator[bytes]:
        yield packet

    def incremental_deserialize(self) -> Generator[None, bytes, tuple[bytes, bytes]]:
        data = yield
        return data, b""


class Echo(AsyncStreamRequestHandler[Any, Any], AsyncDatagramRequestHandler[Any, Any]):
    """Answers each packet with itself."""

    async def handle(self, client: Any) -> AsyncGenerator[None, Any]:
        packet = yield
        await client.send_packet(packet)


def make_server(options: Any) -> Any:
    if options.work == "udp":
        return AsyncUDPNetworkServer(HOST, 0, DatagramProtocol(Raw()), Echo(), "asyncio")
    serializer: Any = StringLineSerializer(limit=RECEIVE_BYTES) if options.work == "lines" else Raw()
    keywords = {"backlog": BACKLOG, "max_recv_size": RECEIVE_BYTES, "ssl": tls_context(options)}
    return AsyncTCPNetworkServer(HOST, 0, StreamProtocol(serializer), Echo(), "asyncio", **keywords)


async def serve() -> None:
    async with make_server(parse()) as server:
        await server.server_activate()
        print(server.get_addresses()[0].port, flush=True)
        await server.serve_forever()


asyncio.run(serve())
