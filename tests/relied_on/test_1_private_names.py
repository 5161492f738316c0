"""Private names of `socketserver` that programs read, set, override and patch."""

from __future__ import annotations

import io
import select
import selectors
import signal
import socket
import threading
from typing import Any
from unittest import mock

import pytest
from waiting import wait_until

from .kit import LOCAL, PATIENCE, ask, connect, echo_handler, join, python, read_all, run, serving


def copied_loop(impl: Any, server: Any, poll_interval: float = 0.02) -> None:
    """The body of `serve_forever` as programs copy it into a class of theirs."""
    server._BaseServer__is_shut_down.clear()
    try:
        with impl._ServerSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while not server._BaseServer__shutdown_request:
                ready = selector.select(poll_interval)
                if server._BaseServer__shutdown_request:
                    break
                if ready:
                    server._handle_request_noblock()
                server.service_actions()
    finally:
        server._BaseServer__shutdown_request = False
        server._BaseServer__is_shut_down.set()


def test_shutdown_request_set_by_a_watcher_ends_the_loop(impl: Any) -> None:
    """`server._BaseServer__shutdown_request = True` from another thread ends `serve_forever` soon."""
    with impl.TCPServer(LOCAL, echo_handler(impl)) as server:
        loop = run(server.serve_forever, 0.05)
        assert ask(server.server_address) == b"hello\n"
        server._BaseServer__shutdown_request = True
        join(loop, 2)
        assert not server._BaseServer__shutdown_request


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_shutdown_request_set_by_a_handler_ends_the_loop(impl: Any, name: str) -> None:
    """A handler that sets `self.server._BaseServer__shutdown_request` ends the loop after its request."""

    class Quit(impl.BaseRequestHandler):
        def handle(self) -> None:
            self.server._BaseServer__shutdown_request = True
            self.request.sendall(b"bye")

    with getattr(impl, name)(LOCAL, Quit) as server:
        loop = run(server.serve_forever, 0.05)
        assert ask(server.server_address, b"") == b"bye"
        join(loop, 2)


@pytest.mark.parametrize("name", ["stdlib", "harken"])
def test_shutdown_request_set_by_a_signal_handler_ends_the_loop(name: str) -> None:
    """A SIGTERM handler that sets the flag ends a loop in the main thread, and what follows it runs."""
    program = """
import signal, socketserver
server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
def stop(*_):
    server._BaseServer__shutdown_request = True
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
server.serve_forever(poll_interval=0.05)
server.server_close()
print("clean", flush=True)
"""
    child = python(name, program)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=PATIENCE)
    finally:
        child.kill()
    assert (out, err, child.returncode) == ("clean\n", "", 0)


def test_shutdown_request_is_seen_by_a_busy_handler(impl: Any) -> None:
    """A handler that loops until the server shuts down sees it, on the plain server, and `shutdown` then returns."""
    started, saw = threading.Event(), threading.Event()

    class Patient(impl.BaseRequestHandler):
        def handle(self) -> None:
            started.set()
            wait_until(lambda: self.server._BaseServer__shutdown_request)
            saw.set()

    with serving(impl.TCPServer(LOCAL, Patient)) as server, connect(server.server_address):
        assert started.wait(PATIENCE)
        assert not server._BaseServer__shutdown_request
        join(run(server.shutdown))
        assert saw.is_set()


def test_is_shut_down_is_an_instance_attribute(impl: Any) -> None:
    """`server.__dict__['_BaseServer__is_shut_down']` is an Event of this server's own."""
    with impl.TCPServer(LOCAL, None) as one, impl.TCPServer(LOCAL, None) as other:
        event = one.__dict__["_BaseServer__is_shut_down"]
        assert event is one._BaseServer__is_shut_down
        assert event is not other._BaseServer__is_shut_down
        assert not event.is_set()


