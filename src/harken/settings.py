"""Settings, each declared once, in the room that uses it.

:func:`setting` is the declaration. The keyword argument, class attribute, ``--flag``, ``HARKEN_…`` variable, TOML key
and the row in the reference all come from it. :class:`Settings` answers, for one server, which value holds and where
it came from: live change, flag, environment, file, keyword, class attribute, default, in this order.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
import tomllib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harken.errors import ConfigError, nearest

__all__ = ["REGISTRY", "Kind", "Operator", "Setting", "Settings", "Value", "operator", "setting", "warn_of_process"]

Profile = Literal["drop-in", "serve", "private"]
UNSET: Any = type("Unset", (), {"__repr__": lambda _self: "UNSET", "__bool__": lambda _self: False})()

_PATH = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
# Thirty years. The kernel's and Python's own waits end at some 300 (2**63 nanoseconds), by an OverflowError.
MAX_SECONDS = 10**9
_SIZES = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True, slots=True)
class Kind:
    """What values a setting takes.

    Attributes:
        name: ``count``, ``seconds``, ``bytes``, ``flag``, ``choice``, ``text`` or ``list``.
        types: Python types of a value that was not written as text.
        minimum: the smallest number allowed, or None.
        maximum: the largest number allowed, or None.
        choices: the words allowed, for ``choice``; empty allows any word.
        optional: whether None ("none" in text) is a value.
        test: looks closer at a value; raises ValueError saying, after "is wrong: ", what would be allowed.
    """

    name: str
    types: tuple[type, ...]
    minimum: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    test: Callable[[Any], object] | None = None
    maximum: float | None = None

    def fits(self, value: object) -> bool:
        """Tell whether ``value`` has a type that this kind takes, whatever its size or spelling."""
        if value is None:
            return self.optional
        if isinstance(value, bool) and bool not in self.types:
            return False
        return isinstance(value, self.types)

    def check(self, value: Any) -> Any:
        """Return ``value`` if it is allowed.

        Raises:
            ValueError: saying what would be allowed.
        """
        if not self.fits(value):
            raise ValueError(f"is not {self.describe()}")
        if self.name == "flag" and value is not None:
            return bool(value)
        if self.choices and value is not None and value not in self.choices and not self._is_path(value):
            raise ValueError(f"is not {self.describe()}{nearest(str(value), self.choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"is not {self.describe()}")
        if self.minimum is not None and value is not None and value < self.minimum:
            raise ValueError(f"is below the smallest value allowed, {self.minimum:g}")
        if self.maximum is not None and value is not None and value > self.maximum:
            raise ValueError(f"is above the largest value allowed, {self.show(self.maximum)}")
        if self.test is not None and value is not None:
            self.test(value)
        return tuple(value) if isinstance(value, list) else value

    def parse(self, text: str) -> Any:
        """Read a value from a flag, a variable or a file.

        Raises:
            ValueError: saying what would be allowed.
        """
        word = text.strip()
        if self.optional and word.lower() == "none":
            return None
        try:
            return self.check(self._read(word))
        except (KeyError, ValueError) as error:
            known = isinstance(error, ValueError) and str(error).startswith("is ")
            raise ValueError(str(error) if known else f"is not {self.describe()}") from None

    def _read(self, word: str) -> Any:
        match self.name:
            case "count":
                return int(word)
            case "seconds":
                return float(word)
            case "bytes":
                number, suffix = word[:-3], word[-3:].lower()
                return int(number) * _SIZES[suffix] if suffix in _SIZES else int(word)
            case "flag":
                if word.lower() not in _TRUE | _FALSE:
                    raise KeyError(word)
                return word.lower() in _TRUE
            case "list":
                return tuple(part.strip() for part in word.split(",") if part.strip())
            case _:
                return word

    def _is_path(self, value: object) -> bool:
        """A dotted path (``package.module:Name``) stands for a plug-in of the user's own."""
        return isinstance(value, str) and _PATH.fullmatch(value) is not None

    def take(self, value: Any) -> Any:
        """Return what a file says, to be read.

        Raises:
            ValueError: saying how it is to be written.
        """
        return value

    def show(self, value: Any) -> str:
        """Write a number as it would be typed."""
        return str(value)

    def describe(self) -> str:
        """Name the values allowed, for messages and for the reference."""
        words = {
            "count": "a whole number",
            "seconds": "a number of seconds",
            "bytes": "a number of bytes (KiB, MiB and GiB may follow)",
            "flag": "true or false",
            "choice": "one of " + ", ".join(self.choices),
            "text": "text",
            "list": "a list, separated by commas",
        }[self.name]
        return f"{words} or none" if self.optional else words


