"""Sockets passed by another process, as systemd does it."""

import contextlib
import os
import socket

import pytest

from harken.errors import ConfigError
from harken.listener import Listener
from harken.transports import BindOptions, inherited, listen

# Gives the passed descriptors their numbers and itself the right LISTEN_PID, then becomes the program: as systemd does.
WRAPPER = """
import os, sys
given = [int(fd) for fd in os.environ.pop("GIVEN").split(",") if fd]
high = [os.dup2(fd, 50 + place) for place, fd in enumerate(given)]
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place)
    os.close(fd)
os.environ["LISTEN_FDS"] = str(len(given))
os.environ["LISTEN_PID"] = os.environ.pop("PRETEND", None) or str(os.getpid())
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""

SHOW = """
import os, sys
from harken.errors import ConfigError
from harken.transports import listen
try:
    for url in sys.argv[1:]:
        for door in listen(url):
            print(door.url, door.fileno(), door.get_inheritable())
            keep = globals().setdefault("keep", []); keep.append(door)
    print(sorted(name for name in os.environ if name.startswith("LISTEN_")))
except ConfigError as error:
    print("ConfigError:", error)
"""


@pytest.fixture
def doors(tmp_path):
    """What a .socket unit would open: TCP, Unix and UDP."""
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(tmp_path / "door"))
        unix.listen()
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        yield [tcp, unix, udp]


@pytest.fixture
def activated(run_program):
    """Run a program with sockets passed to it; return the lines that it printed."""

    def run(sockets, *urls, names=None, pretend="", script=SHOW):
        fds = [each.fileno() for each in sockets]
        env = {"GIVEN": ",".join(map(str, fds)), "PRETEND": pretend}
        if names is not None:
            env["LISTEN_FDNAMES"] = names
        process = run_program("-c", WRAPPER, script, *urls, env=env, pass_fds=fds)
        out, err = process.communicate(timeout=30)
        assert err == ""
        return out.splitlines()

    return run


def addresses(doors):
    tcp, unix, udp = (each.getsockname() for each in doors)
    return f"tcp://127.0.0.1:{tcp[1]}", f"unix:{unix}", f"udp://127.0.0.1:{udp[1]}"


def test_systemd_takes_all_that_was_passed(doors, activated):
    """Every kind, close-on-exec, and the variables are gone."""
    tcp, unix, udp = addresses(doors)
    assert activated(doors, "systemd:") == [f"{tcp} 3 False", f"{unix} 4 False", f"{udp} 5 False", "[]"]


def test_by_name_and_by_number(doors, activated):
    """Two addresses share what was passed, although the variables are read once; a name may stand for several."""
    tcp, unix, udp = addresses(doors)
    said = activated(doors, "fd://admin", "fd://4", "fd://web", names="web:admin:web")
    assert said == [f"{unix} 4 False", *said[1:2], f"{tcp} 3 False", f"{udp} 5 False", "[]"]
    assert said[1].startswith(f"{unix} ")
    assert not said[1].startswith(f"{unix} 4 ")  # a second listener for the same socket has a descriptor of its own


def test_a_number_that_no_descriptor_has(doors, activated):
    """However large: it is told as a descriptor, and not as a name."""
    for number in ("99", "9999999999"):
        (said,) = activated(doors, f"fd://{number}")
        assert said == f"ConfigError: fd {number} is not open; was it passed to this process?"
    for number in ("99999999999", "9" * 5000):
        (said,) = activated(doors, f"fd://{number}")
        assert said == f"ConfigError: 'fd://{number}': no descriptor has a number as large as that"


def test_passed_to_another_process(doors, activated):
    """LISTEN_PID must be one's own; the error says whose it is."""
    for url in ("systemd:", "fd://web", "fd://3"):
        (said,) = activated(doors, url, names="web:b:c", pretend="1")
        assert said.startswith("ConfigError: the passed sockets are for pid 1 (LISTEN_PID), and this is pid ")


def test_a_name_that_was_not_passed(doors, activated):
    """The nearest is suggested."""
    (said,) = activated(doors, "fd://wbe", names="web:admin:x")
    assert said == "ConfigError: 'fd://wbe': no passed socket is called 'wbe'; did you mean 'web'?"
    (said,) = activated(doors, "fd://nothing", names="web:admin:x")
    assert said.endswith("known are 'admin', 'web', 'x'")


