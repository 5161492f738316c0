"""``harken.green.wait``: coroutines from green threads and from plain ones."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import shutil
import socket
import subprocess
import threading
import time
import weakref

import pytest
from waiting import wait_until

import harken
from harken import green
from harken._hub import hosts
from harken.errors import DeadlineExceeded

PATIENCE = 10.0  # seconds
variable = contextvars.ContextVar("variable", default="nobody's")


def serve(function, **settings):
    """Call ``function(handler)`` for each connection; what it returns, or raises, is sent back."""

    class Handler(harken.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                try:
                    answer = function(line.strip().decode())
                except Exception as error:
                    answer = f"{type(error).__name__}: {error}"
                self.wfile.write(f"{answer}\n".encode())

    settings = {"engine": "green", **settings}
    return harken.background(harken.TCPServer(("127.0.0.1", 0), Handler, **settings))


@contextlib.contextmanager
def client(server):
    """Give a function that asks and returns the answer."""
    with socket.create_connection(server.server_address, PATIENCE) as sock, sock.makefile("rb") as answers:

        def ask(question="x"):
            sock.sendall(question.encode() + b"\n")
            return answers.readline().strip().decode()

        yield ask


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request):
    """The setting, once for each loop."""
    return request.param


def test_returns_what_the_coroutine_returns(loop):
    """A task like any other, many at once, beside what the green threads do."""

    async def work(word):
        async with asyncio.timeout(PATIENCE):
            await asyncio.sleep(0.02)
        return f"{word} {asyncio.current_task() is not None} {type(asyncio.get_running_loop()).__module__}"

    with serve(lambda word: green.wait(work(word)), loop=loop) as server, contextlib.ExitStack() as clients:
        asks = [clients.enter_context(client(server)) for _ in range(20)]
        answers = []

        def note(number, ask):
            answers.append((number, ask(f"w{number}")))

        threads = [threading.Thread(target=note, args=pair) for pair in enumerate(asks)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert time.monotonic() - began < PATIENCE
        module = "uvloop" if loop == "uvloop" else "asyncio.unix_events"
        assert sorted(answers) == sorted((n, f"w{n} True {module}") for n in range(20))


def test_exceptions_pass(loop):
    """What the coroutine raised is raised where it was waited for."""

    async def fail(word):
        await asyncio.sleep(0)
        raise KeyError(word)

    with serve(lambda word: green.wait(fail(word)), loop=loop) as server, client(server) as ask:
        assert ask("lost") == "KeyError: 'lost'"
        assert ask("again") == "KeyError: 'again'"


def test_an_exception_leaves_nothing_to_the_collector(loop):
    """What the coroutine held when it failed is let go of when nobody has the error any more."""

    class Held:
        pass

    def fails():
        seen = []

        async def fail():
            held = Held()
            seen.append(weakref.ref(held))
            raise KeyError

        with contextlib.suppress(KeyError):
            green.wait(fail())
        return seen[0]

    def look(word):
        seen = fails()
        green.sleep(0)
        return seen() is None

    gc.disable()
    try:
        with serve(look, loop=loop) as server, client(server) as ask:
            assert ask() == "True"
    finally:
        gc.enable()


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
def test_what_ends_a_program_ends_who_waits_alone(end):
    """Not the loop, where everybody else waits, too: the server goes on."""

    async def leave():
        await asyncio.sleep(0)
        raise end

    async def stay():
        return "stayed"

    def work(word):
        if word == "leave":
            with contextlib.suppress(end):
                green.wait(leave())
                return "nothing was raised"
        return green.wait(stay())

    with serve(work) as server, client(server) as ask, client(server) as other:
        assert other() == "stayed"
        assert ask("leave") == "stayed"
        assert other() == "stayed"


def test_what_ends_a_program_leaves_the_loop_of_plain_threads(run_program):
    """The next one who waits there is served."""
    program = """
import sys
from harken import green

async def leave():
    sys.exit(3)

async def stay():
    return "stayed"

try:
    green.wait(leave())
except SystemExit as error:
    print(error.code, green.wait(stay()))
