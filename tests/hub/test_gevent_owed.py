"""An answer that finds no room while its handler waits in gevent: who pays, whatever comes, and who does not wait."""

from __future__ import annotations

import pytest

from .patched import FILL, run

# "last" is owed while its handler, and so its connection, is in ``then``.
OWED = (
    FILL
    + """
seen, ended = [], Event()

class Lines(harken.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"fill\\n":
                seen.append(self.request)
                fill(self.request)
                continue
            self.wfile.write(line)
            if line == b"last\\n":
                then(self)

def owe():
    client = connect(server)
    client.sendall(b"fill\\n")
    full.wait(20)
    client.sendall(b"last\\nmore\\n")
    return client

with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Lines)) as server:
"""
)

INTERRUPTED = """
def interrupt(function):
    error = gevent.Timeout if HOW == "gevent" else TimeoutError
    try:
        with gevent.Timeout(0.1) if HOW == "gevent" else green.timeout(0.1):
            function()
    except error:
        seen.append("interrupted")

def then(handler):
    gevent.sleep(0.05)
    if WHAT == "sends":
        interrupt(lambda: handler.request.sendall(b"more"))
    else:
        interrupt(lambda: handler.request.recv(100))
    ended.set()
    go.wait(20)
"""
LOOK = """
    client = owe()
    ended.wait(20)
    print(seen[1:], read(client, sum(filled) + 5)[sum(filled):])
    go.set()
"""

OTHERS = """
ACTS = {
    "close": lambda: server.close_connection(server.connections()[0].id, "test"),
    "drain": lambda: server.drain(0.1).cut == 1,
    "fileno": lambda: seen[0].fileno() > 0,
    "timeout": lambda: seen[0].settimeout(3) is None,
}

def then(handler):
    ended.set()
    gevent.sleep(30)
"""
ACT = """
    client = owe()
    ended.wait(20)
    acting = gevent.spawn(ACTS[ACT])
    acting.join(10)
    print(acting.value)
    os._exit(0)  # the handler waits still
"""

AWAY = """
start, block = monkey.get_original("_thread", "start_new_thread"), monkey.get_original("time", "sleep")

def then(handler):
    gone = []
    start(lambda: gone.append(handler.request.detach()), ())
    while not gone:
        block(0.001)
    os.close(gone[0])
    ended.set()
    gevent.sleep(0.1)
"""
CLOSED = """
    client = owe()
    ended.wait(20)
    gevent.sleep(0.2)
    print("goes on")
"""


def owed(run_program, before, after, **names):
    """Run a program in which an answer is owed."""
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return run(run_program, "before", head + before + OWED + after)


@pytest.mark.parametrize("what", ["sends", "reads"])
@pytest.mark.parametrize("how", ["gevent", "green"])
def test_an_interrupted_wait_withholds_nothing(run_program, how, what):
    """It sends or reads on, which pays first, until a timeout; then it waits in gevent, and its client reads."""
    assert owed(run_program, INTERRUPTED, LOOK, HOW=how, WHAT=what) == "['interrupted'] b'last\\n'"


@pytest.mark.parametrize("act", ["close", "drain", "fileno", "timeout"])
def test_nobody_else_waits_for_the_client(run_program, act):
    """It does not read: who ends or changes the connection is not kept, as during a ``sendall``."""
    assert owed(run_program, OTHERS, ACT, ACT=act) == "True"


def test_a_thread_may_take_the_connection_away(run_program):
    """In the moment before its handler gives up its turn."""
    assert owed(run_program, AWAY, CLOSED) == "goes on"
