"""How programs construct servers: in part, with sockets of their own, with attributes changed late."""

from __future__ import annotations

import functools
import socket
import ssl
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trustme
from waiting import wait_until

from .kit import LOCAL, PATIENCE, ask, connect, echo_handler, is_open, join, open_fds, run, serving

# --- parts of the constructor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixin", [False, True])
def test_base_init_only_then_own_socket(impl: Any, mixin: bool) -> None:
    """`BaseServer.__init__` alone, then `self.socket`, `server_bind` and `server_activate` make a server."""
    bases = (impl.ThreadingMixIn, impl.TCPServer) if mixin else (impl.TCPServer,)

    class Own(*bases):  # type: ignore[misc]
        def __init__(self, address: Any, handler: Any) -> None:
            impl.BaseServer.__init__(self, address, handler)
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()

    with serving(Own(LOCAL, echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"
        assert ask(server.server_address) == b"hello\n"


def test_base_init_only_on_an_inherited_socket(impl: Any, tmp_path: Path) -> None:
    """A server on a listening socket that somebody else bound (systemd), with no TCPServer among its bases at all."""
    path = str(tmp_path / "inherited")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    class Inherited(impl.ThreadingMixIn, impl.BaseServer):
        def __init__(self, handler: Any) -> None:
            impl.BaseServer.__init__(self, listener.getsockname(), handler)
            self.socket = listener

        def fileno(self) -> int:
            return self.socket.fileno()

        def get_request(self) -> Any:
            return self.socket.accept()

        def close_request(self, request: Any) -> None:
            request.close()

    with listener, serving(Inherited(echo_handler(impl))):
        assert ask(path) == b"hello\n"


def test_handle_request_after_base_init_only(impl: Any) -> None:
    """`handle_request` works on a BaseServer that was given a socket."""

    class Given(impl.BaseServer):
        def fileno(self) -> int:
            return self.socket.fileno()

        def get_request(self) -> Any:
            return self.socket.accept()

        def shutdown_request(self, request: Any) -> None:
            request.close()

    server = Given(LOCAL, echo_handler(impl))
    server.socket = socket.create_server(LOCAL)
    with server.socket:
        client = run(ask, server.socket.getsockname())
        server.handle_request()
        join(client)


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", "UDPServer", "ForkingTCPServer"])
@pytest.mark.parametrize("skipped", ["new", "mock"])
def test_hooks_without_init(impl: Any, name: str, skipped: str, capfd: pytest.CaptureFixture[str]) -> None:
    """With `__init__` skipped, handle_error, verify_request, finish_request and shutdown_request work one by one."""
    base = getattr(impl, name)
    if skipped == "new":
        server = base.__new__(base)
    else:
        with mock.patch.object(impl.TCPServer, "__init__", return_value=None):
            server = base(LOCAL, None)
    handled = []
    server.RequestHandlerClass = lambda *args: handled.append(args)
    request = mock.Mock(spec=socket.socket)
    assert server.verify_request(request, ("1.2.3.4", 5)) is True
    server.finish_request(request, ("1.2.3.4", 5))
    assert handled == [(request, ("1.2.3.4", 5), server)]
    server.shutdown_request(request)
    assert request.close.called is (name != "UDPServer")
    server.close_request(request)
    server.service_actions()
    server.handle_timeout()
    try:
        raise ValueError("printed")
    except ValueError:
        server.handle_error(request, ("1.2.3.4", 5))
    assert "printed" in capfd.readouterr().err


def test_process_request_without_init(impl: Any) -> None:
    """`process_request` of a server made by `__new__` runs its handler, in a thread where it should."""
    for name, same in (("TCPServer", True), ("ThreadingTCPServer", False)):
        base = getattr(impl, name)
        server = base.__new__(base)
        ran: list[int] = []
        server.RequestHandlerClass = lambda *args, ran=ran: ran.append(threading.get_ident())
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server.process_request(ours, ("1.2.3.4", 5))
            theirs.settimeout(PATIENCE)
            assert theirs.recv(1) == b""
            assert (ran == [threading.get_ident()]) is same
        for thread in list(vars(server).get("_threads", ())):
            join(thread)


def test_bind_and_activate_false(impl: Any) -> None:
    """With bind_and_activate=False nothing is bound until `server_bind`, with the options set in between."""
    server = impl.ThreadingTCPServer(LOCAL, echo_handler(impl), bind_and_activate=False)
    assert server.socket.getsockname()[1] == 0
    assert server.server_address == LOCAL
    server.allow_reuse_address = True
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    server.server_bind()
    assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    server.server_activate()
    with serving(server):
        assert ask(server.server_address) == b"hello\n"


def test_bind_and_activate_false_by_position_and_never_bound(impl: Any) -> None:
    """The third positional argument is bind_and_activate; such a server closes without having been bound."""
    with impl.TCPServer(LOCAL, None, False) as server:
        assert server.fileno() > 0
    assert server.fileno() == -1


# --- replaced sockets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [True, False])
def test_tls_by_wrapping_the_servers_socket(impl: Any, bound: bool) -> None:
    """`server.socket = context.wrap_socket(server.socket, server_side=True)` gives a TLS server."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    seen = []

    class Look(impl.StreamRequestHandler):
        def handle(self) -> None:
            seen.append(isinstance(self.request, ssl.SSLSocket))
            self.wfile.write(self.rfile.readline())

    server = impl.ThreadingTCPServer(LOCAL, Look, bind_and_activate=bound)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    if not bound:
        server.server_bind()
        server.server_activate()
    with serving(server):
        raw = connect(server.server_address)
        with trust.wrap_socket(raw, server_hostname="localhost") as client:
            client.sendall(b"secret\n")
            assert client.recv(100) == b"secret\n"
    assert seen == [True]


def test_socket_from_a_passed_descriptor(impl: Any) -> None:
    """werkzeug's reloader: unbound server, `server_close`, then `socket.fromfd` of an inherited listener."""
    listener = socket.create_server(LOCAL)
    server = impl.ThreadingTCPServer(LOCAL, echo_handler(impl), bind_and_activate=False)
    server.server_close()
    server.socket = socket.fromfd(listener.fileno(), socket.AF_INET, socket.SOCK_STREAM)
    server.server_address = server.socket.getsockname()
    with listener, serving(server):
        assert ask(server.server_address) == b"hello\n"


def test_new_socket_and_second_bind(impl: Any) -> None:
    """Roundup: another socket, then `server_bind` and `server_activate` once more."""
    server = impl.TCPServer(LOCAL, echo_handler(impl))
    first = server.server_address
    server.socket.close()
    server.server_address = LOCAL
    server.socket = socket.socket()
    server.server_bind()
    server.server_activate()
    assert server.server_address != first or server.fileno() > 0
    with serving(server):
        assert ask(server.server_address) == b"hello\n"
        assert server.server_address == server.socket.getsockname()


def test_socket_is_none_before_init(impl: Any) -> None:
    """pynetdicom sets `self.socket = None` and fields of its own before `__init__` runs."""

    class Early(impl.TCPServer):
        def __init__(self, *args: Any) -> None:
            self.socket = None
            self.ae = self.contexts = self.timeout = None
            self.server_address = None
            super().__init__(*args)

    with serving(Early(LOCAL, echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"


def test_socket_replaced_while_not_serving(impl: Any) -> None:
    """Between two `serve_forever` the socket may change; the second waits on the new one."""
    server = impl.ThreadingTCPServer(LOCAL, echo_handler(impl))
    loop = run(server.serve_forever, 0.05)
    assert ask(server.server_address) == b"hello\n"
    server.shutdown()
    join(loop)
    server.socket.close()
    server.socket = socket.create_server(LOCAL)
    with serving(server):
        assert ask(server.socket.getsockname()) == b"hello\n"


def test_server_closes_the_socket_it_has_now(impl: Any) -> None:
    """`server_close` closes what `server.socket` is at that time, and nothing else."""
    server = impl.TCPServer(LOCAL, None)
    first, server.socket = server.socket, socket.create_server(LOCAL)
    server.server_close()
    assert server.socket.fileno() == -1
    assert first.fileno() > 0
    first.close()


# --- attributes, on the class and on the instance, late ---------------------------------------------------------------


def test_class_attributes_changed_for_all(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`TCPServer.allow_reuse_address = True` and `ThreadingTCPServer.address_family` hold for servers made later."""
    monkeypatch.setattr(impl.TCPServer, "allow_reuse_address", True)
    monkeypatch.setattr(impl.ThreadingTCPServer, "address_family", socket.AF_INET6, raising=False)
    monkeypatch.setattr(impl.ThreadingTCPServer, "daemon_threads", True)
    with impl.TCPServer(LOCAL, None) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    seen = []

    class Look(impl.StreamRequestHandler):
        def handle(self) -> None:
            seen.append(threading.current_thread().daemon)
            self.wfile.write(self.rfile.readline())

    with serving(impl.ThreadingTCPServer(("::1", 0), Look)) as server:
        assert server.socket.family == socket.AF_INET6
        assert len(server.server_address) == 4
        assert ask(server.server_address) == b"hello\n"
    assert seen == [True]


def test_defaults_of_the_class_attributes(impl: Any) -> None:
    """Every public class attribute has stdlib's default."""
    import socketserver

    for name in ("BaseServer", "TCPServer", "UDPServer", "UnixStreamServer", "ThreadingMixIn", "ForkingMixIn"):
        for attribute in (
            "timeout address_family socket_type request_queue_size allow_reuse_address allow_reuse_port daemon_threads "
            "block_on_close max_children active_children"
        ).split():
            if hasattr(getattr(socketserver, name), attribute):
                expected = getattr(getattr(socketserver, name), attribute)
                assert getattr(getattr(impl, name), attribute) == expected, f"{name}.{attribute}"
    for attribute in ("rbufsize", "wbufsize", "timeout", "disable_nagle_algorithm"):
        expected = getattr(socketserver.StreamRequestHandler, attribute)
        assert getattr(impl.StreamRequestHandler, attribute) == expected, attribute


def test_no_reuse_unless_asked(impl: Any) -> None:
    """Neither SO_REUSEADDR nor SO_REUSEPORT is set on a drop-in server."""
    with impl.TCPServer(LOCAL, None) as server:
        assert not server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert not server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


def test_reuse_port_when_asked(impl: Any) -> None:
    """With `allow_reuse_port` two servers share a port."""
    shared = type("Shared", (impl.TCPServer,), {"allow_reuse_port": True})
    with shared(LOCAL, None) as one, shared(one.server_address, None) as other:
        assert one.server_address == other.server_address


def test_daemon_threads_on_the_instance_after_construction(impl: Any) -> None:
    """`server.daemon_threads = True` (Django, sshtunnel) holds for the next request, also while serving."""
    seen = []

    class Look(impl.StreamRequestHandler):
        def handle(self) -> None:
            seen.append(threading.current_thread().daemon)
            self.wfile.write(self.rfile.readline())

    with serving(impl.ThreadingTCPServer(LOCAL, Look)) as server:
        for value in (True, False):
            server.daemon_threads = value
            assert ask(server.server_address) == b"hello\n"
    assert seen == [True, False]


@pytest.mark.parametrize("block", [True, False])
def test_block_on_close_on_the_instance(impl: Any, block: bool) -> None:
    """With `block_on_close` `server_close` waits for the handlers, without it does not."""
    started, gate = threading.Event(), threading.Event()

    class Slow(impl.StreamRequestHandler):
        def handle(self) -> None:
            started.set()
            gate.wait(PATIENCE)

    server = impl.ThreadingTCPServer(LOCAL, Slow)
    server.block_on_close = block
    loop = run(server.serve_forever, 0.05)
    with connect(server.server_address):
        assert started.wait(PATIENCE)
        server.shutdown()
        closer = run(server.server_close)
        closer.join(0.2)
        waited = closer.is_alive()
        gate.set()
        join(closer)
    join(loop)
    assert waited is block


def test_request_queue_size_changed(impl: Any) -> None:
    """A class attribute or an instance attribute set before `server_activate` reaches listen(2)."""
    big = type("Big", (impl.TCPServer,), {"request_queue_size": 200})
    late = impl.TCPServer(LOCAL, None, bind_and_activate=False)
    late.request_queue_size = 201
    late.server_bind()
    late.server_activate()
    with late, big(LOCAL, None) as server:
        assert (backlog(server.socket), backlog(late.socket)) == (200, 201)


def test_attributes_that_are_properties(impl: Any) -> None:
    """`request_queue_size` and `allow_reuse_address` may be properties of a subclass: their values count."""

    class Computed(impl.TCPServer):
        @property
        def request_queue_size(self) -> int:
            return 200 + self.allow_reuse_address

        @property
        def allow_reuse_address(self) -> bool:
            return self.RequestHandlerClass is None

    with Computed(LOCAL, None) as server:
        assert backlog(server.socket) == 201
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def backlog(listener: socket.socket) -> int:
    """Ask the kernel for a listener's queue length: `tcpi_sacked`, at 28 in struct tcp_info (linux/tcp.h)."""
    return int.from_bytes(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)[28:32], "little")


def test_max_children_on_the_instance(impl: Any) -> None:
    """`server.max_children = 2` after construction bounds the children; the rest are served later."""

    class Wait(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    server = impl.ForkingTCPServer(LOCAL, Wait)
    server.max_children = 2
    with serving(server):
        clients = [connect(server.server_address) for _ in range(4)]
        wait_until(lambda: server.active_children and len(server.active_children) == 2)
        for client in clients:
            client.sendall(b"x\n")
        assert [client.recv(100) for client in clients] == [b"x\n"] * 4
        assert len(server.active_children) <= 2
        for client in clients:
            client.close()


def test_handler_timeout_changed_for_all(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`StreamRequestHandler.timeout = …` holds for every handler made later."""
    monkeypatch.setattr(impl.StreamRequestHandler, "timeout", 0.05)
    seen = []

    class Look(impl.StreamRequestHandler):
        def handle(self) -> None:
            seen.append(self.request.gettimeout())
            try:
                self.rfile.readline()
            except TimeoutError:
                self.request.sendall(b"too slow")

    with serving(impl.ThreadingTCPServer(LOCAL, Look)) as server, connect(server.server_address) as client:
        assert client.recv(100) == b"too slow"
    assert seen == [0.05]


# --- RequestHandlerClass ----------------------------------------------------------------------------------------------


def test_handler_may_be_any_callable(impl: Any) -> None:
    """functools.partial, a function, a lambda, a bound method and a type() result all serve."""

    class Greet(impl.BaseRequestHandler):
        def __init__(self, *args: Any, word: bytes = b"class") -> None:
            self.word = word
            super().__init__(*args)

        def handle(self) -> None:
            self.request.sendall(self.word)

    def function(request: Any, _address: Any, _server: Any) -> None:
        request.sendall(b"function")

    class Factory:
        def make(self, *args: Any) -> Any:
            return Greet(*args, word=b"method")

    makers = {
        b"partial": functools.partial(Greet, word=b"partial"),
        b"function": function,
        b"lambda": lambda request, *_: request.sendall(b"lambda"),
        b"method": Factory().make,
        b"class": type("Made", (Greet,), {}),
    }
    for word, maker in makers.items():
        for name in ("TCPServer", "ThreadingTCPServer"):
            with serving(getattr(impl, name)(LOCAL, maker)) as server:
                assert ask(server.server_address, b"") == word


def test_handler_exchanged_at_run_time(impl: Any) -> None:
    """`server.RequestHandlerClass` is read at each request, and its attributes through the server."""

    class Target(impl.BaseRequestHandler):
        remote_address = b"one"

        def handle(self) -> None:
            self.request.sendall(self.server.RequestHandlerClass.remote_address)

    with serving(impl.ThreadingTCPServer(LOCAL, Target)) as server:
        assert server.RequestHandlerClass is Target
        assert ask(server.server_address, b"") == b"one"
        server.RequestHandlerClass = type("Other", (Target,), {"remote_address": b"two"})
        assert ask(server.server_address, b"") == b"two"


# --- class games ------------------------------------------------------------------------------------------------------


def test_class_graph(impl: Any) -> None:
    """Classes derive from one another, and resolve their methods, in stdlib's order."""
    import socketserver

    names = [name for name in socketserver.__all__ if name in impl.__all__]
    assert set(socketserver.__all__) <= set(impl.__all__)
    for name in names:
        expected = [cls.__name__ for cls in getattr(socketserver, name).__mro__]
        found = [cls.__name__ for cls in getattr(impl, name).__mro__ if cls.__name__ in {*expected}]
        assert found == expected, name


def test_mixin_by_type_call_and_isinstance(impl: Any) -> None:
    """`type("X", (ThreadingMixIn, cls), {})` threads any server; isinstance on mix-ins tells the kinds apart."""
    made = type("Made", (impl.ThreadingMixIn, impl.TCPServer), {})
    seen = []

    class Look(impl.StreamRequestHandler):
        def handle(self) -> None:
            seen.append("process_request_thread" in threading.current_thread().name)
            self.wfile.write(self.rfile.readline())

    with serving(made(LOCAL, Look)) as server:
        assert isinstance(server, impl.ThreadingMixIn)
        assert not isinstance(server, impl.ForkingMixIn)
        assert ask(server.server_address) == b"hello\n"
    assert seen == [True]
    with impl.TCPServer(LOCAL, None) as plain, impl.ForkingTCPServer(LOCAL, None) as forking:
        assert not isinstance(plain, (impl.ThreadingMixIn, impl.ForkingMixIn))
        assert isinstance(forking, impl.ForkingMixIn)
        assert not isinstance(forking, impl.ThreadingMixIn)


def test_threading_mixin_on_something_that_is_no_server(impl: Any) -> None:
    """ThreadingMixIn needs `finish_request`, `shutdown_request` and `handle_error` only."""
    done: list[Any] = []
    over = threading.Event()

    class Tasks(impl.ThreadingMixIn):
        def finish_request(self, request: Any, client_address: Any) -> None:
            done.append((request, threading.current_thread().name))
            if request == "bad":
                raise ValueError(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            done.append(("error", client_address))

        def shutdown_request(self, request: Any) -> None:
            done.append(("shut", request))
            over.set()

    tasks = Tasks()
    tasks.process_request("good", 1)
    assert over.wait(PATIENCE)
    over.clear()
    tasks.process_request("bad", 2)
    assert over.wait(PATIENCE)
    assert [first for first, _ in done] == ["good", "shut", "bad", "error", "shut"]
    assert "process_request_thread" in done[0][1]


def test_server_that_is_a_thread(impl: Any) -> None:
    """`class X(threading.Thread, TCPServer)` with explicit constructors runs as its own thread."""

    class Both(threading.Thread, impl.ThreadingTCPServer):
        def __init__(self) -> None:
            threading.Thread.__init__(self, daemon=True)
            impl.ThreadingTCPServer.__init__(self, LOCAL, echo_handler(impl))

        def run(self) -> None:
            self.serve_forever(0.05)

    server = Both()
    server.start()
    assert ask(server.server_address) == b"hello\n"
    server.shutdown()
    join(server)
    server.server_close()


def test_object_at_the_end_of_the_bases(impl: Any) -> None:
    """`class X(ThreadingMixIn, TCPServer, object)` and non-cooperative constructors work."""

    class Old(impl.ThreadingMixIn, impl.TCPServer, object):  # noqa: UP004
        def __init__(self, address: Any, handler: Any) -> None:
            self.owner = "me"
            impl.TCPServer.__init__(self, address, handler)

    with serving(Old(LOCAL, echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"
        assert server.owner == "me"


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", "UDPServer", "ForkingTCPServer"])
def test_failed_constructors_leak_nothing(impl: Any, name: str) -> None:
    """A constructor that fails, at bind, at activate or by its arguments, leaves no descriptor."""
    base = getattr(impl, name)
    before = open_fds()
    with base(LOCAL, None) as taken:
        for _ in range(5):
            with pytest.raises(OSError, match="in use"):
                base(taken.server_address, None)
    for address, error in (((LOCAL[0], -1), OverflowError), (("192.0.2.1", 1), OSError), ("nonsense", TypeError)):
        for _ in range(5):
            with pytest.raises(error):
                base(address, None)

    def fail(_self: Any) -> None:
        raise KeyboardInterrupt

    broken = type("Broken", (base,), {"server_activate": fail})
    with pytest.raises(KeyboardInterrupt):
        broken(LOCAL, None)
    assert open_fds() == before


def test_context_manager_closes(impl: Any) -> None:
    """`with` gives the server itself and closes it at the end, after an exception too."""
    server = impl.TCPServer(LOCAL, None)
    with pytest.raises(ZeroDivisionError), server as same:
        assert same is server
        raise ZeroDivisionError
    assert server.socket.fileno() == -1
    assert not is_open(server.server_address)
