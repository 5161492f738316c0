"""What ``describe`` says of stdlib's classes, of harken's and of a user's."""

from __future__ import annotations

import http.server
import socketserver

import pytest

import harken
from harken.errors import ConfigError
from harken.explain import describe

CONSTRUCTION = ["__init__", "socket", "server_bind", "server_activate"]
TAKING = ["serve_forever", "_handle_request_noblock", "get_request", "verify_request", "process_request"]
HANDLING = ["finish_request", "RequestHandlerClass", "setup", "handle", "finish", "shutdown_request", "close_request"]
SOMETIMES = ["service_actions", "handle_timeout", "handle_error"]
END = ["shutdown", "server_close"]


def hook(explanation, name):
    """Return the row of one hook."""
    return next(row for row in explanation.hooks if row.name == name)


@pytest.mark.parametrize("library", [socketserver, harken], ids=["stdlib", "harken"])
@pytest.mark.parametrize(
    "name, engine, thread",
    [("TCPServer", "inline", False), ("ThreadingTCPServer", "thread", True), ("UDPServer", "inline", False)],
)
def test_hooks_stand_in_call_order(library, name: str, engine: str, thread: bool) -> None:
    """The rows are the contract's hooks in the contract's order."""
    explanation = describe(getattr(library, name))
    middle = ["process_request_thread"] if thread else []
    assert [row.name for row in explanation.hooks] == CONSTRUCTION + TAKING + middle + HANDLING + SOMETIMES + END
    assert explanation.engine == engine


def test_classes_come_with_their_own_methods() -> None:
    """Each class is listed with the methods that it defines, and its bases in their order."""
    classes = {box.name: box for box in describe(http.server.ThreadingHTTPServer).families[0].classes}
    assert list(classes) == ["ThreadingHTTPServer", "ThreadingMixIn", "HTTPServer", "TCPServer", "BaseServer"]
    assert classes["HTTPServer"].methods == ("server_bind",)
    assert classes["ThreadingMixIn"].methods[:2] == ("process_request", "process_request_thread")
    bases = classes["ThreadingHTTPServer"].bases
    assert [box.name for key in bases for box in classes.values() if box.key == key] == ["ThreadingMixIn", "HTTPServer"]


def test_users_hook_is_found_with_file_and_line(program, find_line) -> None:
    """An overridden ``verify_request`` is the one that runs, and says where it stands."""
    row = hook(describe(program.Careful), "verify_request")
    assert (row.owner, str(row.place), row.yours) == ("Careful", f"app.py:{find_line('class Careful') + 1}", True)


@pytest.mark.parametrize(
    "name, where",
    [
        ("TCPServer", "serving thread"),
        ("ThreadingTCPServer", "a thread of its own"),
        ("PoolTCPServer", "a pool thread"),
        pytest.param("ForkingTCPServer", "a child process"),
    ],
)
def test_the_thread_of_a_handler_is_named(name: str, where: str) -> None:
    """``handle`` runs where the engine runs it; ``verify_request`` in the serving thread."""
    explanation = describe(getattr(harken, name))
    assert hook(explanation, "handle").where == where
    assert hook(explanation, "verify_request").where == "serving thread"


def test_a_handler_is_given_a_threading_server(program) -> None:
    """For a handler class both hierarchies are explained, on a thread per connection unless told otherwise."""
    explanation = describe(program.Upper)
    assert [family.classes[0].name for family in explanation.families] == ["ThreadingTCPServer", "Upper"]
    assert hook(explanation, "handle").owner == "Upper"
    assert describe(program.Upper, engine="fork").engine == "fork"
    assert describe(program.Upper, engine="inline").server == "TCPServer"


def test_a_datagram_handler_is_given_a_udp_server() -> None:
    """A handler of datagrams gets a server of datagrams."""
    assert describe(socketserver.DatagramRequestHandler).transport == "udp"


def test_a_mixin_in_front_of_stdlibs_server_is_harkens_engine() -> None:
    """harken's methods in the user's class are shown as harken's and not as the user's own."""
    explanation = describe(type("Web", (harken.PoolMixIn, http.server.HTTPServer), {"__module__": "app"}))
    row = hook(explanation, "serve_forever")
    assert explanation.engine == "pool"
    assert (row.owner, row.yours) == ("BaseServer", False)
    assert explanation.families[0].classes[0].methods == ()


@pytest.mark.parametrize("cls", [socketserver.ThreadingMixIn, int])
def test_other_classes_are_refused(cls: type) -> None:
    """A class that is neither server nor handler is refused with its name."""
    with pytest.raises(ConfigError, match=f"{cls.__name__}.* neither a server class nor a handler class"):
        describe(cls)


def test_unknown_engine_is_refused() -> None:
    """An engine that does not exist is refused, and the nearest is offered."""
    with pytest.raises(ConfigError, match="did you mean 'thread'"):
        describe(socketserver.TCPServer, engine="threads")
