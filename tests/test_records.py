"""What harken remembers of its connections: ids, times, why each ended, and who is told of it."""

import contextlib
import gc
import itertools
import os
import re
import socket
import struct
import threading
import time

import pytest
from waiting import wait_until

from harken import records
from harken.connection import accept, peer_fault
from harken.records import REASONS, Registry
from harken.traffic import traffic

PATIENCE = 5.0  # seconds
TCP_CLOSE = 7  # of include/net/tcp_states.h


class Books(Registry):
    """A registry that notes what it is told."""

    def __init__(self):
        self.closed, self.ended_children = [], []
        super().__init__(lambda request, address: ("peer", address), self.closed.append, self.ended_children.append)


@pytest.fixture
def books():
    """An empty registry."""
    return Books()


@pytest.fixture
def pair(request, tmp_path):
    """An accepted connection, its address and its client: TCP unless the test says ``unix``."""
    unix = getattr(request, "param", "tcp") == "unix"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX if unix else socket.AF_INET))
        listener.bind(str(tmp_path / "s") if unix else ("127.0.0.1", 0))
        listener.listen()
        client = stack.enter_context(socket.socket(listener.family))
        client.settimeout(PATIENCE)
        client.connect(listener.getsockname())
        taken, address = accept(listener)
        stack.enter_context(taken)
        yield taken, address, client


both = pytest.mark.parametrize("pair", ["tcp", "unix"], indirect=True)


def reset(client):
    """Close with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ids_differ_and_share_a_prefix_of_this_process(books):
    """A random prefix and a count: unique over processes and restarts."""
    requests = [type("Request", (), {})() for _ in range(100)]
    ids = [books.add(request, None).id for request in requests]
    assert len(set(ids)) == 100
    assert len({identifier.partition("-")[0] for identifier in ids}) == 1
    assert re.fullmatch(r"[0-9a-f]{6}-\d+", ids[0])


def test_a_forked_child_has_ids_of_its_own(run_program):
    """The prefix is drawn anew after a fork."""
    process = run_program(
        "-c",
        "import os\n"
        "from harken.records import Registry\n"
        "books, request = Registry(None, None, None), lambda: None\n"
        "pid = os.fork()\n"
        "pid and os.waitpid(pid, 0)\n"  # or the lines might mix
        "print(books.add(request, None).id, flush=True)",
    )
    first, second = process.communicate(timeout=20)[0].split()
    assert first.partition("-")[0] != second.partition("-")[0]


def test_close_tells_once(books, pair):
    """However often it is closed."""
    taken, address, _ = pair
    record = books.add(taken, address)
    assert len(books) == 1
    taken.close()
    taken.close()
    record.ended()
    assert books.closed == [record]
    assert len(books) == 0
    assert books.find(taken) is None


def test_a_dropped_connection_is_collected(books, pair):
    """The registry holds it weakly, so a program that forgets it gets its descriptor back, as with stdlib."""
    taken, address, client = pair
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname(), PATIENCE) as other:
        dropped, where = accept(listener)
        books.add(dropped, where)
        with pytest.warns(ResourceWarning):
            del dropped
            gc.collect()
        assert other.recv(1) == b""
    assert len(books.closed) == 1
    assert len(books) == 0


def test_any_object_may_be_a_request(books):
    """Programs return objects of their own from get_request(); collection ends their records."""
    request = type("Request", (), {})()
    record = books.add(request, "somewhere")
    assert books.find(request) is record
    assert record.peer == ("peer", "somewhere")
    del request
    gc.collect()
    assert books.closed == [record]


@pytest.mark.parametrize("request_object", [(b"data", None), 5, "text"], ids=str)
def test_what_is_no_connection_has_no_record(books, request_object):
    """A datagram's pair, and what cannot be referred to weakly."""
    assert books.add(request_object, None) is None
    assert books.find(request_object) is None
    assert len(books) == 0


def test_a_recycled_id_is_not_mistaken(books):
    """find() compares the objects, not only their ids."""
    first = type("Request", (), {})()
    record = books.add(first, None)
    books.filed[id(books)] = record
    assert books.find(books) is None


