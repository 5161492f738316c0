"""The hub runs green threads and waits for sockets on their behalf. This is its contract; two modules keep it.

``harken._hub.compiled`` (C, made at installation where there is a compiler and epoll) and ``harken._hub.fallback``
(Python on greenlet) each offer :class:`Hub`, :class:`Connection`, :class:`Beat`, ``current()`` and ``KIND``.
``HARKEN_HUB=fallback`` switches the compiled one off; ``HARKEN_HUB=compiled`` makes its absence an error. Names here
load when first used.

Who may call what
-----------------
A hub belongs to the OS thread that made it. *The hub's own greenlet* is the one that called ``run`` or ``step``; doors,
timers and ``call_soon`` run there and must not wait. *Any thread* means signal handlers too. All else is for the hub's
thread. Seconds are floats; deadlines are by ``time.monotonic()``.

``Hub()``
    ``run(until, patience, tick)``
        Run green threads here until ``until()``. That is asked, and ``tick()`` called, in each turn in which a door was
        opened, a green thread has ended or somebody called ``wake()``, and at least every ``patience()`` seconds; green
        threads that go on from one message to the next need not cause it. What ``tick`` or a door raises leaves
        ``run``; the hub can be run again. In the main thread signal handlers run within milliseconds; what one raises
        leaves ``run``, or ends the green thread that it interrupted.
    ``step(timeout)``
        One turn, sleeping at most ``timeout`` seconds: what is due, then what is ready. Not from a green thread. It may
        take a few more while sockets are ready. Returns False when nothing has happened for which ``run`` would ask
        ``until`` and call ``tick``.
    ``fileno() -> int``
        A descriptor that is readable when ``step(0)`` has something to do, for a host's loop; -1 where there is none.
        Timers do not show there: a host asks ``next_deadline() -> float | None`` (0.0: something is due already).
    ``occupy(yes)``
        The thread is the hub's between its turns, too, and the calling greenlet its own: for a host whose loop may
        resume green threads by itself. Connections then wait in whatever greenlet of the thread uses them.
    ``wake()``
        End the sleep. *Any thread*; harmless on a closed hub.
    ``flush_pending_nowait() -> int``
        Send what green threads have written and the hub has not sent, as far as that does not wait; return how many
        bytes. What a handler wrote before it went on computing gets out so. *Any thread.*
    ``close()``
        Raise ``GreenletExit`` in the green threads that are left, once, and give the descriptors back. Outside ``run``.
    ``spawn(function, *args) -> greenlet``
        A new green thread; it starts at the next turn, in a copy of the caller's context variables. What leaves it is
        given to ``threading.excepthook`` (which says nothing of SystemExit), GreenletExit to nobody. ``.dead`` tells
        that it has ended.
    ``spawn_into(busy, function, *args) -> greenlet``
        The same; the set ``busy`` holds it until it has ended.
    ``call_soon(function, *args)``, ``call_soon_threadsafe(function, *args)`` (*any thread*)
        Call at the next turn, in order. What it raises is given to ``threading.excepthook``.
    ``call_at(deadline, function, *args) -> Timer``
        Call once, at the first turn after the deadline. ``timer.cancel()`` is cheap, and harmless when it has fired.
    ``settle()``
        Send what the calling green thread has written and the hub has not sent, which may wait. Before it lets others
        know that it is about to ``park()``: that sends too, and an ``unpark`` meanwhile would be lost.
    ``park() -> Any``
        Give up the calling green thread until ``unpark`` or ``throw``; return the value. RuntimeError in the hub's own
        greenlet and where no hub runs.
    ``unpark(green, value=None) -> bool``
        Let a parked green thread go on at the next turn. The first one counts: False when it is not parked or is about
        to go on already.
    ``resume(green)``
        From the hub's own greenlet: let a parked green thread go on at once, and return when it waits or ends.
        RuntimeError when it is not parked.
    ``throw(green, error) -> bool``
        Raise ``error`` out of a ``park()`` or a wait; takes the place of an ``unpark`` that is under way. False when
        the green thread is running or dead, or another error is under way to it: both are to be raised, one by one.
    ``sleep(seconds)``
        Park for so long; 0 lets the others have their turn. Outside a green thread: ``time.sleep``.
    ``wait(fd, write=False, timeout=None)``
        Park until the descriptor, or socket, is readable (writable). TimeoutError("timed out") after ``timeout``
        seconds; OSError(EBADF) when a Connection is closed meanwhile; RuntimeError(:data:`BUSY`) when another green
        thread waits for the same direction. May return early. Outside a green thread: ``poll()``.
    ``watch(door, on_readable, shared=False)``, ``unwatch(door)`` (*any thread*; both hold when they return)
        As in :class:`harken.engines.Engine`: level-triggered, by the door's identity, at most :data:`DOOR_BURST` calls
        a turn while ``on_readable`` returns true; None is no, and no news for ``run`` either. A second ``watch`` of a
        door replaces the first. Of the processes that watch a door as ``shared`` one wakes at a time, and each in its
        turn (by epoll; elsewhere all wake).
    ``lodge(connection, starter)``
        Let a Connection wait without a green thread: at its first event (bytes, an end, its being closed)
        ``starter(connection)`` is called once, in the hub's own greenlet. The hub keeps the connection until then.
    ``adopt(sock) -> Connection``
        Take over a ``socket.socket``, which is detached; timeout and record travel. A Connection comes back as it is.

``Connection(family, type, proto, fileno)``
    A :class:`harken.connection.Connection`. Its descriptor blocks for whoever has asked for it (``fileno``, ``dup``) as
    a plain socket's does, where there is no timeout; it never blocks these verbs. Where a blocking socket would wait,
    they park in the hub of the calling green thread, and elsewhere block by ``poll()``: ``recv``, ``recv_into``,
    ``recvfrom``, ``recvfrom_into``, ``recvmsg``, ``recvmsg_into``, ``send``, ``sendall``, ``sendto``, ``sendmsg``,
    ``sendfile``, ``connect``, ``connect_ex``, ``accept`` (which gives Connections). MSG_DONTWAIT does not wait.
    Without a timeout ``send``, ``sendto`` and ``sendmsg`` send all, or return what went before an error, which the next
    call meets; with a timeout they send some. What reads a stream with MSG_WAITALL returns less only at the end, an
    error or the timeout.
    ``settimeout``, ``gettimeout``, ``setblocking``, ``getblocking``, ``timeout`` are kept beside the descriptor; a wait
    ends by ``TimeoutError("timed out")``, and with 0 EAGAIN is BlockingIOError. ``makefile``, ``shutdown``, ``dup``,
    ``with`` behave as on a blocking socket; ``detach()`` gives back a descriptor that blocks if the socket did.
    Two green threads may use one Connection, one reading and one writing; a second waiter in one direction gets
    RuntimeError(:data:`BUSY`). ``close()`` raises OSError(EBADF) in whoever waits on it. Never hangs nor spins on data
    with FIN, RST, urgent data, HUP by ``shutdown(SHUT_RDWR)`` from any thread, or a Unix socket's short reads.
    ``take(listener, most) -> [(Connection, address)]``, a class method, accepts what is at the door, without waiting.
    ``end() -> bool`` is ``shutdown(SHUT_WR)`` and ``close()`` in one, and does not tell the record; it returns whether
    the descriptor is closed (files may keep it). ``far_end`` is what reads and writes have told of the peer
    (``peer_closed``, ``peer_reset``), or None.
    A compiled one has ``handle()``, a callable that returns it as long as it is there: a weak reference at a third of
    the size. It tells its record (``ended()``) when it is dropped unclosed, as a weak reference's callback would.
    ``open_reader(size=-1)`` and ``open_writer(reader=None)`` give ``rfile`` and ``wfile``, which are
    ``io.BufferedIOBase``. The reader receives at most ``size`` bytes ahead, and holds memory only while bytes are
    unread. What is written while ``reader`` holds unread bytes is joined, and sent before the green thread gives up its
    turn in any way, before the connection is used otherwise, at 64 KiB, and at the end: so an error in sending may be
    raised by a later call.
    The compiled hub may do for many green threads at once what their events and answers ask for: it receives ahead what
    a waiting ``recv`` or line has asked for, and a ``sendall`` or ``write`` of few bytes, on a connection that has
    always read on after its answers, may go out a little later: when the turn has handed out its events, or before
    that green thread does anything else than to read on. Likewise larger pieces, each written after a read that came
    back full, go out together when the next read would wait. What the kernel then refuses is raised by that read.
    ``settle()`` sends what was written and put off, and returns whether nothing is left. It waits only in the green
    thread whose answer it is. *Any thread*; for what is done to the descriptor past the connection's methods.
    A reader that keeps more than 128 KiB while it waits for the rest of a line or block tells the function that was
    given to ``on_growth(function)`` of the module: ``function(connection, bytes)``, in the green thread that reads,
    which may be kept waiting there; and ``function(connection, 0)`` when they are read, which must not wait.
    ``trace(yes)`` (*any thread*) says that what moves is to be told to :mod:`harken.tracing`, from now on, also by
    calls that wait already.
    ``waits_for()`` returns ``"reading"``, ``"writing"`` or None: what a green thread, or one that is
    to be started, waits for there. *Any thread.*
    Fair: after :data:`TURN_OPERATIONS` operations that did not wait, or :data:`TURN_BYTES`, the others get their turn.

``Guard()``
    A lock for ``with``, whose holder may be in OpenSSL without the GIL. ``quicken(class)`` of the module gives the
    connection under TLS (:mod:`harken.preambles`) the methods that are compiled.

``Batch(hub, sock, busy, crowded, more, most_waiting)``, ``Answers``
    Datagrams of one socket, taken together (where the kernel can), served one by one in green threads that are used
    again, and answered together; all in the hub's thread. ``take(service)``, at the door, takes at most 32 without
    waiting, and sees that they are served this turn as a :class:`harken.engines.DatagramService` says, each in a
    context of its own, ``failed`` being called within ``except``; BaseException ends that handler alone. While a
    handler waits another green thread goes on. The set ``busy`` holds the green threads that have work; with
    ``most_waiting`` that wait, ``crowded(1)`` is called, and ``crowded(-1)`` when there is room again. After a full
    batch ``more(again)`` is called, which calls ``again()`` if more is to be taken at once. ``trust(door)`` allows to
    take what is there without asking for a moment (10 ms), ``distrust()`` (*any thread*) ends that. ``run``, ``tell``
    and ``work`` are its own. ``close()`` lets the socket go.
    A socket whose class has ``Answers`` before the socket's own class has a ``sendto`` that may wait for the end of the
    batch when it is given the very address that the handler was given. It and ``sendmsg`` wait in the hub, keep their
    order, and answer from the address that was asked when the socket is bound to all. What waits is sent before
    ``close``, ``detach``, ``dup`` and ``setsockopt``; what the kernel refuses then goes to ``failed`` in a green thread
    of its own.

``Lane(hub, busy, way)``, or None
    Connections of one listening socket from the door to their end, as :class:`harken.engines.Way` says; in the hub's
    thread. ``take(listener, most, terms) -> int`` lets in what is there without waiting, on the terms of
    :class:`harken.engines.Terms`; each connection is served in a context of its own, from the next turn on, by a green
    thread that may have served others before it. ``failed`` is called within ``except``. A connection's ``record`` is
    made (``remember``) when it is first read; one that ends without is closed, and its reason counted, with no call of
    Python's but its ticket's ``give_back``, unless somebody has to be told: then by ``close``. Where the way has
    ``enter``, that serves a connection to its end in the handler's place. ``len()`` and ``connections()`` have those
    that are open without a record; ``collect()`` tells the books what was counted since (*any thread*, both). The set
    ``busy`` holds the green threads that serve.
    ``trust(door, places)`` allows to take so many without asking for a moment (10 ms), while nobody subscribes to
    ``accepted`` or ``opened``, and server and handler class stay as they are; ``distrust()`` and ``close()`` (*any
    thread*) end that.

``hub.asks_at_ends``
    Whether ``run`` asks ``until`` when a green thread has ended; True until it is set.

``hub.beat -> Beat``, ``Beat()``
    What a loop says of itself: the hub for itself, any other loop by ``enter()`` when a piece of work begins and
    ``leave()`` before it sleeps. A *piece* is what runs without giving others a turn. ``after`` is how many seconds
    make it late, or None. One watchdog listens, a plain thread that calls ``watch() -> (word, seconds)`` again and
    again; it sleeps while the loop does, and looks every :data:`LOOK_SECONDS`, or ``after / 4``, while that works:
    ``late``: a piece has run for ``after``, and ``same()`` tells, under the GIL, whether it still does; ``over``: it
    has ended and took so long; ``long``: it goes on, after :data:`LONG_SECONDS`; ``unsent``: the running green thread
    has written something that is not sent, and goes on; ``stopped``: ``stop()`` was called (*any thread*). The compiled
    one waits without the GIL. Late pieces that hold the GIL are told of when they let go.

Fork
----
A child gets descriptors of its own, without what the parent watched. Green threads stay the parent's: the one that
forked goes on in the child, where waiting is by ``poll()``, and the child's process ends with it, as with a thread.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

from harken.connection import Connection as Wire
from harken.errors import ConfigError

__all__ = [
    "BUSY",
    "DOOR_BURST",
    "LONG_SECONDS",
    "LOOK_SECONDS",
    "TURN_BYTES",
    "TURN_OPERATIONS",
    "Answers",
    "Batch",
    "Beat",
    "Connection",
    "Guard",
    "Hub",
    "Lane",
    "adopt",
    "asked",
    "current",
    "fault",
    "is_connection",
    "kind",
    "kinds",
]

BUSY = "this socket is already used by another green thread"  # gevent's words, which people search for
# Connections taken from one door in one turn: as on the blocking engines.
DOOR_BURST = 64
# What one green thread may do on one connection without waiting before the others get their turn: at some 10 µs an
# operation, and 0.5 ms to copy a megabyte, below a millisecond. (libuv reads up to 2 MiB at an event; with 256 KiB here
# an echo of 1 MiB was 0.04 to 0.07 slower: four times the switches.)
TURN_OPERATIONS = 64
TURN_BYTES = 1 << 20

# Between two looks at a loop that works: what a handler has written and not sent waits for one or two of them.
LOOK_SECONDS = 0.025
# A piece of work that takes so long is told of while it goes on: it may never end.
LONG_SECONDS = 5.0

Hub: Any
"""The hub of the kind in use."""
Beat: Any
"""The beat of the kind in use."""
Batch: Any
Answers: Any
"""Batches of datagrams of the kind in use."""
Lane: Any
"""The compiled way of plain connections; None where there is none."""
Connection: Any
"""The connection of the kind in use."""
Reader: Any
"""``Reader(connection, size=-1)``: ``rfile`` of a connection, also of one under TLS."""
Guard: Any
"""``Guard()``: what stands for a connection's OpenSSL, by ``with``."""
current: Any
"""``current() -> Hub | None``: the hub whose green thread calls; None in its own greenlet and in plain threads."""
quicken: Any
"""``quicken(class)``: give a class the reading methods of the kind in use."""
kind: str
"""``compiled`` or ``fallback``: which is in use."""

