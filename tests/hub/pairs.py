"""Two connections whose clients ask in the same moment: what tests of a turn of the hub share."""

from __future__ import annotations

import contextlib
import socket
import struct

ROUNDS = 20  # more than a connection needs before its answers are put off
PUTS_OFF = "harken._hub.compiled"  # the hub in Python sends at once


class Pair:
    """Two connections whose clients always ask at the same moment, and the green threads that answer them."""

    def __init__(self, stage, **ways):
        self.stage, self.hub = stage, stage.hub
        self.a, self.far_a = stage.pair()
        self.b, self.far_b = stage.pair()
        self.a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or what follows an answer waits in the kernel
        self.far_a.setblocking(False)
        self.far_b.setblocking(False)
        self.seen = []
        self.ways = ways

    def serve(self, connection, name):
        """Answer each request by itself; what ``ways`` has under a request is called after its answer."""
        while request := connection.recv(100):
            connection.sendall(request)
            if way := self.ways.get(name + request.decode()):
                way(self)

    def ask(self, request, answers=1):
        """Send both a request, in one turn of the hub; return what comes from either."""
        self.far_a.sendall(request)
        self.far_b.sendall(request)
        return self.read(self.far_a, answers), self.read(self.far_b, 1)

    def read(self, far, pieces=1):
        """Read so many answers of four bytes, without keeping the hub."""
        got = b""
        for _ in range(10_000):
            with contextlib.suppress(BlockingIOError):
                got += far.recv(4 * pieces - len(got))
            if len(got) == 4 * pieces:
                break
            self.hub.sleep(0.0002)
        return got

    def end(self, far):
        """Return what comes last."""
        while True:
            with contextlib.suppress(BlockingIOError):
                return far.recv(100)
            self.hub.sleep(0.001)

    def reset(self):
        """Reset A's connection, as its client."""
        self.far_a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.far_a.close()

    def look(self):
        """Note whether the answer has reached A's client already."""
        try:
            self.seen.append(self.far_a.recv(100, socket.MSG_PEEK))
        except BlockingIOError:
            self.seen.append(None)

    def run(self, last, serve_a=None):
        """Warm up, then let ``last(self)`` ask; return the outcomes of A's handler, B's and of the client's."""

        def client():
            for number in range(ROUNDS):
                request = b"%04d" % number
                assert self.ask(request) == (request, request)
            try:
                return last(self)
            finally:
                self.far_a.close()
                self.far_b.close()

        return self.stage.run(
            lambda: self.serve(self.a, "a") if serve_a is None else serve_a(self.a),
            lambda: self.serve(self.b, "b"),
            client,
        )

    @property
    def put_off(self):
        """What ``look`` finds right after an answer."""
        return None if type(self.hub).__module__ == PUTS_OFF else b"last"


def last(pair):
    """Ask once more."""
    return pair.ask(b"last")


def ask_and_read_b(pair):
    """Ask both once more, where A's client reads nothing."""
    pair.far_a.sendall(b"last")
    pair.far_b.sendall(b"last")
    return pair.read(pair.far_b)
