"""The small parts of processes: channels, the scoreboard, pid files, privileges, words for the service manager."""

import errno
import os
import pathlib
import pwd
import select
import signal
import socket
import threading
from types import SimpleNamespace

import pytest

import harken
from harken.errors import ConfigError
from harken.process import control, notify, privileges, recycling, service
from harken.process.alone import _Desk
from harken.process.channel import Channel, pair
from harken.process.pidfile import PidFile
from harken.process.scoreboard import MAX_ROWS, Scoreboard
from harken.process.signals import Inbox
from harken.settings import Settings

PATIENCE = 10.0


@pytest.fixture
def ends():
    """Both ends of a channel."""
    ours, theirs = pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_arrive_whole_and_in_order(ends):
    """Both ways, also many at once."""
    ours, theirs = ends
    for number in range(3):
        assert ours.send(number=number, text="ä\n")
    assert theirs.receive() == [{"number": number, "text": "ä\n"} for number in range(3)]
    theirs.send(back=True)
    select.select([ours], [], [], PATIENCE)
    assert ours.receive() == [{"back": True}]
    assert ours.receive() == []


def test_what_is_not_read_is_kept_and_sent_later(ends):
    """The supervisor's end never waits."""
    ours, theirs = ends
    text = "x" * 2_000_000
    assert ours.send(text=text)
    assert ours.unsent
    got = []

    def read():
        while not got:
            got.extend(theirs.receive())

    reader = threading.Thread(target=read)
    reader.start()
    while ours.unsent:
        select.select([], [ours], [], PATIENCE)
        assert ours.flush()
    reader.join(PATIENCE)
    assert got == [{"text": text}]


def test_the_other_end_s_death_is_seen_after_its_last_words(ends):
    """EOFError once everything was returned; sending says so too."""
    ours, theirs = ends
    theirs.send(last=True)
    theirs.close()
    assert ours.receive() == [{"last": True}]
    with pytest.raises(EOFError):
        ours.receive()
    assert not ours.send(anybody=True)


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b"x" * 300])
def test_what_is_no_message_is_refused(line):
    """Garbage, another kind of JSON, and a line without end."""
    sender, receiver = socket.socketpair()
    channel = Channel(receiver, blocking=True, max_line_bytes=100)
    with sender:
        sender.sendall(line)
        with pytest.raises(ValueError):
            channel.receive()
    channel.close()


def test_a_row_is_seen_by_the_parent_and_outlives_its_writer():
    """Shared memory: a forked child writes, the parent reads after its death."""
    board = Scoreboard()
    row = board.take()
    pid = os.fork()
    if pid == 0:
        row.write(7, 9)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (row.open, row.accepted) == (7, 9)
    assert row.silence < PATIENCE
    board.give_back(row)
    again = board.take()
    assert (again.number, again.open) == (row.number, 0)
    board.close()


def test_rows_are_counted():
    """One more than there are is an error, not somebody else's row."""
    board = Scoreboard()
    rows = {board.take().number for _ in range(MAX_ROWS)}
    assert len(rows) == MAX_ROWS
    with pytest.raises(OSError, match="already"):
        board.take()
    board.close()


def test_a_pid_file_is_written_refused_and_removed(tmp_path):
    """A dead holder's is taken over, a living one's is not, unless it hands over."""
    path = tmp_path / "pid"
    mine = PidFile(str(path))
    path.write_text("999999999999\n")  # of no process, on any machine
    mine.write()
    path.write_text("999999999\n")
    mine.write()
    assert int(path.read_text()) == os.getpid()
    path.write_text(f"{os.getppid()}\n")
    with pytest.raises(ConfigError, match=f"process {os.getppid()} holds it"):
        mine.write()
    mine.remove()
    assert path.exists()
    mine.write(over=os.getppid())
    mine.remove()
    assert not path.exists()
    with pytest.raises(ConfigError, match="No such file or directory"):
        PidFile(str(tmp_path / "none" / "pid")).write()


def test_a_pid_file_takes_the_place_of_files_alone(tmp_path):
    """A device would be replaced, and a named pipe waited for."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (pipe, tmp_path / "link"):
        for verb in (PidFile.write, PidFile.check):
            with pytest.raises(ConfigError, match="this is no file"):
                verb(PidFile(str(path)))
    assert pipe.is_fifo()


def test_a_pid_file_in_a_directory_of_root(tmp_path, monkeypatch):
    """Who has become another user owns the file alone: it is written over, and emptied in the end."""
    path = tmp_path / "pid"
    path.write_text("999999999 and what was there before\n")

    def refuse(*_arguments, **_more):
        raise PermissionError(errno.EACCES, "Permission denied")

    mine = PidFile(str(path))
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    path.chmod(0o600)
    mine.write()
    assert path.read_text() == f"{os.getpid()}\n"
    mine.write()  # nothing to write
    mine.remove()
    assert path.read_text() == ""


def test_a_pid_file_is_its_own(tmp_path):
    """Whatever the umask, nobody else may write to it; a link that waits at its place in the making is not followed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f"pid.{os.getpid()}").symlink_to(victim)
    mask = os.umask(0)
    try:
        PidFile(str(tmp_path / "pid")).write()
    finally:
        os.umask(mask)
    assert victim.read_text() == "precious"
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    assert (tmp_path / "pid").lstat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change users")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_the_server_must_replace_is_given_to_its_user(workers, tmp_path, monkeypatch):
    """PID file, new logs, control socket and the page's become those of ``user``, with and without a supervisor."""
    given = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid, **_: given.append((pathlib.Path(path).name, uid)))

    def refuse(_settings):
        raise ConfigError("it ends before it serves")

    monkeypatch.setattr(privileges, "drop", refuse)
    paths = {name: str(tmp_path / name) for name in ("access_log", "control", "log_file", "metrics", "pidfile")}
    names = sorted(paths)
    paths["metrics"] = f"unix:{paths['metrics']}"
    settings = {"workers": int(workers), "user": "nobody", **paths}
    with pytest.raises(ConfigError, match="it ends before it serves"):
        service.run(lambda: Idle, ("tcp://127.0.0.1:0",), settings, name="x")
    assert sorted(given) == [(name, pwd.getpwnam("nobody").pw_uid) for name in names]