VARIABLE = "HARKEN_HUB"
_NAMES = ("compiled", "fallback")  # the preferred one first
_PARTS = ("Answers", "Batch", "Beat", "Connection", "Guard", "Hub", "Lane", "Reader", "current", "on_growth", "quicken")


_faults: dict[str, str] = {}  # of what is there and cannot be loaded


def kinds() -> dict[str, ModuleType]:
    """Return the modules that can run here, the preferred one first, whatever the variable says."""
    found = ((name, _load(name)) for name in _NAMES)
    return {name: module for name, module in found if module is not None}


def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"harken._hub.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"harken._hub.{name}":
            return None
        raise
    except ImportError as error:  # built for another Python, or another greenlet
        _faults[name] = str(error)
        return None


def fault() -> str:
    """Say of the compiled hub why it cannot be had."""
    found = _faults.get("compiled")
    return f"cannot be loaded ({found})" if found else "was not built"


def asked() -> str | None:
    """Return the kind that the environment asks for; None: it does not say.

    Raises:
        ConfigError: there is no such kind.
    """
    name = os.environ.get(VARIABLE)
    if name and name not in _NAMES:
        raise ConfigError(f"{VARIABLE}={name!r} is no kind of hub; take {' or '.join(_NAMES)}")
    return name or None