def test_is_shut_down_tells_whether_the_loop_runs(impl: Any) -> None:
    """It is cleared while `serve_forever` runs and set when it has ended; polling and waiting for it works."""
    with impl.TCPServer(LOCAL, echo_handler(impl)) as server:
        event = server._BaseServer__is_shut_down
        event.set()
        loop = run(server.serve_forever, 0.05)
        wait_until(lambda: not event.is_set())
        server.shutdown()
        assert event.is_set()
        assert event.wait(0)
        join(loop)


def test_shutdown_without_init_uses_a_mock_on_the_class(impl: Any) -> None:
    """With `__init__` mocked and a Mock planted on the class, `shutdown` waits on the Mock and returns."""

    class Planted(impl.TCPServer):
        pass

    Planted._BaseServer__is_shut_down = mock.Mock()
    Planted._BaseServer__shutdown_request = True
    with mock.patch.object(impl.TCPServer, "__init__", return_value=None):
        server = Planted(LOCAL, None)
    join(run(server.shutdown), 2)


def test_copied_serve_forever_serves_and_shuts_down(impl: Any) -> None:
    """A copy of stdlib's loop serves on the server, and the server's own `shutdown` ends it and waits for it."""
    with impl.ThreadingTCPServer(LOCAL, echo_handler(impl)) as server:
        loop = run(copied_loop, impl, server)
        assert ask(server.server_address) == b"hello\n"
        assert ask(server.server_address, b"again\n") == b"again\n"
        join(run(server.shutdown))
        join(loop)


