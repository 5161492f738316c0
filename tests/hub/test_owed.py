"""What the kernel does not take of an answer that was put off: it is sent, whole and in order, whatever comes."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time

import greenlet
import pytest

from harken import _hub
from harken._hub import locks

from .conftest import Stage
from .kit import PATIENCE
from .pairs import Pair


@pytest.fixture
def hub_stage():
    """A stage of the kind that locks use in this process."""
    made = Stage(sys.modules[_hub.Hub.__module__])
    yield made
    made.close()


class Stuck(Pair):
    """A pair whose client A does not read, until an answer of its handler finds no room."""

    def run(self, last, serve_a=None):
        """Warm up, leave no room for A's next answer, and let ``last(self)`` go on."""
        self.a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        self.far_a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)

        def filled(pair):
            size, full = 0, 0
            while full < 10:  # its client's kernel says that it has room by acknowledgements, which may be late
                full += 1
                with contextlib.suppress(BlockingIOError):
                    while True:
                        size += pair.a.send(bytes(1000), socket.MSG_DONTWAIT)
                        full = 0
                pair.hub.sleep(0.01)
            pair.size = size
            return last(pair)

        return super().run(filled, serve_a)

    def ask_both(self):
        """Ask both, and read what B has answered: A has answered before."""
        self.far_a.sendall(b"last")
        self.far_b.sendall(b"last")
        assert self.read(self.far_b) == b"last"
        self.hub.sleep(0.001)

    def rest(self, pieces):
        """Read what filled A's connection, and so many answers."""
        got = self.read(self.far_a, self.size // 4 + pieces)
        return got[self.size :]


def test_what_interrupts_a_handler_that_owes_cuts_no_answer(stage):
    """It is thrown at while its answer waits for room in a read: the answer goes before what it says next."""
    pair = Stuck(stage)
    greens, told = [], []

    def serve(connection):
        greens.append(greenlet.getcurrent())
        while True:
            try:
                request = connection.recv(4)
            except LookupError:
                connection.sendall(b"more")
                continue
            if not request:
                return
            try:
                connection.sendall(request)
            except LookupError:  # the hub in Python
                told.append("sendall")
                connection.sendall(request + b"more")

    def client(pair):
        pair.ask_both()
        assert stage.hub.throw(greens[0], LookupError("thrown"))
        stage.hub.sleep(0.001)
        return pair.rest(2)

    assert pair.run(client, serve)[2] == b"lastmore"
    assert told == ([] if pair.put_off is None else ["sendall"])


READERS = {
    "recv_into": lambda c: bytes((buffer := bytearray(100))[: c.recv_into(buffer)]),
    "recvfrom": lambda c: c.recvfrom(100)[0],
    "recvmsg": lambda c: c.recvmsg(100)[0],
}


@pytest.mark.parametrize("how", READERS)
def test_whatever_reads_sends_the_rest_first(stage, how):
    """The answer finds no room while its handler waits in another call than ``recv``; its client has it."""
    pair = Stuck(stage)

    def serve(connection):
        while request := READERS[how](connection):
            connection.sendall(request)

    def client(pair):
        pair.ask_both()
        return pair.rest(1)

    assert pair.run(client, serve)[2] == b"last"


def _blocking_off(pair):
    pair.a.setblocking(False)
    pair.hub.sleep(0.001)
    pair.a.setblocking(True)


def _timeout_on(pair):
    pair.a.settimeout(0.001)
    pair.hub.sleep(0.01)
    pair.a.settimeout(None)


@pytest.mark.parametrize("change", [_blocking_off, _timeout_on])
def test_a_timeout_that_is_set_later_cuts_no_answer(stage, change):
    """``sendall`` has returned without one: what it left unsent is not lost to the next one's."""
    pair = Stuck(stage)
    pair.ways["alast"] = lambda pair: change(pair) or pair.a.sendall(b"more")

    def client(pair):
        pair.ask_both()
        return pair.rest(2)

    assert pair.run(client)[2] == b"lastmore"


def test_what_comes_elsewhere_meanwhile_is_read(stage):
    """The handler goes on to read another connection, whose bytes come while its answer waits for room."""
    pair = Stuck(stage)
    other, far = stage.pair()
    pair.ways["alast"] = lambda pair: pair.seen.append(other.recv(100))

    def know_it(pair):
        pair.hub.call_at(time.monotonic() + 0.01, far.sendall, b"before")
        pair.seen.append(other.recv(100))

    pair.ways["a0000"] = know_it  # its descriptor is watched from now on, and told of once

    def client(pair):
        pair.ask_both()
        far.sendall(b"elsewhere")
        pair.hub.sleep(0.01)
        answer = pair.rest(1)
        pair.far_a.sendall(b"next")
        return answer, pair.read(pair.far_a)

    assert pair.run(client)[2] == (b"last", b"next")
    assert pair.seen == [b"before", b"elsewhere"]


@pytest.mark.parametrize("set_it", [True, False])
def test_a_wait_that_ends_meanwhile_has_ended(hub_stage, set_it):
    """The handler goes on to wait for an event, which is set, or too late, while its answer waits for room."""
    pair = Stuck(hub_stage)
    event = locks.Event()
    pair.ways["alast"] = lambda pair: pair.seen.append(event.wait(None if set_it else 0.001))

    def client(pair):
        pair.ask_both()
        if set_it:
            event.set()
        pair.hub.sleep(0.01)
        answer = pair.rest(1)
        pair.far_a.sendall(b"next")
        return answer, pair.read(pair.far_a)

    assert pair.run(client)[2] == (b"last", b"next")
    assert pair.seen == [set_it]


def test_another_writer_waits_for_what_a_reader_owes(stage):
    """Both send under one lock, which the handler gave back when its ``sendall`` had returned: nobody is told BUSY."""
    pair = Stuck(stage)
    lock, told = [], []

    def serve(connection):
        while request := connection.recv(4):
            lock.append(1)
            connection.sendall(request)
            lock.clear()

    def push():
        while lock:
            stage.hub.sleep(0.001)
        told.append("free")
        pair.a.sendall(b"push")
        told.append("sent")

    def client(pair):
        pair.ask_both()
        stage.hub.spawn(push)
        stage.hub.sleep(0.005)
        early = list(told)
        got = pair.rest(2)
        pair.far_a.sendall(b"next")
        return early, got, pair.read(pair.far_a)

    early, got, answer = pair.run(client, serve)[2]
    assert early == (["free"] if pair.put_off is None else [])
    assert (got, answer) == (b"lastpush", b"next")
    assert told == ["free", "sent"]


OUTSIDE = {
    "close": lambda pair: pair.a.close(),
    "fileno": lambda pair: pair.a.fileno(),
    "shutdown": lambda pair: pair.a.shutdown(socket.SHUT_WR),
    "timeout": lambda pair: pair.a.settimeout(1),
    "trace": lambda pair: pair.a.trace(False),
    "detach": lambda pair: os.close(pair.a.detach()),
}


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize("where", ["hub", "thread"])
def test_nobody_else_waits_for_a_client_that_does_not_read(stage, where, how):
    """The loop, or a thread, ends a connection whose handler owes: as during its ``sendall``, that waits for nobody."""
    pair = Stuck(stage)
    done = threading.Event()

    def act():
        OUTSIDE[how](pair)
        done.set()

    def start(pair):
        if where == "hub":
            stage.hub.call_soon(act)
        else:
            threading.Thread(target=act, daemon=True).start()
            done.wait(PATIENCE)

    pair.ways["blast"] = start
    rescue = threading.Timer(PATIENCE, pair.far_a.close)  # or this one would hang with the loop
    rescue.start()

    def client(pair):
        pair.ask_both()
        rescue.cancel()
        return done.is_set()

    assert pair.run(client)[2] is True
    rescue.join()


def test_what_is_offered_does_not_overtake_the_answer(stage):
    """``offer`` never waits, and leaves to its caller what cannot be sent in order."""
    pair = Pair(stage)

    def offer(pair):
        writer = pair.a.open_writer()
        assert getattr(writer, "offer", pair.a.sendall)(b"more") is None  # files of the hub in Python take no offers

    pair.ways["alast"] = offer
    assert pair.run(lambda pair: pair.ask(b"last", 2))[2] == (b"lastmore", b"last")
