"""Words for the service manager, by the protocol of sd_notify(3): one datagram to the socket ``NOTIFY_SOCKET``."""

from __future__ import annotations

import os
import socket
import time

__all__ = ["Watchdog", "hand_over", "notify", "reloading", "watchdog_interval"]


def notify(**fields: str | int) -> bool:
    """Tell the service manager ``READY=1``, ``STOPPING=1``, ``STATUS=…``, ``MAINPID=…``, ``WATCHDOG=1``.

    Never raises: a manager that does not listen is no reason to stop serving.

    Returns:
        Whether somebody was told.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return False
    address = "\0" + path[1:] if path.startswith("@") else path  # an abstract address, unix(7)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1.0)  # a manager whose queue is full for a second has other troubles
            sock.sendto("\n".join(f"{name}={value}" for name, value in fields.items()).encode(), address)
    except OSError:
        return False
    return True


def reloading() -> bool:
    """Tell that a reload begins; ``READY=1`` ends it.

    ``Type=notify-reload`` wants the time with it, by CLOCK_MONOTONIC in microseconds (systemd.service(5)).
    """
    return notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)


def hand_over(heir: int) -> bool:
    """Tell that another process is the service from now on, and end in its place a reload that may be under way.

    What the heir has said before may not have been heard (``NotifyAccess=main``), its first ``WATCHDOG=1`` among it.
    """
    return notify(MAINPID=heir, READY=1, WATCHDOG=1)


class Watchdog:
    """Feeds the manager's watchdog, from the loop that it is to vouch for, as often as it asks and no more.

    Attributes:
        interval: seconds between two meals; None when the manager does not ask.
    """

    def __init__(self) -> None:
        self.interval = watchdog_interval()
        self._fed = 0.0

    def patience(self, seconds: float) -> float:
        """Return how long a turn may take, ``seconds`` at most: short enough that no meal comes too late."""
        return seconds if self.interval is None else min(seconds, self.interval / 2)

    def feed(self) -> None:
        """Say ``WATCHDOG=1`` if it is time. Call it once a turn."""
        now = time.monotonic()
        if self.interval is not None and now - self._fed >= self.interval:
            self._fed = now
            notify(WATCHDOG=1)


def watchdog_interval() -> float | None:
    """Return the seconds between two ``WATCHDOG=1``: half of what the manager allows; None when it does not ask."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    owner = os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or (owner and owner != str(os.getpid())):
        return None
    return max(0.001, int(microseconds) / 2e6)  # sd_watchdog_enabled(3) recommends half
