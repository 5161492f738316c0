"""``harken.start``: a server inside a running loop."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

import harken
from harken import green

PATIENCE = 10.0  # seconds


class Async(harken.AsyncStreamRequestHandler):
    """Answers with its thread's identifier."""

    async def handle(self):
        """Answer."""
        async for _ in self.rfile:
            await asyncio.sleep(0)
            self.wfile.write(f"{threading.get_ident()}\n".encode())


class Blocking(harken.StreamRequestHandler):
    """The same for blocking engines."""

    def handle(self):
        """Answer."""
        for _ in self.rfile:
            self.wfile.write(f"{threading.get_ident()}\n".encode())


class Waiting(Blocking):
    """The same, by way of the loop."""

    def handle(self):
        """Answer."""
        for _ in self.rfile:
            green.wait(asyncio.sleep(0.001))
            self.wfile.write(f"{threading.get_ident()}\n".encode())


def run(loop, coroutine):
    """Run in a loop of this kind."""
    with asyncio.Runner(loop_factory=__import__(loop).new_event_loop) as it:
        return it.run(asyncio.wait_for(coroutine, 3 * PATIENCE))


async def ask(address):
    """Open a connection, ask once; return the answer and the writer."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"x\n")
    try:
        return int(await asyncio.wait_for(reader.readline(), PATIENCE)), writer
    except BaseException:
        writer.close()
        raise


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    "handler, engine, inside",
    [
        (Async, None, True),
        (Blocking, "green", True),
        (Waiting, "green", True),
        (Blocking, "asyncio", False),
        (Blocking, "thread", False),
        (Blocking, "pool", False),
        (Blocking, None, False),
    ],
)
def test_handlers_run_in_this_loop_or_in_threads(loop, handler, engine, inside):
    """As the engine says; many clients, then a drain that cuts nobody."""

    async def main():
        settings = {} if engine is None else {"engine": engine}
        async with await harken.start(handler, "tcp://127.0.0.1:0", **settings) as server:
            answers = await asyncio.gather(*[ask(server.server_address) for _ in range(10)])
            assert {thread == threading.get_ident() for thread, _ in answers} == {inside}
            assert len(server.connections()) == 10
            for _, writer in answers:
                writer.close()
        return await server.drain()

    report = run(loop, main())
    assert (report.cut, report.left) == (0, 0)


def test_several_addresses_and_the_verbs(tmp_path):
    """Suspend, resume, configure, stats, close_connection; the addresses are those that were bound."""

    async def main():
        server = await harken.start(Async, "tcp://127.0.0.1:0", f"unix:{tmp_path}/s", "udp://127.0.0.1:0")
        assert [url.partition(":")[0] for url in server.addresses] == ["tcp", "unix", "udp"]
        assert server.addresses[0] == "tcp://{}:{}".format(*server.server_address)
        _, writer = await ask(server.server_address)
        server.suspend()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ask(server.server_address), 0.05)
        server.resume()
        _, other = await ask(server.server_address)
        server.configure(drain_timeout=PATIENCE)
        assert server.close_connection(server.connections()[0].id)
        assert not server.close_connection("nobody")
        assert server.stats()[server.addresses[0]]["engine"] == "asyncio"
        for each in (writer, other):
            each.close()
        return await server.drain()

    assert run("asyncio", main()).cut == 0


def test_drain_waits_cuts_and_closes():
    """One that leaves in time, one that does not; afterwards the port is free and nothing listens."""

    async def main():
        server = await harken.start(Async, "tcp://127.0.0.1:0")
        (_, leaves), (_, stays) = [await ask(server.server_address) for _ in range(2)]
        asyncio.get_running_loop().call_later(0.05, leaves.close)
        report, same = await asyncio.gather(server.drain(0.3), server.drain())
        assert same is report
        stays.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*server.server_address)
        return report

    report = run("asyncio", main())
    assert (report.finished, report.cut, report.left) == (1, 1, 0)
    assert len(report.connections) == 1


class Stays(Async):
    """Answers once, and never ends by itself."""

    async def handle(self):
        """Answer."""
        await self.rfile.readline()
        await self.wfile.write(b"1\n")
        await asyncio.get_running_loop().create_future()


async def by_drain(server):
    """By a later drain, which is shorter."""
    return await server.drain(0)


async def by_close(server):
    """At once."""
    await server.close()


async def by_cancelling(server):
    """As ``asyncio.run`` and its like do it to who serves for ever."""
    serving = asyncio.create_task(server.serve_forever())
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


@pytest.mark.parametrize("stop", [by_close, by_drain, by_cancelling])
def test_who_is_in_a_hurry_ends_a_drain(stop):
    """One that is under way, and would wait for its connections much longer."""

    async def main():
        server = await harken.start(Stays, "tcp://127.0.0.1:0")
        _, writer = await ask(server.server_address)
        drain = asyncio.create_task(server.drain(1000))
        await asyncio.sleep(0)
        await stop(server)
        report = await drain
        writer.close()
        return report.cut

    assert run("asyncio", main()) == 1


def test_two_servers_in_one_loop():
    """Each with a hub of its own; a handler of one asks the other."""

    class Asks(harken.AsyncStreamRequestHandler):
        async def handle(self):
            async for _ in self.rfile:
                answer, writer = await ask(self.server.other)
                writer.close()
                await self.wfile.write(b"%d\n" % answer)

    async def main():
        async with (
            await harken.start(Async, "tcp://127.0.0.1:0") as one,
            await harken.start(Asks, "tcp://127.0.0.1:0") as two,
        ):
            two._servers[0].other = one.server_address
            answer, writer = await ask(two.server_address)
            writer.close()
            return answer == threading.get_ident()

    assert run("asyncio", main())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("handler, engine", [(Async, "asyncio"), (Blocking, "green"), (Blocking, "thread")])
def test_a_server_that_is_left_ends_with_its_loop(loop, handler, engine):
    """Whatever ended the program's part of it: nobody hangs at a door that nobody opens any more."""
    left = []

    async def main():
        left.append(await harken.start(handler, "tcp://127.0.0.1:0", engine=engine))
        client = await asyncio.to_thread(socket.create_connection, left[0].server_address, PATIENCE)
        left.append(client)
        client.sendall(b"x\n")
        assert await asyncio.to_thread(client.recv, 100)
        raise LookupError("of the program's own")

    with pytest.raises(LookupError):
        run(loop, main())
    server, client = left
    with client:
        assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.server_address, PATIENCE)
    assert server.connections() == []


