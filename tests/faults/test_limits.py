"""Limits on every engine: they hold, each policy does what it says, and every place is given back."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from waiting import wait_until

import harken
from harken.closing import Closing
from harken.errors import ConfigError
from harken.serving import serving_of

from .kit import LOCAL, PATIENCE, Echo, Seen, connect, ends, exchange, fate, is_silent, receive, running, seeing

ENGINES = ("thread", "pool", "green", "fork", "asyncio", "asyncio-threads")


class AsyncEcho(harken.AsyncRequestHandler):
    """Sends back what it reads, as a coroutine."""

    async def handle(self) -> None:
        """Echo to the end."""
        while data := await self.request.recv(65536):
            await self.request.sendall(data)


def make(engine: str, handler: Any = Echo, **settings: Any) -> Any:
    """Make a server. The engine asyncio has coroutines for handlers, or plain ones in threads."""
    handler = AsyncEcho if engine == "asyncio" and handler is Echo else handler
    return harken.TCPServer(LOCAL, handler, engine=engine.partition("-")[0], **settings)


@contextlib.contextmanager
def full(engine: str, **settings: Any) -> Iterator[tuple[Any, Seen, socket.socket, socket.socket]]:
    """Give a server with its two places taken: server, events, and the two clients, the first idle for longer."""
    server = make(engine, max_connections=2, **settings)
    with seeing("opened", "closed", "paused", "resumed", "rejected") as seen, running(server):
        with connect(server.server_address) as first:
            exchange(first)
            time.sleep(0.05)  # the kernel counts idle time in ticks of up to 10 ms
            with connect(server.server_address) as second:
                exchange(second)
                yield server, seen, first, second
                hang_up(second)
            hang_up(first)


def hang_up(client: socket.socket) -> None:
    """End a connection although forked children hold copies of this test's sockets."""
    with contextlib.suppress(OSError):  # it has ended already
        client.shutdown(socket.SHUT_RDWR)
    client.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_wait_leaves_the_third_in_the_backlog(engine: str) -> None:
    """Nobody is refused, and the third is served as soon as one of two has gone, whatever the loop's interval."""
    with full(engine) as (server, seen, first, _second), connect(server.server_address) as third:
        third.sendall(b"hello")
        assert is_silent(third)
        assert server.stats()["open"] == 2
        assert "max_connections" in seen.wait("paused")[0].reason
        began = time.monotonic()
        hang_up(first)
        assert receive(third, 5) == b"hello"
        assert time.monotonic() - began < PATIENCE / 3
        assert len(seen.wait("resumed")) == 1
        assert seen.of("rejected") == []
        hang_up(third)


@pytest.mark.parametrize("engine", ENGINES)
def test_reset_and_reply_refuse_the_third(engine: str) -> None:
    """At once, with the reason, and the two are served on."""
    with full(engine, overload="reset", overload_reply=b"full\n") as (server, seen, first, second):
        assert fate(server.server_address) == "reset"
        assert seen.wait("rejected")[0].reason == "max_connections"
        server.configure(overload="reply")
        with connect(server.server_address) as third:
            assert receive(third, 100) == b"full\n"
        assert server.stats()["rejected_by_reason"] == {"max_connections": 2}
        assert server.stats()["rejected_total"] == 2
        exchange(first)
        exchange(second)
        hang_up(second)


@pytest.mark.parametrize("engine", ENGINES)
def test_shed_makes_the_longest_idle_leave(engine: str) -> None:
    """The third is served, the one that was idle longest is closed, and at no time more than two are open."""
    with full(engine, overload="shed") as (server, seen, first, second):
        with connect(server.server_address) as third:
            exchange(third)
            assert ends(first) == "closed"
            assert [event.reason for event in seen.wait("closed")] == ["shed"]
            exchange(second)
            hang_up(third)
        hang_up(second)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_limit_changes_on_the_running_server(engine: str) -> None:
    """A higher one lets in who waits; one below what is open lets nobody in, and cuts nobody."""
    with full(engine) as (server, _seen, first, second), connect(server.server_address) as third:
        third.sendall(b"hello")
        assert is_silent(third)
        server.configure(max_connections=3)
        assert receive(third, 5) == b"hello"
        server.configure(max_connections=1)
        for client in (first, second, third):
            exchange(client)
        with connect(server.server_address) as fourth:
            fourth.sendall(b"hello")
            for client in (first, second):
                hang_up(client)
                assert is_silent(fourth, 0.1)
            hang_up(third)
            assert receive(fourth, 5) == b"hello"
            hang_up(fourth)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", ["suspend", "drain"])
