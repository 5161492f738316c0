"""What the tables show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harken.cli._top.service import Look
from harken.cli._top.table import Column, Row
from harken.cli._top.words import size, span
from harken.cli.ctl import peer_text
from harken.errors import ConfigError
from harken.networks import Networks

__all__ = ["CONNECTIONS", "LIMITS", "STALLS", "WORKERS", "limits_of", "matching", "workers_of"]


def _plain(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name)


def _sized(name: str) -> Callable[[Row], Any]:
    return lambda row: size(row.get(name))


def _timed(name: str) -> Callable[[Row], Any]:
    return lambda row: span(row.get(name))


def _waits_for(row: Row) -> Any:
    return row.get("waiting_on") or row.get("waits_for") or ""


def _state(row: Row) -> str:
    return row.get("state") or ("leaving" if row["leaving"] else "ready" if row["ready"] else "starting")


def _value(row: Row) -> Any:
    return size(row["value"]) if row["unit"] == "bytes" else row["value"]


# An age is sorted by when it began, to the hundredth: workers answer at moments of their own.
CONNECTIONS = (
    Column("Peer", lambda row: peer_text(row["peer"])),
    Column("Age", _timed("seconds"), lambda row: -round(row["opened_at"], 2)),
    Column("Idle", _timed("idle_seconds"), _plain("idle_seconds")),
    Column("In", _sized("bytes_in"), _plain("bytes_in")),
    Column("Out", _sized("bytes_out"), _plain("bytes_out")),
    Column("Waits for", _waits_for),
    Column("Process", _plain("process"), _plain("process")),
    Column("Id", _plain("id")),
)
WORKERS = (
    Column("Process", _plain("pid"), _plain("pid")),
    Column("State", _state),
    Column("Open", _plain("open"), _plain("open")),
    Column("Accepted", _plain("accepted"), _plain("accepted")),
    Column("Memory", _sized("rss"), _plain("rss")),
    Column("Generation", _plain("generation"), _plain("generation")),
)
LIMITS = (
    Column("Setting", _plain("name")),
    Column("Value", _value, lambda row: str(row["value"])),
    Column("Unit", lambda row: "" if row["unit"] == "bytes" else row["unit"]),
)
STALLS = (
    Column("Place", _plain("place")),
    Column("Function", _plain("function")),
    Column("Times", lambda row: row["times"] or "now", _plain("times")),
    Column("Longest", _timed("longest"), _plain("longest")),
    Column("In all", _timed("seconds"), _plain("seconds")),
)


def workers_of(look: Look) -> list[Row]:
    """Return a row for each worker, or one for the process that serves by itself."""
    status = look.status
    if status["supervisor"] is not None:
        return list(status["workers"])
    return [
        {
            "pid": server["process"][0] if isinstance(server["process"], list) else server["process"],
            "state": server["state"],
            "open": look.over_listeners("open"),
            "accepted": look.over_listeners("accepted_total"),
            "rss": status.get("rss"),
        }
        for server in status["servers"][:1]
    ]


def limits_of(look: Look) -> list[Row]:
    """Return a row for each limit and time in force."""
    return [each for each in look.settings if each["value"] is not None]


def matching(rows: list[Row], wanted: str) -> list[Row]:
    """Return the connections whose peer is in a network, or that have a text in what is shown of them."""
    wanted = wanted.strip().lower()
    try:
        network = Networks.parse((wanted,))
    except ConfigError:
        shown = [column for column in CONNECTIONS if column.name in {"Peer", "Waits for", "Process", "Id"}]
        return [row for row in rows if any(wanted in str(column.read(row)).lower() for column in shown)]
    return [row for row in rows if row["peer"]["address"] in network]
