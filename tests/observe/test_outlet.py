"""Where the lines of logs go, and what becomes of them when nobody reads."""

import logging
import os

import pytest

from harken.errors import ConfigError
from harken.observe import outlet

LONG = "x" * 10_000


@pytest.fixture
def fifo(tmp_path):
    """The path of a named pipe."""
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


def read_fifo(path):
    """Return what reads a named pipe; it does not wait."""
    return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


@pytest.fixture(params=["a pipe", "a named pipe"])
def pipe(request, fifo):
    """What reads, and a handler that writes to it."""
    if request.param == "a named pipe":
        with read_fifo(fifo) as reader:
            handler = outlet.open_log(fifo, None)
            yield reader, handler
            handler.close()
        return
    reading, writing = os.pipe()
    with open(reading) as reader, open(writing, "w") as writer:
        yield reader, outlet.open_log(None, writer)


def line(text):
    """What a log writes."""
    return logging.LogRecord("harken", logging.INFO, "", 0, text, None, None)


@pytest.mark.parametrize("words", ["a line", LONG])
def test_a_pipe_that_nobody_reads_keeps_nobody(pipe, monkeypatch, caplog, words):
    """Lines are lost, and their number is told when somebody reads again; what is torn off ends its line."""
    monkeypatch.setattr(outlet, "PATIENCE_SECONDS", 0.0)
    reader, handler = pipe
    for _ in range(10_000):
        handler.handle(line(words))
    lost = handler._lost
    assert 0 < lost < 10_000
    os.set_blocking(reader.fileno(), False)
    told = reader.read().splitlines()
    assert [each for each in told if each == words] == [words] * (10_000 - lost)
    handler.handle(line("heard again"))
    assert f"{lost:,} lines to" in caplog.text
    assert reader.read().splitlines()[-1] == "heard again"


def test_long_lines_are_written_whole(pipe):
    """While there is room."""
    reader, handler = pipe
    handler.handle(line(LONG))
    os.set_blocking(reader.fileno(), False)
    assert reader.read() == LONG + "\n"


def test_a_named_pipe_that_nobody_reads_is_told_at_once(fifo):
    """Opening it would wait until somebody does, and nobody would know for what."""
    with pytest.raises(ConfigError, match=r"fifo' cannot be opened: nobody reads this pipe"):
        outlet.open_log(fifo, None)


def test_a_named_pipe_is_opened_anew(fifo, capfd, monkeypatch):
    """A new one at its place, also from another directory; while nobody reads that, the old one goes on."""
    monkeypatch.chdir(os.path.dirname(fifo))
    with read_fifo(fifo) as old:
        handler = outlet.open_log("fifo", None)
        monkeypatch.chdir("/")
        os.unlink(fifo)
        os.mkfifo(fifo)
        outlet.reopen(handler)
        handler.handle(line("to the old one"))
        assert old.read() == "to the old one\n"
        assert not capfd.readouterr().err  # nothing is lost
        with read_fifo(fifo) as new:
            outlet.reopen(handler)
            handler.handle(line("to the new one"))
            assert new.read() == "to the new one\n"
        handler.handle(line("to nobody"))
        assert f"cannot write the log to {fifo}: Broken pipe" in capfd.readouterr().err
        handler.close()
        assert handler.stream.closed


@pytest.mark.parametrize("special", [False, True])
def test_letters_that_the_locale_does_not_have(fifo, tmp_path, special):
    """They are escaped, as on stderr; the line is not lost for them."""
    path = fifo if special else str(tmp_path / "log")
    with read_fifo(fifo) as reader:
        handler = outlet.open_log(path, None)
        handler.stream.reconfigure(encoding="latin-1", errors=handler.stream.errors)
        handler.handle(line("\u65e5"))
        handler.close()
        told = reader.read() if special else (tmp_path / "log").read_text()
    assert told == "\\u65e5\n"
