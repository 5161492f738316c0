"""How a server is told to speak TLS: certificates, names, protocols, passphrases, and what is wrong with them."""

import contextlib
import os
import shutil
import ssl
import subprocess
import types

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

import harken
from harken import events
from harken.errors import ConfigError
from harken.preambles.tls import TLS, certificates_of, declared
from harken.settings import Settings, operator
from harken.testing import serve

from .tls_kit import ENGINES, LOCAL, PATIENCE, Echo, plain

SECRET = "correct horse battery staple"


class Certified(harken.BaseRequestHandler):
    """Tells who its client is."""

    def handle(self):
        certificate = self.peer.certificate
        self.request.sendall(repr(certificate and certificate["subjectAltName"]).encode())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_clients_certificate_is_at_its_peer(engine, pki, serving, dial, closed):
    """Mutual TLS: the verified certificate is ``peer.certificate``, in the handler and in events."""
    with serving(engine, Certified, tls=harken.TLS(pki.cert, ca=pki.ca)) as server:
        with dial(server, cert=pki.client) as client:
            assert client.recv(1000) == b"(('email', 'ann@example.org'),)"
        (event,) = closed.wait(1)
        assert event.peer.certificate["subjectAltName"] == (("email", "ann@example.org"),)


@pytest.mark.parametrize("engine", ["thread", "green", "fork"])
def test_verify_demands_a_certificate(engine, pki, serving, dial, closed):
    """With ``ca`` a certificate is required; without one, or with a stranger's, there is no handler."""
    stranger = __import__("trustme").CA().issue_cert("eve@example.org")
    context = ssl.create_default_context(cafile=pki.ca)
    with stranger.private_key_and_cert_chain_pem.tempfile() as path:
        context.load_cert_chain(path)
    with serving(engine, Certified, tls=harken.TLS(pki.cert, ca=pki.ca)) as server:
        for given in ({}, {"context": context}):
            with contextlib.suppress(OSError), dial(server, **given) as client:
                assert client.recv(1000) == b""
        details = closed.failures(2)
        assert details[0] == "the peer sent no certificate, which verify demands"
        assert details[1].startswith("the peer's certificate was refused: ")


def test_verify_may_be_optional(pki, serving, dial):
    """``optional`` serves both, and tells them apart."""
    tls = harken.TLS(pki.cert, ca=pki.ca, verify="optional")
    with serving(handler=Certified, tls=tls) as server:
        with dial(server) as client:
            assert client.recv(1000) == b"None"
        with dial(server, cert=pki.client) as client:
            assert b"ann@example.org" in client.recv(1000)


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_alpn(engine, pki, serving, dial, trusting):
    """The server's preference among what both offer wins; who offers none gets none."""

    class Tell(harken.BaseRequestHandler):
        def handle(self):
            self.request.sendall(str(self.request.selected_alpn_protocol()).encode())

    with serving(engine, Tell, tls=harken.TLS(pki.cert, alpn=["h2", "http/1.1"])) as server:
        for offered, chosen in ((["http/1.1", "h2"], b"h2"), (["http/1.1"], b"http/1.1"), ([], b"None")):
            context = trusting()
            if offered:
                context.set_alpn_protocols(offered)
            with dial(server, context=context) as client:
                assert client.recv(100) == chosen


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_names_choose_certificates(engine, pki, serving, dial):
    """SNI: by the whole name, by a wildcard, and the default for all others; the client verifies each."""
    tls = harken.TLS(pki.cert, sni={"Other.example": str(pki.other), "*.wild.example": (pki.wild, None)})
    with serving(engine, tls=tls) as server:
        for name in ("localhost", "other.example", "a.wild.example"):
            with dial(server, name) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
        with pytest.raises(ssl.SSLCertVerificationError), dial(server, "a.b.wild.example"):
            pass


