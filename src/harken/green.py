"""Green threads, for handlers on the green engine: any number of them take turns in one thread.

All of it may also be used in a plain thread, which it simply blocks, but for ``spawn`` and ``timeout``; a child that a
green thread has forked is such a thread. ``Event``, ``Lock``, ``Semaphore`` and ``Queue`` work between green threads,
between plain ones, and from one kind to the other. Context variables are each green thread's own; ``threading.local``
is shared by all of a thread.
"""

from __future__ import annotations

import contextvars
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Full
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from greenlet import getcurrent, greenlet

from harken import _hub
from harken._hub.bell import Bell
from harken._hub.locks import Event, Lock, Queue, Semaphore
from harken.engines._crew import Crew
from harken.errors import ConfigError, DeadlineExceeded
from harken.unpatched import patched

if TYPE_CHECKING:
    import ssl

__all__ = [
    "Empty",
    "Event",
    "Full",
    "GreenThread",
    "Lock",
    "Queue",
    "Semaphore",
    "connect",
    "current",
    "getaddrinfo",
    "offload",
    "sleep",
    "spawn",
    "timeout",
    "wait",
]

# Plain threads for offload() at once, as concurrent.futures has by default; further calls wait for one.
OFFLOAD_THREADS = 32
# Seconds until the next try where a timeout could not be raised, since the code was inside a greenlet of its own.
_RETRY_SECONDS = 0.01

