"""OpenSSL without the ssl module between: what it is for, and that nothing else changes."""

import contextlib
import gc
import hashlib
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

import harken
from harken import _hub

from .test_tls_green import HUBS
from .tls_kit import PATIENCE

compiled = _hub.kinds().get("compiled")
reached = _hub.kind == "compiled" and compiled.reach_openssl(True)


class Digest(harken.BaseRequestHandler):
    """Answers each message, which a line with its length heads, with its digest."""

    def handle(self):
        file = self.request.makefile("rb")
        while head := file.readline(16):
            self.request.sendall(hashlib.sha256(file.read(int(head))).digest())


class Pen:
    """A client that encrypts without sending."""

    def __init__(self, sock, context):
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.until(self.tls.do_handshake)
        sock.sendall(self.outgoing.read())

    def until(self, call, *args):
        while True:
            try:
                return call(*args)
            except ssl.SSLWantReadError:
                if self.outgoing.pending:
                    self.sock.sendall(self.outgoing.read())
                data = self.sock.recv(65536)
                assert data, "the server has closed"
                self.incoming.write(data)

    def encrypt(self, plain):
        self.tls.write(plain)
        return self.outgoing.read()

    def read(self, size):
        found = b""
        while len(found) < size:
            found += self.until(self.tls.read, size - len(found))
        return found


@pytest.fixture
def pen(trusting):
    """Return a function that makes such a client of a server."""
    opened = []

    def make(server, version=ssl.TLSVersion.TLSv1_3):
        context = trusting()
        context.maximum_version = version
        sock = socket.create_connection(server.server_address, PATIENCE)
        opened.append(sock)
        return Pen(sock, context)

    yield make
    for sock in opened:
        sock.close()


@pytest.mark.skipif(_hub.kind != "compiled", reason="the hub is not compiled, or not in use")
@pytest.mark.skipif(not hasattr(sys.modules["_ssl"], "__file__"), reason="OpenSSL is built into the interpreter")
def test_openssl_is_found_where_the_interpreter_has_it_as_a_library():
    """Otherwise all below is tested by the ssl module alone."""
    assert reached


@pytest.mark.skipif(not reached, reason="OpenSSL is called by the ssl module")
def test_no_thread_comes_between_that_wants_the_gil(serving, dial):
    """With the GIL given up in each call, a thread that computes would keep it for 5 ms each time."""
    turns, over = [0], threading.Event()

    class Counted(harken.BaseRequestHandler):
        def handle(self):
            request = self.request
            while request.recv(1) == b"?":
                before = turns[0]
                request.sendall(b"x" * 20_000)
                assert request.recv(10) == b"at hand"  # of the same record
                request.sendall(b"same" if turns[0] == before else b"turn")

    def want():
        while not over.is_set():
            turns[0] += 1
            time.sleep(0)  # gives it up at once, and wants it again

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=want)
    with serving("green", Counted) as server, dial(server) as client:
        file = client.makefile("rb")
        sys.setswitchinterval(PATIENCE)  # nobody is asked to give it up
        thread.start()
        try:
            for _ in range(50):
                client.sendall(b"?at hand")
                assert file.read(20_004)[-4:] == b"same"
        finally:
            over.set()
            sys.setswitchinterval(interval)
            thread.join()


@pytest.mark.skipif(not reached, reason="OpenSSL is called by the ssl module")
def test_few_connections_keep_their_buffers_and_give_them_back(serving, dial):
    """More than 256 do not: 34 KB each would be too much. A handshake that is asked for again counts once."""

    class Parked(harken.BaseRequestHandler):
        def handle(self):
            self.request.do_handshake()
            while data := self.request.recv(100):
                self.request.sendall(data)

    def kept(clients):
        for client in clients:  # the server has done its part of the handshake when it answers
            client.sendall(b"?")
            assert client.recv(1) == b"?"
        return compiled.openssl_keepers() - before

    gc.collect()
    before = compiled.openssl_keepers()
    with serving("green", Parked) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(server)) for _ in range(3)]
        assert kept(clients) == 3
        clients += [stack.enter_context(dial(server)) for _ in range(260)]
        assert kept(clients) + before == 256
    gc.collect()
    assert compiled.openssl_keepers() == before


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("engine", HUBS)
def test_records_come_in_any_pieces(engine, version, serving, pen):
    """Many at once, a few bytes at a time, with every size of a read on the other side."""
    dice = random.Random(f"{engine}{version}")
    with serving(engine, Digest) as server:
        client = pen(server, version)
        for _ in range(40):
            messages = [dice.randbytes(dice.choice((1, 60, 1000, 16_384, 40_000))) for _ in range(dice.randint(1, 5))]
            wire = b"".join(client.encrypt(b"%d\n" % len(plain) + plain) for plain in messages)
            while wire:
                size = dice.choice((1, 5, 21, 3_000, 16_405, 100_000))
                client.sock.sendall(wire[:size])
                wire = wire[size:]
            for plain in messages:
                assert client.read(32) == hashlib.sha256(plain).digest()


