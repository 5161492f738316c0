"""A worker as its supervisor sees it, and as it sees its supervisor.

The worker's process is forked from a supervisor that has no threads and has not imported the target, so what it loads
is the code as it stands on disk now. It never returns into its parent's program: it ends here.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from harken.errors import HarkenError
from harken.observe.collector import Collector
from harken.process import streams
from harken.process.channel import Channel
from harken.process.ledger import Slate
from harken.process.recycling import Lifespan
from harken.process.scoreboard import Row
from harken.process.signals import Early
from harken.process.worker import Worker

__all__ = ["DUMP_SIGNAL", "FAILED", "Child", "Inside"]

# Asks a worker to write down what each of its threads does, whatever it is busy with: faulthandler's C handler needs no
# interpreter. The last real-time signal is nobody's (signal(7)); abort's would leave a core file.
DUMP_SIGNAL = signal.SIGRTMAX
FAILED = 1


class Child:
    """The supervisor's view of one worker.

    Attributes:
        pid: its process.
        generation: which reload it belongs to.
        channel: to it.
        row: its row of the scoreboard.
        slate: its figures.
        drain_timeout: how long it may drain; a reload may have read another one since, for its heirs.
        born: when it was started, by ``time.monotonic()``.
        ready: whether it accepts.
        engine: its engine's name, when it is ready.
        leaving: whether it was asked to leave, or is being killed.
        heir_wanted: why it wants to be replaced, or None.
        trouble: what it said when it could not start.
        killed_for: why it is being killed, or None.
        kill_at: when patience with it ends, by ``time.monotonic()``; None while there is no hurry.
    """

    def __init__(
        self, pid: int, generation: int, channel: Channel, row: Row, slate: Slate, dump: int, drain_timeout: float
    ) -> None:
        self.pid = pid
        self.generation = generation
        self.channel = channel
        self.row = row
        self.slate = slate
        self.drain_timeout = drain_timeout
        self.born = time.monotonic()
        self.ready = False
        self.engine = ""
        self.leaving = False
        self.heir_wanted: str | None = None
        self.trouble: str | None = None
        self.killed_for: str | None = None
        self.kill_at: float | None = None
        self._dump = dump

    @property
    def is_judged(self) -> bool:
        """Whether its loop must turn."""
        return self.ready and not self.leaving and self.engine != "inline"

    def signal(self, number: int) -> None:
        """Send a signal; a worker that has just ended is none the worse for it."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass  # reaped in a moment

    def leave(self, grace: float) -> None:
        """Ask it to drain and end; others go on with its listeners.

        Args:
            grace: seconds beyond its drain, after which it is killed.
        """
        if not self.leaving:
            self.leaving = True
            self.kill_at = time.monotonic() + self.drain_timeout + grace
            self.signal(signal.SIGTERM)

    def stop(self, patience: float) -> None:
        """Tell it to stop now, and kill it after ``patience`` seconds."""
        self.leaving = True
        until = time.monotonic() + patience
        self.kill_at = until if self.kill_at is None else min(self.kill_at, until)
        self.signal(signal.SIGQUIT)

    def kill(self, reason: str, patience: float) -> None:
        """Have its stacks written down, and kill it ``patience`` seconds later."""
        self.leaving = True
        self.killed_for = reason
        self.kill_at = time.monotonic() + patience
        self.signal(DUMP_SIGNAL)

    def stacks(self) -> str:
        """Return what its threads did when it was asked by :data:`DUMP_SIGNAL`."""
        size = os.lseek(self._dump, 0, os.SEEK_END)
        return os.pread(self._dump, min(size, 1 << 20), 0).decode(errors="replace")

    def release(self) -> None:
        """In another child: let go of it, which goes on."""
        self.channel.release()
        self.slate.close()
        os.close(self._dump)

    def close(self) -> None:
        """Let go of what the supervisor holds for it."""
        self.channel.close()
        self.slate.close()
        os.close(self._dump)


