"""``harken run``: an existing program, with harken standing in for ``socketserver``."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator

import click

from harken import standin
from harken.cli import complain, options, program
from harken.drain import DRAIN_TIMEOUT
from harken.errors import ConfigError
from harken.observe import access, log
from harken.observe.stalls import report_at_exit
from harken.process import streams
from harken.settings import Settings, operator
from harken.stalls import STALL_AFTER

__all__ = ["command"]


class RunCommand(click.Command):
    """A command whose options end where the program's begin, as ``python``'s do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse harken's options and leave everything after ``-m MODULE`` or the script's name untouched."""
        end = self._end_of_module_option(ctx, args)
        return super().parse_args(ctx, [*args[:end], "--", *args[end:]] if 0 < end < len(args) else args)

    def _end_of_module_option(self, ctx: click.Context, args: list[str]) -> int:
        """Return where the words after ``-m MODULE`` begin; 0 when a script is named instead."""
        valued = {
            word
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and not option.is_flag
            for word in option.opts
        }
        at = 0
        while at < len(args) and args[at].startswith("-") and args[at] not in ("-", "--"):
            if args[at].startswith("-m"):
                return min(at + (2 if args[at] == "-m" else 1), len(args))
            at += 2 if args[at] in valued else 1
        return 0


def _run(module: str | None, words: tuple[str, ...]) -> Callable[[], int | None]:
    if module is None and not words:
        raise click.UsageError("name a script, or a module by -m")
    options.refuse_wrong_values()
    options.warn_of_unknown_variables("run")
    for line in _unheeded():
        click.echo(f"harken run: warning: {line}", err=True)
    return lambda: _run_program(module, words)


def _unheeded() -> Iterator[str]:
    """Say which flags, and lines of the file, will not do what somebody may expect of them, who knows ``serve``."""
    known, values = options.load_settings(), Settings(None)
    named = sorted({*operator.flags, *operator.file} & known.keys())
    changed = [known[name] for name in named if values[name] not in (known[name].default, known[name].serve)]
    of_service = [declared.flag for declared in changed if declared.process]
    if of_service:
        yield (
            f"{', '.join(of_service)}: for programs that call harken.serve(); "
            "servers that the program makes otherwise run in its own process, as it is"
        )
    if DRAIN_TIMEOUT in changed:
        yield f"{DRAIN_TIMEOUT.flag}: for harken.serve() and drain(); SIGTERM ends other programs as under python"


def _run_program(module: str | None, words: tuple[str, ...]) -> int | None:
    atexit.unregister(streams.settle)  # what becomes of the program's output is as under `python`
    standin.install()
    standin.pass_on()
    try:
        log.attach_if_asked()
        access.attach_if_asked()
    except ConfigError as error:
        return complain(error)
    operator.defaults.setdefault(STALL_AFTER.name, STALL_AFTER.serve)  # or there would be nothing to report
    report_at_exit()
    try:
        if module is None:
            program.run_script(words[0], words[1:])
        else:
            program.run_module(module, words)
    except program.NotRunnable as error:
        return complain(error)
    return None


command = RunCommand(
    "run",
    callback=_run,
    help="Run an unchanged socketserver program on harken: SCRIPT, or a MODULE as 'python -m' would. The options hold "
    "for every server that the program, its libraries and its Python child processes make.",
    options_metavar="[OPTIONS]",
    context_settings={"allow_interspersed_args": False},
    params=[
        *options.settings_options(),
        click.Option(["-m", "module"], metavar="MODULE", help="Run this module; what follows belongs to it."),
        click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT | -m MODULE [ARGS]..."),
    ],
)
