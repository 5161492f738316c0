"""Draining while much is open: the idle leave, the busy finish, who will not end is cut, and nobody is reset."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
import time

import pytest
import trustme
from waiting import wait_until

import harken
from harken import green
from harken.testing._clients import opening

from .kit import LOCAL, PATIENCE, connect, ends, running, seeing

ENGINES = ["inline", "thread", "pool", "fork", "green", "asyncio"]
CONCURRENT = ENGINES[1:]
# Of a test machine's processes; 250 children at once would be a test of the machine.
CROWD = {"fork": (40, 10)}


class Work(harken.BaseRequestHandler):
    """Echoes; ``work`` takes a while, ``hang`` for ever, and the server's drain is announced."""

    def handle(self):
        while data := self.request.recv(100):
            if data == b"hang":
                while not self.server.let_go:
                    green.sleep(0.05)
            if data == b"work":
                until = time.monotonic() + PATIENCE
                while not self.draining and time.monotonic() < until:
                    green.sleep(0.01)
                green.sleep(1.0)
                data = b"done"
            with contextlib.suppress(ConnectionError):
                self.request.sendall(data)


class Async(harken.AsyncRequestHandler):
    """The same as a coroutine, but for ``hang``."""

    async def handle(self):
        while data := await self.request.recv(100):
            if data == b"work":
                self.drains = asyncio.Event()
                await asyncio.wait_for(self.drains.wait(), PATIENCE)
                data = b"done"
            with contextlib.suppress(ConnectionError):
                await self.request.sendall(data)

    def on_drain(self):
        if hasattr(self, "drains"):
            self.drains.set()


class Polite(Work):
    """Says goodbye."""

    def on_drain(self):
        self.request.sendall(b"bye")


def made(engine, handler=Work, family="TCP", address=LOCAL, **settings):
    """Return a server with room for everybody."""
    settings = {"pool_size": 300, "max_children": 300, **settings}
    kind = harken.UnixStreamServer if family == "Unix" else harken.TCPServer
    server = kind(address, handler, engine=engine, **settings)
    server.daemon_threads = True  # a handler that does not end must not keep server_close()
    server.let_go = False
    return server


class Draining:
    """A drain under way in a thread."""

    def __init__(self, server, timeout=PATIENCE):
        self.reports = []
        self.began = time.monotonic()
        self.thread = threading.Thread(target=lambda: self.reports.append(server.drain(timeout)), daemon=True)
        self.thread.start()

    def report(self):
        self.thread.join(2 * PATIENCE)
        assert self.reports, "drain() did not return"
        return self.reports[0]


def rest(client):
    """Read to the end."""
    data = b""
    while part := client.recv(1000):
        data += part
    return data


@pytest.mark.parametrize("engine", CONCURRENT)
def test_idle_connections_leave_first(engine):
    """200 idle and 50 busy: the idle ones go, the busy ones finish, and each gets its answer."""
    idle_count, busy_count = CROWD.get(engine, (200, 50))
    with contextlib.ExitStack() as stack, running(made(engine)) as server, seeing("closed", "drained") as seen:
        idle = [stack.enter_context(connect(server.server_address)) for _ in range(idle_count)]
        busy = [stack.enter_context(connect(server.server_address)) for _ in range(busy_count)]
        for client in idle:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        for client in busy:
            client.sendall(b"work")
        drain = Draining(server)
        for client in idle:
            assert rest(client) == b""
        left_after = time.monotonic() - drain.began
        for client in busy:
            assert rest(client) == b"done"
        finished_after = time.monotonic() - drain.began
        report = drain.report()
    assert (report.finished, report.left, report.cut) == (busy_count, idle_count, 0)
    assert [event.running for event in seen.of("drained")] == [0]
    assert left_after < finished_after
    assert report.seconds < PATIENCE
    wait_until(lambda: len(seen.of("closed")) == idle_count + busy_count)
    assert [event.reason for event in seen.of("closed")].count("drained") == idle_count


def test_an_inline_server_finishes_its_one_client_and_those_that_wait():
    """The loop goes on until the backlog is empty; one after the other, in the loop's own thread."""
    threads = set()

    class Noting(Work):
        def handle(self):
            threads.add(threading.get_ident())
            super().handle()

    with running(made("inline", Noting)) as server, contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(connect(server.server_address)) for _ in range(4)]
        first.sendall(b"work")
        for client in others:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
        drain = Draining(server)
        assert rest(first) == b"done"
        assert [rest(client) for client in others] == [b"hello"] * 3
        report = drain.report()
    assert (report.finished, report.left, report.cut) == (4, 0, 0)
    assert len(threads) == 1


