"""Run one of CPython's suites in this process and write what happens, case by case, to a journal.

Started by `run_cpython.py`, which reads the journal: a case that hangs takes this process with it, and its name is then
the last one begun.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import sys
import unittest
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

sys.path[0] = str(Path(__file__).parent)

from suites import is_wanted

# What a case may take that is expected to hang: others of its suite take milliseconds.
HASTY_SECONDS = 1.0


class Journal(unittest.TestResult):
    """Writes one JSON line when a case begins and one for each thing that it says."""

    def __init__(self, out: TextIO, seconds: float, hasty: frozenset[str]) -> None:
        """Write to ``out``; a case may take ``seconds``, and those in ``hasty`` (expected to fail) HASTY_SECONDS."""
        super().__init__()
        self.out = out
        self.seconds = seconds
        self.hasty = hasty

    def _tell(self, case: Any, what: str, text: str = "") -> None:
        self.out.write(json.dumps({"case": case.id(), "what": what, "text": text}) + "\n")
        self.out.flush()

    def startTest(self, test: unittest.TestCase) -> None:
        """Start the clock: when it runs out, the stacks are printed and this process ends."""
        super().startTest(test)
        self._tell(test, "begun")
        faulthandler.dump_traceback_later(HASTY_SECONDS if test.id() in self.hasty else self.seconds, exit=True)

    def stopTest(self, test: unittest.TestCase) -> None:
        """Stop the clock."""
        faulthandler.cancel_dump_traceback_later()
        super().stopTest(test)
        self._tell(test, "ended")

    def addError(self, test: Any, err: Any) -> None:
        """Write a failure."""
        self._tell(test, "failed", self._exc_info_to_string(err, test))  # type: ignore[attr-defined]

    addFailure = addError  # noqa: N815

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        """Write a failure of a part under the name of the whole."""
        if err is not None:
            self._tell(test, "failed", f"{subtest}\n" + self._exc_info_to_string(err, test))  # type: ignore[attr-defined]

    def addSkip(self, test: Any, reason: str) -> None:
        """Write why a case did not run."""
        self._tell(test, "skipped", reason)

    def addUnexpectedSuccess(self, test: Any) -> None:
        """Write that a case marked as failing passed."""
        self._tell(test, "failed", "unexpected success")


def stand_in(engine: str, scope: str) -> None:
    """Place harken as `socketserver`; move servers of ``scope`` to ``engine``."""
    if "socketserver" in sys.modules:
        sys.exit("socketserver was imported before harken could stand in for it")
    import harken

    sys.modules["socketserver"] = harken
    if engine != "default" and scope == "every":
        importlib.import_module("harken.settings").operator.flags["engine"] = engine


@contextlib.contextmanager
def cgi_as_root() -> Iterator[None]:
    """Let root run the CGI cases, which skip themselves while the module is read.

    http.server starts scripts as `nobody`, who may not be able to read the interpreter; here it stays root.
    """
    if os.geteuid() != 0:
        yield
        return
    importlib.import_module("http.server").nobody_uid = os.getuid
    with mock.patch.object(os, "geteuid", return_value=1):
        yield


def cases(suite: Iterable[Any]) -> Iterator[unittest.TestCase]:
    """Flatten a suite."""
    for part in suite:
        if isinstance(part, unittest.TestCase):
            yield part
        else:
            yield from cases(part)


def main() -> int:
    """Run the cases of a module that are wanted and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--impl", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--scope", required=True)
    parser.add_argument("--journal", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--done", type=Path, required=True, help="JSON: {done: [case], hasty: [case]}")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.impl == "harken":
        stand_in(options.engine, options.scope)
    support = importlib.import_module("test.support")
    support.use_resources = ["network", "cpu"] if options.quick else ["network", "cpu", "walltime"]
    before = json.loads(options.done.read_text())
    with cgi_as_root():
        suite = unittest.defaultTestLoader.loadTestsFromName(f"test.{options.module}")
    wanted = [case for case in cases(suite) if is_wanted(options.module, case.id(), quick=options.quick)]
    chosen = [case for case in wanted if case.id() not in before["done"]]
    with open(options.journal, "a") as out:
        unittest.TestSuite(chosen).run(Journal(out, options.seconds, frozenset(before["hasty"])))
    # Threads that a case left behind must not keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


if __name__ == "__main__":
    os._exit(main())
