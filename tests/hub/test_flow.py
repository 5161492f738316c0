"""Large pieces of a stream that passes through go on together, and nobody can tell but by looking in between."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import tracemalloc

import greenlet
import pytest

from .kit import BIG, PATIENCE, drain

PIECE = 4096  # bytes of one read, and the smallest that are kept
WARM = 10  # pieces that pass before any is kept; with four more they fit into a first window of TCP
KEEPS = "harken._hub.compiled"  # the hub in Python sends at once


def numbered(number):
    """Return a piece that tells its place."""
    return b"%08d" % number * (PIECE // 8)


class Stream:
    """A connection whose client has sent all its pieces before the handler reads the first."""

    def __init__(self, stage, pieces=WARM + 4):
        self.stage, self.hub, self.pieces = stage, stage.hub, pieces
        self.near, self.far = stage.pair()
        self.near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent = b"".join(numbered(number) for number in range(pieces))
        self.far.settimeout(PATIENCE)
        self.feeder = threading.Thread(target=self.feed)
        self.feeder.start()
        if len(self.sent) < 60_000:
            self.feeder.join()
        self.got = b""

    def feed(self):
        """Send all, unless nobody reads it any more."""
        with contextlib.suppress(ConnectionError):
            self.far.sendall(self.sent)

    @property
    def keeps(self):
        """Whether this hub keeps pieces."""
        return type(self.hub).__module__ == KEEPS

    def arrived(self):
        """Read what has come back by now; return how many pieces that is in all."""
        self.far.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while part := self.far.recv(1 << 20):
                self.got += part
        return len(self.got) // PIECE

    def copy(self, count, send=None):
        """Pass so many pieces on, or what a read gives of them."""
        left = count * PIECE
        while left > 0:
            piece = self.near.recv(PIECE)
            left -= len(piece)
            (send or self.near.sendall)(piece)

    def run(self, handler, *others):
        """Run ``handler(self)`` in a green thread; return what it returned, or raised."""
        return self.stage.run(lambda: handler(self), *others)[0]


@pytest.fixture
def stream(stage):
    """A stream of some pieces."""
    made = Stream(stage)
    assert made.run(lambda stream: stream.copy(WARM)) is None
    assert made.arrived() == WARM
    return made


def test_pieces_are_kept_while_more_lies_ready(stream):
    """After the last there is nothing to read, and all that was kept goes before the handler waits for more."""

    def handler(stream):
        stream.near.sendall(stream.near.recv(PIECE))
        first = stream.arrived()
        for _ in range(3):
            stream.near.sendall(stream.near.recv(PIECE))
        stream.hub.call_at(0, stream.far.sendall, b"end")
        return first, stream.near.recv(PIECE), stream.arrived()

    first, end, arrived = stream.run(handler)
    assert first == WARM + (not stream.keeps)
    assert (end, arrived) == (b"end", WARM + 4)
    assert stream.got == stream.sent


def _in_a_thread(function, *args):
    thread = threading.Thread(target=function, args=args)
    thread.start()
    thread.join()


NEXT = {
    "sleep": lambda stream: stream.hub.sleep(0),
    "sleep longer": lambda stream: stream.hub.sleep(0.001),
    "fileno": lambda stream: stream.near.fileno(),
    "settimeout": lambda stream: stream.near.settimeout(PATIENCE),
    "setblocking": lambda stream: stream.near.setblocking(False),
    "trace": lambda stream: stream.near.trace(True),
    "shutdown": lambda stream: stream.near.shutdown(socket.SHUT_WR),
    "close": lambda stream: stream.near.close(),
    "detach": lambda stream: os.close(stream.near.detach()),
    "dup": lambda stream: stream.near.dup().close(),
    "flush": lambda stream: stream.hub.flush_pending_nowait(),
    "a small one": lambda stream: stream.near.sendall(b"x"),
    "send": lambda stream: stream.near.send(b"x"),
    "sendmsg": lambda stream: stream.near.sendmsg([b"x"]),
    "a file": lambda stream: stream.near.open_writer().write(b"x"),
    "a thread": lambda stream: _in_a_thread(stream.near.sendall, b"x"),
    "fork": lambda stream: os.waitpid(os.fork() or os._exit(0), 0),
}


@pytest.mark.parametrize("how", NEXT)
def test_what_was_kept_goes_before_whatever_else_the_handler_does(stream, how):
    """It has arrived when that is done, and first."""

    def handler(stream):
        stream.copy(4)
        before = stream.arrived()
        NEXT[how](stream)
        return before, stream.arrived()

    assert stream.run(handler) == (WARM if stream.keeps else WARM + 4, WARM + 4)
    assert stream.got[: len(stream.sent)] == stream.sent


def test_a_handler_that_ends_has_sent_all(stream):
    """It neither closes nor waits."""
    stream.run(lambda stream: stream.near.sendall(stream.near.recv(PIECE)))
    assert stream.arrived() == WARM + 1


def test_no_piece_is_kept_again_once_a_handler_has_waited_for_something_else(stream):
    """What paces itself is no stream."""

    def handler(stream):
        stream.near.sendall(stream.near.recv(PIECE))
        stream.hub.sleep(0.001)
        stream.near.sendall(stream.near.recv(PIECE))
        return stream.arrived()

    assert stream.run(handler) == WARM + 2


@pytest.mark.parametrize(
    "change",
    [
        lambda near: near.settimeout(PATIENCE),
        lambda near: near.setblocking(False),
        lambda near: near.fileno(),
        lambda near: near.trace(True),
    ],
    ids=["timeout", "nonblocking", "lent", "traced"],
)
def test_nothing_is_kept_where_its_handler_could_learn_more(stream, change):
    """There each piece is sent by the call that gives it."""

    def handler(stream):
        change(stream.near)
        stream.near.sendall(stream.near.recv(PIECE))
        return stream.arrived()

    assert stream.run(handler) == WARM + 1


def test_pieces_for_another_connection_go_on_together_too(stage):
    """As in a proxy: what is read here is written there, and arrives whole."""
    stream, (out, target) = Stream(stage, 64), stage.pair()
    thread, got = drain(target, len(stream.sent))
    assert stream.run(lambda stream: stream.copy(64, out.sendall)) is None
    thread.join(PATIENCE)
    stream.feeder.join(PATIENCE)
    assert bytes(got) == stream.sent


def test_what_the_client_does_not_take_is_waited_for(stage):
    """Every byte arrives, in order, at a client that reads slowly; pieces are of all sizes."""
    near, far = stage.pair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    content = random.Random(7).randbytes(12_000_000)
    thread, got = drain(far, len(content))
    sender = threading.Thread(target=far.sendall, args=(content,))
    sender.start()
    sizes = random.Random(8)

    def handler():
        done = 0
        while done < len(content):
            piece = near.recv(sizes.choice((65536, 65536, 65536, 16384, 4096, 1000)))
            near.sendall(piece)
            done += len(piece)

    assert stage.run(handler, patience=30) == [None]
    sender.join(PATIENCE)
    near.close()
    thread.join(PATIENCE)
    assert bytes(got) == content


def test_a_large_object_is_sent_from_where_it_lies(stream):
    """What its client does not take at once is not copied to be sent later."""
    large, room = bytes(BIG), bytearray(65536)

    def read():
        left = PIECE + BIG
        while left > 0:
            left -= stream.far.recv_into(room)

    stream.far.settimeout(PATIENCE)
    reader = threading.Thread(target=read)

    def handler(stream):
        stream.near.sendall(stream.near.recv(PIECE))
        stream.near.recv(PIECE)
        reader.start()
        tracemalloc.start()
        try:
            stream.near.sendall(large)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert stream.run(handler) < BIG / 10
    reader.join(PATIENCE)
    assert not reader.is_alive()


def test_a_stream_that_is_interrupted_goes_on_where_it_was(stage):
    """Pieces have no room when a wait is broken off: none is lost, nor overtaken by what comes then."""
    stream = Stream(stage, 200)
    stream.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    greens, drained, sending = [], [], []

    def breaker():
        stage.hub.sleep(0.05)
        stage.hub.throw(greens[0], LookupError("broken off"))
        stage.hub.sleep(0.05)
        drained.extend(drain(stream.far, len(stream.sent) + 4))

    def handler(stream):
        passed = 0
        greens.append(greenlet.getcurrent())
        with contextlib.suppress(LookupError):
            while piece := stream.near.recv(PIECE):
                sending.append(len(piece))
                stream.near.sendall(piece)
                passed += sending.pop()
        stream.near.sendall(b"over")
        return passed

    passed = stream.run(handler, breaker)
    stream.near.shutdown(socket.SHUT_WR)
    thread, got = drained
    thread.join(PATIENCE)
    stream.near.close()
    stream.feeder.join(PATIENCE)
    assert bytes(got) == stream.sent[: len(got) - 4] + b"over"
    assert len(got) == passed + 4 or sending  # a sendall() that is itself broken off has sent what it could


def test_a_client_that_has_gone_is_told_by_the_next_use_of_its_connection(stream):
    """Not by what the handler waits for in between."""
    told = []

    def handler(stream):
        stream.near.sendall(stream.near.recv(PIECE))
        stream.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.far.close()
        stream.hub.sleep(0.001)
        told.append("slept")
        while True:
            stream.near.sendall(stream.near.recv(PIECE) or b"more")

    assert isinstance(stream.run(handler), ConnectionError)
    assert told == ["slept"]


def test_the_watchdog_sends_what_lies_while_a_handler_computes(stream):
    """Nobody waits for a handler that reads no more."""

    def watch():
        while (word := stream.hub.beat.watch()[0]) != "stopped":
            if word == "unsent":
                stream.hub.flush_pending_nowait()

    def handler(stream):
        stream.near.sendall(stream.near.recv(PIECE))
        while stream.arrived() < WARM + 1:
            pass
        return stream.arrived()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert stream.run(handler) == WARM + 1
    finally:
        stream.hub.beat.stop()
        thread.join()


def test_others_get_their_turn(stage):
    """One that copies without end keeps nobody waiting."""
    stream = Stream(stage, 1000)
    turns = []

    def other():
        while not turns or turns[-1] < 100:
            turns.append(len(turns))
            stream.hub.sleep(0)

    def handler(stream):
        thread, got = drain(stream.far, len(stream.sent))
        stream.copy(1000)
        seen = len(turns)
        stream.near.shutdown(socket.SHUT_WR)
        thread.join(PATIENCE)
        stream.feeder.join(PATIENCE)
        return seen, bytes(got) == stream.sent

    seen, whole = stream.run(handler, other)
    assert seen > 1
    assert whole
