"""The screen of ``harken top``."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress
from typing import Any, ClassVar

from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Input, Static, TabbedContent, TabPane

from harken.cli._top import columns
from harken.cli._top.screens import Confirm, Help, Trace
from harken.cli._top.service import Look, Rates, Service
from harken.cli._top.table import MOST_ROWS, Table
from harken.cli._top.words import size
from harken.cli.asking import Refused
from harken.cli.ctl import workers_text

__all__ = ["Top"]

# Seconds from look to look: people read no faster, and a server feels nothing of it.
LOOK_SECONDS = 1.0

_ABOUT_TABLES = frozenset("filter sort turn kill trace suspend resume drain hold clear tab".split())
_TABS = ("connections", "workers", "limits", "stalls")


class Top(App[None]):
    """Looks once a second, and shows what it sees."""

    ENABLE_COMMAND_PALETTE = False
    VERTICAL_BREAKPOINTS = [(0, "-low"), (14, "-tall")]  # noqa: RUF012 - declared so by textual
    # Reverse and bold say it where there are no colours.
    CSS = """
    #head, #figures { height: auto; max-height: 2; padding: 0 1; }
    #head { text-style: bold; }
    #head.lost { text-style: bold reverse; }
    #filter { height: 1; border: none; padding: 0 1; display: none; }
    #filter.used { display: block; }
    TabbedContent { height: 1fr; }
    TabPane { padding: 0; }
    Tab.-active { text-style: bold reverse; }
    Table { height: 1fr; }
    Table > .datatable--cursor { text-style: reverse bold; }
    .-low Footer, .-low Underline { display: none; }
    Confirm, Help { align: center middle; }
    .box { width: auto; max-width: 90%; height: auto; max-height: 90%; border: solid $foreground; padding: 0 1; }
    .box Static { width: auto; max-width: 100%; }
    Confirm Horizontal { width: auto; height: 1; margin-top: 1; }
    Confirm Button { margin-right: 2; }
    Confirm Button:focus { text-style: reverse; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("question_mark", "help", "Help"),
        ("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
        ("slash", "filter", "Filter"),
        ("s", "sort", "Sort"),
        ("r", "turn", "Turn"),
        ("k", "kill", "Close"),
        ("t", "trace", "Trace"),
        ("S", "suspend", "Suspend"),
        ("R", "resume", "Resume"),
        ("D", "drain", "Drain"),
        ("p", "hold", "Hold"),
        Binding("escape", "clear", show=False),
        *(Binding(str(number), f"tab('{name}')", show=False) for number, name in enumerate(_TABS, 1)),
    ]

    def __init__(self, path: str) -> None:
        """Look at nothing yet.

        Args:
            path: of the control socket; a server that comes there later is as good.
        """
        super().__init__()
        self.service = Service(path)
        self._look: Look | None = None
        self._rates: Rates | None = None
        self._news = asyncio.Event()
        self._held = False
        self._tables = {
            "connections": Table(columns.CONNECTIONS, "Id", "Age", falling=True),
            "workers": Table(columns.WORKERS, "Process", "Process"),
            "limits": Table(columns.LIMITS, "Setting", ""),
            "stalls": Table(columns.STALLS, "Place", "", falling=True),
        }

    def compose(self) -> ComposeResult:
        """Lay out two lines of figures, the tables, and the keys."""
        yield Static("looking …", id="head", markup=False)
        yield Static("", id="figures", markup=False)
        with TabbedContent():
            for name, table in self._tables.items():
                with TabPane(name.capitalize(), id=name):
                    if name == "connections":
                        yield Input(placeholder="network or text", id="filter")
                    yield table
        yield Footer()

    def on_ready(self) -> None:
        """Begin to look."""
        with suppress(ValueError, RuntimeError):  # in a thread that hears no signals
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._end)
        self._tables["connections"].focus()
        self._follow()

    def _end(self) -> None:
        """A signal ends it: give the terminal back as it was."""
        self.exit(return_code=128 + signal.SIGTERM)

    def on_unmount(self) -> None:
        """Leave nobody waiting for an answer."""
        self.service.hang_up()

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────
    @work
    async def _follow(self) -> None:
        while True:
            begun = time.monotonic()
            self._news.clear()
            try:
                look = await asyncio.to_thread(self.service.look)
            except Refused as error:
                if self._is_there:
                    self._lose(error.format_message())
            else:
                if self._is_there and not self._held:
                    self._take(look)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), max(0.0, begun + LOOK_SECONDS - time.monotonic()))

    @property
    def _is_there(self) -> bool:
        """Whether there is anything to show it in: a view that ends goes piece by piece."""
        return self.is_running and self._tables[_TABS[0]].is_attached

    def _lose(self, why: str) -> None:
        """Say that the server has gone; the tables show what was seen last."""
        self._say(f"gone: {why}; trying again", lost=True)
        self._look = None  # another server's counts start anew

    def _take(self, look: Look) -> None:
        self._rates = Rates.between(self._look, look) if self._look is not None else None
        self._look = look
        self._show()

    # ── showing ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _say(self, text: str, *, lost: bool = False) -> None:
        head = self.query_one("#head", Static)
        head.update(text)
        head.set_class(lost, "lost")

    def _show(self) -> None:
        look = self._look
        if look is None:
            return
        self._say(_head(look))
        self.query_one("#figures", Static).update(_figures(look, self._rates))
        found = columns.matching(look.connections, self.query_one("#filter", Input).value)
        rows = {
            "connections": found,
            "workers": columns.workers_of(look),
            "limits": columns.limits_of(look),
            "stalls": look.stalls,
        }
        tabs = self.query_one(TabbedContent)
        for name, table in self._tables.items():
            table.show(rows[name])
            tabs.get_tab(name).label = f"{name.capitalize()} {len(rows[name])}"
        everybody = look.over_listeners("open")
        shown = min(len(found), MOST_ROWS)
        if shown < everybody:
            tabs.get_tab("connections").label = f"Connections {shown} of {everybody}"

    # ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave the tables alone while a trace is before them."""
        return len(self.screen_stack) == 1 or action not in _ABOUT_TABLES

    @property
    def _table(self) -> Table:
        return self._tables[self.query_one(TabbedContent).active]

    def action_tab(self, name: str) -> None:
        """Show another table."""
        self.query_one(TabbedContent).active = name
        self._tables[name].focus()

    def action_sort(self) -> None:
        """Sort by the next column."""
        self._table.sort_by(self._table.next_column)
        self._show()

    def action_turn(self) -> None:
        """Turn the order round."""
        self._table.sort_by(self._table.order or self._table.next_column)
        self._show()

    @on(DataTable.HeaderSelected)
    def _sort_by_head(self, event: DataTable.HeaderSelected) -> None:
        if isinstance(event.data_table, Table) and event.column_key.value is not None:
            event.data_table.sort_by(event.column_key.value)
            self._show()

    def action_filter(self) -> None:
        """Let people write which connections they want."""
        self.action_tab("connections")
        box = self.query_one("#filter", Input)
        box.add_class("used")
        box.focus()

    def action_clear(self) -> None:
        """Show all connections again."""
        box = self.query_one("#filter", Input)
        box.value = ""
        box.remove_class("used")
        self._tables["connections"].focus()

    @on(Input.Changed, "#filter")
    def _filter(self) -> None:
        self._show()

    @on(Input.Submitted, "#filter")
    def _keep_filter(self) -> None:
        if self.query_one("#filter", Input).value:
            self._tables["connections"].focus()
        else:
            self.action_clear()

    def action_help(self) -> None:
        """Show the keys."""
        self.push_screen(Help())

    def action_hold(self) -> None:
        """Hold the picture still, or go on."""
        self._held = not self._held
        self.notify("held; p goes on" if self._held else "going on")
        self._news.set()

    def _chosen(self) -> dict[str, Any] | None:
        """The connection that a key is about."""
        chosen = self._tables["connections"].chosen
        rows = self._look.connections if self._look is not None else []
        found = next((row for row in rows if row["id"] == chosen), None)
        if found is None or self.query_one(TabbedContent).active != "connections":
            self.notify("choose a connection first", severity="warning")
            return None
        return found

    def action_trace(self) -> None:
        """Follow the chosen connection."""
        row = self._chosen()
        if row is not None:
            self.push_screen(Trace(self.service.path, row["id"]))

    @work
    async def action_kill(self) -> None:
        """Close the chosen connection."""
        row = self._chosen()
        if row is None:
            return
        name = f"{columns.CONNECTIONS[0].text(row).plain}, {row['id']}"
        closed = await self._do(f"Close {name}?", "kill", connection=row["id"])
        if closed is not None:
            self.notify(f"closed {name}" if closed else f"{name} has gone already", markup=False)

    @work
    async def action_suspend(self) -> None:
        """Let new connections wait."""
        await self._do("Suspend? New connections wait until it resumes.", "suspend")

    @work
    async def action_resume(self) -> None:
        """Accept again."""
        await self._do("Resume? It accepts connections again.", "resume")

    @work
    async def action_drain(self) -> None:
        """End the server gently."""
        await self._do("Drain? It accepts no more, serves what is there, and ends.", "drain")

    async def _do(self, question: str, verb: str, **arguments: Any) -> Any:
        """Ask the user, then the server; return its answer, True for none, or None when it was not done."""
        if not await self.push_screen_wait(Confirm(question)):
            return None
        try:
            answer = await asyncio.to_thread(self.service.ask, verb, **arguments)
        except Refused as error:
            self.notify(error.format_message(), severity="error", markup=False)
            return None
        self._news.set()
        return True if answer is None else answer


def _head(look: Look) -> str:
    status = look.status
    addresses = "  ".join(f"{each['address']} {each['engine']} {each['state']}" for each in status["servers"])
    paused = "paused at a limit" if any(each["paused"] for each in status["servers"]) else ""
    ready = "" if look.health["ready"] else f"not ready: {look.health['reason']}"
    who = (
        f"supervisor {status['supervisor']}, {workers_text(status)}"
        if status["supervisor"] is not None
        else "no workers"
    )
    return "  ".join(filter(None, [addresses, who, paused, ready]))


def _figures(look: Look, rates: Rates | None) -> str:
    parts = [f"open {look.over_listeners('open')}"]
    if rates is not None:
        parts += [f"{rates.opened:.1f}/s", f"in {size(rates.bytes_in)}/s", f"out {size(rates.bytes_out)}/s"]
    parts += [f"failed {look.over_listeners('handler_failed_total')}"]
    parts += [f"rejected {look.over_listeners('rejected_total')}"]
    waiting = look.total("harken_accept_queue_connections")
    return "  ".join([*parts, f"waiting {waiting:.0f}"])