def test_a_full_servers_door_is_left_alone(engine: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a suspension, or when a drain begins, too: who waits there would wake the loop without end."""
    with full(engine) as (server, seen, first, _second), connect(server.server_address) as third:
        third.sendall(b"hello")
        seen.wait("paused")
        serving, watched = serving_of(server), []
        plain = serving.engine.watch
        monkeypatch.setattr(serving.engine, "watch", lambda *args: (watched.append(args), plain(*args)))
        if way == "suspend":
            server.suspend()
            server.resume()
        else:
            Closing(serving).shut_out()
        assert watched == []
        hang_up(first)
        assert receive(third, 5) == b"hello"
        hang_up(third)


@pytest.mark.parametrize("engine", ENGINES)
def test_another_policy_holds_for_who_waits_already(engine: str) -> None:
    """Nobody has to leave before it does."""
    with full(engine) as (server, seen, _first, _second), connect(server.server_address) as third:
        seen.wait("paused")
        server.configure(overload="reply", overload_reply=b"full\n")
        assert receive(third, 100) == b"full\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_limit_that_is_set_late_counts_who_is_inside(engine: str) -> None:
    """A server that had none gets one while connections are open; when they go each gives its place back."""
    server = make(engine)
    with running(server), connect(server.server_address) as first:
        exchange(first)
        assert serving_of(server).bounds.admission is None
        server.configure(max_connections=1, overload="reset", max_connections_per_peer=1)
        assert fate(server.server_address) == "reset"
        hang_up(first)
        wait_until(lambda: not server.connections())
        with connect(server.server_address) as second:
            exchange(second)
            hang_up(second)


@pytest.mark.parametrize("engine", ["inline", *ENGINES])
def test_addresses_are_judged(engine: str) -> None:
    """``deny`` wins over ``allow``; both reset, and can be changed while the server runs."""
    server = make(engine, allow=["127.0.0.0/8"], deny=["127.0.0.2"])
    with seeing("rejected", "opened") as seen, running(server):
        with connect(server.server_address) as client:
            exchange(client)
            hang_up(client)
        assert fate_from("127.0.0.2", server.server_address) == "reset"
        assert seen.wait("rejected")[0].reason == "deny"
        server.configure(deny=None, allow=["192.0.2.0/24"])
        assert fate(server.server_address) == "reset"
        assert [event.reason for event in seen.wait("rejected", 2)] == ["deny", "allow"]
        with pytest.raises(ConfigError, match="allow"):
            server.configure(allow=["nonsense"])


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_list_of_who_may_come_in_lets_nobody_in(engine: str) -> None:
    """Alone too: a program may have computed it, and nobody was in it."""
    server = make(engine, allow=[])
    with running(server):
        assert fate(server.server_address) == "reset"
        server.configure(allow=None)
        with connect(server.server_address) as client:
            exchange(client)
            hang_up(client)
        server.configure(allow=[])
        assert fate(server.server_address) == "reset"


@pytest.mark.parametrize("engine", ENGINES)
def test_each_client_has_its_own_share(engine: str) -> None:
    """A client with its share is reset, whatever ``overload`` says; another one is served."""
    server = make(engine, max_connections_per_peer=2, overload="wait")
    with running(server), connect(server.server_address) as first, connect(server.server_address) as second:
        exchange(first)
        exchange(second)
        assert fate(server.server_address) == "reset"
        with connect_from("127.0.0.9", server.server_address) as other:
            exchange(other)
            hang_up(other)
        hang_up(first)
        wait_until(lambda: len(server.connections()) == 1)
        with connect(server.server_address) as third:
            exchange(third)
            hang_up(third)
        hang_up(second)
        assert server.stats()["rejected_by_reason"] == {"max_connections_per_peer": 1}


@pytest.mark.parametrize("engine", ["inline", *ENGINES])
def test_more_than_the_rate_are_reset(engine: str) -> None:
    """Of a burst the first second's worth is served, the rest is reset at once, and later ones are served again."""
    server = make(engine, Hello, max_accept_rate=5)
    with running(server):
        began = time.monotonic()
        fates = [outcome(server.server_address) for _ in range(20)]
        assert 5 <= fates.count(b"hi") <= 5 + 5 * (time.monotonic() - began) + 1  # a bucket of one second, and refills
        assert fates.count("reset") == 20 - fates.count(b"hi")
        server.configure(max_accept_rate=None)
        assert outcome(server.server_address) == b"hi"


def test_denied_datagrams_are_dropped() -> None:
    """A datagram has no place to give back; the limits by address and by second hold for it."""
    server = harken.UDPServer(LOCAL, Answer, deny=["127.0.0.2"], max_connections=1)
    with seeing("rejected") as seen, running(server):
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bad,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as good,
        ):
            bad.bind(("127.0.0.2", 0))
            for client in (bad, good):
                client.settimeout(PATIENCE)
            bad.sendto(b"a", server.server_address)
            for _ in range(3):
                good.sendto(b"b", server.server_address)
                assert good.recv(10) == b"b"
            assert is_silent(bad, 0.0)
        assert seen.of("rejected")[0].reason == "deny"