@pytest.mark.parametrize("family", ["TCP", "Unix"])
@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_handler_that_never_returns_is_cut(engine, family, tmp_path):
    """At the deadline, and the drain does not wait for it much longer."""
    address = LOCAL if family == "TCP" else str(tmp_path / "s")
    with running(made(engine, family=family, address=address)) as server, connect(server.server_address) as client:
        client.sendall(b"hang")
        wait_until(server.connections)
        (info,) = server.connections()
        report = Draining(server, 0.3).report()
        assert ends(client) in ("closed", "reset")
        server.let_go = True
    assert (report.finished, report.left, report.cut) == (0, 0, 1)
    assert [(cut.id, cut.reason) for cut in report.connections] == [(info.id, "drain_deadline")]
    assert 0.3 <= report.seconds < PATIENCE / 2


@pytest.mark.parametrize("engine", CONCURRENT)
def test_two_drains_at_once_are_one(engine):
    """The one that is more in a hurry decides; both get the report, and one event of each kind is said."""
    with running(made(engine)) as server, connect(server.server_address) as client, seeing() as seen:
        client.sendall(b"hang")
        wait_until(server.connections)
        patient = Draining(server, 10 * PATIENCE)
        wait_until(lambda: seen.of("draining"))
        hasty = Draining(server, 0.2)
        reports = [patient.report(), hasty.report()]
        server.let_go = True
    assert reports[0] is reports[1]
    assert reports[0].cut == 1
    assert reports[0].seconds < PATIENCE
    assert len(seen.of("draining")) == len(seen.of("drained")) == 1


@pytest.mark.parametrize("engine", CONCURRENT)
def test_clients_under_tls_are_drained(engine):
    """Idle ones get a proper end, busy ones their answer before it, and one in its handshake leaves with nothing."""
    contexts = tls_contexts()
    with (
        contextlib.ExitStack() as stack,
        running(made(engine, Async if engine == "asyncio" else Work, tls=contexts[0])) as server,
    ):
        idle, busy = ([stack.enter_context(secured(server, contexts[1])) for _ in range(4)] for _ in range(2))
        silent = stack.enter_context(connect(server.server_address))
        for client in idle:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        for client in busy:
            client.sendall(b"work")
        drain = Draining(server)
        assert [rest(client) for client in idle] == [b""] * 4  # close_notify: without it this raises
        assert [rest(client) for client in busy] == [b"done"] * 4
        assert ends(silent) in ("closed", "reset")
        report = drain.report()
    assert report.cut == 0
    assert report.left + report.finished >= 8
    assert report.seconds < PATIENCE


def tls_contexts():
    """Make a certificate; return the server's context and the clients'."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


@contextlib.contextmanager
def secured(server, context):
    """Give a client under TLS, to whom an end without close_notify is an error."""
    with opening() as ours:
        plain = connect(server.server_address)
        client = context.wrap_socket(
            plain, server_hostname="localhost", suppress_ragged_eofs=False, do_handshake_on_connect=False
        )
        ours.add(client)
    with client:
        client.do_handshake()
        yield client


@pytest.mark.parametrize("family", ["TCP", "Unix"])
@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_drain_during_a_storm_resets_nobody(engine, family, tmp_path):
    """Every client that was let in is served; the others are refused, and none is cut off in between."""
    address = LOCAL if family == "TCP" else str(tmp_path / "s")
    fates = []
    over = threading.Event()

    def storm():
        while not over.is_set():
            try:
                with connect(server.server_address) as client:
                    client.settimeout(PATIENCE)
                    try:
                        client.sendall(b"x")
                        fates.append(client.recv(10) == b"x")
                    except OSError as error:
                        fates.append(error)
            except (ConnectionRefusedError, FileNotFoundError):
                return

    with running(made(engine, family=family, address=address)) as server:
        clients = [threading.Thread(target=storm, daemon=True) for _ in range(8)]
        for client in clients:
            client.start()
        wait_until(lambda: len(fates) > 50)
        report = Draining(server).report()
        over.set()
        for client in clients:
            client.join(PATIENCE)
        assert not any(client.is_alive() for client in clients)
    assert [fate for fate in fates if fate is not True] == []
    assert report.cut == 0


@pytest.mark.parametrize("engine", CONCURRENT)
def test_a_goodbye_is_sent_to_everybody(engine):
    """``on_drain()`` runs beside the handler, before an idle connection is asked to leave."""
    with running(made(engine, Polite)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.server_address)) for _ in range(5)]
        for client in clients:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        drain = Draining(server)
        assert [rest(client) for client in clients] == [b"bye"] * 5
        report = drain.report()
    assert (report.left, report.cut) == (5, 0)


@pytest.mark.parametrize("engine", ["thread", "pool", "green"])
def test_a_goodbye_that_fails_is_reported_and_ends_nothing(engine, capfd):
    """As a handler's failure: an event, and what ``handle_error`` prints."""

    class Rude(Work):
        def on_drain(self):
            raise ValueError("no manners")

    with running(made(engine, Rude)) as server, connect(server.server_address) as client, seeing() as seen:
        client.sendall(b"work")
        wait_until(server.connections)
        drain = Draining(server)
        assert rest(client) == b"done"
        report = drain.report()
        printed: list[str] = []
        # It is said beside the handler, which may be quicker.
        wait_until(lambda: printed.append(capfd.readouterr().err) or "no manners" in "".join(printed))
    assert (report.finished, report.cut) == (1, 0)
    assert [str(event.error) for event in seen.of("handler_failed")] == ["no manners"]


