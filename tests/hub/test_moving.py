"""What calls on the hub's connection move: all of it, or as much as a plain socket would, and nothing gets lost."""

from __future__ import annotations

import array
import functools
import hashlib
import io
import random
import socket
import struct
import tempfile
import threading
import time

import pytest

from harken import _hub

from .kit import BIG, FAMILIES, LENT, PATIENCE, drain, later

# -- reading and writing ---------------------------------------------------------------------------------------------

READS = {
    "recv": lambda c: c.recv(100),
    "recv_into": lambda c: bytes((buffer := bytearray(100))[: c.recv_into(buffer)]),
    "recv_into n": lambda c: bytes((buffer := bytearray(100))[: c.recv_into(buffer, 50)]),
    "recvfrom": lambda c: c.recvfrom(100)[0],
    "recvfrom_into": lambda c: bytes((buffer := bytearray(100))[: c.recvfrom_into(buffer)[0]]),
    "recvmsg": lambda c: c.recvmsg(100)[0],
    "recvmsg_into": lambda c: bytes((buffer := bytearray(100))[: c.recvmsg_into([buffer])[0]]),
    "makefile": lambda c: c.makefile("rb").readline(),
    "makefile text": lambda c: c.makefile("r").readline().encode(),
    "makefile raw": lambda c: c.makefile("rb", 0).read(100),
}


@LENT
@FAMILIES
@pytest.mark.parametrize("how", READS)
def test_reads_wait_in_the_hub(stage, family, how, lent):
    """While one waits another runs; what is there already is read at once; the end is the end."""
    connection, far = stage.pair(family, lent)

    def reader():
        with connection:
            return [READS[how](connection) for _ in range(3)]

    def other():
        stage.hub.sleep(0.01)
        far.sendall(b"one\n")
        stage.hub.sleep(0.01)
        far.sendall(b"two\n")
        stage.hub.sleep(0.01)
        far.close()
        return "others run"

    assert stage.run(reader, other) == [[b"one\n", b"two\n", b""], "others run"]


WRITES = {
    "sendall": lambda c, data: c.sendall(data),
    "sendall view": lambda c, data: c.sendall(memoryview(array.array("I", data))),
    "send": lambda c, data: pieces(c.send, data),
    "sendmsg": lambda c, data: pieces(lambda rest: c.sendmsg([rest[:1000], rest[1000:]]), data),
    "sendto": lambda c, data: pieces(lambda rest: c.sendto(rest, c.getpeername()), data),
    "makefile": lambda c, data: write(c, data),
}


def pieces(send, data):
    """Send all by a function that sends some."""
    while data:
        data = data[send(data) :]


def write(connection, data):
    """Write by a buffered file."""
    with connection.makefile("wb") as file:
        file.write(data)


@LENT
@pytest.mark.parametrize("how", WRITES)
def test_writes_wait_in_the_hub(stage, how, lent):
    """More than the buffers take: others run meanwhile, and every byte arrives."""
    connection, far = stage.pair(lent=lent)
    data = random.Random(1).randbytes(BIG)
    seen = []

    def writer():
        WRITES[how](connection, data)
        seen.append("written")

    def other():
        stage.hub.sleep(0.02)
        seen.append("other")
        reading.extend(drain(far, len(data)))

    reading: list = []
    stage.run(writer, other)
    reading[0].join(PATIENCE)
    assert hashlib.md5(reading[1]).digest() == hashlib.md5(data).digest()
    assert seen == ["other", "written"]