def test_by_id_and_iteration(books):
    """Records are found by the id that logs show."""
    requests = [type("Request", (), {})() for _ in range(3)]
    records = [books.add(request, None) for request in requests]
    assert list(books) == records
    assert books.by_id(records[1].id) is records[1]
    assert books.by_id("nobody") is None


def test_who_waits_asks_whenever_a_connection_ends(books, pair):
    """It returns when the last connection closes, and tells False when the time is over first."""
    taken, address, _ = pair

    def is_empty():
        return not len(books)

    assert books.wait_for(is_empty, 0)
    books.add(taken, address)
    assert not books.wait_for(is_empty, 0.01)
    timer = threading.Timer(0.02, taken.close)
    timer.start()
    assert books.wait_for(is_empty, PATIENCE)
    timer.join()


def test_who_waits_may_be_nudged(books, pair):
    """For a condition that does not hang on connections alone."""
    said = []
    timer = threading.Timer(0.02, lambda: (said.append(1), books.nudge()))
    timer.start()
    assert books.wait_for(lambda: bool(said), PATIENCE)
    timer.join()


def test_info_describes_the_connection(books, pair):
    """Id, peer, times and the serving process."""
    taken, address, _ = pair
    record = books.add(taken, address)
    info = record.info()
    assert (info.id, info.peer, info.process) == (record.id, ("peer", address), os.getpid())
    assert 0 <= info.seconds < PATIENCE
    assert abs(info.opened_at + info.seconds - time.time()) < 1
    assert 0 <= info.idle_seconds < PATIENCE


def test_idle_seconds_count_from_the_last_byte(books, pair):
    """A byte that comes in begins the idleness anew; the kernel keeps the clock."""
    taken, address, client = pair
    record = books.add(taken, address)
    wait_until(lambda: record.idle_seconds() >= 0.05)
    client.sendall(b"x")
    wait_until(lambda: record.idle_seconds() < 0.05)


@pytest.mark.parametrize("pair", ["unix"], indirect=True)
def test_unix_sockets_do_not_tell_idleness(books, pair):
    """None, not zero, where the kernel keeps no times."""
    taken, address, _ = pair
    assert books.add(taken, address).idle_seconds() is None


def test_many_threads_add_and_close(books):
    """Each connection is told closed exactly once, and the registry ends empty."""

    def work():
        for _ in range(200):
            request = type("Request", (), {})()
            record = books.add(request, None)
            list(itertools.islice(books, 3))
            record.ended()
            record.ended()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(books.closed) == 800
    assert len(books) == 0


# ── reasons ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@both
def test_a_peer_that_is_there_means_the_handler_returned(books, pair):
    """Nothing is wrong with the far end."""
    taken, address, _ = pair
    record = books.add(taken, address)
    assert peer_fault(taken) is None
    taken.close()
    assert record.reason == "handler_returned"


@both
@pytest.mark.parametrize("how", ["close", "half-close"])
def test_a_peer_that_closed_first(books, pair, how):
    """Closed, or only said that it sends no more."""
    taken, address, client = pair
    record = books.add(taken, address)
    client.close() if how == "close" else client.shutdown(socket.SHUT_WR)
    wait_until(lambda: peer_fault(taken) == "peer_closed")
    taken.close()
    assert record.reason == "peer_closed"


@both
def test_a_peer_that_reset(books, pair):
    """A reset by SO_LINGER (TCP), or by closing with unread bytes (Unix)."""
    taken, address, client = pair
    record = books.add(taken, address)
    taken.sendall(b"unread")
    reset(client)
    if taken.family == socket.AF_INET:  # a Unix socket knows at once, and tells only who asks first
        wait_until(lambda: peer_fault(taken) == "peer_reset")
    taken.close()
    assert record.reason == "peer_reset"


def test_what_was_counted_stays_when_both_sides_have_ended(books, pair):
    """The kernel counts the peer's FIN as a byte, and tells no more that there was one."""
    taken, address, client = pair
    record = books.add(taken, address)
    books.counts_bytes = True
    client.sendall(b"12345")
    assert taken.recv(5, socket.MSG_WAITALL) == b"12345"
    client.close()
    wait_until(lambda: peer_fault(taken) == "peer_closed")
    record.judge(taken)
    taken.shutdown(socket.SHUT_WR)
    wait_until(lambda: traffic(taken).state == TCP_CLOSE)
    assert record.bytes_moved() == (5, 0)


