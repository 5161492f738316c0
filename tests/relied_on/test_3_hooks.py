"""Every hook is called, on the instance, with its arguments, in its order, and can be overridden as programs do."""

from __future__ import annotations

import contextlib
import io
import queue
import socket
import ssl
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trustme
from waiting import wait_until

from .kit import LOCAL, PATIENCE, ask, connect, echo_handler, join, read_all, run, serving

HOOKS = """
    get_request verify_request process_request process_request_thread finish_request handle_error shutdown_request
    close_request
""".split()


def recording(base: Any, calls: list[tuple[Any, ...]]) -> Any:
    """Derive a server whose every hook notes its name and arguments before it does its work."""

    def noting(name: str) -> Any:
        def hook(self: Any, *args: Any) -> Any:
            calls.append((name, *args))
            return getattr(super(cls, self), name)(*args)

        return hook

    cls: Any = type("Recording", (base,), {name: noting(name) for name in HOOKS if hasattr(base, name)})
    return cls


def recording_handler(impl: Any, calls: list[tuple[Any, ...]], error: type[Exception] | None = None) -> Any:
    """A handler that notes its four methods, and raises when told."""

    class Handler(impl.BaseRequestHandler):
        def __init__(self, request: Any, client_address: Any, server: Any) -> None:
            calls.append(("Handler", request, client_address, server))
            super().__init__(request, client_address, server)

        def setup(self) -> None:
            calls.append(("setup",))

        def handle(self) -> None:
            calls.append(("handle",))
            if error:
                raise error("on purpose")

        def finish(self) -> None:
            calls.append(("finish",))

    return Handler