def test_serve_forever():
    """It ends with a drain, and closes the server when it is cancelled."""

    async def main():
        server = await harken.start(Async, "tcp://127.0.0.1:0")
        waiting = asyncio.create_task(server.serve_forever())
        await asyncio.sleep(0)
        await server.drain(0)
        await waiting
        server = await harken.start(Async, "tcp://127.0.0.1:0")
        waiting = asyncio.create_task(server.serve_forever())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*server.server_address)

    run("asyncio", main())


def test_what_is_wrong_is_told_at_once():
    """A handler that does not fit, a port in use: nothing stays open."""

    async def main():
        with pytest.raises(harken.ConfigError, match="engine='asyncio'"):
            await harken.start(Async, "tcp://127.0.0.1:0", engine="thread")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            with pytest.raises(OSError, match="in use"):
                await harken.start(Async, f"tcp://127.0.0.1:{taken.getsockname()[1]}")

    run("asyncio", main())


@pytest.mark.parametrize("running", ["asyncio", "uvloop"])
def test_a_loop_that_is_not_the_running_one_is_warned_of(running):
    """``loop=`` chooses nothing here; the one that runs is no news."""
    other = {"asyncio": "uvloop", "uvloop": "asyncio"}[running]

    async def main():
        with pytest.warns(RuntimeWarning, match=f"{other!r} is not heeded.*which is {running}'s") as told:
            await (await harken.start(Async, "tcp://127.0.0.1:0", loop=other)).close()
        assert [each.filename for each in told] == [__file__]
        await (await harken.start(Async, "tcp://127.0.0.1:0", loop=running)).close()

    run(running, main())
