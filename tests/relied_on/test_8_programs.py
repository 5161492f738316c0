"""Real programs in a process of their own, first on stdlib's `socketserver`, then with harken in its place."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import signal
import socket
import struct
import subprocess
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .kit import LOCAL, PATIENCE, ask, connect, free_port, join, python, run

pytestmark = pytest.mark.parametrize("name", ["stdlib", "harken"])


@contextlib.contextmanager
def program(name: str, text: str, *args: str, **keywords: Any) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a program that prints its port first; yield it and the port; check at the end that it did not fail."""
    child = python(name, text, *args, **keywords)
    try:
        assert child.stdout is not None
        port = child.stdout.readline().strip()
        assert port.isdigit(), port + (child.communicate(timeout=PATIENCE)[1] if child.poll() is not None else "")
        yield child, int(port)
    finally:
        child.kill()
        child.communicate(timeout=PATIENCE)


def get(port: int, path: str = "/") -> tuple[int, bytes]:
    """Fetch by HTTP from the loopback address."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read()
    finally:
        client.close()


def needs(module: str) -> None:
    """Skip when a third party's package is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs the Python package {module}: pip install {module}")


def stop(child: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[int, str]:
    """Send a signal; return the exit status and stderr."""
    child.send_signal(number)
    _, errors = child.communicate(timeout=PATIENCE)
    return child.returncode, errors


def test_the_ten_lines(name: str) -> None:
    """The program that everybody learns: many clients at once, each with its own answers; Ctrl-C ends it at once."""
    text = """
import socketserver
class MyServer(socketserver.BaseRequestHandler):
    def handle(self):
        while True:
            data = self.request.recv(1024)
            if not data:
                break
            self.request.sendall(data.upper())
server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), MyServer)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
"""
    with program(name, text) as (child, port):
        clients = [connect(("127.0.0.1", port)) for _ in range(20)]
        for turn in range(3):
            for number, client in enumerate(clients):
                client.sendall(b"client %d turn %d" % (number, turn))
            for number, client in enumerate(clients):
                assert client.recv(100) == b"CLIENT %d TURN %d" % (number, turn)
        _, errors = stop(child)
        assert "KeyboardInterrupt" in errors
        for client in clients:
            client.close()


@pytest.mark.parametrize("server", ["HTTPServer", "ThreadingHTTPServer"])
def test_http_server(name: str, server: str, tmp_path: Path) -> None:
    """http.server serves files, and several requests on one connection."""
    (tmp_path / "page.html").write_text("<p>a page</p>")
    text = f"""
import functools, http.server
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
http.server.SimpleHTTPRequestHandler.protocol_version = "HTTP/1.1"
with http.server.{server}(("127.0.0.1", 0), handler) as server:
    print(server.server_port, flush=True)
    server.serve_forever()
"""
    with program(name, text, str(tmp_path)) as (_, port):
        assert get(port, "/page.html") == (200, b"<p>a page</p>")
        assert get(port, "/none")[0] == 404
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        for _ in range(3):
            client.request("GET", "/page.html")
            assert client.getresponse().read() == b"<p>a page</p>"
        client.close()


def test_http_server_as_a_module(name: str, tmp_path: Path) -> None:
    """`python -m http.server` with harken in place: serves, logs, and ends by Ctrl-C with its own words."""
    (tmp_path / "file").write_text("by module")
    port = free_port()
    text = (
        "import runpy\nsys.argv = ['http.server', *sys.argv[1:]]\nrunpy.run_module('http.server', run_name='__main__')"
    )
    child = python(name, text, str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path))
    try:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("Serving HTTP on 127.0.0.1")
        assert get(port, "/file") == (200, b"by module")
        child.send_signal(signal.SIGINT)
        out, errors = child.communicate(timeout=PATIENCE)
    finally:
        child.kill()
    assert "Keyboard interrupt received, exiting." in out
    assert '"GET /file HTTP/1.1" 200' in errors
    assert "Traceback" not in errors


