"""Async handlers: their verbs, their files, and that they are tasks as asyncio knows them."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import socket
import struct
import sys
import threading

import pytest

import harken
from harken.testing._census import wait_until

PATIENCE = 10.0  # seconds
LOCAL = ("127.0.0.1", 0)


def talk(handle, say=b"", *, base=harken.AsyncStreamRequestHandler, **settings):
    """Serve one client by ``handle``; return what it returned, or raised, and what the client got."""
    outcome = []

    async def recorded(self):
        try:
            outcome.append(await handle(self))
        except BaseException as error:
            outcome.append(error)

    handler = type("Handler", (base,), {"handle": recorded})
    with harken.background(harken.AsyncTCPServer(LOCAL, handler, **settings)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            if callable(say):
                got = say(client)
            else:
                client.sendall(say)
                client.shutdown(socket.SHUT_WR)
                got = b""
                while part := client.recv(65536):
                    got += part
    return outcome[0], got


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


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_it_is_a_task():
    """Seen by ``current_task`` and ``all_tasks``, with a name, a coroutine and a stack."""

    async def handle(self):
        task = asyncio.current_task()
        await asyncio.sleep(0)
        await self.request.recv(1)
        assert asyncio.current_task() is task
        assert task in asyncio.all_tasks()
        task.set_name("mine")
        assert task.get_name() == "mine"
        assert "mine" in repr(task)
        assert task.get_stack()
        assert asyncio.iscoroutine(task.get_coro())
        for wrong in (task.set_result, task.set_exception):
            with pytest.raises(RuntimeError):
                wrong(None)
        return task

    task, _ = talk(handle, b"x")
    assert task.done()
    assert not task.cancel()


def test_tasks_beside_it():
    """Task groups, ``gather`` and ``create_task``, with the connection in their hands."""

    async def handle(self):
        async with asyncio.TaskGroup() as group:
            line = group.create_task(self.rfile.readline())
            nap = group.create_task(asyncio.sleep(0.01, "slept"))
        both = await asyncio.gather(self.request.recv(5), asyncio.sleep(0, "beside"))

        async def reply():
            self.wfile.write(b"reply ")
            await self.request.sendall(b"sent")

        await asyncio.create_task(reply())
        return line.result(), nap.result(), both

    def say(client):
        client.sendall(b"line\n")
        threading.Timer(0.05, client.sendall, (b"later",)).start()
        return client.recv(6) + client.recv(4)

    assert talk(handle, say) == ((b"line\n", "slept", [b"later", "beside"]), b"reply sent")


def test_a_failing_task_group_cancels_the_read():
    """The handler itself reads while a child fails."""

    async def fail():
        await asyncio.sleep(0.01)
        raise KeyError("child")

    async def handle(self):
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                await self.rfile.readline()
        except* KeyError:
            pass
        return asyncio.current_task().cancelling()

    assert talk(handle, lambda client: client.recv(1))[0] == 0


@pytest.mark.parametrize("waiting", ["recv", "sleep", "running"])
def test_cancel(waiting):
    """Wherever it waits; a cancelled handler is no error."""
    failures = []
    unsubscribe = harken.events.subscribe(failures.append, "handler_failed")

    class Handler(harken.AsyncRequestHandler):
        async def handle(self):
            task = asyncio.current_task()
            if waiting == "running":
                task.cancel()
            else:
                asyncio.get_running_loop().call_later(0.02, task.cancel)
            try:
                await (asyncio.sleep(PATIENCE) if waiting == "sleep" else self.request.recv(1))
            except asyncio.CancelledError:
                seen.append((task.cancelling(), task))
                raise

    seen = []
    with harken.background(harken.AsyncTCPServer(LOCAL, Handler)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(1) == b""
    unsubscribe()
    assert seen[0][0] == 1
    assert seen[0][1].cancelled()
    assert failures == []


def test_waiting_for_what_was_cancelled_is_an_error():
    """Nobody cancelled the handler itself."""
    errors = []
    unsubscribe = harken.events.subscribe(lambda event: errors.append(event.error), "handler_failed")

    class Server(harken.AsyncTCPServer):
        def handle_error(self, request, client_address):
            pass

    class Handler(harken.AsyncRequestHandler):
        async def handle(self):
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

    with harken.background(Server(LOCAL, Handler)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(1) == b""
    unsubscribe()
    assert [type(error) for error in errors] == [RuntimeError]


def test_what_cannot_be_awaited():
    """A bad yield, itself, and a future of another loop, each with asyncio's words."""

    class Bad:
        def __await__(self):
            yield "x"

    async def handle(self):
        words = []
        other = asyncio.new_event_loop()
        for wrong in (Bad(), asyncio.current_task(), other.create_future()):
            try:
                await wrong
            except RuntimeError as error:
                words.append(str(error).split()[1])
        other.close()
        return words

    assert talk(handle)[0] == ["got", "cannot", "<Task"]


