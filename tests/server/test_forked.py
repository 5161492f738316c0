"""A child that a program forks has its parent's server, and none of the parent's threads."""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading

import pytest
from waiting import wait_until

import harken

PATIENCE = 15  # seconds; whole ones, for alarm(2)
LOCAL = ("127.0.0.1", 0)
ENGINES = ["thread", "pool", "green", "asyncio", "fork", "inline"]


class Tell(harken.BaseRequestHandler):
    """Says which process serves."""

    def handle(self):
        self.request.sendall(b"%d" % os.getpid())


def ask(address):
    """Who serves there."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.settimeout(PATIENCE)
        client.connect(address)
        said = b""
        while part := client.recv(100):
            said += part
        return int(said)


@contextlib.contextmanager
def served(server):
    """Serve in a thread, and nothing else: as programs do."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    assert server.wait_ready(PATIENCE)
    try:
        yield
    finally:
        harken.BaseServer.shutdown(server)
        thread.join(PATIENCE)
        assert not thread.is_alive()


def status_of_child(work):
    """Fork; return the status with which the child ends that does ``work``, -14 if that hangs."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("verb", ["server_close", "shutdown", "drain", "__exit__"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_child_may_let_go(engine, verb):
    """The loop is the parent's: there is none to wait for, and the parent serves on."""
    with harken.ThreadingTCPServer(LOCAL, Tell, engine=engine) as server, served(server):
        assert ask(server.server_address)
        assert status_of_child(lambda: getattr(server, verb)(*[None] * (3 * (verb == "__exit__")))) == 0
        assert ask(server.server_address)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_child_may_serve(engine):
    """A program that forks its workers when it serves already, and then leaves the listener to them."""
    with harken.ThreadingTCPServer(LOCAL, Tell, engine=engine) as server:
        with served(server):
            first = ask(server.server_address)
            context = multiprocessing.get_context("fork")
            child = context.Process(target=server.serve_forever, daemon=True)
            child.start()
        try:
            then = {ask(server.server_address) for _ in range(3)}
            if engine == "fork":  # children of either
                assert os.getpid() not in then | {first}
            else:
                assert first == os.getpid()
                assert then == {child.pid}
        finally:
            child.kill()
            child.join()


def test_a_child_of_a_handler_may_let_go():
    """As inetd's did: the handler forks, and the child closes what is the parent's."""

    class Fork(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"%d" % status_of_child(self.server.server_close))

    with harken.ThreadingTCPServer(LOCAL, Fork) as server, served(server):
        assert [ask(server.server_address) for _ in range(2)] == [0, 0]


def test_a_childs_lock_is_its_own():
    """Another thread may hold one in the moment of the fork."""
    with harken.ThreadingTCPServer(LOCAL, Tell) as server, served(server):
        held, let_go = threading.Event(), threading.Event()

        def hold():
            with server._harken.guard, server._harken.intake._lock:
                held.set()
                let_go.wait(PATIENCE)

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(PATIENCE)

        def serve():
            threading.Thread(target=server.serve_forever, daemon=True).start()
            assert server.wait_ready(PATIENCE / 2)

        try:
            assert status_of_child(serve) == 0
        finally:
            let_go.set()
            holder.join()


@pytest.mark.parametrize("kind", [harken.ThreadingUnixStreamServer, harken.ForkingUnixStreamServer])
def test_a_path_is_the_parents(kind, tmp_path):
    """A child that lets go of the listener leaves the file to who bound it."""
    path = str(tmp_path / "sock")
    with kind(path, Tell) as server:
        assert status_of_child(server.server_close) == 0
        with served(server):
            assert status_of_child(server.server_close) == 0
            assert ask(path)
    assert not os.path.exists(path)


def test_a_path_is_the_parents_also_where_handlers_are_children(tmp_path):
    """The handler of a forking server runs in a child."""

    class Close(Tell):
        def handle(self):
            super().handle()
            self.server.server_close()

    path = str(tmp_path / "sock")
    with harken.ForkingUnixStreamServer(path, Close) as server, served(server):
        assert len({ask(path) for _ in range(3)}) == 3
        assert os.path.exists(path)


def test_a_child_serves_that_was_forked_while_a_loop_looked_at_the_door():
    """A poll object that another thread is in is refused to everybody, in the child for ever."""
    with harken.TCPServer(LOCAL, Tell) as server:
        readable = server._harken.intake._readable
        assert not readable(server.fileno())
        looking = threading.Thread(target=readable._poll, args=(PATIENCE * 1000,), daemon=True)
        looking.start()
        wait_until(lambda: is_asleep(looking))
        child = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
        child.start()
        try:
            assert [ask(server.server_address) for _ in range(3)] == [child.pid] * 3
        finally:
            child.kill()
            child.join()
        looking.join(PATIENCE)


def test_a_child_may_let_go_that_was_forked_while_a_loop_reaped():
    """The loop of the fork engine is a thread of the parent's, and takes its lock along."""

    class Stays(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"%d" % os.getpid())
            self.request.recv(1)

    with (
        harken.ForkingTCPServer(LOCAL, Stays) as server,
        served(server),
        socket.create_connection(server.server_address, PATIENCE) as client,
    ):
        assert client.recv(100)
        wait_until(lambda: server.active_children)
        reaping, reaped = threading.Event(), threading.Event()

        def reap():
            with server._harken.engine._reaping:
                reaping.set()
                reaped.wait(PATIENCE)

        other = threading.Thread(target=reap, daemon=True)
        other.start()
        assert reaping.wait(PATIENCE)
        try:
            assert status_of_child(server.drain) == 0
        finally:
            reaped.set()
            other.join(PATIENCE)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""  # the parent's connection is what it was


def is_asleep(thread):
    """Whether the thread waits in a system call."""
    with open(f"/proc/self/task/{thread.native_id}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"
