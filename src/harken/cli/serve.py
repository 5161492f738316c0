"""``harken serve``: a handler class on one or more addresses."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click

from harken import events
from harken.cli import options
from harken.cli.target import load_handler
from harken.errors import ConfigError
from harken.observe.stalls import report_at_exit
from harken.process import inheritance, service
from harken.settings import Settings

__all__ = ["command"]


def _serve(target: str, urls: tuple[str, ...], reload: bool) -> int:
    with inheritance.beginning():
        return _begin(target, urls, reload)


def _begin(target: str, urls: tuple[str, ...], reload: bool) -> int:
    options.refuse_wrong_values()
    places = options.addresses(urls)
    options.refuse_unsafe_values(places)
    options.warn_of_unknown_variables("serve")
    if reload:
        _watch(target)
    if Settings(None, profile="serve")["log_format"] == "text":  # a log for machines tells it by itself
        events.subscribe(_announce, "listening")
    return service.run(lambda: _load(target), places, {}, name=target.rpartition(":")[2])


def _watch(target: str) -> None:
    """Reload when the code changes: that of the target's directory, and of the working directory."""
    if Settings(None, profile="serve")["workers"] == 0:
        raise ConfigError("--reload needs workers: with 0 there is nobody left to serve when the new code is wrong")
    from harken.process import watch

    place = target.rpartition(":")[0] if ":" in target else target
    own = Path(place).parent if place.endswith(".py") else Path()
    watch.start({Path.cwd(), own.resolve()})


def _load(target: str) -> Callable[..., Any]:
    """Load the handler, in the process that will serve."""
    report_at_exit()
    handler: Callable[..., Any] = load_handler(target)
    return handler


def _announce(event: events.Event) -> None:
    attempt = _attempt(str(event.address))
    hint = f"; try: {attempt}" if attempt else ""
    click.echo(f"listening on {event.address} (engine {event.engine}){hint}", err=True)


def _attempt(url: str) -> str:
    """Return a command that talks to an address, for the shell; empty when there is no such address."""
    scheme, _, rest = url.partition(":")
    secret = scheme == "tls" or (scheme in {"tcp", "unix"} and _has_tls())
    if scheme in {"unix", "unixgram"}:
        path = shlex.quote(unquote(rest.partition("?")[0]))
        return f"openssl s_client -unix {path}" if secret else f"nc -{'' if scheme == 'unix' else 'u'}U {path}"
    if scheme not in {"tcp", "tls", "udp"}:
        return ""
    host, _, port = rest.removeprefix("//").partition("?")[0].rpartition(":")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))
    if secret:
        return f"openssl s_client -connect {f'[{host}]' if ':' in host else host}:{port}"
    return f"nc {'-u ' if scheme == 'udp' else ''}{host} {port}"


def _has_tls() -> bool:
    """Whether the settings put the listeners for streams under TLS from the first byte."""
    settings = Settings(None, profile="serve")
    return bool(settings["tls"] or settings["tls_cert"]) and settings["tls_mode"] != "starttls"


command = click.Command(
    "serve",
    callback=_serve,
    help="Serve the handler class TARGET, which is module:Name or path/file.py:Name. SIGTERM drains and ends (status "
    "0, or 3 when connections had to be cut), SIGINT and SIGQUIT stop at once.",
    params=[
        click.Argument(["target"]),
        click.Option(**options.BIND_OPTION),
        click.Option(
            ["--reload"],
            is_flag=True,
            help="For development: load the code anew whenever a file changes; needs harken[reload].",
        ),
        *options.settings_options(),
    ],
)
