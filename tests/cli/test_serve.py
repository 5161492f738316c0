"""``harken serve``: what it says, what it serves, and how it ends."""

from __future__ import annotations

import re
import signal
import socket
import threading

import pytest
import trustme

SECONDS = 20
PROGRAM = """
import harken
class Echo(harken.BaseRequestHandler):
    def handle(self):
        if isinstance(self.request, tuple):
            self.request[1].sendto(self.request[0], self.client_address)
            return
        while data := self.request.recv(65536):
            self.request.sendall(data)
def function(): pass
"""


@pytest.fixture
def serve(run_program, tmp_path):
    """Return a function that starts ``harken serve`` on a program and returns the process."""
    tmp_path.joinpath("srv_app.py").write_text(PROGRAM)

    def start(target, *words, **more):
        return run_program("-m", "harken", "serve", target, *words, cwd=tmp_path, **more)

    return start


def announced(process, count=1):
    """Return the first lines that begin with ``listening on``."""
    lines: list[str] = []
    everything: list[str] = []

    def read():
        for line in process.stderr:
            everything.append(line)
            if line.startswith("listening on "):
                lines.append(line.rstrip("\n"))
            if len(lines) == count:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(SECONDS)
    if len(lines) < count:
        process.kill()
        pytest.fail(f"it did not come up: {everything}", pytrace=False)
    return lines


def ask(family, kind, address, word, own=None):
    """Send a word and return what comes back."""
    with socket.socket(family, kind) as client:
        client.settimeout(SECONDS)
        if own:
            client.bind(own)
        client.connect(address)
        client.sendall(word)
        return client.recv(100)


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["--tls-cert", "site.pem"], ["openssl s_client -connect 127.0.0.1:{}", "openssl s_client -unix {}"]),
        (["--tls-cert", "site.pem", "--tls-mode", "starttls"], ["nc 127.0.0.1 {}", "nc -U {}"]),
    ],
)
def test_what_is_under_tls_is_tried_by_openssl(serve, tmp_path, words, hints):
    """The line to try an address with speaks what the address speaks."""
    issued = trustme.CA().issue_cert("localhost")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "site.pem")
    process = serve("srv_app:Echo", "--bind", "tcp://127.0.0.1:0", "--bind", f"unix:{tmp_path}/s", *words)
    tcp, unix = announced(process, 2)
    port = re.match(r"listening on tcp://127.0.0.1:(\d+) ", tcp)
    assert port
    assert tcp.endswith(f"; try: {hints[0].format(port[1])}")
    assert unix.endswith(f"; try: {hints[1].format(f'{tmp_path}/s')}")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_service_that_ctl_will_not_find_says_so(serve, run_program, tmp_path, workers):
    """The place for control sockets is another user's, or read-only: the service goes on without, and tells."""
    place = {"XDG_RUNTIME_DIR": str(tmp_path / "srv_app.py")}  # no directory
    process = serve("srv_app:Echo", "--bind", "tcp://127.0.0.1:0", "--workers", workers, env=place)
    lines = []
    while not lines or "listening: " not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=SECONDS)[1]
    (told,) = [line for line in [*lines, *rest.splitlines()] if "control failed" in line]
    assert f"warning control failed: reason {tmp_path}/srv_app.py/harken: Not a directory; `harken ctl` needs" in told
    asked = run_program("-m", "harken", "ctl", "status", env=place)
    assert asked.wait(SECONDS) == 1
    said = f"harken: {tmp_path}/srv_app.py/harken: Not a directory; name the server's socket by --socket\n"
    assert asked.stderr.read() == said


def test_the_line_to_try_a_path_with_is_for_the_shell(serve, tmp_path):
    """Blanks and letters of other languages stand there as in the file's name, not as in the URL."""
    folder = tmp_path / "two wörds"
    folder.mkdir()
    (line,) = announced(serve("srv_app:Echo", "--bind", f"unix:{folder}/s"))
    assert line.endswith(f"; try: nc -U '{folder}/s'")


def test_three_kinds_of_address_at_once(serve, tmp_path):
    """Each address is announced with a line to try it with, and each echoes."""
    words = ["--bind", "tcp://127.0.0.1:0", "--bind", f"unix:{tmp_path}/s", "--bind", "udp://127.0.0.1:0"]
    process = serve("srv_app:Echo", *words)
    lines = announced(process, 3)
    tcp = re.fullmatch(r"listening on tcp://127.0.0.1:(\d+) \(engine thread\); try: nc 127.0.0.1 (\d+)", lines[0])
    udp = re.fullmatch(r"listening on udp://127.0.0.1:(\d+) \(engine thread\); try: nc -u 127.0.0.1 (\d+)", lines[2])
    assert tcp
    assert tcp[1] == tcp[2] != "0"
    assert lines[1] == f"listening on unix:{tmp_path}/s (engine thread); try: nc -U {tmp_path}/s"
    assert udp
    assert ask(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", int(tcp[1])), b"one") == b"one"
    assert ask(socket.AF_UNIX, socket.SOCK_STREAM, f"{tmp_path}/s", b"two") == b"two"
    assert ask(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", int(udp[1])), b"three") == b"three"


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGQUIT, 0)])
def test_signals_end_it_with_status_0(serve, number, status):
    """With nobody connected each ends at once."""
    process = serve("srv_app:Echo", "--bind", "tcp://127.0.0.1:0")
    announced(process)
    process.send_signal(number)
    process.communicate(timeout=SECONDS)
    assert process.returncode == status


