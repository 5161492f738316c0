"""``harken top``: a running server seen, sorted, filtered and changed by keys, in textual's pilot."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from textual.events import Paste
from textual.widgets import Static
from textual.widgets._toast import Toast

from harken.cli import asking
from harken.cli._top import columns
from harken.cli._top.app import Top
from harken.cli._top.screens import Confirm, Help, Trace
from harken.cli._top.service import Look, Rates, Service
from harken.cli._top.table import Table
from harken.cli._top.words import size, span
from harken.observe.figures import Figures

SECONDS = 20.0

APP = """
import time
import harken
class Echo(harken.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"hello\\n")
        while data := self.request.recv(100):
            if data == b"stall":
                until = time.monotonic() + 0.3
                while time.monotonic() < until:
                    pass
            self.request.sendall(data)
"""


class Running:
    """A server that can be started again, and its control socket."""

    def __init__(self, run, directory, *words):
        (directory / "app.py").write_text(APP)
        self.path = str(directory / "ctl.sock")
        self._run, self._directory, self._words = run, directory, words
        self.start()

    def start(self):
        """Start it, and wait until it serves."""
        words = ("--bind", "tcp://127.0.0.1:0", "--control", self.path, *self._words)
        self.process = self._run("-m", "harken", "serve", "app:Echo", *words, cwd=self._directory)
        line = self.process.stderr.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        assert found, line + self.process.stderr.read()
        self.port = int(found[1])
        for _ in range("--workers" in self._words and int(self._words[self._words.index("--workers") + 1])):
            while "worker started" not in self.process.stderr.readline():
                pass

    def connect(self):
        """Return a client that was greeted."""
        client = socket.create_connection(("127.0.0.1", self.port), SECONDS)
        assert client.recv(100) == b"hello\n"
        return client

    def kill(self):
        """End it as no server wants to end."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(SECONDS)


@pytest.fixture
def start(run_program, tmp_path):
    """Return a function that starts a server with these options."""
    return lambda *words: Running(run_program, tmp_path, *words)


def watch(path, act, size=(100, 30), notifications=False):
    """Run ``act(see)`` beside a view of the server at ``path``; textual's pilot shows notifications if asked alone."""

    async def run():
        top = Top(path)
        async with top.run_test(size=size, notifications=notifications) as pilot:
            await act(See(top, pilot))

    asyncio.run(run())


class See:
    """What a user sees and presses."""

    def __init__(self, top, pilot):
        self.top = top
        self.press = pilot.press
        self._pause = pilot.pause

    async def until(self, question, what):
        """Wait until the answer is true, and return it."""
        deadline = time.monotonic() + SECONDS
        while not (answer := question()):
            assert time.monotonic() < deadline, f"not seen: {what}\n{self.head()}\n{self.lines()}"
            await self._pause(0.05)
        return answer

    def head(self):
        """The line at the top."""
        return str(self.top.query_one("#head").render())

    def figures(self):
        """The line of figures."""
        return str(self.top.query_one("#figures").render())

    def lines(self, tab="connections"):
        """A table's rows as shown."""
        table = self.top.query_one(f"#{tab}").query_one(Table)
        return [" ".join(cell.plain for cell in table.get_row_at(at)) for at in range(table.row_count)]

    async def filter(self, text):
        """Paste a filter."""
        await self.press("slash")
        self.top.query_one("#filter").post_message(Paste(text))

    async def until_lines(self, count, tab="connections"):
        """Wait for so many rows."""
        await self.until(lambda: len(self.lines(tab)) == count, f"{count} {tab}")
        return self.lines(tab)


def address(client):
    """A client's address, as the table has it."""
    return f"127.0.0.1:{client.getsockname()[1]}"


