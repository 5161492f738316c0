"""Threads that are taken up again: who is idle, who waits, and how they go."""

import contextlib
import contextvars
import gc
import os
import sys
import threading
import time
import weakref

import pytest
from waiting import wait_until

from harken.engines import _crew
from harken.engines._crew import Crew

PATIENCE = 5.0  # seconds


class Job:
    """A job that says when it begins and ends when told to."""

    def __init__(self):
        self.begun, self.going = threading.Event(), threading.Event()
        self.thread = None

    def __call__(self):
        self.thread = threading.current_thread()
        self.begun.set()
        assert self.going.wait(PATIENCE)

    def end(self):
        self.going.set()


@pytest.fixture
def make():
    """Make crews whose threads are gone when the test ends."""
    made = []

    def crew(limit=None, max_backlog=0, daemon=False):
        made.append(Crew(lambda: daemon, limit, max_backlog))
        return made[-1]

    yield crew
    for each in made:
        each.join(time.monotonic() + PATIENCE)


@pytest.fixture
def no_more_threads(monkeypatch):
    """Return a context in which the system starts no more threads."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    @contextlib.contextmanager
    def shortage():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            yield

    return shortage


def busy(crew, count=1):
    """Submit jobs and return them once they run."""
    jobs = [Job() for _ in range(count)]
    for job in jobs:
        crew.submit(job)
        assert job.begun.wait(PATIENCE)
    return jobs


def test_each_job_has_a_context_of_its_own(make):
    """As in a thread that was started for it: what an earlier one has set in the same thread is not seen."""
    crew, variable, seen = make(limit=1, max_backlog=1), contextvars.ContextVar("variable", default="unset"), []

    def job():
        seen.append((variable.get(), threading.get_ident()))
        variable.set("set")

    for number in (1, 2):
        crew.submit(job)
        wait_until(lambda number=number: len(seen) == number)
    (first, thread), (second, same) = seen
    assert (first, second) == ("unset", "unset")
    assert thread == same


def test_an_idle_thread_is_taken_up_again(make):
    """Jobs one after the other need one thread."""
    crew, seen = make(), []
    for _ in range(20):
        crew.submit(lambda: seen.append(threading.current_thread()))
        wait_until(lambda: crew._idle == 1)
    assert len(seen) == 20
    assert len(set(seen)) == 1


def test_jobs_at_the_same_time_have_threads_of_their_own(make):
    """Without a limit nobody waits, and names differ."""
    crew = make()
    jobs = busy(crew, 5)
    assert len({job.thread.name for job in jobs}) == 5
    assert all("process_request_thread" in job.thread.name for job in jobs)
    assert not crew.full
    for job in jobs:
        job.end()


@pytest.mark.parametrize("daemon", [True, False])
def test_threads_are_daemons_as_asked_at_their_start(make, daemon):
    """``daemon_threads`` of the server decides."""
    (job,) = busy(make(daemon=daemon))
    assert job.thread.daemon is daemon
    job.end()


def test_at_the_limit_jobs_wait_for_a_thread(make):
    """The next free thread takes them, in their order."""
    crew, order = make(limit=1, max_backlog=3), []
    (first,) = busy(crew)
    for number in range(3):
        crew.submit(order.append, number)
    assert crew.running == 4
    assert order == []
    first.end()
    wait_until(lambda: len(order) == 3)
    assert order == [0, 1, 2]
    assert len(crew._threads) == 1


def test_full_is_all_threads_and_all_places(make):
    """Neither a free thread nor a free place, and not before."""
    crew = make(limit=2, max_backlog=1)
    assert not crew.full
    jobs = busy(crew, 2)
    assert not crew.full
    crew.submit(lambda: None)
    assert crew.full
    jobs[0].end()
    wait_until(lambda: not crew.full)
    jobs[1].end()


def test_room_is_told_when_a_thread_is_free(make):
    """on_room runs after each job of a limited crew."""
    crew, room = make(limit=1), threading.Event()
    crew.on_room = room.set
    (job,) = busy(crew)
    assert crew.full
    assert not room.is_set()
    job.end()
    assert room.wait(PATIENCE)
    assert not crew.full


def test_submit_when_room_waits(make):
    """A loop that does not ask ``full`` is held here."""
    crew, done = make(limit=1), threading.Event()
    (job,) = busy(crew)
    submitter = threading.Thread(target=crew.submit_when_room, args=(done.set,))
    submitter.start()
    submitter.join(0.02)
    assert submitter.is_alive()
    assert not done.is_set()
    job.end()
    submitter.join(PATIENCE)
    assert done.wait(PATIENCE)


def test_an_exception_is_shown_and_the_thread_lives_on(make, monkeypatch):
    """As in a thread of its own it reaches threading.excepthook; the next job runs in the same thread."""
    shown, seen = [], []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append((args.exc_type, args.thread)))
    crew = make(limit=1, max_backlog=5)

    def broken():
        seen.append(threading.current_thread())
        raise LookupError("job's fault")

    crew.submit(broken)
    crew.submit(lambda: seen.append(threading.current_thread()))
    wait_until(lambda: len(seen) == 2)
    assert seen[0] is seen[1]
    assert shown == [(LookupError, seen[0])]


@pytest.mark.parametrize("error, times", [(SystemExit, 1), (KeyboardInterrupt, 1), (GeneratorExit, 1)])
def test_what_is_no_exception_ends_the_job_alone(make, monkeypatch, error, times):
    """What is no Exception is shown as in a thread of its own (the default hook keeps SystemExit to itself)."""
    shown, after = [], threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))
    crew = make(limit=1, max_backlog=5)

    def leave():
        raise error

    crew.submit(leave)
    crew.submit(after.set)
    assert after.wait(PATIENCE)
    assert shown == [error] * times


def test_idle_threads_go_after_a_while(make, monkeypatch):
    """The threads of a rush hour do not stay."""
    monkeypatch.setattr(_crew, "IDLE_SECONDS", 0.01)
    crew = make()
    for job in busy(crew, 3):
        job.end()
    wait_until(lambda: not crew._threads)
    assert (crew._idle, crew.running) == (0, 0)
    done = threading.Event()
    crew.submit(done.set)
    assert done.wait(PATIENCE)


def test_a_thread_that_was_promised_a_job_does_not_go(make, monkeypatch):
    """Jobs that come just as threads go are all done."""
    monkeypatch.setattr(_crew, "IDLE_SECONDS", 0.0005)
    crew, done = make(limit=3, max_backlog=1000), []
    for number in range(300):
        crew.submit(done.append, number)
        time.sleep(0.0005 if number % 3 else 0)
    wait_until(lambda: len(done) == 300)
    assert sorted(done) == list(range(300))


def test_a_smaller_limit_is_reached_as_threads_get_idle(make):
    """Nobody is interrupted."""
    crew = make(limit=4)
    jobs = busy(crew, 4)
    crew.limit = 1
    assert crew.full
    for job in jobs:
        job.end()
    wait_until(lambda: len(crew._threads) <= 1)
    done = threading.Event()
    crew.submit(done.set)
    assert done.wait(PATIENCE)


def test_a_larger_limit_holds_at_once(make):
    """The next job gets a new thread."""
    crew = make(limit=1)
    (first,) = busy(crew)
    crew.limit = 2
    (second,) = busy(crew)
    first.end()
    second.end()


def test_join_waits_for_jobs_and_sends_the_threads_home(make):
    """Afterwards no thread is left."""
    crew = make(limit=2, max_backlog=5)
    jobs = busy(crew, 2)
    crew.submit(lambda: None)
    timer = threading.Timer(0.02, lambda: [job.end() for job in jobs])
    timer.start()
    assert crew.join(None) == 0
    assert not crew._threads
    assert not any(job.thread.is_alive() for job in jobs)
    timer.join()


def test_join_counts_what_is_left_at_the_deadline(make):
    """Running and waiting jobs, and it returns in time."""
    crew = make(limit=2, max_backlog=5)
    jobs = busy(crew, 2)
    crew.submit(lambda: None)
    began = time.monotonic()
    assert crew.join(time.monotonic() + 0.02) == 3
    assert time.monotonic() - began < PATIENCE
    for job in jobs:
        job.end()
    assert crew.join(time.monotonic() + PATIENCE) == 0


def test_join_of_a_crew_that_never_worked(make):
    """Nothing to wait for."""
    assert make().join(None) == 0


def test_join_from_its_own_thread_does_not_wait_for_itself(make):
    """A handler may close its server."""
    crew, left = make(), []
    crew.submit(lambda: left.append(crew.join(time.monotonic() + PATIENCE)))
    wait_until(lambda: left)
    assert left == [0]
    wait_until(lambda: not crew._threads)


def test_join_from_its_own_thread_waits_for_the_others(make):
    """And counts them at the deadline."""
    crew, left = make(), []
    (other,) = busy(crew)
    crew.submit(lambda: left.append(crew.join(time.monotonic() + 0.02)))
    wait_until(lambda: left)
    assert left == [1]
    other.end()


def test_a_crew_works_again_after_join(make):
    """A server may be served again."""
    crew = make(limit=2)
    for _ in range(5):
        done = threading.Event()
        crew.submit(done.set)
        assert done.wait(PATIENCE)
        assert crew.join(time.monotonic() + PATIENCE) == 0
        assert not crew._threads


def test_a_job_that_comes_while_threads_go_home_is_done(make):
    """Threads that were sent home and have not gone yet count at the limit, and the job must not be left to them."""
    crew, done = make(limit=2, max_backlog=5), threading.Event()
    for job in busy(crew, 2):
        job.end()
    wait_until(lambda: crew._idle == 2)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1.0)  # seconds: the threads learn of neither before both have happened
    try:
        crew.release()
        crew.submit(done.set)
    finally:
        sys.setswitchinterval(interval)
    assert done.wait(1.0)


def test_an_idle_thread_keeps_nothing_alive(make):
    """The last connection may be collected while its thread waits for the next."""

    class Request:
        pass

    crew = make()
    request = Request()
    gone = weakref.ref(request)
    crew.submit(lambda thing: None, request)
    wait_until(lambda: crew._idle == 1)
    del request
    gc.collect()
    assert gone() is None


def test_a_thread_that_cannot_start_leaves_the_books_as_they_were(make, no_more_threads):
    """The caller learns it, the job is not run, and later jobs are."""
    crew = make(limit=1)
    with no_more_threads(), pytest.raises(RuntimeError, match="can't start new thread"):
        crew.submit(pytest.fail)
    assert (crew.running, len(crew._threads)) == (0, 0)
    done = threading.Event()
    crew.submit(done.set)
    assert done.wait(PATIENCE)


def test_where_no_more_threads_can_be_had_jobs_wait_for_those_there_are(make, no_more_threads):
    """In their order, and no more of them than at the limit: the crew is full before its limit."""
    crew, order = make(limit=3, max_backlog=2), []
    (first,) = busy(crew)
    with no_more_threads():
        crew.submit(order.append, 0)
        assert not crew.full
        crew.submit(order.append, 1)
    assert crew.full
    assert (crew.running, len(crew._threads)) == (3, 1)
    first.end()
    wait_until(lambda: len(order) == 2)
    assert order == [0, 1]
    assert not crew.full


def test_a_crew_without_a_backlog_is_full_when_no_more_threads_can_be_had(make, no_more_threads):
    """The job that found none waits all the same, and no other comes after it."""
    crew, done = make(limit=3), threading.Event()
    (first,) = busy(crew)
    assert not crew.full
    with no_more_threads():
        crew.submit(done.set)
    assert crew.full
    first.end()
    assert done.wait(PATIENCE)


@pytest.mark.parametrize("cause", ["submit", "resize"])
def test_a_thread_that_can_be_had_again_takes_who_has_waited_longest(make, no_more_threads, cause):
    """The next job has one started, and so has a larger limit."""
    crew, order = make(limit=1 if cause == "resize" else 2, max_backlog=5), []
    (first,) = busy(crew)
    with no_more_threads():
        crew.submit(order.append, 0)
        crew.submit(order.append, 1)
        if cause == "resize":
            crew.resize(2, 5)
    if cause == "resize":
        crew.resize(2, 5)
    else:
        crew.submit(order.append, 2)
    wait_until(lambda: len(order) == (2 if cause == "resize" else 3))
    assert order == sorted(order)
    first.end()


def test_a_crew_without_a_limit_lets_no_job_wait(make, no_more_threads):
    """It promises each a thread; nobody would bound those who wait."""
    crew = make()
    (first,) = busy(crew)
    with no_more_threads(), pytest.raises(RuntimeError, match="can't start new thread"):
        crew.submit(pytest.fail)
    first.end()


def test_many_submitters(make):
    """Jobs from several threads are each done once, with never more threads than the limit."""
    crew, done = make(limit=3, max_backlog=10_000), []
    most = []

    def submit(start):
        for number in range(start, start + 200):
            crew.submit(done.append, number)
            most.append(len(crew._threads))

    threads = [threading.Thread(target=submit, args=(start,)) for start in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    wait_until(lambda: len(done) == 600)
    assert len(set(done)) == 600
    assert max(most) <= 3


def test_the_end_of_the_program_does_not_wait_for_idle_threads(run_program):
    """Threads that are no daemons and wait for work are released before the interpreter waits for them."""
    program = """
