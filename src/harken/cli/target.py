"""Load what the operator named: ``module:Name`` or ``path/file.py:Name``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import click

from harken.errors import ConfigError, nearest
from harken.stalls import sight

__all__ = ["is_handler", "is_server", "load_handler", "load_target", "near_module", "near_script", "require_handler"]


# Seconds that an import may take before somebody who waits is told where it is: most take a tenth of that.
SLOW_SECONDS = 3.0
_SERVES = "what makes a server belongs under `if __name__ == '__main__':`, or start the program by `harken run`"


def load_target(target: str) -> Any:
    """Import the module or file that ``target`` names and return the class in it.

    A file is imported under its stem, with its directory first on ``sys.path``; for a module the working directory
    stands there.

    Args:
        target: ``module:Name``, ``package.module:Name`` or ``path/file.py:Name``.

    Returns:
        The class; a :func:`functools.partial` of a class counts as one.

    Raises:
        ConfigError: one line that says what is wrong and what is near. Where the target's own code failed, its
            ``__cause__`` is that failure, with a traceback of the user's frames alone.
    """
    place, _, name = target.rpartition(":") if ":" in target else (target, "", "")
    module = _load_file(Path(place)) if place.endswith(".py") or os.sep in place else _load_module(place, target)
    if not name:
        raise ConfigError(f"target {target!r} names no class{_offer(place, module)}")
    found = _find(module, name, place)
    if not isinstance(_unwrapped(found), type):
        raise ConfigError(f"{target} is {_kind_of(found)}, not a handler class: give a class with handle()")
    return found


def load_handler(target: str) -> Any:
    """Load a target as :func:`load_target` does and make sure that it is a handler class.

    Raises:
        ConfigError: as there, or it is a class of another kind.
    """
    found = load_target(target)
    require_handler(found, target)
    return found


def require_handler(found: object, target: str) -> None:
    """Make sure that what ``target`` named is a handler class.

    Raises:
        ConfigError: it is a class of another kind.
    """
    if is_server(found):
        raise ConfigError(f"{target} is a server class, not a handler class: give the class with handle()")
    if not is_handler(found):
        raise ConfigError(f"{target} has no handle(), so it is not a handler class: give a class with handle()")


def is_handler(found: object) -> bool:
    """Tell whether connections can be given to this class."""
    return callable(getattr(_unwrapped(found), "handle", None)) and not is_server(found)


def is_server(found: object) -> bool:
    """Tell whether this is a server class."""
    return all(hasattr(_unwrapped(found), verb) for verb in ("serve_forever", "finish_request"))


def _unwrapped(found: object) -> object:
    return _unwrapped(found.func) if isinstance(found, functools.partial) else found


def _load_module(name: str, target: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"target {target!r} is neither module:Name nor path/file.py:Name")
    _put_first(os.getcwd())
    try:
        return _import(name, f"module {name!r}")
    except _Absent as absent:
        raise ConfigError(f"no module named {absent.name!r}{near_module(absent.name)}") from None


def _load_file(path: Path) -> ModuleType:
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a directory, not a Python file")
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r}{near_script(path)}")
    path = path.resolve()
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) != str(path):
        raise ConfigError(f"file {str(path)!r} would hide the module {path.stem!r}, which is in use; rename the file")
    _put_first(str(path.parent))
    importlib.invalidate_caches()
    return _import(path.stem, f"file {str(path)!r}")


def _put_first(directory: str) -> None:
    if directory in sys.path:
        sys.path.remove(directory)
    sys.path.insert(0, directory)


class _Absent(Exception):
    """The module itself is missing, not one that it imports."""

    def __init__(self, name: str) -> None:
        self.name = name


def _import(name: str, what: str) -> ModuleType:
    try:
        with _told_when_slow(what):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise _Absent(error.name) from None
        raise _failure(error, what) from _trimmed(error)
    except SyntaxError as error:
        raise ConfigError(f"syntax error in {error.filename}:{error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the user's code, and becomes one clear line
        raise _failure(error, what) from _trimmed(error)


@contextmanager
def _told_when_slow(what: str) -> Iterator[None]:
    """Say where an import is that does not end: a program that serves by itself never does."""
    importing = threading.get_ident()

    def tell() -> None:
        place = sight(importing).place
        click.echo(f"harken: {what} is still being imported, at {place}; {_SERVES}", err=True)

    timer = threading.Timer(SLOW_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _failure(error: BaseException, what: str) -> ConfigError:
    frames = traceback.extract_tb(_user_frames(error.__traceback__))
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    summary = traceback.format_exception_only(error)[-1].strip()
    hint = f"; {_SERVES}" if any(frame.name in ("server_bind", "serve_forever") for frame in frames) else ""
    return ConfigError(f"{what} failed while it was imported: {summary}{place}{hint}")


def _trimmed(error: BaseException) -> BaseException:
    return error.with_traceback(_user_frames(error.__traceback__))


def _user_frames(frames: TracebackType | None) -> TracebackType | None:
    """Drop the leading frames, which are this module's and the import system's."""
    while frames is not None and _is_machinery(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return frames


def _is_machinery(filename: str) -> bool:
    return filename in {__file__, importlib.__file__} or filename.startswith("<frozen importlib")


def near_module(name: str) -> str:
    """Say which module's name is near to one that does not exist; ``"; did you mean …?"`` or another hint."""
    parent, _, last = name.rpartition(".")
    if isinstance(getattr(sys.modules.get(parent), last, None), type):
        return f"; did you mean '{parent}:{last}'?"
    if parent in sys.modules:
        known = (module.name for module in pkgutil.iter_modules(getattr(sys.modules[parent], "__path__", [])))
        near = nearest(last, known)
        return near.replace("mean '", f"mean '{parent}.") if near else f" in package {parent!r}"
    here = (module.name for module in pkgutil.iter_modules([os.getcwd()]))
    everywhere = (module.name for module in pkgutil.iter_modules())
    return nearest(name, here) or nearest(name, everywhere) or "; looked in the working directory and on sys.path"


def near_script(path: Path) -> str:
    """Say which Python file beside a missing one has a near name; ``"; did you mean …?"`` or nothing."""
    stems = [other.stem for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
    return nearest(path.stem, stems).replace("'?", ".py'?")


def _find(module: ModuleType, name: str, place: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [known for known in vars(found) if not known.startswith("_")] if hasattr(found, "__dict__") else []
            hint = nearest(part, public) or (_offer(place, module) if found is module else "")
            raise ConfigError(f"{place} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def _offer(place: str, module: ModuleType) -> str:
    """Name the handler classes that the module itself defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    classes = [name for name in own if isinstance(vars(module)[name], type) and is_handler(vars(module)[name])]
    return "; say which: " + ", ".join(f"{place}:{name}" for name in classes) if classes else ": write module:Name"


def _kind_of(found: object) -> str:
    if isinstance(found, ModuleType):
        return "a module"
    if callable(found) and hasattr(found, "__code__"):
        return "a function"
    if is_handler(type(found)):
        return f"an instance of {type(found).__name__}"
    article = "an" if type(found).__name__[0] in "aeiouAEIOU" else "a"
    return f"{article} {type(found).__name__}"
