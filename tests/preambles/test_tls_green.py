"""TLS on a hub: its own ways between OpenSSL and the wire, past the ssl module, by it, and in Python."""

import contextlib
import errno
import os
import socket
import ssl
import struct
import threading
import time
from functools import partial

import pytest
from waiting import wait_until

import harken
from harken import _hub, green

from .tls_kit import PATIENCE

HUBS = ("green", "green-asking", "green-fallback")
# Those that join answers under TLS; "green" is the hub in use, which HARKEN_HUB may have chosen.
JOINING = [
    pytest.param(hub, marks=pytest.mark.skipif(_hub.kind != "compiled", reason="the hub in C joins them"))
    for hub in HUBS[:2]
]


@pytest.mark.parametrize("engine", HUBS)
def test_receive_takes_what_a_socket_takes(engine, serving, dial):
    """Sizes below a record leave the rest for the next call; keywords, flags and no size at all are as they are."""
    told = []

    class Read(harken.BaseRequestHandler):
        def handle(self):
            request = self.request
            told.append(request.recv(3))
            told.append(request.recv(buflen=2))
            told.append(request.recv(0))
            told.append(request.recv(100))
            for wrong in ((100, 1), (-1,), (1, 2, 3), ("1",), (1.5,)):
                with pytest.raises((ValueError, TypeError)):
                    request.recv(*wrong)
            for wrong in ((), (b"x", 1), ("text",)):
                with pytest.raises((ValueError, TypeError)):
                    request.sendall(*wrong)
            request.sendall(b"")
            request.sendall(data=b"as a keyword, ")
            request.sendall(bytearray(b"as a buffer, "))
            request.sendall(b"as it is")
            told.append(request.recv())

    with serving(engine, Read) as server, dial(server) as client:
        client.sendall(b"one record")
        expected = b"as a keyword, as a buffer, as it is"
        got = b""
        while len(got) < len(expected):
            got += client.recv(100)
        client.sendall(b"more")
        assert client.recv(100) == b""
    assert got == expected
    assert told == [b"one", b" r", b"", b"ecord", b"more"]


@pytest.mark.parametrize("limits", [{}, {"read_timeout": 20}], ids=["plain", "stamped"])
@pytest.mark.parametrize("engine", HUBS)
def test_a_reader_goes_on_after_a_timeout(engine, limits, serving, dial):
    """What had come of a line is the next call's, as without TLS; stdlib's files can only be closed then."""
    told = []

    class Read(harken.StreamRequestHandler):
        timeout = 0.01

        def handle(self):
            told.append(type(self.rfile).__name__)
            calls = (self.rfile.readline, partial(self.rfile.read, 6), self.rfile.readline)
            told.extend(self.until_it_comes(call) for call in calls)

        def until_it_comes(self, call):
            self.request.sendall(b"?")
            waits = 0
            while True:
                try:
                    return call()
                except TimeoutError:
                    waits += 1
                    if waits == 1:
                        self.request.sendall(b"...")

    with serving(engine, Read, **limits) as server, dial(server) as client:
        for first, rest in ((b"a li", b"ne\n"), (b"six", b" by"), (b"", b"tes\nthe end")):
            assert client.recv(1) == b"?"
            client.sendall(first)
            assert client.recv(3) == b"..."
            client.sendall(rest)
        client.unwrap()
    assert told == ["Reader", b"a line\n", b"six by", b"tes\n"]


@pytest.mark.parametrize("engine", HUBS)
def test_a_reader_reads_in_every_way(engine, serving, dial):
    """Larger than a record, by lines, into buffers, ahead and to the end."""
    told = []
    body = os.urandom(200_000).replace(b"\n", b" ")

    class Read(harken.StreamRequestHandler):
        def handle(self):
            read = self.rfile
            told.append(read.readline(3))
            told.append(read.readline())
            told.append(read.peek(1)[:3])
            told.append(read.read(len(body)) == body)
            room = bytearray(4)
            told.append((read.readinto(room), bytes(room)))
            told.append(next(iter(read)))
            told.append(read.read1(2))
            told.append(read.readlines())
            told.append(read.read())

    with serving(engine, Read) as server, dial(server) as client:
        client.sendall(b"a line\n" + body + b"room rest\nxylast\nlines\nend")
        client.unwrap()
    assert told == [
        b"a l", b"ine\n", body[:3], True, (4, b"room"), b" rest\n", b"xy", [b"last\n", b"lines\n", b"end"], b""
    ]  # fmt: skip


