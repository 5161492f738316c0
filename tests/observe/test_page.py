"""The page of ``metrics``: who is shown what, and who may do what."""

import contextlib
import http.client
import json
import select
import socket
import threading

import pytest

from harken import transports
from harken.errors import ConfigError, LifecycleError
from harken.observe import page
from harken.observe.page import Page
from harken.observe.view import VIEW
from harken.observe.viewers import MAX_VIEWERS

TOKEN = "0123456789abcdef0123"
PATIENCE = 10.0


class Source:
    """A server that can be asked."""

    def __init__(self):
        self.health = {"live": True, "ready": True, "reason": "ready"}
        self.silent = False
        self.left = threading.Event()
        self.killed = []
        self.connections = []

    def ask(self, verb, **arguments):
        """Answer as a service would."""
        if self.silent:
            raise TimeoutError("nobody is there")
        if verb == "kill":
            self.killed.append(arguments["connection"])
            return arguments["connection"] == "known-1"
        answers = {"health": self.health, "figures": [["harken_ready", [], [1.0]]], "status": {"workers": []}}
        answers["connections"] = self.connections
        return answers.get(verb, [])

    def follow(self, connection):
        """Two entries of a trace, and silence after."""
        if connection != "known-1":
            raise ConfigError(f"no connection {connection!r} is open")
        try:
            yield {"connection": connection, "begin": True}
            while True:
                yield None
        finally:
            self.left.set()


class Site:
    """A page that is served, and a client."""

    def __init__(self, token):
        self.source = Source()
        self.listener = transports.listen("tcp://127.0.0.1:0")[0]
        self.address = self.listener.getsockname()
        self.page = Page(self.listener, self.source, token)

    def ask(self, path, method="GET", **headers):
        """Return status, body and headers of the answer."""
        client = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        try:
            client.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            reply = client.getresponse()
            return reply.status, reply.read(), reply.headers
        finally:
            client.close()

    def status(self, path, method="GET", **headers):
        """Return the answer's status."""
        return self.ask(path, method, **headers)[0]

    def watch(self, path="/events", **headers):
        """Begin to watch; return the answer, of which the body is not read yet, and what closes it."""
        client = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        client.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        return client.getresponse(), client


@pytest.fixture
def site():
    """A page with a token."""
    made = Site(TOKEN)
    yield made
    made.page.close()


@pytest.fixture
def mute_site():
    """A page without."""
    made = Site(None)
    yield made
    made.page.close()


BEARER = {"Authorization": f"Bearer {TOKEN}"}


def test_health_says_what_is_wrong(site):
    """200 while all is well, 503 and the reason else; liveness has a word of its own."""
    assert site.ask("/health/ready")[:2] == (200, b"ready\n")
    assert site.ask("/health/live")[:2] == (200, b"live\n")
    site.source.health = {"live": True, "ready": False, "reason": "draining"}
    assert site.ask("/health/ready")[:2] == (503, b"draining\n")
    assert site.status("/health/live") == 200
    site.source.health = {"live": False, "ready": False, "reason": "hung"}
    assert site.status("/health/live") == 503


def test_a_server_that_does_not_answer_is_told(site):
    """Neither a hang nor a traceback: 503."""
    site.source.silent = True
    for path in ("/health/ready", "/health/live", "/metrics"):
        assert site.status(path) == 503


def test_metrics_are_there_for_any_name(site):
    """Prometheus asks by whatever name the machine has."""
    status, body, headers = site.ask("/metrics", Host="server.example:9100")
    assert (status, b"harken_ready 1.0" in body) == (200, True)
    assert headers["Content-Type"].startswith("text/plain")


def test_unknown_paths_and_methods(site):
    """404 and 501, and HEAD has no body."""
    assert site.status("/etc/passwd") == 404
    assert site.status("/connections/known-1", "POST", **BEARER) == 404
    assert site.status("/", "DELETE") == 501
    assert site.ask("/metrics", "HEAD")[1] == b""


