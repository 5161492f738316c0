"""What a turn receives first and sends last: nobody can tell, but by looking in between."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading

import greenlet
import pytest

from harken import _hub

from .conftest import Stage
from .kit import BIG, PATIENCE
from .pairs import ROUNDS, Pair, ask_and_read_b, last


def test_an_answer_goes_out_with_those_of_its_turn(stage):
    """A looks while B has yet to run: nothing is there; then both have their answers."""
    pair = Pair(stage, alast=Pair.look)
    assert pair.run(last) == [None, None, (b"last", b"last")]
    assert pair.seen == [pair.put_off]


def test_the_last_of_a_turn_answers_at_once(stage):
    """Where nobody waits for a turn, an answer is sent by the call that gives it."""
    pair = Pair(stage, blast=Pair.look)  # A's answer is not there while B still computes
    assert pair.run(last)[2] == (b"last", b"last")
    assert pair.seen == [pair.put_off]
    alone = Pair(stage, alast=Pair.look)

    def only_one(pair):
        pair.far_a.sendall(b"last")
        return pair.read(pair.far_a)

    assert alone.run(only_one)[2] == b"last"
    assert alone.seen == [b"last"]


def test_a_line_goes_out_with_those_of_its_turn(stage):
    """``wfile`` puts off what ``sendall`` would."""
    pair = Pair(stage)

    def lines(connection):
        with connection.open_reader() as reader, connection.open_writer(reader) as writer:
            for line in reader:
                writer.write(line)
                if line == b"las\n":
                    pair.look()

    pair.serve = lambda connection, name: lines(connection)

    def client():
        for _ in range(ROUNDS):
            assert pair.ask(b"one\n") == (b"one\n", b"one\n")
        answers = pair.ask(b"las\n")
        pair.far_a.close()
        pair.far_b.close()
        return answers

    outcomes = stage.run(lambda: lines(pair.a), lambda: lines(pair.b), client)
    assert outcomes == [None, None, (b"las\n", b"las\n")]
    assert pair.seen[0] == (None if pair.put_off is None else b"las\n")


# -- what the green thread does next, other than to read on ------------------------------------------------------------


def _spawn_unpark(pair):
    parked = []

    def other():
        pair.hub.unpark(parked[0])

    parked.append(greenlet.getcurrent())
    pair.hub.spawn(other)
    pair.hub.park()


def _wait_elsewhere(pair):
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"x")
        pair.hub.wait(near)


def _fork(pair):
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            pair.a.sendall(b"more")
        os._exit(0)
    os.waitpid(child, 0)


def _sendfile(pair):
    with tempfile.TemporaryFile() as file:
        file.write(b"more")
        file.seek(0)
        pair.a.sendfile(file)


def _write(pair):
    with pair.a.open_writer() as writer:
        writer.write(b"more")


def _from_a_thread(pair):
    thread = threading.Thread(target=pair.a.sendall, args=(b"more",))
    thread.start()
    thread.join()


def _dup(pair):
    with pair.a.dup() as other:
        other.sendall(b"more")


def _detach(pair):
    with socket.socket(fileno=pair.a.detach()) as plain:
        plain.sendall(b"more")


NEXT = {
    "a turn": lambda pair: pair.hub.sleep(0),
    "park": _spawn_unpark,
    "wait": _wait_elsewhere,
    "fileno": lambda pair: pair.a.fileno(),
    "flush": lambda pair: pair.hub.flush_pending_nowait(),
    "another's answer": lambda pair: pair.b.sendall(b"more") or pair.read(pair.far_b, 1),
}


@pytest.mark.parametrize("how", NEXT)
def test_the_answer_goes_before_whatever_else_the_handler_does(stage, how):
    """Its client has it by then; and it is not put off again, unless its handler only let others have their turn."""

    def act(pair):
        pair.look()
        NEXT[how](pair)
        pair.look()

    pair = Pair(stage, alast=act, aagai=Pair.look)

    def twice(pair):
        pair.far_a.sendall(b"last")
        pair.far_b.sendall(b"last")
        while len(pair.seen) < 2:  # what A's client reads A cannot see any more
            pair.hub.sleep(0.0002)
        answers = pair.read(pair.far_a)
        pair.read(pair.far_b, 1)
        assert answers == b"last"
        pair.far_a.sendall(b"agai")
        pair.far_b.sendall(b"agai")
        return pair.read(pair.far_a)

    assert pair.run(twice)[2] == b"agai"
    again = None if how == "a turn" and pair.put_off is None else b"agai"
    assert pair.seen == [pair.put_off, b"last", again]


MORE = {
    "sendall": lambda pair: pair.a.sendall(b"more"),
    "send": lambda pair: pair.a.send(b"more"),
    "sendmsg": lambda pair: pair.a.sendmsg([b"mo", b"re"]),
    "sendfile": _sendfile,
    "write": _write,
    "thread": _from_a_thread,
    "dup": _dup,
    "fork": _fork,
}


@pytest.mark.parametrize("how", MORE)
def test_what_follows_does_not_overtake_the_answer(stage, how):
    """Whatever else sends on the connection, from wherever, sends the answer first."""
    pair = Pair(stage, alast=MORE[how])
    assert pair.run(lambda pair: pair.ask(b"last", 2))[2] == (b"lastmore", b"last")


ENDS = {
    "close": lambda pair: pair.a.close(),
    "shutdown": lambda pair: pair.a.shutdown(socket.SHUT_WR),
    "detach": _detach,
    "end": lambda pair: getattr(pair.a, "end", pair.a.close)(),
}


@pytest.mark.parametrize("how", ENDS)
def test_an_end_comes_after_the_answer(stage, how):
    """The client reads the answer, and then the end."""
    pair = Pair(stage, alast=ENDS[how])

    def to_the_end(pair):
        pair.far_a.sendall(b"last")
        pair.far_b.sendall(b"last")
        expected = b"lastmore" if how == "detach" else b"last"
        return pair.read(pair.far_a, len(expected) // 4) == expected, pair.read(pair.far_b), pair.end(pair.far_a)

    assert pair.run(to_the_end)[2] == (True, b"last", b"")


def test_a_handler_that_ends_has_answered(stage):
    """It neither closes its connection nor waits again."""
    pair = Pair(stage)

    def serve(connection):
        while (request := connection.recv(100)) != b"last":
            connection.sendall(request)
        connection.sendall(request)

    assert pair.run(last, serve)[2] == (b"last", b"last")


def test_an_exception_that_ends_the_loop_loses_no_answer(stage):
    """Both have written when a signal handler, or a door, raises."""
    pair = Pair(stage)
    hub = stage.hub

    def stop():
        raise KeyboardInterrupt

    pair.ways["alast"] = lambda pair: hub.call_soon(stop)

    def client():
        for _ in range(ROUNDS):
            assert pair.ask(b"more") == (b"more", b"more")
        pair.far_a.sendall(b"last")
        pair.far_b.sendall(b"last")
        hub.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        stage.run(lambda: pair.serve(pair.a, "a"), lambda: pair.serve(pair.b, "b"), client)
    for far in (pair.far_a, pair.far_b):
        far.settimeout(PATIENCE)
        assert far.recv(100) == b"last"


def test_an_answer_is_there_before_what_is_called_at_the_end_of_the_turn(stage):
    """Callbacks and timers may take long."""
    pair = Pair(stage)
    pair.ways["blast"] = lambda pair: pair.hub.call_soon(pair.look)
    assert pair.run(last)[2] == (b"last", b"last")
    assert pair.seen == [b"last"]


def test_a_door_that_ends_the_loop_loses_no_answer(stage):
    """It raises before those have run to whom the same turn has brought something."""
    pair = Pair(stage)
    hub = stage.hub
    fars = []

    def client():
        for _ in range(ROUNDS):
            assert pair.ask(b"more") == (b"more", b"more")
        fars.append(socket.create_connection(listener.getsockname()))
        pair.far_a.sendall(b"last")
        pair.far_b.sendall(b"last")
        hub.sleep(60)

    def door():
        raise KeyboardInterrupt

    with socket.create_server(("127.0.0.1", 0)) as listener:
        hub.watch(listener, door)
        with pytest.raises(KeyboardInterrupt):
            stage.run(lambda: pair.serve(pair.a, "a"), lambda: pair.serve(pair.b, "b"), client)
        hub.unwatch(listener)
    fars[0].close()
    for far in (pair.far_a, pair.far_b):
        far.settimeout(PATIENCE)
        assert far.recv(100) == b"last"


def test_no_answer_lies_while_the_hub_sleeps(kind):
    """Not even where a green thread asks the kernel in the loop's place, as in a thread that gets no signals."""
    made, ready, done = [], threading.Event(), threading.Event()

    def run():
        made.append(Pair(Stage(kind)))
        pair = made[0]
        for connection, name in ((pair.a, "a"), (pair.b, "b")):
            pair.hub.spawn(pair.serve, connection, name)
        ready.set()
        pair.hub.run(done.is_set, lambda: 3600.0, lambda: None)
        pair.stage.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(PATIENCE)
    pair = made[0]
    for far in (pair.far_a, pair.far_b):
        far.settimeout(PATIENCE)
    for _ in range(100):
        pair.far_a.sendall(b"last")
        pair.far_b.sendall(b"last")
        assert (pair.far_a.recv(100), pair.far_b.recv(100)) == (b"last", b"last")
    done.set()
    pair.hub.wake()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_watchdog_sends_what_lies_while_a_handler_computes(stage):
    """B holds the hub until A's client has its answer."""
    pair = Pair(stage)
    news = []

    def compute(pair):
        pair.look()
        while pair.seen[-1] is None:
            pair.look()

    pair.ways["blast"] = compute

    def watch():
        while (word := stage.hub.beat.watch()[0]) != "stopped":
            news.append(word)
            if word == "unsent":
                stage.hub.flush_pending_nowait()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert pair.run(last)[2] == (b"last", b"last")
    finally:
        stage.hub.beat.stop()
        thread.join()
    assert pair.seen[-1] == b"last"
    assert ("unsent" in news) == (pair.put_off is None)


