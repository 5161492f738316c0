"""The address of the setting ``metrics``: Prometheus' page, health, and a live view, each answered by who knows.

It is served by the standard library's HTTP handler on a server of harken's own, which bounds how many come and how long
they take. It shows figures to whoever can connect, as Prometheus expects. Connections, which say who talks to the
service, it shows to this machine, and to others by the token; what changes anything takes the token in any case.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from harken.connection import peer_fault
from harken.errors import HarkenError
from harken.listener import Listener
from harken.meter import SECONDS
from harken.mixins import ThreadingMixIn
from harken.observe.exposition import expose
from harken.observe.figures import Figures
from harken.observe.view import VIEW
from harken.observe.viewers import Viewers
from harken.reaper import reaper
from harken.server import BaseServer, TCPServer
from harken.serving import serving_of

__all__ = ["Page", "Source"]

# Bounds of those who connect: a few Prometheus servers, probes and people. When there are more, the longest idle goes.
_LIMITS: dict[str, Any] = {
    "engine": "thread",
    "max_connections": 64,
    "overload": "shed",
    "write_timeout": 10.0,
}
# Seconds from connecting to the end of a request's head, however it dribbles in.
HEAD_SECONDS = 10.0
# Connections that the live view shows: more than a person reads, and a browser draws them within a few milliseconds.
MOST_CONNECTIONS = 500
# Seconds that answers which are under way get to notice that the page closes.
LEAVE_SECONDS = 1.0
# Headers of proxies, beside X-Forwarded-…: whoever sends one speaks for somebody else, who may be anywhere.
_FORWARDED = {"forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "client-ip", "true-client-ip"}
_FORWARDED |= {"cf-connecting-ip", "x-original-forwarded-for"}


class Source(Protocol):
    """Who knows: the supervisor, or the servers of this process."""

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Return the answer; any thread.

        Raises:
            OSError: nobody answers in time.
            HarkenError: the question was refused.
        """

    def follow(self, connection: str) -> Iterator[dict[str, Any] | None]:
        """Return what a connection moves, entry by entry as ``ctl trace`` shows it, and None now and then meanwhile.

        Closing the iterator ends it.
        """


