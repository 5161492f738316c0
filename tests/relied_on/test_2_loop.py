"""What programs rely on in the loop: waiting, serving, stopping, and what ends it."""

from __future__ import annotations

import asyncio
import select
import selectors
import socket
import threading
import time
from typing import Any

import pytest
from waiting import wait_until

from .kit import LOCAL, PATIENCE, ask, connect, echo_handler, join, read_all, run, serving


class Hostile:
    """What a program keeps under a common name: any use by the server is an error."""

    def _refuse(self, *_args: Any, **_keywords: Any) -> Any:
        raise AssertionError("the server used an attribute that is the program's own")

    __call__ = __bool__ = __iter__ = __len__ = __enter__ = __float__ = __int__ = __lt__ = __gt__ = _refuse


# --- waiting for the listening socket ---------------------------------------------------------------------------------


def test_server_is_selectable(impl: Any) -> None:
    """`select.select([server])` and `selector.register(server)` report a connection, and `server.socket` has it."""
    with impl.ThreadingTCPServer(LOCAL, echo_handler(impl)) as server, selectors.DefaultSelector() as selector:
        assert server.fileno() == server.socket.fileno()
        selector.register(server, selectors.EVENT_READ)
        assert selector.select(0) == []
        with connect(server.server_address):
            assert select.select([server], [], [], PATIENCE)[0] == [server]
            assert selector.select(PATIENCE)
            accepted, address = server.socket.accept()
            accepted.close()
            assert address[0] == "127.0.0.1"


def test_server_serves_under_asyncio(impl: Any) -> None:
    """`loop.add_reader(server, server.handle_request)` serves inside an asyncio loop."""

    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        with impl.ThreadingTCPServer(LOCAL, echo_handler(impl)) as server:
            loop.add_reader(server, server.handle_request)
            try:
                return await asyncio.to_thread(ask, server.server_address)
            finally:
                loop.remove_reader(server)

    assert asyncio.run(main()) == b"hello\n"


def test_fileno_is_looked_up_when_asked(impl: Any) -> None:
    """After `server.socket` was replaced, `fileno` and the loop use the new one."""
    server = impl.TCPServer(LOCAL, echo_handler(impl))
    server.socket.close()
    server.socket = socket.create_server(LOCAL)
    assert server.fileno() == server.socket.fileno()
    with serving(server):
        assert ask(server.socket.getsockname()) == b"hello\n"


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", "ForkingTCPServer"])
def test_nothing_is_accepted_ahead(impl: Any, name: str) -> None:
    """One `handle_request` takes one connection; the next stays in the kernel for whoever selects on the socket."""
    with getattr(impl, name)(LOCAL, echo_handler(impl)) as server:
        clients = [connect(server.server_address) for _ in range(2)]
        clients[0].sendall(b"x\n")
        server.handle_request()
        assert select.select([server.socket], [], [], PATIENCE)[0]
        server.socket.settimeout(PATIENCE)
        accepted, address = server.socket.accept()
        assert address == clients[1].getsockname()
        accepted.close()
        for client in clients:
            client.close()


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_connection_between_two_serve_forever_is_served_by_the_second(impl: Any, name: str) -> None:
    """After `shutdown` the listener queues; the second `serve_forever` serves what came in between."""
    with getattr(impl, name)(LOCAL, echo_handler(impl)) as server:
        loop = run(server.serve_forever, 0.05)
        assert ask(server.server_address) == b"hello\n"
        server.shutdown()
        join(loop)
        with connect(server.server_address) as client:
            client.sendall(b"between\n")
            assert select.select([client], [], [], 0.15)[0] == []
            loop = run(server.serve_forever, 0.05)
            assert read_all(client) == b"between\n"
            server.shutdown()
            join(loop)


def test_serve_until_stopped(impl: Any) -> None:
    """logging.config's and pydoc's loop: select on the socket for a while, `handle_request`, look at a flag."""

    class Receiver(impl.ThreadingTCPServer):
        allow_reuse_address = True
        abort = 0
        timeout = 1

        def serve_until_stopped(self) -> None:
            while not self.abort:
                if select.select([self.socket.fileno()], [], [], 0.05)[0]:
                    self.handle_request()
            self.server_close()

    server = Receiver(LOCAL, echo_handler(impl))
    loop = run(server.serve_until_stopped)
    assert ask(server.server_address) == b"hello\n"
    server.abort = 1
    join(loop)
    assert server.socket.fileno() == -1


