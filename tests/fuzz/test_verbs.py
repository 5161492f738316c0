"""Whatever clients do and operators ask for, in whatever order: everybody gets home, and the books balance."""

import contextlib
import os
import socket
import struct
import threading
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings as hypothesis_settings, strategies as st
from waiting import wait_until

import harken
from harken import events
from harken.errors import LifecycleError

LOCAL = ("127.0.0.1", 0)
PATIENCE = 15.0  # seconds
RESET = struct.pack("ii", 1, 0)  # SO_LINGER without patience
EXAMPLES = 300 if os.environ.get("HARKEN_SOAK") == "full" else 12
# A failure is not made smaller: each try may wait for what never comes.
fuzz = hypothesis_settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)


class Obey(harken.StreamRequestHandler):
    """Does what each line says, or gives it back."""

    def handle(self):
        for line in self.rfile:
            word = line.strip().decode()
            if word == "return":
                return
            if word == "raise":
                raise ValueError(word)
            with contextlib.suppress(LifecycleError):
                if word in ("suspend", "resume", "stats", "connections"):
                    getattr(self.server, word)()
            if word == "kill":
                self.server.close_connection(self.connection_id)
            self.wfile.write(line)


class Play:
    """A server, its clients, and what may be done to either; each by a number that chooses among the clients."""

    def __init__(self, engine, chosen):
        self.seen = []
        self.unsubscribe = events.subscribe(self.seen.append, "opened", "closed")
        self.server = harken.TCPServer(LOCAL, Obey, engine=engine, **chosen)
        self.server.handle_error = lambda *_: None
        self.clients = []
        self.loops = []
        self.serve()

    def serve(self, _=0):
        """Begin a loop."""
        self.loops.append(threading.Thread(target=self._loop, daemon=True))
        self.loops[-1].start()
        assert self.server.wait_ready(PATIENCE)

    def _loop(self):
        with contextlib.suppress(LifecycleError):
            self.server.serve_forever(0.1)

    def restart(self, _):
        """End the loop and begin another: who is served is served on."""
        self.server.shutdown()
        self.loops[-1].join(PATIENCE)
        self.serve()

    def connect(self, number):
        """Some clients more."""
        for _ in range(1 + number % 4):
            self.clients.append(socket.create_connection(self.server.server_address, PATIENCE))

    def say(self, number):
        """One client says something, and waits for nothing."""
        word = ("hello", "hello", "return", "raise", "suspend", "resume", "kill", "stats", "connections")[number % 9]
        self._one(number).sendall(f"{word}\n".encode())

    def hang_up(self, number):
        """One client closes its side; the server's children may have a copy of its descriptor."""
        self._one(number).shutdown(socket.SHUT_WR)

    def reset(self, number):
        """One client is gone, with a reset; where the server's children have a copy of its descriptor, with an end."""
        client = self._one(number)
        self.clients.remove(client)
        if self.server.stats()["engine"] == "fork":
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()

    def suspend(self, _):
        """The operator holds the door."""
        self.server.suspend()

    def resume(self, _):
        """The operator opens it."""
        self.server.resume()

    def kill(self, number):
        """The operator closes a connection."""
        for info in self.server.connections()[:1]:
            self.server.close_connection(info.id, ("killed", "shed", "for a reason")[number % 3])

    def configure(self, number):
        """The operator changes his mind."""
        name, value = (
            ("max_connections", 2),
            ("max_connections", None),
            ("max_connections_per_peer", 3),
            ("max_connections_per_peer", None),
            ("overload", "shed"),
            ("overload", "wait"),
            ("idle_timeout", 0.05),
            ("idle_timeout", None),
            ("lifetime", 0.1),
            ("max_accept_rate", 20),
        )[number % 10]
        self.server.configure(**{name: value})

    def _one(self, number):
        if not self.clients:
            self.connect(0)
        return self.clients[number % len(self.clients)]

    def end(self, how):
        """All go home, by one of the ways to end; the second to ask for the end gets it, too."""
        enders = [threading.Thread(target=self._end, args=(how,), daemon=True) for _ in range(2)]
        if how == "close":
            for client in self.clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_WR)
        for ender in enders:
            ender.start()
        for thread in [*enders, *self.loops]:
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{thread.name} did not end"
        for client in self.clients:
            client.close()
        wait_until(lambda: self.server.stats()["open"] == 0)
        self.unsubscribe()

    def _end(self, how):
        if how == "drain":
            self.server.drain(0.1)
        self.server.server_close()


OPERATIONS = ["connect", "say", "say", "say", "hang_up", "reset", "suspend", "resume", "kill", "configure", "restart"]
CHOSEN = st.fixed_dictionaries(
    {},
    optional={
        "max_connections": st.sampled_from([1, 3]),
        "overload": st.sampled_from(["wait", "reset", "reply", "shed"]),
        "read_timeout": st.just(0.05),
        "handler_timeout": st.just(0.5),
        "max_memory_bytes": st.just(1 << 20),
    },
)


@pytest.mark.parametrize("engine", ["thread", "pool", "fork", "green"])
@fuzz
@given(
    chosen=CHOSEN,
    operations=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 99)), min_size=3, max_size=25),
    how=st.sampled_from(["drain", "close"]),
)
def test_everybody_gets_home_and_the_books_balance(engine, chosen, operations, how):
    """No verb hangs; each connection is told once; what was accepted was closed or rejected."""
    play = Play(engine, chosen)
    for name, number in operations:
        with contextlib.suppress(OSError, LifecycleError):  # the client has gone, or the server is not in that state
            getattr(play, name)(number)
    play.end(how)
    told = {"opened": Counter(), "closed": Counter()}
    for event in play.seen:
        told[event.name][event.connection] += 1
    assert told["opened"] == told["closed"]
    assert set(told["closed"].values()) <= {1}
    figures = play.server.stats()
    assert sum(figures["closed_total"].values()) == len(told["closed"])
    assert figures["accepted_total"] == len(told["closed"]) + figures["rejected_total"]