def test_the_view_runs_nothing_but_itself(site):
    """Its policy names its own program and style, and no other place than this server."""
    status, body, headers = site.ask("/")
    assert (status, body) == (200, VIEW.text)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https://" not in body


def test_events_come_one_after_the_other(site):
    """Each is a JSON object of all that there is to see."""
    reply, client = site.watch()
    assert reply.headers["Content-Type"] == "text/event-stream"
    for _ in range(2):
        line = reply.readline()
        assert line.startswith(b"data: ")
        seen = json.loads(line[6:])
        assert seen.keys() == {
            *("time", "health", "figures", "status", "settings", "stalls", "connections", "bounds", "may_act"),
        }
        assert reply.readline() == b"\n"
    client.close()


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Host": "localhost:9100"}, 200),
        ({"Host": "[::1]:9100"}, 200),
        ({"Host": "evil.example"}, 403),  # a name that means this machine's address
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "evil.example", **BEARER}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"X-Forwarded-For": "192.0.2.1"}, 403),  # a proxy on this machine speaks for another
        ({"X-Real-IP": "192.0.2.1"}, 403),
        ({"x-forwarded-host": "service.example"}, 403),
        ({"X-Forwarded-For": "192.0.2.1", **BEARER}, 200),
        ({"X-Forwarded-For": "192.0.2.1", "Authorization": "Bearer wrong"}, 403),
    ],
)
def test_connections_are_shown_to_this_machine_or_by_the_token(site, headers, status):
    """Nobody else sees who talks to the service."""
    reply, client = site.watch(**headers)
    assert reply.status == status
    client.close()


@pytest.mark.parametrize(
    "headers, status",
    [
        (BEARER, 200),
        ({"Authorization": f"bearer {TOKEN}"}, 200),
        ({"Authorization": f"Basic xBearer {TOKEN}"}, 403),
        ({}, 403),
        ({"Authorization": "Bearer " + TOKEN[:-1]}, 403),
        ({"Authorization": "Bearer ä"}, 403),
        ({"Origin": "https://evil.example", **BEARER}, 403),
        ({"Sec-Fetch-Site": "cross-site", **BEARER}, 403),
    ],
)
def test_killing_takes_the_token(site, headers, status):
    """And a page of the same site, where a browser asks."""
    headers = {name: value.encode() for name, value in headers.items()}
    assert site.status("/connections/known-1/kill", "POST", **headers) == status
    assert site.source.killed == (["known-1"] if status == 200 else [])


def test_killing_says_when_nobody_was_there(site):
    """404 with a JSON object."""
    status, body, _ = site.ask("/connections/no%2Fone/kill", "POST", **BEARER)
    assert (status, json.loads(body)) == (404, {"closed": False})
    assert site.source.killed == ["no/one"]


def test_following_takes_the_token_and_ends_with_the_reader(site):
    """Entries come as events; whoever leaves is noticed though nothing moves."""
    assert site.status("/connections/known-1/trace") == 403
    assert b"no connection 'other' is open" in site.ask("/connections/other/trace", **BEARER)[1]
    reply, client = site.watch("/connections/known-1/trace", **BEARER)
    assert json.loads(reply.readline()[6:]) == {"connection": "known-1", "begin": True}
    reply.close()
    client.close()
    assert site.source.left.wait(PATIENCE)


