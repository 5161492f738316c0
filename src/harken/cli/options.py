"""Command-line options made from the declared settings.

A flag's text goes into ``settings.operator.flags`` as it was typed, so that it holds for every server of this process
and can be handed to a child.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from harken import _hub, settings
from harken.errors import ConfigError, nearest
from harken.settings import Setting
from harken.transports import for_url

__all__ = [
    "BIND_DEFAULT",
    "BIND_OPTION",
    "addresses",
    "check_together",
    "load_settings",
    "refuse_unsafe_values",
    "refuse_wrong_values",
    "settings_options",
    "show",
    "unknown_variables",
    "warn_of_unknown_variables",
]

BIND_DEFAULT = "tcp://127.0.0.1:8800"
"""Where ``serve`` listens when nobody says: loopback, so that nothing is exposed unasked; the port of the examples."""

BIND_VARIABLE = "HARKEN_BIND"
OTHER_VARIABLES = (BIND_VARIABLE, "HARKEN_RUN", "HARKEN_HUB", "HARKEN_HANDOFF", "HARKEN_NO_EXTENSION")
"""Variables of harken's that are no settings: addresses, what ``run`` tells its child processes, the kind of hub, what
an upgrade hands on, and what keeps ``setup.py`` from building the extension."""

# As <https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables> has them.
_LINK = re.compile(
    r"HARKEN_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?=.*|PORT=\w+://.*|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?=.*)", re.DOTALL
)

DECLARING = (
    "harken.acceptor",
    "harken.deadlines",
    "harken.server",
    "harken.drain",
    "harken.meter",
    "harken.observe.access",
    "harken.observe.log",
)
ROOMS = ("harken.process", "harken.transports", "harken.engines", "harken.limits", "harken.preambles")
"""Where settings are declared: these modules, and every module of these rooms."""

METAVARS = {
    "count": "N",
    "seconds": "SECONDS",
    "bytes": "BYTES",
    "text": "TEXT",
    "secret": "FILE",
    "tls": "cert=FILE&key=FILE",
    "list": "A,B",
    "flag": "",
}


def load_settings() -> dict[str, Setting]:
    """Import every module that declares settings.

    Returns:
        All declared settings by name, sorted.
    """
    for name in _declaring_modules():
        importlib.import_module(name)
    return dict(sorted(settings.REGISTRY.items()))


def _declaring_modules() -> Iterator[str]:
    yield from filter(_exists, DECLARING)
    for room in filter(_exists, ROOMS):
        package = importlib.import_module(room)
        yield room
        yield from (f"{room}.{found.name}" for found in pkgutil.iter_modules(package.__path__) if found.name[0] != "_")


def _exists(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return (parent == "harken" or _exists(parent)) and find_spec(name) is not None


def settings_options(refusal: type[Exception] = click.UsageError) -> list[click.Parameter]:
    """Make ``--config`` and one option for every declared setting.

    Parsing the options fills ``settings.operator``; the command's function is not given their values.

    Args:
        refusal: what to raise, with one line, when the file cannot be read or names an unknown setting.

    Raises:
        click.UsageError: the environment asks for a kind of hub that there is not; what declares settings needs one.
    """
    try:
        _hub.asked()
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    config = click.Option(
        ["--config"],
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=lambda _ctx, _option, path: _take_config(path, refusal),
        help="Read settings from this TOML file; flags and HARKEN_ variables stand above it.",
    )
    return [config, *map(_option, load_settings().values())]


def _option(declared: Setting) -> click.Option:
    flag = declared.kind.name == "flag"
    name = declared.flag.removeprefix("--")
    return click.Option(
        [f"--{name}/--no-{name}" if flag else declared.flag],
        metavar=None if flag else _metavar(declared),
        default=None,
        expose_value=False,
        callback=lambda ctx, _option, value: _take(ctx, declared, value),
        help=_help(declared),
    )


def _metavar(declared: Setting) -> str:
    return METAVARS.get(declared.kind.name) or "|".join(declared.kind.choices) or "NAME"


def _help(declared: Setting) -> str:
    default = f"default under serve {show(declared.serve)}"
    if declared.serve == declared.default:
        default = f"default {show(declared.default)}"
    else:
        default += f", drop-in {show(declared.default)}"
    unit = f"{declared.unit}; " if declared.unit else ""
    return f"{declared.meaning.rstrip('.')} [{unit}{default}; {declared.variable}]"


def show(value: object, declared: Setting | None = None) -> str:
    """Write a value as it would be typed."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "empty"
    if isinstance(value, bytes):
        return repr(value)[2:-1] or "empty"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) if declared is None else declared.kind.show(value)


