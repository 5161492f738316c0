"""What users write by mistake: type checkers must see it, or ``make types`` fails by an unused ``type: ignore``."""

from __future__ import annotations

import harken
from harken import events, green, testing


class Plain(harken.BaseRequestHandler):
    """Nobody awaits it."""

    async def handle(self) -> None:  # type: ignore[override]
        print(self.conection_id)  # type: ignore[attr-defined]
        print(self.peer.adress)  # type: ignore[attr-defined]


class Arguments(harken.StreamRequestHandler):
    """Hooks are called as they are declared."""

    def handle(self, line: bytes) -> None:  # type: ignore[override]
        print(line)

    def on_timeout(self) -> None:  # type: ignore[override]
        print("over")


class Coroutine(harken.AsyncStreamRequestHandler):
    """Nothing but awaiting gives the bytes."""

    async def handle(self) -> None:
        for line in self.rfile:  # type: ignore[attr-defined]
            print(line)
        first: bytes = self.rfile.readline()  # type: ignore[assignment]
        print(first)
        self.wfile.write("text")  # type: ignore[arg-type]


def run() -> None:
    """Names, arguments and results that are none."""
    with harken.TCPServr(("", 0), Plain):  # type: ignore[attr-defined]
        pass
    with harken.TCPServer(("", 0), Plain) as server:
        server.serve_forver()  # type: ignore[attr-defined]
    with harken.background(server) as running:
        running.drian()  # type: ignore[attr-defined]
        print(running.drain(5).finishd)  # type: ignore[attr-defined]
    harken.serve(Plain, 8800)  # type: ignore[arg-type]
    harken.TLS(certificate="site.pem")  # type: ignore[call-arg]
    events.subscribe("closed", print)  # type: ignore[arg-type]
    green.offload(len, 5)  # type: ignore[arg-type]
    text: str = green.offload(len, "word")  # type: ignore[assignment]
    print(text)
    testing.conect(Plain)  # type: ignore[attr-defined]


async def run_async() -> None:
    """A server that is not there yet."""
    print(harken.start(Coroutine).addresses)  # type: ignore[attr-defined]
