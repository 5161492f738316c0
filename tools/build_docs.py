"""Write docs/reference from the code: `make docs`. A test compares the pages with what this would write."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
from prose import doc_of, markdown, page, summary_of, table

import harken
from harken import cli, errors, events, explain, green, testing, transports
from harken.cli.options import load_settings
from harken.lifecycle import MOVES, State
from harken.meter import SECONDS
from harken.observe import families
from harken.preambles import proxy_header
from harken.preambles.proxy_header import ProxyHeader, ProxySSL
from harken.process import signals
from harken.process.start import Started
from harken.records import REASONS
from harken.settings import Setting

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"

HOOKS = (  # in the order in which a server calls them
    "server_bind server_activate service_actions get_request verify_request process_request "
    "process_request_thread finish_request handle_error shutdown_request close_request handle_timeout"
).split()


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def shown(value: object) -> str:
    """Write a value as one would type it."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value in ("", b"", ()):
        return "empty"
    return f"`{value}`"


def settings_page() -> str:
    """Every declared setting."""
    declared = list(load_settings().values())
    overview = table(
        ["setting", "drop-in", "serve", "live", "meaning"],
        (
            [f"[`{s.name}`](#{s.name})", shown(s.default), shown(s.serve), "yes" if s.live else "", markdown(s.meaning)]
            for s in declared
        ),
    )
    return page(
        "Settings",
        "A setting is a keyword argument of every server class, a class attribute, a flag of the commands, a variable\n"
        "and a key of the TOML file that `--config` names, all by the same name.\n"
        "The first of these that says something holds: a live change by `configure()`, flag, variable, file,\n"
        "keyword argument, class attribute, default.\n"
        "The defaults of the drop-in classes are the standard library's; those of `harken serve` are for production.",
        "Times are seconds, sizes bytes (`KiB`, `MiB` and `GiB` may follow), lists are separated by commas,\n"
        '`none` is no value, and 0 is zero and not "off".',
        overview,
        *map(_setting, declared),
    )


def _setting(declared: Setting) -> str:
    lines = [
        f"* values: {declared.kind.describe()}" + (f", in {declared.unit}" if declared.unit else ""),
        f"* default: {shown(declared.default)}"
        + (f"; under `serve` {shown(declared.serve)}" if declared.serve != declared.default else ""),
        f"* origin: {markdown(declared.origin)}",
        f"* flag `{declared.flag}`, variable `{declared.variable}`"
        + (", may change on a running server" if declared.live else ""),
    ]
    if declared.process:
        lines.append("* heeded by `harken serve` and `harken.serve()` alone; a server class warns of it as a keyword")
    if declared.stdlib:
        lines.append(f"* the standard library's attribute `{declared.stdlib}` sets it too, on a class or a server")
    return f"## {declared.name}\n\n{markdown(declared.meaning)}.\n\n" + "\n".join(lines)


# ── events, errors, lifecycle ────────────────────────────────────────────────────────────────────────────────────────


def events_page() -> str:
    """Every event, and every reason for which a connection closes."""
    return page(
        "Events",
        doc_of(events),
        f"## harken.events.subscribe{_signature(events.subscribe)}",
        doc_of(events.subscribe),
        "## Event",
        doc_of(events.Event),
        "## Names",
        table(
            ["event", "when, and its fields"],
            ([f"`{name}`", text] for name, text in events.NAMES.items()),
        ),
        "Events of a server carry it as `server`.",
        "## Reasons of `closed`",
        "A connection that `opened` has exactly one `closed`. Its reason is one of these; the first to be known wins.",
        table(["reason", "meaning"], ([f"`{name}`", text] for name, text in REASONS.items())),
    )


def metrics_page() -> str:
    """Every metric, and what else the page of metrics has."""
    return page(
        "Metrics",
        doc_of(families),
        "The setting [`metrics`](settings.md#metrics) opens an address of its own for them:\n"
        "`harken serve app.py:Echo --metrics tcp://127.0.0.1:9100`.\n"
        "One scrape shows all workers added up.",
        table(["path", "answers"], ([f"`{path}`", text] for path, text in PATHS.items())),
        "## Families",
        table(
            ["metric", "kind", "labels", "meaning"],
            (
                [f"`{f.name}`", f.kind, ", ".join(f"`{label}`" for label in f.labels), markdown(f.meaning)]
                for f in families.FAMILIES.values()
            ),
        ),
        "Histograms have buckets up to " + ", ".join(f"{bound:g}" for bound in SECONDS) + " seconds.",
        "The reasons of `harken_connections_closed_total` are on the page [Events](events.md#reasons-of-closed).\n"
        "The causes of `harken_worker_restarts_total`:",
        table(["cause", "meaning"], ([f"`{cause}`", text] for cause, text in families.CAUSES.items())),
        "What a worker that is killed has counted within its last second may be lost.",
    )