def _take(ctx: click.Context, declared: Setting, value: str | bool | None) -> None:
    if value is None:
        return
    try:
        declared.read(value, f"flag {declared.flag}")
    except ConfigError as error:
        raise click.UsageError(str(error), ctx) from None
    settings.operator.flags[declared.name] = value


def _take_config(path: str | None, refusal: type[Exception]) -> None:
    if path is None:
        return
    try:
        settings.operator.load(Path(path).absolute())
    except ConfigError as error:
        raise refusal(str(error)) from None


def refuse_wrong_values() -> None:
    """Read every setting that flags, environment or file name.

    Raises:
        click.UsageError: for the first whose value is not allowed.
    """
    try:
        for declared in load_settings().values():
            settings.operator.find(declared)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


def refuse_unsafe_values(places: Iterable[str]) -> None:
    """Look at the settings for ``serve`` that are wrong only together, and at addresses.

    Args:
        places: the addresses to listen on.

    Raises:
        click.UsageError: headers of proxies would be believed from anybody, or an address is malformed.
    """
    try:
        for place in places:
            for_url(place).parse(place)
        check_together(settings.Settings(None, profile="serve"))
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


def check_together(values: settings.Settings) -> None:
    """Look at settings that are wrong only together.

    Raises:
        ConfigError: they are.
    """
    if values["proxy"] != "off":
        from harken.preambles.proxy import trusted

        trusted(values)
    if values["metrics"] is not None:
        from harken.process.page import check_address

        check_address(values["metrics"])


def unknown_variables() -> list[str]:
    """Say, one line each, which ``HARKEN_…`` variables in the environment mean nothing."""
    known = {*(declared.variable for declared in load_settings().values()), *OTHER_VARIABLES}
    strange = sorted(name for name in os.environ if name.startswith("HARKEN_") and name not in known)
    return [f"unknown variable {name}{nearest(name, known)}" for name in strange if not _is_link(name)]


def warn_of_unknown_variables(command: str) -> None:
    """Tell on stderr which variables mean nothing, for they may be misspelt: what they say does not hold."""
    for line in unknown_variables():
        click.echo(f"harken {command}: warning: {line}", err=True)


def _is_link(name: str) -> bool:
    """Whether Kubernetes set a variable: it tells a pod of its services, and one may be called harken."""
    return _LINK.fullmatch(f"{name}={os.environ[name]}") is not None


BIND_OPTION: dict[str, Any] = {
    "param_decls": ["--bind", "urls"],
    "multiple": True,
    "metavar": "URL",
    "help": "Listen here: tcp://HOST:PORT, udp://HOST:PORT, unix:/PATH, unixgram:/PATH, fd://N, systemd: "
    f"(repeatable) [default {BIND_DEFAULT}; {BIND_VARIABLE}, separated by commas]",
}
"""What makes the ``--bind`` option of the commands that listen."""


def addresses(urls: tuple[str, ...]) -> tuple[str, ...]:
    """Return the addresses to listen on: of the flags, else the environment, else the file, else the default.

    Args:
        urls: what ``--bind`` was given.

    Raises:
        click.UsageError: ``bind`` in the file is neither text nor a list of texts.
    """
    if urls:
        return urls
    listed = os.environ.get(BIND_VARIABLE, "").split(",")
    return tuple(filter(None, map(str.strip, listed))) or _file_addresses() or (BIND_DEFAULT,)


def _file_addresses() -> tuple[str, ...]:
    path = settings.operator.path
    if not path:
        return ()
    with open(path, "rb") as stream:
        bind = tomllib.load(stream).get("bind", [])
    listed = [bind] if isinstance(bind, str) else bind
    if not isinstance(listed, list) or not all(isinstance(url, str) for url in listed):
        raise click.UsageError(f"bind = {bind!r} (file {path}) is not an address or a list of addresses")
    return tuple(listed)