# -- where nothing is put off ------------------------------------------------------------------------------------------

PLAIN = {
    "timeout": lambda pair: pair.a.settimeout(PATIENCE),
    "nonblocking sender": lambda pair: pair.a.setblocking(False),
    "lent": lambda pair: pair.a.fileno(),
    "traced": lambda pair: pair.a.trace(True),
}


@pytest.mark.parametrize("how", PLAIN)
def test_nothing_is_put_off_where_its_handler_could_learn_more(stage, how):
    """There ``sendall`` sends at once, as often as it has before."""

    def change(pair):
        PLAIN[how](pair)
        if how == "nonblocking sender":
            pair.a.sendall(b"more")
            pair.look()
            pair.a.setblocking(True)
            pair.a.sendall(b"over")

    pair = Pair(stage, achan=change, alast=Pair.look)

    def client(pair):
        pair.ask(b"chan", 3 if how == "nonblocking sender" else 1)
        return pair.ask(b"last")

    assert pair.run(client)[2] == (b"last", b"last")
    if how == "nonblocking sender":
        assert pair.seen[0] == b"chanmore"
    else:
        assert pair.seen == [b"last"]


def test_large_answers_are_not_put_off(stage):
    """They gain nothing by that, and would hold memory."""
    pair = Pair(stage)
    big = b"x" * 8192

    def large(pair):
        pair.a.sendall(big)
        pair.look()

    pair.ways["alast"] = large

    def client(pair):
        pair.far_a.sendall(b"last")
        pair.far_b.sendall(b"last")
        got = b""
        while len(got) < 4 + len(big):
            with contextlib.suppress(BlockingIOError):
                got += pair.far_a.recv(65536)
            pair.hub.sleep(0)
        return got

    assert pair.run(client)[2] == b"last" + big
    assert pair.seen[0][:4] == b"last"
    assert len(pair.seen[0]) > 4


