"""What async handlers read and write: sizes, timeouts, what is interrupted, and the order in which it goes out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading

import pytest
from talking import PATIENCE, talk
from waiting import wait_until

import harken

# -- reading ---------------------------------------------------------------------------------------------------------


def test_lines():
    """``readline``, with a limit, iteration, and what is left at the end."""

    async def handle(self):
        first = await self.rfile.readline()
        short = await self.rfile.readline(3)
        return first, short, [line async for line in self.rfile], await self.rfile.readline()

    assert talk(handle, b"one\ntwo and\nthree\nrest")[0] == (b"one\n", b"two", [b" and\n", b"three\n", b"rest"], b"")


def test_sizes_are_asyncios():
    """``read(n)`` gives what is there, ``readexactly`` waits for all, ``read()`` for the end."""

    async def handle(self):
        some = await self.rfile.read(100)
        exact = await self.rfile.readexactly(4)
        until = await self.rfile.readuntil(b"--")
        try:
            await self.rfile.readexactly(100)
        except asyncio.IncompleteReadError as error:
            return some, exact, until, error.partial, error.expected, await self.rfile.read()
        return None

    def say(client):
        client.sendall(b"some")
        threading.Timer(0.1, lambda: (client.sendall(b"4444until--rest"), client.shutdown(socket.SHUT_WR))).start()
        return client.recv(10)

    assert talk(handle, say)[0] == (b"some", b"4444", b"until--", b"rest", 100, b"")


def test_a_large_body():
    """More than any buffer."""
    body = os.urandom(3_000_000)

    async def handle(self):
        data = await self.rfile.readexactly(1_000_000) + await self.rfile.read()
        self.wfile.write(data)
        await self.wfile.drain()

    def say(client):
        def send():
            client.sendall(body)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        got = b""
        while part := client.recv(65536):
            got += part
        sender.join()
        return got

    assert talk(handle, say)[1] == body


def test_nothing_is_lost_by_an_interrupted_read():
    """A timeout in the midst of a line, in this task or in another, leaves it to the next read."""
    seen = []

    async def handle(self):
        for wait in (self.by_timeout, self.by_wait_for):
            try:
                await wait()
            except TimeoutError:
                seen.append("timeout")
        await self.request.sendall(b"go")
        return await self.rfile.readline(), await self.rfile.readexactly(3)

    class Base(harken.AsyncStreamRequestHandler):
        async def by_timeout(self):
            async with asyncio.timeout(0.05):
                await self.rfile.readline()

        async def by_wait_for(self):
            await asyncio.wait_for(self.rfile.readexactly(100), 0.05)

    def say(client):
        client.sendall(b"begin ")
        client.recv(2)
        client.sendall(b"end\nabc")
        return client.recv(1)

    assert talk(handle, say, base=Base)[0] == (b"begin end\n", b"abc")
    assert seen == ["timeout", "timeout"]


@pytest.mark.parametrize("source", ["request", "rfile"])
def test_nothing_is_lost_whenever_another_tasks_read_is_cancelled(source):
    """Before it began, while it waits, or when it has what it asked for: all comes, in order."""

    async def handle(self):
        read = self.request.recv if source == "request" else self.rfile.read
        got = b""
        for turns in [*range(10)] * 3:
            task = asyncio.create_task(read(3))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                got += await task
            with contextlib.suppress(TimeoutError):
                got += await asyncio.wait_for(read(2), 0)
            if turns % 2:
                got += await read(1)
        while part := await read(4):
            got += part
        return got

    data = bytes(range(256))
    assert talk(handle, data)[0] == data


@pytest.mark.parametrize("source, ahead", [("request", b""), ("rfile", b""), ("rfile", b"ahead")])
@pytest.mark.parametrize("turns", range(8))
def test_whoever_reads_next_gets_what_came_for_a_cancelled_task(source, ahead, turns):
    """By ``request`` or by ``rfile``, and behind what that has read ahead."""
    clients = []

    async def handle(self):
        await self.rfile.readline()
        task = asyncio.create_task(self.request.recv(100))
        await asyncio.to_thread(wait_until, lambda: self.request.waits_for() == "reading")
        clients[0].sendall(b"first")
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        expected = ahead + b"first" + b"second"
        with contextlib.suppress(asyncio.CancelledError):
            assert await task == b"first"
            expected = ahead + b"second"
        clients[0].sendall(b"second")
        read = self.request.recv if source == "request" else self.rfile.read
        got = b""
        while len(got) < len(expected):
            got += await read(4)
        return got == expected

    def say(client):
        clients.append(client)
        client.sendall(b"line\n" + ahead)
        return client.recv(1)

    assert talk(handle, say) == (True, b"")


def test_the_timeout_of_the_class():
    """``timeout`` bounds one operation."""

    class Base(harken.AsyncStreamRequestHandler):
        timeout = 0.05
        disable_nagle_algorithm = True

    async def handle(self):
        assert self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await self.rfile.readline()

    assert isinstance(talk(handle, lambda client: client.recv(1), base=Base)[0], TimeoutError)


# -- writing ---------------------------------------------------------------------------------------------------------


def test_writes_may_be_left_or_awaited():
    """In order, whichever way."""

    async def handle(self):
        self.wfile.write(b"a")
        await self.wfile.write(bytearray(b"b"))
        self.wfile.writelines([b"c", memoryview(b"d")])
        await self.request.sendall(b"e")
        await self.wfile.drain()

    assert talk(handle)[1] == b"abcde"


def test_write_does_not_wait_and_drain_does():
    """A client that does not read holds up the one who drains, and nobody else."""
    big = bytes(20_000_000)
    written, go_on = threading.Event(), threading.Event()
    seen = []

    async def handle(self):
        self.wfile.write(big)
        self.wfile.write(b"end")
        written.set()
        seen.append(go_on.is_set())
        await self.wfile.drain()
        seen.append(go_on.is_set())

    def say(client):
        assert written.wait(PATIENCE)
        go_on.set()
        size, last = 0, b""
        while part := client.recv(1 << 20):
            size += len(part)
            last = part
        return size, last[-3:]

    assert talk(handle, say)[1] == (len(big) + 3, b"end")
    assert seen == [False, True]


def test_answers_to_a_pipeline_are_joined_and_never_held_back():
    """They are sent before the handler waits, for its client or for anything else."""
    go_on = threading.Event()

    async def handle(self):
        async for line in self.rfile:
            self.wfile.write(line)
            if line == b"nap\n":
                assert await asyncio.to_thread(go_on.wait, PATIENCE)
        return "to the end"

    def say(client):
        client.sendall(b"a\nb\nnap\nc\n")
        first = client.recv(100)
        go_on.set()
        second = client.recv(100)
        client.shutdown(socket.SHUT_WR)
        return first, second, client.recv(1)

    assert talk(handle, say) == ("to the end", (b"a\nb\nnap\n", b"c\n", b""))


def slowly(say, go_on):
    """Return what a client gets that takes little before ``go_on`` is set."""

    def client_of(client):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(say)
        assert go_on.wait(PATIENCE)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        got = b""
        while part := client.recv(65536):
            got += part
        return got

    return client_of


@pytest.mark.parametrize("size", [2, 10000])
def test_what_another_task_writes_comes_behind(size):
    """Also when answers are joined, of which the client takes none for now."""
    go_on = threading.Event()

    async def handle(self):
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await self.rfile.readline()
        self.wfile.write(bytes(60000))
        self.wfile.write(b"1" * size)

        async def beside():
            self.wfile.write(b"2" * size)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            go_on.set()
            await self.wfile.drain()

        await asyncio.create_task(beside())
        self.wfile.write(b"3")

    outcome, got = talk(handle, slowly(b"a\nb\n", go_on))
    assert outcome is None
    assert got == bytes(60000) + b"1" * size + b"2" * size + b"3"


@pytest.mark.parametrize("size", [2, 10000])
@pytest.mark.parametrize("beside", [False, True])
def test_sendall_comes_behind_what_was_written(size, beside):
    """To ``wfile``, and is not sent yet."""
    go_on = threading.Event()

    def widen(self):
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        go_on.set()

    async def handle(self):
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await self.rfile.readline()
        self.wfile.write(bytes(60000))
        self.wfile.write(b"1" * size)
        asyncio.get_running_loop().call_later(0.02, widen, self)
        sending = self.request.sendall(b"2" * size)
        await (asyncio.ensure_future(sending) if beside else sending)
        self.wfile.write(b"3")

    outcome, got = talk(handle, slowly(b"a\nb\n", go_on))
    assert outcome is None
    assert got == bytes(60000) + b"1" * size + b"2" * size + b"3"


def test_a_peer_that_has_gone_is_told_where_it_is_awaited():
    """``write`` itself never raises for the peer; ``drain`` does, and the end of the handler does not."""
    reset = threading.Event()

    async def handle(self):
        await self.wfile.write(b"x")
        await asyncio.to_thread(reset.wait, PATIENCE)
        with pytest.raises(ConnectionError):
            for _ in range(100):
                self.wfile.write(b"x" * 1000)
                await self.wfile.drain()
                await asyncio.sleep(0.001)
        self.wfile.write(b"more")
        return "done"

    def say(client):
        client.recv(1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        reset.set()

    assert talk(handle, say)[0] == "done"


MUCH = 20_000_000  # bytes: no kernel takes so many at once


def later(go_on):
    """Return what a client gets that reads once ``go_on`` is set."""

    def client_of(client):
        client.sendall(b"line\n")
        assert go_on.wait(PATIENCE)
        got = bytearray()
        while part := client.recv(1 << 20):
            got += part
        return bytes(got)

    return client_of


def fill(self):
    """Write more than the kernel takes for now."""
    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    self.wfile.write(bytes(MUCH))


def empty_soon(self, go_on):
    """Let the client go on in the loop's next turn."""

    def widen():
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        go_on.set()

    asyncio.get_running_loop().call_soon(widen)


