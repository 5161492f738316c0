"""The mix-ins, in front of harken's servers and of stdlib's own."""

import http.client
import http.server
import os
import socket
import socketserver
import threading
import time
import xmlrpc.client
import xmlrpc.server

import pytest

import harken
from harken.server import BaseServer

LOCAL = ("127.0.0.1", 0)
PATIENCE = 10.0  # seconds
VERBS = ("suspend", "resume", "drain", "wait_ready", "connections", "close_connection", "configure", "stats")
MIXINS = [harken.ThreadingMixIn, harken.PoolMixIn, harken.ForkingMixIn]


class Where(socketserver.BaseRequestHandler):
    """A handler of stdlib's that says where it runs."""

    def handle(self):
        while data := self.request.recv(100):
            self.request.sendall(data.upper() + f" {os.getpid()} {threading.current_thread().name}".encode())


class Page(http.server.BaseHTTPRequestHandler):
    """One page."""

    def do_GET(self):
        body = threading.current_thread().name.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


def ask(server, data=b"hello"):
    """Send, say that this is all, and read to the end."""
    with socket.create_connection(server.server_address[:2], PATIENCE) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while part := client.recv(1000):
            answer += part
        return answer.decode().split(" ", 2)


# ── on stdlib's classes ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mixin", MIXINS, ids=lambda mixin: mixin.__name__)
def test_in_front_of_stdlibs_tcp_server(mixin):
    """It serves where the mix-in says, with harken's verbs, and ends when told."""
    server = type("Grafted", (mixin, socketserver.TCPServer), {})(LOCAL, Where)
    with harken.background(server):
        data, pid, name = ask(server)
        assert data == "HELLO"
        assert (int(pid) == os.getpid()) is (mixin is not harken.ForkingMixIn)
        assert ("process_request_thread" in name) is (mixin is not harken.ForkingMixIn)
        assert server.stats()["accepted_total"] == 1
        assert server.stats()["engine"] == mixin.engine
    assert server.socket.fileno() == -1


@pytest.mark.parametrize("mixin", MIXINS, ids=lambda mixin: mixin.__name__)
def test_every_verb_is_there(mixin):
    """As on harken's own servers."""
    grafted = type("Grafted", (mixin, socketserver.TCPServer), {})
    for verb in VERBS:
        assert callable(getattr(grafted, verb)), verb
    assert isinstance(grafted.__new__(grafted), socketserver.TCPServer)
    assert not issubclass(grafted, BaseServer)


def test_in_front_of_http_server():
    """``class Web(harken.PoolMixIn, http.server.ThreadingHTTPServer)``: requests run in the pool."""

    class Web(harken.PoolMixIn, http.server.ThreadingHTTPServer):
        pass

    with harken.background(Web(LOCAL, Page)) as server:
        server.configure(pool_size=1)
        names = set()
        for _ in range(5):
            client = http.client.HTTPConnection(*server.server_address[:2], timeout=PATIENCE)
            client.request("GET", "/")
            names.add(client.getresponse().read())
            client.close()
        assert len(names) == 1
        assert names.pop().startswith(b"harken-")
        assert server.server_name