"""
    assert run_program("-c", program).communicate(timeout=20) == ("3 stayed\n", "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of connections that nobody closed
@pytest.mark.parametrize("lazy", [False, True])
def test_a_loop_that_is_ended_ends_the_server_and_no_more(lazy):
    """``serve_forever`` raises what ended it, and ``server_close`` waits for nobody who went with it."""
    raised = []

    async def end():
        asyncio.get_running_loop().call_soon(exec, "raise SystemExit(7)")
        await asyncio.sleep(PATIENCE)

    class Handler(harken.BaseRequestHandler):
        def handle(self):
            if self.request.recv(1):
                green.wait(end())

    Handler.lazy = lazy

    def run():
        try:
            server.serve_forever()
        except SystemExit as error:
            raised.append(error.code)

    server = harken.GreenTCPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=run)
    thread.start()
    with contextlib.ExitStack() as clients:
        socks = [clients.enter_context(socket.create_connection(server.server_address)) for _ in range(3)]
        wait_until(lambda: len(server.connections()) == 3)
        socks[0].sendall(b"x")
        thread.join(PATIENCE)
        closing = threading.Thread(target=server.server_close, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        assert not closing.is_alive()
    assert raised == [7]


def test_context_variables_are_seen(loop):
    """The green thread's values, in a copy."""

    async def look():
        before = variable.get()
        variable.set("the coroutine's")
        return before

    def handle(word):
        variable.set(word)
        return f"{green.wait(look())} {variable.get()}"

    with serve(handle, loop=loop) as server, client(server) as first, client(server) as second:
        assert first("one") == "one one"
        assert second("two") == "two two"


def test_futures_and_awaitables_too():
    """Whatever ``await`` takes."""

    class Awaitable:
        def __await__(self):
            yield from asyncio.sleep(0.01).__await__()
            return "awaited"

    def handle(_word):
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.call_later(0.01, future.set_result, "set")
        return f"{green.wait(future)} {green.wait(Awaitable())}"

    def first(word):
        green.wait(asyncio.sleep(0))  # from here on a loop runs in this thread
        return handle(word)

    with serve(first) as server, client(server) as ask:
        assert ask() == "set awaited"


def test_an_interrupted_wait_cancels_the_task(loop):
    """And its ``finally`` is over before the green thread goes on."""
    seen = []

    async def endless():
        try:
            await asyncio.sleep(PATIENCE * 2)
        finally:
            await asyncio.sleep(0.01)
            seen.append("cleaned up")

    def handle(_word):
        green.wait(asyncio.sleep(0))  # from here on the hub is in the loop, so that the coroutine begins at once
        try:
            with green.timeout(0.5):
                green.wait(endless())
        finally:
            seen.append("went on")

    with serve(handle, loop=loop) as server, client(server) as ask:
        assert ask().startswith("DeadlineExceeded")
    assert seen == ["cleaned up", "went on"]


def test_a_coroutine_that_nobody_will_run_is_closed(monkeypatch):
    """The deadline came while the hub moved into a loop: Python would warn of one that was never awaited."""

    def event_loop():
        raise DeadlineExceeded("1 s")

    monkeypatch.setattr(hosts, "event_loop", event_loop)
    coroutine = asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded):
        green.wait(coroutine)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


def test_the_end_of_a_server_ends_what_is_waited_for():
    """A connection cut at the drain's deadline: its handler's coroutine goes with the loop."""
    ended = threading.Event()
    begun = threading.Event()

    async def endless():
        begun.set()
        try:
            await asyncio.sleep(PATIENCE * 10)
        finally:
            ended.set()

    class Handler(harken.BaseRequestHandler):
        def handle(self):
            green.spawn(green.wait, endless())
            self.request.recv(1)

    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Handler)) as server:
        with socket.create_connection(server.server_address, PATIENCE):
            assert begun.wait(PATIENCE)
    assert ended.wait(PATIENCE)


OUTLIVES = """
import asyncio, socket, threading, harken
from harken import green

begun = threading.Event()

async def outlive():
    begun.set()
    while threading.main_thread().is_alive():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    return b"served"

class Handler(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(green.wait(outlive()))
        self.request.sendall(green.wait(outlive()))

server = harken.ThreadingTCPServer(("127.0.0.1", 0), Handler)

def ask():
    with socket.create_connection(server.server_address, 10) as client, client.makefile("rb") as answer:
        print(answer.read())
    server.shutdown()

threading.Thread(target=server.serve_forever).start()
threading.Thread(target=ask).start()
begun.wait(10)
"""


