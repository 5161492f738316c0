"""Workers that share doors and limits: who takes whom, and how many they let in together."""

import contextlib
import os
import signal
import socket
import time

import pytest
from waiting import wait_until

from harken.process.control import replies

PATIENCE = 20.0


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_connections_spread_over_the_workers(service, engine):
    """Long ones, one after the other: every worker gets its part, by whichever queue the kernel wakes them from."""
    running = service("--workers", "4", "--engine", engine)
    workers = running.workers(4)
    parts = []
    for _ in range(5):  # on a busy machine one may have no processor for all of a round
        clients = [running.connect() for _ in range(400)]
        try:
            served = [int(client.recv(100).split()[1]) for client in clients]
        finally:
            for client in clients:
                client.close()
        parts.append([served.count(worker) for worker in workers])
        if min(parts[-1]) >= 20:
            return
    pytest.fail(f"the workers' parts of 400 each: {parts}")


@pytest.mark.parametrize(
    "options",
    [("--engine", "pool", "--pool-size", "1", "--pool-queue", "0"), ("--engine", "fork", "--max-children", "1")],
    ids=["pool", "fork"],
)
def test_a_worker_without_a_free_handler_keeps_nobody_from_the_others(service, options):
    """Who comes while one is full is served by the other at once, and not when somebody else comes."""
    running = service("--workers", "2", *options)
    running.workers(2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(2)]
        assert all(client.recv(100) for client in clients)
        for each in (0, 0, 1, 1, 0, 0):  # whoever of the two the kernel would wake first
            clients[each].close()
            clients[each] = stack.enter_context(running.connect())
            assert clients[each].recv(100)


def test_who_waits_although_nobody_is_free_is_told(service):
    """Workers that are full leave the door before anybody waits; the pause is told when somebody does."""
    running = service("--workers", "2", "--engine", "pool", "--pool-size", "1", "--pool-queue", "0")
    running.workers(2)
    with running.connect() as first, running.connect() as second, running.connect() as third:
        assert first.recv(100)
        assert second.recv(100)
        running.wait_log("paused: .*no handler is free")
        second.close()
        assert third.recv(100)
        first.close()  # it was either worker that told, and that one is to have room
        running.wait_log("resumed: ")


@pytest.mark.parametrize("overload", ["reset", "reply", "shed"])
def test_nobody_is_turned_away_while_another_worker_has_a_handler_free(service, overload):
    """Nor made to leave: a worker that is full leaves the door to the other."""
    words = ("--engine", "pool", "--pool-size", "4", "--pool-queue", "0", "--overload", overload)
    running = service("--workers", "2", *words)
    running.workers(2)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(8):  # whoever of the two the kernel would wake
            clients.append(stack.enter_context(running.connect()))
            assert clients[-1].recv(100)
        for client in clients:
            client.sendall(b"still here")
            assert client.recv(100) == b"still here"


def test_who_waits_for_a_worker_that_does_not_come_is_turned_away(service):
    """One that has a handler free and is stopped: the other, which is full, refuses after a while."""
    words = (
        "--engine",
        "pool",
        "--pool-size",
        "1",
        "--pool-queue",
        "0",
        "--overload",
        "reply",
        "--overload-reply",
        "no",
    )
    running = service("--workers", "2", *words)
    workers = running.workers(2)
    with running.connect() as first:
        serving = int(first.recv(100).split()[1])
        (other,) = {*workers} - {serving}
        os.kill(other, signal.SIGSTOP)
        with running.connect() as second:
            assert second.recv(100) == b"no"
        os.kill(other, signal.SIGCONT)


KEPT = """
import ctypes, os, sys, harken
class Tell(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"%d\\n" % os.getpid())
        while data := self.request.recv(1):
            if data == b"k":  # keeps the interpreter's lock, tells so, and lets go at the next byte
                sys.setswitchinterval(1000)
                libc, word = ctypes.PyDLL(None), ctypes.create_string_buffer(b"k")
                libc.write(self.request.fileno(), word, 1)
                libc.read(self.request.fileno(), word, 1)
"""


@pytest.mark.parametrize("engine", ["thread", "pool"])
def test_whom_a_worker_cannot_take_is_taken_by_another(service, target, engine):
    """The kernel wakes one for each client; one whose interpreter is kept is woken in vain."""
    target.write_text(KEPT)
    running = service("--workers", "2", "--engine", engine)
    running.workers(2)
    with contextlib.ExitStack() as stack:
        keeper = stack.enter_context(running.connect())
        kept = int(keeper.recv(100))
        time.sleep(0.1)  # its loop goes back to sleep, or else the kernel would not wake it
        keeper.sendall(b"k")
        assert keeper.recv(1) == b"k"
        for _ in range(8):
            client = stack.enter_context(running.connect())
            assert int(client.recv(100)) != kept
        keeper.sendall(b".")


# ── limits over all workers ──────────────────────────────────────────────────────────────────────────────────────────


