"""``shutdown()``: from everywhere, in any order, and the loop that it ends or that a signal meets."""

import signal
import socket
import threading
import time

import pytest
from waiting import wait_until

import harken
from harken.server import TCPServer

from .kit import LOCAL, PATIENCE, Upper, ask, connect, in_thread, serving, stop


def test_shutdown_before_serving_makes_serving_return_at_once():
    """Both calls return, in whichever order they come."""
    with TCPServer(LOCAL, Upper) as server:
        stop(server)
        in_thread(lambda: server.serve_forever() or True)


def test_shutdown_does_not_wait_for_the_poll_interval():
    """The loop is woken; nothing polls."""
    with TCPServer(LOCAL, Upper) as server:
        thread = threading.Thread(target=server.serve_forever, args=(3600,), daemon=True)
        thread.start()
        assert server.wait_ready(PATIENCE)
        began = time.monotonic()
        stop(server)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert time.monotonic() - began < PATIENCE / 2


def test_shutdown_twice_and_after_the_end():
    """Each returns, also from two threads at once."""
    server = TCPServer(LOCAL, Upper)
    with serving(server):
        threads = [threading.Thread(target=server.shutdown, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
        stop(server)
    stop(server)


@pytest.mark.parametrize("kind", [TCPServer, harken.ThreadingTCPServer])
def test_shutdown_from_a_handler(kind):
    """A plain server's runs in the serving thread, which stdlib deadlocks; others wait for the loop alone."""

    class Stopping(harken.BaseRequestHandler):
        def handle(self):
            self.server.shutdown()
            self.request.sendall(b"stopped")

    with kind(LOCAL, Stopping) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with connect(server) as client:
            assert client.recv(100) == b"stopped"
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_shutdown_from_a_signal_handler(run_program):
    """In the thread that serves: the loop ends, and what stands after serve_forever() runs."""
    program = """
import harken, os, signal, threading
server = harken.TCPServer(("127.0.0.1", 0), harken.BaseRequestHandler)
signal.signal(signal.SIGTERM, lambda *_: server.shutdown())
threading.Thread(target=lambda: (server.wait_ready(10), os.kill(os.getpid(), signal.SIGTERM))).start()
server.serve_forever(3600)
server.server_close()
print("ended")
"""
    process = run_program("-c", program)
    assert process.communicate(timeout=20) == ("ended\n", "")


def test_a_shutdown_after_the_end_stops_the_next_serving_too():
    """As in stdlib, the wish is kept until a loop has heeded it."""
    with TCPServer(LOCAL, Upper) as server:
        stop(server)
        in_thread(lambda: server.serve_forever() or True)
        with serving(server), connect(server) as client:
            assert ask(client) == b"HELLO"
            client.shutdown(socket.SHUT_WR)


def test_a_server_serves_again_after_shutdown():
    """The listener stays open between two loops, and what came meanwhile is served by the second."""
    with TCPServer(LOCAL, Upper) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert server.wait_ready(PATIENCE)
        server.shutdown()
        thread.join(PATIENCE)
        with connect(server) as client:
            client.sendall(b"early")
            with serving(server):
                assert client.recv(100) == b"EARLY"
                client.shutdown(socket.SHUT_WR)


def test_the_thread_that_served_can_wait_for_the_next_to_be_ready():
    """wait_ready() waits in every thread, also in one that served before."""
    with TCPServer(LOCAL, Upper) as server:
        server.shutdown()
        server.serve_forever()
        timer = threading.Timer(0.05, server.serve_forever)
        timer.start()
        try:
            assert server.wait_ready(PATIENCE)
        finally:
            server.shutdown()
            timer.join(PATIENCE)


def test_two_threads_may_serve_one_server():
    """Each connection is served once, and one shutdown ends both."""

    class Thread(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(str(threading.get_ident()).encode())

    with TCPServer(LOCAL, Thread) as server:
        threads = [threading.Thread(target=server.serve_forever, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(server._harken.loops) == 2)  # one that comes after shutdown() would serve on
        for _ in range(20):
            with connect(server) as client:
                assert int(client.recv(100)) in {thread.ident for thread in threads}
        stop(server)
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
        assert server.stats()["accepted_total"] == 20


def test_signals_do_not_break_the_loop(run_program):
    """A signal handler that asks for figures, suspends and resumes, again and again, in the thread that serves."""
    program = """
import harken, os, signal, socket, threading
class Upper(harken.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(100):
            self.request.sendall(data.upper())
server = harken.ThreadingTCPServer(("127.0.0.1", 0), Upper)
count = 0
def storm(*_):
    global count
    count += 1
    if count >= 300:  # the next signal may come within this very call
        signal.setitimer(signal.ITIMER_REAL, 0)
    server.stats(); server.connections(); server.suspend()
    try:
        server.resume()
    except harken.LifecycleError:
        pass  # a signal that came since has done it
    server.wait_ready(0)
def clients():
    server.wait_ready(10)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    while count < 300:
        with socket.create_connection(server.server_address, 10) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"X"
    server.shutdown()
signal.signal(signal.SIGALRM, storm)
threading.Thread(target=clients).start()
server.serve_forever()
server.server_close()
print("survived", count)
"""
    process = run_program("-c", program)
    output, errors = process.communicate(timeout=30)
    assert (output.startswith("survived 30"), errors) == (True, "")


def test_interrupting_the_loop_cuts_idle_clients(run_program):
    """Ctrl-C ends a program at once, also when handlers wait for silent clients in threads that are no daemons."""
    program = """
import harken
class Reading(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"hi")
        self.request.recv(1)
server = harken.ThreadingTCPServer(("127.0.0.1", 0), Reading)
print(server.server_address[1], flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    print("interrupted", flush=True)
server.server_close()
print("closed", flush=True)
"""
    process = run_program("-c", program)
    port = int(process.stdout.readline())
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        assert client.recv(10) == b"hi"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == ("interrupted\nclosed\n", "")
        assert process.returncode == 0
