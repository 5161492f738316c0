"""The checks' clients live beside a server that forks; a child must not keep what they close."""

from __future__ import annotations

import _socket
import os
import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from harken.testing import _clients
from harken.testing._clients import Client, opening, reset


def may_fork() -> bool:
    """Whether another thread could fork now."""
    free: list[bool] = []

    def look() -> None:
        free.append(_clients._forking.acquire(blocking=False))
        if free[0]:
            _clients._forking.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return free[0]


@pytest.fixture
def client() -> Client:
    """A client with a peer that has gone."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return Client(ours.family, ours.type, fileno=ours.detach())


@pytest.mark.parametrize("end", [Client.close, reset])
def test_nobody_forks_while_a_client_is_closed(
    client: Client, end: Callable[[Client], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the note that a descriptor is gone and close(2) a child would keep it, and not know it."""
    seen: list[bool] = []

    def close(self: Client) -> None:
        seen.append(may_fork())
        _socket.socket.close(self)

    monkeypatch.setattr(_clients, "_socket", SimpleNamespace(socket=SimpleNamespace(close=close)))
    monkeypatch.setattr(Client, "_real_close", close)
    assert may_fork()
    end(client)
    assert seen
    assert not any(seen)
    assert client.fileno() == -1
    assert may_fork()


def test_a_forked_child_closes_the_clients() -> None:
    """The other end sees the parent's close, though a child runs that was forked before."""
    ours, theirs = socket.socketpair()
    with opening() as clients:
        client = Client(ours.family, ours.type, fileno=ours.detach())
        clients.add(client)
    asked, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            theirs.close()
            os.close(say)
            os.read(asked, 1)  # until the parent has seen enough
        finally:
            os._exit(0)
    try:
        client.close()
        theirs.settimeout(15)
        assert theirs.recv(1) == b""
    finally:
        os.close(say)
        os.close(asked)
        os.waitpid(child, 0)
        theirs.close()