def test_context_variables_are_the_connections_own():
    """Children see them, other connections do not."""
    variable = contextvars.ContextVar("variable", default="nobody's")

    async def handle(self):
        before = variable.get()
        variable.set("mine")
        await asyncio.sleep(0)

        async def child():
            return variable.get()

        return before, await asyncio.create_task(child()), variable.get()

    for _ in range(2):
        assert talk(handle)[0] == ("nobody's", "mine", "mine")


def test_harkens_attributes():
    """``peer``, ``connection_id``, ``draining``, ``logger`` as on every engine."""

    async def handle(self):
        return self.peer.address, self.connection_id in {c.id for c in self.server.connections()}, self.draining

    assert talk(handle)[0] == ("127.0.0.1", True, False)


def test_system_exit_ends_that_connection_only(monkeypatch):
    """As in a thread."""
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))

    class Handler(harken.AsyncStreamRequestHandler):
        async def handle(self):
            if await self.rfile.readline() == b"exit\n":
                sys.exit(3)
            self.wfile.write(b"alive")

    with harken.background(harken.AsyncTCPServer(LOCAL, Handler)) as server:
        for word, answer in ((b"exit\n", b""), (b"x\n", b"alive")):
            with socket.create_connection(server.server_address, PATIENCE) as client:
                client.sendall(word)
                assert client.recv(10) == answer
    assert shown == [SystemExit]


def test_close_in_another_task_ends_a_read():
    """Whoever waits is told."""

    async def handle(self):
        asyncio.get_running_loop().call_later(0.02, self.request.close)
        with contextlib.suppress(OSError):
            return await self.request.recv(1)

    assert talk(handle, lambda client: client.recv(1), base=harken.AsyncRequestHandler) == (None, b"")


def test_called_where_no_loop_is():
    """The constructor says what is missing."""

    class Handler(harken.AsyncRequestHandler):
        async def handle(self):
            pass

    near, far = socket.socketpair()
    with near, far, pytest.raises(harken.ConfigError, match="engine='asyncio'"):
        Handler(near, "", None)


# -- awaiting ----------------------------------------------------------------------------------------------------------


def test_what_is_awaited_is_a_coroutine():
    """To ``create_task``, ``wait_for`` and ``gather``; it can be awaited once, and closed."""

    async def handle(self):
        waiting = self.rfile.readline()
        assert asyncio.iscoroutine(waiting)
        first = await waiting
        with pytest.raises(RuntimeError, match=r"cannot reuse"):
            await waiting
        self.rfile.readline().close()
        done = self.wfile.drain()
        await done
        await asyncio.wait_for(self.wfile.drain(), PATIENCE)
        return first, await asyncio.wait_for(self.rfile.read(3), PATIENCE)

    assert talk(handle, b"line\nabc")[0] == (b"line\n", b"abc")


def test_a_read_that_nobody_awaited_is_told():
    """Like a coroutine: it has not been done."""

    async def handle(self):
        with pytest.warns(RuntimeWarning, match="never awaited"):
            self.rfile.readline()
        return await self.rfile.readline()

    assert talk(handle, b"line\n")[0] == b"line\n"


def test_readuntil_gives_back():
    """What came behind the separator, and, when it is interrupted, all."""

    async def handle(self):
        parts = [await self.rfile.readuntil(b"--"), await self.rfile.readuntil(b"--")]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await self.rfile.readuntil(b"--")
        rest = await self.rfile.read(100)
        await self.request.sendall(b"go")
        with pytest.raises(asyncio.IncompleteReadError):
            await self.rfile.readuntil(b"--")
        return parts, rest

    def say(client):
        client.sendall(b"a--b--rest")
        client.recv(2)
        client.shutdown(socket.SHUT_WR)
        return b""

    assert talk(handle, say)[0] == ([b"a--", b"b--"], b"rest")


def test_sizes_and_separators_that_make_no_sense():
    """A length that a client sent may be negative: nothing is read then."""

    async def handle(self):
        with pytest.raises(ValueError, match="less than zero"):
            await self.rfile.readexactly(-1)
        with pytest.raises(ValueError, match="at least one-byte"):
            await self.rfile.readuntil(b"")
        return await self.rfile.read(100)

    assert talk(handle, b"all")[0] == b"all"


