"""``harken ctl``: look into a running server and change it, by its control socket."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import click

from harken.cli import asking
from harken.cli.asking import Refused
from harken.errors import ConfigError
from harken.networks import Networks
from harken.observe.log import escape

__all__ = ["command", "peer_text", "trace_lines", "workers_text"]

ORDERS: dict[str, tuple[str, bool]] = {
    "idle": ("idle_seconds", True),
    "age": ("seconds", True),
    "in": ("bytes_in", True),
    "out": ("bytes_out", True),
    "peer": ("peer", False),
    "id": ("id", False),
}
"""What connections can be sorted by: the field, and whether the largest comes first."""


class Group(click.Group):
    """Takes ``--json`` anywhere on the line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take ``--json`` out of the words, wherever it stands."""
        if "--json" in args:
            args = ["--json", *(word for word in args if word != "--json")]
        return super().parse_args(ctx, args)


def _ask(ctx: click.Context, verb: str, /, **arguments: Any) -> Any:
    with asking.connected(asking.find_socket(ctx.obj["socket"])) as sock:
        return asking.ask(sock, verb, **arguments)


def _show(ctx: click.Context, result: Any, text: Callable[[Any], Sequence[str]]) -> None:
    lines = [json.dumps(result)] if ctx.obj["json"] else text(result)
    for line in lines:
        click.echo(line)


@click.group(cls=Group, help="Look into a running server and change it, by its control socket.")
@click.option("--socket", metavar="PATH", help="The control socket; by default that of the only server that runs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts; may stand anywhere on the line.")
@click.pass_context
def command(ctx: click.Context, socket: str | None, as_json: bool) -> None:
    """Note what every command needs."""
    ctx.obj = {"socket": socket, "json": as_json}


@command.command(help="The state of the service, its workers and addresses, as those who run now have counted.")
@click.pass_context
def status(ctx: click.Context) -> None:
    """Print the status."""
    _show(ctx, _ask(ctx, "status"), _status_lines)


def _status_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["supervisor"]:
        lines.append(f"supervisor {found['supervisor']}, {workers_text(found)}")
        lines += table(found["workers"], ("pid", "generation", "ready", "leaving", "open", "accepted", "rss"))
    rows = [server | {"closed_total": sum(server["closed_total"].values())} for server in found["servers"]]
    shown = ("address", "engine", "state", "open", "accepted_total", "rejected_total", "handler_failed_total")
    return lines + table(rows, shown)


def workers_text(found: dict[str, Any]) -> str:
    """Return how many workers serve, of how many, and how many leave meanwhile."""
    leaving = sum(each["leaving"] for each in found["workers"])
    ready = sum(each["ready"] and not each["leaving"] for each in found["workers"])
    return f"{ready} of {found['wanted']} workers" + (f", {leaving} leaving" if leaving else "")


@command.command(help="The open connections.")
@click.option("--sort", "order", type=click.Choice(list(ORDERS)), default="age", show_default=True)
@click.option("--peer", metavar="CIDR", help="Only those from this network or address.")
@click.pass_context
def connections(ctx: click.Context, order: str, peer: str | None) -> None:
    """Print the connections."""
    found = _ask(ctx, "connections")
    if peer is not None:
        try:
            network = Networks.parse((peer,))
        except ConfigError as error:
            raise click.UsageError(str(error), ctx) from None
        found = [each for each in found if each["peer"]["address"] and each["peer"]["address"] in network]
    field, falling = ORDERS[order]
    found.sort(key=lambda each: _sortable(each.get(field)), reverse=falling)
    _show(ctx, found, _connection_lines)


def _sortable(value: Any) -> tuple[bool, Any]:
    if isinstance(value, dict):
        return True, (str(value.get("address")), value.get("port") or 0)
    return value is not None, value if value is not None else 0


def _connection_lines(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        {
            "id": each["id"],
            "peer": peer_text(each["peer"]),
            "seconds": f"{each['seconds']:.1f}",
            "idle": "?" if each["idle_seconds"] is None else f"{each['idle_seconds']:.1f}",
            "in": each.get("bytes_in", ""),
            "out": each.get("bytes_out", ""),
            "waits for": each.get("waiting_on") or each.get("waits_for") or "",
            "process": each["process"],
        }
        for each in found
    ]
    return table(rows, tuple(rows[0])) if rows else ["no connection is open"]


def peer_text(peer: dict[str, Any]) -> str:
    """Return a peer as people write it."""
    if peer.get("port"):
        host = f"[{peer['address']}]" if ":" in peer["address"] else peer["address"]
        return f"{host}:{peer['port']}"
    pid = (peer.get("credentials") or [None])[0] if isinstance(peer.get("credentials"), list) else None
    return peer.get("address") or (f"unix pid {pid}" if pid else "unix")


@command.command(help="Close the connection of this id.")
@click.argument("connection", metavar="ID")
@click.option("--reason", default="killed", help="Noted in the event, beside who and when.")
@click.pass_context
def kill(ctx: click.Context, connection: str, reason: str) -> None:
    """Close one connection."""
    found = _ask(ctx, "kill", connection=connection, reason=reason)
    if not found:
        raise Refused(f"no connection {connection!r} is open")
    _show(ctx, found, lambda _: [f"closed {connection}"])


def _simple(verb: str, help: str, done: str) -> None:
    @command.command(verb, help=help)
    @click.pass_context
    def _command(ctx: click.Context) -> None:
        _show(ctx, _ask(ctx, verb), lambda _: [done])


_simple("drain", "Serve what is there, then end, as SIGTERM does.", "draining")
_simple("suspend", "Stop accepting; new connections wait in the backlog.", "suspended")
_simple("resume", "Accept again.", "resumed")
_simple("reload", "Load code, settings and certificates anew, as SIGHUP does.", "reloading")
_simple("upgrade", "Start a new binary and hand it the listeners, as SIGUSR2 does.", "upgrading")


@command.command(help="Run so many workers.")
@click.argument("count", type=click.IntRange(min=0))
@click.pass_context
def workers(ctx: click.Context, count: int) -> None:
    """Change the number of workers."""
    _show(ctx, _ask(ctx, "workers", count=count), lambda _: [f"{count} workers wanted"])


@command.command("set", help="Change a live setting until the next restart.")
@click.argument("name")
@click.argument("value")
@click.pass_context
def set_(ctx: click.Context, name: str, value: str) -> None:
    """Change one setting."""
    _show(ctx, _ask(ctx, "configure", **{name.replace("-", "_"): value}), lambda _: [f"{name} = {value}"])


@command.command(help="What every thread, green thread and task does at this moment.")
@click.pass_context
def stacks(ctx: click.Context) -> None:
    """Print the stacks."""
    _show(ctx, _ask(ctx, "stacks"), _stack_lines)


_SORTS = {"thread": "", "green": "green thread ", "task": "task "}


def _stack_lines(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for each in found:
        sort = next(name for name in ("thread", "green", "task") if name in each)
        whose = f", connection {each['connection']} of {escape(each['peer'])}" if "connection" in each else ""
        since = f", open for {each['seconds']:.1f} s" if "connection" in each else ""
        lines.append(f"process {each['process']}, {_SORTS[sort]}{escape(each[sort])}{whose}{since}")
        lines += map(escape, "".join(each["stack"]).rstrip("\n").split("\n"))
        lines.append("")
    return lines


@command.command(help="Follow what a connection moves, until it ends or Ctrl-C. Passwords and cookies are masked.")
@click.argument("connection", metavar="ID")
@click.option("--hex", "as_hex", is_flag=True, help="Show bytes in hexadecimal, beside the text.")
@click.option("--no-redact", "plain", is_flag=True, help="Show passwords, cookies and keys too.")
@click.pass_context
def trace(ctx: click.Context, connection: str, as_hex: bool, plain: bool) -> None:
    """Print what moves, as it does."""
    arguments = {"connection": connection, "form": "hex" if as_hex else "text", "redact": not plain}
    with asking.connected(asking.find_socket(ctx.obj["socket"])) as sock, suppress(KeyboardInterrupt):
        for entry in asking.follow(sock, **arguments):
            _show(ctx, entry, trace_lines)
            if "end" in entry:
                return


def trace_lines(entry: dict[str, Any]) -> list[str]:
    """Return what one entry of a trace says, for people."""
    if "begin" in entry:
        return [f"following {entry['connection']} of {escape(entry['peer'])}; Ctrl-C ends it"]
    if "left_out" in entry:
        return [f"… {entry['left_out']:,} pieces left out: they came too fast"]
    if "end" in entry:
        return [f"the connection has ended: {escape(entry['end'])}"]
    stamp = time.strftime("%H:%M:%S", time.localtime(entry["time"])) + f".{int(entry['time'] % 1 * 1000):03}"
    head = f"{stamp} {entry['direction']:3} {entry['bytes']:5}"
    if not entry["shown"]:
        return [f"{head}  (bytes not seen: sent from a file, or received by a call that had begun before)"]
    rest = entry["bytes"] - entry["shown"]
    more = [f"… {rest:,} bytes more"] if rest else []
    if "hex" in entry:
        return [head, *_hex_lines(bytes.fromhex(entry["hex"])), *more]
    return [f"{head}  {_visible(entry['text'])}", *more]


def _visible(text: str) -> str:
    """One line of harmless text in which line ends are seen."""
    return escape(text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t"))


def _hex_lines(data: bytes) -> list[str]:
    lines = []
    for at in range(0, len(data), 16):
        piece = data[at : at + 16]
        seen = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in piece)
        lines.append(f"    {at:04x}  {piece.hex(' '):47}  {seen}")
    return lines


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[str]:
    """Lay rows out in columns, with a head. What peers chose cannot harm the terminal, nor be a row of its own."""
    words = [columns, *([escape(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[at]) for line in words) for at in range(len(columns))]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in words]
