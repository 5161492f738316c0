"""A table whose rows come anew every second, in an order that can be chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import DataTable
from textual.widgets.data_table import ColumnKey

from harken.observe.log import escape

__all__ = ["MOST_ROWS", "Column", "Table"]

Row = dict[str, Any]

# Rows shown: nobody reads more, a filter brings the rest, and each costs a tenth of a millisecond a second.
MOST_ROWS = 300


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its head, and its key.
        read: returns what is shown.
        value: returns what it is sorted by, or None where nothing is known; what is shown when this is left out.
    """

    name: str
    read: Callable[[Row], Any]
    value: Callable[[Row], Any] | None = None

    def text(self, row: Row) -> Text:
        """Return a cell. What peers chose cannot harm the terminal."""
        shown = self.read(row)
        return Text(escape(shown) if shown is not None else "", justify="right" if self.value else "left")

    def order(self, row: Row) -> tuple[bool, Any]:
        """Return what the row is sorted by."""
        value = (self.value or self.read)(row)
        return value is not None, value if value is not None else 0


class Table(DataTable[Text]):
    """Keeps the chosen row chosen, wherever it moves."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("home", "scroll_top", show=False),
        Binding("end", "scroll_bottom", show=False),
    ]

    def __init__(self, columns: Sequence[Column], identity: str, order: str, *, falling: bool = False) -> None:
        """Show nothing yet.

        Args:
            columns: what to show of each row.
            identity: the column by which rows are told apart.
            order: the column to sort by at first; empty: as the rows come.
            falling: whether the largest comes first.
        """
        super().__init__(cursor_type="row", zebra_stripes=False)
        self._columns = {column.name: column for column in columns}
        self._identity = identity
        self.order = order
        self.falling = falling

    def on_mount(self) -> None:
        """Lay out the columns."""
        for column in self._columns.values():
            self.add_column(self._head(column), key=column.name)

    def _head(self, column: Column) -> Text:
        mark = ("▼" if self.falling else "▲") if column.name == self.order else " "
        return Text(f"{column.name} {mark}", justify="right" if column.value else "left")

    @property
    def chosen(self) -> str | None:
        """The identity of the row under the cursor; None when there is no row."""
        if not self.is_valid_coordinate(self.cursor_coordinate):
            return None
        return self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value

    @property
    def next_column(self) -> str:
        """The column right of the one it is sorted by, or the first."""
        names = list(self._columns)
        return names[(names.index(self.order) + 1) % len(names)] if self.order else names[0]

    def sort_by(self, name: str) -> None:
        """Sort by a column from the next :meth:`show` on, numbers falling; what is sorted so already turns round."""
        self.falling = not self.falling if name == self.order else self._columns[name].value is not None
        self.order = name
        for column in self._columns.values():
            self.columns[ColumnKey(column.name)].label = self._head(column)

    def show(self, rows: Iterable[Row]) -> None:
        """Show these rows, sorted, at most :data:`MOST_ROWS`."""
        if self.order:
            column, identity = self._columns[self.order], self._columns[self._identity]
            rows = sorted(rows, key=lambda row: (column.order(row), identity.read(row)), reverse=self.falling)
        cells = {}
        for row in list(rows)[:MOST_ROWS]:
            line = {name: column.text(row) for name, column in self._columns.items()}
            cells[line[self._identity].plain] = line
        chosen = self.chosen
        self._drop(cells.keys())
        for key, line in cells.items():
            if key in self.rows:
                self._change(key, line)
            else:
                self.add_row(*line.values(), key=key)
        places = {key: number for number, key in enumerate(cells)}
        self.sort(self._identity, key=lambda cell: places[cell.plain])
        if chosen in places and places[chosen] != self.cursor_row:
            self.move_cursor(row=places[chosen])

    def _drop(self, kept: Iterable[str]) -> None:
        kept = set(kept)
        gone = [key for key in self.rows if key.value not in kept]
        if len(gone) > len(self.rows) // 2:
            self.clear()  # each removal by itself looks at every row
            return
        for key in gone:
            self.remove_row(key)

    def _change(self, key: str, line: dict[str, Text]) -> None:
        for name, cell in line.items():
            if self.get_cell(key, name) != cell:
                wider = cell.cell_len > self.columns[ColumnKey(name)].content_width
                self.update_cell(key, name, cell, update_width=wider)
