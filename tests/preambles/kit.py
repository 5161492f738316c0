"""What the tests of preambles share: servers of every engine on TCP and Unix, clients, and the events that came."""

import contextlib
import hashlib
import socket
import threading

import harken
from harken import events

ENGINES = ("inline", "thread", "pool", "fork", "green", "asyncio")
TRANSPORTS = ("tcp", "unix")
PATIENCE = 10.0
LOCAL = ("127.0.0.1", 0)
TRUST = ["127.0.0.0/8", "::1"]


def hash_of(header):
    """A few letters that stand for the TLVs, which may be long."""
    return hashlib.sha256(repr(header.tlvs).encode()).hexdigest()[:12]


class Mirror(harken.BaseRequestHandler):
    """Says who the client is, then sends back what it gets."""

    def handle(self):
        header = self.peer.proxy
        told = f"{self.client_address!r}|{self.peer}|{int(self.peer.family)}|{header.bare()!r}|{hash_of(header)}\n"
        self.request.sendall(told.encode())
        while data := self.request.recv(65536):
            self.request.sendall(data)


def serving(engine, transport, path, handler=Mirror, **settings):
    """Serve in the background; the folder ``path`` holds the socket of a Unix server."""
    kind, address = (harken.TCPServer, LOCAL) if transport == "tcp" else (harken.UnixStreamServer, str(path / "s"))
    settings = {"proxy": "any", "proxy_from": TRUST, **settings}
    return harken.background(kind(address, handler, engine=engine, **settings))


@contextlib.contextmanager
def dial(server):
    """Give a client; at the end it is shut, since a forked child has a copy of it that nobody closes."""
    address = server.server_address
    client = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    with client:
        client.settimeout(PATIENCE)
        client.connect(address)
        yield client
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def read_line(client):
    """Return what the server says up to the end of a line, as text; nothing at the end."""
    with client.makefile("rb", buffering=0) as file:
        return file.readline().decode()


def read_exactly(client, size):
    """Return exactly so many bytes."""
    data = b""
    while len(data) < size:
        more = client.recv(size - len(data))
        assert more, f"the server closed after {data!r}"
        data += more
    return data


def read_end(client):
    """Return what comes until the server closes, however it does."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := client.recv(65536):
            data += more
    return data


class Told:
    """The events of some names, as they come."""

    def __init__(self, *names):
        self._seen = []
        self._came = threading.Condition()
        self.unsubscribe = events.subscribe(self._note, *names)

    def _note(self, event):
        with self._came:
            self._seen.append(event)
            self._came.notify_all()

    def wait(self, name, count=1):
        """Return the events of this name, once there are so many."""
        with self._came:
            assert self._came.wait_for(lambda: len(self._of(name)) >= count, PATIENCE), f"{name}: {self._of(name)}"
            return self._of(name)

    def _of(self, name):
        return [event for event in self._seen if event.name == name]