# --- handle_request and its timeouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("of_socket", "of_server"), [(None, 0.1), (0.1, None), (0.1, 30), (30, 0.1)])
def test_handle_request_waits_for_the_shorter_timeout(
    impl: Any, of_socket: float | None, of_server: float | None
) -> None:
    """The timeout is the smaller of the listening socket's and `self.timeout`; then `handle_timeout` is called."""
    called = []

    class Timed(impl.TCPServer):
        timeout = of_server

        def handle_timeout(self) -> None:
            called.append(threading.get_ident())

    with Timed(LOCAL, None) as server:
        server.socket.settimeout(of_socket)
        start = time.monotonic()
        server.handle_request()
        spent = time.monotonic() - start
    assert called == [threading.get_ident()]
    assert 0.09 <= spent < 5


def test_handle_request_with_timeout_zero_polls(impl: Any) -> None:
    """A timeout of 0 returns at once, and still serves what already waits."""
    with impl.ThreadingTCPServer(LOCAL, echo_handler(impl)) as server:
        server.timeout = 0
        start = time.monotonic()
        server.handle_request()
        assert time.monotonic() - start < 1
        with connect(server.server_address) as client:
            client.sendall(b"x\n")
            assert select.select([server], [], [], PATIENCE)[0]
            server.handle_request()
            assert read_all(client) == b"x\n"


def test_handle_timeout_may_raise(impl: Any) -> None:
    """What `handle_timeout` raises comes out of `handle_request`."""

    class Impatient(impl.TCPServer):
        timeout = 0.05

        def handle_timeout(self) -> None:
            raise TimeoutError("nobody came back from the browser")

    with Impatient(LOCAL, None) as server, pytest.raises(TimeoutError, match="nobody came back"):
        server.handle_request()


