"""Stalls of gevent's loop are found as those of the hub alone."""

from __future__ import annotations

import pytest

from .patched import run

STALLS = """
from harken import events
block = monkey.get_original("time", "sleep")
stalls = []
events.subscribe(stalls.append, "stalled")

def first(handler, word):
    block(0.3)

def later(handler, word):
    time.sleep(0.3)  # gives way
    block(0.3)

def beside():
    block(0.3)

def elsewhere(handler, word):
    gevent.spawn(beside).join()

def computes(handler, word):
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass

for function in first, later, elsewhere, computes, lambda handler, word: time.sleep(0.3):
    with serving(function) as server:
        server.configure(stall_after=0.15)
        ask(server)
        time.sleep(0.3)  # the loop sleeps, which is no stall
print(*[event.function for event in stalls])
print([event.connection is None for event in stalls], all(0.2 < event.seconds < 0.5 for event in stalls))
"""

SUBSCRIBERS = """
from harken import events
block = monkey.get_original("time", "sleep")
calls = []

def tell(event):
    calls.append(event)
    gevent.sleep(0.001)
    if ENDS:
        raise gevent.Timeout

events.subscribe(tell, "stalled")
sys.stderr = open(os.devnull, "w")

def stall():
    with serving(lambda handler, word: block(0.1)) as server:
        server.configure(stall_after=0.05)
        for _ in range(2):
            before = len(calls)
            while len(calls) == before:  # a busy machine may let the watchdog look too late
                ask(server)
                time.sleep(0.05)

def descriptors():
    return len(os.listdir("/proc/self/fd"))

stall()
few = descriptors()
for _ in range(5):
    stall()
print(len(calls), descriptors() - few)
"""


@pytest.mark.parametrize("kind", ["compiled", "fallback"])
def test_stalls_are_told_of(run_program, kind):
    """Whatever keeps gevent's loop: a handler before and after a wait of gevent's, another greenlet of the program."""
    assert run(run_program, "before", STALLS, kind) == ("first later beside computes\n[False, False, True, False] True")


def test_libuv_tells_of_the_hubs_own_turns_alone(run_program):
    """It has no news of its rounds."""
    assert run(run_program, "before", STALLS, loop="libuv-cffi") == "first computes\n[False, False] True"


def test_the_report_speaks_of_gevent(run_program):
    """What it cannot patch is not to be given to it, nor to threads, which are its own."""
    text = STALLS + "from harken.observe import stalls as told\nreport = told.StallReport()\n"
    text += "report.note(stalls[0])\nprint(report.text())"
    last = run(run_program, "before", text).splitlines()[-1]
    assert last.startswith("harken: give what blocks there, which gevent could not patch, to harken.green.offload();")


@pytest.mark.parametrize("ends", [False, True])
def test_a_subscriber_may_use_gevent(run_program, ends):
    """It gets a loop of its own in the watchdog's thread, which goes with that; what it raises ends nothing."""
    told, grown = run(run_program, "before", f"ENDS = {ends}\n{SUBSCRIBERS}").split()
    assert int(told) >= 12  # a busy machine may stall once more
    assert grown == "0"