@pytest.mark.parametrize("policy", ["wait", "shed"])
@pytest.mark.parametrize("engine", ["inline", "thread", "pool", "green", "fork"])
def test_datagrams_need_no_place(engine: str, policy: str) -> None:
    """Connections that have them all, on another listener of the same service, neither keep them out nor have to go."""
    server = make("thread", max_connections=1, overload=policy)
    beside = harken.UDPServer(LOCAL, Answer, engine=engine, max_connections=1, overload=policy)
    serving_of(beside).bounds.share(serving_of(server).bounds)
    with running(server), connect(server.server_address) as client:
        exchange(client)
        with running(beside), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(PATIENCE)
            for _ in range(3):
                asking.sendto(b"a", beside.server_address)
                assert asking.recv(10) == b"a"
        exchange(client)
        hang_up(client)


def test_one_datagram_at_a_time_needs_no_place() -> None:
    """``handle_request`` does not wait for a connection to leave."""
    server = make("thread", max_connections=1)
    beside = harken.UDPServer(LOCAL, Answer)
    beside.timeout = PATIENCE
    serving_of(beside).bounds.share(serving_of(server).bounds)
    with running(server), connect(server.server_address) as client, beside:
        exchange(client)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(PATIENCE)
            asking.sendto(b"a", beside.server_address)
            beside.handle_request()
            assert asking.recv(10) == b"a"
        hang_up(client)


def test_limits_of_ones_own_are_asked() -> None:
    """Any object with the two methods; each admission is released once, also when a later limit refuses."""
    quota = Quota()
    server = make("thread", limits=[quota], max_connections=2, overload="reset")
    with running(server):
        with connect(server.server_address) as first, connect(server.server_address) as second:
            exchange(first)
            exchange(second)
            assert fate(server.server_address) == "reset"
            assert (quota.admitted, quota.released) == (3, 1)
            quota.closed = "closing time"
            assert fate(server.server_address) == "reset"
            assert server.stats()["rejected_by_reason"] == {"max_connections": 1, "closing time": 1}
        wait_until(lambda: quota.released == 3)
    assert (quota.admitted, quota.released) == (3, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_who_is_being_judged_is_not_counted_by_a_change_of_settings(engine: str) -> None:
    """It gets its place by the judgement, and has no second one that nobody gives back."""
    judging, go_on = threading.Event(), threading.Event()

    class Slow(Quota):
        def admit(self, peer: Any) -> str | None:
            judging.set()
            assert go_on.wait(PATIENCE)
            return super().admit(peer)

    server = make(engine, limits=[Slow()], max_connections=2)
    with running(server):
        with connect(server.server_address) as client:
            assert judging.wait(PATIENCE)
            server.configure(idle_timeout=100)
            go_on.set()
            exchange(client)
            hang_up(client)
        wait_until(lambda: not server.connections())
        wait_until(lambda: serving_of(server).bounds.admission.crowd.inside == 0)


@pytest.mark.parametrize("engine", ["inline", *ENGINES])
def test_a_limit_that_raises_refuses_that_connection_alone(engine: str, capfd: pytest.CaptureFixture[str]) -> None:
    """It says so, and no place is lost, of its client neither."""
    quota = Quota()
    server = make(engine, limits=[quota], max_connections=10, max_connections_per_peer=1)
    with running(server):
        quota.fault = ConnectionError("no quota today")
        for _ in range(3):
            assert fate(server.server_address) == "reset"
        quota.fault = None
        with connect(server.server_address) as client:
            exchange(client)
            quota.fault = ConnectionError("no release today")
            hang_up(client)
        admission = serving_of(server).bounds.admission
        wait_until(lambda: not server.connections() and admission.crowd.inside == 0)
        assert server.stats()["rejected_by_reason"] == {"limit_failed": 3}
        assert admission._per_peer.clients == 0
    told = capfd.readouterr().err
    assert told.count("admit() of the limit Quota raised") == 3
    assert told.count("release() of the limit Quota raised") == 1
    assert "no quota today" in told


def test_what_is_no_limit_is_refused() -> None:
    """At construction, by name."""
    with pytest.raises(ConfigError, match="limits"):
        make("thread", limits=[object()])
    with pytest.raises(ConfigError, match="limits"):
        make("thread", limits="nonsense")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_alarm_rings_once(engine: str) -> None:
    """When so many are open, and not for each one beyond."""
    server = make(engine, alarm_connections=2)
    with seeing("alarm") as seen, running(server), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.server_address)) for _ in range(4)]
        for client in clients:
            exchange(client)
        assert [event.open for event in seen.of("alarm")] == [2]
        for client in clients:
            hang_up(client)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("way", ["returns", "raises", "closes", "verify_false", "verify_raises", "dropped"])