@pytest.mark.parametrize("how", ["send", "sendmsg", "sendto", "makefile"])
def test_without_a_timeout_all_is_sent(stage, how):
    """As on a socket that blocks: programs of many years do not look at the number."""
    connection, far = stage.pair(family=socket.AF_UNIX)
    data = bytes(range(256)) * 20_000
    thread, got = drain(far, len(data))
    actions = {
        "send": lambda: connection.send(data),
        "sendmsg": lambda: connection.sendmsg(part for part in (data[:1000], memoryview(data)[1000:])),
        "sendto": lambda: connection.sendto(data, 0, b""),
        "makefile": lambda: connection.makefile("wb", buffering=0).write(data),
    }
    if how == "sendto":
        connection.close()
        connection, far = stage.pair()
        thread.join()
        thread, got = drain(far, len(data))
        actions[how] = lambda: connection.sendto(data, ("127.0.0.1", 1))
    assert stage.run(actions[how]) == [len(data)]
    thread.join()
    assert bytes(got) == data


@pytest.mark.parametrize("how", ["send", "sendmsg"])
def test_what_was_sent_before_an_error_is_told(stage, how):
    """The next call meets the error; nothing is sent twice by a program that looks at the number."""
    connection, far = stage.pair()

    def act():
        timer = later(functools.partial(far.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)))
        timer.join()
        closing = later(lambda: (far.recv(1, socket.MSG_PEEK), far.close()))  # not before the first bytes are sent
        sent = connection.send(bytes(BIG)) if how == "send" else connection.sendmsg([bytes(BIG)])
        closing.join()
        with pytest.raises(ConnectionError):
            connection.send(b"more")
            connection.send(b"more")
        return 0 < sent < BIG

    assert stage.run(act) == [True]


@pytest.mark.parametrize("how", ["send", "sendmsg"])
def test_with_a_timeout_some_is_sent(stage, how):
    """As on Python's sockets, which do not block then."""
    connection, _far = stage.pair()
    connection.settimeout(PATIENCE)
    act = functools.partial(connection.send, bytes(BIG)) if how == "send" else lambda: connection.sendmsg([bytes(BIG)])
    (sent,) = stage.run(act)
    assert 0 < sent < BIG


@FAMILIES
def test_who_asks_for_nothing_does_not_wait(stage, family):
    """As on a socket of the standard library, also where it is known that nothing is there."""
    connection, far = stage.pair(family)
    connection.settimeout(PATIENCE / 10)
    far.sendall(b"hi")
    assert stage.run(lambda: connection.recv(100)) == [b"hi"]
    assert stage.run(lambda: (connection.recv(0), connection.recv_into(bytearray()))) == [(b"", 0)]


@LENT
@pytest.mark.parametrize("offset, count", [(0, None), (1000, None), (1000, 5000), (0, 2 * BIG)])
def test_sendfile(stage, offset, count, lent):
    """A regular file by the kernel; position and result as stdlib has them."""
    connection, far = stage.pair(lent=lent)
    data = random.Random(2).randbytes(BIG)
    expected = data[offset:] if count is None else data[offset : offset + count]
    with tempfile.TemporaryFile() as file:
        file.write(data)
        thread, got = drain(far, len(expected))
        assert stage.run(lambda: connection.sendfile(file, offset, count)) == [len(expected)]
        assert file.tell() == offset + len(expected)
    thread.join(PATIENCE)
    assert got == expected


def test_sendfile_that_fails_leaves_the_file_where_it_stopped(stage):
    """So that the rest can be sent later, as from stdlib's."""
    connection, far = stage.pair()
    connection.settimeout(0.05)
    with tempfile.TemporaryFile() as file:
        file.truncate(BIG)
        assert isinstance(stage.run(lambda: connection.sendfile(file))[0], TimeoutError)
        sent = file.tell()
        assert 0 < sent < BIG
        connection.close()
        thread, got = drain(far, BIG)
        thread.join(PATIENCE)
        assert len(got) == sent


def test_the_timeout_bounds_each_wait_of_sendfile(stage):
    """A peer that takes some now and then has no file cut, however long the whole takes."""
    connection, far = stage.pair(socket.AF_UNIX)
    connection.settimeout(1.0)

    def sip():
        for _ in range(20):
            time.sleep(0.08)
            left = BIG // 20
            while left:
                left -= len(far.recv(left))

    with tempfile.TemporaryFile() as file:
        file.truncate(BIG)
        thread = threading.Thread(target=sip)
        thread.start()
        assert stage.run(lambda: connection.sendfile(file)) == [BIG]
    thread.join(PATIENCE)


