"""A peer that sends TLS records without data, as fast as they are read: it keeps nobody waiting, and is cut off."""

import _ssl
import contextlib
import ctypes
import socket
import threading

import pytest
from waiting import wait_until

import harken
from harken import events
from harken.preambles._hubbed import MOST_IN_VAIN

from .test_tls_green import HUBS
from .tls_kit import PATIENCE, plain

UPDATE_BYTES = 22  # of a record that updates the key: RFC 8446, 4.6.3 and 5.2


class Updating:
    """A client that can update its key, which the ssl module has no call for."""

    def __init__(self, address):
        self._openssl = openssl = ctypes.CDLL(_ssl.__file__)
        for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
            getattr(openssl, name).restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(openssl.SSL_CTX_new(ctypes.c_void_p(openssl.TLS_client_method())))
        self._tls = ctypes.c_void_p(openssl.SSL_new(self._context))
        self.wire = socket.create_connection(address, PATIENCE)
        self.wire.setblocking(True)
        openssl.SSL_set_fd(self._tls, self.wire.fileno())
        assert openssl.SSL_connect(self._tls) == 1

    def update(self, answered=0):
        """Send a record that holds a new key, and asks for an answer or not; tell whether that could be done."""
        return self._openssl.SSL_key_update(self._tls, answered) and self._openssl.SSL_do_handshake(self._tls) == 1

    def send(self, data):
        """Send data."""
        assert self._openssl.SSL_write(self._tls, data, len(data)) == len(data)

    def receive(self, size):
        """Receive that many bytes, which come in one record."""
        data = ctypes.create_string_buffer(size)
        assert self._openssl.SSL_read(self._tls, data, size) == size
        return data.raw

    def close(self):
        """Let everything go."""
        self._openssl.SSL_free(self._tls)
        self._openssl.SSL_CTX_free(self._context)
        self.wire.close()


@contextlib.contextmanager
def updating(server):
    """Give such a client of ``server``."""
    client = Updating(server.server_address)
    try:
        yield client
    finally:
        client.close()


@pytest.mark.parametrize("engine", HUBS)
def test_new_keys_are_nothing_to_a_handler(engine, serving):
    """Some hundred of them, with data in between, and those that are to be answered."""
    with serving(engine) as server, updating(server) as client:
        for answered in (0, 1):
            for _ in range(200):
                assert client.update(answered)
            client.send(b"data")
            assert client.receive(4) == b"data"


@pytest.mark.parametrize("engine", HUBS)
def test_who_sends_nothing_but_new_keys_is_cut_off(engine, serving, closed):
    """That is the peer's fault, and no handler's."""
    failed = []
    unsubscribe = events.subscribe(failed.append, "handler_failed")
    with serving(engine) as server, updating(server) as client:
        most = 20 * MOST_IN_VAIN // UPDATE_BYTES
        assert any(not client.update() for _ in range(most))
        assert closed.wait(1)[0].reason == "peer_reset"
    unsubscribe()
    assert not failed


class Crowd:
    """Two connections that have something for a server at the same moment, while a third one keeps it."""

    def __init__(self):
        self.told = []
        self.blocked, self.gate = threading.Event(), threading.Event()
        crowd = self

        class Tell(harken.BaseRequestHandler):
            def handle(self):
                kind = self.request.recv(10)
                self.request.sendall(kind)
                if kind == b"block":
                    crowd.blocked.set()
                    crowd.gate.wait(PATIENCE)
                    return
                while self.request.recv(10) == b"-":
                    pass
                crowd.told.append(kind)

        self.handler = Tell

    @contextlib.contextmanager
    def meanwhile(self, quiet, block):
        """Keep the server until the end of the block; then ``quiet`` has a question too, and both are served."""
        quiet.sendall(b"quiet")
        assert quiet.recv(10) == b"quiet"
        block.sendall(b"block")
        assert self.blocked.wait(PATIENCE)
        yield
        quiet.sendall(b"?")
        self.gate.set()
        wait_until(lambda: len(self.told) == 2)


@pytest.mark.parametrize("between", [b"", b"-"], ids=["nothing", "data"])
@pytest.mark.parametrize("engine", HUBS)
def test_new_keys_keep_nobody_waiting(engine, between, serving, dial):
    """What is there of them takes as long to read as megabytes of data: others have their turn in between."""
    crowd = Crowd()
    with serving(engine, crowd.handler) as server, updating(server) as flood:
        flood.send(b"flood")
        assert flood.receive(5) == b"flood"
        with dial(server) as quiet, dial(server) as block, crowd.meanwhile(quiet, block):
            for number in range(60000 // UPDATE_BYTES):
                assert flood.update()
                if between and number % 700 == 0:
                    flood.send(between)
            flood.send(b"!")
    assert crowd.told == [b"quiet", b"flood"]


@pytest.mark.parametrize("engine", HUBS)
def test_a_handshake_in_pieces_keeps_nobody_waiting(engine, serving, dial):
    """A byte of it in each record: others have their turn in between."""
    crowd = Crowd()
    hello = b"\x01" + (12000).to_bytes(3, "big") + bytes(12000)  # RFC 8446, 4; it makes no sense
    unsubscribe = events.subscribe(lambda event: crowd.told.append(event.name), "preamble_failed")
    with serving(engine, crowd.handler) as server, plain(server) as flood:
        wait_until(lambda: server.stats()["open"] == 1)
        with dial(server) as quiet, dial(server) as block, crowd.meanwhile(quiet, block):
            flood.sendall(b"".join(b"\x16\x03\x01\0\1%c" % byte for byte in hello))
    unsubscribe()
    assert crowd.told == [b"quiet", "preamble_failed"]
