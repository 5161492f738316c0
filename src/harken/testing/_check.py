"""A named check of an engine, so that a test runner can list them one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harken.engines import Engine, Options

__all__ = ["DATAGRAMS", "STREAMS", "EngineCheck", "Make", "expect", "on"]

Make = Callable[[Options], Engine]
STREAMS = ("tcp", "unix")
DATAGRAMS = ("udp", "unixgram")


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """One clause of an engine's contract.

    Attributes:
        name: what it is about.
        meaning: what it demands.
        transports: on which it can be run, among ``tcp, unix, udp, unixgram``.
        run: runs it on one of them.
        behind: on which it can also be run with preambles before the handler: ``tcp+tls``, ``unix+proxy+tls`` ….
    """

    name: str
    meaning: str
    transports: tuple[str, ...]
    run: Callable[[Make, str], None]
    behind: tuple[str, ...] = ()

    def __call__(self, make: Make, transport: str | None = None) -> None:
        """Run the check, on one transport (also one of ``behind``) or on all of its own.

        Raises:
            AssertionError: the engine breaks this clause.
        """
        for each in (transport,) if transport else self.transports:
            self.run(make, each)

    def __str__(self) -> str:
        return self.name


def on(*transports: str, behind: tuple[str, ...] = ()) -> Callable[[Callable[[Make, str], None]], EngineCheck]:
    """Make a function that runs on ``transports`` a check of its own name.

    Args:
        transports: among ``tcp, unix, udp, unixgram``.
        behind: preambles with which it runs on each of them too.
    """

    def name(function: Callable[[Make, str], None]) -> EngineCheck:
        meaning = (function.__doc__ or "").partition("\n")[0]
        both = tuple(f"{transport}+{wire}" for transport in transports for wire in behind)
        return EngineCheck(function.__name__, meaning, transports, function, both)

    return name


def expect(condition: object, message: str) -> None:
    """Demand something, also under ``python -O``.

    Raises:
        AssertionError: with ``message``, when ``condition`` is false.
    """
    if not condition:
        raise AssertionError(message)
