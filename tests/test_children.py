"""Connections that are served in children, of which several loops may hear at once."""

import os
import socket
import threading
from types import SimpleNamespace

from waiting import wait_until

import harken
from harken.children import _Child
from harken.tally import Tally

PATIENCE = 10.0  # seconds
BESIDE = 0.3  # seconds for another thread to do what it must not, which it would at once


def beside(work):
    """Let another thread do ``work`` while this one is where it is; it may have to wait for us."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(BESIDE)
    return thread


class Filed(dict):
    """A registry's records, of which one is collected by another loop as soon as it is taken out."""

    def __init__(self, records, collect):
        super().__init__(records)
        self.collect, self.thread = collect, None

    def pop(self, key, *default):
        """Take it out; the first time, while another loop collects."""
        found = super().pop(key, *default)
        if self.thread is None and found is not None:
            self.thread = beside(self.collect)
        return found


def test_an_end_is_told_though_another_loop_learns_of_it_first(monkeypatch):
    """It may have exited before its connection was handed over."""

    class Nothing(harken.BaseRequestHandler):
        """Ends at once."""

    with harken.background(harken.ForkingTCPServer(("127.0.0.1", 0), Nothing)) as server:
        serving = server._harken
        engine = serving.engine
        spawn = engine.spawn

        def spawn_one_that_ends(*args, **keywords):
            pid = spawn(*args, **keywords)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return pid

        monkeypatch.setattr(engine, "spawn", spawn_one_that_ends)
        filed = serving.connections.filed = Filed(serving.connections.filed, engine.collect)
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(1) == b""
        assert serving.connections.wait_for(lambda: not filed, PATIENCE)
        filed.thread.join(PATIENCE)
        assert server.stats()["closed_total"] == {"handler_returned": 1}


def test_one_loop_at_a_time_hears_of_a_child():
    """By its report and by its end: the report's descriptor is closed once, since it may be another's then."""
    serving = SimpleNamespace(
        bounds=SimpleNamespace(deadlines=None),
        entry=object(),
        books=SimpleNamespace(meter=None, failed_elsewhere=lambda _times: None),
        connections=SimpleNamespace(hand_over=lambda *_: None, child_ended=lambda *_: None),
        engine=SimpleNamespace(spawn=lambda *_, done: 1, watch=lambda *_: None, unwatch=lambda _: None),
    )
    child = _Child(serving, Tally(), SimpleNamespace(held=False, moved=None, requests=None, started=0.0))
    child.start(lambda: 0)
    hear, heard = child._report.hear, []

    def hear_slowly():
        heard.append(threading.get_ident())
        if len(heard) == 1:
            other.append(beside(lambda: child._ended(0)))
        hear()

    other = []
    child._report.hear = hear_slowly
    child._told()
    other[0].join(PATIENCE)
    assert heard == [threading.get_ident()]
    assert not child._report.open


class Fail(harken.BaseRequestHandler):
    """Raises once it is asked to."""

    def handle(self):
        """Of a connection or a datagram."""
        if not isinstance(self.request, tuple):
            self.request.recv(100)
        raise ValueError("a handler's own fault")


def test_what_handlers_raise_in_children_is_counted(capfd):
    """Of connections and of datagrams, beside how long they took."""
    with harken.background(harken.ForkingTCPServer(("127.0.0.1", 0), Fail)) as server:
        server._harken.books.measure()
        for _ in range(2):
            with socket.create_connection(server.server_address, PATIENCE) as client:
                client.sendall(b"1")
                client.recv(1)
        wait_until(lambda: server.stats()["closed_total"] == {"handler_failed": 2})
        assert figures(server) == (2, 2)
    with harken.background(harken.ForkingUDPServer(("127.0.0.1", 0), Fail)) as server:
        server._harken.books.measure()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"1", server.server_address)
            wait_until(lambda: server.stats()["accepted_total"] == 1 and not server._harken.engine.children)
        wait_until(lambda: figures(server) == (1, 1))
    assert capfd.readouterr().err.count("\nValueError: a handler's own fault") == 3


def figures(server):
    """How often its handlers raised, and how many of them have ended."""
    return server.stats()["handler_failed_total"], sum(server._harken.books.meter.handler.counts)


class Leave(harken.BaseRequestHandler):
    """Answers, and ends its thread, were it in one."""

    def handle(self):
        """Ends by SystemExit."""
        self.request.sendall(self.request.recv(100))
        raise SystemExit(3)


def test_a_handler_that_leaves_by_exit_has_returned_and_its_bytes_count():
    """As in a thread: SystemExit ends the connection alone, and is nobody's failure."""
    with harken.background(harken.ForkingTCPServer(("127.0.0.1", 0), Leave)) as server:
        server._harken.books.measure()
        with socket.create_connection(server.server_address, PATIENCE) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            assert client.recv(100) == b""
        wait_until(lambda: server.stats()["closed_total"] == {"handler_returned": 1})
        meter = server._harken.books.meter
        assert (meter.received, meter.sent) == (5, 5)


def test_a_child_tells_how_long_preamble_and_handler_took():
    """Each for itself, and nothing of a handler whose preamble failed; of one that was killed its parent tells."""
    server = harken.ForkingTCPServer(("127.0.0.1", 0), Leave, proxy="v1", proxy_from="127.0.0.1")
    with harken.background(server):
        server._harken.books.measure()
        for header in (b"PROXY TCP4 192.0.2.1 192.0.2.2 7 9\r\n", b"no header at all\r\n"):
            with socket.create_connection(server.server_address, PATIENCE) as client:
                client.sendall(header + b"hello")
                assert client.recv(100) in (b"hello", b"")
        wait_until(lambda: server.stats()["closed_total"] == {"handler_returned": 1, "preamble_failed": 1})
        meter = server._harken.books.meter
        assert (sum(meter.preamble.counts), sum(meter.handler.counts)) == (1, 1)
        with socket.create_connection(server.server_address, PATIENCE) as client:
            client.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 7 9\r\n")
            wait_until(lambda: [each.peer.address for each in server.connections()] == ["192.0.2.1"])
            server.close_connection(server.connections()[0].id)
            wait_until(lambda: sum(meter.handler.counts) == 2)


def test_a_child_that_cannot_begin_says_why(monkeypatch, capfd):
    """No thread can be started for its deadlines: that is reported and counted, as where its handler would run."""

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    server = harken.ForkingTCPServer(("127.0.0.1", 0), harken.BaseRequestHandler, idle_timeout=60)
    with harken.background(server):
        monkeypatch.setattr(server._harken.bounds.deadlines, "after_fork", refuse)
        with socket.create_connection(server.server_address, PATIENCE) as client:
            assert client.recv(1) == b""
        assert server._harken.connections.wait_for(lambda: not server.connections(), PATIENCE)
        stats = server.stats()
    assert (stats["handler_failed_total"], stats["closed_total"]) == (1, {"handler_failed": 1})
    assert "can't start new thread" in capfd.readouterr().err