def count(minimum: int | None = 0, *, maximum: int | None = None, optional: bool = False) -> Kind:
    """A whole number."""
    return Kind("count", (int,), minimum=minimum, maximum=maximum, optional=optional)


def seconds(*, optional: bool = False) -> Kind:
    """A time in seconds; 0 is zero and not "off"."""
    return Kind("seconds", (int, float), minimum=0, maximum=MAX_SECONDS, optional=optional)


def size(minimum: int = 0, *, optional: bool = False) -> Kind:
    """A size in bytes."""
    return Kind("bytes", (int,), minimum=minimum, optional=optional)


def flag(*, optional: bool = False) -> Kind:
    """True or false."""
    return Kind("flag", (bool, int), optional=optional)  # http.server says allow_reuse_address = 1


def choice(*words: str, optional: bool = False) -> Kind:
    """One of a few words."""
    return Kind("choice", (str,), choices=words, optional=optional)


def listing(*, optional: bool = False, test: Callable[[Any], object] | None = None) -> Kind:
    """A list; in text its entries are separated by commas."""
    return Kind("list", (tuple, list), optional=optional, test=test)


def text(*, optional: bool = False, test: Callable[[Any], object] | None = None) -> Kind:
    """Any text."""
    return Kind("text", (str, bytes), optional=optional, test=test)


