"""A real browser, and a service for it to look at."""

import re
import shutil
import socket
import subprocess

import pytest

PATIENCE = 20.0  # seconds; a start takes one, on a busy machine some
TOKEN = "0123456789abcdef0123"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

HANDLER = """
import time, harken
class Echo(harken.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(1000):
            if data == b"stall\\n":
                time.sleep(0.3)
            self.request.sendall(data)
"""


class Service:
    """A running service, and its clients."""

    def __init__(self, process):
        self._clients = []
        self.token = TOKEN
        self.log = []
        self.port = int(self._wait(process, r"listening: address tcp://127\.0\.0\.1:(\d+),"))
        self.view = self._wait(process, r"page opened: address (http://\S+)")

    def _wait(self, process, pattern):
        for line in process.stderr:
            self.log.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError("it did not start:\n" + "".join(self.log))

    def connect(self, say=b"hello\n"):
        """Open a connection on which ``say`` went both ways; return it, and how it is shown."""
        client = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        self._clients.append(client)
        client.sendall(say)
        assert client.recv(1000) == say
        host, port = client.getsockname()
        return client, f"{host}:{port}"

    def close(self):
        """Close all connections."""
        for client in self._clients:
            client.close()


@pytest.fixture
def service(run_program, tmp_path):
    """Two workers of the green engine, with a token."""
    (tmp_path / "app.py").write_text(HANDLER)
    (tmp_path / "token").write_text(TOKEN)
    words = f"serve {tmp_path / 'app.py'}:Echo --bind tcp://127.0.0.1:0 --engine green --workers 2".split()
    page = f"--metrics tcp://127.0.0.1:0 --metrics-token {tmp_path / 'token'}".split()
    process = run_program("-m", "harken", *words, *page, stdout=subprocess.DEVNULL)
    started = Service(process)
    yield started
    started.close()


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window."""
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        # --no-sandbox: Chromium's own sandbox refuses to run as root, as CI does.
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, service):
    """Return a function that opens the view: ``visit(color_scheme="dark", width=400)``."""
    contexts = []

    def open_view(*, width=1200, height=1000, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE * 1000)
        page = context.new_page()
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(service.view)
        page.get_by_text("ready", exact=True).first.wait_for()
        return page

    yield open_view
    for context in contexts:
        context.close()
