"""What can go wrong, sorted by who is to blame.

The type says whose fault it is; the message says what happened, with which value, and what to do about it.
Each class also derives from the built-in that older code would have caught.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ConfigError",
    "ConnectionClosed",
    "DeadlineExceeded",
    "FrameError",
    "HandoffError",
    "HarkenError",
    "LifecycleError",
    "LimitExceeded",
    "PeerError",
    "PreambleError",
]


class HarkenError(Exception):
    """Every error that harken itself raises."""


class ConfigError(HarkenError, ValueError):
    """The operator or the program asked for something that cannot be: a setting, an address, a target."""


class LifecycleError(HarkenError, RuntimeError):
    """A verb was called in a state that does not allow it. The server is left as it was."""


class ConnectionClosed(HarkenError, ConnectionError):
    """The connection was already closed on this side."""


class PeerError(HarkenError, ConnectionError):
    """The peer broke the rules: its connection is closed and counted, and no traceback is printed."""


class FrameError(PeerError):
    """The peer sent a message that is too long or malformed."""


class PreambleError(PeerError):
    """The peer failed at the door: no valid PROXY header, or no TLS handshake.

    Attributes:
        connection: what its connection had become by then, for the caller to close; None if it was still the same.
    """

    connection: Any = None


class DeadlineExceeded(HarkenError, TimeoutError):
    """A deadline has passed."""


class LimitExceeded(HarkenError):
    """A limit was reached and the policy says to refuse."""


class HandoffError(HarkenError, OSError):
    """Listeners could not be handed to a successor. The old process keeps serving."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the closest known name, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
