"""What a server does once its sockets are bound: where it stands, whose it is, what its files may be.

Ports below 1024 and other people's directories need root; serving does not.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from harken.errors import ConfigError
from harken.paths import change_directory, returning
from harken.settings import Kind, Settings, setting, text

__all__ = ["chdir", "drop", "give", "identity", "set_umask", "visiting"]

USER = setting(
    "user",
    text(optional=True),
    None,
    process=True,
    meaning="the user, by name or number, that the server becomes after binding; needs root",
    origin="none: stay who started it",
)
GROUP = setting(
    "group",
    text(optional=True),
    None,
    process=True,
    meaning="the group, by name or number, that the server becomes after binding; none: that of `user`",
    origin="none: stay who started it",
)


class _Umask(Kind):
    """File modes are written in octal."""

    __slots__ = ()

    def _read(self, word: str) -> Any:
        return int(word.removeprefix("0o"), 8)

    def take(self, value: Any) -> Any:
        """Refuse numbers, which TOML has in decimal: ``umask = 77`` would be 115 in octal, and hide little."""
        if not isinstance(value, int):
            return value
        raise ValueError('is decimal in TOML; write it in quotes, as in "027"')

    def show(self, value: Any) -> str:
        """Write a mask in octal."""
        return f"{value:03o}"

    def describe(self) -> str:
        """Name the values allowed."""
        return "an octal mode such as 027, or none"


UMASK = setting(
    "umask",
    _Umask("count", (int,), minimum=0, maximum=0o777, optional=True),
    None,
    process=True,
    meaning="the file mode creation mask, in octal; none leaves it",
    origin="umask(2)",
)
CHDIR = setting(
    "chdir",
    text(optional=True),
    None,
    process=True,
    meaning="the directory to change to before the target is loaded; paths in settings are meant from the start",
    origin="none: stay where it was started",
)


def chdir(settings: Settings) -> None:
    """Go where ``chdir`` says.

    Raises:
        ConfigError: there is no such directory, or it may not be entered.
    """
    path = settings["chdir"]
    if path is None:
        return
    try:
        change_directory(path)
    except OSError as error:
        raise ConfigError(f"chdir = {path!r}: {error.strerror}") from None


@contextmanager
def visiting(settings: Settings) -> Iterator[None]:
    """Be where ``chdir`` says while the block loads the target, and where we were again for what comes before it.

    Raises:
        ConfigError: as :func:`chdir` does.
    """
    with nullcontext() if settings["chdir"] is None else returning():
        chdir(settings)
        yield


def set_umask(settings: Settings) -> None:
    """Set the process's umask, if ``umask`` says one."""
    mask = settings["umask"]
    if mask is not None:
        os.umask(mask & 0o777)


def identity(settings: Settings) -> tuple[int | None, int | None]:
    """Return the user and group numbers to become; None for each that stays.

    Raises:
        ConfigError: there is no such user or group.
    """
    user, group = settings["user"], settings["group"]
    uid = gid = None
    if user is not None:
        entry = _user(user)
        uid, gid = entry.pw_uid, entry.pw_gid
    if group is not None:
        gid = _group(group)
    return uid, gid


def give(settings: Settings, paths: Iterable[str | os.PathLike[str] | None]) -> None:
    """Give files to the ``user`` and ``group`` that the server becomes: it must replace or remove them later.

    Raises:
        ConfigError: there is no such user or group, or this process may not give them away.
    """
    uid, gid = identity(settings)
    if uid is None and gid is None:
        return
    for path in paths:
        if path is None:
            continue
        try:
            os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid, follow_symlinks=False)
        except PermissionError:
            raise _refusal(settings) from None


def _refusal(settings: Settings) -> ConfigError:
    who = settings["user"] if settings["user"] is not None else settings["group"]
    return ConfigError(f"cannot become {who!r}: only root can change user and group")


def _user(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(f"user = {user!r}: there is no such user") from None


def _group(group: str) -> int:
    try:
        return (grp.getgrgid(int(group)) if group.isdecimal() else grp.getgrnam(group)).gr_gid
    except KeyError:
        raise ConfigError(f"group = {group!r}: there is no such group") from None


def drop(settings: Settings) -> None:
    """Become ``user`` and ``group``, with that user's other groups, for good.

    Raises:
        ConfigError: there is no such user or group, or this process may not become it.
    """
    uid, gid = identity(settings)
    if (uid is None or uid == os.geteuid()) and (gid is None or gid == os.getegid()):
        return
    try:
        if gid is not None:
            os.setgid(gid)
        if uid is not None:
            os.initgroups(pwd.getpwuid(uid).pw_name, gid if gid is not None else os.getgid())
            os.setuid(uid)
    except PermissionError:
        raise _refusal(settings) from None