class Lines(harken.StreamRequestHandler):
    """Sends each line back."""

    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)


@pytest.mark.parametrize("apart", [False, True], ids=["record", "records"])
@pytest.mark.parametrize("engine", JOINING)
def test_answers_to_a_pipeline_go_together(engine, apart, serving, dial_wire):
    """One piece of the wire has them all, whether the requests came in one record or each in its own."""
    lines = [b"%d\n" % number for number in range(100)]
    with serving(engine, Lines) as server, dial_wire(server) as client:
        client.send(b"first\n")
        while client.piece() != b"first\n":  # before it, there may be tickets
            pass
        client.send_apart(lines if apart else [b"".join(lines)])
        assert client.piece() == b"".join(lines)


@pytest.mark.parametrize("engine", JOINING)
def test_what_is_joined_is_never_cut(engine, serving, trusting):
    """The sending is interrupted where the client takes no more: what it gets in the end is whole, and all."""
    late = threading.Event()
    size = 5000

    class Slow(harken.StreamRequestHandler):
        def handle(self):
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little as there can be
            for line in self.rfile:
                try:
                    with green.timeout(0.05):
                        self.wfile.write(line.strip() * size + b"\n")
                except TimeoutError:
                    late.set()

    with serving(engine, Slow) as server, socket.socket() as wire:
        wire.settimeout(PATIENCE)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        wire.connect(server.server_address)
        with trusting().wrap_socket(wire, server_hostname="localhost") as client, client.makefile("rb") as answers:
            client.sendall(b"0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n")
            assert late.wait(PATIENCE)
            for number in range(10):
                assert answers.readline() == b"%d" % number * size + b"\n"
            client.sendall(b"x\n")
            assert answers.readline() == b"x" * size + b"\n"