def test_who_waits_for_a_thread_is_told_once_it_has_one():
    """Its handler begins in the drain, and says goodbye as those that were there before."""
    with (
        running(made("pool", Polite, pool_size=1)) as server,
        connect(server.server_address) as busy,
        connect(server.server_address) as late,
    ):
        busy.sendall(b"work")
        late.sendall(b"hello")
        wait_until(lambda: len(server.connections()) == 2)
        drain = Draining(server)
        assert sorted(rest(busy)) == sorted(b"byedone")
        assert rest(late) in (b"hellobye", b"byehello")
        report = drain.report()
    assert report.cut == 0


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_a_goodbye_that_blocks_keeps_nobody(engine):
    """The peer of one does not read: the others leave, and at the deadline it is cut."""

    class Long(Work):
        def on_drain(self):
            self.request.sendall(b"bye" if self.request.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) else b"")
            if self.server.first == self.connection_id:
                self.request.sendall(bytes(30_000_000))

    with running(made(engine, Long)) as server, contextlib.ExitStack() as stack:
        clients = []
        for _ in range(3):
            clients.append(stack.enter_context(connect(server.server_address)))
            clients[-1].sendall(b"hello")
            assert clients[-1].recv(100) == b"hello"
        wait_until(lambda: all(info.waits_for == "reading" for info in server.connections()))  # or it is at work
        server.first = server.connections()[0].id
        drain = Draining(server, 3.0)
        assert [rest(client) for client in clients[1:]] == [b"bye"] * 2
        report = drain.report()
    assert (report.left, report.cut) == (2, 1)


def test_goodbyes_are_spread():
    """``drain_jitter``: each at a moment of its own, and not all at once."""
    with running(made("thread", drain_jitter=2.0)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.server_address)) for _ in range(20)]
        for client in clients:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        with seeing("closed") as seen:
            report = Draining(server).report()
            moments = sorted(event.time for event in seen.of("closed"))
    assert report.left == 20
    assert moments[-1] - moments[0] > 0.5  # of two seconds: twenty draws as near as that would be strange
    assert report.seconds < PATIENCE


@pytest.mark.parametrize("engine", CONCURRENT)
def test_nothing_is_lost_when_a_connection_is_cut(engine):
    """What the handler has sent arrives whole although the client sent what nobody read."""
    size = 300_000

    class Sending(harken.BaseRequestHandler):
        def handle(self):
            self.request.recv(1)
            self.request.sendall(bytes(size))
            until = time.monotonic() + 2 * PATIENCE
            while not self.draining and time.monotonic() < until:
                green.sleep(0.01)

    with running(made(engine, Sending)) as server, connect(server.server_address) as client:
        client.sendall(b"x" * 5000)
        wait_until(server.connections)
        Draining(server, PATIENCE).report()
        assert len(rest(client)) == size


