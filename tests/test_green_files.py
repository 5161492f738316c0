"""``rfile`` and ``wfile`` on the green engine: the connection's own, and as good as stdlib's."""

from __future__ import annotations

import fcntl
import io
import os
import select
import socket
import subprocess
import sys
from typing import Any

import pytest

import harken
from harken import green

PATIENCE = 10.0  # seconds


def serve(handler: type, data: bytes, server: type = harken.GreenTCPServer) -> bytes:
    """Serve one client that sends ``data`` and ends; return all that it gets."""
    with harken.background(server(("127.0.0.1", 0), handler)) as running:
        with socket.create_connection(running.server_address, PATIENCE) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            got = b""
            while part := client.recv(10_000):
                got += part
            return got


def test_they_are_the_connections_own() -> None:
    """Buffered files to io, and no BufferedReader."""
    seen: list[Any] = []

    class Handler(harken.StreamRequestHandler):
        def handle(self) -> None:
            with self.request.open_reader() as own:
                seen.extend([self.rfile, self.wfile, own])
            for line in self.rfile:
                self.wfile.write(line.upper())

    assert serve(Handler, b"one\ntwo\nthree") == b"ONE\nTWO\nTHREE"
    rfile, wfile, own = seen
    assert isinstance(rfile, io.BufferedIOBase)
    assert isinstance(wfile, io.BufferedIOBase)
    assert type(rfile) is type(own)
    assert rfile.closed
    assert wfile.closed


def test_text_over_them() -> None:
    """`io.TextIOWrapper` on both sides."""

    class Handler(harken.StreamRequestHandler):
        def handle(self) -> None:
            with (
                io.TextIOWrapper(self.rfile, "utf-8", newline="\n") as lines,
                io.TextIOWrapper(self.wfile, "utf-8", newline="\n", write_through=True) as out,
            ):
                for line in lines:
                    print(line.rstrip("\n")[::-1], file=out)

    assert serve(Handler, "grüß\nGott\n".encode()) == "ßürg\nttoG\n".encode()


def test_without_a_buffer_nothing_is_read_ahead() -> None:
    """`rbufsize = 0`: a child that is given the descriptor finds the rest of the request there."""

    class Handler(harken.StreamRequestHandler):
        rbufsize = 0

        def handle(self) -> None:
            self.wfile.write(b"head: " + self.rfile.readline())
            child = [sys.executable, "-c", "import os; os.write(1, os.read(0, 100)[::-1])"]
            green.offload(lambda: subprocess.run(child, stdin=self.rfile, stdout=self.wfile, check=True))

    assert serve(Handler, b"head\nabc") == b"head: head\ncba"


def test_descriptors() -> None:
    """select() and fcntl() take the files, and what was written goes before the descriptor is used."""

    class Handler(harken.StreamRequestHandler):
        def handle(self) -> None:
            select.select([self.rfile], [], [], PATIENCE)  # what the client sends may come a moment later
            assert select.select([self.rfile], [self.wfile], [], PATIENCE)[:2] == ([self.rfile], [self.wfile])
            assert not fcntl.fcntl(self.rfile.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
            self.wfile.write(self.rfile.readline())  # another line is unread: it waits to be joined
            os.write(self.wfile.fileno(), b"then ")
            self.wfile.write(self.rfile.readline())

    assert serve(Handler, b"first\nsecond\n") == b"first\nthen second\n"


def test_a_buffered_wfile_is_stdlibs() -> None:
    """`wbufsize` asks for a buffer that is sent by `flush()` and `finish()`, and by nothing else."""

    class Handler(harken.StreamRequestHandler):
        wbufsize = 1000

        def handle(self) -> None:
            assert isinstance(self.wfile, io.BufferedWriter)
            self.wfile.write(b"in ")
            self.request.sendall(b"first ")
            self.wfile.write(b"order")

    assert serve(Handler, b"") == b"first in order"


@pytest.mark.parametrize("how", ["class", "write"])
def test_a_patched_socket_writer_is_used(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs replace `socketserver._SocketWriter`, or its `write`."""
    plain = harken._SocketWriter.write

    class Loud(harken._SocketWriter):
        def write(self, data: Any) -> int:
            return plain(self, bytes(data).upper())

    if how == "class":
        monkeypatch.setattr(harken, "_SocketWriter", Loud)
    else:
        monkeypatch.setattr(harken._SocketWriter, "write", Loud.write)

    class Handler(harken.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    assert serve(Handler, b"loud\n") == b"LOUD\n"


def test_a_handler_that_raises_has_said_what_it_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    """Answers that were joined are sent when the handler ends, however it does."""

    class Handler(harken.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())
            raise ValueError(self.rfile.readline())

    assert serve(Handler, b"said\nnext\nunread\n").startswith(b"said\n")
    assert "ValueError" in capsys.readouterr().err


def test_reading_and_writing_mixed_with_the_connection() -> None:
    """`recv` goes on where `rfile` ends, `sendall` comes after what `wfile` was given."""

    class Handler(harken.StreamRequestHandler):
        rbufsize = 4

        def handle(self) -> None:
            head = self.rfile.read(4)
            self.wfile.write(head)
            self.request.sendall(self.request.recv(100))
            self.wfile.write(b"!")

    assert serve(Handler, b"headbody") == b"headbody!"


def test_http_server_runs_on_them() -> None:
    """Three requests in one packet, of an unchanged `http.server` handler; a body is read to its length."""
    from http.server import BaseHTTPRequestHandler

    class Handler(harken.StreamRequestHandler, BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[::-1])

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        handle = BaseHTTPRequestHandler.handle

    request = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n\r\nabc"
    answers = serve(Handler, request * 3)
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.count(b"\r\n\r\ncba") == 3