@pytest.fixture
def locked(pki, tmp_path):
    """A key that is encrypted with SECRET."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", pki.split_key, "-aes256", "-passout", f"pass:{SECRET}", "-out", path]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    return path


def test_a_passphrase_comes_from_a_file_a_function_or_bytes(pki, locked, tmp_path, serving, dial):
    """And from the setting ``tls_password``."""
    file = tmp_path / "passphrase"
    file.write_text(SECRET + "\n")
    for password in (file, str(file), lambda: SECRET, SECRET.encode()):
        with serving(tls=harken.TLS(pki.split_cert, locked, password=password)) as server, dial(server) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    with serving(tls=harken.TLS(pki.split_cert, locked), tls_password=str(file)) as server, dial(server):
        pass


def test_no_message_holds_a_passphrase(pki, locked, tmp_path):
    """Not when it is wrong, nor when it stands where its file belongs."""
    wrong = tmp_path / "wrong"
    wrong.write_text("not " + SECRET)
    seen = []
    for password, words in (
        (wrong, "the passphrase is wrong"),
        (lambda: SECRET + "!", "the passphrase is wrong"),
        (SECRET, "it is a file that holds the passphrase"),
        (None, "is encrypted: set tls_password"),
    ):
        tls = harken.TLS(pki.split_cert, locked, password=password)
        with pytest.raises(ConfigError) as caught:
            certificates_of(tls)
        assert words in str(caught.value)
        seen += [str(caught.value), repr(caught.value), repr(tls), str(tls)]
    settings = Settings(None, {"tls_password": SECRET})
    seen += [str(settings["tls_password"]), repr(settings["tls_password"])]
    with pytest.raises(ConfigError) as caught:
        Settings(None, {"tls": f"cert={pki.split_cert}&password={SECRET}&what=1"})
    assert SECRET not in "".join(seen)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"cert": "{}/none.pem"}, "TLS certificate '{}/none.pem' cannot be read: No such file or directory"),
        ({"cert": "{}/text"}, "TLS certificate '{}/text' holds no certificate in PEM"),
        ({"cert": "{}/split.pem"}, "TLS key '{}/split.pem' holds no private key in PEM; name its file by key="),
        ({"cert": "{}/split.pem", "key": "{}/none"}, "TLS key '{}/none' cannot be read: No such file or directory"),
        ({"cert": "{}/split.pem", "key": "{}/cert.pem"}, "is not the key of the certificate"),
        ({"cert": "{}/cert.pem", "ca": "{}/text"}, "TLS ca '{}/text' holds no certificate in PEM"),
        ({"cert": "{}/cert.pem", "ca": "{}/none"}, "TLS ca '{}/none' cannot be read"),
        ({"cert": "{}/cert.pem", "alpn": ["h2", ""]}, "a protocol's name is 1 to 255 ASCII bytes"),
        ({"cert": "{}/cert.pem", "sni": {"x": "{}/none"}}, "TLS certificate '{}/none' cannot be read"),
    ],
)
def test_what_is_wrong_with_files_is_told_at_the_start(words, message, pki, tmp_path):
    """In one line that names the file, before anybody can connect."""
    folder = pki.ca.parent
    (folder / "text").write_text("this is no certificate")

    def place(value):
        if isinstance(value, str):
            return value.replace("{}", str(folder))
        return {name: place(each) for name, each in value.items()} if isinstance(value, dict) else value

    words = {name: place(value) for name, value in words.items()}
    with pytest.raises(ConfigError) as caught:
        harken.TCPServer(LOCAL, Echo, tls=harken.TLS(**words))
    assert message.replace("{}", str(folder)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"verify": "required"}, "needs ca=FILE"),
        ({"verify": "yes", "ca": "x"}, "is not one of auto, none, optional, required"),
        ({"min_version": "1.1"}, "is not 1.2 or 1.3"),
        ({"mode": "sometimes"}, "is not one of always, optional, starttls"),
        ({"sni": {"a": 5}}, "neither a file nor a pair"),
        ({"sni": {"a.*.example": "b"}}, "no client can ask for 'a.\\*.example'"),
        ({"sni": {"*": "b"}}, "no client can ask for"),
        ({"sni": {"a..example": "b"}}, "no client can ask for"),
        ({"sni": {"": "b"}}, "no client can ask for"),
        ({"cert": None}, "is not the path of a PEM file"),
    ],
)
def test_wrong_words_are_refused(words, message):
    """When the TLS is made, with the value and what would be allowed."""
    with pytest.raises(ConfigError, match=message):
        harken.TLS(**{"cert": "cert.pem", **words})


def test_names_are_kept_as_clients_ask_for_them():
    """In ASCII, whatever letters they were written in."""
    made = TLS("c", sni={"München.example.": "a", "*.bücher.example": "b"})
    assert set(made.sni) == {"xn--mnchen-3ya.example", "*.xn--bcher-kva.example"}


@pytest.mark.parametrize("password", [None, b"open sesame"])
def test_a_key_of_another_kind_is_not_the_certificates(password, pki, tmp_path):
    """OpenSSL then says that there is no certificate; nor is it a matter of the passphrase."""
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    forms = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "key.pem").write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(*forms, locked))
    with pytest.raises(ConfigError, match="is not the key of the certificate"):
        certificates_of(TLS(pki.cert, tmp_path / "key.pem", password=password))


def test_words_come_in_several_spellings():
    """Booleans, constants of the standard library, and text mean the same."""
    assert [TLS("c", ca="a", verify=v).verify for v in (True, "required", ssl.CERT_REQUIRED, None, "auto")] == [
        "required"
    ] * 5
    assert [TLS("c", verify=v).verify for v in (False, "none", ssl.CERT_NONE, None)] == ["none"] * 4
    assert TLS("c", ca="a", verify=ssl.CERT_OPTIONAL).verify == "optional"
    assert [TLS("c", min_version=v).min_version for v in ("1.3", "TLSv1.3", ssl.TLSVersion.TLSv1_3)] == ["1.3"] * 3
    parsed = TLS.parse("cert=a.pem&key=b.pem&alpn=h2,x&verify=optional&ca=c.pem&min_version=1.3&mode=optional")
    assert (parsed.cert, parsed.key, parsed.alpn, parsed.ca) == ("a.pem", "b.pem", ("h2", "x"), "c.pem")
    assert (parsed.verify, parsed.min_version, parsed.mode) == ("optional", "1.3", "optional")
    assert str(parsed) == "cert=a.pem&key=b.pem&ca=c.pem&alpn=h2,x&verify=optional&min_version=1.3&mode=optional"
    assert str(TLS("c", sni={"b.example": "d"}, min_version="1.2")) == "cert=c&min_version=1.2&sni=b.example"


@pytest.mark.parametrize("text", ["", "cert", "crt=a", "cert=a&cert=b", "key=a", "cert="])
def test_text_that_is_no_tls(text):
    """Is refused with one line."""
    with pytest.raises(ConfigError):
        TLS.parse(text)


def test_tls_addresses(pki, dial):
    """``tls://HOST:PORT?cert=…`` listens by itself, and without a certificate takes the settings'."""
    with serve(Echo, f"tls://127.0.0.1:0?cert={pki.split_cert}&key={pki.split_key}", "tcp://127.0.0.1:0") as served:
        assert served.url.startswith("tls://127.0.0.1:")
        with dial(served.server) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        with plain(served.servers[1]) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    with serve(Echo, "tls://127.0.0.1:0", tls_cert=str(pki.cert)) as served, dial(served.server) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
    with pytest.raises(ConfigError, match="needs a certificate"), serve(Echo, "tls://127.0.0.1:0"):
        pass


