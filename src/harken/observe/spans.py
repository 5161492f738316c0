"""OpenTelemetry: a span for each connection, from its opening to its end, where an SDK is set up to take them.

Names follow OpenTelemetry's semantic conventions for networks; what those have no name for begins with ``harken.``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from harken import events
from harken.peer import Peer

__all__ = ["Spans", "attach"]

_attached = False


def attach() -> None:
    """Make spans from now on, once in a process, if the program or ``opentelemetry-instrument`` has set up an SDK.

    The API alone gives a provider that only stands for one, and its spans would go nowhere: none are made.
    """
    global _attached
    api: Any = sys.modules.get("opentelemetry.trace")
    if (
        api is None
        or _attached
        or isinstance(api.get_tracer_provider(), (api.ProxyTracerProvider, api.NoOpTracerProvider))
    ):
        return
    _attached = True
    Spans(api).attach()


class Spans:
    """Follows events; one span is open for each connection that is."""

    def __init__(self, api: Any) -> None:
        """Make no span yet.

        Args:
            api: the module ``opentelemetry.trace``.
        """
        self._api = api
        self._tracer = api.get_tracer("harken")
        self._open: dict[str, Any] = {}

    def attach(self) -> Callable[[], None]:
        """Begin; returns what ends it."""
        follow = {"opened": self._opened, "handler_failed": self._failed, "closed": self._closed}
        return events.subscribe(lambda event: follow[event.name](event), *follow)

    def _opened(self, event: events.Event) -> None:
        if event.connection is None:  # a datagram, whose end nobody tells
            return
        self._open[event.connection] = self._tracer.start_span(
            getattr(event.server.RequestHandlerClass, "__name__", "connection"),
            kind=self._api.SpanKind.SERVER,
            start_time=_nanoseconds(event.time),
            attributes={"harken.connection.id": event.connection, **_of_peer(event.peer), **_of_server(event.server)},
        )

    def _failed(self, event: events.Event) -> None:
        span = self._open.get(event.connection or "")
        if span is not None:
            span.record_exception(event.error, timestamp=_nanoseconds(event.time))

    def _closed(self, event: events.Event) -> None:
        span = self._open.pop(event.connection or "", None)
        if span is None:
            return
        told = {"harken.reason": event.reason, "harken.bytes_in": event.bytes_in, "harken.bytes_out": event.bytes_out}
        span.set_attributes({name: value for name, value in told.items() if value is not None})
        if event.reason == "handler_failed":
            span.set_status(self._api.Status(self._api.StatusCode.ERROR, event.reason))
        span.end(_nanoseconds(event.time))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _of_peer(peer: Peer) -> dict[str, Any]:
    if not peer.address or peer.port is None:
        return {"network.transport": "unix"}
    kind = "ipv6" if ":" in peer.address else "ipv4"
    return {
        "network.transport": "tcp",
        "network.type": kind,
        "client.address": peer.address,
        "client.port": peer.port,
    }


def _of_server(server: Any) -> dict[str, Any]:
    address = server.server_address
    if not isinstance(address, tuple):
        return {"server.address": str(address)}
    return {"server.address": address[0], "server.port": address[1]}
