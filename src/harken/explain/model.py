"""What an explanation consists of: plain records, made by ``describe`` and ``trace``, read by the renderers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

__all__ = ["Advice", "Call", "ClassBox", "Explanation", "Family", "HookRow", "Place", "Trace"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a class or a method stands in the source.

    Attributes:
        file: the path of the file, or an empty string where there is none: compiled code, ``type(…)``.
        line: its first line, counted from 1; 0 when unknown.
    """

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        """Return ``file:line``, the file as short as the import path and the current directory allow."""
        if not self.file:
            return "(no source)"
        return f"{_short(self.file)}:{self.line}" if self.line else _short(self.file)


def _short(file: str) -> str:
    path = PurePath(os.path.abspath(file))
    roots = [PurePath(os.path.abspath(entry)) for entry in (*sys.path, os.curdir)]
    fitting = [root for root in roots if path.is_relative_to(root) and root != path]
    return str(path.relative_to(max(fitting, key=lambda root: len(root.parts)))) if fitting else str(path)


@dataclass(frozen=True, slots=True)
class ClassBox:
    """One class of a hierarchy.

    Attributes:
        key: unique within its family.
        name: the class's name.
        place: where it is defined.
        bases: keys of its direct bases, in their order; ``object`` is left out.
        methods: names of the methods that it defines itself: hooks in call order, then the rest.
        yours: whether it comes neither from the standard library nor from harken.
    """

    key: str
    name: str
    place: Place
    bases: tuple[str, ...]
    methods: tuple[str, ...]
    yours: bool


@dataclass(frozen=True, slots=True)
class Family:
    """A class with all its ancestors, in method resolution order: the class itself comes first."""

    title: str
    classes: tuple[ClassBox, ...]


@dataclass(frozen=True, slots=True)
class HookRow:
    """One hook and what runs when it is called.

    Attributes:
        name: the hook.
        group: the heading that it stands under.
        depth: how deep the call is nested within its group.
        owner: the name of the class whose method runs.
        place: where that method stands.
        where: the thread (or child, or task) that runs it, in few words.
        remark: when it is called, if not for every connection.
        yours: whether the method is the user's own.
    """

    name: str
    group: str
    depth: int
    owner: str
    place: Place
    where: str
    remark: str
    yours: bool


@dataclass(frozen=True, slots=True)
class Advice:
    """Something that looks wrong (``warning``) or that is good to know (``note``)."""

    level: Literal["warning", "note"]
    text: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that ``describe`` found out about a server class.

    Attributes:
        server: the name of the server class.
        handler: the name of the handler class.
        engine: which engine runs the handler, or ``own`` when the user's ``process_request`` decides.
        transport: ``tcp``, ``udp``, ``unix`` or ``unixgram``.
        families: the hierarchy of the server and, when a handler was given, that of the handler.
        hooks: in call order.
        warnings: what looks wrong, warnings before notes.
    """

    server: str
    handler: str
    engine: str
    transport: str
    families: tuple[Family, ...]
    hooks: tuple[HookRow, ...]
    warnings: tuple[Advice, ...]


@dataclass(slots=True)
class Call:
    """One call of a hook, as it happened.

    Attributes:
        name: the hook.
        owner: the name of the class whose method ran.
        thread: the thread, child, green thread or task that ran it.
        depth: how deep it is nested.
        at: milliseconds from the beginning of the trace to the call.
        took: milliseconds that it took; None when it had not returned at the end.
        error: what it raised, as text; empty when it returned.
        count: how many calls in a row this one stands for.
    """

    name: str
    owner: str
    thread: str
    depth: int
    at: float
    took: float | None
    error: str = ""
    count: int = 1


class Trace(list[Call]):
    """The calls of one connection, each before the calls that it made.

    Attributes:
        transport: ``tcp``, ``udp``, ``unix`` or ``unixgram``.
        sent: what the client sent.
        received: what the client got back.
        cut: why the trace was ended early; empty when everything returned.
    """

    def __init__(self, transport: str) -> None:
        """Begin with no calls."""
        super().__init__()
        self.transport = transport
        self.sent = b""
        self.received = b""
        self.cut = ""