@pytest.mark.parametrize("engine", HUBS)
def test_what_is_joined_does_not_wait_for_who_computes(engine, serving, dial):
    """The watchdog sends what a handler has answered before it went on without a pause."""
    got = threading.Event()

    class Busy(harken.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                self.wfile.write(line)
                while not got.is_set():
                    pass

    with serving(engine, Busy) as server, dial(server) as client:
        client.sendall(b"first\nsecond\n")
        assert client.recv(100) == b"first\n"
        got.set()
        assert client.recv(100) == b"second\n"


class Ending:
    """OpenSSL's side where another thread shuts down: it reads ahead while the handler begins to read."""

    def __init__(self, request):
        self._inner, self._thread = request._sslobj, threading.Thread(target=request.shutdown, args=(socket.SHUT_RDWR,))
        self._in_read, self._reads = threading.Event(), threading.Event()
        request._sslobj = self
        self._thread.start()
        assert self._in_read.wait(PATIENCE)

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def read(self, *args):
        """As of the wrapped one."""
        data = self._inner.read(*args)
        if threading.current_thread() is self._thread:
            self._in_read.set()
            assert self._reads.wait(PATIENCE)
            time.sleep(0.05)  # until the handler stands before the guard: sooner, it would have to find the same
        return data

    def let_read(self, request):
        """Read as the handler."""
        self._reads.set()
        data = request.recv(100)
        self._thread.join(PATIENCE)
        return data


@pytest.mark.parametrize("engine", HUBS)
def test_a_shutdown_in_another_thread_leaves_what_is_read_in_order(engine, serving, dial_wire):
    """It reads ahead what has come, in the moment in which the handler reads."""
    got, done = [], threading.Event()

    class Reads(harken.BaseRequestHandler):
        def handle(self):
            got.append(self.request.recv(100))
            got.append(Ending(self.request).let_read(self.request))
            done.set()

    with serving(engine, Reads) as server, dial_wire(server) as client:
        client.send_apart([b"one", b"two", b"three"])
        assert done.wait(PATIENCE)
    assert got == [b"one", b"two"]


class Held:
    """A connection's guard, which tells who stands before it."""

    def __init__(self, request):
        self._guard = request._guard
        self.asked = threading.Event()

    def __enter__(self):
        self.asked.set()
        return self._guard.__enter__()

    def __exit__(self, *error):
        return self._guard.__exit__(*error)


@pytest.mark.parametrize("engine", HUBS)
@pytest.mark.parametrize("ask", [lambda request: request.shutdown(socket.SHUT_RDWR), lambda request: request.pending()])
def test_another_thread_may_find_the_connection_closed(engine, ask, serving, dial):
    """The handler ends it while the other one waits for OpenSSL: that is no error, or the one of a closed socket."""
    told = []

    class Ends(harken.BaseRequestHandler):
        def handle(self):
            guard = self.request._guard
            self.request._guard = held = Held(self.request)

            def asking(request):
                try:
                    ask(request)
                except OSError as error:
                    told.append(error.errno == errno.EBADF)
                else:
                    told.append(True)

            other = threading.Thread(target=asking, args=(self.request,))
            with guard:
                other.start()
                assert green.offload(held.asked.wait, PATIENCE)
                self.request._ended = True  # close() says goodbye under the guard; whoever said it already does not
                self.request.close()
            other.join(PATIENCE)

    with serving(engine, Ends) as server, dial(server) as client:
        assert client.recv(1) == b""
        wait_until(lambda: told)
    assert told == [True]


@pytest.mark.parametrize("engine", HUBS)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_handshake_ends_before_the_handler_speaks(engine, version, serving, dial, trusting):
    """A handler that neither reads nor writes for a while keeps no client waiting in its handshake."""
    go = threading.Event()

    class Silent(harken.BaseRequestHandler):
        def handle(self):
            harken.green.offload(go.wait, PATIENCE)
            self.request.sendall(b"at last")

    context = trusting()
    context.maximum_version = version
    with serving(engine, Silent) as server, dial(server, context=context) as client:
        assert client.version() == version.name.replace("_", ".")
        go.set()
        assert client.recv(100) == b"at last"


@pytest.mark.parametrize("engine", HUBS)
def test_a_client_gets_a_ticket_and_comes_back_by_it(engine, serving, dial, trusting):
    """The ticket comes with the first answer, and a session goes on by it."""
    context = trusting()
    with serving(engine) as server:
        with dial(server, context=context) as client:
            client.sendall(b"first")
            assert client.recv(100) == b"first"
            session = client.session
        assert session.has_ticket
        sock = socket.create_connection(server.server_address, PATIENCE)
        with context.wrap_socket(sock, server_hostname="localhost", session=session) as client:
            client.sendall(b"again")
            assert client.recv(100) == b"again"
            assert client.session_reused


@pytest.mark.parametrize("engine", HUBS)
def test_a_ticket_comes_before_a_wait(engine, serving, dial_wire):
    """It carries the acknowledgement for which a client's kernel may wait with the request (Nagle)."""
    with serving(engine) as server, dial_wire(server) as client:
        assert client.sock.recv(1, socket.MSG_PEEK)


@pytest.mark.parametrize("engine", HUBS)
def test_a_ticket_comes_with_the_goodbye(engine, serving, dial_wire):
    """A client that was told nothing can come back quickly all the same."""

    class Leave(harken.BaseRequestHandler):
        def handle(self):
            pass

    with serving(engine, Leave) as server, dial_wire(server) as client:
        assert client.read() == b""
        assert client.session.has_ticket


@pytest.mark.parametrize("engine", HUBS)
def test_a_connection_that_was_given_away_is_ended_for_all(engine, serving, dial_wire):
    """Whoever has a copy of the descriptor keeps no client waiting for the end."""
    kept = []

    class Copied(harken.BaseRequestHandler):
        def handle(self):
            kept.append(os.dup(self.request.fileno()))
            assert self.request.recv(1) == b""

    with serving(engine, Copied) as server, dial_wire(server) as client:
        client.end()
        assert client.read() == b""
        assert client.sock.recv(1) == b""
        os.close(kept.pop())


@pytest.mark.parametrize("engine", ["thread", *HUBS])
def test_what_a_client_sent_before_it_vanished_is_read(engine, serving, dial):
    """It cannot be told of its tickets any more; its data are there."""
    told, gone, read = [], threading.Event(), threading.Event()

    class Late(harken.BaseRequestHandler):
        def handle(self):
            harken.green.offload(gone.wait, PATIENCE)
            try:
                told.append(self.request.recv(100))
                with contextlib.suppress(ConnectionResetError):
                    told.append(self.request.recv(100))
            finally:
                read.set()

    with serving(engine, Late) as server:
        with dial(server) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # sent they are, before the tickets come
            client.sendall(b"last words")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.socket.close(client)
        gone.set()
        assert read.wait(PATIENCE)
    assert [word for word in told if word] == [b"last words"]


def ask_at_once(entered, go, *requests):
    """Warm the connections up, and ask while the handler of the last one has the hub: the others' turn is one."""
    for _ in range(20):  # more than a connection needs before its answers are put off
        for client, _request in requests:
            client.sendall(b"warm")
            assert client.recv(100) == b"warm"
    client, request = requests[-1]
    client.sendall(request)
    assert entered.wait(PATIENCE)
    for client, request in requests[:-1]:
        client.sendall(request)
    go.set()


@pytest.mark.parametrize("engine", HUBS)
def test_answers_of_a_turn_go_out_together_under_tls_too(engine, serving, dial):
    """Two clients ask while a third one's handler has the hub; the first has its answer when the second has run."""
    entered, go, seen, hubs = threading.Event(), threading.Event(), [], set()

    class Look(harken.BaseRequestHandler):
        def handle(self):
            while data := self.request.recv(100):
                if data == b"hold":
                    entered.set()
                    go.wait(PATIENCE)
                self.request.sendall(data)
                hubs.add(type(harken._hub.current()).__module__)
                if data == b"look":
                    with contextlib.suppress(BlockingIOError):
                        seen.append(wire.recv(100, socket.MSG_PEEK | socket.MSG_DONTWAIT))

    with serving(engine, Look) as server, dial(server) as first, dial(server) as second, dial(server) as third:
        with socket.socket(fileno=os.dup(first.fileno())) as wire:
            ask_at_once(entered, go, (first, b"look"), (second, b"more"), (third, b"hold"))
            assert second.recv(100) == b"more"
            assert first.recv(100) == b"look"
            assert third.recv(100) == b"hold"
    assert bool(seen) == (hubs != {"harken._hub.compiled"})


ENDS = {
    "shutdown": lambda request: request.shutdown(socket.SHUT_WR),
    "close": lambda request: request.close(),
    "end": lambda request: request.end(),
    "return": lambda request: None,
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("engine", HUBS)
def test_a_goodbye_comes_after_the_answers_of_a_turn(engine, how, serving, dial):
    """close_notify is sent past the hub's connection: an answer that is put off goes before it."""
    entered, go = threading.Event(), threading.Event()

    class Last(harken.BaseRequestHandler):
        def handle(self):
            while data := self.request.recv(100):
                if data == b"hold":
                    entered.set()
                    go.wait(PATIENCE)
                self.request.sendall(data)
                if data == b"last":
                    ENDS[how](self.request)
                    return

    with serving(engine, Last) as server, dial(server) as first, dial(server) as second, dial(server) as third:
        ask_at_once(entered, go, (first, b"last"), (second, b"last"), (third, b"hold"))
        for client in (first, second):
            assert client.recv(100) == b"last"
            assert client.recv(100) == b""


@pytest.mark.parametrize("engine", HUBS)
def test_nothing_is_read_after_a_broken_record(engine, serving, dial):
    """The next read finds the end, as on a blocking socket, and does not wait for a peer that says nothing more."""
    told, done = [], threading.Event()

    class Read(harken.BaseRequestHandler):
        def handle(self):
            with pytest.raises(ssl.SSLError, match="MAC|mac"):
                self.request.recv(5)
            with contextlib.suppress(OSError):
                told.append(self.request.recv(5))
            done.set()

    with serving(engine, Read) as server, dial(server) as client:
        socket.socket.sendall(client, b"\x17\x03\x03\x00\x20" + bytes(32))
        assert done.wait(PATIENCE)
        with pytest.raises(ssl.SSLError, match="(?i)alert"):
            client.recv(1)
    assert told == [b""]


@pytest.mark.parametrize("waits", [False, True], ids=["asks", "waits"])
@pytest.mark.parametrize("engine", HUBS)
def test_what_a_socket_that_does_not_wait_has_taken_arrives(engine, waits, serving, dial):
    """And what it could not send whole is to be written again, which may also wait; nothing comes twice."""
    stream = b"".join(b"%07d\n" % number for number in range(2_000_000))
    taken, thanked = [], []

    class Push(harken.BaseRequestHandler):
        def handle(self):
            request = self.request
            request.setblocking(False)
            sent = 0
            with contextlib.suppress(ssl.SSLWantWriteError):
                while True:
                    sent += request.send(stream[sent : sent + 50_000])
            with pytest.raises(ssl.SSLError, match="bad write retry"):
                request.send(b"x")
            taken.append(sent)
            while not thanked:
                with contextlib.suppress(ssl.SSLWantReadError):
                    thanked.append(request.recv(100))
                green.sleep(0.002)
            request.setblocking(waits)
            if waits:
                request.sendall(stream[sent:])
                return
            while sent < len(stream):
                try:
                    sent += request.send(stream[sent:])
                except ssl.SSLWantWriteError:
                    green.sleep(0.002)

    with serving(engine, Push) as server, dial(server) as client:
        wait_until(lambda: taken)
        got = bytearray()
        while len(got) < taken[0]:
            got += client.recv(taken[0] - len(got))
        client.sendall(b"thanks")
        while piece := client.recv(1 << 20):
            got += piece
    assert thanked == [b"thanks"]
    assert got == stream


@pytest.mark.parametrize("engine", HUBS)
def test_after_tls_every_call_waits_in_the_hub(engine, serving, dial, tmp_path):
    """``unwrap`` gives a plain socket of the hub's; others are served while it waits to read, or sends a file."""
    path = tmp_path / "file"
    path.write_bytes(bytes(12_000_000))
    read = []

    class Unwrap(harken.BaseRequestHandler):
        def handle(self):
            if self.request.recv(10) == b"other":
                self.request.sendall(b"served")
                return
            plain = self.request.unwrap()
            plain.settimeout(PATIENCE)
            buffer = bytearray(10)
            read.append(plain.recvfrom(10)[0])
            plain.sendto(b"?", self.client_address)
            read.append(plain.recv(10, socket.MSG_PEEK))
            read.append(bytes(buffer[: plain.recvfrom_into(buffer)[0]]))
            with path.open("rb") as file:
                read.append(plain.sendfile(file))

    def is_served():
        with dial(server) as other:
            other.settimeout(PATIENCE)
            other.sendall(b"other")
            return other.recv(10) == b"served"

    with serving(engine, Unwrap) as server, dial(server) as client:
        client.sendall(b"first")
        plain = client.unwrap()
        assert is_served()
        plain.sendall(b"one")
        assert plain.recv(1) == b"?"
        plain.sendall(b"two")
        wait_until(lambda: len(read) == 3)
        assert is_served()
        got = 0
        while piece := plain.recv(1 << 20):
            got += len(piece)
    assert (read, got) == ([b"one", b"two", b"two", 12_000_000], 12_000_000)
