"""Unix addresses: who may connect, and whose path it is."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import threading

import pytest

from harken.errors import ConfigError
from harken.listener import AddressInUse, BindError, Listener
from harken.transports import BindOptions, _takeover, listen, unix


@pytest.fixture
def path(tmp_path):
    """A path in a folder of the test's own, which must hold nothing but that path in the end."""
    yield str(tmp_path / "door")
    assert set(os.listdir(tmp_path)) <= {"door"}


@pytest.fixture
def opened():
    """Open addresses that are closed with the test."""
    listeners = []

    def start(url):
        listeners.extend(listen(url, BindOptions(backlog=8, reuse_port=True)))
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.close()


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def leave_dead(path, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_UNIX, kind) as dead:
        dead.bind(path)


@pytest.fixture
def umask():
    """Set the umask for a test."""
    before = os.umask(0)
    yield os.umask
    os.umask(before)


def test_a_stream_and_its_peer(opened, path):
    """The url names the path; the peer is the process that connected, as the kernel vouches."""
    listener = opened(f"unix:{path}")
    assert listener.url == f"unix:{path}"
    assert listener.getsockname() == path
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        connection, address = listener.accept()
        with connection:
            peer = unix.describe(connection, address)
    assert peer.credentials == (os.getpid(), os.getuid(), os.getgid())
    assert str(peer) == f"unix pid {os.getpid()} uid {os.getuid()}"


def test_datagrams_and_their_sender(opened, path, tmp_path):
    """A sender that has a path is known by it; its process is not known."""
    listener = opened(f"unixgram:{path}")
    assert (listener.url, listener.type) == (f"unixgram:{path}", socket.SOCK_DGRAM)
    sender = str(tmp_path / "sender")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.bind(sender)
        client.sendto(b"ping", path)
        data, address = listener.recvfrom(100)
    os.unlink(sender)
    peer = unix.describe(listener, address)
    assert (data, peer.address, peer.credentials) == (b"ping", sender, None)


@pytest.mark.parametrize("scheme", ["unix", "unixgram"])
def test_abstract_names(opened, scheme, tmp_path):
    """They leave no file; a second server is refused."""
    name = f"@harken-{os.getpid()}-{scheme}"
    listener = opened(f"{scheme}:{name}")
    assert listener.url == f"{scheme}:{name}"
    assert listener.getsockname() == b"\0" + name[1:].encode()
    with pytest.raises(AddressInUse, match=name):
        opened(f"{scheme}:{name}")
    assert unix.describe(listener, b"\0client").address == "@client"


@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
@pytest.mark.parametrize("query, mode", [("", 0o600), ("?mode=660", 0o660), ("?mode=0666", 0o666), ("?mode=0", 0)])
def test_the_mode_is_as_asked_whatever_the_umask(opened, path, umask, mask, query, mode):
    """0600 unless the address says otherwise."""
    umask(mask)
    opened(f"unix:{path}{query}")
    assert mode_of(path) == mode


def test_there_is_no_moment_in_which_it_is_more_open(opened, path, umask, monkeypatch):
    """The file is born closed to others; the umask is not touched."""
    umask(0)
    born = []
    plain = Listener.bind

    def bind(listener, address):
        plain(listener, address)
        born.append(mode_of(address))

    monkeypatch.setattr(Listener, "bind", bind)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to the whole process"))
    opened(f"unix:{path}?mode=666")
    assert (born, mode_of(path)) == ([0o600], 0o666)


def test_user_and_group_by_number(opened, path):
    """One's own need no privilege."""
    opened(f"unix:{path}?user={os.getuid()}&group={os.getgid()}&mode=640")
    found = os.stat(path)
    assert (found.st_uid, found.st_gid, mode_of(path)) == (os.getuid(), os.getgid(), 0o640)


def test_user_and_group_by_name(path):
    """Names are looked up when the address is read."""
    place = unix.parse(f"unix:{path}?user=root&group=root")
    assert (place.user, place.group) == (0, 0)


def test_without_proc_what_is_right_already_is_left(opened, path, umask, monkeypatch):
    """In a chroot, say: the file is made for its owner alone; what else is asked for is refused with the remedy."""

    def nothing_there(*_):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    umask(0o022)
    monkeypatch.setattr(os, "chmod", nothing_there)
    monkeypatch.setattr(os, "chown", nothing_there)
    listener = opened(f"unix:{path}")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.close()
    for asked in ("mode=660", f"user={os.getuid()}"):
        with pytest.raises(BindError, match=r"/proc, which is missing; mount it, or take mode=600"):
            opened(f"unix:{path}?{asked}")
        assert not os.path.exists(path)