@pytest.mark.parametrize("engine", ["thread", *HUBS])
def test_every_size_and_kind_of_data_is_sent(engine, serving, dial):
    """Up to what is encrypted at once, beyond it, and out of any buffer."""
    sizes = (1, 100, 16_383, 16_384, 16_385, 65_536, 65_537, 200_000)

    class Send(harken.BaseRequestHandler):
        def handle(self):
            for size in sizes:
                for kind in (bytes, bytearray, memoryview):
                    self.request.sendall(kind(bytes([size % 251]) * size))
            assert self.request.send(memoryview(b"s" * 1_000_000)) == 1_000_000  # as a socket that blocks

    with serving(engine, Send) as server, dial(server) as client:
        file = client.makefile("rb")
        for size in sizes:
            for _ in range(3):
                assert file.read(size) == bytes([size % 251]) * size
        assert file.read() == b"s" * 1_000_000


@pytest.mark.parametrize("engine", ["thread", *HUBS])
def test_receive_into_takes_what_a_socket_takes(engine, serving, dial):
    """Any writable buffer, less than a record, no room at all."""
    told = []

    class Read(harken.BaseRequestHandler):
        def handle(self):
            request, room = self.request, bytearray(4)
            assert request.recv_into(bytearray()) == 0  # nothing has come
            told.append((request.recv_into(room), bytes(room)))
            assert request.recv_into(bytearray()) == request.read(5, bytearray()) == 0  # more is at hand
            told.append((request.recv_into(memoryview(room)[1:]), bytes(room)))
            told.append((request.recv_into(room, 1), bytes(room)))
            told.append((request.recv_into(buffer=room), bytes(room)))
            told.append((request.read(0, room), bytes(room)))
            for wrong in (b"read only", "text"):
                with pytest.raises(TypeError):
                    request.recv_into(wrong)
            request.sendall(b"read")
            told.append(request.recv_into(room))

    with serving(engine, Read) as server, dial(server) as client:
        client.sendall(b"abcdefghijklmno")
        assert client.recv(10) == b"read"
        client.unwrap()
    assert told == [(4, b"abcd"), (3, b"aefg"), (1, b"hefg"), (4, b"ijkl"), (3, b"mnol"), 0]


@pytest.mark.parametrize("engine", HUBS)
def test_a_forged_record_is_an_error(engine, serving, pen, dial):
    """Handler and client are told why, nothing is read behind it, and the next connection knows nothing of it."""
    told = []

    class Read(harken.BaseRequestHandler):
        def handle(self):
            try:
                while data := self.request.recv(100):
                    self.request.sendall(data)
            except ssl.SSLError as error:
                told.append(error.reason)
                told.append(self.request.recv(100))

    with serving(engine, Read) as server:
        client = pen(server)
        client.sock.sendall(client.encrypt(b"true"))
        assert client.read(4) == b"true"
        record = bytearray(client.encrypt(b"forged"))
        record[-1] ^= 1
        client.sock.sendall(record)
        with pytest.raises(ssl.SSLError, match="ALERT_BAD_RECORD_MAC"):
            client.read(1)
        with dial(server) as other:
            other.sendall(b"well")
            assert other.recv(10) == b"well"
    assert told == ["DECRYPTION_FAILED_OR_BAD_RECORD_MAC", b""]


@pytest.mark.parametrize("engine", HUBS)
def test_what_comes_while_another_thread_calls_openssl_is_kept(engine, serving, dial):
    """It holds the guard; a read waits for it, and has lost nothing."""
    told = []

    class Guarded(harken.BaseRequestHandler):
        def handle(self):
            request = self.request
            taken, read = threading.Event(), threading.Event()

            def hold():
                with request._guard:
                    taken.set()
                    read.wait(0.05)

            for _ in range(3):
                thread = threading.Thread(target=hold)
                thread.start()
                harken.green.offload(taken.wait, PATIENCE)
                taken.clear()
                told.append(request.recv(100))
                request.sendall(b"next")
                thread.join()

    with serving(engine, Guarded) as server, dial(server) as client:
        for word in (b"one", b"two", b"three"):
            client.sendall(word)
            assert client.recv(10) == b"next"
    assert told == [b"one", b"two", b"three"]


PADDED = """
import socket, ssl, sys
import harken

class Echo(harken.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)

server = harken.GreenTCPServer(("127.0.0.1", 0), Echo, tls=harken.TLS(sys.argv[1]))
with harken.background(server), socket.create_connection(server.server_address, 10) as sock:
    context = ssl.create_default_context(cafile=sys.argv[2])
    with context.wrap_socket(sock, server_hostname="localhost") as client:
        for size in (1, 64, 16_384, 65_536, 1):
            plain = bytes([size % 251]) * size
            client.sendall(plain)
            found = b""
            while len(found) < size:
                found += client.recv(size)
            assert found == plain, size
        (connection,) = server.connections()
        print(connection.bytes_out)
        client.unwrap()
"""


def test_records_that_grow_beyond_all_room_are_sent_whole(pki, tmp_path):
    """OpenSSL can be told to pad them, by its configuration; what does not fit goes by the ssl module."""
    configuration = tmp_path / "openssl.cnf"
    configuration.write_text(
        "openssl_conf = all\n[all]\nssl_conf = parts\n[parts]\nsystem_default = each\n[each]\nRecordPadding = 4096\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", PADDED, pki.cert, pki.ca],
        check=False,
        env={**os.environ, "OPENSSL_CONF": str(configuration)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3 * 4096 + 16_384 + 65_536  # each was padded
