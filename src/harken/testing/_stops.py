"""Checks of an engine: how it stops, pauses and drains."""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from harken.testing._census import wait_until
from harken.testing._check import STREAMS, EngineCheck, Make, expect, on
from harken.testing._rig import PATIENCE, TURN_SECONDS, Draining, Rig, bounded, receive, rig
from harken.testing._streams import at_once, expect_end
from harken.testing._wires import WIRES

__all__ = ["CHECKS"]

# Seconds in which nothing must happen, where nothing must happen.
QUIET_SECONDS = 0.1
# Seconds that a drain of a check waits; and the handlers that end in time do so well before.
DRAIN_SECONDS = 0.5
CUT_SECONDS = 0.2  # of one that nobody's handler ends in time for


@on(*STREAMS, behind=WIRES)
def shutdown_while_busy(make: Make, transport: str) -> None:
    """``shutdown()`` from another thread ends the loop at once, and leaves open connections to their handlers."""
    with rig(make, transport) as tested:
        clients = tested.held(3)
        stopper = threading.Thread(target=tested.server.shutdown, daemon=True)
        stopper.start()
        if len(clients) > 1:  # the loop is not itself in a handler
            stopper.join(PATIENCE)
            expect(not stopper.is_alive(), "shutdown() did not return while handlers were busy")
            select.select(clients, [], [], QUIET_SECONDS)
            expect(not select.select(clients, [], [], 0)[0], "shutdown() ended connections that were open")
        for client in clients:
            client.close()
        stopper.join(PATIENCE)
        expect(not stopper.is_alive(), "shutdown() did not return")
        tested.expect_ended()


@on(*STREAMS)
def shutdown_while_idle(make: Make, transport: str) -> None:
    """``shutdown()`` wakes a sleeping loop, twice does no harm, and the server serves again after it."""
    with rig(make, transport) as tested:
        tested.expect_serves()
        time.sleep(QUIET_SECONDS)  # a loop that has not gone to sleep yet need not be woken
        began = time.monotonic()
        bounded("shutdown() of an idle server", tested.server.shutdown)
        expect(time.monotonic() - began < TURN_SECONDS / 2, "shutdown() waited for the loop's next turn")
        tested.expect_ended()
        waiting = tested.client("echo 2")
        waiting.sendall(b"ok")
        expect(not select.select([waiting], [], [], QUIET_SECONDS)[0], "somebody was served after shutdown()")
        tested.start()
        expect(receive(waiting, 2) == b"ok", "a client that waited between two serve_forever() was not served")
        waiting.close()
        bounded("shutdown()", tested.server.shutdown)
        bounded("a second shutdown()", tested.server.shutdown)


@on(*STREAMS)
def shutdown_before_serving(make: Make, transport: str) -> None:
    """``shutdown()`` before ``serve_forever()`` makes that return at once."""
    with rig(make, transport, start=False) as tested:
        bounded("shutdown() before serve_forever()", tested.server.shutdown)
        bounded("serve_forever() after shutdown()", tested.server.serve_forever, TURN_SECONDS)
        tested.start()
        tested.expect_serves()


@on(*STREAMS)
def shutdown_from_handler(make: Make, transport: str) -> None:
    """``shutdown()`` from a handler does not deadlock, and ends the loop unless the handler is another process."""
    with rig(make, transport) as tested:
        with tested.client("shutdown") as client:
            expect(receive(client, 5) == b"done\n", "shutdown() did not return in a handler")
        if tested.engine.in_child:
            tested.expect_serves()
        else:
            tested.expect_ended()


@on(*STREAMS)
def shutdown_from_signal_handler(make: Make, transport: str) -> None:
    """``shutdown()`` from a signal handler, while the loop sleeps in the main thread, ends it. Main thread alone."""
    expect(threading.current_thread() is threading.main_thread(), "run this check in the main thread")
    heeded: list[int] = []
    with rig(make, transport, start=False) as tested:

        def heed(signum: int, _frame: object) -> None:
            if not heeded:
                heeded.append(signum)
                tested.server.shutdown()

        before = signal.signal(signal.SIGUSR1, heed)
        pusher = threading.Thread(target=_push, args=(tested, heeded), daemon=True)
        began = time.monotonic()
        try:
            pusher.start()
            tested.server.serve_forever(TURN_SECONDS)
        finally:
            pusher.join(PATIENCE)
            signal.signal(signal.SIGUSR1, before)
        expect(time.monotonic() - began < TURN_SECONDS / 2, "shutdown() in a signal handler did not wake the loop")


