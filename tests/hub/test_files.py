"""The files of a connection: buffered reading, and answers that are joined but never late."""

from __future__ import annotations

import contextlib
import io
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from harken._hub.growth import grown

PATIENCE = 10.0  # seconds that anything here may take at most


@pytest.fixture
def hub(kind: ModuleType) -> Iterator[Any]:
    """Return a hub, and close it."""
    hub = kind.Hub()
    yield hub
    hub.close()


@pytest.fixture
def pair(hub: Any) -> Iterator[tuple[Any, socket.socket]]:
    """Return a Connection and a plain socket, the two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near = hub.adopt(listener.accept()[0])
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
        reader, model = near.open_reader(), io.BytesIO(data)
        calls = 0
        while model.tell() < len(data):
            calls += 1
            match chance.randrange(8):
                case 7:  # a hint is exceeded before it ends the reading; BytesIO ends sooner
                    hint = chance.randrange(1, 600)
                    assert reader.readlines(hint) == io.BufferedIOBase.readlines(model, hint)
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

    reader = near.open_reader()
    assert run(hub, lambda: (reader.readline() == line, len(reader.read())), feed)[0] == (True, 400_000)
    assert reader.readlines() == []
    reader.close()


@pytest.mark.parametrize("how", ["read", "readline"])
def test_who_gives_up_waiting_for_memory_loses_nothing(
    hub: Any, kind: ModuleType, pair: tuple[Any, socket.socket], how: str
) -> None:
    """The next read finds all that had come."""
    near, far = pair
    other = hub.adopt(far)
    data = b"".join(b"%07d " % number for number in range(50_000)) + b"\n"
    asked: list[int] = []

    def give_up(sock: Any, size: int) -> None:
        if size and not asked:
            asked.append(size)
            raise TimeoutError("no memory")

    def read() -> bytes:
        with near.open_reader() as reader:
            with pytest.raises(TimeoutError, match="no memory"):
                reader.readline() if how == "readline" else reader.read(len(data))
            return bytes(reader.read(len(data)))

    kind.on_growth(give_up)
    try:
        with other:
            assert run(hub, read, lambda: other.sendall(data))[0] == data
    finally:
        kind.on_growth(grown)
    assert asked


def test_a_buffer_that_cannot_be_written_to_takes_nothing(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """What has come is there for the next read."""
    near, far = pair
    far.sendall(b"data")

    def read() -> bytes:
        with near.open_reader() as reader:
            assert reader.mode == "rb"
            for call in (reader.readinto, reader.readinto1):
                with pytest.raises(TypeError):
                    call(b"read only")
            return reader.read(4)  # type: ignore[no-any-return]

    assert run(hub, read) == [b"data"]


def test_answers_to_a_pipeline_are_joined(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """While requests are unread, answers wait for one packet; before the green thread waits they are sent."""
    near, far = pair
    far.sendall(b"one\ntwo\nthree\n")

    def serve() -> list[bytes]:
        reader = near.open_reader()
        writer = near.open_writer(reader)
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
    "way", ["recv", "sleep", "park", "wait", "end", "close", "shutdown", "sendall", "thread", "flush", "fileno"]
)
def test_no_answer_waits_for_the_peer(hub: Any, pair: tuple[Any, socket.socket], way: str) -> None:
    """Whatever the green thread does next, what it wrote is sent first."""
    near, far = pair
    far.sendall(b"a\nb")  # half a request stays unread
    parked: list[Any] = []

    def serve() -> None:
        reader = near.open_reader()
        writer = near.open_writer(reader)
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
            case "thread":
                other = threading.Thread(target=near.sendall, args=(b"later",))
                other.start()
                other.join()
            case "flush":
                writer.flush()
            case "fileno":
                near.fileno()

    hub.spawn(serve)
    hub.step(0)
    assert far.recv(2) == b"a\n"
    if way in ("sendall", "thread"):
        assert far.recv(10) == b"later"


def test_what_another_thread_writes_comes_after_the_answers(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """They wait for room, which is there when that thread writes, and before their own green thread has its turn."""
    near, far = pair
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    far.sendall(b"a\nb")
    answer = bytes(range(256)) * 32
    filled: list[int] = []
    waits: list[bool] = []

    def serve() -> None:
        with near.open_reader() as reader, near.open_writer(reader) as writer:
            reader.readline()
            for _ in range(10):  # the client's kernel may be late to say that it has room
                with contextlib.suppress(BlockingIOError):
                    while True:
                        filled.append(near.send(bytes(1000), socket.MSG_DONTWAIT))
                hub.sleep(0.01)
            waits.append(True)
            writer.write(answer)
            near.sendall(b"own")

    def read() -> bytes:
        while not waits:
            hub.sleep(0.001)
        assert len(far.recv(sum(filled), socket.MSG_WAITALL)) == sum(filled)
        other = threading.Thread(target=near.sendall, args=(b"other",))
        other.start()
        other.join(PATIENCE)
        assert not other.is_alive()
        far.setblocking(False)
        got = b""
        while len(got) < len(answer) + len(b"otherown"):
            with contextlib.suppress(BlockingIOError):
                got += far.recv(65536)
            hub.sleep(0.001)
        return got

    assert run(hub, serve, read)[1] == answer + b"otherown"


def test_a_peer_that_has_gone(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """What cannot be sent any more is told by a later call."""
    near, far = pair
    far.sendall(b"a\nb\nc")
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    far.close()

    def serve() -> None:
        with near.open_reader() as reader, near.open_writer(reader) as writer:
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
        with near.open_reader() as reader, near.open_writer(reader) as writer:
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
    reader = near.open_reader()
    writer = near.open_writer(reader)
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


def test_what_they_cannot_do_is_unsupported(pair: tuple[Any, socket.socket]) -> None:
    """Every method of ``io.BufferedIOBase`` is there, and says so as io's do: a program may try."""
    connection = pair[0]
    reader, writer = connection.open_reader(), connection.open_writer()
    calls = {
        reader: [("write", b"x"), ("writelines", [b"x"]), ("seek", 0), ("tell",), ("truncate",), ("detach",)],
        writer: [("read",), ("read1",), ("readinto", bytearray(1)), ("readline",), ("readlines",), ("tell",)],
    }
    for file, names in calls.items():
        for name, *args in names:
            with pytest.raises(io.UnsupportedOperation):
                getattr(file, name)(*args)


