"""Reader and Writer of the compiled hub: buffered reading, and answers that are joined but never late."""

from __future__ import annotations

import io
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

compiled = pytest.importorskip("harken._hub.compiled")

PATIENCE = 10.0  # seconds that anything here may take at most


@pytest.fixture
def hub() -> Iterator[Any]:
    """Return a hub, and close it."""
    hub = compiled.Hub()
    yield hub
    hub.close()


@pytest.fixture
def pair() -> Iterator[tuple[Any, socket.socket]]:
    """Return a Connection and a plain socket, the two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = compiled.accept(listener)
    far.settimeout(PATIENCE)
    with far, near:
        yield near, far


def run(hub: Any, *functions: Callable[[], object]) -> list[Any]:
    """Run each function as a green thread; return what they returned, or the exceptions they raised."""
    results: dict[int, Any] = {}

    def keep(place: int, function: Callable[[], object]) -> None:
        try:
            results[place] = function()
        except Exception as error:
            results[place] = error

    for place, function in enumerate(functions):
        hub.spawn(keep, place, function)
    end = time.monotonic() + PATIENCE
    hub.run(lambda: len(results) == len(functions) or time.monotonic() > end, lambda: 0.1, lambda: None)
    assert len(results) == len(functions), "a green thread hangs"
    return [results[place] for place in range(len(functions))]


def test_reads_as_io_does(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """Random calls on random data give what a BytesIO gives."""
    near, far = pair
    other = hub.adopt(far)
    chance = random.Random(5)
    data = b"".join(os.urandom(chance.randrange(200)).replace(b"\n", b"-") + b"\n" for _ in range(2000))

    def feed() -> None:
        at = 0
        while at < len(data):
            size = chance.randrange(1, 3000)
            other.sendall(data[at : at + size])
            at += size
            if chance.random() < 0.2:
                hub.sleep(0)
        other.close()

    def compare() -> int:
        reader, model = compiled.Reader(near), io.BytesIO(data)
        calls = 0
        while model.tell() < len(data):
            calls += 1
            match chance.randrange(7):
                case 0:
                    assert reader.readline() == model.readline()
                case 1:
                    limit = chance.randrange(300)
                    assert reader.readline(limit) == model.readline(limit)
                case 2:
                    size = chance.randrange(5000)
                    assert reader.read(size) == model.read(size)
                case 3:
                    mine, theirs = bytearray(chance.randrange(1, 500)), bytearray(500)
                    got = reader.readinto(mine)
                    assert got == model.readinto(memoryview(theirs)[: len(mine)])
                    assert mine[:got] == theirs[:got]
                case 4:
                    piece = reader.read1(chance.randrange(1, 500))
                    assert piece
                    assert model.read(len(piece)) == piece
                case 5:
                    ahead = reader.peek()
                    assert ahead
                    assert data[model.tell() :].startswith(ahead)
                case 6:
                    assert next(reader, b"") == model.readline()
        assert reader.read() == b""
        assert reader.readline() == b""
        assert list(reader) == []
        reader.close()
        return calls

    assert run(hub, compare, feed)[0] > 100


def test_lines_longer_than_any_buffer(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """A line of a megabyte is one line, and `read()` reads to the end."""
    near, far = pair
    other = hub.adopt(far)
    line = b"x" * (1 << 20) + b"\n"

    def feed() -> None:
        other.sendall(line + b"rest" * 100_000)
        other.close()

    reader = compiled.Reader(near)
    assert run(hub, lambda: (reader.readline() == line, len(reader.read())), feed)[0] == (True, 400_000)
    assert reader.readlines() == []
    reader.close()


def test_answers_to_a_pipeline_are_joined(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """While requests are unread, answers wait for one packet; before the green thread waits they are sent."""
    near, far = pair
    far.sendall(b"one\ntwo\nthree\n")

    def serve() -> list[bytes]:
        reader = compiled.Reader(near)
        writer = compiled.Writer(near, reader)
        seen = []
        for _ in range(2):
            writer.write(reader.readline())
        far.setblocking(False)
        try:
            seen.append(far.recv(100))
        except BlockingIOError:
            seen.append(b"")
        writer.write(reader.readline())  # nothing is unread any more: all of it goes
        far.settimeout(PATIENCE)
        seen.append(far.recv(100))
        writer.close()
        reader.close()
        return seen

    assert run(hub, serve)[0] == [b"", b"one\ntwo\nthree\n"]


@pytest.mark.parametrize(
    "way", ["recv", "sleep", "park", "wait", "end", "close", "shutdown", "sendall", "flush", "fileno"]
)
def test_no_answer_waits_for_the_peer(hub: Any, pair: tuple[Any, socket.socket], way: str) -> None:
    """Whatever the green thread does next, what it wrote is sent first."""
    near, far = pair
    far.sendall(b"a\nb")  # half a request stays unread
    parked: list[Any] = []

    def serve() -> None:
        reader = compiled.Reader(near)
        writer = compiled.Writer(near, reader)
        writer.write(reader.readline())
        match way:
            case "recv":
                reader.readline()
            case "sleep":
                hub.sleep(0.2)
            case "park":
                hub.park()
            case "wait":
                hub.wait(near.fileno())
            case "end":
                parked.append((reader, writer))
            case "close":
                reader.close()
                near.close()
            case "shutdown":
                near.shutdown(socket.SHUT_WR)
            case "sendall":
                near.sendall(b"later")
            case "flush":
                writer.flush()
            case "fileno":
                near.fileno()

    hub.spawn(serve)
    hub.step(0)
    assert far.recv(2) == b"a\n"
    if way == "sendall":
        assert far.recv(10) == b"later"


def test_a_peer_that_has_gone(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """What cannot be sent any more is told by a later call."""
    near, far = pair
    far.sendall(b"a\nb\nc")
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    far.close()

    def serve() -> None:
        with compiled.Reader(near) as reader, compiled.Writer(near, reader) as writer:
            while line := reader.readline():
                writer.write(line)

    assert isinstance(run(hub, serve)[0], ConnectionError)


def test_more_than_the_buffer(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """Answers of any size arrive whole and in order while requests are unread."""
    near, far = pair
    other = hub.adopt(far)
    count = 400
    answers = [bytes([number % 251]) * (number * 50) + b"\n" for number in range(count)]

    def serve() -> None:
        with compiled.Reader(near) as reader, compiled.Writer(near, reader) as writer:
            for number, _ in enumerate(reader):
                writer.write(answers[number])
                if number % 50 == 0:
                    near.sendall(b"!")
        near.close()

    def ask() -> None:
        other.sendall(b"ask\n" * count)
        other.shutdown(socket.SHUT_WR)

    def drain() -> bytes:
        pieces = []
        while piece := other.recv(10_000):
            pieces.append(piece)
        other.close()
        return b"".join(pieces)

    expected = b"".join(answer + b"!" * (number % 50 == 0) for number, answer in enumerate(answers))
    assert run(hub, serve, ask, drain)[2] == expected


def test_they_are_files(pair: tuple[Any, socket.socket]) -> None:
    """io takes them for buffered files, a text file can be laid over them, and the socket outlives its close()."""
    near, far = pair
    reader = compiled.Reader(near)
    writer = compiled.Writer(near, reader)
    assert isinstance(reader, io.BufferedIOBase)
    assert isinstance(writer, io.BufferedIOBase)
    assert (reader.readable(), reader.writable(), reader.seekable()) == (True, False, False)
    near.close()
    assert near.fileno() >= 0
    text = io.TextIOWrapper(reader, "utf-8", newline="\n")  # type: ignore[type-var]
    far.sendall("größer\nhalf".encode())
    far.shutdown(socket.SHUT_WR)
    assert text.readline() == "größer\n"
    assert text.read() == "half"
    assert writer.write(memoryview(b"abc")) == 3
    writer.writelines([b"d", b"e"])
    assert far.recv(10) == b"abcde"
    text.close()
    assert reader.closed
    writer.close()
    assert near.fileno() == -1
    for call in (reader.readline, reader.read, lambda: writer.write(b""), writer.flush, lambda: next(reader)):
        with pytest.raises(ValueError, match="closed file"):
            call()
    reader.close()