def test_another_handlers_connection():
    """Handlers write to and read from each other's, each in its own task."""
    here = []

    async def handle(self):
        here.append(self)
        if len(here) == 1:
            await self.rfile.readline()
            return None
        other = here[0]
        await other.request.sendall(b"one ")
        await other.wfile.write(b"two")
        return other.peer != self.peer

    outcome = []

    class Handler(harken.AsyncStreamRequestHandler):
        async def handle(self):
            outcome.append(await handle(self))

    with harken.background(harken.AsyncTCPServer(LOCAL, Handler)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as first:
            assert wait_until(lambda: here)
            with socket.create_connection(server.server_address, PATIENCE) as second:
                got = b""
                while got != b"one two":
                    got += first.recv(100)
                assert second.recv(1) == b""
            first.sendall(b"\n")
            assert first.recv(1) == b""
    assert outcome[0] is True


FALLBACK = """
import asyncio, socket
import harken
seen = []

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        async for line in self.rfile:
            try:
                async with asyncio.timeout(0.02):
                    await self.rfile.readline()
            except TimeoutError:
                pass
            async with asyncio.TaskGroup() as group:
                other = group.create_task(self.rfile.readexactly(3))
                group.create_task(self.request.sendall(b"more?"))
            self.wfile.write(line)
            await self.wfile.write(other.result())
            await self.wfile.drain()
            asyncio.get_running_loop().call_later(0.01, asyncio.current_task().cancel)
            try:
                await self.request.recv(1)
            except asyncio.CancelledError:
                seen.append(asyncio.current_task().uncancel())

with harken.background(harken.AsyncTCPServer(("127.0.0.1", 0), Handler)) as server:
    with socket.create_connection(server.server_address, 10) as client:
        client.sendall(b"line\\n")
        assert client.recv(5) == b"more?"
        client.sendall(b"abc")
        got = b""
        while len(got) < 8:
            got += client.recv(8)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
from harken import _hub
print(_hub.kind, got, seen)
"""


LONG_TURN = """
import asyncio, socket
import harken
seen = []

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        turned = asyncio.get_running_loop().create_task(asyncio.sleep(0))
        for _ in range(100):
            self.wfile.write(bytes(30000))
        seen.append(asyncio.current_task() is not None)
        seen.append(turned.done())
        await self.wfile.drain()

with harken.background(harken.AsyncTCPServer(("127.0.0.1", 0), Handler)) as server:
    with socket.create_connection(server.server_address, 10) as client:
        got = 0
        while part := client.recv(65536):
            got += len(part)
from harken import _hub
print(_hub.kind, got, seen)
"""


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_write_gives_no_turn_away(run_program, kind):
    """However much is written: the task goes on, as one that has not awaited anything does."""
    out, errors = run_program("-c", LONG_TURN, env={"HARKEN_HUB": kind}).communicate(timeout=40)
    assert out == f"{kind} 3000000 [True, False]\n", errors


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_both_hubs_do_the_same(run_program, kind):
    """Timeouts, other tasks, cancelling, on the hub in C and on the one in Python."""
    out, errors = run_program("-c", FALLBACK, env={"HARKEN_HUB": kind}).communicate(timeout=40)
    assert out == f"{kind} b'line\\nabc' [0]\n", errors


DRIBBLE = """
import contextlib, socket, threading
import harken
from harken import events
closed = threading.Event()
reasons = []

def note(event):
    reasons.append(event.reason)
    closed.set()

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        await self.rfile.readline()

events.subscribe(note, "closed")
with harken.background(harken.AsyncTCPServer(("127.0.0.1", 0), Handler, read_timeout=0.3)) as server:
    with socket.create_connection(server.server_address, 10) as client:
        for _ in range(400):
            with contextlib.suppress(OSError):
                client.sendall(b".")
            if closed.wait(0.02):
                break
        from harken import _hub
        print(_hub.kind, reasons)
"""


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_a_line_that_dribbles_in_is_one_read(run_program, kind):
    """``read_timeout`` ends it, however often something comes."""
    out, errors = run_program("-c", DRIBBLE, env={"HARKEN_HUB": kind}).communicate(timeout=40)
    assert out == f"{kind} ['read_timeout']\n", errors


CANCELLED_WRITE = """
import asyncio, socket, sys, threading
import harken
BOUND = max(1 << 20, int(sys.argv[1]))
FIRST, BIG = b"-" * int(sys.argv[1]), b"".join(b"%07d\\n" % number for number in range(2_000_000))
seen, go = [], threading.Event()

class Handler(harken.AsyncStreamRequestHandler):
    async def handle(self):
        self.wfile.write(FIRST)
        try:
            async with asyncio.timeout(0.1):
                await self.wfile.write(BIG)
        except TimeoutError:
            seen.append("cancelled")
        go.set()
        await self.wfile.write(b"END")

server = harken.AsyncTCPServer(("127.0.0.1", 0), Handler, max_write_buffer=BOUND)
with harken.background(server), socket.create_connection(server.server_address, 10) as client:
    go.wait(10)
    got = bytearray()
    while part := client.recv(1 << 20):
        got += part
from harken import _hub
print(_hub.kind, seen, len(got), got == FIRST + BIG + b"END")
"""


@pytest.mark.parametrize("ahead", [0, 12_000_000], ids=["next", "behind"])
@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_a_cancelled_write_is_sent_all_the_same(run_program, kind, ahead):
    """Beyond what may be held too, in its turn, and what is written next comes behind it."""
    process = run_program("-c", CANCELLED_WRITE, str(ahead), env={"HARKEN_HUB": kind})
    out, errors = process.communicate(timeout=40)
    assert out == f"{kind} ['cancelled'] {16_000_003 + ahead} True\n", errors
