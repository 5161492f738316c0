# SPDX-License-Identifier: MIT
"""harken as a service: `harken.serve` on the green engine in one process, bare or with all that looks into it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from _work import HOST, make_handler, parse

import harken
import harken.events

options = parse(seen=("nothing", "all"))


def tell(event: Any) -> None:
    """Print the port."""
    print(urlsplit(event.address).port, flush=True)


with tempfile.TemporaryDirectory() as folder:
    settings: dict[str, Any] = {"control": None}
    if options.seen == "all":
        settings = {
            "metrics": f"tcp://{HOST}:0",
            "access_log": str(Path(folder, "access.log")),
            "control": str(Path(folder, "control.sock")),
        }
    harken.events.subscribe(tell, "listening")
    harken.serve(make_handler(harken, options.work), f"tcp://{HOST}:0", engine="green", workers=0, **settings)
