"""Programs as they are found in the world, each started by ``harken run`` without a changed line.

Every one answers with the name of the module that it knows as ``socketserver``, so that a run on the standard
library's own would be seen.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
import textwrap
import threading
import time
import xmlrpc.client
from concurrent.futures import ThreadPoolExecutor

import pytest

SECONDS = 20  # for a program to come up, or to come up anew, on a busy machine

THREADED = ["thread", "pool", "fork"]


@pytest.fixture
def run(run_program, tmp_path):
    """Return a function that writes a program and starts it under ``harken run``."""

    def start(body, *arguments, engine=None):
        path = tmp_path / "prog.py"
        path.write_text(textwrap.dedent(body))
        options = ["--engine", engine] if engine else []
        return run_program("-m", "harken", "run", *options, path, *arguments, cwd=tmp_path)

    return start


def port_of(process, pattern=r"port (\d+)"):
    """Read what a program prints until it says on which port it serves."""
    found: list[str] = []

    def read():
        for line in process.stdout:
            found.append(line)
            if re.search(pattern, line):
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(SECONDS)
    match = re.search(pattern, "".join(found))
    if match is None:
        process.kill()
        pytest.fail(f"it did not come up: {found} {process.communicate()}", pytrace=False)
    return int(match[1])


def get(port, path="/"):
    """Fetch a page over a connection of its own.

    It comes from another address: a client that knocks at a free port of its own address may connect to itself.
    """
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS, source_address=("127.0.0.2", 0))
    try:
        client.request("GET", path)
        return client.getresponse().read().decode()
    finally:
        client.close()


def get_when(port, accept):
    """Fetch until the answer is one that ``accept`` takes: the server may not be up, or not be up again."""
    deadline = time.monotonic() + SECONDS
    answer = ""
    while time.monotonic() < deadline:
        try:
            answer = get(port)
        except (OSError, http.client.HTTPException):
            answer = ""
        if accept(answer):
            return answer
        time.sleep(0.05)
    return answer


@pytest.mark.parametrize("engine", [None, *THREADED])
def test_http_server_as_a_module(run_program, tmp_path, engine):
    """``harken run -m http.server`` serves files to many at once."""
    tmp_path.joinpath("page.txt").write_text("hello\n")
    options = ["--engine", engine] if engine else []
    process = run_program(
        "-m", "harken", "run", *options, "-m", "http.server", "0", "--bind", "127.0.0.1", cwd=tmp_path
    )
    port = port_of(process)
    with ThreadPoolExecutor(8) as many:
        assert list(many.map(lambda _: get(port, "/page.txt"), range(16))) == ["hello\n"] * 16


@pytest.mark.parametrize("engine", [None, *THREADED])
def test_the_ten_lines(run, engine):
    """What everybody learns: many clients at once, each with its own answers; Ctrl-C ends it while they are idle."""
    process = run(
        """
        import socketserver
        class MyServer(socketserver.BaseRequestHandler):
            def handle(self):
                while True:
                    data = self.request.recv(1024)
                    if not data:
                        break
                    self.request.sendall(data.upper())
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), MyServer)
        print("port", server.server_address[1], flush=True)
        server.serve_forever()
        """,
        engine=engine,
    )
    port = port_of(process)
    clients = [socket.create_connection(("127.0.0.1", port), timeout=SECONDS) for _ in range(5)]
    try:
        for number, client in enumerate(clients):
            client.sendall(b"client %d" % number)
        for number, client in enumerate(clients):
            assert client.recv(100) == b"CLIENT %d" % number
        began = time.monotonic()
        process.send_signal(2)
        process.wait(timeout=SECONDS)
        assert time.monotonic() - began < 5
        assert process.returncode == -2
    finally:
        for client in clients:
            client.close()


def test_a_plain_server_serves_one_at_a_time(run):
    """``TCPServer`` means one client after the other; a second one waits until the first has left."""
    process = run(
        """
        import socketserver
        class Echo(socketserver.BaseRequestHandler):
            def handle(self):
                while data := self.request.recv(1024):
                    self.request.sendall(data)
        with socketserver.TCPServer(("127.0.0.1", 0), Echo) as server:
            print("port", server.server_address[1], flush=True)
            server.serve_forever()
        """
    )
    port = port_of(process)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as first,
        socket.create_connection(("127.0.0.1", port), timeout=0.3) as second,
    ):
        first.sendall(b"1")
        assert first.recv(1) == b"1"
        second.sendall(b"2")
        with pytest.raises(TimeoutError):
            second.recv(1)
        first.close()
        second.settimeout(SECONDS)
        assert second.recv(1) == b"2"


@pytest.mark.parametrize("engine", [None, *THREADED])
def test_xmlrpc_with_threads(run, engine):
    """``xmlrpc.server`` with ``ThreadingMixIn``: a call that waits for another call shows that both run at once."""
    process = run(
        """
        import socketserver, threading, xmlrpc.server
        class Server(socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
            daemon_threads = True
        server = Server(("127.0.0.1", 0), logRequests=False)
        server.register_function(lambda word: word + " on " + socketserver.__name__, "say")
        print("port", server.server_address[1], flush=True)
        server.serve_forever()
        """,
        engine=engine,
    )
    port = port_of(process)
    idle = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    with idle, xmlrpc.client.ServerProxy(f"http://127.0.0.1:{port}") as proxy:
        assert proxy.say("hello") == "hello on harken"


def test_wsgiref(run):
    """``wsgiref.simple_server`` answers as ever."""
    process = run(
        """
        import socketserver
        from wsgiref.simple_server import make_server
        def app(environ, start):
            start("200 OK", [("Content-Type", "text/plain")])
            return [socketserver.__name__.encode()]
        with make_server("127.0.0.1", 0, app) as server:
            print("port", server.server_port, flush=True)
            server.serve_forever()
        """
    )
    port = port_of(process)
    assert [get(port), get(port)] == ["harken", "harken"]


def test_logging_config_listen(run):
    """``logging.config.listen`` takes a configuration over its socket, and ``stopListening`` ends it."""
    process = run(
        """
        import logging, logging.config, socketserver, sys, time
        thread = logging.config.listen(0)
        thread.start()
        thread.ready.wait(10)
        print("port", thread.port, flush=True)
        while not logging.getLogger("asked").isEnabledFor(logging.DEBUG):
            time.sleep(0.01)
        logging.config.stopListening()
        thread.join(10)
        print("done", thread.is_alive(), socketserver.__name__, flush=True)
        """
    )
    port = port_of(process)
    config = json.dumps({"version": 1, "loggers": {"asked": {"level": "DEBUG"}}}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
        client.sendall(struct.pack(">L", len(config)) + config)
        assert client.recv(1) == b""
    out, err = process.communicate(timeout=SECONDS)
    assert (out, err, process.returncode) == ("done False harken\n", "", 0)


WERKZEUG = """
import socketserver, sys
from werkzeug.serving import run_simple
VERSION = 1
def app(environ, start):
    start("200 OK", [("Content-Type", "text/plain")])
    return [f"{socketserver.__name__} {VERSION}".encode()]
if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=True, use_reloader=len(sys.argv) > 2, reloader_type="stat")
"""


@pytest.mark.parametrize("engine", [None, *THREADED])
def test_werkzeug(run, free_port, engine):
    """Werkzeug's development server, threaded, to many at once."""
    pytest.importorskip("werkzeug")
    run(WERKZEUG, str(free_port), engine=engine)
    assert get_when(free_port, bool) == "harken 1"
    with ThreadPoolExecutor(4) as many:
        assert set(many.map(lambda _: get(free_port), range(8))) == {"harken 1"}