def test_sendfile_of_what_is_no_file(stage):
    """By send."""
    connection, far = stage.pair()
    assert stage.run(lambda: connection.sendfile(io.BytesIO(b"hello"), 1)) == [4]
    assert far.recv(10) == b"ello"


def test_one_reads_and_one_writes(stage):
    """Two green threads may share a connection so."""
    connection, far = stage.pair()
    data = bytes(BIG)

    def reader():
        return connection.recv(10)

    def writer():
        connection.sendall(data)

    timer = later(lambda: (drain(far, BIG)[0].join(), far.sendall(b"done")))
    assert stage.run(reader, writer) == [b"done", None]
    timer.join()


@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_second_waiter_gets_a_clear_error(stage, direction):
    """And the first goes on unharmed."""
    connection, far = stage.pair()
    data = bytes(BIG)
    threads = []

    def act():
        return connection.recv(10) if direction == "read" else connection.sendall(data)

    def second():
        stage.hub.sleep(0.02)
        try:
            act()
        finally:
            if direction == "read":
                far.sendall(b"x")
            else:
                threads.append(drain(far, BIG)[0])

    first, failed = stage.run(act, second)
    for thread in threads:
        thread.join(PATIENCE)
    assert first == (b"x" if direction == "read" else None)
    assert isinstance(failed, RuntimeError)
    assert str(failed) == _hub.BUSY


def test_a_random_conversation_arrives_whole(stage):
    """50 connections echo random pieces of random sizes, each its own."""
    dice = random.Random(3)
    pairs = [stage.pair(dice.choice([socket.AF_INET, socket.AF_UNIX])) for _ in range(50)]

    def echo(connection):
        with connection:
            while data := connection.recv(dice.choice([1, 100, 65536])):
                connection.sendall(data)

    def client(far):
        with stage.hub.adopt(far) as end:
            for _ in range(10):
                data = dice.randbytes(dice.choice([1, 10, 1000, 20000]))
                for start in range(0, len(data), 7000):
                    end.sendall(data[start : start + 7000])
                got = b""
                while len(got) < len(data):
                    got += end.recv(65536)
                assert got == data
            return "whole"

    outcomes = stage.run(
        *[lambda c=c: echo(c) for c, _ in pairs], *[lambda f=f: client(f) for _, f in pairs], patience=20
    )
    assert outcomes == [None] * 50 + ["whole"] * 50


# -- how much ---------------------------------------------------------------------------------------------------------


def test_peek_takes_nothing(stage):
    """And a short peek proves nothing."""
    connection, far = stage.pair()
    far.sendall(b"hello")
    assert stage.run(lambda: [connection.recv(100, socket.MSG_PEEK), connection.recv(100)]) == [[b"hello"] * 2]


def _recv_into(connection, size, flags):
    buffer = bytearray(size)
    return bytes(buffer[: connection.recv_into(buffer, 0, flags)])


def _recvfrom_into(connection, size, flags):
    buffer = bytearray(size)
    return bytes(buffer[: connection.recvfrom_into(buffer, 0, flags)[0]])


def _recvmsg_into(connection, size, flags):
    first, others = bytearray(2), bytearray(size - 2)
    got = connection.recvmsg_into([first, others], 0, flags)[0]
    return bytes((first + others)[:got])


ALL = {
    "recv": lambda c, size, flags: c.recv(size, flags),
    "recv_into": _recv_into,
    "recvfrom": lambda c, size, flags: c.recvfrom(size, flags)[0],
    "recvfrom_into": _recvfrom_into,
    "recvmsg": lambda c, size, flags: c.recvmsg(size, 0, flags)[0],
    "recvmsg_into": _recvmsg_into,
}


