"""``harken check``: what would go wrong, before it does, and the settings in force."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import click

from harken import preambles, transports
from harken.admission import load_limits
from harken.cli import options
from harken.cli.target import is_server, load_target, require_handler
from harken.engines import load, suited
from harken.errors import ConfigError
from harken.limits.connections import in_force
from harken.listener import Listener
from harken.process import privileges, rehearsal
from harken.process.fitness import fit_handler
from harken.settings import Settings

__all__ = ["command"]


def _check(target: str, urls: tuple[str, ...]) -> None:
    options.refuse_wrong_values()
    places = options.addresses(urls)
    options.warn_of_unknown_variables("check")
    with privileges.visiting(Settings(None, profile="serve")):
        found = load_target(target)
    values = _settings_of(found, target)
    options.check_together(values)
    engine = load(values["engine"] or "inline")
    if not is_server(found):
        engine.fit(found)
    engine.check(lambda name: values[name])
    load_limits(values["limits"])
    remark = engine.remark()
    rehearsal.try_logs(values)
    with ExitStack() as opened:  # all at once, as they will be: two may want the same place
        listeners = [(place, _open(place, values, opened)) for place in places]
        bound = [url for place, several in listeners for url in _names(place, several)]
        preambles.refuse_plain_text(values, (each for _, several in listeners for each in several))
        rehearsal.try_page(values, opened)
        if not is_server(found):
            rehearsal.try_process(values, opened)
    _print_table(values, values["engine"] or "inline")
    if remark:
        click.echo(remark)
    click.echo(f"ok: {target} on {', '.join(bound)}")


def _settings_of(found: Any, target: str) -> Settings:
    """Return what holds for a target: serve's defaults for a handler, the drop-in's for a server class.

    Raises:
        ConfigError: it is neither, or a handler that harken cannot run.
    """
    if is_server(found):
        return Settings(object.__new__(found), profile="drop-in")
    require_handler(found, target)
    fit_handler(found)
    return Settings(None, suited(found, {}), "serve")


def _open(place: str, values: Settings, opened: ExitStack) -> list[Listener]:
    """Bind an address, until ``opened`` closes it, and read the certificates that go with it."""
    listeners = transports.listen(place, transports.bind_options(values))
    for listener in listeners:
        opened.callback(listener.close)
    for listener in listeners:
        for preamble in preambles.resolve(values, listener):  # reads certificates, and says what is wrong there
            for line in getattr(preamble, "remarks", tuple)():
                click.echo(f"harken check: warning: {line}", err=True)
    return listeners


def _names(place: str, listeners: list[Listener]) -> list[str]:
    """Return what an address stands for."""
    return [place] if len(listeners) == 1 else [listener.url for listener in listeners]


def _print_table(values: Settings, engine: str) -> None:
    rows = [("setting", "value", "from")]
    for name, declared in options.load_settings().items():
        value, source = in_force(values, engine) if name == "max_connections" else values.find(name)
        rows.append((name, options.show(value, declared), source))
    for line in _columns(rows):
        click.echo(line)


def _columns(rows: list[tuple[str, str, str]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return (f"{name:{widths[0]}}  {value:{widths[1]}}  {source}" for name, value, source in rows)


command = click.Command(
    "check",
    callback=_check,
    help="Import TARGET (module:Name or path/file.py:Name; a handler or a server class), bind its addresses, the page "
    "and the control socket for a moment, see that its logs and its PID file can be written and that it can become "
    "its user, and print every setting in force and where it came from.",
    params=[
        click.Argument(["target"]),
        click.Option(**options.BIND_OPTION),
        *options.settings_options(ConfigError),
    ],
)
