"""What can be read at ``/metrics``, each family declared once: exposition, reference page and dashboard follow.

Counters and histograms count since the service started, over all its workers, those that have ended too: they never go
down; a program that takes the service over, by an upgrade, or by a reload without workers, begins at 0. Gauges are what
is now. Nothing here depends on who connects, so that no client can make a new series.
"""

from __future__ import annotations

from dataclasses import dataclass

from harken.records import REASONS

__all__ = ["CAUSES", "FAMILIES", "Family"]

CAUSES: dict[str, str] = {
    "ended": "it ended by itself, by `exit()`, a server's `shutdown()` or an error outside a handler",
    "signal": "a signal killed it, the kernel's when memory is short for one",
    "hung": "its loop had not turned for `worker_timeout`",
    "start": "it could not start",
    "max_requests": "it had served `max_requests`",
    "max_worker_age": "it was older than `max_worker_age`",
    "max_worker_rss": "it held more than `max_worker_rss`",
    "reload": "a reload put new code in its place",
}
"""Why a worker was replaced."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric and its labels.

    Attributes:
        name: as Prometheus knows it.
        kind: ``counter``, ``gauge`` or ``histogram``.
        meaning: one line.
        labels: their names.
        values: of the last label, where all are known: each is there from the start, at 0.
    """

    name: str
    kind: str
    meaning: str
    labels: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    @property
    def lasts(self) -> bool:
        """Whether what a worker has counted stays when the worker goes."""
        return self.kind != "gauge"


_BY_LISTENER = ("listener",)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("harken_accepted_total", "counter", "connections and datagrams taken from the kernel", _BY_LISTENER),
        Family("harken_connections_opened_total", "counter", "connections that went to a handler", _BY_LISTENER),
        Family("harken_connections_open", "gauge", "connections open now", _BY_LISTENER),
        Family(
            "harken_connections_closed_total",
            "counter",
            "connections that have ended, by reason (see the events' page)",
            ("listener", "reason"),
            tuple(REASONS),
        ),
        Family(
            "harken_connections_rejected_total",
            "counter",
            "connections and datagrams refused before their handler, by the limit or hook that refused",
            ("listener", "reason"),
        ),
        Family(
            "harken_received_bytes_total",
            "counter",
            "bytes that came on connections, on the wire, where a child serves those that have ended; "
            "not of datagrams, nor on Unix sockets of blocking engines where no deadline is set",
            _BY_LISTENER,
        ),
        Family("harken_sent_bytes_total", "counter", "bytes that handlers sent on connections, likewise", _BY_LISTENER),
        Family(
            "harken_handler_seconds",
            "histogram",
            "seconds from a handler's start to its end; datagrams that the green engine takes in batches are left out",
            _BY_LISTENER,
        ),
        Family(
            "harken_handler_exceptions_total",
            "counter",
            "exceptions out of handlers, but for peers that went away",
            _BY_LISTENER,
        ),
        Family(
            "harken_preamble_seconds",
            "histogram",
            "seconds that PROXY header and TLS handshake took together, of connections that passed",
            _BY_LISTENER,
        ),
        Family(
            "harken_accept_queue_seconds",
            "histogram",
            "seconds that a TCP connection waited to be accepted; one in 16 is asked",
            _BY_LISTENER,
        ),
        Family(
            "harken_accept_queue_connections",
            "gauge",
            "TCP connections that wait to be accepted now, Recv-Q of `ss -ltn`",
            _BY_LISTENER,
        ),
        Family("harken_accept_queue_limit", "gauge", "how many may wait, Send-Q of `ss -ltn`", _BY_LISTENER),
        Family(
            "harken_hub_lag_seconds",
            "histogram",
            "seconds from asking a worker's loop for a turn, once a second, to that turn",
        ),
        Family("harken_stalls_total", "counter", "handlers that kept the loop from others for `stall_after`"),
        Family("harken_threads", "gauge", "Python threads, in all workers"),
        Family("harken_memory_bytes", "gauge", "resident memory of all workers"),
        Family("harken_cpu_seconds_total", "counter", "processor time of all workers, user and system"),
        Family("harken_workers", "gauge", "worker processes", ("state",), ("starting", "ready", "leaving")),
        Family("harken_workers_wanted", "gauge", "how many workers there should be; 0 without a supervisor"),
        Family("harken_worker_restarts_total", "counter", "workers that were replaced", ("cause",), tuple(CAUSES)),
        Family("harken_ready", "gauge", "1 while new connections are served, as /health/ready says"),
    )
}
"""All of them, by name."""
