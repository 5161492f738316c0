"""Servers, handlers and clients for the tests beside this file."""

import contextlib
import socket
import struct
import threading

import harken

LOCAL = ("127.0.0.1", 0)
PATIENCE = 10.0  # seconds


class Upper(harken.BaseRequestHandler):
    """Answers in capitals."""

    def handle(self):
        while data := self.request.recv(1024):
            self.request.sendall(data.upper())


class Nothing(harken.BaseRequestHandler):
    """Does nothing and returns."""


@contextlib.contextmanager
def serving(server, **keywords):
    """Serve in a thread; shut down and close when left."""
    thread = threading.Thread(target=server.serve_forever, kwargs=keywords, daemon=True)
    thread.start()
    assert server.wait_ready(PATIENCE)
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "serve_forever() did not return"
        for info in server.connections():
            server.close_connection(info.id)
        server.server_close()


def connect(server):
    """Return a client."""
    return socket.create_connection(server.server_address[:2], PATIENCE)


def ask(client, data=b"hello"):
    """Send and receive once."""
    client.sendall(data)
    return client.recv(1024)


def reset(client):
    """Close with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def stop(server):
    """Call shutdown() with a bound on the time."""
    in_thread(lambda: server.shutdown() or True)


def in_thread(function, *args):
    """Run with a bound on the time; a deadlock fails instead of hanging."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert results, f"{function.__name__} did not return"
    return results[0]


def named(told, name):
    """Return the events of one name."""
    return [event for event in told if event.name == name]