def test_who_outlives_the_main_thread_goes_on(run_program):
    """A server in a thread that is no daemon's serves on, and what its handlers wait for goes on as well."""
    assert run_program("-W", "ignore", "-c", OUTLIVES).communicate(timeout=30) == ("b'servedserved'\n", "")


PLAIN = """
import asyncio, contextvars, threading
from harken import green
from harken._hub import hosts
from harken.errors import DeadlineExceeded
variable = contextvars.ContextVar("variable")
loops = set()

async def look():
    loops.add(asyncio.get_running_loop())
    await asyncio.sleep(0.01)
    return variable.get()

async def fail():
    raise KeyError("x")

def ask(name):
    variable.set(name)
    assert green.wait(look()) == name

for thread in [threading.Thread(target=ask, args=(n,)) for n in range(5)]:
    thread.start()
    thread.join()
ask("main")
assert len(loops) == 1
try:
    green.wait(fail())
except KeyError:
    pass

async def wrong():
    try:
        green.wait(asyncio.sleep(0))
    except RuntimeError as error:
        return str(error)

print(asyncio.run(wrong()))
import os
pid = os.fork()
if pid == 0:
    ask("child")
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_in_plain_threads_one_loop_serves_all(run_program):
    """A pool of connections that they share belongs to one loop; a forked child has its own."""
    process = run_program("-W", "ignore::DeprecationWarning", "-c", PLAIN)  # 3.12 warns of a fork under threads
    out, errors = process.communicate(timeout=30)
    assert errors == ""
    assert out.splitlines() == [
        "green.wait() would keep this thread's event loop from running what it waits for; await it",
        "7",
    ]


# -- libraries -------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_server(tmp_path):
    """A Redis of the test's own; the path of its socket."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: redis-server)")
    path = tmp_path / "redis"
    process = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", tmp_path],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield str(path)
    finally:
        process.terminate()
        process.wait(PATIENCE)


REDIS = """
import sys, socket, threading
import harken, redis.asyncio
from harken import green
from harken._hub import hosts
from harken.errors import DeadlineExceeded

shared = redis.asyncio.Redis(unix_socket_path=sys.argv[1])

class Count(harken.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(b"%d\\n" % green.wait(shared.incr(line.strip())))

class AsyncCount(harken.AsyncStreamRequestHandler):
    async def handle(self):
        async for line in self.rfile:
            await self.wfile.write(b"%d\\n" % await shared.incr(line.strip()))

def ask(address):
    with socket.create_connection(address, 10) as sock, sock.makefile("rb") as answers:
        for _ in range(20):
            sock.sendall(b"visits\\n")
            seen.append(int(answers.readline()))

handler = AsyncCount if sys.argv[2] == "asyncio" else Count
seen = []
with harken.background(harken.ThreadingTCPServer(("127.0.0.1", 0), handler, engine=sys.argv[2])) as server:
    threads = [threading.Thread(target=ask, args=(server.server_address,)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(sorted(seen) == list(range(1, 201)))
"""


@pytest.mark.parametrize("engine", ["green", "asyncio", "thread"])
def test_redis(run_program, redis_server, engine):
    """One client of ``redis.asyncio`` is shared by all handlers, whichever engine they are on."""
    process = run_program("-W", "ignore::ResourceWarning", "-c", REDIS, redis_server, engine)
    out, errors = process.communicate(timeout=50)
    assert out == "True\n", errors


def test_httpx():
    """A green handler asks a web server by ``httpx.AsyncClient``, an async handler too."""
    import httpx

    class Web(harken.AsyncStreamRequestHandler):
        async def handle(self):
            while (await self.rfile.readline()).strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")

    async def fetch(url):
        async with httpx.AsyncClient(trust_env=False) as web:
            return (await web.get(url, timeout=PATIENCE)).text

    class Ask(harken.AsyncRequestHandler):
        async def handle(self):
            await self.request.sendall((await fetch((await self.request.recv(100)).decode())).encode())

    with harken.background(harken.AsyncTCPServer(("127.0.0.1", 0), Web)) as web:
        url = f"http://127.0.0.1:{web.server_address[1]}/"
        with serve(lambda word: green.wait(fetch(word))) as server, client(server) as ask:
            assert ask(url) == "hi"
        with harken.background(harken.AsyncTCPServer(("127.0.0.1", 0), Ask)) as server:
            with socket.create_connection(server.server_address, PATIENCE) as sock:
                sock.sendall(url.encode())
                assert sock.recv(10) == b"hi"
