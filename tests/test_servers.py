"""The named servers: stdlib's product of mix-ins and servers, and the pool's."""

import inspect
import socket
import socketserver

import pytest

import harken
from harken import servers

THEIRS = sorted(name for name in socketserver.__all__ if name.endswith("Server"))
# On Python 3.11 stdlib has none of these; 3.12 has.
ALWAYS = ("ForkingUnixStreamServer", "ForkingUnixDatagramServer")
POOL = ("PoolTCPServer", "PoolUDPServer", "PoolUnixStreamServer")
GREEN = ("GreenTCPServer", "GreenUDPServer", "GreenUnixStreamServer")
ASYNC = ("AsyncTCPServer", "AsyncUDPServer", "AsyncUnixStreamServer")
PREFIXES = ("Threading", "Forking", "Pool", "Green", "Async")
COMBINED = sorted({name for name in (*THEIRS, *ALWAYS, *POOL, *GREEN, *ASYNC) if name.startswith(PREFIXES)})


def graph(cls):
    """Return the names along a class's method resolution order."""
    return [parent.__name__ for parent in cls.__mro__]


@pytest.mark.parametrize("name", THEIRS)
def test_the_class_graph_is_stdlibs(name):
    """``isinstance`` and ``super()`` find the same classes in the same order."""
    assert graph(getattr(harken, name)) == graph(getattr(socketserver, name))
    assert [base.__name__ for base in getattr(harken, name).__bases__] == [
        base.__name__ for base in getattr(socketserver, name).__bases__
    ]


@pytest.mark.parametrize("name", THEIRS)
def test_the_constructor_takes_stdlibs_arguments(name):
    """Positional ones in the same order with the same defaults; settings come as keywords after them."""
    theirs = inspect.signature(getattr(socketserver, name)).parameters.values()
    ours = list(inspect.signature(getattr(harken, name)).parameters.values())
    assert [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in ours if p.kind is not p.VAR_KEYWORD]


@pytest.mark.parametrize("name", THEIRS)
def test_every_public_method_and_attribute_is_there(name):
    """Hooks and attributes, with the parameters that stdlib's have."""
    theirs, ours = getattr(socketserver, name), getattr(harken, name)
    for member in (member for member in dir(theirs) if not member.startswith("_")):
        assert hasattr(ours, member), member
        if inspect.isfunction(getattr(theirs, member)):
            expected = list(inspect.signature(getattr(theirs, member)).parameters)
            assert list(inspect.signature(getattr(ours, member)).parameters) == expected, member


@pytest.mark.parametrize("name", THEIRS)
def test_defaults_of_attributes_are_stdlibs(name):
    """What programs read from the class is what stdlib says."""
    theirs, ours = getattr(socketserver, name), getattr(harken, name)
    for member in (member for member in dir(theirs) if not member.startswith("_")):
        if not callable(getattr(theirs, member)):
            assert getattr(ours, member) == getattr(theirs, member), member


@pytest.mark.parametrize("name", COMBINED)
def test_each_named_server_is_its_mixin_before_its_server(name):
    """The mix-in wins, and the engine is its."""
    cls = getattr(harken, name)
    mixin, server = cls.__bases__
    prefix = mixin.__name__.removesuffix("MixIn")
    assert name == prefix + server.__name__
    assert (
        cls.engine
        == {"Threading": "thread", "Forking": "fork", "Pool": "pool", "Green": "green", "Async": "asyncio"}[prefix]
    )


@pytest.mark.parametrize("name", ALWAYS)
def test_the_forking_unix_servers_are_there_on_every_python(name):
    """Python 3.11's stdlib has forgotten them."""
    assert name in harken.__all__
    assert getattr(harken, name).address_family == socket.AF_UNIX


def test_the_module_holds_nothing_else():
    """No eighth noun: only these classes."""
    own = {
        name for name, value in vars(servers).items() if inspect.isclass(value) and value.__module__ == servers.__name__
    }
    assert own == set(COMBINED)


@pytest.mark.parametrize("name", COMBINED)
def test_each_is_made_and_closed(name, tmp_path):
    """Bound to a free address of its family; nothing_leaks watches."""
    cls = getattr(harken, name)
    address = str(tmp_path / "s") if cls.address_family == socket.AF_UNIX else ("127.0.0.1", 0)
    with cls(address, harken.BaseRequestHandler) as server:
        assert server.socket.type == cls.socket_type
        assert server.fileno() == server.socket.fileno()
    assert server.socket.fileno() == -1
