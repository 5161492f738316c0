"""The running side of a server: made when needed, and what it answers to engines and observers."""

import asyncio
import errno
import socket
import socketserver
import threading

import pytest

import harken
from harken import drain, events, testing
from harken.drain import DrainReport
from harken.engines import Engine
from harken.engines.inline import Engine as Inline
from harken.errors import ConfigError
from harken.lifecycle import State
from harken.peer import Peer
from harken.records import ConnectionInfo
from harken.serving import Serving, serving_of

LOCAL = ("127.0.0.1", 0)
PATIENCE = 10.0  # seconds


class Greet(harken.BaseRequestHandler):
    """Greets and waits for the client to go."""

    def handle(self):
        self.request.sendall(b"hi")
        self.request.recv(1)


class Strange(Inline):
    """An engine from outside harken."""


def test_it_is_made_once_and_kept():
    """However often it is asked for, from any number of threads."""
    server = harken.TCPServer.__new__(harken.TCPServer)
    found = []
    start = threading.Barrier(8)

    def ask():
        start.wait(PATIENCE)
        found.append(serving_of(server))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(found) == 8
    assert len({id(made) for made in found}) == 1
    assert server._harken is found[0]


def test_two_servers_have_two():
    """Nothing is shared by class."""
    first, second = (harken.TCPServer.__new__(harken.TCPServer) for _ in range(2))
    assert serving_of(first) is not serving_of(second)
    assert serving_of(first).engine is not serving_of(second).engine


def test_it_is_made_for_any_object_with_a_dict():
    """A stdlib server, a stand-in of a test."""
    server = socketserver.TCPServer.__new__(socketserver.TCPServer)
    assert isinstance(serving_of(server), Serving)
    assert serving_of(server).engine_name == "inline"


def test_an_engine_of_ones_own_is_named_by_its_path():
    """``engine="my.module:MyEngine"``; an engine is given its options, not the server."""
    path = f"{Inline.__module__}:{Inline.__name__}"
    with harken.TCPServer(LOCAL, Greet, engine=path) as server:
        assert type(serving_of(server).engine) is Inline
        assert isinstance(serving_of(server).engine, Engine)
        assert server.stats()["engine"] == path
        with harken.background(server), socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(2) == b"hi"
            client.shutdown(socket.SHUT_WR)


def test_an_engine_that_cannot_be_loaded_says_so_when_it_serves():
    """One line with the path and the reason."""
    with (
        harken.TCPServer(LOCAL, Greet, engine="no_such_module:Engine") as server,
        pytest.raises(ConfigError, match="cannot load 'no_such_module:Engine' for engines: No module named"),
    ):
        server.serve_forever()


def test_a_server_that_could_not_begin_to_serve_can_be_closed():
    """From any thread: what failed before the loop leaves no loop to wait for, and no descriptor."""
    server = harken.TCPServer(LOCAL, Greet, engine="no_such_module:Engine")
    with pytest.raises(ConfigError):
        server.serve_forever()
    for verb in (server.shutdown, server.server_close):
        thread = threading.Thread(target=verb, daemon=True)
        thread.start()
        thread.join(2.0)
        assert not thread.is_alive(), f"{verb.__name__}() did not return"


def test_options_answer_late():
    """Settings and stdlib's attributes as they are at the moment."""
    with harken.ThreadingTCPServer(LOCAL, Greet) as server:
        option = serving_of(server).option
        assert (option("daemon_threads"), option("block_on_close")) == (False, True)
        server.daemon_threads, server.block_on_close = True, False
        assert (option("daemon_threads"), option("block_on_close")) == (True, False)
        assert option("pool_size") == 32
        server.configure(pool_size=3)
        assert option("pool_size") == 3
        assert option("selector") is harken._ServerSelector


def test_a_server_without_stdlibs_attributes_has_their_defaults():
    """A plain server with an engine by keyword."""
    with harken.TCPServer(LOCAL, Greet) as server:
        option = serving_of(server).option
        assert (option("daemon_threads"), option("block_on_close")) == (False, True)


@pytest.mark.parametrize(
    "kind, address, shown",
    [
        ("TCPServer", ("127.0.0.1", 0), "tcp://127.0.0.1:{}"),
        ("TCPServer", ("", 0), "tcp://0.0.0.0:{}"),
        ("UDPServer", ("127.0.0.1", 0), "udp://127.0.0.1:{}"),
    ],
)
def test_the_address_is_named_as_one_would_type_it(kind, address, shown):
    """With the real port."""
    with getattr(harken, kind)(address, Greet) as server:
        assert serving_of(server).address() == shown.format(server.server_address[1])


def test_the_address_of_a_unix_server_is_its_path(tmp_path):
    """Bytes and text paths alike."""
    with harken.UnixStreamServer(str(tmp_path / "s"), Greet) as server:
        assert serving_of(server).address() == f"unix:{tmp_path}/s"


class Gone:
    """A closed socket that says so whatever it is asked, as gevent's do."""

    def __getattr__(self, name):
        raise OSError(errno.EBADF, "Bad file descriptor")


def test_it_knows_its_address_when_its_socket_says_nothing_any_more():
    """Also where the socket raises instead."""
    with harken.TCPServer(LOCAL, Greet) as server:
        before = serving_of(server).address()
        listener, server.socket = server.socket, Gone()
        assert server.stats()["address"] == before
        server.socket = listener


def test_the_address_of_what_is_no_socket():
    """A closed server, a server with no socket at all: nothing raises."""
    server = harken.TCPServer(LOCAL, Greet)
    server.server_close()
    assert isinstance(server.stats()["address"], str)
    bare = harken.BaseServer("somewhere", Greet)
    assert bare.stats()["address"] == "somewhere"
    assert harken.BaseServer.__new__(harken.BaseServer).stats()["address"] == "?"