def test_xmlrpc_server(name: str) -> None:
    """`class Server(ThreadingMixIn, SimpleXMLRPCServer)` answers calls, a long one beside a short one."""
    text = """
import socketserver, threading, xmlrpc.server
class Server(socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    daemon_threads = True
gate = threading.Event()
server = Server(("127.0.0.1", 0), logRequests=False, allow_none=True)
server.register_function(pow)
server.register_function(lambda: gate.wait(10), "wait")
server.register_function(lambda: gate.set(), "release")
print(server.server_address[1], flush=True)
server.serve_forever()
"""
    with program(name, text) as (_, port):
        url = f"http://127.0.0.1:{port}"
        with xmlrpc.client.ServerProxy(url) as one, xmlrpc.client.ServerProxy(url, allow_none=True) as two:
            waited: list[Any] = []
            thread = run(lambda: waited.append(one.wait()))
            assert two.pow(2, 16) == 65536
            two.release()
            join(thread)
        assert waited == [True]


def test_wsgiref(name: str) -> None:
    """wsgiref's server runs an application, `handle_request` and `serve_forever`."""
    text = """
from wsgiref.simple_server import make_server, demo_app
with make_server("127.0.0.1", 0, demo_app) as server:
    print(server.server_port, flush=True)
    server.handle_request()
    server.serve_forever()
"""
    with program(name, text) as (_, port):
        for _ in range(3):
            status, body = get(port, "/path?x=1")
            assert status == 200
            assert body.startswith(b"Hello world!")
            assert b"QUERY_STRING = 'x=1'" in body


def test_logging_config_listen(name: str) -> None:
    """logging.config.listen takes a configuration, applies it, and stops in bounded time."""
    text = """
import logging, logging.config, threading
thread = logging.config.listen(int(sys.argv[1]))
thread.start()
thread.ready.wait()
print(thread.port, flush=True)
input()
logging.getLogger("told").debug("configured")
logging.config.stopListening()
thread.join(10)
print("stopped" if not thread.is_alive() else "still alive", flush=True)
"""
    config = {
        "version": 1,
        "formatters": {"f": {"format": "%(name)s %(message)s"}},
        "handlers": {"h": {"class": "logging.StreamHandler", "formatter": "f", "stream": "ext://sys.stdout"}},
        "root": {"level": "DEBUG", "handlers": ["h"]},
    }
    with program(name, text, "0") as (child, port):
        data = json.dumps(config).encode()
        assert ask(("127.0.0.1", port), struct.pack(">L", len(data)) + data) == b""
        out, errors = child.communicate("\n", timeout=PATIENCE)
        assert out == "told configured\nstopped\n"
        assert errors == ""


def test_pydoc_server(name: str) -> None:
    """pydoc's server thread serves pages and stops."""
    text = """
import pydoc, urllib.request
def answer(url, content_type):
    return f"<p>{url} {content_type}</p>"
thread = pydoc._start_server(answer, "127.0.0.1", 0)
print(thread.port, flush=True)
input()
thread.stop()
print(thread.serving, flush=True)
"""
    with program(name, text) as (child, port):
        assert get(port, "/index.html") == (200, b"<p>/index.html text/html</p>")
        out, errors = child.communicate("\n", timeout=PATIENCE)
        assert out == "False\n"
        assert errors == ""


def test_asyncio_style_tls_server(name: str) -> None:
    """A UnixStreamServer that speaks HTTP, as asyncio's own tests build it, serves wsgiref's application."""
    text = """
import socketserver, tempfile, os, threading, socket
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        pass
class UnixHTTPServer(socketserver.UnixStreamServer, ):
    def server_bind(self):
        socketserver.UnixStreamServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", 80
class UnixWSGIServer(UnixHTTPServer, WSGIServer):
    request_queue_size = 100
    def server_bind(self):
        UnixHTTPServer.server_bind(self)
        self.setup_environ()
    def get_request(self):
        request, address = super().get_request()
        return request, ("127.0.0.1", "")
path = os.path.join(tempfile.mkdtemp(), "s")
def app(environ, start):
    start("200 OK", [("Content-type", "text/plain")])
    return [b"unix wsgi"]
with UnixWSGIServer(path, Quiet) as server:
    server.set_app(app)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.05))
    thread.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        answer = b""
        while data := client.recv(1000):
            answer += data
    server.shutdown()
    thread.join()
print(int(answer.endswith(b"unix wsgi")), flush=True)
"""
    with program(name, text) as (child, passed):
        _, errors = child.communicate(timeout=PATIENCE)
        assert passed == 1
        assert errors == ""


