"""The warnings: each for the mistake that it is about, none for classes that are right."""

from __future__ import annotations

import http.server
import socketserver

import pytest

import harken
from harken.explain import describe


def texts(cls: type, level: str = "warning") -> list[str]:
    """Return what is said of a class."""
    return [advice.text for advice in describe(cls).warnings if advice.level == level]


def server(*bases: type, **methods: object) -> type:
    """Make a user's class."""
    members = {name: (lambda self, *_: None) if value is True else value for name, value in methods.items()}
    return type("Mine", bases, {"__module__": "app", **members})


@pytest.mark.parametrize(
    "cls",
    [
        socketserver.ThreadingTCPServer,
        socketserver.ForkingUDPServer,
        http.server.ThreadingHTTPServer,
        harken.ThreadingTCPServer,
        harken.PoolTCPServer,
        server(harken.PoolMixIn, http.server.ThreadingHTTPServer),
        socketserver.StreamRequestHandler,
    ],
)
def test_right_classes_get_no_warning(cls: type) -> None:
    """Classes of the libraries, and documented uses of them, are right."""
    assert describe(cls).warnings == ()


def test_cooperating_mixins_get_no_warning(program) -> None:
    """A method that goes on with ``super()`` hides nothing."""
    assert describe(program.Careful).warnings == ()


def test_mixin_on_the_wrong_side(program) -> None:
    """A mix-in behind the server class is named, with the line that puts it right."""
    (text,) = texts(program.WrongSide)
    assert "ThreadingMixIn stands behind TCPServer: it does nothing there" in text
    assert "process_request and server_close are never reached" in text
    assert text.endswith("class WrongSide(ThreadingMixIn, TCPServer)")


def test_users_mixin_on_the_wrong_side() -> None:
    """The same for a mix-in of the user's own."""
    mixin = type("Auth", (), {"__module__": "app", "verify_request": lambda *_: False})
    (text,) = texts(server(socketserver.TCPServer, mixin))
    assert "Auth stands behind TCPServer" in text
    assert "verify_request is never reached" in text


def test_mixin_hidden_by_another() -> None:
    """Of two mix-ins with the same hook the first one wins, and the second is named."""
    first = type("First", (), {"__module__": "app", "verify_request": lambda *_: True})
    second = type("Second", (), {"__module__": "app", "verify_request": lambda *_: False})
    expected = ["First stands before Second, whose verify_request is never reached"]
    assert texts(server(first, second, socketserver.TCPServer)) == expected


@pytest.mark.parametrize("base", [socketserver.TCPServer, harken.TCPServer, socketserver.ForkingTCPServer])
def test_process_request_thread_without_threads(base: type) -> None:
    """``process_request_thread`` is called by threading servers (and harken's engines) only."""
    (text,) = texts(server(base, process_request_thread=True))
    assert "process_request_thread" in text
    assert "is never called" in text


@pytest.mark.parametrize("base", [socketserver.ThreadingTCPServer, harken.ForkingTCPServer, harken.PoolTCPServer])
def test_process_request_thread_with_threads(base: type) -> None:
    """Where it is called, nothing is said."""
    assert texts(server(base, process_request_thread=True)) == []


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("verify_requests", "verify_request"),
        ("verfy_request", "verify_request"),
        ("verifyRequest", "verify_request"),
        ("proces_request", "process_request"),
        ("handle_erorr", "handle_error"),
        ("server_closed", "server_close"),
    ],
)
def test_misspelt_hook(wrong: str, right: str) -> None:
    """A name that is nearly a hook's is no hook, and the hook is offered."""
    (text,) = texts(server(socketserver.TCPServer, **{wrong: True}))
    assert f"Mine.{wrong}" in text
    assert text.endswith(f"is no hook; did you mean {right}?")


@pytest.mark.parametrize("name", ["handle_read", "handle_close", "server_bound", "start", "run", "get_app", "_handle"])
def test_names_of_the_users_own(name: str) -> None:
    """Names that programs use for things of their own are let alone."""
    assert describe(server(socketserver.TCPServer, **{name: True})).warnings == ()


def test_misspelt_handler_hook() -> None:
    """The handler's hooks are watched too, swapped letters included."""
    (text,) = texts(server(socketserver.BaseRequestHandler, handel=True))
    assert text.endswith("did you mean handle?")


def test_handle_timeout_is_for_handle_request() -> None:
    """``handle_timeout`` gets a note, not a warning."""
    cls = server(socketserver.TCPServer, handle_timeout=True)
    assert texts(cls) == []
    assert "handle_request() only" in texts(cls, "note")[0]


def test_closing_a_datagram() -> None:
    """A note says what ``close_request`` is given on a datagram server."""
    assert "pair (data, socket)" in texts(server(socketserver.UDPServer, close_request=True), "note")[0]
    assert texts(server(socketserver.TCPServer, close_request=True), "note") == []


def test_hook_of_the_other_class() -> None:
    """A handler's hook on a server, or the reverse, is never called."""
    assert "hook of the handler" in texts(server(socketserver.TCPServer, handle=True))[0]
    assert "hook of the server" in texts(server(socketserver.BaseRequestHandler, verify_request=True))[0]


def test_own_process_request_hides_the_threads() -> None:
    """A note says that a ``process_request`` without ``super()`` starts no thread."""
    (note,) = texts(server(socketserver.ThreadingTCPServer, process_request=True), "note")
    assert "ThreadingMixIn starts nothing" in note


def test_async_handle_on_a_blocking_engine() -> None:
    """An ``async def handle`` that nobody awaits is a warning."""

    async def handle(self: object) -> None:
        """Do nothing."""

    handler = server(socketserver.BaseRequestHandler, handle=handle)
    (advice,) = describe(socketserver.ThreadingTCPServer, handler).warnings
    assert "is async and the engine is 'thread'" in advice.text