def storm(running, count):
    """Connect ``count`` clients at once; return those that were not refused as early as that."""
    clients = []
    for _ in range(count):
        try:
            clients.append(socket.create_connection(("127.0.0.1", running.port), PATIENCE))
        except ConnectionResetError:
            pass
    return clients


def answers(clients, patience):
    """Return what comes within ``patience`` seconds, by client."""
    found = {}
    end = time.monotonic() + patience
    for client in clients:
        client.settimeout(max(0.001, end - time.monotonic()))
        try:
            if answer := client.recv(100):
                found[client] = answer
        except (ConnectionError, TimeoutError):
            pass
    return found


def greeted(clients, patience):
    """Return those that have an answer within ``patience`` seconds."""
    return list(answers(clients, patience))


def stay(clients):
    """Return those whose connection has not ended."""
    found = []
    for client in clients:
        client.setblocking(False)
        try:
            client.recv(100)
        except BlockingIOError:
            found.append(client)
        except ConnectionError:
            pass
    return found


def test_a_storm_over_four_workers_lets_in_exactly_the_maximum(service):
    """Those beyond wait, and come in as others leave, or as the workers are replaced."""
    running = service("--workers", "4", "--max-connections", "10", "--engine", "green", "--drain-timeout", "30")
    running.workers(4)
    clients = storm(running, 40)
    try:
        inside = greeted(clients, 1.0)
        assert len(inside) == 10
        waiting = [client for client in clients if client not in inside]
        for client in inside[:3]:
            client.close()
        more = greeted(waiting, 1.0)
        assert len(more) == 3
        inside = inside[3:] + more
        waiting = [client for client in waiting if client not in more]
        os.kill(running.pid, signal.SIGHUP)
        running.wait_log("reloaded")
        assert not any(client.recv(100) for client in inside)  # the idle ones leave with their workers
        end = time.monotonic() + PATIENCE
        while len(stay(inside := inside + greeted(waiting, 0.2))) != 10:  # old workers let some in, and go
            assert time.monotonic() < end
            waiting = [client for client in waiting if client not in inside]
            assert len(stay(inside)) <= 10
    finally:
        for client in clients:
            client.close()


PART = """
import harken
class Tell(harken.AsyncRequestHandler):
    async def handle(self):
        await self.request.sendall(b"%d" % self.server._harken.bounds.buffers.most)
"""


def test_the_budget_of_memory_is_for_as_many_workers_as_there_are(service, target, tmp_path):
    """Whether they were there before an operator wanted another number, or came by that or by a reload."""
    target.write_text(PART)
    control = tmp_path / "control"
    words = ("--engine", "asyncio", "--max-memory-bytes", "600000", "--control", str(control))
    running = service("--workers", "2", *words)
    running.workers(2)

    def parts():
        found = set()
        for _ in range(20):
            with running.connect() as client:
                found.add(int(client.recv(100)))
        return found

    assert parts() == {300_000}
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(control))
        assert next(replies(asker, "workers", {"count": 3}, PATIENCE))["result"] == 3
        running.workers(3)
        wait_until(lambda: parts() == {200_000})
        os.kill(running.pid, signal.SIGHUP)
        running.wait_log("worker exited", 3)
        assert parts() == {200_000}
        assert next(replies(asker, "configure", {"max_memory_bytes": 900_000}, PATIENCE))["result"] is None
    assert parts() == {300_000}


def test_a_killed_worker_gives_back_its_places(service):
    """Its heir and the others take as many as it had."""
    running = service("--workers", "2", "--max-connections", "6")
    running.workers(2)
    clients = storm(running, 12)
    try:
        found = {client: int(answer.split()[1]) for client, answer in answers(clients, 1.0).items()}
        assert len(found) == 6
        victim = next(iter(found.values()))
        lost = sum(pid == victim for pid in found.values())
        os.kill(victim, signal.SIGKILL)
        running.wait_log("worker exited")
        waiting = [client for client in clients if client not in found]
        came, end = [], time.monotonic() + PATIENCE
        while len(came) < min(lost, len(waiting)) and time.monotonic() < end:
            came += greeted([client for client in waiting if client not in came], 0.2)
        came += greeted([client for client in waiting if client not in came], 0.5)
        assert len(came) == min(lost, len(waiting)), running.log
    finally:
        for client in clients:
            client.close()


def test_the_rate_holds_over_all_workers(service):
    """One bucket of a second, whoever accepts; the rest is reset."""
    running = service("--workers", "4", "--max-accept-rate", "20")
    running.workers(4)
    start = time.monotonic()
    clients = storm(running, 200)
    elapsed = time.monotonic() - start
    inside = greeted(clients, PATIENCE)
    most = 20 + 20 * (time.monotonic() - start)
    for client in clients:
        client.close()
    assert 20 <= len(inside) <= most
    assert elapsed < PATIENCE