@pytest.mark.parametrize("error", [None, ValueError])
@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer", "UnixStreamServer"])
def test_order_and_arguments(
    impl: Any, name: str, error: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hooks of one connection run in stdlib's order, all with the request and address that `get_request` gave."""
    calls: list[tuple[Any, ...]] = []
    base = getattr(impl, name)
    address = str(tmp_path / "socket") if "Unix" in name else LOCAL
    server = recording(base, calls)(address, recording_handler(impl, calls, error))
    with serving(server), connect(server.server_address) as client:
        own = client.getsockname()
        assert client.recv(1) == b""
    threaded = name.startswith("Threading")
    request = calls[1][1]
    assert isinstance(request, socket.socket)
    pair = (request, own)
    expected = [
        ("get_request",),
        ("verify_request", *pair),
        ("process_request", *pair),
        *([("process_request_thread", *pair)] if threaded else []),
        ("finish_request", *pair),
        ("Handler", *pair, server),
        ("setup",),
        ("handle",),
        ("finish",),
        *([("handle_error", *pair)] if error else []),
        ("shutdown_request", request),
        ("close_request", request),
    ]
    assert calls == expected
    assert ("on purpose" in capfd.readouterr().err) is bool(error)


def test_order_when_refused(impl: Any) -> None:
    """`verify_request` that says no is followed by `shutdown_request` and `close_request` alone."""
    calls: list[tuple[Any, ...]] = []

    class Refusing(recording(impl.ThreadingTCPServer, calls)):  # type: ignore[misc]
        def verify_request(self, request: Any, client_address: Any) -> bool:
            super().verify_request(request, client_address)
            return False

    with serving(Refusing(LOCAL, recording_handler(impl, calls))) as server:
        assert ask(server.server_address, b"") == b""
    assert [call[0] for call in calls] == ["get_request", "verify_request", "shutdown_request", "close_request"]


def test_order_on_datagrams(impl: Any) -> None:
    """A datagram goes through the same hooks, with the pair `(bytes, socket)`."""
    calls: list[tuple[Any, ...]] = []
    server = recording(impl.UDPServer, calls)(LOCAL, recording_handler(impl, calls))
    with serving(server), socket.socket(type=socket.SOCK_DGRAM) as client:
        client.bind(LOCAL)
        own = client.getsockname()
        client.sendto(b"ping", server.server_address)
        wait_until(lambda: calls and calls[-1][0] == "close_request")
    pair = ((b"ping", server.socket), own)
    assert calls == [
        ("get_request",),
        ("verify_request", *pair),
        ("process_request", *pair),
        ("finish_request", *pair),
        ("Handler", *pair, server),
        ("setup",),
        ("handle",),
        ("finish",),
        ("shutdown_request", pair[0]),
        ("close_request", pair[0]),
    ]


@pytest.mark.parametrize("name", ["TCPServer", "ThreadingTCPServer"])
def test_handle_error_has_the_open_request(impl: Any, name: str) -> None:
    """`handle_error` runs inside the `except`, and can ask the request for its names and write to it."""
    seen = []

    class Polite(getattr(impl, name)):  # type: ignore[misc]
        def handle_error(self, request: Any, client_address: Any) -> None:
            seen.append((sys.exc_info()[0], request.getsockname(), request.getpeername() == client_address))
            request.sendall(b"sorry")

    with serving(Polite(LOCAL, recording_handler(impl, [], ValueError))) as server:
        assert ask(server.server_address, b"") == b"sorry"
        assert seen == [(ValueError, server.server_address, True)]


@pytest.mark.parametrize("loop", ["serve_forever", "handle_request"])
def test_hooks_set_on_the_instance(impl: Any, loop: str) -> None:
    """A hook replaced on the instance, not the class, is the one that is called."""
    refused = threading.Event()

    def verify(_request: Any, _address: Any) -> bool:
        refused.set()
        return False

    server = impl.TCPServer(LOCAL, echo_handler(impl))
    server.verify_request = verify
    if loop == "serve_forever":
        with serving(server):
            assert ask(server.server_address, b"") == b""
    else:
        with server:
            client = connect(server.server_address)
            server.handle_request()
            client.close()
    assert refused.is_set()


# --- get_request ------------------------------------------------------------------------------------------------------


def test_get_request_that_adds_to_the_address(impl: Any) -> None:
    """The address becomes a tuple with a socket in it, `finish_request` unpacks it (Radicale)."""
    seen = []

    class Pairing(impl.ThreadingTCPServer):
        def get_request(self) -> Any:
            request, address = super().get_request()
            request.settimeout(3)
            return request, (address, request.dup())

        def finish_request(self, request: Any, client_address: Any) -> None:
            address, spare = client_address
            with spare:
                super().finish_request(request, address)

    class Look(impl.StreamRequestHandler):
        def handle(self) -> None:
            seen.append((self.client_address[0], self.request.gettimeout()))
            self.wfile.write(self.rfile.readline())

    with serving(Pairing(LOCAL, Look)) as server:
        assert ask(server.server_address) == b"hello\n"
    assert seen == [("127.0.0.1", 3.0)]


def test_get_request_that_returns_the_one_connected_socket(impl: Any) -> None:
    """A server that connects instead of listening serves that one socket (idlelib)."""
    listener = socket.create_server(LOCAL)

    class Outgoing(impl.TCPServer):
        def server_bind(self) -> None:
            """Nothing to bind."""

        def server_activate(self) -> None:
            self.socket.connect(self.server_address)

        def get_request(self) -> Any:
            return self.socket, self.server_address

    with listener, Outgoing(listener.getsockname(), echo_handler(impl)) as server:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"dialled\n")
            server.handle_request()
            assert peer.recv(100) == b"dialled\n"


