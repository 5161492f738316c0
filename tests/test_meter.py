"""Times and bytes are measured where somebody asks for metrics."""

import socket

from harken.meter import SAMPLED, SECONDS, Histogram, Meter
from harken.traffic import accept_queue, moved, since_handshake


def test_a_time_falls_into_the_first_bucket_that_has_room():
    """A bound belongs to its bucket, as Prometheus has it; what is above all falls into the last."""
    times = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        times.add(seconds)
    assert times.counts == [2, 1, 1]
    assert times.sum == 7.65


def test_bounds_rise():
    """Buckets are looked for by bisection."""
    assert list(SECONDS) == sorted(set(SECONDS))


def test_one_connection_in_some_is_asked_for_its_time_in_the_queue():
    """The first is; bursts count as many as they are."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            meter = Meter()
            for _ in range(SAMPLED):
                meter.accepted(connection)
            assert sum(meter.queue.counts) == 1
            meter.accepted(connection, 3 * SAMPLED)
            assert sum(meter.queue.counts) == 2
            meter.accepted(connection)
            assert sum(meter.queue.counts) == 2


def test_the_kernel_tells_the_queue_and_the_bytes():
    """How many wait and may, and what moved on a connection, from either side of it."""
    with socket.create_server(("127.0.0.1", 0), backlog=7) as listener:
        with socket.create_connection(listener.getsockname()) as client:
            assert accept_queue(listener) == (1, 7)
            connection, _ = listener.accept()
            with connection:
                assert 0 <= since_handshake(connection) < 60
                client.sendall(b"12345")
                assert connection.recv(10) == b"12345"
                connection.sendall(b"123")
                assert client.recv(10) == b"123"
                assert moved(connection) == (5, 3)
                assert moved(client) == (3, 5)


def test_the_kernel_tells_nothing_of_others():
    """Unix sockets have no such figures."""
    one, two = socket.socketpair()
    with one, two:
        assert moved(one) is None
        assert since_handshake(one) is None
        assert accept_queue(one) is None
