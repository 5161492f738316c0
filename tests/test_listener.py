"""The open door: adopting, sharing, and the Unix path that goes with it."""

import errno
import os
import pickle
import socket
import subprocess
import sys

import pytest

from harken.errors import ConfigError
from harken.listener import AddressInUse, Listener, note_inode, unlink_if_own
from harken.transports import listen


@pytest.fixture
def listener():
    """A listener on a free loopback port."""
    with Listener(socket.AF_INET, socket.SOCK_STREAM) as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        yield door


def test_accept_on_an_empty_queue_does_not_wait(listener):
    """The descriptor is non-blocking while the Python timeout stays None."""
    assert listener.gettimeout() is None
    assert not os.get_blocking(listener.fileno())
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_what_it_accepts_is_blocking(listener):
    """Handlers get plain blocking sockets."""
    with socket.create_connection(listener.getsockname(), timeout=5):
        taken, _ = listener.accept()
        with taken:
            assert taken.gettimeout() is None
            assert os.get_blocking(taken.fileno())


def test_a_datagram_socket_stays_blocking():
    """Handlers answer on it, and their sendto must wait for a slow reader."""
    with Listener(socket.AF_INET, socket.SOCK_DGRAM) as door:
        assert os.get_blocking(door.fileno())


def test_the_default_timeout_of_the_program_does_not_matter():
    """socket.setdefaulttimeout() is for the program's own sockets."""
    socket.setdefaulttimeout(7)
    try:
        with Listener(socket.AF_INET, socket.SOCK_STREAM) as door:
            assert door.gettimeout() is None
    finally:
        socket.setdefaulttimeout(None)


def test_it_has_no_dict_and_says_what_it_is(listener):
    """Slots only; the repr names the address."""
    assert not hasattr(listener, "__dict__")
    listener.url = "tcp://127.0.0.1:1"
    assert "tcp://127.0.0.1:1" in repr(listener)


def test_it_is_inherited_only_when_shared(listener):
    """A program started by this one has the descriptor only after share()."""
    probe = f"import os; os.fstat({listener.fileno()})"

    def has_it():
        command = [sys.executable, "-c", probe]
        done = subprocess.run(command, close_fds=False, stderr=subprocess.DEVNULL, timeout=30, check=False)
        return done.returncode == 0

    assert not has_it()
    assert listener.share() == listener.fileno()
    assert has_it()


def test_adopt_takes_a_listening_descriptor_over(listener):
    """Family, type and address are found out, and the descriptor is close-on-exec again."""
    fd = os.dup(listener.fileno())
    os.set_inheritable(fd, True)
    with Listener.adopt(fd) as adopted:
        assert (adopted.family, adopted.type) == (socket.AF_INET, socket.SOCK_STREAM)
        assert adopted.getsockname() == listener.getsockname()
        assert not adopted.get_inheritable()
        assert not os.get_blocking(fd)


def test_adopt_takes_a_datagram_socket():
    """A datagram socket need not listen."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.bind(("127.0.0.1", 0))
        with Listener.adopt(os.dup(plain.fileno())) as adopted:
            assert adopted.type == socket.SOCK_DGRAM


def test_adopt_refuses_what_is_no_door(tmp_path):
    """A file, a socket that does not listen, and a closed descriptor are refused and left as they were."""
    with open(tmp_path / "file", "w") as file, pytest.raises(ConfigError, match="is not a socket"):
        Listener.adopt(file.fileno())
    with socket.socket() as plain:
        with pytest.raises(ConfigError, match="does not listen"):
            Listener.adopt(plain.fileno())
        assert plain.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
        closed = os.dup(plain.fileno())
    os.close(closed)
    with pytest.raises(ConfigError, match=f"fd {closed} is not open"):
        Listener.adopt(closed)


@pytest.fixture
def owner(tmp_path):
    """A listener that answers for its path."""
    path = str(tmp_path / "door")
    with Listener(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(path)
        door.own(path)
        yield door


def test_close_removes_its_own_path(owner):
    """The Unix path goes with the socket; closing twice is harmless."""
    path = owner.owned_path
    owner.close()
    owner.close()
    assert not os.path.lexists(path)


def test_close_leaves_a_path_that_somebody_replaced(owner):
    """Another server that has put its socket there keeps it."""
    path = owner.owned_path
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        owner.close()
        assert os.path.lexists(path)


def test_close_in_a_child_leaves_the_path(owner):
    """Only the process that bound it removes it."""
    pid = os.fork()
    if pid == 0:
        owner.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.path.lexists(owner.owned_path)


def test_who_gives_the_descriptor_away_leaves_the_path(owner):
    """After detach() or disown() the successor answers for the path."""
    path = owner.owned_path
    os.close(owner.detach())
    owner.close()
    assert os.path.lexists(path)


def test_unlink_if_own_looks_at_the_inode(tmp_path):
    """A file that is not that inode, or is no socket, is left."""
    path = str(tmp_path / "door")
    with socket.socket(socket.AF_UNIX) as first:
        first.bind(path)
        inode = note_inode(path)
        assert not unlink_if_own(path, None)
        os.rename(path, path + ".old")
        (tmp_path / "door").write_text("mine")
        assert note_inode(path) is None
        assert not unlink_if_own(path, inode)
        assert unlink_if_own(path + ".old", inode)
    assert os.listdir(tmp_path) == ["door"]
    assert note_inode("\0abstract") is None


def test_bind_errors_are_both_kinds():
    """Older code catches OSError and reads errno; new code catches ConfigError; both survive pickling."""
    error = AddressInUse("tcp://:1 is in use", errno.EADDRINUSE)
    assert isinstance(error, OSError)
    assert isinstance(error, ConfigError)
    assert (str(error), error.errno) == ("tcp://:1 is in use", errno.EADDRINUSE)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.errno) == (AddressInUse, str(error), error.errno)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_socket_that_was_never_bound_is_refused(family):
    """Datagrams need no listen(), and nobody could send to it."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock, pytest.raises(ConfigError, match="has no port; call bind"):
        Listener.adopt(sock.fileno())


def test_a_relative_path_is_removed_wherever_the_process_has_gone(tmp_path, monkeypatch):
    """`chdir` comes after the sockets are bound."""
    monkeypatch.chdir(tmp_path)
    (listener,) = listen("unix:sock")
    monkeypatch.chdir("/")
    listener.close()
    assert not (tmp_path / "sock").exists()