def test_a_user_that_one_may_not_give_to(opened, path, monkeypatch):
    """The error says why, and no file is left."""

    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    with pytest.raises(BindError, match="only root may give a socket"):
        opened(f"unix:{path}?user=1")
    assert not os.path.lexists(path)


@pytest.mark.parametrize("scheme", ["unix", "unixgram"])
@pytest.mark.parametrize("left", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_dead_path_is_taken_over(opened, path, scheme, left):
    """Whatever kind of server left it."""
    leave_dead(path, left)
    listener = opened(f"{scheme}:{path}")
    assert listener.getsockname() == path
    assert mode_of(path) == 0o600
    listener.close()
    assert not os.path.lexists(path)


@pytest.mark.parametrize("second", ["unix", "unixgram"])
@pytest.mark.parametrize("first", ["unix", "unixgram"])
def test_a_live_path_is_refused(opened, path, first, second):
    """The error names the path, and the process where the kernel tells; the first server is undisturbed."""
    listener = opened(f"{first}:{path}")
    with pytest.raises(AddressInUse) as caught:
        opened(f"{second}:{path}")
    by = "served by this process" if first == "unix" else "in use by a live server"
    assert str(caught.value) == f"{path!r} is already {by}; stop it, or take another path"
    assert caught.value.errno == errno.EADDRINUSE
    assert _takeover.look(path).state == "live"
    listener.close()


def test_a_live_path_names_the_other_process(opened, path, run_program):
    """The kernel tells who listens."""
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(1, flush=True)"
    )
    process = run_program("-c", f"{script}; sys.stdin.read()", path, stdin=-1)
    assert process.stdout.readline() == "1\n"
    with pytest.raises(AddressInUse, match=rf"served by pid {process.pid} \("):
        opened(f"unix:{path}")
    process.kill()
    process.wait(timeout=10)
    assert opened(f"unix:{path}").getsockname() == path


def test_a_server_with_a_full_queue_is_alive(opened, path):
    """The probe neither waits for room nor takes it for dead."""
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(path)
        busy.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(path)
        with pytest.raises(AddressInUse, match="in use by a live server"):
            opened(f"unix:{path}")
    os.unlink(path)


@pytest.mark.parametrize("relative", [False, True])
def test_a_server_that_does_not_listen_yet_is_alive(opened, path, monkeypatch, relative):
    """Between bind and listen connections are refused, but the kernel lists the socket."""
    monkeypatch.chdir(os.path.dirname(path))
    shown = "door" if relative else path
    with socket.socket(socket.AF_UNIX) as starting:
        starting.bind(shown)
        with pytest.raises(AddressInUse):
            opened(f"unix:{shown}")
        unix.claim(shown)
        starting.listen()
        assert _takeover.look(shown).holder == "this process"


@pytest.mark.parametrize("make", [os.mkdir, lambda path: open(path, "w").close(), lambda path: os.symlink("/x", path)])
def test_what_is_no_socket_is_left(opened, path, make):
    """A file, a folder or a link may be somebody's work."""
    make(path)
    with pytest.raises(AddressInUse, match="exists and is not a socket"):
        opened(f"unix:{path}")
    unix.claim(path)
    assert os.path.lexists(path)


def test_close_leaves_a_path_that_somebody_replaced(opened, path):
    """Only one's own inode is unlinked, and the successor goes on."""
    first = opened(f"unix:{path}")
    os.unlink(path)
    second = opened(f"unix:{path}")
    first.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    second.close()
    assert not os.path.lexists(path)


@pytest.mark.parametrize("round_", range(5))
def test_of_starters_that_race_one_wins(path, round_):
    """A dead path is taken over once; the winner can be reached and the others are told."""
    leave_dead(path)
    barrier = threading.Barrier(6)
    won, refused, other = [], [], []

    def start():
        barrier.wait(10)
        try:
            won.extend(listen(f"unix:{path}"))
        except AddressInUse as error:
            refused.append(error)
        except Exception as error:
            other.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(won), len(refused), other) == (1, 5, [])
    with won[0] as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        drain = [listener.accept()[0] for _ in range(len(refused) + 1)]  # their probes, and the client
        for connection in drain:
            connection.close()
    assert not os.path.lexists(path)


def test_nobody_looks_while_another_takes_over(path, monkeypatch):
    """Between finding a path dead and unlinking it, no other starter may come to the same finding."""
    leave_dead(path)
    second_looked = threading.Event()
    looks = []
    plain = _takeover.look

    def look(name):
        found = plain(name)
        looks.append(found.state)
        if len(looks) == 1:
            second_looked.wait(0.3)  # it cannot, and this time is given to it in vain
        else:
            second_looked.set()
        return found

    monkeypatch.setattr(unix, "look", look)
    monkeypatch.setattr(_takeover, "look", look)
    won = []
    starter = threading.Thread(target=lambda: won.extend(listen(f"unix:{path}")))
    starter.start()
    while not looks and starter.is_alive():
        starter.join(0.001)
    unix.claim(path)
    starter.join(10)
    with won[0] as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        assert listener.getsockname() == path
    assert looks == ["dead", "live"]


