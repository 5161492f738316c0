"""Answers to datagrams on the green engine: when they leave, in which order, and from which address."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from datagrams import LOCAL, PATIENCE, Echo, ask, clients, soon

import harken
from harken import green

RECVTTL = 12  # IP_RECVTTL of linux/in.h


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("word", [b"now", b"wait"])
@pytest.mark.parametrize(
    ("family", "wildcard", "asked"),
    [
        (socket.AF_INET, "0.0.0.0", "127.0.0.7"),
        (socket.AF_INET6, "::", "::1"),
        (socket.AF_INET6, "::", "::ffff:127.0.0.7"),
    ],
)
def test_answers_come_from_the_address_that_was_asked(family: int, wildcard: str, asked: str, word: bytes) -> None:
    """On a socket bound to all addresses; a connected client takes answers from no other."""

    class Server(harken.GreenUDPServer):
        address_family = family  # type: ignore[assignment]

        def server_bind(self) -> None:
            if family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

    if family == socket.AF_INET6 and not _has_ipv6():
        pytest.skip("needs a kernel with IPv6")
    with (
        harken.background(Server((wildcard, 0), Echo)) as server,
        clients((asked, server.server_address[1]), 3, family) as many,
    ):
        for client in many:
            client.send(word)
        assert [client.recv(100) for client in many] == [word] * 3


def test_an_answer_that_is_too_long_raises_in_its_handler() -> None:
    """What the kernel refuses at once is told to whoever sent it."""
    errors: list[BaseException] = []

    class Long(harken.BaseRequestHandler):
        def handle(self) -> None:
            try:
                self.request[1].sendto(bytes(70_000), self.client_address)
            except OSError as error:
                errors.append(error)
            with contextlib.suppress(TypeError):
                self.request[1].sendto("text", self.client_address)
            self.request[1].sendto(bytearray(b"refused"), self.client_address)

    with harken.background(harken.GreenUDPServer(LOCAL, Long)) as server, clients(server.server_address) as (client,):
        assert ask(client, b"x") == b"refused"
    assert len(errors) == 1


def test_an_answer_does_not_wait_for_what_comes_after_it() -> None:
    """What was answered goes out although the handler computes on."""

    class Busy(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request[1].sendto(b"answer", self.client_address)
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                pass

    with harken.background(harken.GreenUDPServer(LOCAL, Busy)) as server, clients(server.server_address) as (client,):
        began = time.monotonic()
        assert ask(client, b"x") == b"answer"
        assert time.monotonic() - began < 0.7


def test_what_is_sent_elsewhere_keeps_its_place() -> None:
    """Answers and messages to others leave in the order in which they were sent."""
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        other.bind(LOCAL)
        other.settimeout(PATIENCE)

        class Tell(harken.BaseRequestHandler):
            def handle(self) -> None:
                sock = self.request[1]
                sock.sendto(b"1", self.client_address)
                sock.sendto(b"2", 0, self.client_address)
                sock.sendto(b"3", (*self.client_address,))
                sock.sendto(self.request[0], other.getsockname())
                sock.sendto(b"4", self.client_address)
                with sock.dup() as double:
                    double.sendto(b"5", self.client_address)

        server = harken.GreenUDPServer(LOCAL, Tell)
        with harken.background(server), clients(server.server_address) as (client,):
            client.send(b"hello")
            assert [client.recv(10) for _ in range(5)] == [b"1", b"2", b"3", b"4", b"5"]
            assert other.recv(10) == b"hello"


def test_a_handler_that_forks_answers_once() -> None:
    """What was answered before the fork is the parent's to send; the child's own answers come from the child."""

    class Fork(harken.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            sock.sendto(b"before", self.client_address)
            pid = os.fork()
            if pid == 0:
                sock.sendto(b"child", self.client_address)
                return
            os.waitpid(pid, 0)
            sock.sendto(b"parent", self.client_address)

    with harken.background(harken.GreenUDPServer(LOCAL, Fork)) as server, clients(server.server_address) as (client,):
        client.send(b"x")
        assert sorted(client.recv(10) for _ in range(3)) == [b"before", b"child", b"parent"]
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(10)


ENDS = {
    "_exit": lambda: os._exit(7),
    "kill": lambda: os.kill(os.getpid(), 9),
    "exec": lambda: os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(7)"]),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_an_order_to_end_is_confirmed(end: Callable[[], None]) -> None:
    """What a handler has answered is on its way before it ends or replaces the process."""

    class Obey(harken.BaseRequestHandler):
        def handle(self) -> None:
            self.request[1].sendto(b"as you say", self.client_address)
            end()

    with harken.GreenUDPServer(LOCAL, Obey) as server, clients(server.server_address) as (client,):
        pid = os.fork()
        if pid == 0:
            server.serve_forever()
            os._exit(1)
        client.send(b"end")
        assert client.recv(20) == b"as you say"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (7, -9)


def test_several_answers_to_the_last_of_a_batch_join() -> None:
    """Its first goes at once, whatever comes; the others together, in their order."""

    class Count(harken.BaseRequestHandler):
        def handle(self) -> None:
            for number in range(100):
                self.request[1].sendto(b"%d" % number, self.client_address)

    with harken.background(harken.GreenUDPServer(LOCAL, Count)) as server, clients(server.server_address) as (client,):
        client.send(b"x")
        assert [int(client.recv(10)) for _ in range(100)] == list(range(100))


def test_a_socket_with_a_sendto_of_its_own_keeps_it() -> None:
    """A program's socket class is not gone around."""
    sent: list[bytes] = []

    class Noting(socket.socket):
        def sendto(self, *args: Any) -> int:
            sent.append(args[0])
            return super().sendto(*args)

    server = harken.GreenUDPServer(LOCAL, Echo, bind_and_activate=False)
    server.socket.close()
    server.socket = Noting(socket.AF_INET, socket.SOCK_DGRAM)
    server.server_bind()
    with harken.background(server), clients(server.server_address) as (client,):
        assert ask(client, b"hello") == b"hello"
    assert sent == [b"hello"]


