"""Handler classes that cannot serve are refused at the start."""

import functools
import socketserver

import pytest

import harken
from harken.errors import ConfigError
from harken.explain import describe
from harken.process.fitness import faults, fit_handler
from harken.process.start import start


def plain(**hooks):
    """Return a handler class with these hooks."""
    return type("Wrong", (harken.BaseRequestHandler,), {"handle": lambda self: None, **hooks})


def generator(self):
    yield


async def generates(self):
    yield


async def coroutine(self):
    pass


WRONG = [
    (plain(handle=generator), r"Wrong\.handle has a yield in it"),
    (plain(handle=lambda self, data: None), r"Wrong\.handle\(self, data\) cannot be called as self\.handle\(\)"),
    (plain(handle=lambda: None), r"Wrong\.handle\(\) cannot be called as self\.handle\(\)"),
    (plain(on_timeout=lambda self: None), r"Wrong\.on_timeout\(self\) cannot be called as self\.on_timeout\(which\)"),
    (plain(on_drain=lambda self, why: None), r"Wrong\.on_drain\(self, why\) cannot be called as self\.on_drain\(\)"),
    (plain(setup=coroutine), r"Wrong\.setup is async, and nobody awaits it"),
    (plain(on_drain=coroutine), r"Wrong\.on_drain is async, and nobody awaits it"),
    (type("Wrong", (harken.AsyncRequestHandler,), {"handle": generates}), r"Wrong\.handle has a yield in it"),
    (type("Wrong", (socketserver.StreamRequestHandler,), {"handle": generator}), r"Wrong\.handle has a yield in it"),
]


@pytest.mark.parametrize("handler, said", WRONG)
def test_hooks_that_do_nothing_or_cannot_be_called_are_refused(handler, said):
    """In one line, wherever production defaults hold; a client would only see its connection end."""
    with pytest.raises(ConfigError, match=said):
        fit_handler(handler)
    with pytest.raises(ConfigError, match=said):
        harken.serve(handler, "tcp://127.0.0.1:0")
    with pytest.raises(ConfigError, match=said):
        start(handler, "tcp://127.0.0.1:0").send(None)


@pytest.mark.parametrize("handler, said", WRONG)
def test_explain_warns_of_them(handler, said):
    """By the same words."""
    with pytest.raises(ConfigError, match=said):
        raise ConfigError(" ".join(advice.text for advice in describe(harken.TCPServer, handler).warnings))


def give(function):
    """Decorate a hook, which gets an argument by that."""

    @functools.wraps(function)
    def called(self):
        return function(self, 1)

    return called


class Decorated(harken.BaseRequestHandler):
    """A decorator gives an argument."""

    @give
    def handle(self, data):
        pass


class Unusual(harken.BaseRequestHandler):
    """Calls its hooks itself."""

    def __init__(self, request, client_address, server):
        list(self.handle(request))

    def handle(self, request):
        yield request


class Generous(harken.AsyncRequestHandler):
    """Hooks with more than they need, async and plain."""

    def setup(self, *more):
        pass

    async def handle(self, data=b""):
        pass

    async def on_timeout(self, which):
        pass

    async def on_drain(self, **words):
        pass


@pytest.mark.parametrize("handler", [Decorated, Unusual, Generous])
def test_hooks_that_work_are_let_be(handler):
    """A decorator, a constructor of one's own, defaults."""
    assert list(faults(handler)) == []
    fit_handler(handler)


@pytest.mark.parametrize("base", [harken.AsyncStreamRequestHandler, socketserver.StreamRequestHandler])
def test_a_handler_without_handle_is_refused_whatever_its_base(base):
    """The base's own does nothing."""
    with pytest.raises(ConfigError, match=r"Forgot does not override handle\(\)"):
        fit_handler(type("Forgot", (base,), {}))
