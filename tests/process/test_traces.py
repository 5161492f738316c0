"""What a trace shows of secrets: nothing of them, as far as a piece shows that it holds any."""

import pytest

from harken.process.traces import redact


@pytest.mark.parametrize(
    "data, shown",
    [
        (b"user=a&password=abc&x=1", b"user=a&password=***&x=1"),
        (b'{"password": "correct horse battery", "x": 1}', b'{"password": "***", "x": 1}'),
        (b'{"password":"one \\" two","x":1}', b'{"password":"***","x":1}'),
        (b"{'api_key': 'one, two', 'x': 1}", b"{'api_key': '***', 'x': 1}"),
        (b'secret = "cut off here', b'secret = "***'),
        (b"token=it's", b"token=***"),
        (b'{"passwd": 1234}', b'{"passwd": ***'),
        (b"Authorization: Bearer abc\r\nHost: a\r\n", b"Authorization: ***\r\nHost: a\r\n"),
        (b"PASS word\r\n", b"PASS ***\r\n"),
        (b'{"passenger": "me"}', b'{"passenger": "me"}'),
    ],
)
def test_secrets_are_masked(data, shown):
    """In forms, in JSON and what looks like it, in heads, with blanks and quotes in them; and nothing else."""
    assert redact(data) == shown