@pytest.mark.parametrize("engine", ["thread", "pool"])
def test_connections_cut_at_the_deadline_are_status_3(serve, engine):
    """SIGTERM waits for the drain's time; a client that stays is cut then."""
    process = serve("srv_app:Echo", "--bind", "tcp://127.0.0.1:0", "--drain-timeout", "0.2", "--engine", engine)
    port = int(announced(process)[0].rpartition(" ")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        process.send_signal(signal.SIGTERM)
        assert client.recv(1) == b""
        process.communicate(timeout=SECONDS)
    assert process.returncode == 3


@pytest.mark.parametrize("engine", ["thread", "pool"])
def test_sigint_stops_at_once_with_idle_clients(serve, engine):
    """Ctrl-C does not wait for anybody."""
    process = serve("srv_app:Echo", "--bind", "tcp://127.0.0.1:0", "--drain-timeout", "60", "--engine", engine)
    port = int(announced(process)[0].rpartition(" ")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 0


def test_addresses_and_settings_from_a_file(serve, tmp_path):
    """``bind`` and settings of the TOML hold when no flag says otherwise."""
    tmp_path.joinpath("harken.toml").write_text(f'bind = ["unix:{tmp_path}/s"]\nengine = "pool"\n')
    lines = announced(serve("srv_app:Echo", "--config", "harken.toml"))
    assert lines == [f"listening on unix:{tmp_path}/s (engine pool); try: nc -U {tmp_path}/s"]


def test_a_log_for_machines_has_no_other_lines(serve):
    """With JSON asked for, the announcement is the log's alone."""
    import json

    process = serve("srv_app:Echo", "--bind", "tcp://127.0.0.1:0", "--log-format", "json")
    assert json.loads(process.stderr.readline())["event"] == "listening"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=SECONDS)
    assert [json.loads(line)["event"] for line in err.splitlines()][-2:] == ["drained", "worker_exited"]


@pytest.mark.parametrize(
    "words,status,line",
    [
        (("srv_ap:Echo",), 1, "harken: no module named 'srv_ap'; did you mean 'srv_app'?"),
        (("srv_app:function",), 1, "harken: srv_app:function is a function, not a handler class"),
        (("srv_app:Echo", "--bind", "tpc://:0"), 2, "harken serve: 'tpc://:0': no transport is called 'tpc'"),
        (("srv_app:Echo", "--backlog", "x"), 2, "harken serve: backlog = 'x' (flag --backlog)"),
        (("srv_app:Echo", "--baklog", "1"), 2, "harken serve: No such option '--baklog'"),
        (("srv_app:Echo", "more"), 2, "harken serve: Got unexpected extra argument"),
        ((), 2, "harken serve: Missing argument 'TARGET'"),
    ],
)
def test_what_is_wrong_is_one_line(serve, words, status, line):
    """2 for what was typed wrongly, 1 for what cannot be had."""
    process = serve(*words) if words else serve("--backlog=1")
    _, err = process.communicate(timeout=SECONDS)
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert process.returncode == status


def test_an_unknown_variable_is_a_warning(serve):
    """It may be misspelt, and then what it says does not hold; it may be somebody else's, and so the service runs."""
    process = serve(
        "srv_app:Echo", "--bind", "tcp://127.0.0.1:0", "--control", "none", env={"HARKEN_MAXCONNECTIONS": "5"}
    )
    first = process.stderr.readline()
    announced(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 0
    assert first.startswith("harken serve: warning: unknown variable HARKEN_MAXCONNECTIONS; did you mean")


def test_a_port_in_use_is_status_1(serve):
    """One line, and who has it."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        process = serve("srv_app:Echo", "--bind", f"tcp://127.0.0.1:{holder.getsockname()[1]}")
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "is already in use by pid" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "url,hint",
    [
        ("tcp://:8800", "nc 127.0.0.1 8800"),
        ("tcp://0.0.0.0:8800", "nc 127.0.0.1 8800"),
        ("tcp://[::]:8800", "nc ::1 8800"),
        ("tcp://[fe80::1]:8800", "nc fe80::1 8800"),
        ("udp://localhost:53", "nc -u localhost 53"),
        ("unix:/run/my app.sock", "nc -U '/run/my app.sock'"),
        ("unixgram:/run/x", "nc -uU /run/x"),
        ("('odd', 1)", ""),
    ],
)
def test_each_address_has_a_line_to_try_it_with(url, hint):
    """What to type to talk to a listener."""
    from harken.cli.serve import _attempt

    assert _attempt(url) == hint


@pytest.mark.parametrize(
    "words,status,told",
    [
        (("--bind", "nowhere"), 2, "'nowhere' has no scheme"),
        (("--bind", "tcp://127.0.0.1:99999"), 2, "has no port from 0 to 65535"),
        (("--bind", "unix:/tmp/x?mode=9"), 2, "is not an octal mode"),
        (("--metrics", "nowhere"), 2, "is no address for a page"),
        (("--metrics", "tcp://127.0.0.1:x"), 2, "has no port from 0 to 65535"),
        (("--backlog", "999999999999"), 2, "is above the largest value allowed"),
        (("--log-file", "/nonexistent/log"), 1, "the log '/nonexistent/log' cannot be opened: No such file"),
        (("--access-log", "/nonexistent/log"), 1, "the log '/nonexistent/log' cannot be opened: No such file"),
        (("--limits", "nonexistent.module:Limit"), 1, "cannot load 'nonexistent.module:Limit' for limits"),
    ],
)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_is_wrong_is_told_at_the_start(serve, words, status, told, workers):
    """One line that names the value: status 2 when it can never be, 1 when this machine has not got it."""
    bind = () if "--bind" in words else ("--bind", "tcp://127.0.0.1:0")
    process = serve("srv_app.py:Echo", "--workers", workers, *bind, *words)
    assert process.wait(SECONDS) == status
    log = [line for line in process.stderr.read().splitlines() if not line.startswith("listening on")]
    assert told in log[-1]
    assert not any("Traceback" in line for line in log)
