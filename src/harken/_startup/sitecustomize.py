"""Runs at the start of every Python process that a program under ``harken run`` starts.

The variable says that harken shall stand in for ``socketserver`` here too. A child must never break by it: one whose
interpreter has no harken, or another harken, runs as if nothing were. Then the ``sitecustomize`` that this one hides,
if there is one, gets its turn.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def _run_on_harken() -> None:
    if "HARKEN_RUN" not in os.environ:
        return
    try:
        from harken import standin
        from harken.observe import access, log

        standin.take_over()
        log.attach_if_asked()
        access.attach_if_asked()
    except Exception:  # noqa: BLE001 - whatever is wrong, the child is not ours to break
        pass


def _hand_on() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if os.path.abspath(entry) != here])
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_run_on_harken()
_hand_on()