class Page:
    """Serves the address until closed."""

    def __init__(self, listener: Listener, source: Source, token: str | None) -> None:
        """Begin to serve, in threads.

        Args:
            listener: open; closed by :meth:`close`.
            source: who answers.
            token: what those must know who want to change something; None: nobody may.
        """
        self.source = source
        self.token = token
        self.viewers = Viewers(self._look)
        self._server = _Server(listener, self)
        self._thread = threading.Thread(target=self._server.serve_forever, name="harken-page", daemon=True)
        self._thread.start()

    def _look(self) -> dict[str, Any]:
        ask = self.source.ask
        return {
            "time": time.time(),
            "health": ask("health"),
            "figures": ask("figures"),
            "status": ask("status"),
            "settings": ask("settings"),
            "stalls": ask("stalls"),
            "connections": self._oldest(ask("connections", most=MOST_CONNECTIONS)),
            "bounds": SECONDS,
            "may_act": self.token is not None,
        }

    @staticmethod
    def _oldest(connections: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The oldest of all: each worker, and each of its servers, has told its own."""
        return sorted(connections, key=lambda each: each["opened_at"])[:MOST_CONNECTIONS]

    def close(self) -> None:
        """Hang up on everybody and close the listener."""
        self.viewers.close()
        self._server.shutdown()
        self._thread.join()
        self._server.end()

    def after_fork(self) -> None:
        """In a child of this process: the page is the parent's."""
        self._server.socket.close()


class _Server(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False
    unobserved = True  # harken's own: no event tells of it
    _told = False

    def __init__(self, listener: Listener, page: Page) -> None:
        BaseServer.__init__(self, listener.getsockname(), _Handler)
        serving_of(self, _LIMITS, "private")
        self.socket = listener
        self.page = page
        self.local = listener.url.startswith("unix:")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What nobody foresaw is told once: whoever can connect could repeat it."""
        if not self._told:
            self._told = True
            super().handle_error(request, client_address)

    def end(self) -> None:
        serving = self._harken
        serving.cut("shutdown")
        serving.connections.wait_for(lambda: not serving.connections, LEAVE_SECONDS)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "harken"
    sys_version = ""
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: whoever scrapes does so every few seconds."""

    def handle_one_request(self) -> None:
        """One request a connection: it then holds no thread."""
        self._bell = reaper.call_at(time.monotonic() + HEAD_SECONDS, self._cut)
        try:
            super().handle_one_request()
        except OSError:
            pass  # the client has gone, or was too slow
        finally:
            reaper.cancel(self._bell)
        self.close_connection = True

    def _cut(self) -> None:
        record = self.server._harken.connections.find(self.request)
        if record is not None:
            record.cut("read_timeout")

    def parse_request(self) -> bool:
        """Read the rest of the head; tell whether it can be answered."""
        understood = super().parse_request()
        reaper.cancel(self._bell)
        if understood:
            try:
                self._path = urlsplit(self.path).path
            except ValueError as error:  # no such host, say
                self.send_error(HTTPStatus.BAD_REQUEST, explain=str(error))
                return False
        return understood

    # -- what is asked for ---------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        """Answer what can be looked at."""
        answer = {
            "/": self._view,
            "/metrics": self._metrics,
            "/health/live": self._live,
            "/health/ready": self._ready,
            "/events": self._events,
        }.get(self._path)
        connection = self._connection_to("trace")
        if connection is not None:
            answer = partial(self._trace, connection)
        self._answer(answer or self._unknown)

    def do_HEAD(self) -> None:
        """Answer as GET, without the body."""
        self.do_GET()

    def do_POST(self) -> None:
        """Do what can be done to a connection: ``/connections/ID/kill``."""
        connection = self._connection_to("kill")
        self._answer(self._unknown if connection is None else partial(self._kill, connection))

    def _connection_to(self, verb: str) -> str | None:
        """Return the connection of ``/connections/ID/VERB``; None when another path or verb was asked for."""
        parts = self._path.split("/")
        return unquote(parts[2]) if len(parts) == 4 and parts[1] == "connections" and parts[3] == verb else None

    def _answer(self, answer: Callable[[], None]) -> None:
        try:
            answer()
        except (TimeoutError, HarkenError):
            self._tell(HTTPStatus.SERVICE_UNAVAILABLE, "the server does not answer\n")

    def _unknown(self) -> None:
        self._tell(HTTPStatus.NOT_FOUND, "there are /, /metrics, /health/live and /health/ready\n")

    def _metrics(self) -> None:
        figures = Figures(self.server.page.source.ask("figures"))
        text, content_type = expose(figures, self.headers.get("Accept", ""))
        self._send(HTTPStatus.OK, text, content_type)

    def _live(self) -> None:
        health = self.server.page.source.ask("health")
        self._tell(*((HTTPStatus.OK, "live\n") if health["live"] else (HTTPStatus.SERVICE_UNAVAILABLE, "hung\n")))

    def _ready(self) -> None:
        health = self.server.page.source.ask("health")
        word = health["reason"] + "\n"
        self._tell(HTTPStatus.OK if health["ready"] else HTTPStatus.SERVICE_UNAVAILABLE, word)

    def _view(self) -> None:
        self._send(HTTPStatus.OK, VIEW.text, "text/html; charset=utf-8", policy=VIEW.policy)

    def _events(self) -> None:
        if not self._may_look:
            self._forbid("other machines need the token to see connections")
            return
        with self.server.page.viewers.watching() as seen:
            if seen is None:
                self._tell(HTTPStatus.SERVICE_UNAVAILABLE, "too many watch already\n")
                return
            self._head(HTTPStatus.OK, "text/event-stream")
            for each in seen if self.command == "GET" else ():
                self._tell_event(each)

    def _tell_event(self, data: bytes) -> None:
        self.wfile.write(b"data: " + data + b"\n\n")

    def _trace(self, connection: str) -> None:
        if not self._may_act:
            self._forbid("following a connection needs the token of metrics_token")
            return
        self._head(HTTPStatus.OK, "text/event-stream")
        if self.command != "GET":
            return
        with closing(self.server.page.source.follow(connection)) as entries:
            try:
                for entry in entries:
                    if entry is not None:
                        self._tell_event(json.dumps(entry).encode())
                    elif peer_fault(self.connection):
                        return
            except HarkenError as error:
                self._tell_event(json.dumps({"error": str(error)}).encode())

    def _kill(self, connection: str) -> None:
        if not self._may_act:
            self._forbid("closing a connection needs the token of metrics_token")
            return
        found = self.server.page.source.ask("kill", connection=connection, reason="killed from the live view")
        self._send(
            HTTPStatus.OK if found else HTTPStatus.NOT_FOUND, json.dumps({"closed": found}).encode(), "application/json"
        )

    # -- who may -------------------------------------------------------------------------------------------------------

    @property
    def _has_token(self) -> bool:
        """Whether the request knows the token. The comparison takes as long whatever is wrong."""
        token = self.server.page.token
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        return (
            token is not None
            and scheme.lower() == "bearer"
            and hmac.compare_digest(given.strip().encode(), token.encode())
        )

    @property
    def _may_act(self) -> bool:
        return self._has_token and self._is_own_page

    @property
    def _may_look(self) -> bool:
        """Whether the request comes from this machine, and not from a page of another site; or knows the token."""
        return (self._is_near and self._is_own_page) or self._has_token

    @property
    def _is_near(self) -> bool:
        names = {name.lower() for name in self.headers}
        if names & _FORWARDED or any(name.startswith("x-forwarded") for name in names):
            return False
        return self.server.local or ipaddress.ip_address(self.client_address[0].partition("%")[0]).is_loopback

    @property
    def _is_own_page(self) -> bool:
        """Whether no page of another site makes the browser ask.

        A site can make its name mean this machine's address (DNS rebinding), but not its name a number or localhost;
        and a browser says from where it asks.
        """
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return False
        if origin is not None and _split(origin).netloc != host:
            return False
        return self._has_token or self.server.local or _is_number_or_localhost(host)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _forbid(self, why: str) -> None:
        self._tell(HTTPStatus.FORBIDDEN, why + "\n")

    def _tell(self, status: HTTPStatus, text: str) -> None:
        self._send(status, text.encode(), "text/plain; charset=utf-8")

    def _send(self, status: HTTPStatus, body: bytes, content_type: str, policy: str = "default-src 'none'") -> None:
        self._head(status, content_type, policy=policy, length=len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(
        self, status: HTTPStatus, content_type: str, *, policy: str = "default-src 'none'", length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Connection", "close")
        self.end_headers()


def _split(url: str) -> SplitResult:
    """Take a URL apart; one that is none has no parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _is_number_or_localhost(host: str) -> bool:
    name = _split("//" + host).hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
