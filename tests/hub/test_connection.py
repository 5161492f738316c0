"""The hub's connection: a blocking socket to its handler, whatever the peer does."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import gc
import os
import socket
import struct
import tempfile
import threading
import time
import weakref

import pytest
from greenlet import getcurrent

from harken import connection as plain, records
from harken._hub import BUSY
from harken.errors import DeadlineExceeded

from .kit import BIG, FAMILIES, LENT, PATIENCE, drain, later

# -- what it is ------------------------------------------------------------------------------------------------------


def test_it_is_a_socket_and_harkens_connection(stage):
    """isinstance holds; it seems to block."""
    connection, far = stage.pair()
    assert isinstance(connection, socket.socket)
    assert isinstance(connection, plain.Connection)
    assert type(connection) is stage.kind.Connection
    assert connection.gettimeout() is None
    assert connection.timeout is None
    assert connection.getblocking()
    assert connection.getpeername() == far.getsockname()
    assert "raddr" in repr(connection)


def blocks(descriptor):
    """Whether read(2) of the descriptor would wait."""
    return not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NONBLOCK


def test_a_descriptor_that_is_asked_for_blocks_as_the_socket_does(stage):
    """Programs use it themselves, make another of it, or start a child on it."""
    connection, far = stage.pair()
    descriptor = connection.fileno()
    assert blocks(descriptor)
    connection.settimeout(1)
    assert not blocks(descriptor)
    connection.setblocking(True)
    assert blocks(descriptor)
    connection.setblocking(False)
    assert not blocks(descriptor)
    connection.settimeout(None)
    with connection.dup() as double:
        assert blocks(descriptor)
        assert blocks(double.fileno())
        far.sendall(b"1")
        assert stage.run(lambda: (double.recvmsg(10)[0], double.sendmsg([b"2"]))) == [(b"1", 1)]
        assert blocks(descriptor)
    far.sendall(b"3")
    assert os.read(descriptor, 10) == b"3"
    os.set_blocking(descriptor, False)  # the program's own wish
    assert not blocks(connection.fileno())
    stage.run(lambda: connection.sendmsg([b"4"]))
    assert not blocks(connection.fileno())


def test_adopt_moves_timeout_and_record(stage):
    """The old object is detached; the record, and the registry, follow the new one."""
    ended = []
    registry = records.Registry(lambda *_: None, ended.append, lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()):
            accepted, address = plain.accept(listener)
            accepted.settimeout(7)
            record = registry.add(accepted, address)
            fd = accepted.fileno()
            adopted = stage.hub.adopt(accepted)
            assert stage.hub.adopt(adopted) is adopted
            assert (accepted.fileno(), adopted.fileno(), adopted.gettimeout()) == (-1, fd, 7)
            assert registry.find(adopted) is record is adopted.record
            assert record.request is adopted
            accepted.close()
            del accepted
            gc.collect()
            assert not ended
            adopted.close()
            assert ended == [record]
            assert len(registry) == 0


# -- what peers do ---------------------------------------------------------------------------------------------------


def to_the_end(connection):
    """Read until the end; return all of it."""
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


@FAMILIES
@pytest.mark.parametrize("parked", [False, True])
def test_data_and_end_in_one_wake_up(stage, family, parked):
    """The short read is not the last: the end must be found without another event."""
    connection, far = stage.pair(family)

    def end():
        far.sendall(b"last words")
        far.close()

    timer = later(end) if parked else end()
    assert stage.run(lambda: to_the_end(connection)) == [b"last words"]
    if timer:
        timer.join()


@pytest.mark.parametrize("parked", [False, True])
def test_data_and_reset_in_one_wake_up(stage, parked):
    """The reader gets the error, or the end, and does not hang."""
    connection, far = stage.pair()

    def reset():
        far.sendall(b"data")
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()

    timer = later(reset) if parked else reset()
    (outcome,) = stage.run(lambda: to_the_end(connection))
    if timer:
        timer.join()
    assert outcome == b"data" or isinstance(outcome, ConnectionResetError)


def test_urgent_data_does_not_hide_what_follows(stage):
    """recv() stops at the mark; the rest is read without another event."""
    connection, far = stage.pair()
    far.sendall(b"before")
    far.send(b"!", socket.MSG_OOB)
    far.sendall(b"after")

    def read():
        data = b""
        while len(data) < 11:
            data += connection.recv(100)
        return data

    assert stage.run(read) == [b"beforeafter"]


def test_urgent_data_alone_ends_no_wait(stage):
    """It wakes the hub, and the reader waits on."""
    connection, far = stage.pair()
    timer = later(lambda: (far.send(b"!", socket.MSG_OOB), time.sleep(0.05), far.sendall(b"data")))
    assert stage.run(lambda: connection.recv(10)) == [b"data"]
    timer.join()


def test_short_reads_of_a_unix_socket_prove_nothing(stage):
    """Between writers whose credentials differ recv() stops early, though more is queued."""
    connection, far = stage.pair(socket.AF_UNIX)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    far.sendall(b"1")
    pid = os.fork()
    if pid == 0:
        far.sendall(b"2")
        os._exit(0)
    os.waitpid(pid, 0)
    far.sendall(b"3")

    def read():
        data = b""
        while len(data) < 3:
            data += connection.recv(100)
        return data

    assert stage.run(read) == [b"123"]


@FAMILIES
@pytest.mark.parametrize("how", ["read", "write"])
def test_shutdown_from_another_thread_wakes(stage, family, how):
    """SHUT_RDWR: a reader finds the end, a writer a broken pipe."""
    connection, _far = stage.pair(family)
    timer = later(plain.shut, connection)
    (outcome,) = stage.run(
        lambda: connection.recv(10) if how == "read" else [connection.sendall(bytes(BIG)) for _ in range(3)]
    )
    timer.join()
    assert outcome == b"" if how == "read" else isinstance(outcome, BrokenPipeError)


def test_half_close(stage):
    """After the peer's end it still gets what is written."""
    connection, far = stage.pair()
    far.shutdown(socket.SHUT_WR)
    thread, got = drain(far, BIG)

    def serve():
        assert connection.recv(10) == b""
        assert connection.recv(10) == b""
        connection.sendall(bytes(BIG))

    assert stage.run(serve) == [None]
    thread.join(PATIENCE)
    assert len(got) == BIG