RACE = """
import sys
from harken.errors import ConfigError
from harken.transports import listen
print("ready", flush=True)
sys.stdin.readline()
try:
    doors = listen("unix:" + sys.argv[1])
    print("won", flush=True)
except ConfigError:
    print("refused", flush=True)
sys.stdin.readline()
"""


def test_of_processes_that_race_one_wins(path, run_program):
    """The same between processes, which share nothing but the folder."""
    leave_dead(path)
    starters = [run_program("-c", RACE, path, stdin=-1) for _ in range(4)]
    for starter in starters:
        assert starter.stdout.readline() == "ready\n"
    for starter in starters:
        starter.stdin.write("go\n")
        starter.stdin.flush()
    said = sorted(starter.stdout.readline() for starter in starters)
    assert said == ["refused\n"] * 3 + ["won\n"]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_starter_waits_for_another_and_gives_up_in_the_end(opened, path, monkeypatch):
    """Who keeps the folder locked is named by the folder; nothing waits for ever."""
    monkeypatch.setattr(_takeover, "LOCK_SECONDS", 0.05)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(BindError, match="another process has locked the folder"):
            opened(f"unix:{path}")
        leave_dead(path)
        unix.claim(path)
        assert os.path.lexists(path)
    finally:
        os.close(folder)
    assert opened(f"unix:{path}").url == f"unix:{path}"


def test_claim_makes_way_for_a_plain_bind(path):
    """A dead path is removed, in each form that bind takes."""
    for form in (path, path.encode()):
        leave_dead(path)
        unix.claim(form)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(form)
            inode = unix.note_inode(form)
            assert unix.unlink_if_own(form, inode)
    for nothing in ("", b"", "\0abstract", ("127.0.0.1", 80), None, path):
        unix.claim(nothing)


def test_claim_leaves_a_live_server_to_bind(opened, path):
    """bind then raises what it raises in stdlib."""
    opened(f"unix:{path}")
    unix.claim(path)
    with socket.socket(socket.AF_UNIX) as server, pytest.raises(OSError) as caught:
        server.bind(path)
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize(
    "url, words",
    [
        ("unix:", "names no path"),
        ("unix:@", "names no path"),
        ("unix:/run/", "names no path"),
        ("unix:/run/%00x", "names no path"),
        ("unix://run/x", "did you mean 'unix:/run/x'?"),
        ("unix:/run/x?mod=660", "'mod' is not an option of a Unix address; did you mean 'mode'?"),
        ("unix:/run/x?zzz=1", "known are mode, user, group"),
        ("unix:/run/x?mode=", "is not an octal mode"),
        ("unix:/run/x?mode=888", "is not an octal mode"),
        ("unix:/run/x?mode=7777", "is not an octal mode"),
        ("unix:/run/x?user=no-such-user", "this machine has no user 'no-such-user'"),
        ("unix:/run/x?group=no-such-group", "this machine has no group 'no-such-group'"),
        ("unix:@name?mode=600", "an abstract address is no file"),
        ("unix:/" + "x" * 107, "the path has 108 bytes, and the kernel takes at most 107"),
    ],
)
def test_malformed_addresses(opened, url, words):
    """One line names the address and the remedy."""
    with pytest.raises(ConfigError) as caught:
        opened(url)
    assert words in str(caught.value)
    assert repr(url) in str(caught.value)


def test_three_slashes_and_escapes(opened, tmp_path):
    """unix:///path is unix:/path, and any file name can be written."""
    listener = opened(f"unix://{tmp_path}/a%3Fb c")
    assert listener.getsockname() == f"{tmp_path}/a?b c"
    assert listener.url == f"unix:{tmp_path}/a%3Fb%20c"
    assert unix.parse(listener.url).path == listener.getsockname()
    assert unix.url(listener) == listener.url


def test_a_folder_that_is_not_there(opened, path):
    """The error says what to create."""
    with pytest.raises(BindError, match="create the folder") as caught:
        opened(f"unix:{path}/sub/x")
    assert caught.value.errno == errno.ENOENT


def test_a_folder_that_may_not_be_read_cannot_be_locked(opened, path, monkeypatch):
    """There a server starts without the lock."""
    plain = os.open

    def denied(name, flags, *rest, **more):
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
    assert opened(f"unix:{path}").url == f"unix:{path}"