PATHS = {
    "/metrics": "all figures, in Prometheus' text format or OpenMetrics",
    "/health/live": "200; 503 when the supervisor does not answer, or, without one, when a loop hangs",
    "/health/ready": "200 while new connections are served; 503, with the reason, while the service starts, is "
    "suspended or drains, or while no worker is ready",
    "/": "the live view, for people",
}


def errors_page() -> str:
    """Every error, under the one that it derives from."""
    classes = [getattr(errors, name) for name in errors.__all__]
    rows = (
        [f"`{c.__name__}`", ", ".join(f"`{b.__name__}`" for b in c.__bases__), summary_of(c)]
        for c in _by_depth(classes)
    )
    return page("Errors", doc_of(errors), table(["error", "derives from", "meaning"], rows))


def _by_depth(classes: Iterable[type]) -> list[type]:
    return sorted(classes, key=lambda c: [ancestor.__name__ for ancestor in reversed(c.__mro__)])


def lifecycle_page() -> str:
    """The table of states and moves, as a table and as a drawing."""
    moves = [(state, verb, after) for state, verbs in MOVES.items() for verb, after in verbs.items()]
    drawing = [f"    {state.value} --> {after.value}: {verb}" for state, verb, after in moves if state is not after]
    verbs = sorted({verb for _, verb, _ in moves})
    return page(
        "Lifecycle",
        "A server is in one of these states, and these verbs move it to another.\n"
        "A verb that the table does not allow is a `LifecycleError`, and the server is left as it was.",
        table(["from", *verbs], ([f"**{s.value}**", *(_after(s, verb) for verb in verbs)] for s in State)),
        "`serve` stands for `serve_forever()`, `stop` for `shutdown()` or the end of the loop,\n"
        "`close` for `server_close()`.",
        "```mermaid\nstateDiagram-v2\n    [*] --> new\n" + "\n".join(drawing) + "\n```",
        "## Verbs",
        *(_member(_definer(name), name) for name in VERBS),
        f"## harken.background{_signature(harken.background)}",
        doc_of(harken.background),
        *_things(harken, ("DrainReport", "ConnectionInfo")),
    )


def _after(state: State, verb: str) -> str:
    after = MOVES[state].get(verb)
    return after.value if after else ""


VERBS = (
    "serve_forever shutdown suspend resume drain server_close wait_ready connections close_connection configure stats "
    "handle_request fileno"
).split()


# ── commands and addresses ───────────────────────────────────────────────────────────────────────────────────────────


def cli_page() -> str:
    """Every command, with the options that are not settings."""
    return page(
        "Commands",
        "`harken COMMAND --help` prints the same, and the settings too:\n"
        "`serve`, `run` and `check` take a flag for every [setting](settings.md).",
        table(
            ["command", "does"], ([f"[`harken {name}`](#harken-{name})", text] for name, text in cli.COMMANDS.items())
        ),
        "Exit status: 0 done, 1 failed, 2 asked for wrongly, 3 drained with connections cut at the deadline (`serve`).",
        *map(_command, cli.COMMANDS),
    )


def _command(name: str) -> str:
    command = cli.root.get_command(click.Context(cli.root), name)
    assert command is not None
    context = click.Context(command, info_name=f"harken {name}")
    flags = {declared.flag for declared in load_settings().values()}
    records = [
        option.get_help_record(context)
        for option in command.get_params(context)
        if option.expose_value or not flags & {*option.opts}
    ]
    rows = [[f"`{option[0]}`", option[1]] for option in records if option]
    verbs = [_verb(verb, name) for verb in command.commands.values()] if isinstance(command, click.Group) else []
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    text = inspect.cleandoc(command.help or "")
    known = table(["verb", "does"], verbs) + "\n\n" if verbs else ""
    return f"## harken {name}\n\n```text\n{usage}\n```\n\n{text}\n\n{known}" + table(["option", "meaning"], rows)


