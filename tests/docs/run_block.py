"""Run a page's program: ``run_block.py FILE``. A program that listens is stopped by Ctrl-C once it does.

Exits with 0 when the program ended by itself without an error, or was listening and ended by Ctrl-C.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

from harken import events

listening = threading.Event()
PAUSE = 0.3  # seconds between listening and Ctrl-C: the loop is then surely running, or the program's own client is


def interrupt() -> None:
    """Press Ctrl-C, unless the program ends first."""
    threading.Timer(PAUSE, os.kill, (os.getpid(), signal.SIGINT)).start()


def on_listening(_event: object) -> None:
    """Begin the countdown at the first listener."""
    if not listening.is_set():
        listening.set()
        interrupt()


if __name__ == "__main__":
    path = sys.argv[1]
    text = Path(path).read_text()
    serves = "serve_forever()\n" in text or "harken.serve(" in text
    if serves:
        events.subscribe(on_listening, "listening")
    if "import socketserver\n" in text:
        from harken import standin

        standin.install()
    sys.argv = [path]
    try:
        runpy.run_path(path, run_name="__main__")
    except KeyboardInterrupt:
        pass
    except SystemExit as left:
        if left.code not in (None, 0):
            raise
    if serves and not listening.is_set():
        sys.exit(f"{path} never listened")
    os._exit(0)
