"""TLS from the command line: old programs, new ones, and what is wrong with certificates."""

import datetime as dt
import re
import socket
import ssl

import pytest
import trustme

PATIENCE = 20  # seconds
APP = """
import harken
class Echo(harken.BaseRequestHandler):
    def handle(self):
        pass
"""


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """A folder with ca.pem, site.pem and site.key."""
    folder = tmp_path_factory.mktemp("pki")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    issued = ca.issue_cert("localhost")
    issued.private_key_pem.write_to_path(folder / "site.key")
    issued.cert_chain_pems[0].write_to_path(folder / "site.pem")
    ca.issue_cert("localhost").private_key_pem.write_to_path(folder / "other.key")
    return folder


def dial(port, pki):
    context = ssl.create_default_context(cafile=pki / "ca.pem")
    wire = socket.create_connection(("127.0.0.1", port), PATIENCE)
    return context.wrap_socket(wire, server_hostname="localhost")


def first_port(stream):
    """Read lines to the first that names a port."""
    for line in stream:
        found = re.search(r"(?:port |127\.0\.0\.1:)(\d+)", line)
        if found:
            return int(found[1])
    raise AssertionError("no port was told")


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_an_old_program_gets_https(engine, pki, run_program, tmp_path):
    """``harken run --tls-cert … -m http.server`` serves https, and the program does not know."""
    (tmp_path / "page").write_text("a page")
    process = run_program(
        *["-m", "harken", "run", "--engine", engine, "--tls-cert", pki / "site.pem", "--tls-key", pki / "site.key"],
        *["-m", "http.server", "--bind", "127.0.0.1", "0"],
        cwd=tmp_path,
    )
    port = first_port(process.stdout)
    with dial(port, pki) as client:
        client.sendall(b"GET /page HTTP/1.0\r\n\r\n")
        answer = b""
        while data := client.recv(1000):
            answer += data
    assert answer.endswith(b"a page")
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        client.sendall(b"GET /page HTTP/1.0\r\n\r\n")
        assert client.recv(1000) == b""


def test_serve(pki, run_program, tmp_path):
    """``harken serve`` under TLS by flags, by variables and by a file."""
    (tmp_path / "app.py").write_text(
        "import harken\nclass Echo(harken.BaseRequestHandler):\n"
        "    def handle(self):\n        self.request.sendall(self.request.recv(100))\n"
    )
    (tmp_path / "harken.toml").write_text(f'tls = {{cert = "{pki}/site.pem", key = "{pki}/site.key"}}\n')
    certificate = {"HARKEN_TLS_CERT": f"{pki}/site.pem", "HARKEN_TLS_KEY": f"{pki}/site.key"}
    for flags, env in (
        (["--tls", f"cert={pki}/site.pem&key={pki}/site.key"], {}),
        ([], certificate),
        (["--config", "harken.toml"], {}),
    ):
        arguments = ["-m", "harken", "serve", "app.py:Echo", "--bind", "tcp://127.0.0.1:0", *flags]
        process = run_program(*arguments, cwd=tmp_path, env=env)
        port = first_port(process.stderr)
        with dial(port, pki) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tls-cert", "none.pem"], "TLS certificate 'none.pem' cannot be read: No such file or directory"),
        (["--tls-cert", "app.py"], "TLS certificate 'app.py' holds no certificate in PEM"),
        (["--tls-cert", "{}/site.pem"], "holds no private key in PEM; name its file by key="),
        (["--tls-cert", "{}/site.pem", "--tls-key", "{}/site.key", "--tls-verify", "required"], "needs ca=FILE"),
        (["--tls-cert", "{}/site.pem", "--tls-key", "{}/other.key"], "is not the key of the certificate"),
        (["--bind", "tcp://127.0.0.1:0", "--bind", "tls://localhost:0"], "tls://127.0.0.1:"),
        (["--bind", "tls://127.0.0.1:0"], " needs a certificate: add ?cert=FILE"),
        (["--bind", "tls://127.0.0.1:0?cert=app.py"], "holds no certificate in PEM"),
    ],
)
def test_check_tells_what_is_wrong(flags, message, pki, tmp_path, harken):
    """One line and status 1."""
    (tmp_path / "app.py").write_text(APP)
    bind = [] if "--bind" in flags else ["--bind", "tcp://127.0.0.1:0"]
    status, _, err = harken("check", "app.py:Echo", *bind, *(flag.format(pki) for flag in flags))
    assert status == 1
    (line,) = err.splitlines()
    assert message in line.replace(f"{tmp_path}/", "")


def test_check_is_content_with_a_good_certificate(pki, tmp_path, harken):
    """And never shows a passphrase that stands where its file belongs."""
    (tmp_path / "app.py").write_text(APP)
    flags = ["--tls-cert", pki / "site.pem", "--tls-key", pki / "site.key", "--tls-password", "hunter2"]
    done = harken("check", "app.py:Echo", "--bind", "tcp://127.0.0.1:0", *map(str, flags))
    assert done.status == 0, done.err
    assert "hunter2" not in done.out + done.err


def test_check_warns_of_a_certificate_that_expires(pki, tmp_path, harken):
    """One line on stderr for each, also of those that are chosen by name, and status 0 all the same."""
    (tmp_path / "app.py").write_text(APP)
    now, authority = dt.datetime.now(dt.UTC), trustme.CA()
    for name, days in (("soon", 9.5), ("past", -2)):
        end = now + dt.timedelta(days=days)
        made = authority.issue_cert(name, not_after=end, not_before=end - dt.timedelta(days=90))
        made.private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
    tls = 'tls = {cert = "soon.pem", sni = {"past.example" = "past.pem"}}\n'
    (tmp_path / "harken.toml").write_text(tls)
    done = harken("check", "app.py:Echo", "--bind", "tcp://127.0.0.1:0", "--config", "harken.toml")
    assert done.status == 0, done.err
    soon, past = done.err.splitlines()
    assert "soon.pem expires in 9 days" in soon
    assert "past.pem expired on" in past