def _verb(command: click.Command, group: str) -> list[str]:
    """A row for one verb of a group, with its own options."""
    context = click.Context(command, info_name=command.name)
    words = " ".join(piece for piece in command.collect_usage_pieces(context) if piece != "[OPTIONS]")
    options = [option.get_help_record(context) for option in command.params if isinstance(option, click.Option)]
    shared = {flag for option in cli.root.get_command(context, group).params for flag in option.opts}  # type: ignore[union-attr]
    own = [f"`{record[0]}`: {record[1]}" for record in options if record and record[0].split()[0] not in shared]
    text = inspect.cleandoc(command.help or "").rstrip(".")
    return [f"`{f'{command.name} {words}'.strip()}`", "; ".join([text, *own])]


def signals_page() -> str:
    """What each signal does to a service."""
    return page(
        "Signals",
        "`harken serve` and `harken.serve()` heed these, with the names and meanings that gunicorn gave them.\n"
        "Send them to the supervisor, the process that the PID file names:\n"
        '`kill -HUP "$(cat /run/app.pid)"`.',
        table(
            ["signal", "to the supervisor", "with `workers=0`"],
            ([f"`{number.name}`", *meaning] for number, meaning in signals.MEANINGS.items()),
        ),
        "## Workers",
        "A worker heeds `SIGTERM` (drains and ends), `SIGINT` and `SIGQUIT` (ends now) and `SIGUSR1`; the supervisor\n"
        "replaces one that has ended. It leaves the others to the supervisor, so that a terminal's do no harm.",
        "## Where there is no supervisor",
        "`serve_forever()` of a server class and `harken.start()` leave signals to the program.\n"
        "So does `harken.serve()` outside of the main thread.",
    )


FORMS = {
    "tcp://127.0.0.1:8800": "TCP on one address",
    "tcp://:8800": "TCP on every IPv4 and IPv6 address, by one socket",
    "tcp://[::1]:0": "TCP on any free port",
    "tls://:8443?cert=site.pem&key=site.key": "TLS over TCP, with a certificate of its own",
    "tls://:8443": "TLS over TCP, with the certificate that the settings name",
    "udp://127.0.0.1:8800": "UDP; hosts and ports as for TCP",
    "unix:/run/app.sock": "a Unix stream socket, mode 0600",
    "unix:/run/app.sock?mode=660&user=root&group=root": "with another mode, owner and group",
    "unixgram:/run/app.sock": "a Unix datagram socket, with the same options",
    "fd://3": "a bound socket that was inherited by its number",
    "fd://web": "one that systemd passed by this `FileDescriptorName`",
    "systemd:": "all sockets that systemd passed",
}


def addresses_page() -> str:
    """Every form of address, and each scheme by the docstring of the module that opens it."""
    for url in FORMS:
        transports.for_url(url).parse(url)  # what the page shows is well-formed
    modules = {name: importlib.import_module(name) for name in transports.SCHEMES.values()}
    return page(
        "Addresses",
        "An address is a URL: `harken serve --bind URL`, `harken.serve(Handler, URL)`.\n"
        "A peer whose IPv4 address is mapped into IPv6, `::ffff:127.0.0.1`, is shown as `127.0.0.1`.\n"
        "An address that another server has is refused, by whom is said where the machine tells.",
        table(["address", "is"], ([f"`{url}`", meaning] for url, meaning in FORMS.items())),
        *(f"## {_schemes(name)}\n\n{doc_of(module)}" for name, module in modules.items()),
    )


def _schemes(module: str) -> str:
    return ", ".join(scheme for scheme, name in transports.SCHEMES.items() if name == module)


# ── servers and handlers ─────────────────────────────────────────────────────────────────────────────────────────────


def server_page() -> str:
    """The server classes, their hooks in call order, and the attributes that change them."""
    classes = [c for c in _public_classes() if hasattr(c, "process_request") or c.__name__.endswith("MixIn")]
    return page(
        "Servers",
        "The classes of `socketserver`, with the same bases, hooks, attributes and defaults,\n"
        "and harken's beside them.\n"
        "Every [setting](settings.md) is a keyword argument of each server class.",
        table(["class", "bases", "what it is"], map(_class_row, classes)),
        "A subclass inherits the attributes of its bases.",
        *(f"## {c.__name__}\n\n{doc_of(c)}" for c in classes if "Attributes:" in (c.__doc__ or "")),
        "## Hooks",
        "In the order in which a server calls them; each may be overridden or extended.",
        *(_member(_definer(name), name) for name in HOOKS),
        *_things(harken, ("serve", "start")),
        "### What harken.start returns",
        doc_of(Started),
        *(part.replace("### ", "#### ", 1) for part in _public_members(Started)),
        *_things(harken, ("TLS",)),
        "The verbs (`serve_forever`, `shutdown`, `drain` and so on) are on the page [Lifecycle](lifecycle.md).",
    )


