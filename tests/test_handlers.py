"""Handlers: stdlib's three, and what harken adds to them."""

import io
import logging
import socket
import types

import pytest

import harken
from harken.handlers import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler

LOCAL = ("127.0.0.1", 0)
PATIENCE = 10.0  # seconds


class Fake:
    """What unit tests of handlers have for a socket."""

    def __init__(self, data=b""):
        self.data, self.sent, self.calls = data, b"", []

    def makefile(self, mode, buffering=-1):
        self.calls.append((mode, buffering))
        return io.BytesIO(self.data)

    def sendall(self, data):
        self.sent += bytes(data)

    def settimeout(self, seconds):
        self.calls.append(seconds)

    def setsockopt(self, *options):
        self.calls.append(options)

    def fileno(self):
        return 77


def serve_one(handler, data=b"hello", kind=harken.TCPServer):
    """Serve one connection with ``handler`` in the calling thread; return what the client got."""
    with kind(LOCAL, handler) as server, socket.create_connection(server.server_address, PATIENCE) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        server.handle_request()
        answer = b""
        while part := client.recv(1000):
            answer += part
        return answer


# ── order ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ordered(**raising):
    """Return a handler class that notes its calls and raises where told."""
    order = []

    def step(name):
        def method(self):
            order.append(name)
            if name in raising:
                raise raising[name]

        return method

    return type("Ordered", (BaseRequestHandler,), {name: step(name) for name in ("setup", "handle", "finish")}), order


def test_setup_handle_finish():
    """In the constructor, with the three attributes set before."""
    cls, order = ordered()
    handler = cls("request", "address", "server")
    assert order == ["setup", "handle", "finish"]
    assert (handler.request, handler.client_address, handler.server) == ("request", "address", "server")


def test_finish_runs_when_handle_raised():
    """And the error goes on."""
    cls, order = ordered(handle=LookupError())
    with pytest.raises(LookupError):
        cls(None, None, None)
    assert order == ["setup", "handle", "finish"]


def test_nothing_runs_when_setup_raised():
    """Neither handle nor finish."""
    cls, order = ordered(setup=LookupError())
    with pytest.raises(LookupError):
        cls(None, None, None)
    assert order == ["setup"]


# ── what harken adds ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_handler_knows_id_and_peer():
    """The same that ``connections()`` tells."""
    seen = {}

    class Handler(BaseRequestHandler):
        def handle(self):
            seen.update(id=self.connection_id, peer=self.peer, draining=self.draining, address=self.client_address)
            (seen["info"],) = self.server.connections()

    serve_one(Handler)
    assert seen["id"] == seen["info"].id
    assert isinstance(seen["id"], str)
    assert isinstance(seen["peer"], harken.Peer)
    assert (seen["peer"].address, seen["peer"].port) == seen["address"]
    assert seen["draining"] is False


def test_a_forked_handler_knows_the_same_id():
    """Parent and child speak of one connection by one name."""
    opened = []

    class Handler(BaseRequestHandler):
        def handle(self):
            self.request.sendall(f"{self.connection_id} {self.peer}".encode())

    end = harken.events.subscribe(opened.append, "opened")
    try:
        answer = serve_one(Handler, kind=harken.ForkingTCPServer)
    finally:
        end()
    assert answer.decode() == f"{opened[0].connection} {opened[0].peer}"


def test_the_logger_carries_id_and_peer(caplog):
    """Each record has them as attributes."""
    seen = []

    class Handler(BaseRequestHandler):
        def handle(self):
            seen.append(self.connection_id)
            self.logger.warning("said %s", "this")

    serve_one(Handler)
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("harken.handler", "said this")
    assert record.connection == seen[0]
    assert record.peer.startswith("127.0.0.1:")


def test_attributes_of_the_handlers_own_win():
    """Old programs set ``self.peer`` and ``self.logger`` for themselves, before and after setup."""

    class Handler(BaseRequestHandler):
        logger = "the class's"

        def setup(self):
            self.peer = "the handler's"
            self.connection_id = 7
            self.draining = "no"

        def handle(self):
            assert (self.peer, self.connection_id, self.draining) == ("the handler's", 7, "no")
            self.request.sendall(str(self.logger).encode())

    assert serve_one(Handler) == b"the class's"


