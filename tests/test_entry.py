"""What stands between acceptance and handler: preambles on every engine, and no way around them."""

import contextlib
import select
import socket
import sys
import threading
import time
import types

import pytest

import harken
from harken import events, preambles
from harken.errors import ConfigError, LifecycleError, PreambleError

LOCAL = ("127.0.0.1", 0)
PATIENCE = 10.0
ENGINES = ("inline", "thread", "pool", "fork", "green")


class Greeting:
    """A preamble: the client says ``HELLO NAME`` first."""

    tells_client = False

    def __call__(self, connection, deadline):
        line = b""
        while not line.endswith(b"\n"):
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            byte = connection.recv(1)
            if not byte:
                raise PreambleError("the peer left without a greeting")
            line += byte
        connection.settimeout(None)
        if not line.startswith(b"HELLO "):
            raise PreambleError(f"{line!r} is no greeting")
        connection.record.certificate = {"subject": line[6:-1].decode()}
        return self.result(connection)

    def result(self, connection):
        return connection


class Echo(harken.BaseRequestHandler):
    """Sends back what it gets, behind the peer's name."""

    def handle(self):
        name = self.peer.certificate["subject"].encode()
        while data := self.request.recv(100):
            self.request.sendall(name + b":" + data)


@pytest.fixture
def wanted(monkeypatch):
    """Return a function that makes every server want one preamble."""

    def want(preamble, timeout=PATIENCE):
        module = types.ModuleType("a.preamble")
        module.make = lambda values, listener: preamble
        monkeypatch.setitem(sys.modules, "a.preamble", module)
        monkeypatch.setattr(preambles, "PREAMBLES", {"a.preamble": ("preamble_timeout",)})
        monkeypatch.setattr(preambles, "armed", False)
        return timeout

    return want


@pytest.fixture
def closed():
    """The ``closed`` events of the test, and a way to wait for them."""
    seen = []
    came = threading.Condition()

    def note(event):
        with came:
            seen.append(event)
            came.notify_all()

    def wait(count):
        with came:
            assert came.wait_for(lambda: len(seen) >= count, PATIENCE), f"{len(seen)} of {count} were closed"
        return seen

    unsubscribe = events.subscribe(note, "closed")
    yield wait
    unsubscribe()


@contextlib.contextmanager
def dial(server):
    """Give a client; at the end it is shut, since a forked child has a copy of it that nobody closes."""
    with socket.create_connection(server.server_address[:2], PATIENCE) as client:
        yield client
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def serving(engine, handler=Echo, kind=harken.TCPServer, **settings):
    return harken.background(kind(LOCAL, handler, engine=engine, **settings))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_preamble_comes_first_and_the_handler_has_the_rest(engine, wanted):
    """What follows the preamble in the same segment is the handler's, and so is what the preamble learned."""
    wanted(Greeting())
    with serving(engine) as server, dial(server) as client:
        client.sendall(b"HELLO ann\nand more")
        assert client.recv(100) == b"ann:and more"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_preamble_is_one_closed_event(engine, wanted, closed, capfd):
    """With the peer, the reason and what was wrong; nothing is printed, and the next client is served."""
    wanted(Greeting())
    with serving(engine) as server:
        with dial(server) as client:
            client.sendall(b"GOODBYE\n")
            assert client.recv(100) == b""
            address = client.getsockname()
        with dial(server) as client:
            client.sendall(b"HELLO bob\nx")
            assert client.recv(100) == b"bob:x"
        first, second = sorted(closed(2), key=lambda event: event.reason != "preamble_failed")
        assert (first.reason, first.detail) == ("preamble_failed", "b'GOODBYE\\n' is no greeting")
        assert (first.peer.address, first.peer.port) == address
        assert second.reason != "preamble_failed"
        assert server.stats()["closed_total"]["preamble_failed"] == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_silent_peer_is_closed_when_the_time_is_over(engine, wanted, closed):
    """``preamble_timeout`` bounds all preambles together, and meanwhile others are served wherever they can be."""
    wanted(Greeting())
    with serving(engine, preamble_timeout=1.0) as server, dial(server) as silent:
        silent.sendall(b"HEL")
        began = time.monotonic()
        if engine != "inline":
            with dial(server) as client:
                client.sendall(b"HELLO bob\nx")
                assert client.recv(100) == b"bob:x"
            assert not select.select([silent], [], [], 0)[0]
        assert silent.recv(1) == b""
        assert 0.9 < time.monotonic() - began < PATIENCE / 2
        events = closed(1 if engine == "inline" else 2)
        (failed,) = [event for event in events if event.reason == "preamble_failed"]
        assert failed.detail == "the peer was not ready within 1 s (preamble_timeout)"


