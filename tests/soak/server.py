"""A server in a process of its own: ``python server.py ENGINE WORK SETTINGS``, the last as JSON.

It prints its port, then a line for each line that it reads: ``census`` prints what it holds, as JSON; ``release`` lets
a handler go on that keeps its thread; ``moved`` prints how many bytes the flood has moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import harken

LENGTH = struct.Struct(">I")
COUNT = struct.Struct(">Q")
PAGE_BYTES = resource.getpagesize()


class Hashes(harken.BaseRequestHandler):
    """Answers each message (its length, then its bytes) with its SHA-256 and itself, by the socket's own methods."""

    def take(self, size: int) -> bytes:
        parts = []
        while size and (part := self.request.recv(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def handle(self) -> None:
        while head := self.take(LENGTH.size):
            message = self.take(LENGTH.unpack(head)[0])
            self.request.sendall(hashlib.sha256(message).digest() + message)


class HashedFiles(harken.StreamRequestHandler):
    """The same by ``rfile`` and ``wfile``."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        while head := self.rfile.read(LENGTH.size):
            message = self.rfile.read(LENGTH.unpack(head)[0])
            self.wfile.write(hashlib.sha256(message).digest())
            self.wfile.write(message)


class AsyncHashes(harken.AsyncStreamRequestHandler):
    """The same by ``await``."""

    disable_nagle_algorithm = True

    async def handle(self) -> None:
        while head := await self.rfile.read(1):
            head += await self.rfile.readexactly(LENGTH.size - 1)
            message = await self.rfile.readexactly(LENGTH.unpack(head)[0])
            self.wfile.write(hashlib.sha256(message).digest())
            self.wfile.write(message)
            await self.wfile.drain()


class AsyncEnds(harken.AsyncStreamRequestHandler):
    """Ends in the ways of ``Ends`` that are another's here."""

    async def handle(self) -> None:
        word = (await self.rfile.readline()).strip()
        if word == b"raise":
            raise ValueError("asked to")
        if word == b"echo":
            self.wfile.write(await self.rfile.readline())
        elif word == b"wait":
            await self.request.recv(1)
        elif word == b"timeout":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await self.request.recv(1)


class Ends(harken.StreamRequestHandler):
    """Ends in every way that a connection can end, as its first line says."""

    def handle(self) -> None:
        word = self.rfile.readline().strip()
        if word == b"raise":
            raise ValueError("asked to")
        if word == b"echo":
            self.wfile.write(self.rfile.readline())
        elif word == b"wait":
            self.request.recv(1)
        elif word == b"timeout":
            self.request.settimeout(0.001)
            with contextlib.suppress(TimeoutError):
                self.request.recv(1)


class Processes(harken.StreamRequestHandler):
    """Starts a process for each line, in the way that it says, and answers with its status."""

    def handle(self) -> None:
        for line in self.rfile:
            if line == b"fork\n":
                pid = os.fork()
                if not pid:
                    os._exit(7)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            else:
                status = subprocess.run(["sh", "-c", "exit 7"], check=False).returncode
            self.wfile.write(b"%d\n" % status)


class Flood:
    """How much the flooding connection has moved."""

    moved = 0
    released = threading.Event()


class Crowd(harken.StreamRequestHandler):
    """One connection of a crowd; its first line says which part it plays."""

    def handle(self) -> None:
        part = self.rfile.readline().strip().decode()
        self.wfile.write(b"ready\n")
        getattr(self, part)()

    def block(self) -> None:
        Flood.released.wait()

    def quiet(self) -> None:
        while self.request.recv(1):
            self.request.sendall(COUNT.pack(Flood.moved))

    def large(self) -> None:
        while part := self.request.recv(65536):
            Flood.moved += len(part)

    def small(self) -> None:
        while part := self.request.recv(64):
            Flood.moved += len(part)

    def lines(self) -> None:
        for line in self.rfile:
            Flood.moved += len(line)

    def out(self) -> None:
        data = bytes(16384)
        self.request.recv(1)
        with contextlib.suppress(OSError):
            while True:
                self.request.sendall(data)
                Flood.moved += len(data)


WORKS = {each.__name__.lower(): each for each in (Hashes, HashedFiles, AsyncHashes, Ends, AsyncEnds, Processes, Crowd)}
# What a connection that leaks would hold on to.
WATCHED: tuple[Any, ...] = (None, True, b"", (), harken.BaseRequestHandler, Ends, AsyncEnds, contextlib, time)


class Server(harken.TCPServer):
    request_queue_size = 1024
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: handlers raise on purpose."""


def census(server: Server) -> dict[str, Any]:
    gc.collect()
    status = Path("/proc/self/statm").read_text().split()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "rss": int(status[1]) * PAGE_BYTES,
        "blocks": sys.getallocatedblocks(),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "references": [sys.getrefcount(each) for each in (*WATCHED, server, type(server))],
        "open": len(server.connections()),
    }


def answer(server: Server, word: str) -> str:
    if word == "release":
        Flood.released.set()
    return json.dumps(census(server)) if word == "census" else str(Flood.moved)


def main(engine: str, work: str, settings: str) -> None:
    signals = 0

    def count(number: int, frame: object) -> None:
        nonlocal signals
        signals += 1
        print(signals, flush=True)

    signal.signal(signal.SIGUSR1, count)
    with Server(("127.0.0.1", 0), WORKS[work], engine=engine, **json.loads(settings)) as server:
        threading.Thread(target=listen, args=(server,), daemon=True).start()
        print(server.server_address[1], flush=True)
        server.serve_forever()


def listen(server: Server) -> None:
    for line in sys.stdin:
        print(answer(server, line.strip()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
