"""Programs in processes that gevent has patched: what their tests share."""

from __future__ import annotations

PROLOGUE = {
    "before": "from gevent import monkey; monkey.patch_all()\nimport harken\n",
    "after": "import harken.engines.green, harken.server, harken.green\n"
    "from gevent import monkey; monkey.patch_all()\nimport harken\n",
}

SERVE = """
import contextlib, faulthandler, http.server, os, signal, socket, sys, threading, time, urllib.request
import gevent, requests
from harken import green
faulthandler.dump_traceback_later(40, exit=True)

@contextlib.contextmanager
def serving(function, server=harken.GreenTCPServer):
    class Handler(harken.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                self.wfile.write(f"{function(self, line.strip().decode())}\\n".encode())
    with harken.background(server(("127.0.0.1", 0), Handler)) as running:
        yield running

def ask(server, word="x"):
    with socket.create_connection(server.server_address, 20) as client, client.makefile("rb") as answers:
        client.sendall(word.encode() + b"\\n")
        return answers.readline().strip().decode()

def ask_at_once(server, count=10):
    began = time.monotonic()
    asking = [gevent.spawn(ask, server, str(number)) for number in range(count)]
    gevent.joinall(asking, timeout=20)
    return [one.value for one in asking], time.monotonic() - began
"""

# What leaves no room for an answer, and what clients do.
FILL = """
from gevent.event import Event
go, full, filled = Event(), Event(), []

def fill(connection):  # its client's kernel says that it has room by acknowledgements, which may be late
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    refused = 0
    while refused < 10:
        refused += 1
        with contextlib.suppress(BlockingIOError):
            while True:
                filled.append(connection.send(bytes(1000), socket.MSG_DONTWAIT))
                refused = 0
        green.sleep(0.01)
    full.set()

def read(client, count):
    got = b""
    with contextlib.suppress(TimeoutError):
        while len(got) < count and (piece := client.recv(count - len(got))):
            got += piece
    return got

def connect(server):
    client = socket.create_connection(server.server_address, 5)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    return client
"""


def run(run_program, order, text, kind=None, loop=None):
    """Run a program in a patched process; return its output."""
    program = PROLOGUE[order] + SERVE + text
    asked = {"HARKEN_HUB": kind, "GEVENT_LOOP": loop}
    process = run_program("-W", "ignore", "-c", program, env={name: value for name, value in asked.items() if value})
    out, errors = process.communicate(timeout=50)
    assert process.returncode == 0, out + errors
    return out.strip()
