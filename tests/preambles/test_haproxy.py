"""HAProxy itself in front of harken: what it sends is understood, over TCP and Unix, with and without TLS before it."""

import contextlib
import shutil
import socket
import ssl
import subprocess

import pytest
import trustme

import harken

from .kit import ENGINES, LOCAL, PATIENCE, TRUST, Told, read_line

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy: apt-get install haproxy")

CONFIG = """
global
    maxconn 100
defaults
    mode tcp
    timeout connect 5s
    timeout client 20s
    timeout server 20s
    unique-id-format %{{+X}}o-%ci-%cp
frontend door
    bind fd@{fd} {bind}
    default_backend harken
backend harken
    server one {address} {options}
"""


class Tell(harken.StreamRequestHandler):
    """Says what it knows of the client, and echoes lines."""

    def handle(self):
        proxy = self.peer.proxy
        told = (self.client_address, str(self.peer), proxy.version, proxy.command, proxy.destination)
        ssl = proxy.ssl
        more = (proxy.authority, proxy.alpn, proxy.unique_id, proxy.checksum is not None)
        over = ssl and (
            ssl.tls,
            ssl.certified,
            ssl.verified,
            ssl.version,
            ssl.common_name,
            ssl.cipher,
            ssl.key_algorithm,
        )
        self.wfile.write(f"{(*told, *more, over)!r}\n".encode())
        for line in self.rfile:
            self.wfile.write(line)


@contextlib.contextmanager
def haproxy(folder, address, options, bind=""):
    """Run HAProxy before ``address``; give the address of its door."""
    with socket.create_server(LOCAL) as door:
        path = folder / "haproxy.cfg"
        path.write_text(CONFIG.format(fd=door.fileno(), bind=bind, address=address, options=options))
        command = ["haproxy", "-db", "-q", "-f", str(path)]
        process = subprocess.Popen(command, pass_fds=[door.fileno()], stderr=subprocess.PIPE, text=True)
        try:
            yield door.getsockname()
        finally:
            process.kill()
            _, errors = process.communicate(timeout=PATIENCE)
    assert "[ALERT]" not in errors, errors


@contextlib.contextmanager
def client_of(door, context=None, name=None):
    """Connect through HAProxy, by TLS if a context is given."""
    with socket.create_connection(door, PATIENCE) as client:
        if context is None:
            yield client
        else:
            with context.wrap_socket(client, server_hostname=name) as secured:
                yield secured


def told(client):
    """Read the handler's line."""
    line = read_line(client)
    return eval(line, {})  # a tuple's repr, by ourselves


def where(server):
    """Write the address of a server as HAProxy does."""
    address = server.server_address
    return f"unix@{address}" if isinstance(address, str) else f"{address[0]}:{address[1]}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transport", ["tcp", "unix"])
@pytest.mark.parametrize("options, version", [("send-proxy", 1), ("send-proxy-v2", 2)])
def test_plain_connections(engine, transport, options, version, tmp_path):
    """The handler sees HAProxy's client, whose bytes then pass both ways."""
    kind, bound = (harken.TCPServer, LOCAL) if transport == "tcp" else (harken.UnixStreamServer, str(tmp_path / "s"))
    server = kind(bound, Tell, engine=engine, proxy=f"v{version}", proxy_from=TRUST)
    with harken.background(server), haproxy(tmp_path, where(server), options) as door, client_of(door) as client:
        own = client.getsockname()
        client.sendall(b"hello\n")
        address, peer, *header = told(client)
        assert (address, peer) == (own, f"127.0.0.1:{own[1]}")
        assert header[:3] == [version, "proxy", door]
        assert read_line(client) == "hello\n"


@pytest.fixture(scope="module")
def authority():
    """Certificates of a module's own."""
    return trustme.CA()


@pytest.fixture
def secured(authority, tmp_path):
    """What HAProxy needs to speak TLS and to ask clients for certificates; and a client's context that has one."""
    pem, roots = tmp_path / "server.pem", tmp_path / "roots.pem"
    pem.write_bytes(authority.issue_cert("door.example").private_key_and_cert_chain_pem.bytes())
    authority.cert_pem.write_to_path(str(roots))
    context = ssl.create_default_context(cafile=str(roots))
    context.set_alpn_protocols(["echo/1"])
    authority.issue_cert("client.example", common_name="Zoë").configure_cert(context)
    bind = f"ssl crt {pem} ca-file {roots} verify optional alpn echo/1"
    return bind, context, ssl.create_default_context(cafile=str(roots))