import threading
from harken.engines._crew import Crew
crew, done = Crew(lambda: False), threading.Event()
crew.submit(done.set)
done.wait(10)
print("main ends")
"""
    process = run_program("-c", program)
    began = time.monotonic()
    assert process.communicate(timeout=20) == ("main ends\n", "")
    assert process.returncode == 0
    assert time.monotonic() - began < _crew.IDLE_SECONDS


def test_a_forked_child_has_hooks_threads_of_its_own():
    """All of the parent's are at work, and stayed there: a hook in the child runs all the same."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def hook():
        begun.release()
        go_on.wait(PATIENCE)

    try:
        for _ in range(_crew.MOST_BESIDE):
            _crew.beside(hook)
        for _ in range(_crew.MOST_BESIDE):
            assert begun.acquire(timeout=PATIENCE)
        pid = os.fork()
        if pid == 0:
            ran = threading.Event()
            try:
                _crew.beside(ran.set)
            finally:
                os._exit(0 if ran.wait(PATIENCE) else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        go_on.set()


def test_a_forked_child_has_threads_of_its_own(make):
    """The idle ones of the parent stayed there: jobs in the child wait for none of them."""
    crew = make(limit=1, daemon=True)
    done = threading.Event()
    crew.submit(done.set)
    assert done.wait(PATIENCE)
    wait_until(lambda: crew.running == 0)
    pid = os.fork()
    if pid == 0:
        ran = threading.Event()
        try:
            crew.submit(ran.set)
        finally:
            os._exit(0 if ran.wait(PATIENCE) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_thread_that_forked_goes_when_its_job_is_done(make):
    """In the child it is the only one, and takes up nothing of the parent's."""
    crew = make(limit=1, daemon=True)
    statuses = []

    def fork():
        pid = os.fork()
        if pid:
            statuses.append(os.waitpid(pid, 0)[1])

    crew.submit(fork)
    crew.submit(lambda: statuses.append("the parent's"))
    assert crew.join(time.monotonic() + PATIENCE) == 0
    assert statuses == [0, "the parent's"]