def test_without_a_token_nobody_kills(mute_site):
    """No word opens what has no key."""
    for headers in ({}, BEARER, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
        assert mute_site.status("/connections/known-1/kill", "POST", **headers) == 403
    assert mute_site.source.killed == []


def test_viewers_are_bounded(site):
    """One more is told so, and welcome when another has left."""
    watching = [site.watch() for _ in range(MAX_VIEWERS)]
    assert {reply.status for reply, _ in watching} == {200}
    assert site.status("/events") == 503
    for reply, client in watching:
        reply.close()
        client.close()
    free = threading.Event()
    while not free.wait(0.05):
        reply, client = site.watch()
        if reply.status == 200:
            free.set()
        client.close()


def test_nothing_is_looked_at_while_nobody_watches(site):
    """The last viewer's leaving ends the looks."""
    reply, client = site.watch()
    assert reply.readline()
    looker = site.page.viewers._thread
    reply.close()
    client.close()
    looker.join(PATIENCE)
    assert not looker.is_alive()


def test_viewers_are_told_that_there_is_no_news(site):
    """Else they would go on to see what was."""
    reply, client = site.watch()
    assert b'"health"' in reply.readline()
    site.source.silent = True
    said = {reply.readline() for _ in range(6)}
    assert b'data: {"error": "the server does not answer"}\n' in said
    client.close()


def test_the_oldest_connections_are_shown_whoever_has_them(site, monkeypatch):
    """Workers answer one after the other, each with its own oldest."""
    monkeypatch.setattr(page, "MOST_CONNECTIONS", 3)
    site.source.connections = [{"id": str(at), "opened_at": at} for at in (1, 4, 6, 2, 3, 5)]
    reply, client = site.watch()
    assert [each["id"] for each in json.loads(reply.readline()[6:])["connections"]] == ["1", "2", "3"]
    client.close()


def test_garbage_is_refused_in_one_answer(site):
    """A line that is no HTTP gets 400, and the connection ends."""
    with socket.create_connection(site.address, PATIENCE) as client:
        client.sendall(b"\x16\x03\x01 nonsense of no protocol at all\r\n\r\n")
        assert b"400" in client.makefile("rb").read()


@pytest.mark.parametrize(
    "path, headers, status",
    [
        ("http://[", {"Host": "localhost"}, 400),
        ("/events", {"Host": "["}, 403),
        ("/events", {"Origin": "http://["}, 403),
        ("/metrics", {"Accept": "text/plain; version=a.b"}, 200),
        ("/metrics", {"Accept": "application/openmetrics-text; version=1.0.0; escaping=zz"}, 200),
        ("/metrics", {"Accept": ";;;===,"}, 200),
    ],
)
def test_nonsense_in_a_head_is_answered(site, path, headers, status, capfd):
    """A peer's fault is no fault of ours: no traceback tells of it."""
    assert site.status(path, **headers) == status
    assert capfd.readouterr().err == ""


def test_what_nobody_foresaw_is_told_once(site, capfd):
    """The log is not the clients' to fill."""
    site.source.health = None
    for _ in range(2):
        with pytest.raises(http.client.RemoteDisconnected):
            site.ask("/health/ready")
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_question_that_is_refused_is_told(site, monkeypatch):
    """As one that nobody answers."""

    def refuse(verb, **_arguments):
        raise LifecycleError(f"no {verb} while it ends")

    monkeypatch.setattr(site.source, "ask", refuse)
    assert site.status("/metrics") == 503


def test_a_head_that_dribbles_has_one_deadline(site, monkeypatch):
    """However little is sent at a time, and however often."""
    monkeypatch.setattr(page, "HEAD_SECONDS", 0.2)
    with socket.create_connection(site.address, PATIENCE) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
        for _ in range(99):  # as many headers as http.client takes
            client.sendall(b"a: b\r\n")
            if select.select([client], [], [], 0.05)[0]:
                break
        else:
            pytest.fail("it was listened to all the while")
        with contextlib.suppress(ConnectionResetError):  # what was sent after the end
            assert client.recv(1) == b""


def test_those_who_say_nothing_keep_nobody_out(monkeypatch):
    """When there is no room the longest idle goes."""
    monkeypatch.setitem(page._LIMITS, "max_connections", 2)
    site = Site(None)
    idle = [socket.create_connection(site.address, PATIENCE) for _ in range(2)]
    for client in idle:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
    assert [site.status("/health/live") for _ in range(3)] == [200, 200, 200]
    assert idle[0].recv(1) == b""
    for client in idle:
        client.close()
    site.page.close()