@pytest.mark.parametrize("workers", ["0", "2"], ids=["alone", "workers"])
def test_a_connection_appears_and_is_closed_by_keys(start, workers):
    """Among them the worker that has it, and the server's address and state."""
    running = start("--workers", workers)

    async def act(see):
        await see.until_lines(0)
        with running.connect() as client:
            (line,) = await see.until_lines(1)
            assert line.startswith(address(client))
            assert f"tcp://127.0.0.1:{running.port} thread serving" in see.head()
            await see.until(lambda: "open 1" in see.figures(), "how many are open")
            await see.until(lambda: sum(int(each.split()[2]) for each in see.lines("workers")) == 1, "its worker")
            assert all("MiB" in each for each in see.lines("workers"))
            assert "idle_timeout 300.0 seconds" in see.lines("limits")
            await see.press("k")
            await see.until(lambda: isinstance(see.top.screen, Confirm), "the question")
            await see.press("n", "k", "y")
            await see.until_lines(0)
            assert client.recv(100) == b""

    watch(running.path, act)


def test_a_name_that_looks_like_markup_is_a_name(start, tmp_path):
    """A client of a Unix socket chooses its own: in the table, in the question and in the answer."""
    path = tmp_path / "app.sock"
    running = start("--bind", f"unix:{path}")

    async def act(see):
        with socket.socket(socket.AF_UNIX) as client:
            client.bind(f"\0{os.getpid()}[/red]b\x1b[2J")
            client.connect(str(path))
            name = f"{os.getpid()}[/red]b\\x1b[2J"
            (line,) = await see.until_lines(1)
            assert name in line
            await see.press("k")
            await see.until(lambda: isinstance(see.top.screen, Confirm), "the question")
            assert name in str(see.top.screen.query_one(Static).render())
            await see.press("y")
            await see.until(lambda: see.top.screen.query(Toast), "the answer")
            assert name in str(see.top.screen.query_one(Toast).render())

    watch(running.path, act, notifications=True)


def test_connections_are_sorted_and_the_chosen_one_stays_chosen(start):
    """By the next column, the other way round, and by a click on a head."""
    running = start("--workers", "0")

    async def act(see):
        with ExitStack() as clients:
            old = clients.enter_context(running.connect())
            await asyncio.sleep(0.05)  # so much older
            new = clients.enter_context(running.connect())
            new.sendall(b"x" * 50)
            await see.until_lines(2)
            see.top.action_tab("connections")
            await see.until(lambda: address(old) in see.lines()[0], "the older one first")
            table = see.top.query_one("#connections").query_one(Table)
            assert table.chosen in see.lines()[0]
            await see.press("r")
            await see.until(lambda: address(new) in see.lines()[0], "the younger one first")
            assert table.cursor_row == 1
            await see.press("home")
            assert table.cursor_row == 0
            await see.press("end")
            assert table.cursor_row == 1
            await see.press("s", "s")
            assert table.order == "In"
            await see.until(lambda: address(new) in see.lines()[0], "the busier one first")
            await see.press("r")
            await see.until(lambda: address(old) in see.lines()[0], "the quieter one first")

    watch(running.path, act)


def test_connections_are_filtered(start):
    """By network and by text; Enter keeps the filter, Escape clears it."""
    running = start("--workers", "0")

    async def act(see):
        with running.connect() as one, running.connect():
            await see.until_lines(2)
            await see.filter("10.0.0.0/8")
            await see.until_lines(0)
            await see.press("escape")
            await see.until_lines(2)
            await see.filter("127.0.0.0/8")
            await see.until_lines(2)
            await see.press("escape")
            await see.filter(address(one))
            (line,) = await see.until_lines(1)
            assert address(one) in line
            await see.press("enter", "k", "y")
            await see.until_lines(0)
            await see.press("escape")
            await see.until_lines(1)

    watch(running.path, act)


def test_a_connection_is_traced_by_keys(start):
    """What it sends is seen, in text and in hexadecimal; the keys of the tables do nothing meanwhile."""
    running = start("--workers", "0")

    async def act(see):
        with running.connect() as client:
            await see.until_lines(1)
            await see.press("t")
            await see.until(lambda: isinstance(see.top.screen, Trace), "the trace")
            log = see.top.screen.query_one("RichLog")

            def seen():
                return "\n".join(line.text for line in log.lines)

            await see.until(lambda: "following" in seen(), "its beginning")
            client.sendall(b"what goes by")
            await see.until(lambda: "out    12  what goes by" in seen(), "the text")
            await see.press("k", "D", "x")
            assert isinstance(see.top.screen, Trace)
            await see.until(lambda: seen().count("following") == 2, "the other form")
            client.sendall(b"\xff\x00")
            await see.until(lambda: "ff 00" in seen(), "the bytes")
            await see.press("escape")
            await see.until(lambda: len(see.top.screen_stack) == 1, "the tables again")

    watch(running.path, act)


