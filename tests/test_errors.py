"""Errors: who is to blame, which built-in older code catches, and names that were meant."""

import pytest

from harken import errors
from harken.errors import HarkenError, nearest

BUILT_INS = {
    "ConfigError": ValueError,
    "LifecycleError": RuntimeError,
    "ConnectionClosed": ConnectionError,
    "PeerError": ConnectionError,
    "FrameError": errors.PeerError,
    "PreambleError": errors.PeerError,
    "DeadlineExceeded": TimeoutError,
    "LimitExceeded": HarkenError,
    "HandoffError": OSError,
}


@pytest.mark.parametrize("name, parent", BUILT_INS.items())
def test_each_error_is_harkens_and_what_older_code_catches(name, parent):
    """Every error can be caught as HarkenError and as its built-in."""
    raised = getattr(errors, name)("it happened")
    assert isinstance(raised, HarkenError)
    assert isinstance(raised, parent)
    assert str(raised) == "it happened"


def test_no_error_is_missing_from_the_list_above():
    """``errors.__all__`` holds these and their root, and nothing else."""
    assert set(errors.__all__) == {"HarkenError", *BUILT_INS}


@pytest.mark.parametrize(
    "typed, known, said",
    [
        ("max_conections", ["max_connections", "backlog"], "; did you mean 'max_connections'?"),
        ("zzz", ["max_connections", "backlog"], ""),
        ("anything", [], ""),
    ],
)
def test_nearest_names_one_close_name_or_none(typed, known, said):
    """A typing error gets the name that was meant; anything else gets no guess."""
    assert nearest(typed, known) == said


def test_nearest_takes_any_iterable():
    """A generator of names will do."""
    assert nearest("thred", (name for name in ("pool", "thread"))) == "; did you mean 'thread'?"