def test_a_judgement_leaves_unread_bytes_alone(books, pair):
    """Looking at the peer takes nothing from the stream."""
    taken, address, client = pair
    client.sendall(b"abc")
    books.add(taken, address).judge(taken)
    assert taken.recv(10) == b"abc"


@both
def test_a_failed_handler_is_the_reason_unless_the_peer_reset(books, pair):
    """What the handler raised counts more than a peer that merely closed."""
    taken, address, client = pair
    record = books.add(taken, address)
    record.failed = True
    client.close()
    wait_until(lambda: peer_fault(taken) == "peer_closed")
    taken.close()
    assert record.reason == "handler_failed"


def test_the_first_to_know_wins(books, pair):
    """A reason that was given from outside is not overwritten by the kernel's state."""
    taken, address, client = pair
    record = books.add(taken, address)
    record.cut("killed")
    record.cut("shed")
    taken.close()
    assert record.reason == "killed"


def test_cut_wakes_whoever_reads(books, pair):
    """The socket is shut and stays open for its handler to close."""
    taken, address, client = pair
    record = books.add(taken, address)
    read = []
    reader = threading.Thread(target=lambda: read.append(taken.recv(1)))
    reader.start()
    record.cut("killed")
    reader.join(PATIENCE)
    assert read == [b""]
    assert client.recv(1) == b""
    assert taken.fileno() >= 0
    assert books.closed == []


def test_the_reasons_are_the_contracts():
    """These words and no other are in events and statistics."""
    assert set(REASONS) == set(
        "handler_returned handler_failed peer_closed peer_reset idle_timeout read_timeout write_timeout lifetime "
        "preamble_failed rejected killed drained drain_deadline shed shutdown".split()
    )


def test_cut_of_a_handed_over_connection_ends_its_child(books, pair):
    """The parent has no socket of it any more."""
    taken, address, _ = pair
    record = books.add(taken, address)
    books.hand_over(record, 4711)
    taken.close()
    record.cut("killed")
    assert books.ended_children == [4711]
    books.child_ended(record, 1)
    assert record.reason == "killed"


# ── a child serves it ────────────────────────────────────────────────────────────────────────────────────────────────


def test_hand_over_outlives_the_parents_copy(books, pair):
    """The parent closes its socket, and the record stays until the child has ended."""
    taken, address, _ = pair
    record = books.add(taken, address)
    books.hand_over(record, 4711)
    taken.close()
    assert books.closed == []
    assert list(books) == [record]
    assert record.info().process == 4711
    books.child_ended(record, 0)
    assert books.closed == [record]
    assert record.reason == "handler_returned"


def test_a_childs_status_is_the_reason(books, pair):
    """A child that failed is a handler that failed."""
    taken, address, _ = pair
    record = books.add(taken, address)
    books.hand_over(record, 4711)
    books.child_ended(record, 1)
    books.child_ended(record, 0)
    assert record.reason == "handler_failed"
    assert len(books.closed) == 1


def test_hand_over_of_nothing_is_no_error(books):
    """A request without a record was handed over."""
    books.hand_over(None, 1)
    books.child_ended(None, 0)
    assert books.closed == []


def test_hand_over_of_an_object_that_goes(books):
    """A request of the program's own is collected in the parent while its child serves on."""
    request = type("Request", (), {})()
    record = books.add(request, None)
    books.hand_over(record, 4711)
    del request
    gc.collect()
    assert list(books) == [record]


def test_no_callback_runs_when_the_parents_copy_goes(books, monkeypatch):
    """Ctrl-C raises in whatever Python code runs next, and what a callback raises is lost."""
    ran = []
    monkeypatch.setattr(records, "_collected", ran.append)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), PATIENCE),
    ):
        taken, address = accept(listener)
        own = type("Request", (), {})()
        known = [books.add(taken, address), books.add(own, None)]
        for pid, record in enumerate(known, 4711):
            books.hand_over(record, pid)
        taken.close()
        del taken, own
        gc.collect()
        assert [record.request for record in known] == [None, None]
    assert ran == []