@pytest.mark.parametrize("engine", ["thread", "pool", "green", "inline"])
def test_a_handler_that_drains_does_not_wait_for_itself(engine):
    """Its own connection is neither waited for nor cut; it reports to its client."""

    class Draining(harken.BaseRequestHandler):
        def handle(self):
            self.request.recv(1)
            report = self.server.drain(PATIENCE)
            self.request.sendall(f"{report.seconds:.1f} {report.cut}".encode())

    with running(made(engine, Draining)) as server, connect(server.server_address) as client:
        client.sendall(b"x")
        seconds, cut = client.recv(100).split()
    assert float(seconds) < PATIENCE / 2
    assert cut == b"0"


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_who_drains_from_outside_spares_no_handler_that_drains_too(engine):
    """It has its report, and goes on reading: what waits for its end (server_close) would wait for its client."""
    asked = threading.Event()

    class Draining(harken.BaseRequestHandler):
        def handle(self):
            if self.request.recv(1) == b"x":
                asked.set()
                self.server.drain(PATIENCE)
            self.request.recv(1)

    with running(made(engine, Draining)) as server:
        with connect(server.server_address) as other, connect(server.server_address) as client:
            other.sendall(b"o")  # keeps the handler's drain under way
            wait_until(lambda: len(server.connections()) == 2)
            client.sendall(b"x")
            assert asked.wait(PATIENCE)
            report = server.drain(0.1)
            assert report.cut == 2
            assert server.connections() == []


def test_a_drain_in_a_green_handler_waits_for_no_thread_that_it_keeps(monkeypatch):
    """The hub's, in which the handler runs."""
    awaited = []
    monkeypatch.setattr("harken.engines.green.Engine._await_thread", lambda engine, seconds: awaited.append(seconds))

    class Draining(harken.BaseRequestHandler):
        def handle(self):
            self.request.recv(1)
            self.server.drain(PATIENCE)
            self.request.sendall(f"{len(awaited)}".encode())

    with running(made("green", Draining)) as server, connect(server.server_address) as client:
        client.sendall(b"x")
        assert client.recv(10) == b"0"


def test_two_handlers_that_drain_do_not_wait_for_each_other():
    """Both are told of the one drain."""
    together = threading.Barrier(2)

    class Draining(harken.BaseRequestHandler):
        def handle(self):
            self.request.recv(1)
            together.wait(PATIENCE)
            report = self.server.drain(PATIENCE)
            self.request.sendall(f"{report.seconds:.1f}".encode())

    with running(made("thread", Draining)) as server:
        with connect(server.server_address) as first, connect(server.server_address) as second:
            first.sendall(b"x")
            second.sendall(b"x")
            assert float(first.recv(100)) < PATIENCE / 2
            assert float(second.recv(100)) < PATIENCE / 2


def test_who_waits_in_the_backlog_of_a_suspended_server_is_served():
    """A drain ends a suspension for those that wait."""
    with running(made("thread")) as server:
        server.suspend()
        with connect(server.server_address) as client:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            report = Draining(server).report()
            assert rest(client) == b"hello"
    assert (report.finished, report.cut) == (1, 0)


def test_who_waits_for_a_full_pool_is_served():
    """Those inside are idle and leave, so that those outside come in."""
    with running(made("pool", pool_size=1, pool_queue=0)) as server:
        with connect(server.server_address) as inside, connect(server.server_address) as outside:
            inside.sendall(b"hello")
            assert inside.recv(100) == b"hello"
            outside.sendall(b"hello")
            outside.shutdown(socket.SHUT_WR)
            report = Draining(server).report()
            assert rest(inside) == b""
            assert rest(outside) == b"hello"
    # Whether the one inside was still on its way to its next read is not told.
    assert (report.finished + report.left, report.cut) == (2, 0)


def test_a_shared_listener_is_not_filtered():
    """A child that was forked since the bind may hold it: it must go on to accept."""
    server = made("thread")
    parent, child = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        child.recv(1)
        try:
            client, _ = server.socket.accept()
            client.sendall(b"child")
            os._exit(0)
        finally:
            os._exit(1)
    try:
        with running(server):
            Draining(server, 1.0).report()
        parent.sendall(b"x")
        with connect(server.server_address) as client:
            assert client.recv(100) == b"child"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        parent.close()
        child.close()


def test_a_lazy_handler_that_was_never_started_leaves():
    """Its connection has no green thread yet; it is idle after its first second."""

    class Lazy(Work):
        lazy = True

    with running(made("green", Lazy)) as server, connect(server.server_address) as client:
        wait_until(server.connections)
        report = Draining(server).report()
        assert rest(client) == b""
    assert (report.left, report.cut) == (1, 0)
    assert report.seconds > 0.5
