"""Handshakes that fail: one event with the peer and the reason, nothing printed, and everybody else is served."""

import resource
import socket
import ssl
import struct
import threading
import time

import pytest

import harken

from .tls_kit import BESIDE, ENGINES, PATIENCE, Echo, plain


def expect_served(dial, server):
    """The good client beside."""
    with dial(server) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"


def read_to_the_end(client):
    """Read what comes; a reset is an end too."""
    data = b""
    try:
        while more := client.recv(1000):
            data += more
    except ConnectionResetError:
        pass
    return data


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_no_tls_is_named(engine, serving, dial, closed, capfd):
    """Plain HTTP on the TLS port is said so, whatever the method and however much of it has come."""
    http = "plain HTTP on the TLS port"
    cases = {
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n": http,
        b"POST /form HTTP/1.1\r\n": http,
        b"G": http,
        b"SSH-2.0-OpenSSH_9.2\r\n": "the peer does not speak TLS: its first bytes are b'SSH-2.0-'",
        b"\x00\x01\x02": "the peer does not speak TLS: its first bytes are b'\\x00\\x01\\x02'",
        b"\x16\x03\x01\x00\x05hello and more": "the TLS handshake failed: unexpected message",
    }
    with serving(engine) as server:
        for number, data in enumerate(cases):
            with plain(server) as client:
                client.sendall(data)
                read_to_the_end(client)
                address = client.getsockname()
            closed.failures(number + 1)
        expect_served(dial, server)
        assert closed.failures(len(cases)) == list(cases.values())
        failed = [event for event in closed.events if event.reason == "preamble_failed"]
        assert (failed[-1].peer.address, failed[-1].peer.port) == address
        assert server.stats()["closed_total"]["preamble_failed"] == len(cases)
        assert server.stats()["handler_failed_total"] == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_peers_that_leave_in_the_middle(engine, serving, dial, closed, capfd):
    """Closing at once, and closing or resetting after half a ClientHello, is the peer's failure and quiet."""
    hello = _client_hello()
    with serving(engine) as server:
        with plain(server):
            pass
        with plain(server) as client:
            client.sendall(hello[:50])
        with plain(server) as client:
            client.sendall(hello[:50])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with plain(server) as client:
            client.sendall(hello)
            client.recv(100)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        expect_served(dial, server)
        details = closed.failures(4)
        assert "the peer closed before the TLS handshake" in details
        assert all("the peer" in detail for detail in details)
    assert capfd.readouterr().err == ""


def _client_hello():
    out = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hello_byte_by_byte_is_served(engine, serving, trusting):
    """However small the fragments, the handshake and what follows arrive."""
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    # Made before a child is forked: it would inherit the locks that OpenSSL holds here meanwhile.
    tls = trusting().wrap_bio(into, out, server_hostname="localhost")
    with serving(engine) as server, plain(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def until_done(call, *args):
            while True:
                try:
                    found = call(*args)
                except ssl.SSLWantReadError:
                    found = None
                for byte in out.read():
                    sock.sendall(bytes((byte,)))
                if found is not None or (call == tls.do_handshake and tls.version() and not _wants(tls)):
                    return found
                into.write(sock.recv(65536))

        def _wants(tls):
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                return True
            return False

        until_done(tls.do_handshake)
        until_done(tls.write, b"hello")
        assert until_done(tls.read, 100) == b"hello"


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_the_whole_handshake_has_one_deadline(engine, serving, dial, closed):
    """A byte a moment does not stretch ``preamble_timeout``."""
    hello = _client_hello()
    with serving(engine, preamble_timeout=1.0) as server, plain(server) as slow:
        slow.settimeout(0.05)
        began = time.monotonic()
        ended = False
        for byte in hello:
            if ended:
                break
            slow.sendall(bytes((byte,)))
            try:
                ended = slow.recv(1) == b""
            except TimeoutError:
                pass
            except ConnectionError:
                ended = True
        assert ended
        assert 0.9 < time.monotonic() - began < 3
        assert closed.failures(1) == ["the peer was not ready within 1 s (preamble_timeout)"]


def test_a_client_that_distrusts_us_says_so(serving, closed):
    """Its alert is the reason."""
    with serving() as server, plain(server) as client:
        context = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError):
            context.wrap_socket(client, server_hostname="localhost")
        assert closed.failures(1) == ["the peer does not trust the certificate: it does not know who issued it"]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_are_refused(serving, closed):
    """TLS 1.1 is too old by default, and the reason says which setting says so."""
    with serving() as server, plain(server) as client:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(client)
        assert closed.failures(1) == ["the peer offers only versions of TLS that are too old (min_version)"]


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_minimum_version_1_3(engine, pki, serving, trusting, dial):
    """``min_version`` is heeded."""
    context = trusting()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with serving(engine, tls=harken.TLS(pki.cert, min_version="1.3")) as server:
        with pytest.raises(ssl.SSLError), dial(server, context=context):
            pass
        expect_served(dial, server)