def _chosen() -> ModuleType:
    wanted = asked()
    for name in (wanted,) if wanted else _NAMES:
        module = _load(name)
        if module is not None:
            return module
    raise ConfigError(
        f"{VARIABLE}={wanted} cannot be had: the extension {fault()}; unset it, or install harken anew with a compiler"
    )


def adopt(sock: Any, make: Any = None) -> Any:
    """Take over a plain socket, whatever thread this is; see ``Hub.adopt``.

    Args:
        sock: a socket; it is detached.
        make: the Connection type; by default that of the kind in use.
    """
    make = make or __getattr__("Connection")
    if isinstance(sock, make):
        return sock
    timeout, record = sock.gettimeout(), getattr(sock, "record", None)
    family, kind_of, proto = int(sock.family), int(sock.type), sock.proto
    adopted = make(family, kind_of, proto, sock.detach())
    adopted.settimeout(timeout)
    if record is not None:
        record.move(adopted)
    return adopted


def is_connection(sock: object) -> bool:
    """Tell whether the hub waits for ``sock``: a Connection of either kind."""
    return isinstance(sock, Wire) and hasattr(sock, "waits_for")


def __getattr__(name: str) -> Any:
    """Load the kind in use when one of its names is first used."""
    if name not in (*_PARTS, "kind"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _chosen()
    names = {name: getattr(module, name) for name in _PARTS}
    globals().update(names, kind=module.KIND)
    return globals()[name]
