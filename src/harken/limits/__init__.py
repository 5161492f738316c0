"""The room of limits: who may come in, and how many at once. One file a limit; this is their contract.

A limit is asked once for each connection, in the thread that accepts, and must answer at once. What becomes of a
connection that one of them refuses is the setting ``overload``. Limits of one's own are given by ``limits=[…]``: an
object with these two methods, or the dotted path of a class or an object (``"my.module:Quota"``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from harken import settings

if TYPE_CHECKING:
    from harken.peer import Peer

__all__ = ["LIMITS", "Limit"]


@runtime_checkable
class Limit(Protocol):
    """What a limit does."""

    def admit(self, peer: Peer) -> str | None:
        """Let a connection in, or say in a word why not.

        Args:
            peer: where it comes from: the real client, when a PROXY header names one.

        Returns:
            None for welcome; else the reason, for the event ``rejected`` and the counters. When it raises, that is
            printed to stderr, and the connection is refused: its reason is ``limit_failed``.
        """

    def release(self, peer: Peer) -> None:
        """A connection that was let in has ended; called once for each. Any thread, at any point: it must not wait.

        What it raises is printed to stderr, and disturbs nobody.
        """


def _are_limits(value: tuple[object, ...]) -> None:
    for entry in value:
        if not isinstance(entry, Limit) and not (isinstance(entry, str) and ":" in entry):
            raise ValueError(f"is wrong: {entry!r} has no admit() and release(), and is no package.module:Name")


LIMITS = settings.setting(
    "limits",
    settings.listing(test=_are_limits),
    (),
    meaning="limits of your own beside harken's: objects with admit(peer) and release(peer), or their dotted paths",
    origin="none unless asked",
)