def test_a_handler_on_a_datagram_has_a_peer_and_no_id():
    """A datagram is no connection."""
    seen = []

    class Handler(DatagramRequestHandler):
        def handle(self):
            seen.append((self.connection_id, self.peer.address, self.peer.port))
            self.logger.debug("said")

    with harken.UDPServer(LOCAL, Handler) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.sendto(b"x", server.server_address)
        server.handle_request()
        assert seen == [(None, "127.0.0.1", client.getsockname()[1])]


@pytest.mark.parametrize("server", [None, types.SimpleNamespace()], ids=["None", "a stand-in"])
def test_on_fakes_the_added_attributes_do_no_harm(server):
    """Unit tests make ``Handler(fake, ("1.2.3.4", 5), None)``; a handler that logs works there too."""
    seen = []

    class Handler(BaseRequestHandler):
        def handle(self):
            seen.append((self.connection_id, self.draining))
            self.logger.debug("under test")
            seen.append((self.peer.address, self.peer.port))

    Handler(Fake(), ("1.2.3.4", 5), server)
    assert seen == [(None, False), ("1.2.3.4", 5)]


@pytest.mark.parametrize("kind", [BaseRequestHandler, DatagramRequestHandler], ids=lambda kind: kind.__name__)
def test_before_its_constructor_a_handler_can_be_looked_through(kind):
    """Command shells collect their commands by ``dir(self)`` before they call ``BaseRequestHandler.__init__``."""

    class Shell(kind):
        def __init__(self, *args):
            self.commands = [name for name in dir(self) if getattr(getattr(self, name), "is_command", False)]
            super().__init__(*args)

        def hello(self):
            """A command."""

        hello.is_command = True

        def handle(self):
            self.read = getattr(self, "rfile", io.BytesIO()).read()

    shell = Shell((b"ping", Fake()) if kind is DatagramRequestHandler else Fake(), "", None)
    assert shell.commands == ["hello"]
    assert shell.read == (b"ping" if kind is DatagramRequestHandler else b"")
    assert shell.peer is not None


def test_the_class_says_what_its_attributes_are():
    """On the class they are descriptions, with a docstring."""
    for name in ("connection_id", "peer", "draining", "logger"):
        assert getattr(BaseRequestHandler, name).__doc__


def test_logging_is_not_imported_before_it_is_used(run_program):
    """A handler that does not log costs no logging."""
    program = "import sys, harken\nharken.BaseRequestHandler(None, None, None)\nprint('logging' in sys.modules)\n"
    assert run_program("-c", program).communicate(timeout=20)[0] == "False\n"


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_handler_reads_and_writes():
    """``rfile`` and ``wfile``, and ``connection`` is the request."""

    class Handler(StreamRequestHandler):
        def handle(self):
            assert self.connection is self.request
            for line in self.rfile:
                assert self.wfile.write(line.upper()) == len(line)

    assert serve_one(Handler, b"one\ntwo\n") == b"ONE\nTWO\n"


def test_defaults_are_stdlibs():
    """Buffers, timeout and Nagle."""
    assert (StreamRequestHandler.rbufsize, StreamRequestHandler.wbufsize) == (-1, 0)
    assert StreamRequestHandler.timeout is None
    assert StreamRequestHandler.disable_nagle_algorithm is False


def test_setup_needs_makefile_and_sendall_only():
    """Nothing else of a fake is touched by default."""
    fake = Fake(b"data")
    handler = StreamRequestHandler(fake, None, None)
    assert fake.calls == [("rb", -1)]
    assert handler.wfile.closed
    assert handler.rfile.closed