def test_a_server_is_suspended_resumed_and_drained(start):
    """Each after a question."""
    running = start("--workers", "2")

    async def act(see):
        await see.until(lambda: "serving" in see.head(), "the state")
        await see.press("S", "y")
        await see.until(lambda: "suspended" in see.head(), "suspended")
        await see.press("R", "y")
        await see.until(lambda: "serving" in see.head(), "resumed")
        await see.press("D", "y")
        await see.until(lambda: "gone: no server answers" in see.head(), "its end")

    watch(running.path, act)
    assert running.process.wait(SECONDS) == 0


def test_a_server_goes_and_comes_back(start):
    """It says so, keeps what was seen last, and goes on with the next server at the same path."""
    running = start("--workers", "0")

    async def act(see):
        with running.connect():
            await see.until_lines(1)
            running.kill()
            await see.until(lambda: "gone: no server answers" in see.head(), "that it has gone")
            assert see.top.query_one("#head").has_class("lost")
            assert len(see.lines()) == 1
            await see.press("k", "y")  # there is nobody to do it
        running.start()
        await see.until_lines(0)
        assert not see.top.query_one("#head").has_class("lost")
        with running.connect() as client:
            (line,) = await see.until_lines(1)
            assert line.startswith(address(client))

    watch(running.path, act)


@pytest.mark.parametrize("words", [(), ("--metrics", "tcp://127.0.0.1:0")], ids=["plain", "metrics"])
def test_stalls_are_shown_with_their_place(start, words):
    """The file and line of what kept the green threads waiting."""
    running = start("--workers", "2", "--engine", "green", *words)

    async def act(see):
        with running.connect() as client:
            client.sendall(b"stall")
            assert client.recv(100) == b"stall"
            await see.press("4")
            (line,) = await see.until_lines(1, "stalls")
            assert re.search(r"app\.py:1[01]\b", line), line

    watch(running.path, act)


def test_a_small_terminal_is_enough_and_help_is_at_hand(start):
    """Of 40 columns and 10 lines; the picture can be held."""
    running = start("--workers", "0")

    async def act(see):
        with running.connect():
            await see.until_lines(1)
            table = see.top.query_one("#connections").query_one(Table)
            assert table.size.height >= 2
            assert not see.top.query_one("Footer").display
            await see.press("question_mark")
            await see.until(lambda: isinstance(see.top.screen, Help), "the keys")
            await see.press("escape", "p")
        await see.press("2")
        assert len(see.lines()) == 1
        await see.press("p")
        await see.until_lines(0)

    watch(running.path, act, size=(40, 10))


def test_a_server_that_hangs_does_not_keep_the_view_from_ending(start, monkeypatch):
    """Whoever waits for an answer is let go, long before that is given up."""
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 3600.0)
    running = start("--workers", "0")

    async def act(see):
        await see.until(lambda: "serving" in see.head(), "the state")
        os.kill(running.process.pid, signal.SIGSTOP)
        await see.until(lambda: see.top.service._open, "a question that waits")

    watch(running.path, act)


def look(accepted, figures=(), **connections):
    """What was seen of a server with connections, by id, that moved so many bytes each way."""
    rows = [{"id": name, "bytes_in": taken, "bytes_out": sent} for name, (taken, sent) in connections.items()]
    server = {"accepted_total": accepted, "stalled_total": {}}
    return Look({"servers": [server]}, {}, Figures(figures), [], [], rows, time=float(accepted))


