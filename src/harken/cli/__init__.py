"""The commands, one file each.

A command's module is imported when the command is named, so ``harken --help`` and ``harken run`` load no more than
they use. Each module exports ``command``, a :class:`click.Command`. What it returns is its exit status, or a function
that does the work and returns it: such work runs when click has finished, since click turns Ctrl-C into an abort.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from harken.errors import ConfigError, HarkenError, nearest
from harken.process import streams

__all__ = ["COMMANDS", "FAILED", "INTERRUPTED", "USAGE", "complain", "main"]

COMMANDS: dict[str, str] = {
    "serve": "Run a handler class on one or more addresses.",
    "run": "Run an unchanged socketserver program on harken.",
    "check": "Test a target, its addresses and its settings, and print them.",
    "explain": "Show a server's classes and its hooks in call order.",
    "ctl": "Look into a running server, and change it.",
    "top": "Watch a running server in the terminal.",
}
"""The commands and what each does, in the order of ``--help``. Each is the module of that name in this room."""

FAILED = 1
USAGE = 2
INTERRUPTED = 130
"""Exit statuses: the work failed; asked for wrongly, as click has it; Ctrl-C, 128 + SIGINT as shells have it."""

_GONE = "the working directory was removed; change to one that is there"


class Commands(click.Group):
    """The commands of :data:`COMMANDS`, imported when named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None when there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"harken.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one is near."""
        word = args[0]
        if word not in COMMANDS and not word.startswith("-"):
            hint = nearest(word, COMMANDS) or "; there are " + ", ".join(COMMANDS)
            raise click.UsageError(f"no command {word!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("harken")
        except PackageNotFoundError:
            number = "(not installed, run from its source)"
        click.echo(f"harken {number}, Python {sys.version.split()[0]}")
        ctx.exit()


root = Commands(
    "harken",
    help="Serve TCP, UDP and Unix sockets: a drop-in successor of socketserver.",
    epilog="'harken COMMAND --help' says more about each.",
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version and exit.",
        )
    ],
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the arguments name, and exit with its status.

    Args:
        arguments: the words after ``harken``; those of the process when None.

    Raises:
        SystemExit: always. Status 1 when the work failed, 2 when it was asked for wrongly; an error is one line on
            stderr, after the traceback of the user's own code where that is what failed.
    """
    streams.open_missing()
    atexit.register(streams.settle)  # first, so that it runs last
    words = sys.argv[1:] if arguments is None else list(arguments)
    outcome = _attempt(lambda: root.main(words, prog_name="harken", standalone_mode=False))
    sys.exit(outcome() if callable(outcome) else outcome)


def _attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help(), err=True)
        return USAGE
    except click.ClickException as error:
        return _refuse(error)
    except click.Abort:
        return INTERRUPTED
    except (HarkenError, OSError) as error:
        return complain(error)
    except ModuleNotFoundError as error:
        if error.name != "greenlet":
            raise
        return complain(ConfigError("green threads need greenlet, which is not installed: pip install greenlet"))


def complain(error: Exception) -> int:
    """Print an error as one line on stderr, after the traceback of what caused it, if anything did.

    Returns:
        The exit status of a command that failed.
    """
    if error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    _print_line("harken", _GONE if _is_nowhere(error) else str(error))
    return FAILED


def _is_nowhere(error: Exception) -> bool:
    """Tell whether what is missing, a file without a name, is the working directory."""
    if not isinstance(error, FileNotFoundError) or error.filename is not None:
        return False
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _refuse(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    place = context.command_path if context else "harken"
    _print_line(place, error.format_message(), f" (see {place} --help)" if error.exit_code == USAGE else "")
    return error.exit_code


def _print_line(place: str, message: str, hint: str = "") -> None:
    click.echo(f"{place}: {' '.join(message.split())}{hint}", err=True)
