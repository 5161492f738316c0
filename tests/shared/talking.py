"""One client of an async handler."""

from __future__ import annotations

import socket

import harken

PATIENCE = 10.0  # seconds
LOCAL = ("127.0.0.1", 0)


def talk(handle, say=b"", *, base=harken.AsyncStreamRequestHandler, **settings):
    """Serve one client by ``handle``; return what it returned, or raised, and what the client got."""
    outcome = []

    async def recorded(self):
        try:
            outcome.append(await handle(self))
        except BaseException as error:
            outcome.append(error)

    handler = type("Handler", (base,), {"handle": recorded})
    with harken.background(harken.AsyncTCPServer(LOCAL, handler, **settings)) as server:
        with socket.create_connection(server.server_address, PATIENCE) as client:
            if callable(say):
                got = say(client)
            else:
                client.sendall(say)
                client.shutdown(socket.SHUT_WR)
                got = b""
                while part := client.recv(65536):
                    got += part
    return outcome[0], got