def _push(tested: Rig, heeded: list[int]) -> None:
    """Send the signal until it is heeded: Python loses one that comes just before the loop goes to sleep."""
    tested.server.wait_ready(PATIENCE)
    try:
        tested.expect_serves()
    finally:
        while not heeded:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: heeded, QUIET_SECONDS)


@on("tcp")
def close_waits_for_handlers(make: Make, transport: str) -> None:
    """Connections that still run when ``server_close()`` is called are waited for, and then nothing is left."""
    with rig(make, transport) as tested:
        clients = tested.held(3)
        if len(clients) == 1:  # the loop is in that handler
            clients[0].close()
            return
        bounded("shutdown()", tested.server.shutdown)
        closer = threading.Thread(target=tested.server.server_close, daemon=True)
        closer.start()
        closer.join(QUIET_SECONDS)
        expect(closer.is_alive(), "server_close() did not wait for handlers, although block_on_close is true")
        for client in clients:
            client.close()
        closer.join(PATIENCE)
        expect(not closer.is_alive(), "server_close() did not return after the handlers had ended")


@on(*STREAMS, behind=WIRES)
def several_loops(make: Make, transport: str) -> None:
    """Several threads in ``serve_forever()`` serve together, and one ``shutdown()`` ends them all."""
    with rig(make, transport, start=False) as tested:
        tested.start(loops=3)
        times = 3 if tested.engine.in_child else 10
        at_once(tested, 4, lambda _number: tested.expect_serves(times))
        bounded("shutdown() of several loops", tested.server.shutdown)
        tested.expect_ended()


@on(*STREAMS)
def suspend_and_resume(make: Make, transport: str) -> None:
    """While suspended, new connections wait in the backlog and open ones go on."""
    with rig(make, transport) as tested:
        tested.expect_serves()
        tested.server.suspend()
        accepted = len(tested.of("accepted"))
        waiting = [tested.client("echo 2") for _ in range(3)]
        for client in waiting:
            client.sendall(b"ok")
        expect(not select.select(waiting, [], [], QUIET_SECONDS)[0], "somebody was served while suspended")
        expect(len(tested.of("accepted")) == accepted, "a connection was accepted while suspended")
        tested.server.resume()
        for client in waiting:
            expect(receive(client, 2) == b"ok", "a client that waited in the backlog was not served")
            client.close()


@on(*STREAMS, behind=WIRES)
def drain_in_time(make: Make, transport: str) -> None:
    """A drain waits for handlers that end in time, and cuts nobody."""
    with rig(make, transport) as tested:
        clients = tested.held(3, "work")
        drainer = Draining(tested, PATIENCE)
        expect(wait_until(lambda: tested.serving.draining), "drain() did not begin")
        for client in clients:
            client.close()
        report = drainer.report()
        expect(report.cut == 0, f"{report.cut} connections were cut that ended in time")
        expect(drainer.running == 0, f"{drainer.running} handlers were said to run that had ended")
        expect(  # and whoever waited in the backlog
            report.finished >= len(clients), f"{report.finished} of {len(clients)} connections were reported finished"
        )
        expect(report.seconds < PATIENCE / 2, "drain() waited although nothing was open")


@on(*STREAMS, behind=WIRES)
def drain_cuts(make: Make, transport: str) -> None:
    """A drain cuts what is still open at its deadline, says which, and their handlers are gone."""
    with rig(make, transport) as tested:
        clients = tested.held(3, "work")
        wait_until(lambda: len(tested.of("opened")) >= len(clients), PATIENCE)  # a child's comes by a pipe
        ids = {event.connection for event in tested.of("opened")}
        drainer = Draining(tested, CUT_SECONDS)
        report = drainer.report()
        expect(report.cut == len(clients), f"{report.cut} of {len(clients)} connections were reported cut")
        expect({info.id for info in report.connections} == ids, "drain() reported others than it cut")
        expect(drainer.running == 0, f"{drainer.running} handlers were left running after they were cut")
        expect(report.seconds > CUT_SECONDS * 0.9, "drain() cut before its deadline")
        for client in clients:
            expect_end(client)
        tested.expect_closed(*["drain_deadline"] * len(clients))


CHECKS: tuple[EngineCheck, ...] = (
    shutdown_while_busy,
    shutdown_while_idle,
    shutdown_before_serving,
    shutdown_from_handler,
    shutdown_from_signal_handler,
    close_waits_for_handlers,
    several_loops,
    suspend_and_resume,
    drain_in_time,
    drain_cuts,
)
