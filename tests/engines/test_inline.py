"""The inline engine: here and now."""

import threading

import pytest

from harken.engines.inline import Engine


@pytest.fixture
def engine():
    """An engine without options."""
    return Engine(pytest.fail)


def test_it_runs_at_once_in_the_calling_thread(engine):
    """When spawn() returns the handler is done."""
    seen = []
    assert engine.spawn(lambda *args: seen.append((args, threading.current_thread())), 1, 2) == 0
    assert seen == [((1, 2), threading.current_thread())]
    assert engine.in_loop
    assert not engine.in_child


def test_what_a_handler_raises_leaves_the_loop(engine):
    """As stdlib's plain server has it: the hooks above decide."""

    def leave():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.spawn(leave)


def test_it_is_never_full_and_nothing_is_left(engine):
    """There is nobody to wait for."""
    assert not engine.full
    assert engine.join(None) == 0
    request = object()
    assert engine.adopt(request) is request
