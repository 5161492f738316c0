"""What a connection moves is told to whoever follows it, on every engine, and nobody else pays."""

import contextlib
import socket
import ssl
import threading
import time

import pytest
import trustme

import harken
from harken import tracing
from harken.tracing import MOST_HELD, MOST_SHOWN

PATIENCE = 10.0  # seconds
ENGINES = ("inline", "thread", "pool", "green", "asyncio")


class Plain(harken.BaseRequestHandler):
    """Answers each piece in upper case."""

    def handle(self):
        """Until the end."""
        self.request.sendall(b"ready\n")
        while data := self.request.recv(65536):
            self.request.sendall(data.upper())


class Lines(harken.StreamRequestHandler):
    """The same, by lines."""

    def handle(self):
        """Until the end."""
        self.wfile.write(b"ready\n")
        for line in self.rfile:
            self.wfile.write(line.upper())


class Rare(harken.BaseRequestHandler):
    """The same, by methods that are seldom used."""

    def handle(self):
        """Until the end."""
        self.request.sendall(b"ready\n")
        buffer = bytearray(100)
        while size := self.request.recv_into(buffer):
            self.request.sendmsg([buffer[:1].upper(), buffer[1:size].upper()])


class Awaited(harken.AsyncRequestHandler):
    """The same, awaited."""

    async def handle(self):
        """Until the end."""
        await self.request.sendall(b"ready\n")
        while data := await self.request.recv(65536):
            await self.request.sendall(data.upper())


class AwaitedLines(harken.AsyncStreamRequestHandler):
    """The same, awaited, by lines."""

    async def handle(self):
        """Until the end."""
        self.wfile.write(b"ready\n")
        while line := await self.rfile.readline():
            self.wfile.write(line.upper())


@contextlib.contextmanager
def conversation(handler, engine, **settings):
    """A client that was greeted, and the record of its connection."""
    client_of = settings.pop("client_of", contextlib.nullcontext)
    with harken.background(harken.TCPServer(("127.0.0.1", 0), handler, engine=engine, **settings)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as sock, client_of(sock) as made:
            client = made or sock
            assert client.recv(100) == b"ready\n"
            (record,) = server._harken.connections
            yield client, record


def talk(client, data):
    """Send, and read the answer."""
    client.sendall(data)
    answer = b""
    while len(answer) < len(data):
        answer += client.recv(65536)
    return answer


def told(tracer, size, *besides):
    """Wait until so many bytes were told; return the pieces, without a greeting that was still on its way."""
    pieces = []
    end = time.monotonic() + PATIENCE
    while sum(piece.size for piece in pieces) < size and time.monotonic() < end:
        pieces += [piece for piece in tracer.take()[0] if piece.data.lower() not in (b"ready\n", *besides)]
    return pieces


def followed(tracer, wanted, *, out):
    """Wait until so many bytes were seen; return them and their number."""
    data, size = b"", 0
    end = time.monotonic() + PATIENCE
    while size < wanted:
        assert time.monotonic() < end, (data, size)
        for piece in tracer.take()[0]:
            if piece.out == out:
                data += piece.data
                size += piece.size
    return data, size


@pytest.mark.parametrize("handler", [Plain, Lines, Rare])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_sent_and_what_comes_is_told(handler, engine):
    """Also what is received by a call that waits already: by its bytes, or by their number."""
    with conversation(handler, engine) as (client, record):
        tracer = tracing.begin(record)
        assert talk(client, b"first\n") == b"FIRST\n"
        assert talk(client, b"second\n") == b"SECOND\n"
        pieces = told(tracer, 26)
        assert b"".join(piece.data for piece in pieces if piece.out) == b"FIRST\nSECOND\n"
        came = [piece for piece in pieces if not piece.out]
        assert sum(piece.size for piece in came) == 13
        assert b"second\n" in [piece.data for piece in came]
        if engine == "green":
            assert b"first\n" in [piece.data for piece in came]
        tracing.end(record)
        assert talk(client, b"third\n") == b"THIRD\n"
        assert tracer.take()[0] == []
        assert record.tracer is None


@pytest.mark.parametrize("handler", [Awaited, AwaitedLines])
def test_awaited_verbs_are_told_too(handler):
    """They are the hub's below, also those that were begun."""
    with conversation(handler, "asyncio") as (client, record):
        tracer = tracing.begin(record)
        assert talk(client, b"one\n") == b"ONE\n"
        pieces = told(tracer, 8)
        assert [(piece.out, piece.data) for piece in pieces] == [(False, b"one\n"), (True, b"ONE\n")]
        tracing.end(record)


@pytest.fixture(scope="module")
def authority():
    """Who vouches for the server."""
    return trustme.CA()


@pytest.mark.parametrize(("engine", "handler"), [*((each, Plain) for each in ENGINES), ("green", Lines)])
def test_under_tls_the_plain_text_is_told_once(authority, engine, handler):
    """Whatever is encrypted where."""
    server_side, client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server_side)
    authority.configure_trust(client_side)

    def secured(sock):
        return client_side.wrap_socket(sock, server_hostname="localhost")

    with conversation(handler, engine, tls=server_side, client_of=secured) as (client, record):
        tracer = tracing.begin(record)
        talk(client, b"zero\n")  # the first piece comes to a call that waits already, which not every engine tells
        assert talk(client, b"one\n") == b"ONE\n"
        pieces = told(tracer, 8, b"zero\n")
        assert [(piece.out, piece.data) for piece in pieces] == [(False, b"one\n"), (True, b"ONE\n")]
        tracing.end(record)


def test_pipelined_answers_are_told():
    """What the hub joins is told when it is sent."""
    with conversation(Lines, "green") as (client, record):
        tracer = tracing.begin(record)
        client.sendall(b"a\nb\nc\n" * 100)
        assert followed(tracer, 600, out=True)[0] == b"A\nB\nC\n" * 100
        tracing.end(record)


def test_a_flood_is_bounded_and_what_is_left_out_is_counted():
    """Nobody takes what is told, and the connection goes on."""
    with conversation(Plain, "green") as (client, record):
        tracer = tracing.begin(record)
        block = b"x" * 60000
        for _ in range(200):
            talk(client, block)
        pieces, left_out = tracer.take()
        assert left_out > 0
        assert all(len(piece.data) <= MOST_SHOWN for piece in pieces)
        assert sum(len(piece.data) for piece in pieces) <= MOST_HELD
        assert any(piece.size > len(piece.data) for piece in pieces)
        tracing.end(record)


def test_threads_that_share_the_scratch_do_not_mix_what_they_read():
    """Telling lets other threads run, whose hubs receive into the same place."""
    answers = {}

    def run(word):
        with conversation(Plain, "green") as (client, record):
            tracing.begin(record)
            answers[word] = {talk(client, word * 200) for _ in range(300)}
            tracing.end(record)

    threads = [threading.Thread(target=run, args=(word,)) for word in (b"ab", b"cd")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == {b"ab": {b"AB" * 200}, b"cd": {b"CD" * 200}}


def test_a_connection_that_nobody_follows_keeps_its_own_methods():
    """Its class is what the engine made, before and after."""
    with conversation(Plain, "thread") as (client, record):
        kind = type(record.request)
        tracing.begin(record)
        assert type(record.request) is not kind
        assert type(record.request).__name__ == kind.__name__
        tracing.end(record)
        assert type(record.request) is kind
        assert talk(client, b"x") == b"X"