def test_rates_are_of_two_looks():
    """From counters where the server has them, else from connections; never below zero."""
    rates = Rates.between(look(10, a=(100, 10), b=(5, 5)), look(20, a=(150, 20), c=(None, 30)))
    assert rates == Rates(opened=1.0, bytes_in=5.0, bytes_out=4.0)
    names = "harken_accepted_total", "harken_connections_opened_total", "harken_received_bytes_total"
    before = [[name, ["tcp://x"], [10]] for name in names]
    now = [[name, ["tcp://x"], [30]] for name in names] + [["harken_sent_bytes_total", ["tcp://x"], [40]]]
    assert Rates.between(look(10, before), look(20, now)) == Rates(2.0, 2.0, 4.0)
    assert Rates.between(look(20, now), look(30, before)) == Rates(0.0, 0.0, 0.0)


def test_a_filter_takes_networks_addresses_and_texts():
    """IPv6 too; a number that is no address is a text."""
    hosts = [("10.0.0.7", 8800), ("::1", 99), ("", None)]
    rows = [{"id": f"a-{port}", "peer": {"address": host, "port": port}} for host, port in hosts]
    found = {
        wanted: [row["id"] for row in columns.matching(rows, wanted)]
        for wanted in ("", "10.0.0.0/8", "10.0.0.7", "::1", "8800", "UNIX", "[::1]:9")
    }
    assert found == {
        "": ["a-8800", "a-99", "a-None"],
        "10.0.0.0/8": ["a-8800"],
        "10.0.0.7": ["a-8800"],
        "::1": ["a-99"],
        "8800": ["a-8800"],
        "UNIX": ["a-None"],
        "[::1]:9": ["a-99"],
    }


def test_numbers_have_units():
    """As people read them."""
    assert [size(each) for each in (None, 0, 1023, 1024, 5 << 20, 3 << 30, 2 << 40)] == [
        *("", "0 B", "1023 B", "1.0 KiB", "5.0 MiB", "3.0 GiB", "2.0 TiB")
    ]
    assert [span(each) for each in (None, 0.25, 59.9, 61, 3700)] == ["", "250 ms", "59.9 s", "1 min 01 s", "1 h 01 min"]


def in_terminal(*words, env=None):
    """Run ``harken top`` with a terminal of its own; return its status and the last line it wrote."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "harken", "top", *words]
    try:
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **(env or {})}
        )
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 4096)
            except OSError:  # EIO: it has ended
                return process.wait(SECONDS), said.decode().strip()
    finally:
        os.close(ours)


def test_what_is_wrong_from_the_start_is_one_line(harken, tmp_path):
    """No terminal, no server, no textual: status 1, and what to do."""
    assert "needs a terminal" in harken("top").err
    status, said = in_terminal("--socket", str(tmp_path / "none.sock"))
    assert (status, said.count("\n")) == (1, 0)
    assert "no server answers" in said
    (tmp_path / "textual.py").write_text("raise ModuleNotFoundError('no textual', name='textual')")
    status, said = in_terminal(env={"PYTHONPATH": str(tmp_path)})
    assert (status, said) == (1, "harken: harken top needs textual: pip install 'harken[top]'")


def test_a_stranger_at_the_path_is_named(tmp_path, harken):
    """Something else that listens there is no server of harken."""
    path = str(tmp_path / "other.sock")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()

        async def act():
            asked = asyncio.create_task(asyncio.to_thread(Service(path).ask, "status"))
            client, _ = await asyncio.to_thread(other.accept)
            with client:
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n")
                with pytest.raises(asking.Refused, match="no server of harken"):
                    await asked

        asyncio.run(act())


def test_a_signal_that_ends_it_gives_the_terminal_back(start):
    """Out of the other screen, and with no reports of the mouse, which a shell would take for words."""
    server = start()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "harken", "top", "--socket", server.path], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: it has ended
        while True:
            said += os.read(ours, 4096)
            if b"serving" in said:
                process.terminate()
    os.close(ours)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    assert said.rindex(b"\x1b[?1049l") > said.rindex(b"\x1b[?1049h")
    assert said.rindex(b"\x1b[?1000l") > said.rindex(b"\x1b[?1000h")