@pytest.fixture
def said():
    """What the operator says, as flags; taken back in the end."""
    yield operator.flags
    operator.flags.clear()


def listener_with(tls):
    """As the socket of an address under TLS."""
    return types.SimpleNamespace(tls=tls)


FURTHER = {"tls_ca": "ca.pem", "tls_alpn": ("h2",), "tls_min_version": "1.3", "tls_sni": ("b.example=b.pem",)}


@pytest.mark.parametrize("owner", ["address", "setting", "program"])
def test_what_a_tls_does_not_say_the_settings_do(owner, said):
    """Whoever asks clients for certificates by a flag means all that is served, whoever names the certificate."""
    tls = TLS("a.pem")
    if owner == "setting":
        said["tls"] = tls
    values = Settings(None, FURTHER | ({"tls": tls} if owner == "program" else {}), "serve")
    found = declared(values, listener_with(tls) if owner == "address" else None)
    assert (found.cert, found.ca, found.verify) == ("a.pem", "ca.pem", "required")
    assert (found.alpn, found.min_version, found.sni) == (("h2",), "1.3", {"b.example": ("b.pem", None)})


@pytest.mark.parametrize("owner", ["address", "setting", "program"])
def test_what_a_tls_says_stands_above_the_settings(owner, said):
    """But for what an operator says to a program."""
    tls = TLS("a.pem", ca="own.pem", verify="optional", min_version="1.2")
    if owner == "setting":
        said["tls"] = tls
    said["tls_verify"] = "required"
    values = Settings(None, FURTHER | ({"tls": tls} if owner == "program" else {}), "serve")
    found = declared(values, listener_with(tls) if owner == "address" else None)
    assert found.verify == ("required" if owner == "program" else "optional")
    assert (found.ca, found.min_version) == ("own.pem", "1.2")


