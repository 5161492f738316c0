"""What comes up over the tables: a question, the keys, a trace."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Button, Footer, RichLog, Static

from harken.cli._top.service import Service
from harken.cli.asking import Refused
from harken.cli.ctl import trace_lines
from harken.observe.log import escape

__all__ = ["Confirm", "Help", "Trace"]

# Lines of a trace that can be scrolled back to.
MOST_LINES = 5000

KEYS = """\
1 2 3 4     connections, workers, limits, stalls
arrows      choose a row; Page Up, Page Down, Home, End
/           filter connections: a network such as 10.0.0.0/8,
            an address, or a text; Enter keeps, Escape clears
s           sort by the next column
r           turn the order round
            (a click on a column's head does both)

k           close the chosen connection
t           trace the chosen connection: what it moves, live
S           suspend: new connections wait
R           resume
D           drain: serve what is there, then end

p           hold the picture still, and go on
?           these keys
q           quit

Times and bytes are of the connection's whole life.
Without --metrics a server counts less: bytes a second are those
of open connections, and stalls have no durations.
"""


class Confirm(ModalScreen[bool]):
    """Asks before something is done."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("y", "dismiss(True)", "Yes"),
        ("n,escape,q", "dismiss(False)", "No"),
    ]

    def __init__(self, question: str) -> None:
        """Ask ``question``."""
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """Lay out question and answers."""
        with Vertical(classes="box"):
            yield Static(self._question, markup=False)
            with Horizontal():
                yield Button("Yes (y)", id="yes", compact=True)
                yield Button("No (n)", id="no", compact=True)

    def on_mount(self) -> None:
        """Let Enter mean no."""
        self.query_one("#no").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Take the answer."""
        self.dismiss(event.button.id == "yes")


class Help(ModalScreen[None]):
    """Shows the keys."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,question_mark,enter", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        """Lay out the keys."""
        with VerticalScroll(classes="box"):
            yield Static(KEYS, markup=False)


class Trace(Screen[None]):
    """Follows one connection until it ends, or the screen is left."""

    BINDINGS: ClassVar[list[BindingType]] = [
        ("escape,q", "dismiss", "Back"),
        ("x", "turn", "Text or hex"),
    ]

    def __init__(self, path: str, connection: str) -> None:
        """Follow ``connection`` of the server at ``path``."""
        super().__init__()
        self._path = path
        self._connection = connection
        self._form = "text"
        self._service = Service(path)

    def compose(self) -> ComposeResult:
        """Lay out the lines."""
        yield RichLog(max_lines=MOST_LINES, wrap=True, markup=False, highlight=False)
        yield Footer()

    def on_mount(self) -> None:
        """Begin."""
        self._follow()

    def on_unmount(self) -> None:
        """End it at the server as well."""
        self._service.hang_up()

    def action_turn(self) -> None:
        """Follow in the other form from here on."""
        self._form = "hex" if self._form == "text" else "text"
        self._service.hang_up()
        self._service = Service(self._path)
        self._follow()

    @work(exclusive=True)
    async def _follow(self) -> None:
        await asyncio.to_thread(self._read, self._service, self._form)

    def _read(self, service: Service, form: str) -> None:
        try:
            for entry in service.follow(self._connection, form):
                begun = f"following {entry['connection']} of {escape(entry['peer'])}" if "begin" in entry else None
                self._write(service, [begun] if begun else trace_lines(entry))
        except Refused as error:
            self._write(service, [error.format_message()])

    def _write(self, service: Service, lines: list[str]) -> None:
        """Show lines of the trace that is followed now. The thread that reads it."""
        if not service.over:
            self.app.call_from_thread(self._add, service, lines)

    def _add(self, service: Service, lines: list[str]) -> None:
        if service is self._service and self.is_mounted:
            for line in lines:
                self.query_one(RichLog).write(Text(line))