def test_get_request_that_wraps_in_tls(impl: Any) -> None:
    """`get_request` that returns a TLS socket, its handshake done in `finish_request` with a timeout."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)

    class Secure(impl.ThreadingTCPServer):
        def get_request(self) -> Any:
            request, address = super().get_request()
            return context.wrap_socket(request, server_side=True, do_handshake_on_connect=False), address

        def finish_request(self, request: Any, client_address: Any) -> None:
            request.settimeout(PATIENCE)
            request.do_handshake()
            self.RequestHandlerClass(request, client_address, self)

    class Look(impl.StreamRequestHandler):
        def handle(self) -> None:
            assert isinstance(self.request, ssl.SSLSocket)
            self.wfile.write(self.rfile.readline())

    with serving(Secure(LOCAL, Look)) as server:
        raw = connect(server.server_address)
        with trust.wrap_socket(raw, server_hostname="localhost") as client:
            client.sendall(b"secret\n")
            assert client.recv(100) == b"secret\n"


# --- verify_request ---------------------------------------------------------------------------------------------------


def test_verify_request_on_datagrams(impl: Any) -> None:
    """Datagrams that `verify_request` refuses reach no handler (python-osc)."""
    served: queue.Queue[bytes] = queue.Queue()

    class Osc(impl.UDPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return bool(request[0].startswith(b"/"))

    class Take(impl.BaseRequestHandler):
        def handle(self) -> None:
            served.put(self.request[0])

    with serving(Osc(LOCAL, Take)) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.sendto(b"noise", server.server_address)
        client.sendto(b"/volume", server.server_address)
        assert served.get(timeout=PATIENCE) == b"/volume"


# --- process_request --------------------------------------------------------------------------------------------------


def test_process_request_that_enqueues_the_thread_method(impl: Any) -> None:
    """jsonrpclib: `process_request` enqueues `self.process_request_thread` with its arguments for own workers."""
    work: queue.Queue[Any] = queue.Queue()

    class Pooled(impl.ThreadingMixIn, impl.TCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            work.put((self.process_request_thread, request, client_address))

    def worker() -> None:
        while (task := work.get()) is not None:
            task[0](*task[1:])

    workers = [run(worker) for _ in range(2)]
    with serving(Pooled(LOCAL, echo_handler(impl))) as server:
        for _ in range(4):
            assert ask(server.server_address) == b"hello\n"
    for _ in workers:
        work.put(None)
    for thread in workers:
        join(thread)


def test_thread_method_called_by_its_class_from_workers(impl: Any) -> None:
    """`socketserver.ThreadingMixIn.process_request_thread(self, r, a)` runs in threads that the program made."""
    requests: queue.Queue[Any] = queue.Queue()

    class Workers(impl.ThreadingMixIn, impl.TCPServer):
        def serve_worker(self) -> None:
            while (pair := requests.get()) is not None:
                impl.ThreadingMixIn.process_request_thread(self, *pair)

        def process_request(self, request: Any, client_address: Any) -> None:
            requests.put((request, client_address))

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            threads = [run(self.serve_worker) for _ in range(3)]
            super().serve_forever(poll_interval)
            for _ in threads:
                requests.put(None)
            for thread in threads:
                join(thread)

    with serving(Workers(LOCAL, echo_handler(impl))) as server:
        for _ in range(4):
            assert ask(server.server_address) == b"hello\n"


@pytest.mark.parametrize("pool", ["executor", "threadpool"])
def test_process_request_on_a_pool_of_the_programs(impl: Any, pool: str) -> None:
    """`process_request` hands on to a ThreadPoolExecutor or ThreadPool that calls `finish_request` and closes."""
    failed = []

    class Pool(impl.TCPServer):
        def work(self, request: Any, client_address: Any) -> None:
            try:
                self.finish_request(request, client_address)
            except Exception:
                failed.append(client_address)
                self.handle_error(request, client_address)
            self.close_request(request)

        def process_request(self, request: Any, client_address: Any) -> None:
            submit(self.work, request, client_address)

    if pool == "executor":
        executor = ThreadPoolExecutor(3)
        submit, end = executor.submit, executor.shutdown
    else:
        threads = ThreadPool(3)

        def submit(function: Any, *args: Any) -> Any:
            return threads.apply_async(function, args)

        def end() -> None:
            threads.terminate()
            threads.join()

    with serving(Pool(LOCAL, echo_handler(impl))) as server:
        for _ in range(5):
            assert ask(server.server_address) == b"hello\n"
    end()
    assert not failed


def test_process_request_without_shutdown_leaves_the_connection_open(impl: Any) -> None:
    """pynetdicom: `process_request` that only finishes leaves the connection to a thread of the program's."""
    kept: queue.Queue[Any] = queue.Queue()

    class Associate(impl.TCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            self.finish_request(request, client_address)

    class Keep(impl.BaseRequestHandler):
        def handle(self) -> None:
            kept.put(self.request)

    with serving(Associate(LOCAL, Keep)) as server, connect(server.server_address) as client:
        request = kept.get(timeout=PATIENCE)
        server.shutdown()
        request.sendall(b"still here")
        assert client.recv(100) == b"still here"
        request.close()


def test_process_request_that_closes_the_surplus(impl: Any) -> None:
    """A BoundedSemaphore in `process_request` closes what is too many; released in `process_request_thread`."""
    slots = threading.BoundedSemaphore(1)
    gate = threading.Event()

    class Bounded(impl.ThreadingTCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            if not slots.acquire(blocking=False):
                request.sendall(b"busy")
                self.shutdown_request(request)
                return
            super().process_request(request, client_address)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                slots.release()

    class Slow(impl.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"first")
            gate.wait(PATIENCE)

    with serving(Bounded(LOCAL, Slow)) as server:
        with connect(server.server_address) as first:
            assert first.recv(100) == b"first"
            assert ask(server.server_address, b"") == b"busy"
            gate.set()
            assert read_all(first) == b""
        wait_until(lambda: slots.acquire(blocking=False))
        slots.release()
        assert ask(server.server_address, b"") == b"first"


# --- process_request_thread -------------------------------------------------------------------------------------------


def test_process_request_thread_overridden(impl: Any) -> None:
    """An override that finishes and closes by itself (Django), and keeps a list, is the thread's body."""
    live: list[Any] = []

    class Listing(impl.ThreadingTCPServer):
        daemon_threads = True

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            live.append(threading.current_thread())
            self.finish_request(request, client_address)
            self.shutdown_request(request)

    with serving(Listing(LOCAL, echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"
    assert len(live) == 1
    assert live[0] is not threading.main_thread()
    assert live[0].daemon


# --- finish, shutdown, close ------------------------------------------------------------------------------------------


def test_shutdown_request_emptied_keeps_the_connection(impl: Any) -> None:
    """With `shutdown_request` emptied the connection outlives its handler."""
    kept = []

    class Keeping(impl.ThreadingTCPServer):
        def shutdown_request(self, request: Any) -> None:
            kept.append(request)

    with serving(Keeping(LOCAL, echo_handler(impl))) as server, connect(server.server_address) as client:
        client.sendall(b"one\n")
        assert client.recv(100) == b"one\n"
        wait_until(lambda: kept)
        kept[0].sendall(b"later\n")
        assert client.recv(100) == b"later\n"
        kept[0].close()


def test_close_request_extended(impl: Any) -> None:
    """An extended `close_request` (Django closes its database there) runs in the handler's thread."""
    closers, handlers = [], []

    class Closing(impl.ThreadingTCPServer):
        def finish_request(self, request: Any, client_address: Any) -> None:
            handlers.append(threading.get_ident())
            request.settimeout(5)
            super().finish_request(request, client_address)

        def close_request(self, request: Any) -> None:
            closers.append(threading.get_ident())
            super().close_request(request)

    with serving(Closing(LOCAL, echo_handler(impl))) as server:
        assert ask(server.server_address) == b"hello\n"
    assert closers == handlers


# --- handle_error -----------------------------------------------------------------------------------------------------


def test_handle_error_replaced_on_the_base_for_everybody(impl: Any) -> None:
    """`BaseServer.handle_error = …` silences every server."""
    seen = []

    def quiet(self: Any, request: Any, client_address: Any) -> None:
        seen.append(sys.exc_info()[0])

    errors = io.StringIO()
    with mock.patch.object(impl.BaseServer, "handle_error", quiet), contextlib.redirect_stderr(errors):
        for name in ("TCPServer", "ThreadingTCPServer"):
            with serving(getattr(impl, name)(LOCAL, recording_handler(impl, [], BrokenPipeError))) as server:
                assert ask(server.server_address, b"") == b""
    assert seen == [BrokenPipeError, BrokenPipeError]
    assert errors.getvalue() == ""