@pytest.mark.parametrize("engine", BESIDE)
def test_garbage_in_the_middle_is_the_peers_fault(engine, serving, trusting, closed, capfd):
    """A record that cannot be read ends the connection in one line, without a traceback."""
    with serving(engine) as server, plain(server) as sock:
        context = trusting()
        client = context.wrap_socket(sock, server_hostname="localhost")
        with client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
            socket.socket.sendall(client, b"\x17\x03\x03\x00\x20" + bytes(32))
            with pytest.raises((ssl.SSLError, ConnectionError)):
                assert client.recv(100) == b""
                raise ConnectionError("ended")
        assert closed.wait(1)[0].reason in ("peer_reset", "peer_closed")
        assert server.stats()["handler_failed_total"] == 0
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("\n") <= 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failure_is_one_event_of_its_own(engine, serving, closed):
    """With the peer and the reason, before ``closed``; its parent tells it for a forked child."""
    told = []
    unsubscribe = harken.events.subscribe(told.append, "preamble_failed", "closed")
    try:
        with serving(engine) as server, plain(server) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            read_to_the_end(client)
            port = client.getsockname()[1]
            closed.wait(1)
    finally:
        unsubscribe()
    failed, ended = told
    assert (failed.name, ended.name) == ("preamble_failed", "closed")
    assert failed.peer.port == port
    assert failed.connection == ended.connection
    assert failed.reason == ended.detail
    assert "HTTP" in failed.reason


@pytest.mark.slow
@pytest.mark.parametrize("engine", BESIDE)
def test_500_silent_clients_do_not_delay_the_next(engine, serving, dial):
    """Each is in a handshake of its own; the good client is served at once, and in the end nobody is left."""
    pool = {"pool_size": 510, "pool_queue": 0}
    settings = {"pool": pool, "asyncio": pool, "fork": {"max_children": 510}}.get(engine, {})
    count = 500 if engine != "fork" else 60  # processes are dear
    with serving(engine, preamble_timeout=30.0, backlog=1000, **settings) as server:
        silent = [socket.create_connection(server.server_address) for _ in range(count)]
        try:
            deadline = time.monotonic() + 3 * PATIENCE
            while len(server.connections()) < count and time.monotonic() < deadline:
                time.sleep(0.02)
            assert len(server.connections()) == count
            began = time.monotonic()
            expect_served(dial, server)
            assert time.monotonic() - began < 5
        finally:
            for client in silent:
                client.shutdown(socket.SHUT_RDWR)
                client.close()
        deadline = time.monotonic() + 3 * PATIENCE
        while server.connections() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.connections() == []


@pytest.mark.parametrize("engine", BESIDE)
def test_no_descriptor_left_during_handshakes(engine, serving, dial, closed):
    """Handshakes under way need none and are finished; new connections wait or are shed, and later all is well."""
    with serving(engine, preamble_timeout=30.0) as server:
        waiting = [plain(server) for _ in range(5)]
        clients = [each.__enter__() for each in waiting]
        deadline = time.monotonic() + PATIENCE
        while len(server.connections()) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (_lowest_free(), hard))
        try:
            for client in clients:
                client.sendall(_hello_of_an_impostor())
            assert [read_to_the_end(client)[:1] for client in clients] == [b"\x15"] * 5  # an alert
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for each in waiting:
                each.__exit__(None, None, None)
        expect_served(dial, server)
        assert len(closed.failures(5)) == 5


def _lowest_free():
    with socket.socket() as probe:
        return probe.fileno()


def _hello_of_an_impostor():
    return b"\x16\x03\x01\x00\x05" + b"\x01\x00\x00\x01\x00"


def test_a_handler_of_plain_connections_is_not_held_up(serving):
    """On the same machine a server without TLS goes on while another does handshakes."""
    with serving("green", preamble_timeout=30.0) as server:
        with plain(server), harken.background(harken.ThreadingTCPServer(("127.0.0.1", 0), Echo)) as other:
            with plain(other) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
    assert threading.active_count() < 50
