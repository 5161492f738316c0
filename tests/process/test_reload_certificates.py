"""HUP and ``harken ctl reload`` read certificates anew; those that do not load leave the old ones in force."""

import os
import signal
import ssl
import subprocess
import sys
import time

import pytest
import trustme
from certified import trusting

PATIENCE = 20.0


@pytest.fixture(scope="module")
def authority():
    """Who issues them all."""
    return trustme.CA()


@pytest.fixture
def certify(authority, tmp_path):
    """Return a function that puts a new certificate in place, and gives it in DER."""

    def issue():
        made = authority.issue_cert("localhost")
        made.private_key_and_cert_chain_pem.write_to_path(tmp_path / "new.pem")
        (tmp_path / "new.pem").rename(tmp_path / "site.pem")
        return ssl.PEM_cert_to_DER_cert(made.cert_chain_pems[0].bytes().decode())

    return issue


def shown(port, authority):
    """Return the certificate that a client is shown now, in DER."""
    with trusting(port, authority) as client:
        assert client.recv(3) == b"one"
        return client.getpeercert(binary_form=True)


def wait_shown(port, authority, wanted):
    """Connect until that certificate is shown."""
    end = time.monotonic() + PATIENCE
    while shown(port, authority) != wanted:
        assert time.monotonic() < end, "still another certificate"
        time.sleep(0.02)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_reload_brings_the_new_certificate(service, authority, certify, tmp_path, workers):
    """And a broken one changes nothing: the service goes on with the old, and says so."""
    old = certify()
    path = str(tmp_path / "site.pem")
    control = str(tmp_path / "control")
    running = service("--workers", workers, "--tls-cert", path, "--control", control)
    assert shown(running.port, authority) == old
    (tmp_path / "site.pem").write_text("no certificate")
    os.kill(running.pid, signal.SIGHUP)
    running.wait_log("holds no certificate in PEM")
    assert shown(running.port, authority) == old
    new = certify()
    done = subprocess.run(
        [sys.executable, "-m", "harken", "ctl", "--socket", control, "reload"],
        timeout=PATIENCE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wait_shown(running.port, authority, new)
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_relative_path_is_meant_from_the_start(service, run_program, authority, certify, target, tmp_path, workers):
    """As every path in settings: also in workers, which are where ``chdir`` says, and at a reload; ``check`` agrees."""
    old = certify()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / target.name).write_text(target.read_text())
    words = ("--workers", workers, "--tls-cert", "site.pem", "--chdir", "elsewhere", "--control", "none")
    running = service(*words)
    assert shown(running.port, authority) == old
    new = certify()
    os.kill(running.pid, signal.SIGHUP)
    wait_shown(running.port, authority, new)
    os.kill(running.pid, signal.SIGTERM)
    assert running.end()[0] == 0
    check = run_program("-m", "harken", "check", f"{target}:Tell", "--bind", "tcp://127.0.0.1:0", *words, cwd=tmp_path)
    assert check.wait(PATIENCE) == 0


def test_a_failed_handshake_is_one_line_of_the_log(service, certify, tmp_path):
    """At the level that ``serve`` logs by default, with the peer and the reason."""
    certify()
    running = service("--workers", "0", "--tls-cert", str(tmp_path / "site.pem"))
    with running.connect() as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while client.recv(100):
            pass
        port = client.getsockname()[1]
    os.kill(running.pid, signal.SIGTERM)
    status, log = running.end()
    (line,) = [line for line in log.splitlines() if "preamble failed" in line]
    assert status == 0
    assert " info " in line
    assert "HTTP" in line
    assert f"127.0.0.1:{port}" in line
    assert "Traceback" not in log