@pytest.mark.parametrize("how", ["recv", "send", "sendto", "sendmsg", "connect_ex"])
def test_a_deadline_of_the_green_thread_is_no_outcome(stage, how):
    """It is raised, although it is an OSError and something was moved before: who set it waits for it."""
    connection, far = stage.pair()
    waiting = []
    big = bytes(BIG)
    operations = {
        "recv": lambda: connection.recv(6, socket.MSG_WAITALL),
        "send": lambda: connection.send(big),
        "sendto": lambda: connection.sendto(big, far.getsockname()),
        "sendmsg": lambda: connection.sendmsg([big]),
        "connect_ex": lambda: _connect_to_a_full_backlog(stage),
    }
    far.sendall(b"abc")

    def act():
        waiting.append(getcurrent())
        return operations[how]()

    def interrupter():
        stage.hub.sleep(0.05)
        return stage.hub.throw(waiting[0], DeadlineExceeded("late"))

    outcomes = stage.run(act, interrupter)
    assert isinstance(outcomes[0], DeadlineExceeded)
    assert outcomes[1] is True


def _connect_to_a_full_backlog(stage, timeout=None):
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            other = held.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(listener.getsockname())
        connection = held.enter_context(stage.kind.Connection(socket.AF_INET, socket.SOCK_STREAM, 0))
        connection.settimeout(timeout)
        return connection.connect_ex(listener.getsockname())


def test_connect_ex_tells_of_its_timeout_by_number(stage):
    """EAGAIN, as the socket module."""
    assert stage.run(lambda: _connect_to_a_full_backlog(stage, 0.05)) == [errno.EAGAIN]


