"""What one process has counted and measured, put together when somebody asks; and what is done once a second for it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from harken import events
from harken.meter import Meter
from harken.observe.figures import Figures
from harken.observe.stalls import StallReport
from harken.process.recycling import resident_bytes
from harken.traffic import accept_queue
from harken.transports import for_socket

if TYPE_CHECKING:
    from harken.engines import Engine
    from harken.serving import Serving

__all__ = ["Collector", "Slate", "add_queues"]

# Seconds between two looks: what a worker that is killed has counted since the last is lost.
LOOK_SECONDS = 1.0


class Slate(Protocol):
    """Where figures are written down so that they outlive this process."""

    def write(self, text: bytes) -> None:
        """Replace what stands there. Any thread."""


def _nothing() -> None:
    """Stands for what there is to undo while nothing was done."""


class Collector:
    """Collects the figures of this process's servers.

    Attributes:
        stalls: which handlers kept others waiting, since :meth:`start`.
    """

    def __init__(self, servings: Callable[[], Iterable[Serving]], slate: Slate | None = None) -> None:
        """Collect nothing yet.

        Args:
            servings: the servers' running sides, asked each time.
            slate: where to write the figures, once a second and whenever they are collected.
        """
        self._servings = servings
        self._slate = slate
        self._lock = threading.Lock()
        self._known = Figures()
        self._gone = Figures()
        self._leaving: list[Serving] = []  # closed, while their connections may still end
        self._quiet: set[Serving] = set()  # those of them that had none open at the last look
        self._over = threading.Event()
        self.stalls = StallReport()
        self._unsubscribe: Callable[[], None] = _nothing
        self._thread: threading.Thread | None = None

    def collect(self, *, thorough: bool = True) -> Figures:
        """Return what was counted. Any thread.

        Args:
            thorough: whether to ask the kernel about each connection that is open; else those count when they end.
        """
        with self._lock:
            figures = Figures()
            figures.take(self._gone)
            servings = [*self._servings(), *self._leaving]
            for serving in servings:
                self._add_server(figures, serving, thorough=thorough)
            figures.add("harken_stalls_total", (), sum(sum(each.stalls.values()) for each in _engines(servings)))
            figures.add("harken_threads", (), threading.active_count())
            figures.add("harken_memory_bytes", (), resident_bytes())
            times = os.times()
            figures.add("harken_cpu_seconds_total", (), times.user + times.system)
            self._never_down(figures)
            if self._slate is not None:
                self._slate.write(json.dumps(figures.plain()).encode())
            return figures

    def leave(self, serving: Serving, forget: Callable[[], object]) -> None:
        """One of the servers is closed: what its connections do until they have ended counts still.

        Args:
            serving: its running side.
            forget: takes it from those that are asked each time, before anybody collects again.
        """
        with self._lock:
            forget()
            self._leaving.append(serving)

    def _bury(self) -> None:
        """Of servers that have gone keep what lasts of their figures: one look late, for ends that are being booked."""
        with self._lock:
            for serving in [each for each in self._leaving if each in self._quiet and not each.connections]:
                self._leaving.remove(serving)
                figures = Figures()
                self._add_server(figures, serving, thorough=False)
                for engine in _engines([serving]) - _engines([*self._servings(), *self._leaving]):
                    figures.add("harken_stalls_total", (), sum(engine.stalls.values()))
                self._gone.take(figures, lasting=True)
            self._quiet = {each for each in self._leaving if not each.connections}

    def _add_server(self, figures: Figures, serving: Serving, *, thorough: bool) -> None:
        books, where = serving.books, (serving.address(),)
        figures.add("harken_accepted_total", where, books.counts["accepted"])
        figures.add("harken_connections_opened_total", where, books.counts["opened"])
        figures.add("harken_connections_open", where, len(books.connections))
        figures.add("harken_handler_exceptions_total", where, books.counts["handler_failed"])
        for reason, count in dict(books.reasons).items():
            figures.add("harken_connections_closed_total", (*where, reason), count)
        for reason, count in dict(books.refusals).items():
            figures.add("harken_connections_rejected_total", (*where, reason), count)
        meter = books.meter
        if meter is None:
            return
        for name, times in (
            ("harken_handler_seconds", meter.handler),
            ("harken_preamble_seconds", meter.preamble),
            ("harken_accept_queue_seconds", meter.queue),
        ):
            figures.observe(name, where, times)
        figures.observe("harken_hub_lag_seconds", (), meter.lag)
        received, sent = _moved(serving, meter, thorough=thorough)
        figures.add("harken_received_bytes_total", where, received)
        figures.add("harken_sent_bytes_total", where, sent)

    def _never_down(self, figures: Figures) -> None:
        """Let bytes not go down: a connection may end between the looks at those that have and those that have not."""
        for name in ("harken_received_bytes_total", "harken_sent_bytes_total"):
            for labels in [labels for found, labels, _ in figures if found == name]:
                figures.raise_to(name, labels, self._known.number(name, labels))
        self._known = figures

    # -- once a second -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to note stalls, to measure the loops' lag, and to write the slate, in a thread of its own."""
        self._unsubscribe = events.subscribe(self.stalls.note, "stalled")
        self._thread = threading.Thread(target=self._run, name="harken-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End that, and write the slate once more."""
        self._unsubscribe()
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.collect()

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._ask_loops()
            self._bury()
            if self._slate is not None:
                self.collect(thorough=False)

    def _ask_loops(self) -> None:
        """Ask each loop for a turn, once for all servers that share it."""
        engines = set()
        for serving in self._servings():
            if serving.started and serving.engine not in engines:
                engines.add(serving.engine)
                serving.ask_turn()


def _engines(servings: Iterable[Serving]) -> set[Engine]:
    """Those of servers that have one, each once."""
    return {serving.engine for serving in servings if serving.started}


def add_queues(figures: Figures, listeners: Iterable[socket.socket]) -> None:
    """Add how many wait at each listener, which processes share: to be told by one of them."""
    for listener in listeners:
        queue = accept_queue(listener) if listener.type == socket.SOCK_STREAM else None
        if queue is not None:
            where = (for_socket(listener).url(listener),)
            figures.add("harken_accept_queue_connections", where, queue.length)
            figures.add("harken_accept_queue_limit", where, queue.limit)


def _moved(serving: Serving, meter: Meter, *, thorough: bool) -> tuple[int, int]:
    received, sent = meter.received, meter.sent
    for record in serving.connections if thorough else ():
        counts = record.bytes_moved()
        if counts is not None:
            received += counts[0]
            sent += counts[1]
    return received, sent
