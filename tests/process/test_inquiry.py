"""One question to several workers, of which some do not answer."""

from types import SimpleNamespace

import pytest

from harken.process import inquiry
from harken.process.inquiry import Inquiries


@pytest.fixture
def ask(monkeypatch):
    """Return a function that asks two workers, of which one gives an answer and the other none in time."""

    def asked(verb, answer):
        monkeypatch.setattr(inquiry, "ANSWER_SECONDS", 0.0)
        told = []
        channel = SimpleNamespace(send=lambda **message: told.append(message["number"]) or True)
        here, silent = (SimpleNamespace(pid=pid, channel=channel) for pid in (7, 8))
        replies = []
        inquiries = Inquiries()
        inquiries.ask([here, silent], verb, {}, lambda **reply: replies.append(reply))
        inquiries.hear(here, {"number": told[0], "result": answer})
        inquiries.turn()
        (reply,) = replies
        return reply

    return asked


@pytest.mark.parametrize("verb", ["kill", "trace"])
def test_a_connection_is_not_said_to_have_gone_while_somebody_may_have_it(ask, verb):
    """Who does not answer may serve it; where another had it, that is enough."""
    assert ask(verb, False) == {"error": "process 8 does not answer"}
    assert ask(verb, True) == {"result": True}


def test_lists_go_without_those_that_do_not_answer(ask):
    """What the others know is worth more than an error."""
    assert ask("connections", [{"id": "a-1"}]) == {"result": [{"id": "a-1"}]}