@pytest.mark.parametrize("threaded", ["True", "False"])
def test_werkzeug(name: str, threaded: str) -> None:
    """Werkzeug's development server answers, and ends by Ctrl-C without a traceback."""
    needs("werkzeug")
    text = f"""
import logging
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response
logging.getLogger("werkzeug").setLevel("ERROR")
@Request.application
def app(request):
    environment = request.environ
    return Response(f"{{request.path}} {{environment['wsgi.multithread']}} {{bool(environment['werkzeug.socket'])}}")
server = make_server("127.0.0.1", 0, app, threaded={threaded})
print(server.port, flush=True)
server.serve_forever()
"""
    with program(name, text) as (child, port):
        for _ in range(3):
            assert get(port, "/page") == (200, f"/page {threaded} True".encode())
        assert stop(child) == (0, "")


def test_werkzeug_forking_and_tls(name: str) -> None:
    """Werkzeug's forking server answers from a child; its TLS server wraps the listening socket."""
    needs("werkzeug")
    text = """
import logging, os, ssl, threading, urllib.request
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response
import trustme
logging.getLogger("werkzeug").setLevel("ERROR")
@Request.application
def app(request):
    return Response(f"{os.getpid()} {request.scheme}")
def fetch(server, url, **keywords):
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with urllib.request.urlopen(url, timeout=10, **keywords) as answer:
        text = answer.read().decode()
    server.shutdown()
    thread.join()
    return text
server = make_server("127.0.0.1", 0, app, threaded=False, processes=3)
pid, scheme = fetch(server, f"http://127.0.0.1:{server.port}/").split()
assert int(pid) != os.getpid() and server.max_children == 3 and scheme == "http"
authority = trustme.CA()
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
authority.issue_cert("127.0.0.1").configure_cert(context)
trust = ssl.create_default_context()
authority.configure_trust(trust)
server = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=context)
pid, scheme = fetch(server, f"https://127.0.0.1:{server.port}/", context=trust).split()
assert int(pid) == os.getpid() and scheme == "https"
print(1, flush=True)
"""
    with program(name, text) as (child, passed):
        _, errors = child.communicate(timeout=PATIENCE)
        assert (passed, errors) == (1, "")


def test_werkzeug_on_a_passed_descriptor(name: str) -> None:
    """Werkzeug's server on a descriptor, as its reloader passes it to the next process."""
    needs("werkzeug")
    text = """
import logging
from werkzeug.serving import make_server
from werkzeug.wrappers import Response
logging.getLogger("werkzeug").setLevel("ERROR")
server = make_server("127.0.0.1", 0, Response("passed"), threaded=True, fd=int(sys.argv[1]))
print(server.socket.getsockname()[1], flush=True)
server.serve_forever()
"""
    with socket.create_server(LOCAL) as listener:
        descriptor = listener.fileno()
        with program(name, text, str(descriptor), pass_fds=[descriptor]) as (_, port):
            assert port == listener.getsockname()[1]
            assert get(port) == (200, b"passed")


def test_django(name: str, tmp_path: Path) -> None:
    """Django's development server, threaded and keep-alive, answers a view."""
    needs("django")
    text = """
from django.conf import settings
settings.configure(DEBUG=True, SECRET_KEY="x", ROOT_URLCONF="__main__", ALLOWED_HOSTS=["*"], DATABASES={})
import django
django.setup()
from django.http import HttpResponse
from django.urls import path
from django.core.servers import basehttp
from django.core.wsgi import get_wsgi_application
import logging
logging.getLogger("django.server").setLevel("ERROR")
def view(request, number):
    return HttpResponse(f"django {number}")
urlpatterns = [path("view/<int:number>", view)]
def ready(server):
    print(server.server_port, flush=True)
basehttp.run("127.0.0.1", 0, get_wsgi_application(), threading=True, on_bind=lambda port: print(port, flush=True))
"""
    with program(name, text, cwd=tmp_path) as (child, port):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        for number in range(3):
            client.request("GET", f"/view/{number}")
            assert client.getresponse().read() == b"django %d" % number
        client.close()
        assert get(port, "/view/7") == (200, b"django 7")
        code, errors = stop(child)
        assert code != 0
        assert "KeyboardInterrupt" in errors


