"""Sockets that another process has bound: whether an address means them, and what it says beyond the socket."""

import contextlib
import os
import socket
import stat
from types import SimpleNamespace

import pytest

from harken import transports
from harken.errors import ConfigError
from harken.listener import BindError, Listener
from harken.transports import BindOptions, is_bound_to, listen, take_over


@contextlib.contextmanager
def opened(url):
    """A socket that was bound by an address, with its port."""
    (listener,) = listen(url)
    with listener:
        name = listener.getsockname()
        yield listener, name[1] if isinstance(name, tuple) else 0


@pytest.mark.parametrize(
    "bound, address, same",
    [
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:{port}", True),
        ("tcp://127.0.0.1:0", "tcp://localhost:{port}", True),
        ("tcp://127.0.0.1:0", "tcp://localhost:0{port}/", True),
        ("tcp://127.0.0.1:0", "tls://127.0.0.1:{port}", True),
        ("tcp://127.0.0.1:0", "udp://127.0.0.1:{port}", False),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.2:{port}", False),
        ("tcp://127.0.0.1:0", "tcp://:{port}", False),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", False),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:1", False),
        ("tcp://127.0.0.1:0", "unix:/tmp/sock", False),
        ("udp://127.0.0.1:0", "udp://localhost:{port}", True),
        ("tcp://:0", "tcp://:{port}", True),
        ("tcp://:0", "tcp://0.0.0.0:{port}", False),
        ("tcp://:0", "tcp://[::]:{port}", False),
        ("tcp://[::]:0", "tcp://[::]:{port}", True),
        ("tcp://[::]:0", "tcp://:{port}", False),
        ("unix:{folder}/sock", "unix://{folder}/sock?mode=660", True),
        ("unix:{folder}/sock", "unix:{folder}/./sock", True),
        ("unix:{folder}/sock", "unix:sock", True),
        ("unix:{folder}/sock", "unix:{folder}/other", False),
        ("unix:{folder}/sock", "unixgram:{folder}/sock", False),
        ("unix:{folder}/sock", "unix:@{folder}/sock", False),
        ("unix:@harken-{folder}", "unix:@harken-{folder}", True),
        ("unix:@harken-{folder}", "unix:@harken", False),
        ("unix:@harken-{folder}", "unix:harken-{folder}", False),
        ("tcp://127.0.0.1:0", "fd://7", False),
    ],
)
def test_whether_an_address_means_a_socket(bound, address, same, tmp_path, monkeypatch):
    """Spelling does not count; family, type, host and port, or the path, do."""
    monkeypatch.chdir(tmp_path)
    with opened(bound.format(folder=tmp_path)) as (listener, port):
        assert is_bound_to(address.format(folder=tmp_path, port=port), listener.fileno()) is same
        assert listener.getsockname()  # it is still open


def test_an_address_that_is_wrong_means_no_socket():
    """It is told, as by whoever would listen there."""
    with opened("tcp://127.0.0.1:0") as (listener, _), pytest.raises(ConfigError, match="no port"):
        is_bound_to("tcp://127.0.0.1:http", listener.fileno())


def handed_on(listener):
    """As the next process has it: a socket alone."""
    return Listener.adopt(os.dup(listener.fileno()))


def test_what_an_address_says_is_noted():
    """Under TLS all would go in plain text."""
    with opened("tcp://127.0.0.1:0") as (listener, port), handed_on(listener) as taken:
        take_over(f"tls://127.0.0.1:{port}", taken)
        assert taken.tls is True
        assert taken.url == f"tls://127.0.0.1:{port}"
    with opened("tls://127.0.0.1:0") as (listener, port), handed_on(listener) as taken:
        take_over(f"tcp://127.0.0.1:{port}", taken)
        assert taken.tls is None
        assert taken.url == f"tcp://127.0.0.1:{port}"


def test_options_that_can_change_on_an_open_socket_do():
    """As on sockets that a service manager has bound."""
    with opened("tcp://127.0.0.1:0") as (listener, port), handed_on(listener) as taken:
        take_over(f"tcp://127.0.0.1:{port}", taken, BindOptions(keepalive=True, reuse_port=True))
        assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert not taken.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


@pytest.mark.parametrize("changed, mode", [(True, 0o660), (False, 0o600)])
def test_a_file_gets_other_rights_when_its_address_says_so(tmp_path, changed, mode):
    """And keeps what it has when the address is what it was."""
    path = tmp_path / "sock"
    with opened(f"unix:{path}") as (listener, _), handed_on(listener) as taken:
        take_over(f"unix:{path}?mode=660", taken, changed=changed)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_that_somebody_else_has_put_there_is_left_alone(tmp_path):
    """Its rights are none of our business; a path where nothing is cannot be reached, which is told later."""
    path = tmp_path / "sock"
    with opened(f"unix:{path}") as (listener, _), handed_on(listener) as taken:
        path.unlink()
        take_over(f"unix:{path}?mode=660", taken, changed=True)
        path.write_text("theirs")
        before = path.stat().st_mode
        with pytest.raises(BindError, match="was replaced"):
            take_over(f"unix:{path}?mode=666", taken, changed=True)
        assert path.stat().st_mode == before


def test_a_scheme_of_another_package_need_not_know_of_it(monkeypatch):
    """What it says of a socket beyond that is then lost, and two spellings are two addresses."""
    plain = SimpleNamespace(parse=lambda url: url)
    monkeypatch.setattr(transports, "for_url", lambda url: plain)
    with opened_plain() as listener, handed_on(listener) as taken:
        assert not is_bound_to("plain:1", listener.fileno())
        take_over("plain:1", taken)
        assert taken.url.startswith("tcp://127.0.0.1:")


@contextlib.contextmanager
def opened_plain():
    """A socket that no transport has bound."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener
