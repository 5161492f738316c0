"""The end of a program whose hub is kept at its door by a client that says nothing."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable

import pytest

PATIENCE = 15.0  # seconds

# A listener that speaks TLS itself waits in accept() for the handshake, and a hook that serves by itself for a request.
PROGRAM = """
import ssl, sys, threading
import harken

class Silent(harken.StreamRequestHandler):
    def handle(self):
        print("kept", flush=True)
        self.rfile.readline()

class Alone(harken.TCPServer):
    def process_request(self, request, client_address):
        self.finish_request(request, client_address)

class Shaking(ssl.SSLSocket):
    def do_handshake(self, block=False):
        print("kept", flush=True)
        super().do_handshake(block)

engine, kept, thread = sys.argv[1:]
server = (Alone if kept == "hook" else harken.TCPServer)(("127.0.0.1", 0), Silent, engine=engine)
if kept == "handshake":
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = Shaking
    server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
if thread == "daemon":
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.readline()
    print("left")
else:
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("left")
    server.server_close()
"""


@pytest.mark.parametrize("kept", ["handshake", "hook"])
@pytest.mark.parametrize("thread", ["main", "daemon"])
@pytest.mark.parametrize("engine", ["green", "asyncio"])
def test_the_program_ends_all_the_same(
    run_program: Callable[..., subprocess.Popen[str]], engine: str, thread: str, kept: str
) -> None:
    """By Ctrl-C where the main thread serves, by the main thread's end where a daemon does."""
    process = run_program("-c", PROGRAM, engine, kept, thread, stdin=subprocess.PIPE)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    with socket.create_connection(("127.0.0.1", port), PATIENCE):
        assert process.stdout.readline() == "kept\n"
        if thread == "main":
            process.send_signal(signal.SIGINT)
        out, errors = process.communicate("\n" if thread == "daemon" else None, timeout=PATIENCE)
    assert (process.returncode, out) == (0, "left\n"), errors