@pytest.mark.parametrize("timeout", [None, PATIENCE])
@pytest.mark.parametrize("how", ALL)
def test_all_or_what_comes_before_the_end(stage, how, timeout):
    """MSG_WAITALL waits until there is as much as was asked for; at the end it is what there was. A look waits not."""
    connection, far = stage.pair()
    connection.settimeout(timeout)
    timers = []

    def read(size, flags=0):
        return ALL[how](connection, size, socket.MSG_WAITALL | flags)

    def end():
        far.sendall(b"end")
        far.shutdown(socket.SHUT_WR)

    def act():
        looked = read(6, socket.MSG_PEEK)
        timers.append(later(far.sendall, b"def"))
        whole = read(6)
        timers.append(later(end))
        return looked, whole, read(6)

    far.sendall(b"abc")
    assert stage.run(act) == [(b"abc", b"abcdef", b"end")]
    for timer in timers:
        timer.join()


@pytest.mark.parametrize("how", ALL)
def test_an_error_behind_what_came_is_the_next_call_s(stage, how):
    """MSG_WAITALL gives what came before a reset; the reset is told, too, as on a socket that blocks."""
    connection, far = stage.pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.sendall(b"abc")

    def act():
        timer = later(far.close)
        got = ALL[how](connection, 6, socket.MSG_WAITALL)
        timer.join()
        with pytest.raises(ConnectionResetError):
            connection.recv(6)
        return got, connection.recv(6)

    assert stage.run(act) == [(b"abc", b"")]


@pytest.mark.parametrize("how", ["recv", "recv_into"])
def test_a_timeout_loses_nothing_of_what_was_waited_for(stage, how):
    """MSG_WAITALL gives what came in time, and raises when that is nothing."""
    connection, far = stage.pair()
    connection.settimeout(0.05)

    def act():
        far.sendall(b"abc")
        buffer = bytearray(6)
        if how == "recv":
            buffer[:3] = connection.recv(6, socket.MSG_WAITALL)
        else:
            assert connection.recv_into(buffer, 0, socket.MSG_WAITALL) == 3
        with pytest.raises(TimeoutError):
            connection.recv(6, socket.MSG_WAITALL)
        return bytes(buffer[:3])

    assert stage.run(act) == [b"abc"]


@pytest.mark.parametrize("how", ["flag", "timeout"])
def test_who_does_not_wait_for_all_gets_what_is_there(stage, how):
    """MSG_WAITALL with MSG_DONTWAIT, or on a socket that does not wait."""
    connection, far = stage.pair()
    far.sendall(b"abc")
    flags = socket.MSG_WAITALL | (socket.MSG_DONTWAIT if how == "flag" else 0)

    def act():
        if how == "timeout":
            connection.setblocking(False)
        got = connection.recv(6, flags)
        with pytest.raises(BlockingIOError):
            connection.recv(6, flags)
        return got

    assert stage.run(act) == [b"abc"]


@pytest.mark.parametrize(
    "wrong, buffer, size", [(ValueError, bytearray(3), 5), (TypeError, b"read only", 0), (TypeError, b"", 0)]
)
def test_a_buffer_without_room_is_refused_at_once(stage, wrong, buffer, size):
    """Also where it is known that nothing is there, and the call would wait."""
    connection, far = stage.pair()
    far.sendall(b"dry")

    def act():
        connection.recv(100)
        with pytest.raises(wrong):
            connection.recv_into(buffer, size)

    assert stage.run(act) == [None]


def test_a_size_below_nothing_is_refused_at_once(stage):
    """Whatever was read before."""
    connection, far = stage.pair()
    far.sendall(b"dry")

    def act():
        connection.recv(100)
        with pytest.raises(ValueError, match="negative"):
            connection.recv(-1)
        with pytest.raises(ValueError, match="negative"):
            connection.recv_into(bytearray(1), -1)
        with pytest.raises(ValueError, match="negative"):
            connection.recv(-1, socket.MSG_WAITALL)

    assert stage.run(act) == [None]
