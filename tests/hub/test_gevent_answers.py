"""Answers in gevent's loop, where a handler may wait without the hub."""

from __future__ import annotations

import pytest

from .patched import FILL, run

UNSEEN = """
from gevent.event import Event
ready, go_on = Event(), Event()

class Lines(harken.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line)
            go_on.wait(20)

class Stream(harken.BaseRequestHandler):
    def handle(self):
        ready.wait(20)
        for _ in range(16):
            self.request.sendall(self.request.recv(4096))
        go_on.wait(20)

def look(handler, sent):
    ready.clear(), go_on.clear()
    with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), handler)) as server:
        with socket.create_connection(server.server_address, 10) as client:
            client.sendall(sent)
            ready.set()
            got = b""
            try:
                while len(got) < len(sent):
                    got += client.recv(len(sent) - len(got))
                    if got == b"first\\n":
                        break
            except TimeoutError:
                pass
            go_on.set()
    return got

print(look(Lines, b"first\\nsecond\\n"), len(look(Stream, bytes(16 * 4096))))
"""

STUCK = (
    FILL
    + """
greeted = []

class Echo(harken.BaseRequestHandler):
    def handle(self):
        mine = self.request.recv(1)
        greeted.append(mine)
        while request := self.request.recv(4):
            if (mine, request) == (b"a", b"fill"):
                fill(self.request)
                continue
            self.request.sendall(request)
            if (mine, request) == (b"a", b"last"):
                go.wait(20)
                {then}

def ask(word):
    for client in a, b:
        client.sendall(word)

with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Echo)) as server:
    a, b = connect(server), connect(server)
    a.sendall(b"a"), b.sendall(b"b")
    while len(greeted) < 2:
        time.sleep(0.01)
    for number in range(20):  # from then on answers are put off
        word = b"%04d" % number
        ask(word)
        assert read(a, 4) == read(b, 4) == word
    a.sendall(b"fill")
    full.wait(20)
    ask(b"last")
    print(read(b, 4))
    b.sendall(b"next")
    print(read(b, 4))
    if {early}:
        go.set()
        time.sleep(0.1)
    print(read(a, sum(filled) + {size})[sum(filled):])
    go.set()
"""
)

JOINED = (
    FILL
    + """
seen = []

class Lines(harken.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line == b"fill\\n":
                fill(self.request)
                continue
            self.wfile.write(line)
            if line == b"first\\n":
                with contextlib.suppress(BlockingIOError):
                    seen.append(client._sock.recv(100, socket.MSG_PEEK | socket.MSG_DONTWAIT))
            if line == b"last\\n":
                go.wait(20)

with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Lines)) as server:
    client = connect(server)
    client.sendall(b"first\\nsecond\\n")
    print(read(client, 13), seen)
    client.sendall(b"fill\\n")
    full.wait(20)
    client.sendall(b"last\\nmore\\n")
    time.sleep(0.1)
    print(read(client, sum(filled) + 5)[sum(filled):])
    go.set()
    print(read(client, 5))
"""
)

THROWN = """
from gevent.event import Event
go = Event()

class Lines(harken.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            with contextlib.suppress(TimeoutError), green.timeout(0.01):
                green.sleep(20)
            self.wfile.write(line)
            go.wait(20)

with harken.background(harken.GreenTCPServer(("127.0.0.1", 0), Lines)) as server:
    with socket.create_connection(server.server_address, 5) as client:
        client.sendall(b"first\\nsecond\\n")
        print(client.recv(100))
        go.set()
        print(client.recv(100))
"""

STREAM = (
    FILL
    + """
PIECE = 65536
ready, kept = Event(), Event()

class Stream(harken.BaseRequestHandler):
    def handle(self):
        ready.wait(20)
        green.sleep()
        for number in range(13):
            if number == 12:
                fill(self.request)
            piece = self.request.recv(PIECE)
            assert len(piece) == PIECE, len(piece)
            if number == 12:
                kept.set()
            self.request.sendall(piece)
        go.wait(20)
        self.request.sendall(b"more")

with harken.GreenTCPServer(("127.0.0.1", 0), Stream) as server, harken.background(server):
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    client = connect(server)
    for number in range(13):
        client.sendall(bytes([number]) * PIECE)
    ready.set()
    print(all(read(client, PIECE) == bytes([number]) * PIECE for number in range(12)))
    kept.wait(20)
    time.sleep(0.1)
    print(read(client, sum(filled) + PIECE)[sum(filled):] == bytes([12]) * PIECE)
    go.set()
    print(read(client, 4))
"""
)

# What A's handler does after its wait in gevent, whether it does so before its client reads, and what that then reads.
AFTER = {
    "waits": ("pass", False, b"last"),
    "ends": ("return", True, b"last"),
    "goes on": ('self.request.sendall(b"more")', True, b"lastmore"),
    "asks for the descriptor": ("self.request.fileno()", True, b"last"),
}


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_what_was_written_is_sent_before_gevent_waits(run_program, kind):
    """The hub does not see it when a handler gives up its turn there: nothing is kept for that moment."""
    assert run(run_program, "before", UNSEEN, kind) == f"b'first\\n' {16 * 4096}"


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
@pytest.mark.parametrize("after", AFTER)
def test_an_answer_without_room_keeps_nobody_waiting(run_program, after, kind):
    """A's client reads nothing, its handler answers and waits in gevent: B is served, and A's answer comes at last."""
    then, early, answer = AFTER[after]
    program = STUCK.replace("{then}", then).replace("{early}", str(early)).replace("{size}", str(len(answer)))
    assert run(run_program, "before", program, kind).splitlines() == ["b'last'", "b'next'", str(answer)]


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_answers_to_a_pipeline_are_joined(run_program, kind):
    """Until their handler waits in gevent, and what finds no room then is sent while it does."""
    seen = "[]" if kind == "compiled" else "[b'first\\n']"  # the hub in Python joins none there
    told = run(run_program, "before", JOINED, kind).splitlines()
    assert told == [f"b'first\\nsecond\\n' {seen}", "b'last\\n'", "b'more\\n'"]


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_the_last_piece_of_a_stream_is_sent(run_program, kind):
    """It finds no room, and its handler waits in gevent."""
    assert run(run_program, "before", STREAM, kind).splitlines() == ["True", "True", "b'more'"]


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_what_a_thrown_exception_has_written_is_sent(run_program, kind):
    """A deadline ends a wait in the hub, and the handler writes and waits in gevent."""
    assert run(run_program, "before", THROWN, kind).splitlines() == ["b'first\\n'", "b'second\\n'"]
