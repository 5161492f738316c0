"""Certificates made on the spot, servers that speak TLS by them, and clients that trust them."""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme

import harken
from harken import _hub, events
from harken._hub import fallback

from .tls_kit import LOCAL, Closed, Echo, Wire, plain


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Files: ``ca``, ``cert`` with its key for localhost, ``client`` for a client, ``other`` for other.example."""
    folder: Path = tmp_path_factory.mktemp("pki")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    made = {"ca": folder / "ca.pem", "authority": ca}
    names = {"cert": "localhost", "client": "ann@example.org", "other": "other.example", "wild": "*.wild.example"}
    for name, identity in names.items():
        issued = ca.issue_cert(identity)
        issued.private_key_and_cert_chain_pem.write_to_path(folder / f"{name}.pem")
        made[name] = folder / f"{name}.pem"
    issued = ca.issue_cert("localhost")
    issued.private_key_pem.write_to_path(folder / "split.key")
    issued.cert_chain_pems[0].write_to_path(folder / "split.pem")
    made |= {"split_cert": folder / "split.pem", "split_key": folder / "split.key"}
    return SimpleNamespace(**made)


@pytest.fixture
def closed():
    """The connections that were closed during the test."""
    seen = Closed()
    unsubscribe = events.subscribe(seen.note, "closed")
    yield seen
    unsubscribe()


@pytest.fixture
def use_fallback(monkeypatch):
    """Return a function after which green servers run on the hub in Python."""

    def use():
        from harken.engines.green import Engine

        for name in ("Hub", "Lane", "Connection", "current"):
            monkeypatch.setattr(_hub, name, getattr(fallback, name))
        monkeypatch.setattr(Engine, "connection", fallback.Connection)

    return use


@pytest.fixture
def use_asking():
    """Return a function after which compiled green servers call OpenSSL by the ssl module, as where it is built in."""
    reach = getattr(_hub.kinds().get("compiled"), "reach_openssl", bool)
    yield lambda: reach(False)
    reach(True)


@pytest.fixture
def serving(pki, use_fallback, use_asking):
    """Return a function that serves a handler over TLS in the background."""

    @contextlib.contextmanager
    def serve(engine="thread", handler=Echo, *, tls=None, kind=harken.TCPServer, address=LOCAL, **settings):
        if engine == "green-fallback":
            use_fallback()
        if engine == "green-asking":
            use_asking()
        tls = harken.TLS(pki.cert) if tls is None else tls
        with harken.background(kind(address, handler, engine=engine.partition("-")[0], tls=tls, **settings)) as server:
            yield server

    return serve


@pytest.fixture
def trusting(pki):
    """Return a function that makes a context for clients."""

    def make(cert=None):
        context = ssl.create_default_context(cafile=pki.ca)
        if cert is not None:
            context.load_cert_chain(cert)
        return context

    return make


@pytest.fixture
def dial(trusting):
    """Return a function that gives a client under TLS."""

    @contextlib.contextmanager
    def connect(server, name="localhost", *, cert=None, context=None):
        context = context or trusting(cert)
        with plain(server) as wire, context.wrap_socket(wire, server_hostname=name) as client:
            yield client
            with contextlib.suppress(OSError):
                socket.socket.shutdown(client, socket.SHUT_RDWR)

    return connect


@pytest.fixture
def dial_wire(trusting):
    """Return a function that gives a client that can end its side and read on."""

    @contextlib.contextmanager
    def connect(server, context=None):
        with plain(server) as sock:
            yield Wire(sock, context or trusting())

    return connect