def test_the_state_follows_the_verbs():
    """new, serving, suspended, serving, stopped, draining, closed."""
    server = harken.ThreadingTCPServer(LOCAL, Greet)
    side, states = serving_of(server), []

    def note():
        states.append(side.lifecycle.state)

    note()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    assert server.wait_ready(PATIENCE)
    note()
    server.suspend()
    note()
    server.resume()
    note()
    server.shutdown()
    thread.join(PATIENCE)
    note()
    server.drain(0)
    note()
    server.server_close()
    note()
    assert states == [
        State.NEW,
        State.SERVING,
        State.SUSPENDED,
        State.SERVING,
        State.STOPPED,
        State.DRAINING,
        State.CLOSED,
    ]


def test_a_server_that_serves_again_may_be_suspended_again():
    """Suspended, stopped, served: it accepts."""
    with harken.TCPServer(LOCAL, Greet) as server:
        for _ in range(2):
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            assert server.wait_ready(PATIENCE)
            with socket.create_connection(server.server_address, PATIENCE) as client:
                assert client.recv(2) == b"hi"
            server.suspend()
            server.shutdown()
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_ready_ends_with_the_loop():
    """wait_ready() speaks of now."""
    with harken.TCPServer(LOCAL, Greet) as server:
        assert server.wait_ready(0) is False
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert server.wait_ready(PATIENCE) is True
        server.shutdown()
        thread.join(PATIENCE)
        assert server.wait_ready(0) is False


def test_a_peer_is_described_without_a_connection():
    """Of a datagram, by the server's own socket."""
    with harken.UDPServer(LOCAL, Greet) as server:
        assert serving_of(server).books.describe(None, ("1.2.3.4", 5)) == Peer("1.2.3.4", 5, socket.AF_INET)


def test_a_datagrams_peer_reads_like_a_connections():
    """In its handler and in events: ``127.0.0.1:5000``."""
    shown = []

    class Show(harken.BaseRequestHandler):
        def handle(self):
            shown.append(str(self.peer))

    end = events.subscribe(lambda event: shown.append(str(event.peer)), "accepted")
    try:
        with harken.UDPServer(LOCAL, Show) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
            client.sendto(b"x", server.server_address)
            server.handle_request()
            host, port = "127.0.0.1", client.getsockname()[1]
    finally:
        end()
    assert shown == [f"{host}:{port}"] * 2


def test_events_carry_the_server():
    """An observer of several servers tells them apart."""
    seen = []
    end = events.subscribe(seen.append)
    try:
        with harken.background(harken.ThreadingTCPServer(LOCAL, Greet)) as server:
            with socket.create_connection(server.server_address, PATIENCE) as client:
                assert client.recv(2) == b"hi"
            while server.connections():
                threading.Event().wait(0.001)
    finally:
        end()
    assert [event.name for event in seen] == ["listening", "accepted", "opened", "closed", "draining", "drained"]
    assert {event.server for event in seen} == {server}


def test_a_drain_report_reads_as_a_sentence():
    """Its text is what the log shows."""
    info = ConnectionInfo("id", Peer("1.2.3.4", 5, socket.AF_INET), 0.0, 1.0, None, 1)
    text = str(DrainReport(finished=3, left=1, cut=2, seconds=0.5, connections=[info, info]))
    for word in ("3 finished", "1 left", "2 cut", "0.50 s"):
        assert word in text


def test_the_drain_timeout_of_the_settings_is_used():
    """drain() without a number; configure() changes it."""
    with harken.background(harken.ThreadingTCPServer(LOCAL, Greet, drain_timeout=30)) as server:
        server.configure(drain_timeout=0.02)
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(2) == b"hi"
            report = server.drain()
            assert (report.cut, report.finished) == (1, 0)
            assert 0.02 <= report.seconds < PATIENCE


def test_a_server_and_its_running_side_are_collected():
    """Servers that tests make and close by the thousand do not stay."""
    import gc
    import weakref

    server = harken.ThreadingTCPServer(LOCAL, Greet)
    with harken.background(server), socket.create_connection(server.server_address, PATIENCE) as client:
        assert client.recv(2) == b"hi"
    gone = weakref.ref(server)
    del server
    gc.collect()
    assert gone() is None


def test_cut_grace_is_short():
    """A stop at once takes no longer than people wait."""
    assert 0 < drain.CUT_GRACE <= 2.0


@pytest.mark.parametrize("setting", [{"workers": 4}, {"user": "nobody"}, {"umask": 0o77}, {"pidfile": "pid"}])
def test_what_only_serve_heeds_is_told_elsewhere(setting):
    """A server that was told whose it is to be goes on as root, and its author would not know."""
    said = "is heeded by harken.serve\\(\\) and `harken serve` alone, not by "
    with pytest.warns(RuntimeWarning, match=said + "a server class") as told:
        harken.TCPServer(LOCAL, Greet, **setting).server_close()
    with pytest.warns(RuntimeWarning, match=said + r"harken\.start\(\)"):
        asyncio.run(start_and_close(setting))
    with pytest.warns(RuntimeWarning, match=said + r"testing\.serve\(\)"), testing.serve(Greet, **setting):
        pass
    assert told[0].filename == __file__


async def start_and_close(setting):
    """Start a server in a loop, and close it."""
    await (await harken.start(Greet, "tcp://127.0.0.1:0", **setting)).close()


def test_defaults_of_what_only_serve_heeds_may_be_given():
    """Those of the drop-in classes and those of serve."""
    for setting in ({"workers": 0}, {"workers": 1}, {"user": None}, {"control": "by name"}, {"worker_timeout": 30}):
        harken.TCPServer(LOCAL, Greet, **setting).server_close()