def test_timeout_set_in_the_constructor(impl: Any) -> None:
    """A constructor that sets `self.timeout` after or before the base's is obeyed."""

    class Late(impl.UDPServer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.timeout = 0.05

    class Early(impl.UDPServer):
        def __init__(self, *args: Any) -> None:
            self.timeout = 0.05
            super().__init__(*args)

    for kind in (Late, Early):
        with kind(LOCAL, None) as server:
            join(run(server.handle_request), 5)


def test_loop_over_handle_request_with_a_socket_timeout(impl: Any) -> None:
    """Paste's loop: `settimeout` on the listening socket in `server_activate`, `handle_request` while running."""

    class Running(impl.ThreadingTCPServer):
        running = True

        def server_activate(self) -> None:
            super().server_activate()
            self.socket.settimeout(0.05)

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while self.running:
                self.handle_request()
            self.server_close()

    server = Running(LOCAL, echo_handler(impl))
    loop = run(server.serve_forever)
    assert ask(server.server_address) == b"hello\n"
    threading.Event().wait(0.12)
    assert ask(server.server_address) == b"hello\n"
    server.running = False
    join(loop)
    assert server.socket.fileno() == -1


def test_accepted_connection_blocks_though_the_listener_has_a_timeout(impl: Any) -> None:
    """A timeout of the listening socket does not pass to the connections."""
    seen = []

    class Look(impl.BaseRequestHandler):
        def handle(self) -> None:
            seen.append((self.request.gettimeout(), self.request.getblocking(), self.request.recv(1)))

    with impl.TCPServer(LOCAL, Look) as server:
        server.socket.settimeout(3)
        with connect(server.server_address) as client:
            timer = threading.Timer(0.1, client.sendall, [b"x"])
            timer.start()
            server.handle_request()
            timer.join()
    assert seen == [(None, True, b"x")]


def test_default_timeout_in_force(impl: Any) -> None:
    """With `socket.setdefaulttimeout` the loop serves on, and connections have that timeout."""
    seen = []

    class Look(impl.StreamRequestHandler):
        def handle(self) -> None:
            seen.append(self.request.gettimeout())
            self.wfile.write(self.rfile.readline())

    socket.setdefaulttimeout(7.5)
    try:
        with serving(impl.ThreadingTCPServer(LOCAL, Look)) as server:
            assert ask(server.server_address) == b"hello\n"
            assert ask(server.server_address) == b"hello\n"
    finally:
        socket.setdefaulttimeout(None)
    assert seen == [7.5, 7.5]


# --- names that belong to subclasses ----------------------------------------------------------------------------------

COMMON = """
    server thread timeout clients queue start stop run close log engine name address port host listener acceptor loop
    state settings lifecycle limits transport selector running closed pool threads connection peer logger lock workers
    user group control backlog tls config options handler handlers events open wake accept tick join spawn watch
    unwatch adopt gate tickets registry preambles stopped started stopping ready
"""


def test_loop_leaves_common_names_alone(impl: Any) -> None:
    """Attributes of common names set before `__init__` are neither used nor changed by a server that serves."""
    mine = {name: Hostile() for name in COMMON.split() if name != "timeout"}

    class Own(impl.ThreadingTCPServer):
        def __init__(self, *args: Any) -> None:
            self.__dict__.update(mine)
            self.timeout = 10
            super().__init__(*args)

    server = Own(LOCAL, echo_handler(impl))
    with serving(server):
        assert ask(server.server_address) == b"hello\n"
        assert ask(server.server_address) == b"hello\n"
    assert {name: vars(server)[name] for name in mine} == mine
    assert server.timeout == 10


def test_loop_leaves_common_methods_alone(impl: Any) -> None:
    """Methods and class attributes of common names are not called, nor is a `handle_request` of other arguments."""
    names = dict.fromkeys(COMMON.split(), Hostile())

    def handle_request(self: Any, request: Any, client_address: Any) -> None:
        raise AssertionError("serve_forever called handle_request")

    own = type("Own", (impl.ThreadingTCPServer,), {**names, "handle_request": handle_request})
    with serving(own(LOCAL, echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"


def test_timeout_is_ignored_by_serve_forever(impl: Any) -> None:
    """`self.timeout` bounds neither the loop nor connections."""

    class Slow(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    class Tiny(impl.ThreadingTCPServer):
        timeout = 0.01

        def handle_timeout(self) -> None:
            raise AssertionError("serve_forever called handle_timeout")

    with serving(Tiny(LOCAL, Slow)) as server, connect(server.server_address) as client:
        threading.Event().wait(0.1)
        client.sendall(b"late\n")
        assert read_all(client) == b"late\n"


# --- service_actions --------------------------------------------------------------------------------------------------


def test_service_actions_runs_each_poll_interval_in_the_loop(impl: Any) -> None:
    """Without any request it is called again and again, in the thread of `serve_forever`."""
    calls: list[tuple[int, float]] = []

    class Busy(impl.TCPServer):
        def service_actions(self) -> None:
            super().service_actions()
            calls.append((threading.get_ident(), time.monotonic()))

    server = Busy(LOCAL, None)
    loop = run(server.serve_forever, 0.02)
    wait_until(lambda: len(calls) >= 4)
    server.shutdown()
    join(loop)
    server.server_close()
    assert {ident for ident, _ in calls} == {loop.ident}
    assert calls[3][1] - calls[0][1] > 0.03, "the loop does not wait for the poll interval"


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_service_actions_runs_after_each_request(impl: Any, name: str) -> None:
    """After a request it is called at once, however long the poll interval."""
    called = threading.Event()

    class Busy(getattr(impl, name)):  # type: ignore[misc]
        def service_actions(self) -> None:
            called.set()

    server = Busy(LOCAL, echo_handler(impl))
    loop = run(server.serve_forever, 3)
    assert ask(server.server_address) == b"hello\n"
    assert called.wait(1)
    server._BaseServer__shutdown_request = True
    connect(server.server_address).close()
    join(loop)
    server.server_close()


def test_service_actions_by_hand_from_another_loop(impl: Any) -> None:
    """A loop of the program's own selects, calls `handle_request` and `service_actions` (Radicale)."""
    actions = []

    class Own(impl.ThreadingTCPServer):
        def service_actions(self) -> None:
            super().service_actions()
            actions.append(1)

    stop, stopped = socket.socketpair()
    with stop, stopped, Own(LOCAL, echo_handler(impl)) as server:

        def loop() -> None:
            while True:
                ready = select.select([server.socket, stopped], [], [], 0.05)[0]
                if stopped in ready:
                    return
                if ready:
                    server.handle_request()
                server.service_actions()

        thread = run(loop)
        assert ask(server.server_address) == b"hello\n"
        wait_until(lambda: actions)
        stop.sendall(b"x")
        join(thread)


def test_what_service_actions_raises_ends_the_loop(impl: Any) -> None:
    """An exception from `service_actions` comes out of `serve_forever`, and the server can be shut down and closed."""

    class Broken(impl.TCPServer):
        def service_actions(self) -> None:
            raise ZeroDivisionError("on purpose")

    with Broken(LOCAL, None) as server:
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            server.serve_forever(0.01)
        join(run(server.shutdown))