def test_options_reach_the_socket():
    """timeout, disable_nagle_algorithm, rbufsize and wbufsize."""
    fake = Fake()
    options = {"timeout": 3, "disable_nagle_algorithm": True, "rbufsize": 0, "wbufsize": 10}
    type("Handler", (StreamRequestHandler,), options)(fake, None, None)
    assert fake.calls == [3, (socket.IPPROTO_TCP, socket.TCP_NODELAY, True), ("rb", 0), ("wb", 10)]


def test_a_buffered_wfile_is_sent_by_finish():
    """What the handler left in it arrives."""

    class Handler(StreamRequestHandler):
        wbufsize = 4096

        def handle(self):
            self.wfile.write(b"left in the buffer")

    assert serve_one(Handler) == b"left in the buffer"


def test_finish_is_silent_when_the_peer_has_gone():
    """And when the handler closed the files itself."""

    class Gone(io.BytesIO):
        def flush(self):
            if not self.closed:
                raise BrokenPipeError

    class Handler(StreamRequestHandler):
        def handle(self):
            self.wfile = Gone()

    handler = Handler(Fake(), None, None)
    assert handler.rfile.closed

    class Closing(StreamRequestHandler):
        def handle(self):
            self.rfile.close()
            self.wfile.close()

    assert serve_one(Closing) == b""


def test_the_writer_counts_bytes_and_wraps():
    """write() takes any buffer and returns its bytes; a text wrapper works on it."""
    fake = Fake()
    writer = harken._SocketWriter(fake)
    assert writer.writable()
    assert writer.fileno() == 77
    assert writer.write(memoryview(b"ab")) == 2
    import array

    assert writer.write(array.array("i", [1, 2])) == 8
    with io.TextIOWrapper(writer, write_through=True) as text:
        text.write("text")
        assert fake.sent.endswith(b"text")


def test_a_writer_that_a_program_puts_in_the_module_is_used(monkeypatch):
    """``socketserver._SocketWriter`` is replaced in the wild."""

    class Loud(harken._SocketWriter):
        def write(self, data):
            return super().write(bytes(data).upper())

    monkeypatch.setattr(harken, "_SocketWriter", Loud)

    class Handler(StreamRequestHandler):
        def handle(self):
            self.wfile.write(b"loud")

    assert serve_one(Handler) == b"LOUD"


# ── datagrams ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Datagrams:
    """A socket that notes answers."""

    def __init__(self, error=None):
        self.sent, self.error = [], error

    def sendto(self, data, address):
        if self.error:
            raise self.error
        self.sent.append((data, address))


def test_a_datagram_handler_answers_once():
    """What was written goes out as one datagram, also an empty one."""

    class Handler(DatagramRequestHandler):
        def handle(self):
            self.wfile.write(self.rfile.read().upper())
            self.wfile.write(b"!")

    sock = Datagrams()
    handler = Handler((b"data", sock), ("there", 1), None)
    assert handler.packet == b"data"
    assert handler.socket is sock
    DatagramRequestHandler((b"data", sock), ("there", 2), None)
    assert sock.sent == [(b"DATA!", ("there", 1)), (b"", ("there", 2))]


@pytest.mark.parametrize("error", [ConnectionRefusedError(), FileNotFoundError()], ids=repr)
def test_a_client_that_has_gone_is_no_error(error):
    """A Unix client that vanished, or a port that is closed."""
    DatagramRequestHandler((b"data", Datagrams(error)), "/gone", None)


@pytest.mark.parametrize("address", ["", None])
def test_a_client_without_an_address_gets_no_answer(address):
    """An unbound Unix client cannot be answered."""
    sock = Datagrams()
    DatagramRequestHandler((b"data", sock), address, None)
    assert sock.sent == []


def test_other_errors_are_the_handlers():
    """They go to handle_error()."""
    with pytest.raises(PermissionError):
        DatagramRequestHandler((b"data", Datagrams(PermissionError())), ("there", 1), None)


def test_the_logger_is_a_child_of_harkens():
    """So that one level and one handler rule both."""
    root_of_ours = logging.getLogger("harken")

    class Handler(BaseRequestHandler):
        def handle(self):
            seen.append(self.logger.logger.parent)

    seen = []
    serve_one(Handler)
    assert seen == [root_of_ours]