def green_threads_page() -> str:
    """What handlers on the green engine wait by."""
    return page("Green threads", doc_of(green), *_things(green, green.__all__))


def testing_page() -> str:
    """What tests of handlers, servers and engines need."""
    return page("Testing", doc_of(testing), *_things(testing, testing.__all__))


def explain_page() -> str:
    """What ``harken explain`` is made of."""
    return page("Explain", doc_of(explain), *_things(explain, explain.__all__))


def _things(module: types.ModuleType, names: Iterable[str]) -> Iterator[str]:
    """Functions and classes of a module, the classes with their members."""
    for name in names:
        thing = getattr(module, name)
        if not getattr(thing, "__module__", "").startswith("harken"):
            continue  # data, and what is the standard library's
        made = isinstance(thing, type) and "__init__" not in vars(thing)
        yield f"## {module.__name__}.{name}{'' if made else _signature(thing)}\n\n{doc_of(thing)}"
        if isinstance(thing, type):
            yield from _public_members(thing)


def _definer(hook: str) -> type:
    return harken.BaseServer if hook in vars(harken.BaseServer) else harken.TCPServer


def handlers_page() -> str:
    """The handler classes and what each gives to `handle`."""
    classes = [c for c in _public_classes() if c.__name__.endswith("RequestHandler")]
    return page(
        "Handlers",
        "A handler class is instantiated once for each connection or datagram: `setup()`, `handle()`, `finish()`.",
        table(["class", "bases", "what it is"], map(_class_row, classes)),
        *(f"## {c.__name__}\n\n{doc_of(c)}\n\n" + "\n\n".join(_own_members(c)) for c in classes),
        "## Peer",
        doc_of(harken.Peer),
    )


def proxy_protocol_page() -> str:
    """The header that proxies send, and what it says."""
    return page(
        "PROXY protocol",
        doc_of(proxy_header) + "\n\n"
        "A server reads it before everything else if the setting [`proxy`](settings.md#proxy) says so;\n"
        "a handler finds it at `self.peer.proxy`.",
        f"## harken.ProxyHeader{_signature(ProxyHeader)}",
        doc_of(ProxyHeader),
        *_public_members(ProxyHeader),
        "## harken.ProxySSL",
        doc_of(ProxySSL),
        *_public_members(ProxySSL),
    )


def _public_members(cls: type) -> Iterator[str]:
    for name, value in vars(cls).items():
        if not name.startswith("_") and isinstance(value, (property, classmethod, types.FunctionType)):
            signature = "" if isinstance(value, property) else _signature(getattr(cls, name))
            yield f"### {name}{signature}\n\n{doc_of(value)}"


def _own_members(cls: type) -> Iterator[str]:
    for name, value in vars(cls).items():
        if not name.startswith("_") and hasattr(type(value), "__get__"):
            yield _member(cls, name)


def _public_classes() -> list[type]:
    found = (getattr(harken, name) for name in harken.__all__)
    return [c for c in found if isinstance(c, type) and c.__module__.startswith("harken.")]


def _class_row(cls: type) -> list[str]:
    bases = ", ".join(f"`{base.__name__}`" for base in cls.__bases__ if base is not object)
    return [f"`{cls.__name__}`", bases, summary_of(cls)]


def _member(cls: type, name: str) -> str:
    found = inspect.getattr_static(cls, name)
    signature = _signature(found) if inspect.isfunction(found) else ""
    return f"### {name}{signature}\n\n{doc_of(found)}"


def _signature(function: Callable[..., object]) -> str:
    """Write a signature without annotations, which say in types what the docstring says in words."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


PAGES: dict[str, Callable[[], str]] = {
    name: function
    for function in list(vars().values())
    if isinstance(function, types.FunctionType) and function.__name__.endswith("_page")
    for name in [function.__name__.removesuffix("_page") + ".md"]
}


def main() -> None:
    """Write every page that has changed."""
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        path, text = REFERENCE / name, make()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(REFERENCE.parent.parent)}")


if __name__ == "__main__":
    main()