_crew = Crew(lambda: True, limit=OFFLOAD_THREADS)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class GreenThread:
    """What ``spawn`` returns.

    Attributes:
        greenlet: what ``current()`` returns inside.
    """

    def __init__(self, hub: Any, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._over = Event()
        self.greenlet: greenlet = hub.spawn(_Body(self._over, function), *args)

    def is_alive(self) -> bool:
        """Tell whether it has not ended."""
        return not self._over.is_set()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most ``timeout`` seconds; tell whether it has.

        Raises:
            RuntimeError: it is the calling green thread itself, which would wait for ever.
        """
        if self.greenlet is getcurrent():
            raise RuntimeError("cannot join the current green thread")
        return self._over.wait(timeout)


class _Body:
    """What a green thread of ``spawn`` runs. It is over, too, when its hub closes before it begins."""

    def __init__(self, over: Event, function: Callable[..., object]) -> None:
        self._over = over
        self._function = function

    def __call__(self, *args: Any) -> None:
        try:
            self._function(*args)
        finally:
            self._over.set()

    def __del__(self) -> None:
        self._over.set()


def spawn(function: Callable[[*Ts], object], *args: *Ts) -> GreenThread:
    """Run ``function(*args)`` in a green thread beside this one, in a copy of its context variables.

    It starts when this one waits next. What it raises is shown by ``threading.excepthook``. When the server has stopped
    and its last handler has ended, it is ended by ``GreenletExit``.

    Raises:
        RuntimeError: this is no green thread.
    """
    return GreenThread(_need("spawn"), function, args)


def current() -> greenlet | None:
    """Return the green thread that calls, to compare or to use as a key; None in a plain thread."""
    return getcurrent() if _hub.current() is not None else None


def sleep(seconds: float = 0.0) -> None:
    """Wait for ``seconds``; with 0 the others have their turn."""
    hub = _hub.current()
    if hub is not None:
        hub.sleep(seconds)
    else:
        time.sleep(seconds)


@contextmanager
def timeout(seconds: float) -> Iterator[None]:
    """Bound the time of the block, whatever it waits for. Code that computes is not interrupted.

    It is raised once: an ``except TimeoutError`` within the block, around another ``timeout`` for one, catches it as
    well, and the block then goes on without bound.

    Raises:
        DeadlineExceeded: in the block, after ``seconds``; it is a TimeoutError.
        RuntimeError: this is no green thread.
        TypeError: ``seconds`` is no number.
    """
    timer = _Timeout(_need("timeout"), seconds)
    try:
        yield
    finally:
        timer.cancel()


class _Timeout:
    """The clock of one ``timeout`` block."""

    def __init__(self, hub: Any, seconds: float) -> None:
        self._hub = hub
        self._green = getcurrent()
        try:
            deadline = time.monotonic() + seconds
        except TypeError:
            raise TypeError(f"green.timeout() takes seconds, not {seconds!r}") from None
        self._error = DeadlineExceeded(f"not done within {seconds:g} s")
        self._timer = hub.call_at(deadline, self._fire)

    def _fire(self) -> None:
        if not self._hub.throw(self._green, self._error):
            self._timer = self._hub.call_at(time.monotonic() + _RETRY_SECONDS, self._fire)

    def cancel(self) -> None:
        """Stop the clock."""
        self._timer.cancel()


def offload(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Return ``function(*args)``, which may block or compute: a plain thread runs it while others have their turn.

    It sees this green thread's context variables, in a copy. When this green thread is interrupted, it runs on and what
    it returns is dropped. In a plain thread it is simply called.

    Raises:
        BaseException: what the function raised.
    """
    if _hub.current() is None:
        return function(*args)
    if patched():
        from harken._hub.hosts import gevent

        return gevent.offload(contextvars.copy_context().run, function, *args)  # type: ignore[no-any-return]
    return aside(function, *args)


def aside(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """As ``offload``, but under gevent in a thread that gevent patched: for what waits and does not block."""
    if _hub.current() is None:
        return function(*args)
    bell = Bell()
    returned: list[T] = []
    raised: list[BaseException] = []
    context = contextvars.copy_context()

    def work() -> None:
        try:
            returned.append(context.run(function, *args))
        except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
            raised.append(error)
        finally:
            bell.ring()

    _crew.submit(work)
    bell.wait()
    if raised:
        try:
            raise raised[0]
        finally:
            raised.clear()  # or the error's traceback would hold itself
    return returned[0]


def wait(awaitable: Awaitable[T]) -> T:
    """Run a coroutine, or anything that can be awaited, on an event loop, and return its result.

    In a green thread the loop is the one that its hub is in; a hub that ran alone moves into one. The others have their
    turn meanwhile. The coroutine is a task of its own: it sees this green thread's context variables, in a copy, and
    ``asyncio.current_task()``, ``asyncio.timeout`` and task groups work in it. When this green thread is interrupted
    (``timeout``), the task is cancelled, and waited for. In plain threads one loop in the background serves them all.

    Raises:
        BaseException: what the coroutine raised.
        RuntimeError: an event loop runs in this very thread, in which the caller should ``await``.
    """
    from harken._hub.coroutines import wait as wait_for

    return wait_for(awaitable)  # type: ignore[no-any-return]


def release_threads() -> None:
    """Send the idle threads of ``offload`` home; the next call starts new ones. Called when a server closes."""
    _crew.release()


def getaddrinfo(
    host: str | bytes | None, port: str | int | None, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
) -> list[Any]:
    """As ``socket.getaddrinfo``, without keeping the others waiting for the resolver.

    Raises:
        socket.gaierror: there is no such host or service.
    """
    try:
        return socket.getaddrinfo(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)
    except socket.gaierror:
        return offload(socket.getaddrinfo, host, port, family, type, proto, flags)


def connect(
    address: str | tuple[str, int], timeout: float | None = None, *, tls: ssl.SSLContext | None = None
) -> socket.socket:
    """Return a connection that waits as the handler's own does; an ``ssl.SSLSocket`` under TLS.

    Args:
        address: ``tcp://HOST:PORT``, ``tls://HOST:PORT``, ``unix:/path``, or ``(host, port)``.
        timeout: seconds for all of the connecting, the TLS handshake included, and then for each operation on the
            connection; None waits without end.
        tls: for ``tls://``; without one the system's authorities are trusted, and the host's name is checked.

    Raises:
        OSError: nobody answers there, or the handshake failed (``ssl.SSLError``); TimeoutError when not in time.
        ConfigError: the address is none.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    failure: OSError | None = None
    places, name = _places(address)
    for family, place in places:
        made: socket.socket = _hub.Connection(family, socket.SOCK_STREAM, 0)
        try:
            made.settimeout(None if deadline is None else max(1e-6, deadline - time.monotonic()))  # 0 would not wait
            made.connect(place)
            if name is not None:
                from harken.preambles._handshake import secure_client

                made = secure_client(made, tls, name, deadline)
        except DeadlineExceeded:  # of the caller's: no reason to try the next address
            made.close()
            raise
        except OSError as error:
            made.close()
            failure = error
        except BaseException:
            made.close()
            raise
        else:
            made.settimeout(timeout)
            return made
    raise failure or OSError(f"{address!r} has no address")


def _places(address: str | tuple[str, int]) -> tuple[list[tuple[int, Any]], str | None]:
    """Return families and addresses to try, in order, and the server's name where TLS is to be spoken."""
    secured = isinstance(address, str) and address.startswith("tls://")
    if not isinstance(address, str):
        match address:
            case (host, port, *_):  # of IPv6 there are four
                pass
            case _:
                raise ConfigError(f"{address!r} is no address; write 'tcp://HOST:PORT', 'unix:/path' or (HOST, PORT)")
    else:
        from harken import transports

        plain = address.replace("tls://", "tcp://", 1) if secured else address
        place = transports.for_url(plain).parse(plain)
        scheme = getattr(place, "scheme", None)
        if scheme == "unix":
            return [(socket.AF_UNIX, place.path)], None
        if scheme != "tcp":
            raise ConfigError(f"{address!r}: only tcp://, tls:// and unix: can be connected to")
        host, port = place.host or "localhost", place.port
    found = getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(each[0], each[4]) for each in found], host if secured else None


def _need(what: str) -> Any:
    hub = _hub.current()
    if hub is None:
        raise RuntimeError(
            f"green.{what}() needs a green thread around it: call it in a handler on the green engine, "
            "and in no child that such a handler has forked"
        )
    return hub