class _NoPort:
    """Sends datagrams from port 0, to which nothing can be answered."""

    def __init__(self, server: Any) -> None:
        self._port = server.server_address[1]
        try:
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        except PermissionError:
            pytest.skip("needs CAP_NET_RAW")

    def send(self, data: bytes) -> None:
        """Send one."""
        self._sock.sendto(struct.pack("!HHHH", 0, self._port, 8 + len(data), 0) + data, ("127.0.0.1", 0))

    def close(self) -> None:
        """Send no more."""
        self._sock.close()


@pytest.mark.parametrize("word", [b"late", b"now"])
def test_what_is_told_of_an_unsent_answer_may_wait(word: bytes) -> None:
    """``handle_error`` runs in a green thread, also for an answer that the kernel refused after its handler."""
    errors: list[object] = []

    class Server(harken.GreenUDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            import sys

            green.sleep(0.001)
            errors.append((request[0], client_address[1], type(sys.exc_info()[1])))

    class Late(Echo):
        def handle(self) -> None:
            super().handle()
            if self.request[0] == b"late":
                time.sleep(0.02)  # more than a tick of the clock: answers are sent between two handlers

    with (
        harken.background(Server(LOCAL, Late)) as server,
        clients(server.server_address) as (client,),
        contextlib.closing(_NoPort(server)) as nobody,
    ):
        for turn in range(5):
            nobody.send(word)
            for number in range(5):
                client.send(b"%d.%d" % (turn, number))
            nobody.send(word)
            assert [client.recv(10) for _ in range(5)] == [b"%d.%d" % (turn, number) for number in range(5)]
        soon(lambda: len(errors) == 10)
    assert set(errors) == {(word, 0, OSError)}


@pytest.mark.parametrize("how", ["server_close", "close", "detach"])
def test_an_answer_leaves_before_its_socket_is_closed(how: str) -> None:
    """By its own handler, which may end the server; and the loop ends."""
    errors: list[object] = []

    class Server(harken.GreenUDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append(request)

    class Last(harken.BaseRequestHandler):
        def handle(self) -> None:
            sock = self.request[1]
            sock.sendto(b"bye", self.client_address)
            if how == "server_close":
                self.server.server_close()
            elif how == "close":
                sock.close()
            else:
                os.close(sock.detach())
            with pytest.raises(OSError, match="Bad file descriptor"):
                sock.sendto(b"more", self.client_address)
            self.server.shutdown()

    server = Server(LOCAL, Last)
    thread = threading.Thread(target=server.serve_forever)
    with clients(server.server_address) as (client,):
        thread.start()
        assert ask(client, b"quit") == b"bye"
        thread.join(PATIENCE)
        assert not thread.is_alive()
    server.server_close()
    assert not errors


def test_an_option_holds_for_what_is_answered_after_it() -> None:
    """The answer before it has left with what held then."""

    class Mark(harken.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            before = sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL)
            for ttl in (before, 7, before):
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
                sock.sendto(data, self.client_address)

    def ttl_of_next(client: socket.socket) -> int:
        _, ancillary, _, _ = client.recvmsg(10, 100)
        return next(int.from_bytes(data, sys.byteorder) for _, kind, data in ancillary if kind == socket.IP_TTL)

    server = harken.GreenUDPServer(LOCAL, Mark)
    with harken.background(server), clients(server.server_address) as (client,):
        client.setsockopt(socket.IPPROTO_IP, RECVTTL, 1)
        client.send(b"?")
        found = [ttl_of_next(client) for _ in range(3)]
    assert found[1] == 7
    assert found[0] == found[2] != 7


@pytest.mark.parametrize("word", [b"now", b"wait"])
@pytest.mark.parametrize("how", ["flags", "message", "bare message"])
def test_other_ways_to_answer_keep_place_and_address(how: str, word: bytes) -> None:
    """With flags, and by ``sendmsg``: after what was answered before, from the address that was asked."""

    class Tell(harken.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            if data == b"wait":
                green.sleep(0.01)
            sock.sendto(b"1", self.client_address)
            if how == "flags":
                assert sock.sendto(b"two", 0, self.client_address) == 3
            elif how == "message":
                assert sock.sendmsg(iter([b"t", b"wo"]), [], socket.MSG_DONTWAIT, self.client_address) == 3
            else:
                assert sock.sendmsg([b"two"], (), 0, self.client_address) == 3
            with pytest.raises(OSError, match="ddress"):
                sock.sendmsg([b"to nobody"])
            with pytest.raises(TypeError):
                sock.sendmsg()
            sock.sendto(b"3", self.client_address)

    server = harken.GreenUDPServer(("0.0.0.0", 0), Tell)
    with harken.background(server), clients(("127.0.0.7", server.server_address[1])) as (client,):
        client.send(word)
        assert [client.recv(10) for _ in range(3)] == [b"1", b"two", b"3"]