class Idle(harken.BaseRequestHandler):
    """Serves nobody in these tests."""

    def handle(self):
        """Nothing."""


def test_without_a_path_there_is_no_pid_file():
    """Every verb does nothing."""
    PidFile(None).write()
    PidFile(None).remove()


@pytest.mark.parametrize("name", ["user", "group"])
def test_unknown_users_and_groups_are_named(name):
    """In one line, before anything has changed."""
    with pytest.raises(ConfigError, match=f"{name} = 'nobody-here': there is no such {name}"):
        privileges.drop(Settings(None, {name: "nobody-here"}, "serve"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change users")
def test_root_becomes_somebody_else():
    """User, group and groups, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            privileges.drop(Settings(None, {"user": "nobody"}, "serve"))
            status = 0 if os.geteuid() != 0 and os.getegid() != 0 and 0 not in os.getgroups() else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_umask_is_octal():
    """As people write it."""
    before = os.umask(0)
    try:
        privileges.set_umask(Settings(None, {"umask": "027"}, "serve"))
        assert os.umask(0) == 0o27
    finally:
        os.umask(before)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    """chdir."""
    with pytest.raises(ConfigError, match="No such file"):
        privileges.chdir(Settings(None, {"chdir": str(tmp_path / "none")}, "serve"))


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path, monkeypatch, abstract):
    """One datagram of NAME=value lines; paths and abstract names."""
    name = f"@harken-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify.notify(READY=1, STATUS="fine")
        assert manager.recv(100) == b"READY=1\nSTATUS=fine"
        assert notify.reloading()
        assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    assert not notify.notify(READY=1)
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not notify.notify(READY=1)


def test_the_watchdog_is_fed_twice_as_often_as_asked(monkeypatch):
    """For this process, or for any; not for another."""
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    assert notify.watchdog_interval() == 2.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert notify.watchdog_interval() == 2.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_interval() is None
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    monkeypatch.delenv("WATCHDOG_PID")
    assert notify.watchdog_interval() is None


def test_no_turn_is_so_long_that_the_watchdog_bites(monkeypatch):
    """A meal that is not due at one turn, though nearly, is early enough at the next."""
    assert notify.Watchdog().patience(1.0) == 1.0
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    assert notify.Watchdog().patience(1.0) == 1.0
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    watchdog = notify.Watchdog()
    assert watchdog.interval + watchdog.patience(1.0) == 1.5  # of 2 seconds


def test_signals_are_read_in_order_and_given_back():
    """The default actions return when the inbox closes."""
    before = signal.getsignal(signal.SIGUSR1)
    inbox = Inbox([signal.SIGUSR1, signal.SIGUSR2])
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR2)
    select.select([inbox], [], [], PATIENCE)
    assert sorted(inbox.read()) == sorted([signal.SIGUSR1, signal.SIGUSR2])
    assert inbox.read() == []
    inbox.close()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_storm_of_signals_hides_none_of_another_kind():
    """A thousand, and nobody has read yet."""
    inbox = Inbox([signal.SIGUSR1, signal.SIGUSR2])
    try:
        for _ in range(1000):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert inbox.read() == [signal.SIGUSR1] * 1000 + [signal.SIGUSR2]
    finally:
        inbox.close()


def test_a_worker_s_time_is_over_by_each_measure():
    """Connections with jitter, age, memory; nothing asked, never."""
    assert recycling.Lifespan(Settings(None, {}, "serve")).over(10**9) is None
    by_count = recycling.Lifespan(Settings(None, {"max_requests": 5, "max_requests_jitter": 3}, "serve"))
    assert by_count.over(4) is None
    assert "max_requests" in by_count.over(8)
    assert "max_worker_age" in recycling.Lifespan(Settings(None, {"max_worker_age": 0}, "serve")).over(0)


def test_workers_of_one_age_are_not_replaced_together(monkeypatch):
    """Each is given a part of a tenth of the age more."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(recycling, "time", clock)
    settings = Settings(None, {"max_worker_age": 100.0}, "serve")
    many = [recycling.Lifespan(settings) for _ in range(50)]
    over = []
    for clock.now in (99.9, 105.0, 110.0):
        over.append(sum(each.over(0) is not None for each in many))
    assert over[0] == 0
    assert 0 < over[1] < 50
    assert over[2] == 50


def test_what_is_ordered_behind_the_end_is_refused(monkeypatch, tmp_path):
    """Of a process alone, whose end is on its way as a signal still."""
    answers = []
    client = SimpleNamespace(answer=lambda number, **reply: answers.append(reply))
    monkeypatch.setattr(os, "kill", lambda *_: None)
    listener = control.open_listener(Settings(None, {"control": str(tmp_path / "ctl")}, "serve"), "app")
    desk = _Desk(listener, SimpleNamespace(traces=SimpleNamespace()), lambda *_: None, lambda: False)
    try:
        desk._answer(client, {"verb": "drain", "number": 1})
        desk._answer(client, {"verb": "reload", "number": 2})
    finally:
        desk.close()
    assert answers == [{"result": None}, {"error": "the service drains and ends: reload has no effect any more"}]
