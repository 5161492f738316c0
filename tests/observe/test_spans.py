"""A span for each connection, where an OpenTelemetry SDK takes them."""

import re
import socket
import time

import pytest

import harken
from harken.observe import spans

trace = pytest.importorskip("opentelemetry.trace", reason="needs OpenTelemetry: pip install opentelemetry-sdk")
sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs OpenTelemetry: pip install opentelemetry-sdk")
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PATIENCE = 10.0


class Picky(harken.BaseRequestHandler):
    """Sends back what it is sent, unless that is nothing it likes."""

    def handle(self):
        """Once."""
        data = self.request.recv(100)
        if data == b"bad":
            raise ValueError("not that")
        self.request.sendall(data)


@pytest.fixture
def exporter(monkeypatch):
    """Where spans end up, and an SDK that is set up to bring them there, for this test alone."""
    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    monkeypatch.setattr(spans, "_attached", False)
    attach, ends = spans.Spans.attach, []
    monkeypatch.setattr(spans.Spans, "attach", lambda self: ends.append(attach(self)))
    yield exporter
    for end in ends:
        end()
    provider.shutdown()


def serve_one(data, engine):
    """Serve one connection, and wait until it has ended."""
    server = harken.ThreadingTCPServer(("127.0.0.1", 0), Picky, engine=engine)
    server.handle_error = lambda *_: None
    with harken.background(server):
        with socket.create_connection(server.server_address, PATIENCE) as client:
            address = client.getsockname()
            client.sendall(data)
            client.recv(100)
        end = time.monotonic() + PATIENCE
        while server.connections():
            assert time.monotonic() < end
            time.sleep(0.01)
    return address, server.server_address


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_a_connection_is_a_span(exporter, engine):
    """With its ends, its bytes and why it closed; a server that begins to serve finds the SDK by itself."""
    client, server = serve_one(b"good", engine)
    (span,) = exporter.get_finished_spans()
    assert span.name == "Picky"
    assert span.kind is trace.SpanKind.SERVER
    assert span.end_time >= span.start_time
    known = dict(span.attributes)
    assert re.fullmatch(r"[0-9a-f]{6}-\d+", known.pop("harken.connection.id"))
    assert known.pop("harken.reason") in ("handler_returned", "peer_closed")
    assert known == {
        "network.transport": "tcp",
        "network.type": "ipv4",
        "client.address": client[0],
        "client.port": client[1],
        "server.address": server[0],
        "server.port": server[1],
        "harken.bytes_in": 4,
        "harken.bytes_out": 4,
    }


def test_an_exception_is_an_event_of_its_span(exporter):
    """And the span's status is an error."""
    serve_one(b"bad", "thread")
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    (event,) = span.events
    assert event.attributes["exception.type"] == "ValueError"
    assert event.attributes["exception.message"] == "not that"


def test_the_api_alone_costs_nothing(monkeypatch):
    """Without an SDK nobody subscribes."""
    monkeypatch.setattr(spans, "_attached", False)
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    spans.attach()
    assert not spans._attached
    assert harken.events.subscribers["opened"] == ()
