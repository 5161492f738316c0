"""The hooks around the connections: binding, closing, timeouts and errors, overridden as programs do."""

from __future__ import annotations

import queue
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from .kit import LOCAL, PATIENCE, ask, echo_handler, is_open, join, run, serving

# --- handle_timeout ---------------------------------------------------------------------------------------------------


def test_handle_timeout_of_forking_collects(impl: Any) -> None:
    """ForkingMixIn's `handle_timeout` and `service_actions` both collect children."""
    calls = []

    class Counting(impl.ForkingTCPServer):
        timeout = 0.05

        def collect_children(self, *, blocking: bool = False) -> None:
            calls.append(blocking)
            super().collect_children(blocking=blocking)

    with Counting(LOCAL, None) as server:
        server.handle_request()
        assert calls
        before = len(calls)
        server.service_actions()
        assert len(calls) > before


# --- binding ----------------------------------------------------------------------------------------------------------


def test_server_bind_with_options(impl: Any) -> None:
    """`server_bind` that sets IPV6_V6ONLY off first (Radicale) makes a dual-stack server."""

    class Dual(impl.ThreadingTCPServer):
        address_family = socket.AF_INET6

        def server_bind(self) -> None:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

    with serving(Dual(("::", 0), echo_handler(impl))) as server:
        port = server.server_address[1]
        assert ask(("127.0.0.1", port)) == b"hello\n"
        assert ask(("::1", port)) == b"hello\n"


def test_server_bind_of_its_own(impl: Any) -> None:
    """`server_bind` that binds by itself and sets fields (pynetdicom, HTTPServer called unbound)."""

    class Own(impl.TCPServer):
        def server_bind(self) -> None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(self.server_address)
            self.server_address = self.socket.getsockname()
            self.server_name, self.server_port = self.server_address

    class Unbound(impl.TCPServer):
        def server_bind(self) -> None:
            impl.TCPServer.server_bind(self)
            self.server_name, self.server_port = self.server_address[:2]

    for kind in (Own, Unbound):
        with serving(kind(LOCAL, echo_handler(impl))) as server:
            assert ask(("127.0.0.1", server.server_port)) == b"hello\n"


def test_server_bind_of_a_unix_server_then_fields(impl: Any, tmp_path: Path) -> None:
    """asyncio's tests: UnixStreamServer's bind, then HTTP's fields beside it."""

    class Http(impl.UnixStreamServer):
        def server_bind(self) -> None:
            impl.UnixStreamServer.server_bind(self)
            self.server_name, self.server_port = "127.0.0.1", 80

        def get_request(self) -> Any:
            request, _ = super().get_request()
            return request, ("127.0.0.1", "")

    with serving(Http(str(tmp_path / "s"), echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"
        assert server.server_port == 80


def test_server_activate_that_sets_a_timeout_too(impl: Any) -> None:
    """`server_activate` may listen by itself with its own queue and a timeout."""

    class Own(impl.TCPServer):
        def server_activate(self) -> None:
            self.socket.listen(1)
            self.socket.settimeout(1)

    with serving(Own(LOCAL, echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"
        assert server.socket.gettimeout() == 1


def test_several_sockets_behind_one_server(impl: Any) -> None:
    """pywebsocket3: several sockets, an own `fileno` and `serve_forever` that puts each in turn in `server.socket`."""
    import select

    class Several(impl.ThreadingMixIn, impl.BaseServer):
        running = True

        def __init__(self, handler: Any) -> None:
            impl.BaseServer.__init__(self, LOCAL, handler)
            self.sockets = [socket.create_server(LOCAL), socket.create_server(LOCAL)]
            self.socket = self.sockets[0]

        def fileno(self) -> int:
            return self.socket.fileno()

        def get_request(self) -> Any:
            return self.socket.accept()

        def shutdown_request(self, request: Any) -> None:
            request.shutdown(socket.SHUT_WR)
            self.close_request(request)

        def close_request(self, request: Any) -> None:
            request.close()

        def server_close(self) -> None:
            super().server_close()
            for listener in self.sockets:
                listener.close()

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while self.running:
                for ready in select.select(self.sockets, [], [], poll_interval)[0]:
                    self.socket = ready
                    self._handle_request_noblock()

    with Several(echo_handler(impl)) as server:
        loop = run(server.serve_forever, 0.05)
        assert [ask(listener.getsockname()) for listener in server.sockets] == [b"hello\n"] * 2
        server.running = False
        join(loop)


# --- closing and serving ----------------------------------------------------------------------------------------------


def test_server_close_extended(impl: Any) -> None:
    """An extended `server_close` is what `with` and a failing constructor call."""
    closed = []

    class Closing(impl.TCPServer):
        def server_close(self) -> None:
            closed.append(1)
            super().server_close()

    with Closing(LOCAL, None) as server:
        pass
    assert closed == [1]
    assert not is_open(server.server_address)
    with pytest.raises(OSError, match="."):
        Closing(("192.0.2.1", 1), None)
    assert closed == [1, 1]


@pytest.mark.parametrize("way", ["positional", "keyword", "super", "alias", "none"])
def test_ways_to_call_serve_forever(impl: Any, way: str) -> None:
    """poll_interval by place and by keyword; `target=super().serve_forever`; `serve = TCPServer.serve_forever`."""

    class Daemon(impl.TCPServer):
        serve = impl.TCPServer.serve_forever

        def threaded(self) -> threading.Thread:
            return run(super().serve_forever)

    with Daemon(LOCAL, echo_handler(impl)) as server:
        loop = {
            "positional": lambda: run(server.serve_forever, 0.05),
            "keyword": lambda: run(server.serve_forever, poll_interval=0.05),
            "super": server.threaded,
            "alias": lambda: run(server.serve, poll_interval=0.05),
            "none": lambda: run(server.serve_forever),
        }[way]()
        assert ask(server.server_address) == b"hello\n"
        server.shutdown()
        join(loop)


def test_fileno_overridden(impl: Any) -> None:
    """The loop waits on what an overridden `fileno` returns."""
    asked = []

    class Named(impl.TCPServer):
        def fileno(self) -> int:
            asked.append(1)
            return int(super().fileno())

    with serving(Named(LOCAL, echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"
    assert asked


def test_base_server_with_nothing_of_a_socket(impl: Any) -> None:
    """A BaseServer subclass with only `fileno` and `get_request` is served: here a pipe of lines."""
    import os

    out, into = os.pipe()
    served: queue.Queue[bytes] = queue.Queue()

    class Pipe(impl.BaseServer):
        def fileno(self) -> int:
            return out

        def get_request(self) -> Any:
            return os.read(out, 100), "pipe"

    class Take(impl.BaseRequestHandler):
        def handle(self) -> None:
            served.put(self.request)

    server = Pipe("pipe", Take)
    with serving(server):
        os.write(into, b"one")
        assert served.get(timeout=PATIENCE) == b"one"
        os.write(into, b"two")
        assert served.get(timeout=PATIENCE) == b"two"
    os.close(out)
    os.close(into)