class OnlyHandle(harken.AsyncStreamRequestHandler):
    """Its ``wfile`` may have been closed by ``handle``, so that ``finish`` has nothing to wait for."""

    def finish(self):
        """Leave it."""


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR])
@pytest.mark.parametrize("closed", [False, True])
def test_shutdown_comes_behind_what_was_written(how, closed):
    """Also when ``wfile`` was closed before; it does not wait, and what is written after it is told so."""
    go_on = threading.Event()

    async def handle(self):
        await self.rfile.readline()
        fill(self)
        empty_soon(self, go_on)
        if closed:
            self.wfile.close()
        self.request.shutdown(socket.SHUT_WR)
        self.request.shutdown(how)
        assert not go_on.is_set()
        await self.wfile.drain()
        if not closed:
            self.wfile.write(b"more")
            with pytest.raises(BrokenPipeError):
                await self.wfile.sent()
        return await self.rfile.read()

    outcome, got = talk(handle, later(go_on), base=OnlyHandle if closed else harken.AsyncStreamRequestHandler)
    assert (outcome, got.count(0), len(got)) == (b"", MUCH, MUCH)


def test_shutdown_where_nothing_is_held_back():
    """It is the socket's."""

    async def handle(self):
        self.wfile.write(b"all")
        self.request.shutdown(socket.SHUT_WR)
        return await self.rfile.read()

    def say(client):
        got = client.recv(10) + client.recv(10)
        client.sendall(b"bye")
        client.shutdown(socket.SHUT_WR)
        return got

    assert talk(handle, say) == (b"bye", b"all")


@pytest.mark.parametrize("verb, data", [("send", b"end"), ("sendmsg", [b"end"])])
def test_other_verbs_that_send_come_behind_what_was_written(verb, data):
    """In the handler's own task they wait; in another one they cannot, and say what can."""
    go_on = threading.Event()

    async def handle(self):
        await self.rfile.readline()
        fill(self)

        async def beside():
            getattr(self.request, verb)(data)

        beside_it = asyncio.create_task(beside())
        empty_soon(self, go_on)
        sent = getattr(self.request, verb)(data)
        assert go_on.is_set()
        with pytest.raises(RuntimeError, match=f"{verb}.. would overtake what wfile holds; `await request.sendall"):
            await beside_it
        return sent

    outcome, got = talk(handle, later(go_on))
    assert (outcome, len(got), got[-3:]) == (3, MUCH + 3, b"end")