@pytest.mark.parametrize("engine", ["thread", "pool", "fork", "green"])
def test_a_connection_in_its_preamble_can_be_cut(engine, wanted, closed):
    """It is in ``connections()``, and its reason is that of who cut it."""
    wanted(Greeting())
    with serving(engine) as server, dial(server) as silent:
        deadline = time.monotonic() + PATIENCE
        while not server.connections() and time.monotonic() < deadline:
            time.sleep(0.005)
        (info,) = server.connections()
        assert server.close_connection(info.id)
        assert silent.recv(1) == b""
        assert closed(1)[0].reason == "killed"


class Moved(Greeting):
    """A preamble that makes another object of the connection, before it reads."""

    def __init__(self):
        self.made = []

    def __call__(self, connection, deadline):
        record = connection.record
        other = type(connection)(connection.family, connection.type, connection.proto, connection.detach())
        record.move(other)
        self.made.append(other)
        try:
            return super().__call__(other, deadline)
        except PreambleError as error:
            error.connection = other
            raise


@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "green"])
def test_a_preamble_may_replace_the_connection(engine, wanted, closed):
    """The record moves: the books are balanced whether it fails or not, and the new object is closed."""
    preamble = Moved()
    wanted(preamble)
    with serving(engine) as server:
        for line, answer in ((b"HELLO ann\nx", b"ann:x"), (b"NO\n", b"")):
            with dial(server) as client:
                client.sendall(line)
                assert client.recv(100) == answer
        assert {event.reason for event in closed(2)} >= {"preamble_failed"}
        assert server.connections() == []
    assert [made.fileno() for made in preamble.made] == [-1, -1]


class Around(harken.TCPServer):
    """A hook that goes around harken's own."""

    def process_request(self, request, client_address):
        self.finish_request(request, client_address)
        self.shutdown_request(request)

    def handle_error(self, request, client_address):
        self.error = sys.exc_info()[1]


class FurtherAround(Around):
    """Two of them."""

    def finish_request(self, request, client_address):
        self.RequestHandlerClass(request, client_address, self)


@pytest.mark.parametrize("kind", [Around, FurtherAround])
def test_a_hook_that_goes_around_the_preambles_is_refused(kind, wanted):
    """No handler sees a connection whose preambles have not run, and the message names the server class."""
    wanted(Greeting())
    handled = []

    class Handler(harken.BaseRequestHandler):
        def handle(self):
            handled.append(self.request)

    with serving("inline", Handler, kind) as server, dial(server) as client:
        client.sendall(b"HELLO ann\nx")
        assert client.recv(100) == b""
        assert isinstance(server.error, LifecycleError)
        assert kind.__name__ in str(server.error)
    assert handled == []


class OwnThread(harken.ThreadingMixIn, harken.TCPServer):
    """Has its own way to ``finish_request``."""

    daemon_threads = True

    def process_request_thread(self, request, client_address):
        self.finish_request(request, client_address)
        self.shutdown_request(request)


class OwnPool(harken.TCPServer):
    """Starts its own threads, as people do."""

    def process_request(self, request, client_address):
        threading.Thread(target=self.process_request_thread, args=(request, client_address)).start()


@pytest.mark.parametrize("kind", [OwnThread, OwnPool])
def test_common_overrides_keep_their_preambles(kind, wanted):
    """A hook that leads to harken's own, before or behind, is served as ever."""
    wanted(Greeting())
    with harken.background(kind(LOCAL, Echo)) as server, dial(server) as client:
        client.sendall(b"HELLO ann\nx")
        assert client.recv(100) == b"ann:x"


class Speaker(Greeting):
    """A preamble that learns for whom the peer speaks."""

    tells_client = True

    def result(self, connection):
        name = connection.record.certificate["subject"]
        client = {"ann": ("192.0.2.1", 7), "mallory": ("192.0.2.66", 7)}[name]
        connection.record.spoken_for = client
        connection.record.proxy = harken.ProxyHeader(client, ("192.0.2.2", 80))
        return connection


class Judge(harken.TCPServer):
    """Refuses one client by its address."""

    def verify_request(self, request, client_address):
        return client_address[0] != "192.0.2.66"


class Tell(harken.BaseRequestHandler):
    """Tells what it knows of the client."""

    def handle(self):
        self.request.sendall(f"{self.client_address} {self.peer} {self.peer.proxy.destination[1]}".encode())


