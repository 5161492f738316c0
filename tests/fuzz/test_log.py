"""Whatever a peer or an exception says, the log keeps its lines."""

import json
import logging
from types import SimpleNamespace

from hypothesis import given, settings as hypothesis_settings, strategies as st

from harken.observe.log import LogObserver, escape
from harken.settings import Settings

fuzz = hypothesis_settings(max_examples=60, deadline=None)
ANYTHING = st.text(st.characters(), max_size=40) | st.text("\n\r\x1b\x00\x85\x9b\u2028\udc80 a", max_size=20)


def formatted(log_format, message, connection, peer, error):
    """Return the line for one record."""
    observer = LogObserver(Settings(SimpleNamespace(), {"log_format": log_format}))
    record = logging.LogRecord("harken", logging.ERROR, "file", 1, "%s", (message,), None)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
    vars(record).update(event="handler_failed", connection=connection, peer=peer, fields={"reason": escape(message)})
    return observer.handler.formatter.format(record)


@fuzz
@given(text=ANYTHING)
def test_escaped_text_is_one_harmless_line(text):
    """No line break in anybody's sense, no control character, and it can be encoded."""
    line = escape(text)
    assert len(line.splitlines()) <= 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in line)
    line.encode()


@fuzz
@given(text=st.text(max_size=40).filter(str.isprintable))
def test_printable_text_is_left_as_it_is(text):
    """Escaping is for what harms."""
    assert escape(text) == text


@fuzz
@given(message=ANYTHING, connection=ANYTHING, peer=ANYTHING, said=ANYTHING)
def test_a_text_record_keeps_its_lines(message, connection, peer, said):
    """One line, and an indented traceback under it."""
    first, *rest = formatted("text", message, connection, peer, ValueError(said)).splitlines()
    assert first[:4].isdecimal()
    assert rest
    assert all(line.startswith("    ") for line in rest)


@fuzz
@given(message=ANYTHING, connection=ANYTHING, peer=ANYTHING, said=ANYTHING)
def test_a_json_record_is_one_object_on_one_line(message, connection, peer, said):
    """Whatever is in it, it can be read back."""
    line = formatted("json", message, connection, peer, ValueError(said))
    assert len(line.splitlines()) == 1
    line.encode()
    entry = json.loads(line)
    assert entry["event"] == "handler_failed"
    assert entry["message"] == escape(message)
    assert "ValueError" in entry["traceback"]
