"""A handler that does what its client says, so that a check stands in one place, whatever process the handler is in."""

from __future__ import annotations

import select
from typing import Any

from harken import green
from harken.handlers import BaseRequestHandler

__all__ = ["DELIBERATE", "Obedient", "ObedientToDatagrams"]

DELIBERATE = "a handler of a check raises on purpose"


class Obedient(BaseRequestHandler):
    """Reads commands, a line each, and obeys until the client ends its side."""

    def handle(self) -> None:
        """Obey."""
        self.obeying = True
        while self.obeying and (line := self._line()):
            verb, *numbers = line.split()
            getattr(self, f"do_{verb}")(*map(int, numbers))

    def do_echo(self, size: int) -> None:
        """Send the next ``size`` bytes back."""
        while size and (data := self.request.recv(min(size, 65536))):
            self.request.sendall(data)
            size -= len(data)

    def do_say(self, size: int) -> None:
        """Send ``size`` bytes."""
        self.request.sendall(bytes(size))

    def do_say_after_end(self, size: int) -> None:
        """Read to the client's end, then send ``size`` bytes."""
        while self.request.recv(65536):
            pass
        self.do_say(size)

    def do_hold(self) -> None:
        """Say so, and read to the client's end."""
        self.request.sendall(b"held\n")
        while self.request.recv(65536):
            pass

    def do_work(self) -> None:
        """Say so, and do something else than to wait for the client, until its end or that of the connection."""
        self.request.sendall(b"held\n")
        poller = select.poll()
        poller.register(self.request.fileno(), select.POLLIN)
        while not poller.poll(0):
            green.sleep(0.01)

    def do_fail(self) -> None:
        """Raise."""
        raise ValueError(DELIBERATE)

    def do_leave(self) -> None:
        """Return, with the client still there."""
        self.obeying = False

    def do_shutdown(self) -> None:
        """Stop the server from within the handler."""
        self.server.shutdown()
        self.request.sendall(b"done\n")

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            byte = self.request.recv(1)
            if not byte:
                return ""
            line += byte
        return line.decode()


class ObedientToDatagrams(BaseRequestHandler):
    """Obeys one datagram: ``fail`` raises, ``hold`` is answered twice, everything else is sent back."""

    def handle(self) -> None:
        """Obey."""
        data, sock = self.request
        if data == b"fail":
            raise ValueError(DELIBERATE)
        answer(sock, data, self.client_address)
        if data == b"hold":
            self._wait_at_gate()
            answer(sock, b"let go", self.client_address)

    def _wait_at_gate(self) -> None:
        poller = select.poll()
        poller.register(self.server.gate, select.POLLIN)
        while not poller.poll(0):
            green.sleep(0.01)


def answer(sock: Any, data: bytes, address: Any) -> None:
    """Send a datagram; a client that has gone is nobody's fault."""
    try:
        sock.sendto(data, address)
    except (ConnectionRefusedError, FileNotFoundError):
        pass
