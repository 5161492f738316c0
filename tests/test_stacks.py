"""Looking at the stacks of other threads."""

import gc
import os
import sys
import threading

import pytest

from harken import stacks, stalls
from harken.process.activity import activity

BEFORE_3_12 = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="only with Python 3.11: later ones collect between bytecodes"
)


@BEFORE_3_12
@pytest.mark.parametrize("how", ["sight", "activity", "foreign_loop"])
def test_no_garbage_is_collected_while_frames_are_asked_for(how, monkeypatch):
    """A finalizer could let the thread go on in the middle, and the frame would be another's memory."""
    enabled = []
    frames = sys._current_frames

    def look():
        enabled.append(gc.isenabled())
        return frames()

    monkeypatch.setattr(sys, "_current_frames", look)
    {
        "sight": lambda: stalls.sight(threading.get_ident()),
        "activity": lambda: activity([]),
        "foreign_loop": lambda: stacks.foreign_loop(None),
    }[how]()
    assert enabled == [False]
    assert gc.isenabled()


@BEFORE_3_12
def test_a_program_that_collects_by_itself_stays_so():
    """What was off is off afterwards."""
    gc.disable()
    try:
        with stacks.uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


@BEFORE_3_12
def test_a_child_that_is_forked_meanwhile_collects():
    """The thread that would switch it on again stayed in the parent."""
    with stacks.uncollected():
        pid = os.fork()
        if pid == 0:
            os._exit(0 if gc.isenabled() else 1)
    assert os.waitpid(pid, 0)[1] == 0
