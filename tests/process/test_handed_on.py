"""What becomes of each address when a reload or an upgrade hands the sockets on: its TLS, its file, its place."""

import os
import signal
import socket
import stat

import pytest
import trustme
from certified import trusting
from waiting import wait_until

PATIENCE = 20.0

# Workers, and the signal by which another program takes the sockets over.
WAYS = [("0", signal.SIGHUP), ("0", signal.SIGUSR2), ("1", signal.SIGUSR2)]


class Configured:
    """A service whose addresses stand in a file."""

    def __init__(self, service, folder):
        self._service = service
        self._file = folder / "harken.toml"
        self.pidfile = folder / "pid"
        self._told = 0

    def _write(self, addresses):
        self._file.write_text(f"bind = {list(addresses)!r}\n")
        self._told += len(addresses)

    def start(self, workers, *addresses):
        """Serve there."""
        self._write(addresses)
        words = ("--config", str(self._file), "--workers", workers, "--pidfile", str(self.pidfile))
        self.running = self._service(*words, bind=None)
        self.running.wait_log("listening: address", self._told)

    def hand_on(self, number, *addresses):
        """Let the next program serve at these addresses."""
        self._write(addresses)
        os.kill(self.running.pid, number)
        self.running.wait_log("listening: address", self._told)


@pytest.fixture
def configured(service, tmp_path):
    """A service, not yet started."""
    return Configured(service, tmp_path)


@pytest.fixture(scope="module")
def authority():
    """Who issues the certificate."""
    return trustme.CA()


@pytest.fixture
def certificate(authority, tmp_path):
    """The file with it and its key."""
    path = tmp_path / "site.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(path)
    return path


def greeted(address):
    """Whether somebody greets at a Unix path, or a TCP address."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.settimeout(PATIENCE)
        client.connect(address)
        return client.recv(100).startswith(b"one ")


def greeted_under_tls(port, authority):
    """Whether somebody greets under TLS. The plain greeting of a server without TLS fails the handshake."""
    with trusting(port, authority) as client:
        return client.recv(3) == b"one"


def refused(address):
    """Whether nobody is there."""
    try:
        greeted(address)
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    return False


@pytest.mark.parametrize("workers, number", WAYS)
def test_an_address_under_tls_stays_under_tls(configured, free_port, authority, certificate, workers, number):
    """What is spoken there stands in the address, of which a socket that is handed on knows nothing."""
    address = f"tls://127.0.0.1:{free_port}?cert={certificate}"
    configured.start(workers, address)
    assert greeted_under_tls(free_port, authority)
    configured.hand_on(number, address)
    assert greeted_under_tls(free_port, authority)
    assert configured.running.said(f"listening: address tls://127.0.0.1:{free_port},", 2)


@pytest.mark.parametrize("workers, number", WAYS)
def test_an_address_may_come_under_tls(configured, free_port, authority, certificate, workers, number):
    """The socket is the same, and what is spoken on it another."""
    configured.start(workers, f"tcp://127.0.0.1:{free_port}")
    assert greeted(("127.0.0.1", free_port))
    configured.hand_on(number, f"tls://127.0.0.1:{free_port}?cert={certificate}")
    if number == signal.SIGUSR2:
        configured.running.status()
    assert greeted_under_tls(free_port, authority)


@pytest.mark.parametrize("workers, number", WAYS)
def test_a_file_that_is_no_address_any_more_goes(configured, tmp_path, workers, number):
    """Else a client finds a socket at which nobody listens, and so does the next server that wants the path."""
    kept, dropped = str(tmp_path / "kept"), str(tmp_path / "dropped")
    configured.start(workers, f"unix:{kept}", f"unix:{dropped}")
    assert greeted(kept)
    assert greeted(dropped)
    configured.hand_on(number, f"unix:{kept}")
    wait_until(lambda: not os.path.exists(dropped))
    assert greeted(kept)


def test_a_dropped_file_survives_an_upgrade_that_fails(configured, target, tmp_path):
    """It is the predecessor's until the successor is ready."""
    path = str(tmp_path / "sock")
    configured.start("1", f"unix:{path}", "tcp://127.0.0.1:0")
    good = target.read_text()
    target.write_text("raise RuntimeError('broken')")
    configured._write(["tcp://127.0.0.1:0"])
    os.kill(configured.running.pid, signal.SIGUSR2)
    configured.running.wait_log("upgrade failed")
    target.write_text(good)
    assert greeted(path)


@pytest.mark.parametrize("workers, number", WAYS)
def test_the_rights_of_a_file_may_change(configured, tmp_path, workers, number):
    """The address is spelled otherwise, and its place is the same: the socket is handed on, with who waits in it."""
    path = str(tmp_path / "sock")
    configured.start(workers, f"unix:{path}?mode=600")
    inode = os.stat(path).st_ino
    configured.hand_on(number, f"unix:{path}?mode=660")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    assert os.stat(path).st_ino == inode
    assert greeted(path)


@pytest.mark.parametrize("workers, number", WAYS)
def test_a_file_whose_rights_somebody_has_changed_keeps_them(configured, tmp_path, workers, number):
    """A hand-over is no reason to undo what an operator did by hand."""
    path = str(tmp_path / "sock")
    configured.start(workers, f"unix:{path}")
    os.chmod(path, 0o640)
    configured.hand_on(number, f"unix:{path}")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    assert greeted(path)


def test_an_address_may_become_narrower(configured, free_port):
    """What nobody asks for any more is closed before anything is bound: it may be in the way."""
    configured.start("0", f"tcp://:{free_port}")
    assert greeted(("127.0.0.1", free_port))
    configured.hand_on(signal.SIGHUP, f"tcp://127.0.0.1:{free_port}")
    assert greeted(("127.0.0.1", free_port))
    assert refused(("127.0.0.2", free_port))


def test_a_program_that_cannot_begin_anew_leaves_nothing(configured, target, tmp_path):
    """The process that answered for the files was this one: nobody else would remove them."""
    path = str(tmp_path / "sock")
    configured.start("0", f"unix:{path}")
    target.write_text("raise RuntimeError('broken')")
    os.kill(configured.running.pid, signal.SIGHUP)
    status, log = configured.running.end()
    assert status == 1
    assert "broken" in log
    assert not os.path.exists(path)
    assert not configured.pidfile.exists()


def test_a_program_of_ones_own_that_cannot_begin_anew_leaves_nothing(run_program, tmp_path):
    """As under the command; `harken.serve` is what fails."""
    (tmp_path / "own.py").write_text("""
import os, harken
class Greet(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"one ")
first = "HARKEN_HANDOFF" not in os.environ
harken.serve(Greet, "unix:sock", workers=0, pidfile="pid", engine="thread" if first else "threat")
""")
    process = run_program("own.py", cwd=tmp_path)
    path = str(tmp_path / "sock")
    wait_until(lambda: (tmp_path / "pid").exists() and not refused(path))
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(PATIENCE) == 1
    assert "did you mean 'thread'" in process.stderr.read()
    assert not os.path.exists(path)
    assert not (tmp_path / "pid").exists()
