"""The stream that logs, metrics and users subscribe to.

The core of harken never logs: it emits an event, and whoever wants to know subscribes.
Nobody listening costs one truth test: callers write ``if events.subscribers["opened"]: events.emit("opened", …)``.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from harken.errors import ConfigError, nearest
from harken.forking import in_child

__all__ = ["NAMES", "Event", "emit", "subscribe", "subscribers"]

NAMES: dict[str, str] = {
    "listening": "a listener is bound and its server accepts: `address`, `engine`",
    "page_opened": "the page of `metrics` can be asked: `address`",
    "accepted": "a connection or datagram was taken from the kernel: `connection`, `peer`",
    "rejected": "a connection, or a datagram, was refused before its handler: `connection`, `peer`, `reason`, `detail`",
    "opened": "a connection goes to its handler, or a datagram, which has no id and no `closed`: `connection`, `peer`",
    "closed": "an opened connection has ended, exactly once: `connection`, `peer`, `reason`, `detail`, `seconds`, "
    "`bytes_in`, `bytes_out`, `requests`",
    "preamble_failed": "a PROXY header or a TLS handshake failed, and `closed` follows: `connection`, `peer`, `reason`",
    "handler_failed": "a handler raised: `connection`, `peer`, `error`",
    "timed_out": "a deadline closed a connection: `connection`, `peer`, `which`, `seconds`",
    "stalled": "a handler kept the loop from other connections for `stall_after`, told when it has ended, and before "
    "(`ongoing`) when it takes long: `place` (`file`:`line`), `function`, `stack`, `seconds`, `connection`, `peer`",
    "truncated": "a datagram was longer than `max_packet_size` and its end is lost: `peer`, `bytes`",
    "paused": "a listener stopped accepting: `address`, `reason`",
    "resumed": "a paused listener accepts again: `address`, `seconds`, `shed`",
    "draining": "a drain began: `open`, `timeout`",
    "drained": "a drain ended: `report`, and how many handlers are still `running` although their connections ended",
    "alarm": "`alarm_connections` are open: `open`",
    "memory_exceeded": "harken holds more for connections than `max_memory_bytes`: `held`, `limit` (of this process)",
    "memory_recovered": "it holds less again: `held`, `limit`",
    "control_failed": "the control socket that `control` names by the handler cannot be had, and the service goes on "
    "without: `reason`",
    "configured": "live settings were changed: `changes`",
    "reloaded": "code, settings or certificates were read anew: `what`",
    "reload_failed": "something was to be read anew and could not; what was there stays in force: `what`, `reason`",
    "upgrade_failed": "a new binary did not become ready and the old one serves on: `reason`",
    "worker_started": "a worker process accepts: `pid`, `generation`",
    "worker_failed": "a worker process could not be started, for want of what the machine has: `reason`, `restart_in` "
    "seconds",
    "worker_exited": "a worker process ended: `pid`, `status`; where there are any its `reason`, the `stacks` of one "
    "that hung, and `restart_in` seconds",
}


class Event:
    """One thing that happened.

    Attributes:
        name: one of :data:`NAMES`.
        time: when, in seconds since the epoch.
        fields: what the event carries; each is an attribute too (``event.reason``), None when absent.
    """

    __slots__ = ("fields", "name", "time")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.time = time.time()
        self.fields = fields

    def __getattr__(self, field: str) -> Any:
        if field.startswith("__"):
            raise AttributeError(field)
        return self.fields.get(field)

    def __repr__(self) -> str:
        fields = ", ".join(f"{key}={value!r}" for key, value in self.fields.items())
        return f"<Event {self.name} {fields}>"


Callback = Callable[[Event], object]

subscribers: dict[str, tuple[Callback, ...]] = dict.fromkeys(NAMES, ())


class _Changes:
    """Changes of :data:`subscribers`, one after the other: of two at once one would be lost. Any thread.

    A signal handler may come in the midst of a change that its own thread makes. It neither waits for that, nor comes
    in between: it leaves its change to it.
    """

    def __init__(self) -> None:
        self._wanted: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()
        self._busy = False

    def make(self, change: Callable[[], None]) -> None:
        """Make one."""
        self._wanted.append(change)
        with self._lock:
            while self._wanted and not self._busy:
                self._busy = True
                try:
                    while self._wanted:
                        self._wanted.popleft()()
                finally:
                    self._busy = False

    def forget(self) -> None:
        """Forget who was in the midst of one: in a forked child, where that thread is not."""
        self._lock = threading.RLock()
        self._busy = False


_changes = _Changes()

in_child(_changes.forget)

# Set by the log observer: what handlers raise is written to the log, and handle_error need not print it too.
logged = False


def subscribe(callback: Callback, *names: str) -> Callable[[], None]:
    """Call ``callback(event)`` for every event of these names (all, when none is given).

    The callback runs in the thread in which the event happened, often the one that accepts: it must not block.
    What it raises is printed to stderr and disturbs nobody.

    Args:
        callback: takes one :class:`Event`.
        names: keys of :data:`NAMES`.

    Returns:
        A function that ends the subscription; calling it twice is harmless.

    Raises:
        ConfigError: for a name that no event has, or a callback that cannot be called.
    """
    if not callable(callback):
        raise ConfigError(f"{callback!r} cannot be called: subscribe() takes a callback, and then the names of events")
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"no event is called {name!r}{nearest(name, NAMES)}")
    wanted = names or tuple(NAMES)

    ended = False

    def begin() -> None:
        for name in wanted:
            subscribers[name] = (*subscribers[name], callback)

    def end() -> None:
        nonlocal ended
        for name in wanted if not ended else ():
            rest = list(subscribers[name])
            if callback in rest:
                rest.remove(callback)
            subscribers[name] = tuple(rest)
        ended = True

    _changes.make(begin)
    return lambda: _changes.make(end)


def emit(name: str, **fields: Any) -> None:
    """Tell every subscriber of ``name``. Never raises."""
    listeners = subscribers[name]
    if not listeners or getattr(fields.get("server"), "unobserved", False):  # a server of harken's own
        return
    event = Event(name, fields)
    for tell in listeners:
        try:
            tell(event)
        except Exception:  # noqa: BLE001 - a broken observer must not break the server
            with contextlib.suppress(Exception):  # nor must a stderr that nobody reads any more
                print(f"harken: an observer of {name!r} raised", file=sys.stderr)
                traceback.print_exc()