def test_django_live_server(name: str) -> None:
    """Django's ThreadedWSGIServer, as its live tests run it, serves and closes its connections."""
    needs("django")
    text = """
from django.conf import settings
settings.configure(SECRET_KEY="x", ALLOWED_HOSTS=["*"], DATABASES={})
import django
django.setup()
from django.test.testcases import LiveServerThread, QuietWSGIRequestHandler, _StaticFilesHandler
from django.core.servers.basehttp import ThreadedWSGIServer
import threading, urllib.request
server = ThreadedWSGIServer(("127.0.0.1", 0), QuietWSGIRequestHandler, allow_reuse_address=False)
def app(environ, start):
    start("200 OK", [("Content-Type", "text/plain")])
    return [b"live"]
server.set_app(app)
thread = threading.Thread(target=server.serve_forever)
thread.start()
with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", timeout=10) as answer:
    body = answer.read()
server.shutdown()
server.server_close()
thread.join()
print(int(body == b"live"), flush=True)
"""
    with program(name, text) as (child, passed):
        _, errors = child.communicate(timeout=PATIENCE)
        assert (passed, errors) == (1, "")


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_dnslib(name: str, transport: str) -> None:
    """dnslib's servers answer over UDP and TCP, and stop."""
    needs("dnslib")
    text = """
from dnslib import RR, DNSRecord
from dnslib.server import DNSServer, BaseResolver, DNSLogger
class Fixed(BaseResolver):
    def resolve(self, request, handler):
        reply = request.reply()
        reply.add_answer(*RR.fromZone("example.test. 60 A 192.0.2.7"))
        return reply
tcp = sys.argv[1] == "tcp"
server = DNSServer(Fixed(), port=0, address="127.0.0.1", tcp=tcp, logger=DNSLogger("-request,-reply,-truncated,-error"))
server.start_thread()
port = server.server.server_address[1]
for _ in range(3):
    answer = DNSRecord.parse(DNSRecord.question("example.test").send("127.0.0.1", port, tcp=tcp, timeout=10))
    assert str(answer.a.rdata) == "192.0.2.7", answer
assert server.isAlive()
server.stop()
server.thread.join(10)
assert not server.isAlive()
print(1, flush=True)
"""
    with program(name, text, transport) as (child, passed):
        _, errors = child.communicate(timeout=PATIENCE)
        assert (passed, errors) == (1, "")


def test_socketserver_examples_of_the_standard_library(name: str) -> None:
    """The logging cookbook's receiver: `serve_until_stopped` with select and `handle_request`, records by pickle."""
    text = """
import logging, logging.handlers, pickle, select, socketserver, struct, threading
got = threading.Semaphore(0)
records = []
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while len(chunk := self.connection.recv(4)) == 4:
            length = struct.unpack(">L", chunk)[0]
            data = b""
            while len(data) < length:
                data += self.connection.recv(length - len(data))
            records.append(logging.makeLogRecord(pickle.loads(data)).getMessage())
            got.release()
class Receiver(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    def __init__(self):
        socketserver.ThreadingTCPServer.__init__(self, ("127.0.0.1", 0), Handler)
        self.abort = 0
        self.timeout = 1
        self.logname = None
    def serve_until_stopped(self):
        abort = 0
        while not abort:
            ready, _, _ = select.select([self.socket.fileno()], [], [], 0.05)
            if ready:
                self.handle_request()
            abort = self.abort
receiver = Receiver()
thread = threading.Thread(target=receiver.serve_until_stopped)
thread.start()
logger = logging.getLogger("sender")
handler = logging.handlers.SocketHandler("127.0.0.1", receiver.server_address[1])
logger.addHandler(handler)
for number in range(3):
    logger.warning("record %d", number)
    assert got.acquire(timeout=10)
receiver.abort = 1
thread.join()
handler.close()
receiver.server_close()
assert records == ["record 0", "record 1", "record 2"]
print(1, flush=True)
"""
    with program(name, text) as (child, passed):
        _, errors = child.communicate(timeout=PATIENCE)
        assert (passed, errors) == (1, "")
