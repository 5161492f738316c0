# SPDX-License-Identifier: MIT
"""Compare what `import harken` and `import socketserver` cost a fresh interpreter, by `-X importtime`."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

from benchkit.build import environment

IMPORT_SECONDS = 60.0
DEFAULT_TIMES = 25  # the median of so many moves by about 1 %


def main(words: Sequence[str] | None = None) -> int:
    """Print one line of JSON: medians in µs, and the median of the ratios of neighbours in time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=DEFAULT_TIMES, help="imports of each")
    parser.add_argument("--python", default=sys.executable, help="interpreter")
    parser.add_argument("--subject", default="harken")
    parser.add_argument("--baseline", default="socketserver")
    options = parser.parse_args(words)
    for module in (options.subject, options.baseline):
        import_microseconds(module, options.python)  # writes the bytecode
    pairs = [
        (import_microseconds(options.subject, options.python), import_microseconds(options.baseline, options.python))
        for _ in range(options.times)
    ]
    report = {
        options.subject: statistics.median(mine for mine, _ in pairs),
        options.baseline: statistics.median(theirs for _, theirs in pairs),
        "ratio": round(statistics.median(mine / theirs for mine, theirs in pairs), 3),
        "times": options.times,
    }
    print(json.dumps(report))
    return 0


def import_microseconds(module: str, python: str) -> int:
    """Return the cumulative µs of importing `module` in a fresh interpreter.

    Raises:
        SystemExit: it cannot be imported; the message has the traceback.
    """
    command = [python, "-X", "importtime", "-c", f"import {module}"]
    result = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
    )
    if result.returncode:
        raise SystemExit(f"importtime.py: {' '.join(command)} failed:\n{result.stderr}")
    for line in result.stderr.splitlines():
        _, cumulative, name = line.rsplit("|", 2) if line.count("|") == 2 else ("", "", "")
        if name.strip() == module:
            return int(cumulative)
    raise SystemExit(f"importtime.py: {module} was imported before it was asked for (a .pth file?)")


if __name__ == "__main__":
    raise SystemExit(main())