@pytest.mark.parametrize("engine", ENGINES)
def test_whoever_judges_the_client_waits_for_its_address(engine, wanted, closed):
    """``verify_request`` and the handler get the address that a preamble learned, and so does ``peer``."""
    wanted(Speaker())
    with serving(engine, Tell, Judge) as server:
        with dial(server) as client:
            client.sendall(b"HELLO ann\n")
            assert client.recv(100) == b"('192.0.2.1', 7) 192.0.2.1:7 80"
        with dial(server) as client:
            client.sendall(b"HELLO mallory\n")
            assert client.recv(100) == b""
        assert "rejected" in {event.reason for event in closed(2)}


class Broken(Greeting):
    """A preamble with a fault of its own."""

    def result(self, connection):
        raise ZeroDivisionError("ours")


def test_a_fault_of_the_preamble_is_reported_as_a_handlers(wanted, capfd):
    """It is nobody's peer that failed: ``handle_error`` shows the traceback, and the connection is closed."""
    wanted(Broken())
    with serving("thread") as server, dial(server) as client:
        client.sendall(b"HELLO ann\n")
        assert client.recv(1) == b""
        deadline = time.monotonic() + PATIENCE
        while not server.stats()["closed_total"] and time.monotonic() < deadline:
            time.sleep(0.005)
        assert server.stats()["handler_failed_total"] == 1
    assert "ZeroDivisionError: ours" in capfd.readouterr().err


class Pair(harken.TCPServer):
    """Gives its handlers something that is no socket."""

    def get_request(self):
        request, address = super().get_request()
        return (request, "and more"), address

    def shutdown_request(self, request):
        request[0].close()

    def handle_error(self, request, client_address):
        self.error = sys.exc_info()[1]


def test_what_is_no_socket_cannot_pass(wanted):
    """A program whose ``get_request`` returns something else is told, and its client is not served unprotected."""
    wanted(Greeting())
    with serving("inline", Tell, Pair) as server, dial(server) as client:
        assert client.recv(1) == b""
        assert isinstance(server.error, ConfigError)


class Speaking(Greeting):
    """A preamble that learns the client's address, as a PROXY header tells it: ``HELLO 192.0.2.7``."""

    tells_client = True

    def result(self, connection):
        record = connection.record
        record.spoken_for = (record.certificate["subject"], 4242)
        return connection


def greet(server, name):
    """Say who one is; return what the server says to a word, or how it refuses."""
    try:
        with dial(server) as client:
            client.sendall(b"HELLO %s\nx" % name)
            return client.recv(100)
    except ConnectionError:  # it may come as early as in connect()
        return "reset"


@pytest.mark.parametrize("engine", ENGINES)
def test_limits_by_address_judge_the_client_that_a_preamble_tells(engine, wanted, closed):
    """The proxy's own address does not matter; the client's is judged, and refused with a reason."""
    wanted(Speaking())
    with serving(engine, deny=["127.0.0.0/8", "192.0.2.66"]) as server:
        assert greet(server, b"192.0.2.7") == b"192.0.2.7:x"
        assert greet(server, b"192.0.2.66") == "reset"
        assert max(event.reason for event in closed(2)) == "rejected"
        assert server.stats()["rejected_by_reason"] == {"deny": 1}


@pytest.mark.parametrize("engine", ["thread", "pool", "green"])
def test_a_share_is_counted_by_the_client_that_a_preamble_tells(engine, wanted):
    """Many clients come by one proxy; each has its own share, and gives it back."""
    wanted(Speaking())
    with serving(engine, max_connections_per_peer=1) as server:
        with dial(server) as first:
            first.sendall(b"HELLO 192.0.2.7\nx")
            assert first.recv(100) == b"192.0.2.7:x"
            assert greet(server, b"192.0.2.8") == b"192.0.2.8:x"
            assert greet(server, b"192.0.2.7") == "reset"
        while server.connections():
            pass
        assert greet(server, b"192.0.2.7") == b"192.0.2.7:x"


def test_a_share_behind_a_proxy_cannot_be_counted_in_children(wanted):
    """The fork engine says so at the start instead of letting everybody in."""
    wanted(Speaking())
    with harken.TCPServer(LOCAL, Echo, engine="fork", max_connections_per_peer=1) as server:
        with pytest.raises(ConfigError, match="max_connections_per_peer"):
            server.serve_forever()


def test_connections_in_their_preamble_count(wanted):
    """A silent one takes a place."""
    wanted(Greeting())
    with serving("thread", max_connections=1, overload="reset") as server, dial(server):
        while not server.connections():
            pass
        assert greet(server, b"ann") == "reset"