def test_every_way_out_gives_the_place_back(engine: str, way: str) -> None:
    """Thirty connections through one place, however each of them ends."""
    server = make_odd(engine, way)
    with running(server):
        for _ in range(30):
            with connect(server.server_address) as client:
                ends(client)
        wait_until(lambda: serving_of(server).bounds.admission.crowd.inside == 0)
        assert server.stats()["rejected_by_reason"].keys() <= {"verify_request"}


def test_a_killed_child_gives_its_place_back() -> None:
    """A child that dies by SIGKILL can say nothing; its parent sees it."""
    server = make("fork", Stubborn, max_connections=1)
    with running(server):
        with connect(server.server_address) as first:
            pid = int(receive(first, 8))
            os.kill(pid, signal.SIGKILL)
            with connect(server.server_address) as second:
                assert int(receive(second, 8)) != pid
                os.kill(server.connections()[0].process, signal.SIGKILL)


def test_handle_request_waits_for_room() -> None:
    """Without a loop too the second connection stays in the backlog; when the time is over nothing was accepted."""
    server = make("thread", max_connections=1)
    server.timeout = 0.2
    with server, connect(server.server_address) as first, connect(server.server_address) as second:
        server.handle_request()
        exchange(first)
        second.sendall(b"hello")
        server.handle_request()
        assert is_silent(second, 0.0)
        first.close()
        server.timeout = PATIENCE
        server.handle_request()
        assert receive(second, 5) == b"hello"


def test_several_loops_share_one_limit() -> None:
    """Four threads serve one server: never are more open than may be."""
    server = make("thread", max_connections=3)
    most = Most()
    server.RequestHandlerClass = most.handler
    loops = [threading.Thread(target=server.serve_forever, args=(30.0,), daemon=True) for _ in range(3)]
    with running(server):
        for loop in loops:
            loop.start()
        storm(server.server_address, 300)
        wait_until(lambda: not server.connections())
    for loop in loops:
        loop.join(PATIENCE)
    assert most.seen <= 3
    assert most.served == 300