@dataclass(frozen=True, slots=True)
class Setting:
    """One declared setting; see :func:`setting`."""

    name: str
    kind: Kind
    default: Any
    serve: Any
    unit: str
    meaning: str
    origin: str
    live: bool
    stdlib: str | None
    stdlib_default: Any
    process: bool

    @property
    def flag(self) -> str:
        """The command-line flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "HARKEN_" + self.name.upper()

    def fallback(self, profile: Profile) -> Any:
        """Return the default under ``profile``."""
        return self.serve if profile == "serve" else self.default

    def read(self, raw: Any, source: str) -> Any:
        """Check ``raw`` (text is parsed) and return the value.

        Raises:
            ConfigError: one line that names the setting, the value and where it came from.
        """
        try:
            return self.kind.parse(raw) if isinstance(raw, str) else self.kind.check(raw)
        except ValueError as error:
            raise ConfigError(f"{self.name} = {raw!r} ({source}) {error}") from None


REGISTRY: dict[str, Setting] = {}


def setting(
    name: str,
    kind: Kind,
    default: Any,
    *,
    meaning: str,
    origin: str,
    serve: Any = UNSET,
    unit: str = "",
    live: bool = False,
    stdlib: str | None = None,
    stdlib_default: Any = UNSET,
    process: bool = False,
) -> Setting:
    """Declare a setting.

    Args:
        name: the keyword argument, class attribute and TOML key; flag and variable follow from it.
        kind: what values it takes.
        default: the value in the drop-in classes.
        meaning: one line for ``--help`` and the reference.
        origin: where the default comes from: a measurement, a man page, a peer.
        serve: the value under ``serve``, when it differs.
        unit: what a number counts.
        live: whether ``configure()`` may change it while the server runs.
        stdlib: the attribute by which ``socketserver`` knows it, read late and on the instance too.
        stdlib_default: that attribute's default there; finding it counts as "nobody set it".
        process: whether it is of processes that ``serve`` runs, so that a server by itself cannot heed it.

    Returns:
        The declaration, also found in :data:`REGISTRY`.
    """
    declared = Setting(
        name=name,
        kind=kind,
        default=default,
        serve=default if serve is UNSET else serve,
        unit=unit,
        meaning=meaning,
        origin=origin,
        live=live,
        stdlib=stdlib,
        stdlib_default=stdlib_default,
        process=process,
    )
    REGISTRY[name] = declared
    return declared


# The modules that declare settings, lightest first; imported when a name is asked for that none has declared yet.
DECLARED_IN = (
    "harken.transports",
    "harken.transports.udp",
    "harken.preambles",
    "harken.preambles._declaration",
    "harken.acceptor",
    "harken.engines",
    "harken.drain",
    "harken.engines.thread",
    "harken.engines.pool",
    "harken.engines.fork",
    "harken.stalls",
    "harken.meter",
    "harken.deadlines",
    "harken.buffers",
    "harken.limits",
    "harken.limits.connections",
    "harken.limits.peers",
    "harken.limits.rate",
    "harken.limits.addresses",
    "harken.limits.alarm",
    "harken.observe.access",
    "harken.observe.log",
    "harken.process.supervisor",
    "harken.process.recycling",
    "harken.process.pidfile",
    "harken.process.privileges",
)


def declare_all() -> dict[str, Setting]:
    """Import every module that declares settings, and return them all."""
    for module in DECLARED_IN:
        importlib.import_module(module)
    return REGISTRY


def known(name: str, source: str) -> Setting:
    """Find a declared setting by any spelling of its name.

    Raises:
        ConfigError: naming the nearest one.
    """
    key = name.replace("-", "_")
    for module in DECLARED_IN if key not in REGISTRY else ():
        importlib.import_module(module)
        if key in REGISTRY:
            break
    if key not in REGISTRY:
        raise ConfigError(f"unknown setting {name!r} ({source}){nearest(key, REGISTRY)}")
    return REGISTRY[key]


def warn_of_process(keywords: Mapping[str, Any], who: str) -> None:
    """Warn of what only ``serve`` heeds, for it would be believed: that a server is another user's, for one.

    Args:
        keywords: settings by name.
        who: was given them.

    Raises:
        ConfigError: a value is not allowed.
    """
    for name, value in keywords.items():
        declared = known(name, "keyword argument")
        if declared.process and declared.read(value, "keyword argument") not in (declared.default, declared.serve):
            said = f"{name} = {value!r} is heeded by harken.serve() and `harken serve` alone, not by {who}"
            warnings.warn(said, RuntimeWarning, stacklevel=_frames_of_ours())


def _frames_of_ours() -> int:
    """How many calls of this package lie between a caller of this and the program, whose line a warning is to show."""
    depth = 1
    while str(sys._getframe(depth).f_globals.get("__name__")).partition(".")[0] == "harken":
        depth += 1
    return depth


class Value(NamedTuple):
    """A value in force and where it came from, in words."""

    value: Any
    source: str


@dataclass(slots=True)
class Operator:
    """What the operator asked of every server in this process: flags and a file, above what the program says.

    Attributes:
        flags: values by name.
        file: values by name.
        path: of the file.
        defaults: what a command takes in place of a default, when nobody has said anything.
        unaware: whether programs run here that know nothing of settings, so that an attribute that does not fit is
            their own.
    """

    flags: dict[str, Any] = field(default_factory=dict)
    file: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    unaware: bool = False

    def load(self, path: str | Path) -> None:
        """Read settings from a TOML file.

        Raises:
            ConfigError: the file is missing, is not TOML, or names a setting that does not exist.
        """
        try:
            with open(path, "rb") as stream:
                content = tomllib.load(stream)
        except OSError as error:
            raise ConfigError(f"cannot read the configuration file {str(path)!r}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the configuration file {str(path)!r} is not TOML: {error}") from None
        self.path = str(path)
        self.file = {known(key, f"file {path}").name: value for key, value in content.items() if key != "bind"}

    def reload(self) -> None:
        """Read the file again, if there is one.

        Raises:
            ConfigError: as :meth:`load`, or a value in it is not allowed; what was read before holds on.
        """
        if not self.path:
            return
        fresh = Operator()
        fresh.load(self.path)
        for name in fresh.file:
            fresh.find(known(name, f"file {self.path}"))
        self.file = fresh.file

    def find(self, declared: Setting, *, environment: bool = True) -> Value | None:
        """Return what flags, environment (unless told not to look) and file say of a setting, or None."""
        if declared.name in self.flags:
            return self._value(declared, self.flags[declared.name], f"flag {declared.flag}")
        if environment and declared.variable in os.environ:
            return self._value(declared, os.environ[declared.variable], f"environment {declared.variable}")
        if declared.name in self.file:
            raw, source = self.file[declared.name], f"file {self.path}"
            try:
                return self._value(declared, declared.kind.take(raw), source)
            except ValueError as error:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(f"{declared.name} = {raw!r} ({source}) {error}") from None
        return None

    def _value(self, declared: Setting, raw: Any, source: str) -> Value:
        raw = tuple(raw) if isinstance(raw, list) else raw
        return Value(declared.read(raw, source), source)


operator = Operator()


class Settings:
    """The settings of one server.

    Reading is late: a class attribute or a variable that changes after construction is seen at the next reading.
    """

    __slots__ = ("_keywords", "_live", "_owner", "profile")

    def __init__(self, owner: object, keywords: Mapping[str, Any] | None = None, profile: Profile = "drop-in") -> None:
        """Bind settings to a server.

        Args:
            owner: the server, whose class attributes count.
            keywords: what its constructor was given.
            profile: which column of defaults applies; ``private`` is a server of harken's own, with those of the
                drop-in classes, of which the operator does not speak.

        Raises:
            ConfigError: a keyword is unknown or its value is not allowed.
        """
        self._owner = owner
        self._keywords: dict[str, Any] = {}
        self._live: dict[str, Any] = {}
        self.profile: Profile = profile
        for name, value in (keywords or {}).items():
            declared = known(name, "keyword argument")
            value = tuple(value) if isinstance(value, list) else value
            self._keywords[declared.name] = declared.read(value, "keyword argument")

    def __getitem__(self, name: str) -> Any:
        """Return the value in force."""
        return self.find(name).value

    def find(self, name: str, *, environment: bool = True) -> Value:
        """Return the value in force and where it came from.

        Args:
            name: the setting.
            environment: whether its variable counts.

        Raises:
            ConfigError: the value found is not allowed, or no such setting exists.
        """
        declared = known(name, "program")
        if name in self._live:
            return Value(self._live[name], "configure()")
        return (
            (None if self.profile == "private" else operator.find(declared, environment=environment))
            or (Value(self._keywords[name], "keyword argument") if name in self._keywords else None)
            or self._attribute(declared)
            or self._default(declared)
        )

    def named(self, prefix: str) -> list[Setting]:
        """Return the settings whose names begin so, and that operator, keywords or environment give a value."""
        variables = [name.removeprefix("HARKEN_").lower() for name in os.environ if name.startswith("HARKEN_")]
        named = {*operator.flags, *operator.file, *variables, *self._keywords}
        wanted = [REGISTRY[name] for name in sorted(named) if name.startswith(prefix) and name in declare_all()]
        return [declared for declared in wanted if self[declared.name] is not None]

    def _default(self, declared: Setting) -> Value:
        if self.profile == "drop-in" and declared.name in operator.defaults:
            return Value(operator.defaults[declared.name], "default of the command")
        return Value(declared.fallback(self.profile), f"default of {self.profile}")

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change live settings; all of them or, when one is wrong, none.

        Raises:
            ConfigError: a setting is unknown, not live, or the value is not allowed.
        """
        checked = {}
        for name, value in changes.items():
            declared = known(name, "configure()")
            if not declared.live:
                raise ConfigError(f"{name} cannot change while the server runs; restart it with {declared.flag}")
            checked[declared.name] = declared.read(value, "configure()")
        self._live.update(checked)

    def _attribute(self, declared: Setting) -> Value | None:
        """Look for the setting among the server's attributes.

        Programs give their servers attributes of the same names for reasons of their own (``engine``, ``workers``,
        ``user``), so an instance attribute counts only under stdlib's names, and a value of another type is theirs.
        So is any that is not allowed, under stdlib's names and where programs know nothing of settings.
        """
        for name in filter(None, (declared.name, declared.stdlib)):
            late = name == declared.stdlib
            if late and name in getattr(self._owner, "__dict__", ()):
                found, where = self._owner.__dict__[name], f"attribute {name}"
            else:
                found, where = _class_attribute(type(self._owner), name)
            if late and hasattr(found, "__get__"):  # a property, of which stdlib would see the value
                found = getattr(self._owner, name, UNSET)
            if found is UNSET or not declared.kind.fits(found):
                continue
            if late and found == declared.stdlib_default and where.startswith(_OWN):
                continue
            try:
                return Value(declared.read(found, where), where)
            except ConfigError:
                if not late and not operator.unaware:
                    raise
        return None


def share(total: int | None, settings: Settings) -> int | None:
    """Return one worker's part of a number that holds over all of them; at least one.

    Workers share their listeners evenly, and know of each other only how many they are when they start.
    """
    if total is None or settings.profile != "serve":
        return total
    workers: int = settings["workers"]
    return max(1, total // max(1, workers))


_OWN = ("class attribute harken.", "class attribute socketserver.")


def _class_attribute(owner: type, name: str) -> tuple[Any, str]:
    for cls in owner.__mro__:
        if name in vars(cls):
            return vars(cls)[name], f"class attribute {cls.__module__}.{cls.__qualname__}.{name}"
    return UNSET, ""