def test_a_bounded_reader_reads_no_further_ahead(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """`size` bytes at once, so what is left is the connection's own."""
    near, far = pair
    far.sendall(b"one\ntwo\nthree\n")

    def serve() -> tuple[bytes, bytes]:
        with near.open_reader(4) as reader:
            return reader.readline(), near.recv(100)

    assert run(hub, serve)[0] == (b"one\n", b"two\nthree\n")


@pytest.mark.parametrize("call", ["read", "readline", "read(5)", "read(500_000)", "readinto"])
def test_a_timeout_loses_nothing(hub: Any, pair: tuple[Any, socket.socket], call: str) -> None:
    """What had come before the timeout is there for the next read."""
    near, far = pair
    far.sendall(b"half")

    def serve() -> bytes:
        near.settimeout(0.05)
        with near.open_reader() as reader:
            with pytest.raises(TimeoutError):
                match call:
                    case "read":
                        reader.read()
                    case "readline":
                        reader.readline()
                    case "readinto":
                        reader.readinto(bytearray(5))
                    case "read(5)":
                        reader.read(5)
                    case _:
                        reader.read(500_000)
            near.settimeout(PATIENCE)
            far.sendall(b" and half")
            far.shutdown(socket.SHUT_WR)
            return bytes(reader.read())

    assert run(hub, serve)[0] == b"half and half"


def test_a_promise_of_much_costs_little(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """Memory grows with what comes, not with what is asked for."""
    near, far = pair
    far.sendall(b"little")
    far.shutdown(socket.SHUT_WR)
    with near.open_reader() as reader:
        assert run(hub, lambda: reader.read(1 << 60))[0] == b"little"


def test_another_thread_sends_what_a_computing_handler_wrote(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """`flush_pending_nowait()` sends from outside, and what the handler writes then comes after it, once."""
    near, far = pair
    far.sendall(b"a\nb\nc")
    sent: list[int] = []

    def watch() -> None:
        sent.append(hub.flush_pending_nowait())

    def serve() -> tuple[bytes, bytes]:
        with near.open_reader() as reader, near.open_writer(reader) as writer:
            writer.write(reader.readline())
            watchdog = threading.Thread(target=watch)
            watchdog.start()
            watchdog.join()
            first = far.recv(100)
            writer.write(reader.readline())
            writer.flush()
            return first, far.recv(100)

    assert run(hub, serve)[0] == (b"a\n", b"b\n")
    assert sent == [2]
    assert hub.flush_pending_nowait() == 0


def test_what_does_not_fit_is_sent_later_in_order(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """A peer that does not read lets the watchdog send a part; the rest follows."""
    near, far = pair
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    requests = 100
    far.sendall(b"x\n" * requests)
    answer = bytes(range(256)) * 230  # within what is joined
    other = hub.adopt(far)
    watched: list[int] = []

    def serve() -> None:
        with near.open_reader() as reader, near.open_writer(reader) as writer:
            for _ in range(requests):
                reader.readline()
                writer.write(answer)
                watched.append(hub.flush_pending_nowait())
        near.close()

    def drain() -> bytes:
        pieces = []
        while piece := other.recv(50_000):
            pieces.append(piece)
        other.close()
        return b"".join(pieces)

    assert run(hub, serve, drain)[1] == answer * requests
    assert len(answer) in watched
    assert any(0 <= sent < len(answer) for sent in watched[:-1])


def keep_waiting(hub: Any) -> tuple[Any, socket.socket, Callable[..., Any]]:
    """Return a Connection, its peer, and what joins an answer that the peer will not take whole, and then calls."""
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    near = hub.adopt(near)

    def answer(function: Callable[[], object]) -> None:
        far.sendall(b"one\ntwo\n")
        with near.open_reader() as reader, near.open_writer(reader) as writer:
            reader.readline()
            writer.write(bytes(60_000))
            function()
            writer.flush()

    return near, far, answer


def wait_for_the_wait(hub: Any, near: Any) -> None:
    """Wait, in a green thread, until another one waits to write."""
    while near.waits_for() != "writing":
        hub.sleep(0.001)


LEAVE = {
    "detach": lambda near: os.close(near.detach()),
    "fileno": lambda near: near.fileno(),
    "shutdown": lambda near: near.shutdown(socket.SHUT_WR),
    "settle": lambda near: near.settle(),
}


@pytest.mark.parametrize("how", LEAVE)
def test_nobody_else_waits_for_a_peer_that_does_not_take_the_answers(hub: Any, how: str) -> None:
    """Whoever closes the connection meanwhile, or asks for its descriptor, does so at once."""
    near, far, answer = keep_waiting(hub)

    def serve() -> None:
        answer(lambda: None)

    def other() -> str:
        wait_for_the_wait(hub, near)
        LEAVE[how](near)
        far.close()
        return "done"

    with near:
        failure, done = run(hub, serve, other)
    assert isinstance(failure, OSError)
    assert done == "done"


def test_an_end_that_waits_touches_no_other_descriptor(hub: Any) -> None:
    """The connection is closed meanwhile, and its number is another's."""
    near, far, answer = keep_waiting(hub)

    def serve() -> None:
        answer(near.end)

    def other() -> tuple[socket.socket, socket.socket]:
        wait_for_the_wait(hub, near)
        number = near.detach()
        os.close(number)
        made = socket.socketpair()
        assert number in {each.fileno() for each in made}
        return made

    with far, near:
        first, second = run(hub, serve, other)[1]
    with first, second:
        first.sendall(b"there")
        second.sendall(b"and back")
        assert (second.recv(10), first.recv(10)) == (b"there", b"and back")


def test_what_was_joined_goes_before_what_a_forked_child_writes(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """Once."""
    near, far = pair
    far.sendall(b"one\ntwo\n")

    def serve() -> None:
        with near.open_reader() as reader, near.open_writer(reader) as writer:
            reader.readline()
            writer.write(b"parent, ")
            if not (child := os.fork()):
                writer.write(b"child")
                writer.flush()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        near.close()

    assert run(hub, serve) == [None]
    with far.makefile("rb") as file:
        assert file.read() == b"parent, child"


def test_files_outside_a_hub(hub: Any, pair: tuple[Any, socket.socket]) -> None:
    """In a plain thread they read and write at once, a long line and a long read too."""
    near, far = pair
    reader = near.open_reader()
    writer = near.open_writer(reader)
    far.sendall(b"a\nb\n")
    assert reader.readline() == b"a\n"
    assert writer.write(b"answer") == 6
    assert far.recv(100) == b"answer"
    feeder = threading.Thread(target=far.sendall, args=(b"y" * 300_000 + b"\n" + b"z" * 300_000,))
    feeder.start()
    assert reader.readline() == b"b\n"
    assert len(reader.readline()) == 300_001
    assert reader.read(300_000) == b"z" * 300_000
    feeder.join()
    writer.close()
    reader.close()
