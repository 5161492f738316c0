"""Where the lines of logs go, and what becomes of them when nobody reads."""

import logging
import os

import pytest

from harken.observe import outlet

LONG = "x" * 10_000


@pytest.fixture
def pipe():
    """What reads, and a handler that writes to it."""
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