def test_the_listeners_of_a_worker_share_one_limit() -> None:
    """``max_connections`` holds over all addresses of a ``serve``."""
    from harken.process.worker import Worker

    worker = Worker(Echo, ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0"), {"max_connections": 1, "overload": "reset"})
    first, second = (server.serving.bounds.admission for server in worker.servers)
    try:
        assert first is second
    finally:
        worker.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("policy", ["wait", "reset", "reply", "shed"])
@pytest.mark.parametrize("engine", ["thread", "pool", "green", "asyncio"])
def test_the_limit_is_exact_in_a_storm(engine: str, policy: str) -> None:
    """Clients come and go as fast as they can from many addresses: never are more open, and in the end nobody is."""
    storm_against(engine, policy, 20_000 if os.environ.get("HARKEN_SOAK") == "full" else 1500)


def storm_against(engine: str, policy: str, count: int) -> None:
    """Let ``count`` clients come and go."""
    most = Most()
    server = make(
        engine,
        most.coroutine if engine == "asyncio" else most.handler,
        max_connections=20,
        max_connections_per_peer=10,
        overload=policy,
        pool_size=64,
        backlog=1024,
    )
    with running(server):
        ended = storm(server.server_address, count)
        wait_until(lambda: not server.connections())
        admission = serving_of(server).bounds.admission
        assert admission.crowd.inside == 0
        stats = server.stats()
    assert most.seen <= 20
    assert ended == count
    assert stats["accepted_total"] == most.served + stats["rejected_total"]
    if policy == "wait":
        assert set(stats["rejected_by_reason"]) <= {"max_connections_per_peer"}


class Most:
    """Counts how many of its handlers run at once, and makes them last for a moment."""

    def __init__(self) -> None:
        self.now = self.seen = self.served = 0
        lock = threading.Lock()
        most = self

        class Handler(harken.BaseRequestHandler):
            def handle(self) -> None:
                """Be there until the client goes."""
                with lock:
                    most.now += 1
                    most.served += 1
                    most.seen = max(most.seen, most.now)
                try:
                    while data := self.request.recv(100):
                        self.request.sendall(data)
                except OSError:
                    pass  # some clients reset
                finally:
                    with lock:
                        most.now -= 1

        class Coroutine(harken.AsyncRequestHandler):
            async def handle(self) -> None:
                """The same, in the one thread of the loop."""
                most.now += 1
                most.served += 1
                most.seen = max(most.seen, most.now)
                try:
                    while data := await self.request.recv(100):
                        await self.request.sendall(data)
                except OSError:
                    pass
                finally:
                    most.now -= 1

        self.handler = Handler
        self.coroutine = Coroutine


def storm(address: Any, count: int, at_once: int = 100) -> int:
    """Connect ``count`` times from many addresses, ``at_once`` at a time, each saying a word; return how many ended."""
    selector = selectors.DefaultSelector()
    begun = ended = 0
    deadline = time.monotonic() + 200
    while ended < count:
        assert time.monotonic() < deadline, f"{ended} of {count} clients came to an end"
        while begun < count and begun - ended < at_once:
            client = socket.socket()
            client.setblocking(False)
            client.bind((f"127.0.{1 + begun % 5}.{1 + begun % 199}", 0))
            assert client.connect_ex(address) in (0, errno.EINPROGRESS)
            selector.register(client, selectors.EVENT_WRITE, begun)
            begun += 1
        for key, events in selector.select(1):
            client = key.fileobj  # type: ignore[assignment]
            if events & selectors.EVENT_WRITE:
                if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    with contextlib.suppress(OSError):
                        client.send(b"word")
                selector.modify(client, selectors.EVENT_READ, key.data)
                continue
            if key.data % 3 == 0:  # a third leave by a reset
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            selector.unregister(client)
            client.close()
            ended += 1
    selector.close()
    return ended


def connect_from(source: str, address: Any) -> socket.socket:
    """Return a client that comes from ``source``."""
    return socket.create_connection(address, PATIENCE, (source, 0))


def fate_from(source: str, address: Any) -> str:
    """Connect from ``source`` and say how it ends."""
    try:
        client = connect_from(source, address)
    except ConnectionResetError:
        return "reset"
    with client:
        return ends(client)


def outcome(address: Any) -> bytes | str:
    """Connect, and return what comes, or ``reset``."""
    try:
        with connect(address) as client:
            return receive(client, 100)
    except ConnectionResetError:
        return "reset"


class Hello(harken.BaseRequestHandler):
    """Says hi."""

    def handle(self) -> None:
        """Say it."""
        self.request.sendall(b"hi")


class Answer(harken.DatagramRequestHandler):
    """Sends a datagram back."""

    def handle(self) -> None:
        """Send it."""
        self.wfile.write(self.packet)


class Stubborn(harken.BaseRequestHandler):
    """Tells its process and stays."""

    def handle(self) -> None:
        """Stay until killed."""
        self.request.sendall(b"%8d" % os.getpid())
        threading.Event().wait(PATIENCE)


class Quota:
    """A limit of one's own."""

    def __init__(self) -> None:
        self.admitted = self.released = 0
        self.closed: str | None = None
        self.fault: Exception | None = None

    def admit(self, peer: Any) -> str | None:
        """Admit unless closed."""
        assert peer.address == "127.0.0.1"
        self._fail()
        self.admitted += self.closed is None
        return self.closed

    def release(self, peer: Any) -> None:
        """Count."""
        assert peer.address == "127.0.0.1"
        self._fail()
        self.released += 1

    def _fail(self) -> None:
        if self.fault is not None:
            raise self.fault


def make_odd(engine: str, way: str) -> Any:
    """Make a server with one place, whose connections end in an odd way."""

    class Handler(harken.BaseRequestHandler):
        def handle(self) -> None:
            if way == "raises":
                raise ValueError("as the test wants it")
            if way == "closes":
                self.request.close()

    class Server(harken.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            if way == "verify_raises":
                raise ValueError("as the test wants it")
            return way != "verify_false"

        def process_request(self, request: Any, client_address: Any) -> None:
            if way != "dropped":  # it forgets the connection and never closes it
                super().process_request(request, client_address)

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing."""

    return Server(LOCAL, Handler, engine=engine.partition("-")[0], max_connections=1)
