"""Async handlers are tasks as asyncio knows them, and what they await are coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import pickle
import socket
import sys
import threading

import pytest
from talking import LOCAL, PATIENCE, talk

import harken
from harken.testing._census import wait_until

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


@pytest.mark.parametrize("waiting", ["recv", "sleep", "running", "running and sleep"])
def test_cancel(waiting):
    """Wherever it waits, with the message; a cancelled handler is no error."""
    failures = []
    unsubscribe = harken.events.subscribe(failures.append, "handler_failed")

    class Handler(harken.AsyncRequestHandler):
        async def handle(self):
            task = asyncio.current_task()
            if waiting.startswith("running"):
                task.cancel("why")
            else:
                asyncio.get_running_loop().call_later(0.02, task.cancel, "why")
            try:
                await (asyncio.sleep(PATIENCE) if waiting.endswith("sleep") else self.request.recv(1))
            except asyncio.CancelledError as error:
                seen.append((task.cancelling(), task, error.args))
                raise

    seen = []
    with harken.background(harken.AsyncTCPServer(LOCAL, Handler)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(1) == b""
    unsubscribe()
    assert seen[0][0] == 1
    assert seen[0][1].cancelled()
    assert seen[0][2] == ("why",)
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


def test_start_tls_is_refused_by_name():
    """And says what there is instead."""

    async def handle(self):
        self.start_tls()

    outcome = talk(handle)[0]
    assert isinstance(outcome, harken.LifecycleError)
    assert str(outcome).startswith(
        "start_tls() needs a handler with a plain `def handle`; serve an async one on tls://"
    )


def test_the_connection_is_not_copied():
    """As a socket is not: the two would hold back bytes from one another."""

    async def handle(self):
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot pickle 'AsyncConnection' object"):
                attempt(self.request)

    assert talk(handle)[0] is None