def test_a_tls_that_says_all_is_loaded_once():
    """It is the same object, which servers share."""
    tls = TLS("a.pem")
    assert declared(Settings(None, {"tls": tls}), None) is tls
    assert declared(Settings(None, {"tls_min_version": "1.2"}), listener_with(tls)) is tls


def test_a_programs_context_is_its_own(said):
    """An operator who asks for more than it does is told, and not left in the belief."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    values = Settings(None, {"tls": context})
    assert declared(values) is context
    said["tls_verify"] = "required"
    with pytest.raises(ConfigError, match=r"tls_verify \(flag --tls-verify\): the program has an ssl.SSLContext"):
        declared(values)


@pytest.mark.parametrize("mode", ["optional", "starttls"])
def test_an_address_of_tls_is_always_so(mode, pki, dial):
    """The setting is for the plain addresses beside it; the address itself may say otherwise."""
    words = {"tls_cert": str(pki.cert), "tls_mode": mode}
    with serve(Echo, "tls://127.0.0.1:0", "tcp://127.0.0.1:0", **words) as served:
        with dial(served.server) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        with plain(served.server) as client:
            client.sendall(b"hello\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"hello" not in client.recv(100)
        with plain(served.servers[1]) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
    address = f"tls://127.0.0.1:0?cert={pki.cert}&mode={mode}"
    with serve(Echo, address) as served, plain(served.server) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"


@pytest.mark.parametrize("word", ["tls_ca", "tls_key", "tls_sni", "tls_password", "tls_alpn"])
def test_words_without_a_certificate_are_refused(word):
    """Else all would go in plain text, and nobody say so."""
    given = {word: ["x=y"] if word == "tls_sni" else "x"}
    with pytest.raises(ConfigError, match=rf"{word} \(keyword argument\) needs a certificate"):
        with serve(Echo, "tcp://127.0.0.1:0", **given):
            pass
    with pytest.raises(ConfigError, match=rf"{word} \(keyword argument\) needs a certificate"):
        harken.TCPServer(LOCAL, Echo, **given)


def test_words_are_fine_where_another_address_has_a_certificate(pki, said):
    """A service may have plain addresses beside those under TLS."""
    said["tls_min_version"] = "1.3"
    with (
        serve(Echo, "tcp://127.0.0.1:0", f"tls://127.0.0.1:0?cert={pki.cert}") as served,
        plain(served.server) as client,
    ):
        client.sendall(b"x")
        assert client.recv(1) == b"x"


def test_datagrams_alone_are_not_under_tls(pki):
    """They would go in plain text."""
    for words in ({"tls_cert": str(pki.cert)}, {"tls": harken.TLS(pki.cert)}):
        with pytest.raises(ConfigError, match="TLS is for streams"), serve(Echo, "udp://127.0.0.1:0", **words):
            pass
    with serve(Echo, "udp://127.0.0.1:0", "tcp://127.0.0.1:0", tls_cert=str(pki.cert)) as served:
        assert served.url.startswith("udp://")


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_clients_show_certificates_whatever_name_they_ask_for(engine, pki, serving, dial):
    """The authorities are the same for all names."""
    tls = harken.TLS(pki.cert, ca=pki.ca, sni={"other.example": pki.other})
    with serving(engine, Certified, tls=tls) as server:
        for name in ("localhost", "other.example"):
            with dial(server, name, cert=pki.client) as client:
                assert b"ann@example.org" in client.recv(1000)
            with contextlib.suppress(OSError), dial(server, name) as client:
                assert client.recv(1000) == b""


def test_settings_one_by_one(pki, serving, dial):
    """``tls_cert`` and its companions say the same as a TLS, and the operator's stand above the program's."""
    values = {
        "tls_cert": str(pki.cert),
        "tls_ca": str(pki.ca),
        "tls_alpn": ["x"],
        "tls_sni": [f"o.example={pki.other}"],
    }
    with harken.background(harken.TCPServer(LOCAL, Certified, **values)) as server:
        with dial(server, cert=pki.client) as client:
            assert b"ann" in client.recv(1000)
    operator.flags["tls_cert"] = str(pki.other)
    try:
        with harken.background(harken.TCPServer(LOCAL, Echo, tls=harken.TLS(pki.cert))) as server:
            with dial(server, "other.example") as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
    finally:
        operator.flags.clear()


def test_unix_sockets_and_class_attributes(pki, dial, tmp_path):
    """TLS does not ask what carries it, nor where it was said."""

    class Server(harken.UnixStreamServer):
        tls = harken.TLS(pki.cert)

    for engine in ("thread", "green"):
        path = str(tmp_path / engine)
        with harken.background(Server(path, Echo, engine=engine)) as server, dial(server) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"


def test_a_context_for_clients_is_refused():
    """Before it fails at every handshake."""
    with pytest.raises(ConfigError, match="is for clients"):
        harken.TCPServer(LOCAL, Echo, tls=ssl.create_default_context())


# ── renewal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def quick(monkeypatch):
    """Look at the files at every new connection."""
    monkeypatch.setattr("harken.preambles._certificates.LOOK_SECONDS", 0.0)


@pytest.fixture
def news():
    """What was read anew, or was not."""
    seen = []
    unsubscribe = events.subscribe(seen.append, "reloaded", "reload_failed")
    yield seen
    unsubscribe()


def serial(client):
    return client.getpeercert()["serialNumber"]


def issue(pki, path):
    new = path.with_suffix(".new")
    pki.authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(new)
    os.replace(new, path)


@pytest.mark.parametrize("engine", ["thread", "green", "fork"])
def test_a_renewed_certificate_is_taken_up(engine, pki, tmp_path, quick, news, serving, dial):
    """New connections get it, old ones go on, and an event tells."""
    path = tmp_path / "site.pem"
    issue(pki, path)
    with serving(engine, tls=harken.TLS(path)) as server, dial(server) as old:
        issue(pki, path)
        with dial(server) as new:
            assert serial(new) != serial(old)
            new.sendall(b"new")
            assert new.recv(10) == b"new"
        old.sendall(b"old")
        assert old.recv(10) == b"old"
        (event,) = news
        assert (event.name, event.what) == ("reloaded", f"certificates ({path})")


@pytest.mark.parametrize("engine", ["thread", "green"])
def test_a_broken_renewal_keeps_the_old(engine, pki, tmp_path, quick, news, serving, dial):
    """One event says why; the old certificate serves on, and a later good one is taken."""
    path = tmp_path / "site.pem"
    issue(pki, path)
    with serving(engine, tls=harken.TLS(path)) as server:
        with dial(server) as client:
            first = serial(client)
        path.write_text("half a cert")
        for _ in range(3):
            with dial(server) as client:
                assert serial(client) == first
        (event,) = news
        assert event.name == "reload_failed"
        assert str(path) in event.reason
        path.unlink()
        with dial(server) as client:
            assert serial(client) == first
        issue(pki, path)
        with dial(server) as client:
            assert serial(client) != first
        assert [event.name for event in news] == ["reload_failed", "reload_failed", "reloaded"]


def test_reload_on_demand(pki, tmp_path, news, serving, dial):
    """Without waiting for the next look; also by whoever only has the server."""
    path = tmp_path / "site.pem"
    issue(pki, path)
    with serving(tls=harken.TLS(path)) as server:
        with dial(server) as client:
            first = serial(client)
        issue(pki, path)
        assert server._harken.reload()
        with dial(server) as client:
            assert serial(client) != first
        path.write_text("")
        assert not server._harken.reload()
        with dial(server) as client:
            assert serial(client) != first
    assert [event.name for event in news] == ["reloaded", "reload_failed"]


def test_relative_paths_outlive_chdir(pki, tmp_path, monkeypatch, quick, serving, dial):
    """A server that changed its directory finds the files where they were."""
    monkeypatch.chdir(tmp_path)
    issue(pki, tmp_path / "site.pem")
    with serving(tls=harken.TLS("site.pem")) as server:
        monkeypatch.chdir("/")
        issue(pki, tmp_path / "site.pem")
        with dial(server) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