def test_a_flood_does_not_starve_the_others(stage):
    """A connection that always has data gives way: others have their turn thousands of times meanwhile."""
    connection, far = stage.pair()
    turns = []
    over = False

    def flood():
        with contextlib.suppress(ConnectionError):
            while not over:
                far.sendall(bytes(65536))

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()

    def greedy():
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            connection.recv(100)
        return "done"

    def other():
        while len(turns) < 20:
            turns.append(time.monotonic())
            stage.hub.sleep(0)

    stage.run(other, greedy)
    assert turns[-1] - turns[0] < 0.25
    over = True
    connection.close()
    thread.join(PATIENCE)


# -- time-outs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["green", "plain"])
@pytest.mark.parametrize("how", ["recv", "sendall", "readline", "accept"])
def test_timeouts(stage, how, inside):
    """TimeoutError("timed out") after the time, in a green thread and in a plain one."""
    connection, _far = stage.pair()
    connection.settimeout(0.05)
    if how == "accept":
        connection.close()
        connection = stage.kind.Connection(socket.AF_INET, socket.SOCK_STREAM)
        connection.bind(("127.0.0.1", 0))
        connection.listen()
        connection.settimeout(0.05)

    def act():
        with pytest.raises(TimeoutError, match="timed out"):
            if how == "recv":
                connection.recv(10)
            elif how == "sendall":
                connection.sendall(bytes(BIG))
            elif how == "accept":
                connection.accept()
            else:
                connection.makefile("rb").readline()

    began = time.monotonic()
    if inside:
        assert stage.run(act) == [None]
    else:
        act()
    assert 0.05 <= time.monotonic() - began < 2
    connection.close()


def test_a_timeout_leaves_the_connection_usable(stage):
    """What comes later is read."""
    connection, far = stage.pair()
    connection.settimeout(0.02)

    def act():
        with pytest.raises(TimeoutError):
            connection.recv(10)
        far.sendall(b"late")
        return connection.recv(10)

    assert stage.run(act) == [b"late"]


def test_nonblocking(stage):
    """settimeout(0), setblocking(False) and MSG_DONTWAIT do not wait."""
    connection, far = stage.pair()

    def act():
        with pytest.raises(BlockingIOError):
            connection.recv(10, socket.MSG_DONTWAIT)
        connection.setblocking(False)
        assert connection.gettimeout() == 0.0
        assert not connection.getblocking()
        with pytest.raises(BlockingIOError):
            connection.recv(10)
        with pytest.raises(BlockingIOError):
            connection.sendall(bytes(BIG))
        connection.setblocking(True)
        assert connection.gettimeout() is None

    assert stage.run(act) == [None]
    far.close()


@pytest.mark.parametrize("value", [-1, float("nan"), "1", float("inf"), 1e20])
def test_wrong_timeouts_are_refused(stage, value):
    """As on any socket, and nothing has changed."""
    connection, _ = stage.pair()
    with pytest.raises((ValueError, TypeError, OverflowError)):
        connection.settimeout(value)
    assert connection.gettimeout() is None


# -- connecting and accepting ----------------------------------------------------------------------------------------