def test_copied_loop_as_override(impl: Any) -> None:
    """The copy works as an overridden `serve_forever` too, and the server serves a second time."""

    class Copied(impl.TCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            copied_loop(impl, self, poll_interval)

    with Copied(LOCAL, echo_handler(impl)) as server:
        for _ in range(2):
            loop = run(server.serve_forever, 0.02)
            assert ask(server.server_address) == b"hello\n"
            join(run(server.shutdown))
            join(loop)


def test_handle_request_noblock_from_a_select_loop(impl: Any) -> None:
    """Connections stay in the kernel's queue until a loop of the program's own calls `_handle_request_noblock`."""
    served = []

    class Count(impl.BaseRequestHandler):
        def handle(self) -> None:
            served.append(self.client_address)
            self.request.sendall(b"one")

    with impl.TCPServer(LOCAL, Count) as server, connect(server.server_address) as client:
        assert select.select([server.socket], [], [], PATIENCE)[0]
        assert served == []
        server._handle_request_noblock()
        assert len(served) == 1
        assert read_all(client) == b"one"


def test_handle_request_noblock_from_one_selector_over_several_servers(impl: Any) -> None:
    """One selector over two servers and a plain socket serves them all in one thread."""
    stop, stopped = socket.socketpair()
    with impl.TCPServer(LOCAL, echo_handler(impl)) as one, impl.TCPServer(LOCAL, echo_handler(impl)) as other:

        def loop() -> None:
            with selectors.DefaultSelector() as selector:
                selector.register(one, selectors.EVENT_READ, one)
                selector.register(other.socket, selectors.EVENT_READ, other)
                selector.register(stopped, selectors.EVENT_READ, None)
                while True:
                    for key, _ in selector.select(PATIENCE):
                        if key.data is None:
                            return
                        key.data._handle_request_noblock()

        thread = run(loop)
        assert ask(one.server_address, b"1\n") == b"1\n"
        assert ask(other.server_address, b"2\n") == b"2\n"
        stop.close()
        join(thread)
    stopped.close()


def test_handle_request_noblock_from_an_epoll_loop(impl: Any) -> None:
    """An epoll over `server.fileno()` drives a threading server."""
    with impl.ThreadingTCPServer(LOCAL, echo_handler(impl)) as server, select.epoll() as poll:
        poll.register(server.fileno(), select.EPOLLIN)
        clients = [run(ask, server.server_address) for _ in range(3)]
        for _ in clients:
            assert poll.poll(PATIENCE)
            server._handle_request_noblock()
        for client in clients:
            join(client)


def test_handle_request_noblock_overridden_may_decline(impl: Any) -> None:
    """`serve_forever` goes through the override; one that returns without accepting is called again later."""
    calls = []

    class Reluctant(impl.ThreadingTCPServer):
        def _handle_request_noblock(self) -> None:
            calls.append(threading.get_ident())
            if len(calls) > 3:
                super()._handle_request_noblock()

    with serving(Reluctant(LOCAL, echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"
    assert len(calls) > 3


def test_handle_request_noblock_overridden_with_a_semaphore(impl: Any) -> None:
    """At most two handlers run at once; the others wait in the kernel's queue and are served later."""
    slots, running, most = threading.BoundedSemaphore(2), [], []
    gate = threading.Event()

    class Bounded(impl.ThreadingTCPServer):
        def _handle_request_noblock(self) -> None:
            if slots.acquire(timeout=0.01):
                super()._handle_request_noblock()

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                slots.release()

    class Slow(impl.StreamRequestHandler):
        def handle(self) -> None:
            running.append(1)
            most.append(len(running))
            gate.wait(PATIENCE)
            running.pop()
            self.wfile.write(b"done")

    with serving(Bounded(LOCAL, Slow)) as server:
        clients = [connect(server.server_address) for _ in range(5)]
        wait_until(lambda: len(running) == 2)
        gate.set()
        assert [read_all(client) for client in clients] == [b"done"] * 5
        for client in clients:
            client.close()
    assert max(most) == 2


def test_handle_request_noblock_of_the_base_can_be_mocked(impl: Any) -> None:
    """A test that mocks `BaseServer._handle_request_noblock` sees the override's call of it."""

    class Guarded(impl.TCPServer):
        def _handle_request_noblock(self) -> Any:
            if self._BaseServer__shutdown_request:
                return None
            return super()._handle_request_noblock()

    with mock.patch.object(impl.BaseServer, "_handle_request_noblock") as base, Guarded(LOCAL, None) as server:
        server._handle_request_noblock()
        base.assert_called_once_with()
        server._BaseServer__shutdown_request = True
        server._handle_request_noblock()
        base.assert_called_once_with()


def test_threads_holds_what_runs(impl: Any) -> None:
    """`_threads` is in `vars(server)` after the first request and lists, counts and joins the running threads."""
    gate = threading.Event()

    class Wait(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"!")
            gate.wait(PATIENCE)

    with serving(impl.ThreadingTCPServer(LOCAL, Wait)) as server:
        clients = [connect(server.server_address) for _ in range(3)]
        assert all(client.recv(1) == b"!" for client in clients)
        assert "_threads" in vars(server)
        assert server._threads
        assert len(server._threads) == 3
        threads = list(server._threads)
        assert all(isinstance(thread, threading.Thread) and thread.is_alive() for thread in threads)
        gate.set()
        for thread in threads:
            join(thread)
        for client in clients:
            client.close()


@pytest.mark.parametrize("attribute", [{"daemon_threads": True}, {"block_on_close": False}])
def test_threads_does_not_hold_what_nobody_waits_for(impl: Any, attribute: dict[str, bool]) -> None:
    """Daemon threads, and threads of a server that does not wait, are not kept, and closing does not wait for them."""
    started, gate = threading.Event(), threading.Event()

    class Wait(impl.StreamRequestHandler):
        def handle(self) -> None:
            started.set()
            gate.wait(PATIENCE)

    server = type("Loose", (impl.ThreadingTCPServer,), attribute)(LOCAL, Wait)
    try:
        with serving(server), connect(server.server_address):
            assert started.wait(PATIENCE)
            assert not gate.is_set()
        if "daemon_threads" in attribute:
            assert list(server._threads) == []
        else:
            assert "_threads" not in vars(server) or not list(server._threads)
    finally:
        gate.set()


def test_threads_drops_what_has_finished(impl: Any) -> None:
    """After many requests only few threads are still listed."""
    with serving(impl.ThreadingTCPServer(LOCAL, echo_handler(impl))) as server:
        for _ in range(20):
            assert ask(server.server_address) == b"hello\n"
        wait_until(lambda: ask(server.server_address) == b"hello\n" and len(server._threads) < 10)


def test_server_selector_can_be_replaced(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording subclass put in the module's `_ServerSelector` is used by the loop and sees the polling interval."""
    seen: list[Any] = []

    class Recording(selectors.SelectSelector):
        def select(self, timeout: float | None = None) -> Any:
            seen.append(timeout)
            return super().select(timeout)

    monkeypatch.setattr(impl, "_ServerSelector", Recording)
    with serving(impl.TCPServer(LOCAL, echo_handler(impl)), poll_interval=0.125) as server:
        assert ask(server.server_address) == b"hello\n"
        wait_until(lambda: 0.125 in seen)


@pytest.mark.parametrize("selector", ["DefaultSelector", "SelectSelector", "EpollSelector"])
def test_server_selector_of_another_kind(impl: Any, selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any selector of the standard library can stand as `_ServerSelector`, in the loop and in `handle_request`."""
    monkeypatch.setattr(impl, "_ServerSelector", getattr(selectors, selector))
    server = impl.TCPServer(LOCAL, echo_handler(impl))
    client = run(ask, server.server_address)
    server.handle_request()
    join(client)
    with serving(server):
        assert ask(server.server_address) == b"hello\n"


def test_server_selector_is_a_selector(impl: Any) -> None:
    """`_ServerSelector` is a class of selectors, as copied loops use it."""
    assert issubclass(impl._ServerSelector, selectors.BaseSelector)


def test_socket_writer_constructed_by_hand(impl: Any) -> None:
    """`_SocketWriter(sock)` writes all, tells the length of any buffer, and looks like a stream."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = impl._SocketWriter(ours)
        assert isinstance(writer, io.BufferedIOBase)
        assert writer.writable()
        assert writer.fileno() == ours.fileno()
        assert writer.write(b"abc") == 3
        assert writer.write(memoryview(bytearray(8)).cast("I")) == 8
        assert theirs.recv(100) == b"abc" + bytes(8)


def test_socket_writer_under_a_text_wrapper(impl: Any) -> None:
    """`wfile` can be wrapped by `io.TextIOWrapper`."""

    class Text(impl.StreamRequestHandler):
        def handle(self) -> None:
            with io.TextIOWrapper(self.wfile, encoding="utf-8", newline="\n", write_through=True) as out:
                print("grüß Gott", file=out, flush=True)

    with serving(impl.TCPServer(LOCAL, Text)) as server:
        assert ask(server.server_address, b"").decode() == "grüß Gott\n"


def test_socket_writer_patched_and_subclassed(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patched `_SocketWriter.write` is what `wfile.write` calls, and a handler may set its own subclass."""
    wrote: list[bytes] = []
    plain = impl._SocketWriter.write

    def write(self: Any, data: bytes) -> Any:
        wrote.append(bytes(data))
        return plain(self, data)

    monkeypatch.setattr(impl._SocketWriter, "write", write)

    class Loud(impl._SocketWriter):
        def write(self, data: bytes) -> Any:
            return super().write(data.upper())

    class Copied(impl.StreamRequestHandler):
        def setup(self) -> None:
            super().setup()
            self.quiet, self.wfile = self.wfile, Loud(self.connection)

        def handle(self) -> None:
            line = self.rfile.readline()
            self.quiet.write(line)
            self.wfile.write(line)

    with serving(impl.TCPServer(LOCAL, Copied)) as server:
        assert ask(server.server_address) == b"hello\nHELLO\n"
    assert wrote == [b"hello\n", b"HELLO\n"]


def test_socket_writer_is_the_type_of_wfile(impl: Any) -> None:
    """`type(handler.wfile)` is `_SocketWriter` as long as writing is unbuffered."""
    seen: list[Any] = []

    class Look(impl.StreamRequestHandler):
        def handle(self) -> None:
            seen.append(self.wfile)

    with serving(impl.TCPServer(LOCAL, Look)) as server:
        ask(server.server_address, b"")
    assert isinstance(seen[0], impl._SocketWriter)


def test_module_socket_can_be_patched(impl: Any) -> None:
    """With `socketserver.socket.socket` mocked, a server is made of the mock and touches no network."""
    with mock.patch.object(impl.socket, "socket") as made:
        server = impl.TCPServer(("192.0.2.1", 1), None)
    assert server.socket is made.return_value
    made.return_value.bind.assert_called_once_with(("192.0.2.1", 1))
    assert made.return_value.listen.called


def test_module_thread_can_be_patched(impl: Any) -> None:
    """With `socketserver.threading.Thread` mocked, `process_request` starts the mock."""
    server = impl.ThreadingTCPServer(LOCAL, None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with mock.patch.object(impl.threading, "Thread") as thread:
            thread.return_value.daemon = False
            server.process_request(ours, ("peer", 1))
        assert thread.return_value.start.called
    vars(server).pop("_threads", None)
    server.server_close()


def test_module_names_are_the_modules(impl: Any) -> None:
    """`socketserver.socket`, `.threading`, `.selectors`, `.os` and `.sys` are there for `mock.patch`."""
    import os
    import sys

    assert (impl.socket, impl.threading, impl.selectors, impl.os, impl.sys) == (socket, threading, selectors, os, sys)
    with mock.patch.object(impl.sys, "stderr", io.StringIO()) as errors, impl.TCPServer(LOCAL, None) as server:
        try:
            raise ValueError("seen")
        except ValueError:
            server.handle_error(None, ("1.2.3.4", 5))
    assert "seen" in errors.getvalue()


def test_thread_names_tell_their_purpose_and_differ(impl: Any) -> None:
    """Each live handler has a thread of its own name, and all names hold `process_request_thread`."""
    gate, names = threading.Event(), []

    class Name(impl.StreamRequestHandler):
        def handle(self) -> None:
            names.append(threading.current_thread().name)
            gate.wait(PATIENCE)

    with serving(impl.ThreadingTCPServer(LOCAL, Name)) as server:
        clients = [connect(server.server_address) for _ in range(4)]
        wait_until(lambda: len(names) == 4)
        alive = [thread.name for thread in threading.enumerate() if "process_request_thread" in thread.name]
        gate.set()
        for client in clients:
            client.close()
    assert sorted(names) == sorted(alive)
    assert len(set(names)) == 4


def test_active_children_and_collect_children(impl: Any) -> None:
    """`active_children` is None, then a set of pids; the loop calls an overridden `collect_children`."""
    collected = threading.Event()

    class Forking(impl.ForkingTCPServer):
        def collect_children(self, *, blocking: bool = False) -> None:
            super().collect_children(blocking=blocking)
            collected.set()

    class Wait(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    with serving(Forking(LOCAL, Wait)) as server:
        assert server.active_children is None
        with connect(server.server_address) as client:
            wait_until(lambda: server.active_children)
            (pid,) = server.active_children
            assert isinstance(pid, int)
            client.sendall(b"x\n")
            assert read_all(client) == b"x\n"
        wait_until(lambda: not server.active_children)
        assert collected.is_set()
    assert not server.active_children


def test_collect_children_blocking(impl: Any) -> None:
    """`collect_children(blocking=True)` waits for the children that run."""
    with impl.ForkingTCPServer(LOCAL, echo_handler(impl)) as server:
        client = run(ask, server.server_address)
        server.handle_request()
        assert server.active_children
        server.collect_children(blocking=True)
        assert not server.active_children
        join(client)
