"""One question to several workers, whose answers become one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

from harken.process.answers import SEARCHES, joined
from harken.process.child import Child

__all__ = ["Inquiries"]

# Seconds for workers to answer: a busy one takes milliseconds, a hung one would never.
ANSWER_SECONDS = 3.0


class _Inquiry:
    def __init__(self, verb: str, asked: set[int], done: Callable[..., object]) -> None:
        self.verb = verb
        self.missing = asked
        self.done = done
        self.answers: list[Any] = []
        self.errors: list[str] = []
        self.deadline = time.monotonic() + ANSWER_SECONDS


class Inquiries:
    """The questions that are under way. The supervisor's thread."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, _Inquiry] = {}

    @property
    def deadline(self) -> float | None:
        """When the next of them is given up, by ``time.monotonic()``."""
        return min((each.deadline for each in self._open.values()), default=None)

    def ask(self, children: Iterable[Child], verb: str, arguments: dict[str, Any], done: Callable[..., object]) -> None:
        """Ask every one of ``children``.

        Args:
            children: whom.
            verb: what; see ``answers``.
            arguments: the verb's.
            done: called once, with ``result=`` or ``error=``.
        """
        number = next(self._numbers)
        asked = {child.pid for child in children if child.channel.send(number=number, verb=verb, arguments=arguments)}
        self._open[number] = _Inquiry(verb, asked, done)
        self._settle(number)

    def hear(self, child: Child, message: dict[str, Any]) -> None:
        """Take one worker's answer."""
        inquiry = self._open.get(message["number"])
        if inquiry is None or child.pid not in inquiry.missing:
            return
        inquiry.missing.discard(child.pid)
        if "error" in message:
            inquiry.errors.append(message["error"])
        else:
            inquiry.answers.append(message["result"])
        self._settle(message["number"])

    def forget(self, child: Child) -> None:
        """A worker has ended and will not answer."""
        for number, inquiry in list(self._open.items()):
            if child.pid in inquiry.missing:
                inquiry.missing.discard(child.pid)
                self._settle(number)

    def turn(self) -> None:
        """Once a turn: answer without those that take too long."""
        for number, inquiry in list(self._open.items()):
            if time.monotonic() >= inquiry.deadline:
                if inquiry.verb in SEARCHES:  # those that are silent may have what nobody else has
                    inquiry.errors.append(f"process {', '.join(map(str, inquiry.missing))} does not answer")
                inquiry.missing.clear()
                self._settle(number)

    def _settle(self, number: int) -> None:
        inquiry = self._open[number]
        if inquiry.missing:
            return
        del self._open[number]
        result = joined(inquiry.verb, inquiry.answers) if inquiry.answers or not inquiry.errors else False
        if inquiry.errors and result is False:  # all failed; or those others have not got what one fails with
            inquiry.done(error=inquiry.errors[0])
        else:
            inquiry.done(result=result)