@LENT
@FAMILIES
def test_connect_and_accept(stage, family, tmp_path, lent):
    """Both wait in the hub; what is accepted is a Connection too."""
    listener = stage.kind.Connection(family, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s") if family == socket.AF_UNIX else ("127.0.0.1", 0))
    listener.listen()
    if lent:
        listener.fileno()

    def server():
        connection, _ = listener.accept()
        with connection:
            assert type(connection) is stage.kind.Connection
            connection.sendall(connection.recv(10).upper())

    def client():
        with stage.kind.Connection(family, socket.SOCK_STREAM) as connection:
            if lent:
                connection.fileno()
            connection.connect(listener.getsockname())
            connection.sendall(b"hello")
            return connection.recv(10)

    assert stage.run(server, client) == [None, b"HELLO"]
    listener.close()


def test_connect_to_nobody(stage):
    """The kernel's error, by connect and by connect_ex."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with stage.kind.Connection(socket.AF_INET, socket.SOCK_STREAM) as connection:
        (refused,) = stage.run(lambda: connection.connect(address))
        assert isinstance(refused, ConnectionRefusedError)
    with stage.kind.Connection(socket.AF_INET, socket.SOCK_STREAM) as connection:
        assert stage.run(lambda: connection.connect_ex(address)) == [errno.ECONNREFUSED]
    assert stage.run(lambda: connection.connect_ex(address)) == [errno.EBADF]  # it is closed


def test_connect_in_time(stage):
    """A Unix listener whose queue is full never answers."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen(0)
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(f"{folder}/s")
        with waiting, stage.kind.Connection(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(0.05)
            (late,) = stage.run(lambda: connection.connect(f"{folder}/s"))
            assert isinstance(late, TimeoutError)


# -- outside the hub -------------------------------------------------------------------------------------------------


def test_in_a_plain_thread_it_blocks(stage):
    """Also after it was registered in a hub; two threads at once do not meet."""
    connection, far = stage.pair()
    far.sendall(b"1")
    assert stage.run(lambda: connection.recv(10)) == [b"1"]
    timer = later(far.sendall, b"2")
    assert connection.recv(10) == b"2"
    timer.join()
    thread, got = drain(far, BIG)
    connection.sendall(bytes(BIG))
    thread.join(PATIENCE)
    assert len(got) == BIG


def test_it_moves_to_another_hub(stage):
    """When nobody waits for it in the first."""
    connection, far = stage.pair()
    far.sendall(b"1")
    assert stage.run(lambda: [connection.recv(1), connection.settimeout(0.01)])[0][0] == b"1"
    seen = []

    def other():
        hub = stage.kind.Hub()
        green = hub.spawn(lambda: seen.append(connection.recv(10)))
        connection.settimeout(PATIENCE)
        hub.step(0)
        far.sendall(b"2")
        hub.run(lambda: green.dead, lambda: 1.0, lambda: None)
        hub.close()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(PATIENCE)
    assert seen == [b"2"]


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["green", "plain"])
def test_close_wakes_whoever_waits(stage, where):
    """With EBADF, from a green thread and from another thread."""
    connection, _ = stage.pair()

    def close():
        stage.hub.sleep(0.02)
        connection.close()

    if where == "green":
        (outcome, _) = stage.run(lambda: connection.recv(10), close)
    else:
        timer = later(connection.close)
        (outcome,) = stage.run(lambda: connection.recv(10))
        timer.join()
    assert isinstance(outcome, OSError)
    assert outcome.errno == errno.EBADF


def test_a_closed_one_says_so(stage):
    """EBADF, as on any socket; closing twice is harmless."""
    connection, _ = stage.pair()
    connection.close()
    connection.close()
    assert connection.fileno() == -1
    for act in (lambda: connection.recv(1), lambda: connection.sendall(b"x")):
        (outcome,) = stage.run(act)
        assert isinstance(outcome, OSError)
        assert outcome.errno == errno.EBADF


def test_a_descriptors_number_that_comes_again_is_another_connection(stage):
    """The kernel gives numbers anew at once: nothing of the old one may reach the new one."""
    for turn in range(20):
        connection, far = stage.pair()
        timer = later(far.sendall, b"%d" % turn) if turn % 5 == 0 else far.sendall(b"%d" % turn)
        assert stage.run(lambda c=connection: c.recv(10)) == [b"%d" % turn]
        if timer:
            timer.join()
        if turn % 2:
            far.close()
        connection.close()
        far.close()


def test_a_makefile_outlives_close(stage):
    """The descriptor goes with the last file."""
    connection, far = stage.pair()
    file = connection.makefile("rb")
    connection.close()
    far.sendall(b"line\n")
    assert stage.run(file.readline) == [b"line\n"]
    file.close()
    assert connection.fileno() == -1


def test_detach_gives_a_blocking_descriptor(stage):
    """As the socket was; and the hub has forgotten it."""
    connection, far = stage.pair()
    far.sendall(b"1")
    stage.run(lambda: connection.recv(1))
    fd = connection.detach()
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    with socket.socket(fileno=fd) as mine:
        far.sendall(b"2")
        assert mine.recv(10) == b"2"


def test_dup(stage):
    """Another Connection on the same wire, with the same timeout."""
    connection, far = stage.pair()
    connection.settimeout(3)
    with connection.dup() as double:
        assert type(double) is type(connection)
        assert double.gettimeout() == 3
        far.sendall(b"1")
        assert stage.run(lambda: double.recv(10)) == [b"1"]
        connection.close()
        far.sendall(b"2")
        assert stage.run(lambda: double.recv(10)) == [b"2"]


def test_one_that_is_dropped_gives_its_descriptor_back(stage):
    """No table of the hub's keeps it open."""
    connection, far = stage.pair()
    far.sendall(b"x")
    stage.run(functools.partial(connection.recv, 10))
    stage._sockets.remove(connection)
    gone = weakref.ref(connection)
    with pytest.warns(ResourceWarning):
        del connection
        gc.collect()
    assert gone() is None
    assert far.recv(10) == b""


def test_nobody_resizes_what_is_received_into(stage):
    """As with a socket that blocks, whose call holds the buffer."""
    connection, far = stage.pair()
    buffer = bytearray(10)

    def other():
        while connection.waits_for() != "reading":
            stage.hub.sleep(0)
        try:
            with pytest.raises(BufferError):
                buffer.clear()
        finally:
            far.sendall(b"data")

    assert stage.run(lambda: connection.recv_into(buffer), other) == [4, None]
    assert bytes(buffer[:4]) == b"data"


@FAMILIES
@pytest.mark.parametrize("verb, data", [("sendall", b"2"), ("send", b"2"), ("sendmsg", [b"2"])])
def test_nobody_sends_into_what_is_half_sent(stage, family, verb, data):
    """A second green thread that tries is told before its bytes go; in Python, also if there is room."""
    connection, far = stage.pair(family)

    def make_room():
        got = 0
        far.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                got += len(far.recv(BIG))
        far.settimeout(PATIENCE)
        return got

    def second():
        while connection.waits_for() != "writing":
            stage.hub.sleep(0)
        got = make_room() if stage.kind.KIND == "fallback" else 0
        try:
            getattr(connection, verb)(data)
        except RuntimeError as error:
            return str(error), drain(far, BIG - got)
        return "sent", drain(far, BIG - got)

    first, (second, (reader, rest)) = stage.run(lambda: connection.sendall(b"1" * BIG), second)
    reader.join(PATIENCE)
    assert (first, second, b"2" in rest) == (None, BUSY, False)


# -- for who looks on from outside -----------------------------------------------------------------------------------


@FAMILIES
def test_it_tells_what_its_green_thread_waits_for(stage, family):
    """Reading, writing, or neither; before, while and after."""
    connection, far = stage.pair(family)
    seen = [connection.waits_for()]

    def look():
        seen.append(connection.waits_for())

    def serve():
        stage.hub.call_soon(look)
        stage.hub.sleep(0)  # the look comes while this runs on
        stage.hub.call_soon(look)
        connection.recv(1)
        stage.hub.call_soon(look)
        connection.sendall(bytes(BIG))

    def answer():
        stage.hub.sleep(0.05)
        far.sendall(b"x")
        stage.hub.sleep(0.05)
        reader, _ = drain(far, BIG)
        return reader

    outcomes = stage.run(serve, answer)
    outcomes[1].join(PATIENCE)
    assert [*seen, connection.waits_for()] == [None, None, "reading", "writing", None]


def test_a_connection_that_waits_for_its_green_thread_waits_to_be_read(stage):
    """One whose handler will start at its first bytes."""
    connection, far = stage.pair()
    started = []
    stage.hub.lodge(connection, lambda guest: started.append(guest.waits_for()))
    assert connection.waits_for() == "reading"
    far.sendall(b"x")
    stage.run(lambda: stage.hub.sleep(0.05))
    assert started == [None]