# -- when the kernel does not take it ----------------------------------------------------------------------------------


def test_a_client_that_does_not_read_is_waited_for(stage):
    """Its handler reads no further request while an answer is not sent, and all arrive, in order."""
    pair = Pair(stage)
    pair.a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    pair.far_a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    read = []

    def serve(connection):
        while request := connection.recv(4):
            read.append(request)
            connection.sendall(request * 1000)

    def client():
        for _ in range(ROUNDS):
            pair.far_a.sendall(b"warm")
            pair.far_b.sendall(b"warm")
            assert pair.read(pair.far_a, 1000) == b"warm" * 1000
            pair.read(pair.far_b)
        before = len(read)
        for number in range(100):
            pair.far_a.sendall(b"%04d" % number)
            pair.far_b.sendall(b"more")
            pair.read(pair.far_b)
        stuck = len(read) - before
        answers = pair.read(pair.far_a, 100_000)
        pair.far_a.close()
        pair.far_b.close()
        return stuck, answers

    outcomes = stage.run(lambda: serve(pair.a), lambda: pair.serve(pair.b, "b"), client)
    stuck, answers = outcomes[2]
    assert 0 < stuck < 100
    assert answers == b"".join(b"%04d" % number * 1000 for number in range(100))


def test_the_rest_of_an_answer_needs_no_further_request(stage):
    """What the kernel does not take goes out when the client reads, though it asks for nothing more."""
    pair = Pair(stage)
    pair.a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    sent = []

    def serve(connection):
        while request := connection.recv(100):
            if request == b"last":
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent.append(connection.send(b"fill" * 1000, socket.MSG_DONTWAIT))
            connection.sendall(request if request != b"last" else b"last" * 1000)

    def client(pair):
        pair.far_a.sendall(b"last")
        pair.far_b.sendall(b"last")
        pair.read(pair.far_b)
        return pair.read(pair.far_a, sum(sent) // 4 + 1000)

    assert pair.run(client, serve)[2][-4000:] == b"last" * 1000


def test_a_reset_is_raised_where_the_handler_reads_on(stage):
    """The client resets the connection before it can have had the answer."""
    pair = Pair(stage)

    pair.ways["alast"] = Pair.reset
    outcomes = pair.run(ask_and_read_b)
    assert isinstance(outcomes[0], ConnectionError)
    assert outcomes[2] == b"last"


def test_a_reset_is_no_error_of_what_the_handler_does_instead(stage):
    """A queue, a lock or a sleep tells nobody of a peer that has gone; the next use of the connection does."""
    pair = Pair(stage)
    told = []

    def sleep_first(pair):
        pair.reset()
        pair.hub.sleep(0.001)
        told.append("slept")
        pair.a.sendall(b"more")

    pair.ways["alast"] = sleep_first
    outcomes = pair.run(ask_and_read_b)
    assert isinstance(outcomes[0], ConnectionError)
    assert told == ["slept"]


# -- receiving first ---------------------------------------------------------------------------------------------------


def _wait(connection):
    for kind in _hub.kinds().values():
        if (hub := kind.current()) is not None:
            hub.wait(connection)
    return connection.recv(100)


def _recvmsg_into(connection, others=100, flags=0):
    first, second = bytearray(1), bytearray(others)
    size = connection.recvmsg_into([first, second], 0, flags)[0]
    return bytes(first + second[: size - 1])


READS = {
    "recv": lambda c: c.recv(100),
    "recv in pieces": lambda c: b"".join(c.recv(1) for _ in range(4)),
    "recv_into": lambda c: bytes((buffer := bytearray(100))[: c.recv_into(buffer)]),
    "waitall": lambda c: c.recv(4, socket.MSG_WAITALL),
    "peek": lambda c: c.recv(100, socket.MSG_PEEK) and c.recv(2, socket.MSG_PEEK) + c.recv(100)[2:],
    "large": lambda c: c.recv(1_000_000),
    "nonblocking": lambda c: (c.setblocking(False), c.recv(100), c.setblocking(True))[1],
    "readline": lambda c: c.open_reader().read(4),
    "recvfrom": lambda c: c.recvfrom(100)[0],
    "recvfrom_into": lambda c: bytes((buffer := bytearray(100))[: c.recvfrom_into(buffer)[0]]),
    "recvmsg": lambda c: c.recvmsg(100)[0],
    "recvmsg_into": _recvmsg_into,
    "recvmsg_into, waitall": lambda c: _recvmsg_into(c, 3, socket.MSG_WAITALL),
    "recvmsg_into, peek": lambda c: _recvmsg_into(c, 0, socket.MSG_PEEK) + c.recv(100)[1:],
    "wait": _wait,
}


@pytest.mark.parametrize("how", READS)
def test_what_interrupts_a_wait_leaves_what_has_come_to_the_next_read(stage, how):
    """A throws at B, for whom bytes came in the same turn."""
    pair = Pair(stage)
    greens, got = [], []

    def serve_b():
        greens.append(greenlet.getcurrent())
        while True:
            try:
                request = pair.b.recv(100)
            except LookupError:
                got.append(READS[how](pair.b))
                request = got[-1]
            if not request:
                return
            pair.b.sendall(request)

    pair.ways["alast"] = lambda pair: got.append(pair.hub.throw(greens[0], LookupError("thrown")))

    def client():
        for _ in range(ROUNDS):
            assert pair.ask(b"more") == (b"more", b"more")
        answers = pair.ask(b"last"), pair.ask(b"next")
        pair.far_a.close()
        pair.far_b.close()
        return answers

    outcomes = stage.run(lambda: pair.serve(pair.a, "a"), serve_b, client)
    assert outcomes[2] == ((b"last", b"last"), (b"next", b"next"))
    assert got == [True, b"last"]


def test_what_has_come_moves_on_with_its_connection(stage, kind):
    """A throws at B, whose bytes came in the same turn; another hub's green thread writes, then reads them."""
    pair, other = Pair(stage), Stage(kind)
    greens = []

    def serve_b():
        greens.append(greenlet.getcurrent())
        with contextlib.suppress(LookupError):
            pair.serve(pair.b, "b")

    pair.ways["alast"] = lambda pair: pair.hub.throw(greens[0], LookupError("thrown"))

    def client():
        for _ in range(ROUNDS):
            assert pair.ask(b"more") == (b"more", b"more")
        pair.far_a.sendall(b"last")
        pair.far_b.sendall(b"last")
        pair.read(pair.far_a)
        pair.far_a.close()

    stage.run(lambda: pair.serve(pair.a, "a"), serve_b, client)

    def move():
        pair.b.sendall(bytes(BIG))
        return pair.b.recv(100, socket.MSG_DONTWAIT)

    def drain():
        left = BIG
        while left:
            with contextlib.suppress(BlockingIOError):
                left -= len(pair.far_b.recv(left))
            other.hub.sleep(0)

    try:
        assert other.run(move, drain)[0] == b"last"
    finally:
        other.close()


def test_no_more_is_received_ahead_than_was_asked_for(stage):
    """What a reader has not asked for stays in the kernel, for whoever reads the descriptor."""
    pair = Pair(stage)

    def serve(connection):
        while request := connection.recv(4):
            connection.sendall(request)
            if request == b"last":
                pair.seen.append(os.read(connection.fileno(), 100))

    def client(pair):
        pair.far_a.sendall(b"lastmore")
        pair.far_b.sendall(b"last")
        return pair.read(pair.far_a), pair.read(pair.far_b)

    assert pair.run(client, serve)[2] == (b"last", b"last")
    assert pair.seen == [b"more"]


def test_a_connection_that_another_closes_has_nothing_left(stage):
    """A closes B's connection while B's bytes are received: B gets EBADF, and a new connection none of them."""
    pair = Pair(stage)
    pair.ways["alast"] = lambda pair: pair.b.close()

    def client(pair):
        pair.far_a.sendall(b"last")
        pair.far_b.sendall(b"last")
        assert pair.read(pair.far_a) == b"last"
        again, far = stage.pair()
        far.sendall(b"anew")
        return again.recv(100)

    outcomes = pair.run(client)
    assert isinstance(outcomes[1], OSError)
    assert outcomes[2] == b"anew"
