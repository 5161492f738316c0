"""A handler that ends its server by a verb, where servers share the loop of a worker: served, started, tested."""

import asyncio
import signal
import socket
import threading

import pytest
from waiting import PATIENCE, wait_until

import harken
from harken import testing

VERBS = """
import harken
class Tell(harken.BaseRequestHandler):
    def handle(self):
        while word := self.request.recv(100):
            done = self.server.stats()["process"] if word == b"process" else getattr(self.server, word.decode())()
            self.request.sendall(f"{done}".encode())
class Async(harken.AsyncRequestHandler):
    async def handle(self):
        while word := await self.request.recv(100):
            await self.request.sendall(f"{getattr(self.server, word.decode())()}".encode())
"""
ANSWERS = {"drain": b"0 finished, 0 left, 0 cut", "shutdown": b"None", "server_close": b"None"}
# On the fork engine a handler's server is a copy in a process of its own.
ENGINES = ["inline", "thread", "pool", "green", "asyncio"]


@pytest.fixture
def target(tmp_path):
    """The file with handlers that call what their client names."""
    path = tmp_path / "verbs.py"
    path.write_text(VERBS)
    return path


def ask(client, word):
    """Let the handler call the verb; return what that returned."""
    client.sendall(word.encode())
    return client.recv(100)


def ask_anew(running, word):
    """Ask by a connection of its own."""
    with running.connect() as client:
        return ask(client, word)


@pytest.mark.parametrize("verb", ANSWERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_supervisor_the_service_ends(service, engine, verb):
    """The handler gets its answer and may give it to its client; then the program ends, as by TERM."""
    running = service("--engine", engine, "--workers", "0", bind="tcp://127.0.0.1:0")
    with running.connect() as client:
        assert ask(client, verb).startswith(ANSWERS[verb])
    status, log = running.end()
    assert status == 0, log


@pytest.mark.parametrize("verb", ANSWERS)
@pytest.mark.parametrize("engine", ["inline", "thread", "green"])
def test_under_a_supervisor_the_worker_has_an_heir(service, engine, verb):
    """Nobody is left in a backlog that no worker looks at."""
    running = service("--engine", engine)
    with running.connect() as client:
        before = ask(client, "process")
        assert ask(client, verb).startswith(ANSWERS[verb])
    wait_until(lambda: ask_anew(running, "process") != before)  # who comes at once may find the old one
    running.wait_log(f"worker exited: pid {before.decode()}, status 0")
    running.process.send_signal(signal.SIGTERM)
    status, log = running.end()
    assert status == 0, log


class Drains(harken.BaseRequestHandler):
    """Drains its server, and answers that."""

    def handle(self):
        """Answer."""
        while self.request.recv(100) == b"drain":
            self.request.sendall(f"{self.server.drain(PATIENCE)}".encode())


@pytest.mark.parametrize("engine", ENGINES)
def test_all_addresses_drain_together(engine, tmp_path):
    """A client of the second address leaves when a handler of the first drains; so does who drains, having answered."""
    with testing.serve(Drains, "tcp://127.0.0.1:0", f"unix:{tmp_path}/s", engine=engine) as served:
        with served.connect() as client:
            if engine == "inline":
                assert ask(client, "drain").startswith(b"0 finished, 0 left, 0 cut")
            else:
                with socket.socket(socket.AF_UNIX) as other:
                    other.settimeout(PATIENCE)
                    other.connect(f"{tmp_path}/s")
                    wait_until(lambda: served.servers[1].connections())
                    assert b" 0 cut" in ask(client, "drain")
                    assert other.recv(1) == b""
            assert client.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            served.connect()


@pytest.mark.parametrize("engine", ["thread", "green", "asyncio"])
def test_a_test_drains_its_server(engine):
    """From the test's own thread: idle clients leave, none is cut, and no loop trips over the closed listener."""
    failures = []
    hook, threading.excepthook = threading.excepthook, failures.append
    try:
        with testing.serve(Drains, engine=engine, write_timeout=None) as served:
            with served.connect() as client:
                wait_until(lambda: served.server.connections())
                report = served.server.drain(PATIENCE)
                assert (report.finished + report.left, report.cut) == (1, 0)  # its handler may have just begun
                assert report.seconds < PATIENCE / 2
                assert client.recv(1) == b""
    finally:
        threading.excepthook = hook
    assert not failures


@pytest.mark.parametrize("verb", ANSWERS)
@pytest.mark.parametrize("engine", ["thread", "green", "asyncio"])
def test_a_handler_ends_what_was_started(engine, verb):
    """``serve_forever`` of ``harken.start`` returns, and the port is free."""

    class Ends(harken.BaseRequestHandler):
        def handle(self):
            self.request.recv(100)
            self.request.sendall(f"{getattr(self.server, verb)()}".encode())

    async def main():
        server = await harken.start(Ends, "tcp://127.0.0.1:0", engine=engine)
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"end")
        assert (await reader.read(100)).startswith(ANSWERS[verb])
        writer.close()
        await asyncio.wait_for(server.serve_forever(), PATIENCE / 2)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*server.server_address)

    asyncio.run(main())
