"""Handlers under way on a hub: counted without the one who asks, and waited for."""

from __future__ import annotations

import threading

from greenlet import getcurrent, greenlet

from harken.engines._underway import Job, Underway, caller

PATIENCE = 10.0  # seconds


def test_the_caller_does_not_count_as_another() -> None:
    """Neither by itself, nor by the plain thread that does something for it."""
    underway = Underway(lambda: None)
    me, other = getcurrent(), greenlet()
    underway.jobs.update((me, other))
    underway.lodgers = 3
    assert (len(underway), underway.others) == (5, 4)
    underway.jobs.discard(me)
    assert underway.others == 4
    token = caller.set(other)
    assert underway.others == 3
    caller.reset(token)


def test_who_waits_is_told_of_an_end_alone() -> None:
    """The hub is woken to look; what it tells without an end wakes nobody."""
    woken = threading.Event()
    underway = Underway(woken.set)
    underway.lodgers = 2
    thread = threading.Thread(target=underway.await_end, args=(PATIENCE,))
    thread.start()
    assert woken.wait(PATIENCE)
    underway.ring()
    thread.join(0.05)
    assert thread.is_alive()
    underway.lodgers = 1
    underway.ring()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_job_counts_until_its_green_thread_has_ended() -> None:
    """By itself before it begins, then by its green thread, also where that fails."""
    underway = Underway(lambda: None)
    seen: list[bool] = []

    def handler() -> None:
        seen.append(getcurrent() in underway.jobs and job not in underway.jobs)
        raise ZeroDivisionError

    job = Job(underway.jobs, handler, ())
    underway.jobs.add(job)
    try:
        greenlet(job).switch()
    except ZeroDivisionError:
        seen.append(not underway.jobs)
    assert seen == [True, True]