def test_in_front_of_xmlrpc():
    """A server with a dispatcher and handlers of its own."""

    class Calls(harken.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
        pass

    server = Calls(LOCAL, logRequests=False)
    server.register_function(pow)
    with harken.background(server), xmlrpc.client.ServerProxy("http://{}:{}".format(*server.server_address)) as proxy:
        assert proxy.pow(2, 5) == 32


def test_in_front_of_stdlibs_udp_server():
    """Datagrams, too."""

    class Echo(socketserver.DatagramRequestHandler):
        def handle(self):
            self.wfile.write(self.rfile.read())

    server = type("Grafted", (harken.PoolMixIn, socketserver.UDPServer), {})(LOCAL, Echo)
    with harken.background(server), socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(bytes(20_000), server.server_address)
        assert len(client.recv(65536)) == 20_000


def test_in_front_of_stdlibs_unix_server(tmp_path):
    """The path is stdlib's business there, the connection harken's."""
    path = str(tmp_path / "s")
    server = type("Grafted", (harken.ThreadingMixIn, socketserver.UnixStreamServer), {})(path, Where)
    with harken.background(server), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(path)
        client.sendall(b"hello")
        assert client.recv(100).startswith(b"HELLO")
        assert len(server.connections()) == 1


@pytest.mark.parametrize("where", ["the class itself", "a parent", "a mix-in of the user's"])
def test_what_the_user_overrides_wins(where):
    """get_request, handle_error and serve_forever of the user's are not grafted over."""

    class Own:
        def get_request(self):
            self.seen.append("get_request")
            return super().get_request()

        def handle_error(self, request, client_address):
            self.seen.append("handle_error")

        def serve_forever(self, poll_interval=0.05):
            self.seen.append("serve_forever")
            super().serve_forever(poll_interval)

        def stats(self):
            return "the user's"

    class Itself(harken.ThreadingMixIn, socketserver.TCPServer):
        handle_error = Own.handle_error
        stats = Own.stats

        def get_request(self):
            self.seen.append("get_request")
            return super().get_request()

        def serve_forever(self, poll_interval=0.05):
            self.seen.append("serve_forever")
            super().serve_forever(poll_interval)

    parent = type("Parent", (Own, socketserver.TCPServer), {})
    cls = {
        "the class itself": Itself,
        "a parent": type("Server", (harken.ThreadingMixIn, parent), {}),
        "a mix-in of the user's": type("Server", (Own, harken.ThreadingMixIn, socketserver.TCPServer), {}),
    }[where]

    class Failing(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(100)  # what stays unread turns the close into a reset
            raise ZeroDivisionError

    server = cls(LOCAL, Failing)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    ask(server)
    server.shutdown()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    server.server_close()
    assert server.seen == ["serve_forever", "get_request", "handle_error"]
    assert server.stats() == "the user's"


def test_a_subclass_of_a_grafted_class_may_override():
    """What comes later in the user's own hierarchy wins over the graft."""
    grafted = type("Grafted", (harken.ThreadingMixIn, socketserver.TCPServer), {})

    class Later(grafted):
        def close_request(self, request):
            closed.append(request)
            super().close_request(request)

    closed = []
    with harken.background(Later(LOCAL, Where)) as server:
        ask(server)
    assert len(closed) == 1


def test_stdlibs_own_classes_are_left_as_they_are():
    """The graft is on the new class alone."""
    type("Grafted", (harken.ThreadingMixIn, socketserver.TCPServer), {})
    for cls in (socketserver.BaseServer, socketserver.TCPServer, socketserver.UDPServer):
        assert all(getattr(value, "__module__", cls.__module__) != "harken.server" for value in vars(cls).values())
        assert not any(hasattr(cls, verb) for verb in VERBS)


def test_server_close_alone_ends_a_grafted_server():
    """Called from another thread, with no shutdown() before: the loop ends and the port is free, as on harken's own."""
    server = type("Grafted", (harken.ThreadingMixIn, socketserver.TCPServer), {})(LOCAL, Where)
    errors = []

    def serve():
        try:
            server.serve_forever()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert server.wait_ready(PATIENCE)
    server.server_close()
    thread.join(2.0)
    try:
        assert not thread.is_alive()
        assert errors == []
        with socket.create_server(server.server_address):
            pass
    finally:
        server.shutdown()
        thread.join(PATIENCE)


def test_shutdown_waits_for_a_loop_that_the_user_wrapped():
    """serve_forever() of the user's calls super(): shutdown() still returns after it has ended, and ends it at once."""

    class Wrapped(harken.ThreadingMixIn, socketserver.TCPServer):
        ended = False

        def serve_forever(self, poll_interval=0.3):
            super().serve_forever(poll_interval)
            self.ended = True

    with Wrapped(LOCAL, Where) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        ask(server)
        server.shutdown()
        thread.join(0.1)
        try:
            assert server.ended
        finally:
            thread.join(PATIENCE)


def test_shutdown_of_a_grafted_server_before_serving():
    """Its Event is stdlib's, and must not be waited for."""
    with type("Grafted", (harken.ThreadingMixIn, socketserver.TCPServer), {})(LOCAL, Where) as server:
        for target in (server.shutdown, server.serve_forever):
            thread = threading.Thread(target=target, daemon=True)
            thread.start()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_shutdown_of_a_grafted_server_from_its_handler():
    """In a thread of its own, as ThreadingMixIn allows."""

    class Stopping(socketserver.BaseRequestHandler):
        def handle(self):
            self.server.shutdown()
            while self.request.recv(100):  # unread input would turn the close into a reset
                pass
            self.request.sendall(b"stopped")

    server = type("Grafted", (harken.ThreadingMixIn, socketserver.TCPServer), {})(LOCAL, Stopping)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    assert ask(server) == ["stopped"]
    thread.join(PATIENCE)
    assert not thread.is_alive()
    server.server_close()


# ── on harken's ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_attributes_are_stdlibs():
    """Names and defaults of the namesakes."""
    for name in ("ThreadingMixIn", "ForkingMixIn"):
        theirs, ours = getattr(socketserver, name), getattr(harken, name)
        public = {key for key, value in vars(theirs).items() if not key.startswith("_")}
        for key in public:
            assert hasattr(ours, key), f"{name}.{key}"
            if not callable(getattr(theirs, key)):
                assert getattr(ours, key) == getattr(theirs, key), f"{name}.{key}"


def test_a_mixin_overrides_what_stdlibs_overrides_and_no_more():
    """So that it can stand in front of any class."""
    for name in ("ThreadingMixIn", "ForkingMixIn"):
        theirs = {key for key, value in vars(getattr(socketserver, name)).items() if callable(value)}
        ours = {key for key, value in vars(getattr(harken, name)).items() if callable(value)}
        assert ours - theirs <= {"__init_subclass__", "_harken"}
        assert theirs - ours <= {"_threads"}


def test_threads_are_recorded_and_waited_for():
    """``server._threads`` holds who runs, and server_close() waits for them."""
    seen = []

    class Slow(harken.BaseRequestHandler):
        def handle(self):
            seen.append(threading.current_thread() in self.server._threads)
            self.request.recv(1)
            seen.append("done")

    server = harken.ThreadingTCPServer(LOCAL, Slow)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with socket.create_connection(server.server_address, PATIENCE) as client:
        while not seen:
            time.sleep(0.001)
        server.shutdown()
        thread.join(PATIENCE)
        timer = threading.Timer(0.05, client.shutdown, (socket.SHUT_WR,))
        timer.start()
        server.server_close()
        timer.join()
    assert seen == [True, "done"]


@pytest.mark.parametrize("attribute", ["daemon_threads", "block_on_close"])
def test_server_close_does_not_wait_when_told_not_to(attribute):
    """``daemon_threads = True`` or ``block_on_close = False``, on the instance."""
    begun = threading.Event()

    class Slow(harken.BaseRequestHandler):
        def handle(self):
            begun.set()
            self.request.recv(1)

    server = harken.ThreadingTCPServer(LOCAL, Slow)
    setattr(server, attribute, attribute == "daemon_threads")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with socket.create_connection(server.server_address, PATIENCE):
        assert begun.wait(PATIENCE)
        server.shutdown()
        began = time.monotonic()
        server.server_close()
        assert time.monotonic() - began < PATIENCE / 2
    thread.join(PATIENCE)


def test_children_are_listed_and_waited_for():
    """``active_children`` is None, then a set of pids; server_close() waits for them."""
    server = harken.ForkingTCPServer(LOCAL, Where)
    assert server.active_children is None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with socket.create_connection(server.server_address, PATIENCE) as client:
        client.sendall(b"x")
        pid = int(client.recv(100).split()[1])
        end = time.monotonic() + PATIENCE
        while server.active_children != {pid}:  # the child may be quicker than its parent's books
            assert time.monotonic() < end
        server.shutdown()
        thread.join(PATIENCE)
        timer = threading.Timer(0.05, client.shutdown, (socket.SHUT_WR,))
        timer.start()
        server.server_close()
        timer.join()
    assert server.active_children == set()
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_a_forked_child_holds_no_listener():
    """The port is free as soon as the parent has closed it, while the child still works."""

    class Listening(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(str(self.server.socket.fileno()).encode())
            self.request.recv(1)

    server = harken.ForkingTCPServer(LOCAL, Listening)
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with socket.create_connection(server.server_address, PATIENCE) as client:
        assert client.recv(10) == b"-1"
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.server_address, PATIENCE)
        client.shutdown(socket.SHUT_WR)
        server.collect_children(blocking=True)


def test_the_environment_moves_threading_servers_alone(monkeypatch):
    """``HARKEN_ENGINE`` is for ThreadingMixIn; a plain server's handler may rely on being alone."""
    monkeypatch.setenv("HARKEN_ENGINE", "pool")
    engines = {}
    for name in ("TCPServer", "ThreadingTCPServer", "PoolTCPServer", "ForkingTCPServer"):
        with getattr(harken, name)(LOCAL, Where) as server:
            engines[name] = server.stats()["engine"]
    assert engines == {
        "TCPServer": "inline",
        "ThreadingTCPServer": "pool",
        "PoolTCPServer": "pool",
        "ForkingTCPServer": "fork",
    }


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "fork"])
def test_a_threading_server_works_on_any_engine(engine, monkeypatch):
    """Moved by the environment, with the mix-in's own hooks around it."""
    monkeypatch.setenv("HARKEN_ENGINE", engine)
    with harken.background(harken.ThreadingTCPServer(LOCAL, Where)) as server:
        data, pid, _ = ask(server)
        assert data == "HELLO"
        assert (int(pid) != os.getpid()) is (engine == "fork")


def test_a_mixin_on_what_is_no_server():
    """ThreadingMixIn needs finish_request, shutdown_request and handle_error only."""
    done = []

    class Worker(harken.ThreadingMixIn):
        def finish_request(self, request, client_address):
            done.append((request, client_address, threading.current_thread() is not threading.main_thread()))

        def shutdown_request(self, request):
            done.append("shut")

        def handle_error(self, request, client_address):
            done.append("error")

    worker = Worker()
    worker.process_request("request", "address")
    for thread in list(worker._threads):
        thread.join(PATIENCE)
    assert done == [("request", "address", True), "shut"]
