# SPDX-License-Identifier: MIT
"""A server under measurement: a session of its own on a core of its own, and what /proc tells of it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 20.0  # a cold interpreter on a busy machine takes one or two
END_SECONDS = 3.0
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ServerError(RuntimeError):
    """The server did not start; the message has what it said."""


class Usage(NamedTuple):
    """What a server and its children have used up to a moment."""

    at: float  # time.monotonic()
    cpu: float  # seconds, user and system, children that have ended included
    rss: int  # bytes, shared pages counted once a process


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Run the body on one core; what it starts stays there. None: wherever the kernel likes."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server:
    """A running server; `end()` leaves nothing of it."""

    def __init__(
        self,
        command: Sequence[str],
        core: int | None,
        environment: Mapping[str, str],
        patience: float = START_SECONDS,
    ) -> None:
        """Start it and wait for its port.

        Raises:
            ServerError: it ended, or printed no port, within so many seconds.
        """
        with pinned(core):
            # A session of its own: its children are found, and ended, by its number.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=dict(environment),
            )
        self.complaints = ""
        try:
            self.port = self._read_port(patience)
        except BaseException:
            self.end()
            raise

    def usage(self) -> Usage:
        """Return what the whole session has used so far."""
        cpu, rss = 0.0, 0
        for pid, fields in _stats():
            if int(fields[3]) == self._process.pid:
                with contextlib.suppress(OSError):  # it has just ended: its parent's cutime has it
                    cpu += time.clock_gettime(_cpu_clock(pid)) + (int(fields[13]) + int(fields[14])) / TICKS
                rss += int(fields[21])
        return Usage(time.monotonic(), cpu, rss * PAGE_BYTES)

    def end(self) -> None:
        """End every process of the session, first with SIGTERM; afterwards `complaints` is what it wrote to stderr."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._signal(signal.SIGKILL)
        try:
            _, said = self._process.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            said = b"(did not end)"
        self.complaints = said.decode("utf-8", "replace").strip()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read_port(self, patience: float) -> int:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], patience)
        line = self._process.stdout.readline().strip() if ready else b""
        if line.isdigit():
            return int(line)
        self.end()
        raise ServerError(f"{' '.join(map(str, self._process.args))} printed no port: {line!r} {self.complaints}")  # type: ignore[arg-type]


def _stats() -> Iterator[tuple[int, list[str]]]:
    """Yield each process's number and its /proc/PID/stat from the state (field 3 of proc(5)) on."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()


def _cpu_clock(pid: int) -> int:
    """Return the clock of a process's CPU time, in ns where /proc/PID/stat has 10 ms (clock_getcpuclockid(3))."""
    return (~pid << 3) | 2  # CPUCLOCK_SCHED of include/linux/posix-timers_types.h
