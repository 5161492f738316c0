"""When a worker has served enough: by connections, by age, by memory."""

from __future__ import annotations

import os
import random
import time

from harken.settings import Settings, count, seconds, setting, size

__all__ = ["Lifespan"]

MAX_REQUESTS = setting(
    "max_requests",
    count(1, optional=True),
    None,
    unit="connections",
    live=True,
    process=True,
    meaning="a worker that has accepted so many (messages for message handlers, datagrams for UDP) is replaced",
    origin="gunicorn's max_requests: the plaster for handlers that leak",
)
MAX_REQUESTS_JITTER = setting(
    "max_requests_jitter",
    count(),
    0,
    unit="connections",
    live=True,
    process=True,
    meaning="each worker takes a random number up to this on top of `max_requests`, so that they do not leave together",
    origin="gunicorn's max_requests_jitter",
)
MAX_WORKER_AGE = setting(
    "max_worker_age",
    seconds(optional=True),
    None,
    unit="seconds",
    live=True,
    process=True,
    meaning="a worker of this age is replaced, each up to a tenth later, so that they do not leave together",
    origin="Granian's workers-lifetime",
)
MAX_WORKER_RSS = setting(
    "max_worker_rss",
    size(1, optional=True),
    None,
    unit="bytes",
    live=True,
    process=True,
    meaning="a worker that holds so much memory is replaced",
    origin="Granian's workers-max-rss",
)

# Part of max_worker_age by which a worker may grow older: those that started together do not leave together.
AGE_JITTER = 0.1

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Lifespan:
    """One worker's. Asked once a turn of its loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._born = time.monotonic()
        # One draw a worker; a jitter that changes later scales it.
        self._draw = random.random()  # noqa: S311 - spreads restarts, guards nothing

    def over(self, requests: int) -> str | None:
        """Return why the worker should be replaced, in words; None while it should not.

        Args:
            requests: how many it has accepted.
        """
        most = self._settings["max_requests"]
        if most is not None and requests >= most + int(self._draw * self._settings["max_requests_jitter"]):
            return f"max_requests: it has served {requests}"
        age, oldest = time.monotonic() - self._born, self._settings["max_worker_age"]
        if oldest is not None and age >= oldest * (1 + self._draw * AGE_JITTER):
            return f"max_worker_age: it is {age:.0f} s old"
        largest = self._settings["max_worker_rss"]
        if largest is not None and (held := resident_bytes()) >= largest:
            return f"max_worker_rss: it holds {held >> 20} MiB"
        return None


def resident_bytes(pid: int | str = "self") -> int:
    """Return a process's resident memory, in bytes; 0 where /proc does not tell (statm, proc(5))."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except OSError:
        return 0
