"""What looks wrong in a server class: rules, each a function that yields warnings and notes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator

from harken.explain.hooks import HANDLER_HOOKS, SERVER_HOOKS, calls_request_thread
from harken.explain.lookup import (
    defines,
    engine_of,
    is_async,
    is_grafted,
    is_harkens,
    is_library,
    is_server,
    is_yours,
    owner_of,
    owner_of_next,
    place_of,
    transport_of,
    yields_to_next,
)
from harken.explain.model import Advice
from harken.process.fitness import faults

__all__ = ["find"]

# ``server_bound`` is 0.87 like ``server_bind`` and a name of its own; ``hande`` is 0.91 like ``handle``.
CLOSE_ENOUGH = 0.89

# Hooks of a server that nobody would write on a handler for a reason of their own.
_SERVER_ONLY = (*(name for name in SERVER_HOOKS if name.endswith("_request")), "server_bind", "handle_error")


def find(server: type, handler: type | None, engine: str) -> list[Advice]:
    """Return warnings, then notes, about a server class and the handler class that it starts."""
    found = [*_hidden_mixins(server), *_never_called(server, engine), *_misspelt(server, SERVER_HOOKS)]
    found += _good_to_know(server, engine)
    if handler is not None:
        found += _misspelt(handler, HANDLER_HOOKS)
        found += _on_the_wrong_class(handler, _SERVER_ONLY, "the server")
        found += _async_misfit(handler, engine)
        found += [Advice("warning", fault) for fault in faults(handler)]
    found += _on_the_wrong_class(server, ("handle",), "the handler")
    return sorted(found, key=lambda advice: advice.level != "warning")


def _own(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if not is_library(base)]


def _written_in(cls: type, name: str) -> str:
    return f"{cls.__name__}.{name} ({place_of(cls, name)})"


def _hidden_mixins(server: type) -> Iterator[Advice]:
    """A mix-in whose hooks lose to a class that stands before it."""
    for mixin in server.__mro__:
        if mixin is object or is_server(mixin):
            continue
        offered = [name for name in (*SERVER_HOOKS, "engine") if defines(mixin, name)]
        winners = {name: winner for name in offered if (winner := _winner(server, mixin, name)) is not None}
        lost = [name for name, winner in winners.items() if is_server(winner)]
        if lost:
            yield _wrong_side(server, mixin, lost)
        for winner in dict.fromkeys(winners.values()):
            names = [name for name in offered if winners.get(name) is winner and name not in lost]
            # harken's mix-ins are made to stand before stdlib's: class Web(PoolMixIn, ThreadingHTTPServer).
            if names and not (is_harkens(winner) and is_library(mixin) and not is_harkens(mixin)):
                yield Advice(
                    "warning",
                    f"{winner.__name__} stands before {mixin.__name__}, whose {_never_reached(names)}",
                )


def _never_reached(names: list[str]) -> str:
    listed = f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"
    return f"{listed} never reached"


def _winner(server: type, mixin: type, name: str) -> type | None:
    """Return the class before ``mixin`` that ends the search for ``name``, unless it is a subclass of ``mixin``."""
    for cls in server.__mro__[: server.__mro__.index(mixin)]:
        if defines(cls, name) and not yields_to_next(cls, name, mixin):
            return None if issubclass(cls, mixin) else cls
    return None


def _wrong_side(server: type, mixin: type, lost: list[str]) -> Advice:
    child = next((cls for cls in reversed(server.__mro__) if mixin in cls.__bases__), server)
    others = [base for base in child.__bases__ if base is not mixin]
    first = next((base for base in others if is_server(base)), server)
    right = ", ".join(base.__name__ for base in (mixin, *others))
    # harken's servers find their engine by an attribute, which may be found behind them too.
    kept = engine_of(server) == vars(mixin).get("engine")
    effect = "of it only the engine counts" if kept else "it does nothing there"
    return Advice(
        "warning",
        f"{mixin.__name__} stands behind {first.__name__}: {effect}, its {_never_reached(lost)}. "
        f"Put the mix-in first: class {child.__name__}({right})",
    )


def _never_called(server: type, engine: str) -> Iterator[Advice]:
    """Hooks that are overridden where nobody calls them."""
    owner = owner_of(server, "process_request_thread")
    if owner is not None and is_yours(owner, "process_request_thread") and not calls_request_thread(server, engine):
        why = {
            "inline": "no threading mix-in is in force",
            "fork": "stdlib's forking servers do not call it",
            "own": "your process_request leaves it out",
        }.get(engine, f"the engine is {engine!r}")
        yield Advice("warning", f"{_written_in(owner, 'process_request_thread')} is never called: {why}")
    owner = owner_of(server, "handle_timeout")
    if owner is not None and is_yours(owner, "handle_timeout"):
        written = _written_in(owner, "handle_timeout")
        yield Advice("note", f"{written} is called by handle_request() only, never by serve_forever()")


def _good_to_know(server: type, engine: str) -> Iterator[Advice]:
    """Overrides that are called, but do not what their name suggests here."""
    for cls in _own(server):
        hidden = owner_of_next(server, cls, "process_request") if defines(cls, "process_request") else None
        if engine == "own" and hidden and not is_server(hidden) and not yields_to_next(cls, "process_request", hidden):
            yield Advice(
                "note",
                f"{_written_in(cls, 'process_request')} does not call super(): "
                f"{hidden.__name__} starts nothing, where the handler runs is up to you",
            )
        for name in ("shutdown_request", "close_request"):
            if transport_of(server) in ("udp", "unixgram") and defines(cls, name):
                yield Advice(
                    "note",
                    f"{_written_in(cls, name)}: a datagram has no connection to close; "
                    "request is the pair (data, socket), and that socket is the server's own",
                )


def _misspelt(cls: type, hooks: tuple[str, ...]) -> Iterator[Advice]:
    """Methods of the user's with a name that is nearly a hook's."""
    for owner in _own(cls):
        for name, value in vars(owner).items():
            if not inspect.isroutine(value) or is_grafted(owner, name) or name.startswith("__") or _is_known(cls, name):
                continue
            meant = _nearly(name, hooks)
            if meant:
                yield Advice("warning", f"{_written_in(owner, name)} is no hook; did you mean {meant}?")


def _is_known(cls: type, name: str) -> bool:
    return name in SERVER_HOOKS + HANDLER_HOOKS or any(defines(base, name) for base in cls.__mro__ if is_library(base))


def _nearly(name: str, hooks: tuple[str, ...]) -> str:
    """Return the hook that a name is a misspelling of: another case, swapped letters, one too many or too few."""
    plain = {_plain(hook): hook for hook in hooks}
    asked = _plain(name)
    close = difflib.get_close_matches(asked, plain, n=1, cutoff=CLOSE_ENOUGH)
    swapped = [hook for hook in plain if sorted(hook) == sorted(asked)]
    return plain[(close or swapped)[0]] if close or swapped else ""


def _plain(name: str) -> str:
    private = "_" if name.startswith("_") else ""
    return private + name.replace("_", "").lower()


def _on_the_wrong_class(cls: type, hooks: tuple[str, ...], right: str) -> Iterator[Advice]:
    for owner in _own(cls):
        for name in hooks:
            if defines(owner, name) and inspect.isroutine(vars(owner)[name]):
                yield Advice("warning", f"{_written_in(owner, name)} is never called here: {name} is a hook of {right}")


def _async_misfit(handler: type, engine: str) -> Iterator[Advice]:
    owner = owner_of(handler, "handle")
    if owner is not None and is_async(vars(owner)["handle"]) and engine not in ("asyncio", "own"):
        yield Advice(
            "warning",
            f"{_written_in(owner, 'handle')} is async and the engine is {engine!r}: nobody awaits it; use AsyncMixIn",
        )