def test_werkzeug_with_its_reloader(run, free_port, tmp_path):
    """The reloader's child runs on harken, and so does the one after a change."""
    pytest.importorskip("werkzeug")
    run(WERKZEUG, str(free_port), "reload")
    assert get_when(free_port, bool) == "harken 1"
    tmp_path.joinpath("prog.py").write_text(WERKZEUG.replace("VERSION = 1", "VERSION = 2"))
    assert get_when(free_port, lambda answer: answer == "harken 2") == "harken 2"


DJANGO = """
import socketserver, sys
import django
from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpResponse
from django.urls import path
VERSION = 1
if not settings.configured:
    settings.configure(DEBUG=True, ROOT_URLCONF=__name__, SECRET_KEY="x", ALLOWED_HOSTS=["*"], USE_TZ=True)
urlpatterns = [path("", lambda request: HttpResponse(f"{socketserver.__name__} {VERSION}"))]
if __name__ == "__main__":
    execute_from_command_line([sys.argv[0], *sys.argv[1:]])
"""


@pytest.mark.parametrize("options", [("--noreload",), ("--noreload", "--nothreading")], ids=" ".join)
def test_django(run, free_port, options):
    """Django's ``runserver``, threaded and not."""
    pytest.importorskip("django")
    run(DJANGO, "runserver", f"127.0.0.1:{free_port}", *options)
    assert get_when(free_port, bool) == "harken 1"


def test_django_with_its_reloader(run, free_port, tmp_path):
    """The reloader's child runs on harken, and so does the one after a change."""
    pytest.importorskip("django")
    run(DJANGO, "runserver", f"127.0.0.1:{free_port}")
    assert get_when(free_port, bool) == "harken 1"
    program = tmp_path.joinpath("prog.py")
    program.write_text(DJANGO.replace("VERSION = 1", "VERSION = 2"))

    def changed(answer):
        program.touch()  # the reloader compares with what it saw at its first look, which may come after our change
        return answer == "harken 2"

    assert get_when(free_port, changed) == "harken 2"


@pytest.mark.parametrize("engine", [None, "pool"])
@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
def test_dnslib(run, tcp, engine):
    """dnslib's DNS server, over UDP and TCP."""
    dnslib = pytest.importorskip("dnslib")
    process = run(
        f"""
        import socketserver
        from dnslib import RR
        from dnslib.server import BaseResolver, DNSLogger, DNSServer
        class Resolver(BaseResolver):
            def resolve(self, request, handler):
                reply = request.reply()
                reply.add_answer(*RR.fromZone(f"{{request.q.qname}} 60 TXT {{socketserver.__name__}}"))
                return reply
        server = DNSServer(Resolver(), "127.0.0.1", 0, tcp={tcp}, logger=DNSLogger("-request,-reply"))
        server.start_thread()
        print("port", server.server.server_address[1], flush=True)
        server.thread.join()
        """,
        engine=engine,
    )
    port = port_of(process)
    for name in ("one.example", "two.example"):
        question = dnslib.DNSRecord.question(name, "TXT")
        answer = dnslib.DNSRecord.parse(question.send("127.0.0.1", port, tcp=tcp, timeout=SECONDS))
        assert str(answer.rr[0].rdata) == '"harken"'