class Inside:
    """The worker's side: loads the handler, serves, and listens to the supervisor."""

    def __init__(
        self,
        make: Callable[[], Worker],
        channel: Channel,
        row: Row,
        slate: Slate,
        dump: int,
        answer: Callable[[Worker, str, dict[str, Any]], Any],
        standing: Mapping[str, dict[str, Any]],
        early: Early,
    ) -> None:
        """Prepare.

        Args:
            make: loads the handler and returns the worker.
            channel: to the supervisor.
            row: ours on the scoreboard.
            slate: where our figures stand.
            dump: a descriptor for stacks.
            answer: answers what the supervisor asks.
            standing: what it has asked of all workers, by verb: heeded before the first connection is taken.
            early: the signals that come before the worker heeds them.
        """
        self._make = make
        self._channel = channel
        self._row = row
        self._slate = slate
        self._dump = dump
        self._answer = answer
        self._standing = standing
        self._early = early
        self._lifespan: Lifespan | None = None
        self._retiring = False
        self._worker: Worker | None = None

    def live(self) -> NoReturn:
        """Serve, and end this process with the worker's exit status."""
        status = FAILED
        try:
            faulthandler.register(DUMP_SIGNAL, self._dump, all_threads=True, chain=False)
            status = self._serve()
        except (HarkenError, OSError) as error:
            if error.__cause__ is not None:
                traceback.print_exception(error.__cause__)
            self._channel.send(type="failed", reason=" ".join(str(error).split()))
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else FAILED
        except BaseException:  # noqa: BLE001 - this process ends here, whatever it was
            traceback.print_exc()
        _end(status)

    def _serve(self) -> int:
        self._channel.raise_at_end(signal.SIGTERM)  # its default ends us, whatever the import waits for
        worker = self._worker = self._make()
        self._channel.raise_at_end(0)
        worker.ends_with_process()
        worker.doors_stay = lambda: not self._row.doors_close
        worker.on_own_end = self._tell_own_end
        worker.traces.push = lambda token, entries: self._channel.send(type="traced", token=token, entries=entries)
        self._lifespan = Lifespan(worker.settings)
        collector = Collector(worker.servings, self._slate) if worker.settings["metrics"] is not None else None
        worker.collector = collector
        threading.Thread(target=self._listen, args=(worker,), name="harken-channel", daemon=True).start()
        try:
            if collector is not None:
                collector.start()
            return worker.run(on_ready=self._tell_ready, on_turn=self._turn)
        finally:
            worker.close()
            if collector is not None:
                collector.stop()

    def _tell_ready(self) -> None:
        assert self._worker is not None
        self._early.repeat()
        for verb, arguments in self._standing.items():
            with suppress(HarkenError):  # there is nothing to resume
                self._answer(self._worker, verb, arguments)
        self._channel.send(type="ready", engine=self._worker.settings["engine"] or "inline")

    def _tell_own_end(self) -> None:
        """Ask for an heir: the program ends us by a verb of its server."""
        if not self._retiring:
            self._retiring = True
            self._channel.send(type="retire", reason="ended: its program shut the server down")

    def _turn(self) -> None:
        """Once a turn of the loop that serves: the heartbeat."""
        worker, lifespan = self._worker, self._lifespan
        assert worker is not None
        assert lifespan is not None
        self._row.write(worker.open_connections, worker.accepted)
        if not self._retiring and (reason := lifespan.over(worker.accepted)) is not None:
            self._retiring = True
            self._channel.send(type="retire", reason=reason)

    def _listen(self, worker: Worker) -> None:
        """Hear what the supervisor says. Without one there is nobody to serve for: drain and leave."""
        while True:
            try:
                messages = self._channel.receive()
            except EOFError:
                worker.doors_stay = lambda: False
                os.kill(os.getpid(), signal.SIGTERM)
                return
            for message in messages:
                self._heed(worker, message)

    def _heed(self, worker: Worker, message: dict[str, Any]) -> None:
        try:
            reply = {"result": self._answer(worker, message["verb"], message.get("arguments", {}))}
        except Exception as error:  # noqa: BLE001 - whoever asked is told
            reply = {"error": f"{error}"}
        self._channel.send(type="reply", number=message["number"], **reply)


def _end(status: int) -> NoReturn:
    """End this process as the interpreter would, without running what its parent's program has still to do."""
    try:
        # The order of Py_FinalizeEx: threads that are not daemons, then exit functions, then what is buffered.
        getattr(threading, "_shutdown", lambda: None)()
        atexit._run_exitfuncs()
        streams.settle()
    except BaseException:  # noqa: BLE001 - nobody is left to hear of it
        traceback.print_exc()
    os._exit(status)