def test_names_that_do_not_fit(doors, activated):
    """A manager that miscounts is told."""
    (said,) = activated(doors, "systemd:", names="web")
    assert said == "ConfigError: LISTEN_FDNAMES has 1 names for 3 descriptors"


def test_unnamed_descriptors_are_called_unknown(doors, activated):
    """As sd_listen_fds_with_names(3) has it."""
    tcp, *_ = addresses(doors)
    assert activated(doors[:1], "fd://unknown") == [f"{tcp} 3 False", "[]"]


def test_what_was_passed_must_be_a_door(activated):
    """A descriptor that is no listener is named; those before it are closed again."""
    with socket.create_server(("127.0.0.1", 0)) as door, socket.socket() as plain:
        (said,) = activated([door, plain], "systemd:")
    assert said == "ConfigError: fd 4 is a socket that does not listen; call listen() before passing it"


CLOSED = """
from harken.errors import ConfigError
from harken.transports import listen
(door,) = listen("systemd:")
door.close()
other = open("/dev/null")
assert other.fileno() == 3
try:
    listen("fd://3")
except ConfigError as error:
    print(error)
"""


def test_a_number_used_anew_is_not_taken_for_what_was_passed(doors, activated):
    """After the listener is closed its number may be any file's."""
    (said,) = activated(doors[:1], script=CLOSED)
    assert said == "fd 3 was passed to this process and closed since; it cannot be opened again"


def test_nothing_was_passed(monkeypatch):
    """Started by hand, a program says how it wants to be started."""
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    for url in ("systemd:", "fd://web"):
        with pytest.raises(ConfigError, match=r"no socket was passed to this process.*\.socket unit"):
            listen(url)


def test_a_count_that_is_no_number(monkeypatch):
    """Malformed variables are shown."""
    monkeypatch.setenv("LISTEN_FDS", "many")
    with pytest.raises(ConfigError, match="LISTEN_FDS is 'many'"):
        inherited.passed()


def test_a_count_that_no_process_has(monkeypatch):
    """It is refused, and not counted up to."""
    for number in ("9999999999", "9" * 5000):
        monkeypatch.setenv("LISTEN_FDS", number)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        with pytest.raises(ConfigError, match=f"LISTEN_FDS is {number}, more descriptors than a process may have"):
            inherited.passed()


def test_a_socket_of_a_kind_that_is_not_served():
    """Sequenced packets (``ListenSequentialPacket=``) are neither a stream nor datagrams, and nobody would answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind("")
        door.listen()
        with pytest.raises(ConfigError, match=f"fd {door.fileno()} is a SOCK_SEQPACKET socket; pass a stream"):
            listen(f"fd://{door.fileno()}")


def test_a_datagram_socket_without_a_path():
    """Nobody could send to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plain:
        with pytest.raises(ConfigError, match=f"fd {plain.fileno()} is a socket that has no address; call bind"):
            listen(f"fd://{plain.fileno()}")


def test_a_descriptor_by_number_needs_no_protocol():
    """Whoever started the program may pass sockets by number alone; options that still can be set are."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        fd = os.dup(door.fileno())
        (listener,) = listen(f"fd://{fd}", BindOptions(keepalive=True, reuse_port=True))
        with listener:
            assert isinstance(listener, Listener)
            assert listener.fileno() == fd
            assert listener.url == f"tcp://127.0.0.1:{door.getsockname()[1]}"
            assert listener.owned_path is None
            assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


def test_a_descriptor_named_twice_has_two_listeners():
    """Each closes its own descriptor; the socket is open until the last has."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = door.getsockname()
        fd = os.dup(door.fileno())
    (first,) = listen(f"fd://{fd}")
    (second,) = listen(f"fd://{fd}")
    with second:
        assert second.fileno() != first.fileno()
        first.close()
        socket.create_connection(address, timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


@pytest.mark.parametrize("url", ["fd://", "fd:3", "fd://a/b", "fd://3?x=1", "systemd:web", "systemd://web"])
def test_malformed_addresses(url):
    """One line names the address and the remedy."""
    with pytest.raises(ConfigError, match="write '?fd://"):
        listen(url)


def test_the_wrapper_is_what_systemd_does(doors, activated):
    """The program is the process that LISTEN_PID names, with the descriptors from 3 on."""
    script = "import os; print(os.environ['LISTEN_PID'] == str(os.getpid()), os.readlink('/proc/self/fd/3')[:6])"
    assert activated(doors, script=script) == ["True socket"]
