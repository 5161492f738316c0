"""Run a script or a module as ``python`` itself does.

``runpy`` takes its ``__main__`` away again when the program's last line has run, while threads of the program may live
on and need it (to pickle, to be found by name). Here the program's ``__main__`` stays until the process ends.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from harken.cli.target import near_module, near_script
from harken.errors import ConfigError

__all__ = ["NotRunnable", "run_module", "run_script"]


class NotRunnable(ConfigError):
    """There is no such program."""


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a script, or a directory or archive that holds ``__main__.py``, as ``python PATH ARGUMENTS…`` does.

    Args:
        path: where it is.
        arguments: what it finds in ``sys.argv`` after its own name.

    Raises:
        NotRunnable: it cannot be opened.
        BaseException: whatever the program raises; its traceback is shown from the program's first frame on.
    """
    if not os.path.exists(path):
        raise NotRunnable(f"no script {path!r}{near_script(Path(path))}")
    sys.argv = [path, *arguments]
    path = _absolute(path)
    if os.path.isdir(path) or _is_archive(path):
        _replace_first(path)
        spec = PathFinder.find_spec("__main__", [path])
        if spec is None:
            raise NotRunnable(f"{path!r} holds no __main__.py to run")
        _run_spec(spec)
    else:
        _replace_first(os.path.dirname(os.path.realpath(path)))
        _run_file(path)


def _run_file(path: str) -> None:
    module = ModuleType("__main__")
    module.__dict__.update(__file__=path, __cached__=None, __spec__=None, __package__=None)
    module.__annotations__ = {}
    if path.endswith(".pyc"):
        module.__loader__ = compiled = SourcelessFileLoader("__main__", path)
        _execute(module, lambda: compiled.get_code("__main__"))
    else:
        module.__loader__ = loader = SourceFileLoader("__main__", path)
        _execute(module, lambda: loader.source_to_code(loader.get_data(path), path))


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run a module, or a package's ``__main__``, as ``python -m NAME ARGUMENTS…`` does.

    Args:
        name: its dotted name.
        arguments: what it finds in ``sys.argv`` after its file's path.

    Raises:
        NotRunnable: there is no such module, or it cannot be run.
        BaseException: whatever the program raises; its traceback is shown from the program's first frame on.
    """
    sys.argv = ["-m", *arguments]
    _replace_first(os.getcwd())
    spec = _find_runnable(name)
    sys.argv[0] = spec.origin or name
    _run_spec(spec)


def _absolute(path: str) -> str:
    """Make a path absolute as the interpreter does for ``__file__``: links and ``..`` stay."""
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path.removeprefix("./"))


def _replace_first(directory: str) -> None:
    """Set ``sys.path[0]``, which is still the ``harken`` command's own directory; ``python -P`` has no such entry."""
    if not sys.flags.safe_path:
        sys.path[0] = directory


def _is_archive(path: str) -> bool:
    return zipfile.is_zipfile(path)


def _find_runnable(name: str) -> ModuleSpec:
    if name.startswith("."):
        raise NotRunnable(f"{name!r} is a relative name; name the module from its top package on")
    spec = _find_spec(name)
    if spec.submodule_search_locations is not None:
        spec = _find_spec(f"{name}.__main__", f"{name!r} is a package without a __main__, so it cannot be run")
    return spec


def _find_spec(name: str, otherwise: str = "") -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    if spec is None:
        raise NotRunnable(otherwise or f"no module named {name!r}{near_module(name)}")
    return spec


def _run_spec(spec: ModuleSpec) -> None:
    loader: Any = spec.loader
    module = ModuleType("__main__")
    module.__dict__.update(__file__=spec.origin, __cached__=spec.cached, __spec__=spec, __package__=spec.parent)
    module.__annotations__ = {}
    module.__loader__ = loader
    _execute(module, lambda: loader.get_code(spec.name))


def _execute(module: ModuleType, compile_it: Callable[[], CodeType | None]) -> None:
    """Run the code in ``module`` as ``__main__``; let what it raises look as if nobody had called it."""
    module.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = module
    try:
        code = compile_it()
        if code is None:
            name = module.__spec__.name if module.__spec__ else ""
            raise NotRunnable(f"{name!r} is not made of Python code, so it cannot be run")
        exec(code, module.__dict__)  # noqa: S102 - this is what `python` does with the program
    except (SystemExit, NotRunnable):
        raise
    except BaseException as error:
        _hide_callers(_program_frames(error.__traceback__))
        raise


def _program_frames(frames: TracebackType | None) -> TracebackType | None:
    """Drop the leading frames of this file and of the import system's loaders."""
    while frames is not None and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return frames


def _is_ours(filename: str) -> bool:
    return filename == __file__ or filename.startswith("<frozen importlib")


def _hide_callers(frames: TracebackType | None) -> None:
    """Let the interpreter, which prints what ends the process, begin with these frames.

    The error itself travels on, so that the interpreter also chooses the exit status and, after Ctrl-C, dies of SIGINT.
    """
    show = sys.excepthook

    def show_program(kind: type[BaseException], error: BaseException, _frames: TracebackType | None) -> None:
        show(kind, error.with_traceback(frames), frames)

    sys.excepthook = show_program