ALL = "proxy-v2-options crc32c,authority,unique-id,ssl,cert-cn,ssl-cipher,cert-sig,cert-key"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_clients_tls_is_told(engine, secured, tmp_path):
    """``send-proxy-v2-ssl-cn`` names the client's certificate; without one it is neither certified nor verified."""
    bind, with_certificate, without = secured
    server = harken.TCPServer(LOCAL, Tell, engine=engine, proxy="v2", proxy_from=TRUST)
    with harken.background(server), haproxy(tmp_path, where(server), "send-proxy-v2-ssl-cn", bind) as door:
        with client_of(door, with_certificate, "door.example") as client:
            *_, over = told(client)
            assert over[:5] == (True, True, True, client.version(), "Zoë")
        with client_of(door, without, "door.example") as client:
            *_, over = told(client)
            assert over[:5] == (True, False, False, client.version(), None)


def test_everything_that_haproxy_can_say(secured, tmp_path):
    """The checksum holds; authority, ALPN, unique id, cipher and key are there."""
    bind, context, _ = secured
    server = harken.ThreadingTCPServer(LOCAL, Tell, proxy="v2", proxy_from=TRUST)
    options = f"send-proxy-v2 {ALL}"
    with harken.background(server), haproxy(tmp_path, where(server), options, bind) as door:
        with client_of(door, context, "door.example") as client:
            own = client.getsockname()
            address, _, version, command, destination, name, alpn, unique, checksum, over = told(client)
            assert (address, version, command, destination) == (own, 2, "proxy", door)
            assert (name, alpn, checksum) == ("door.example", b"echo/1", True)
            assert unique
            assert over[:5] == (True, True, True, client.version(), "Zoë")
            assert over[5] == client.cipher()[0]
            assert over[6]


def test_health_checks_are_the_proxys_own(tmp_path):
    """HAProxy's checks say LOCAL and show HAProxy itself; beside them a client is served."""
    opened = Told("opened")
    server = harken.ThreadingTCPServer(LOCAL, Tell, proxy="v2", proxy_from=TRUST)
    options = "send-proxy-v2 check check-send-proxy inter 50"
    with harken.background(server), haproxy(tmp_path, where(server), options) as door:
        checks = [event for event in opened.wait("opened", 2) if event.peer.proxy is not None]
        with client_of(door) as client:
            assert told(client)[0] == client.getsockname()
        assert {event.peer.proxy.command for event in checks} <= {"local"}
        assert {event.peer.address for event in checks} <= {"127.0.0.1"}
    opened.unsubscribe()


def test_a_proxy_that_sends_no_header_is_told_apart(tmp_path):
    """With ``send-proxy`` forgotten nobody is served, and the reason says what came instead."""
    closed = Told("closed")
    server = harken.ThreadingTCPServer(LOCAL, Tell, proxy="any", proxy_from=TRUST)
    with harken.background(server), haproxy(tmp_path, where(server), "") as door, client_of(door) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert client.recv(100) == b""
        assert closed.wait("closed")[0].detail == "no PROXY header: the connection began with b'GET / HTTP/1.1\\r\\n'"
    closed.unsubscribe()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl: apt-get install curl")
@pytest.mark.parametrize("engine", ["thread", "green"])
def test_curl_speaks_for_itself(engine):
    """``curl --haproxy-protocol`` reaches an HTTP server of the standard library, which sees curl's address."""
    from http.server import BaseHTTPRequestHandler

    class Hello(BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"{self.client_address[0]} {self.path}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = harken.TCPServer(LOCAL, Hello, engine=engine, proxy="v1", proxy_from=TRUST)
    with harken.background(server):
        url = f"http://127.0.0.1:{server.server_address[1]}/path"
        command = ["curl", "--silent", "--max-time", "10", "--haproxy-protocol", "--noproxy", "*", url]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, "127.0.0.1 /path")
