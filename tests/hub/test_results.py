"""What ``recv()`` returns may have memory that was used before: nobody can tell."""

from __future__ import annotations

import _socket
import array
import fcntl
import random
import socket
import struct
import termios

import pytest
from waiting import wait_until

SIZE = 16_384  # bytes of a message that is received into a result of its own, with an eighth more room
ASKED = 65_536
WARM = 3  # messages until results are used again


def lie_there(near, size):
    """Wait until so many bytes lie there to be received."""
    count = array.array("i", [0])

    def enough():
        fcntl.ioctl(_socket.socket.fileno(near), termios.FIONREAD, count)  # its own would show the descriptor
        return count[0] >= size

    wait_until(enough)


def exchange(near, far, message):
    """Return what one ``recv()`` brings of a message that lies there whole."""
    far.sendall(message)
    lie_there(near, len(message))
    return near.recv(ASKED)


def warm(near, far):
    """Receive as many messages as it takes."""
    for number in range(WARM):
        assert exchange(near, far, b"%d" % number * SIZE) == b"%d" % number * SIZE


@pytest.mark.parametrize("size", [1, 8_193, SIZE, SIZE * 9 // 8 - 1, SIZE * 9 // 8, SIZE * 9 // 8 + 1, 32_769, 50_000])
def test_a_message_comes_whole_whatever_the_last_ones_were(stage, size):
    """One ``recv()`` brings what lies there, as long as it was asked for so much."""
    near, far = stage.pair()
    message = random.Random(size).randbytes(size)

    def handler():
        warm(near, far)
        got = exchange(near, far, message)
        return got, exchange(near, far, b"next" * 4096)

    assert stage.run(handler) == [(message, b"next" * 4096)]


def test_no_more_is_received_than_was_asked_for(stage):
    """Not even where there is room for it."""
    near, far = stage.pair()

    def handler():
        warm(near, far)
        far.sendall(b"ab" * (SIZE // 2))
        lie_there(near, SIZE)
        return [len(near.recv(9_001)) for _ in range(2)]

    assert stage.run(handler) == [[9_001, SIZE - 9_001]]


def test_what_a_program_keeps_stays_as_it_was(stage):
    """Several connections in turn; each fifth message is kept."""
    pairs = [stage.pair() for _ in range(5)]

    def handler(near, far, name):
        kept = {}
        for number in range(30):
            message = b"%d %02d " % (name, number) * 3000
            got = exchange(near, far, message)
            assert got == message
            if number % 5 == 0:
                kept[number] = got
        return all(got == b"%d %02d " % (name, number) * 3000 for number, got in kept.items())

    handlers = [lambda each=each, name=name: handler(*each, name) for name, each in enumerate(pairs)]
    assert stage.run(*handlers, patience=20) == [True] * 5


def test_a_view_keeps_its_message(stage):
    """A ``memoryview`` holds the object, though no name does."""
    near, far = stage.pair()

    def handler():
        warm(near, far)
        view = memoryview(exchange(near, far, b"v" * SIZE))
        for _ in range(WARM):
            exchange(near, far, b"w" * SIZE)
        return bytes(view) == b"v" * SIZE

    assert stage.run(handler) == [True]


def test_a_message_has_a_hash_of_its_own(stage):
    """Though the one before, in the same memory, was asked for its hash."""
    near, far = stage.pair()

    def handler():
        warm(near, far)
        messages = [b"%d" % (number % 2) * (SIZE + number % 2) for number in range(6)]
        return [hash(exchange(near, far, message)) == hash(message) for message in messages]

    assert stage.run(handler) == [[True] * 6]


def test_a_message_that_fills_its_room_and_then_ends(stage):
    """The end is told by the next call."""
    near, far = stage.pair()

    def handler():
        warm(near, far)
        far.sendall(b"e" * (SIZE * 9 // 8))
        far.shutdown(socket.SHUT_WR)
        lie_there(near, SIZE * 9 // 8)
        return [len(near.recv(ASKED)) for _ in range(3)]

    assert stage.run(handler) == [[SIZE * 9 // 8, 0, 0]]


def test_a_message_that_fills_its_room_and_then_is_reset(stage):
    """The bytes first, then the error, once."""
    near, far = stage.pair()

    def handler():
        warm(near, far)
        far.sendall(b"r" * (SIZE * 9 // 8))
        lie_there(near, SIZE * 9 // 8)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        got = len(near.recv(ASKED))
        with pytest.raises(ConnectionResetError):
            near.recv(ASKED)
        return got, near.recv(ASKED)

    assert stage.run(handler) == [(SIZE * 9 // 8, b"")]
