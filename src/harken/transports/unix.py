"""Unix sockets: ``unix:/path?mode=660&user=…&group=…``, ``unixgram:/path…`` and abstract ``unix:@name``.

How the mode comes about. bind(2) makes the file with the modes of the umask, and a chmod after it leaves a moment in
which anybody may connect. Setting the umask around bind closes it, but the umask belongs to the process: files that
other threads create meanwhile get it too. Binding another name in a closed folder and renaming works, but the socket
keeps the first name for ever, in getsockname(2), in `ss`, and in what a successor sees. Linux offers a better way: the
file gets the mode of the *socket's own* inode, less the umask, and fchmod(2) on an unbound socket sets that. So the
file is born with at most the owner's bits; then owner and group are set; then the mode, exactly as asked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import sys
from typing import Any, NamedTuple

from harken.errors import ConfigError, nearest
from harken.listener import AddressInUse, BindError, Inode, Listener, note_inode, unlink_if_own
from harken.peer import Credentials, Peer
from harken.transports import BindOptions, _filters
from harken.transports._takeover import alone, claim, look, refuse

__all__ = [
    "Inode",
    "bind",
    "claim",
    "describe",
    "note_inode",
    "parse",
    "schemes",
    "shut_out",
    "suits",
    "take_over",
    "tune",
    "unlink_if_own",
    "url",
]

schemes = ("unix", "unixgram")

MODE = 0o600  # only the user who runs the server, unless the address says otherwise
PATH_BYTES = 107  # sun_path of unix(7) has 108, one of them for the null byte
_KEYS = ("mode", "user", "group")
_OWNER_BITS = 0o600
_KINDS = {"unix": socket.SOCK_STREAM, "unixgram": socket.SOCK_DGRAM}
_UCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid; -1 where there is nobody


class Place(NamedTuple):
    """A parsed address. ``path`` starts with a null byte if it is abstract; -1 leaves user or group as they are."""

    scheme: str
    path: str
    mode: int = MODE
    user: int = -1
    group: int = -1

    def __str__(self) -> str:
        return _spell(self.scheme, self.path)


def parse(url: str) -> Place:
    """Read ``unix:/path?mode=660&user=www-data&group=www-data``; ``%3F`` in a path is a question mark.

    Raises:
        ConfigError: the address is malformed, an option is unknown, or the user or group does not exist.
    """
    from urllib.parse import parse_qsl, unquote

    scheme, _, rest = url.partition(":")
    raw, _, query = rest.partition("?")
    if raw.startswith("//"):
        raw = raw[2:]
        if not raw.startswith("/"):
            raise ConfigError(f"{url!r}: a path must follow {scheme}://; did you mean '{scheme}:/{raw}'?")
    path = unquote(raw, errors="surrogateescape")
    if path in ("", "@") or "\0" in path or path.endswith("/"):
        raise ConfigError(f"{url!r} names no path; write {scheme}:/run/name.sock")
    size = len(os.fsencode(path))
    if size > PATH_BYTES:
        raise ConfigError(f"{url!r}: the path has {size} bytes, and the kernel takes at most {PATH_BYTES}; shorten it")
    pairs = parse_qsl(query, keep_blank_values=True)
    if path.startswith("@"):
        if pairs:
            raise ConfigError(f"{url!r}: an abstract address is no file and has no mode, user or group")
        return Place(scheme, "\0" + path[1:])
    options = {key: _option(url, key, value) for key, value in pairs}
    return Place(scheme, path, **options)


def _option(url: str, key: str, value: str) -> int:
    match key:
        case "mode":
            if value and set(value) <= set("01234567") and int(value, 8) <= 0o777:
                return int(value, 8)
            raise ConfigError(f"{url!r}: mode {value!r} is not an octal mode such as 660")
        case "user":
            return _number(url, key, value)
        case "group":
            return _number(url, key, value)
    close = nearest(key, _KEYS) or "; known are " + ", ".join(_KEYS)
    raise ConfigError(f"{url!r}: {key!r} is not an option of a Unix address{close}")


def _number(url: str, key: str, value: str) -> int:
    if value.isascii() and value.isdecimal() and len(value) < 11:  # 32 bits
        return int(value)
    import grp
    import pwd

    try:
        return pwd.getpwnam(value).pw_uid if key == "user" else grp.getgrnam(value).gr_gid
    except (KeyError, ValueError):  # ValueError: a NUL in the name
        raise ConfigError(f"{url!r}: this machine has no {key} {value!r}") from None


def bind(place: Place, options: BindOptions) -> list[Listener]:
    """Open a socket; a path that a dead server left is taken over.

    Raises:
        AddressInUse: a live server has the path, or something that is no socket is there.
        BindError: the path cannot be had for another reason.
    """
    listener = Listener(socket.AF_UNIX, _KINDS[place.scheme])
    try:
        tune(listener, options)
        if place.path.startswith("\0"):
            listener.bind(place.path)
            _listen(listener, options)
        else:
            with alone(os.path.dirname(place.path)):  # until it listens, so that no other starter takes it for dead
                _make_way(place.path)
                _bind_file(listener, place)
                _listen(listener, options)
        listener.url = str(place)
    except BindError:
        listener.close()
        raise
    except OSError as error:
        listener.close()
        raise _explain(place, error) from None
    except BaseException:
        listener.close()
        raise
    return [listener]


def _make_way(path: str) -> None:
    found = look(path)
    refuse(path, found)
    if found.state == "dead":
        with contextlib.suppress(FileNotFoundError):  # a starter of another make was quicker
            os.unlink(path)


def _bind_file(listener: Listener, place: Place) -> None:
    with contextlib.suppress(OSError):  # systems whose sockets have no mode go by the umask until the chmod below
        os.fchmod(listener.fileno(), place.mode & _OWNER_BITS)
    listener.bind(place.path)
    listener.own(place.path)
    _set_rights(place)


def _set_rights(place: Place) -> None:
    """Give the file the mode, user and group that its address asks for."""
    # By a descriptor of the file itself: the path may be in a folder where others can swap it for a link.
    fd = os.open(place.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd).st_mode
        if not stat.S_ISSOCK(found):
            raise BindError(f"{place.path!r} was replaced while it was bound; take a safe folder", errno.EBUSY)
        itself = f"/proc/self/fd/{fd}"
        try:
            if (place.user, place.group) != (-1, -1):
                os.chown(itself, place.user, place.group)
            if stat.S_IMODE(found) != place.mode:
                os.chmod(itself, place.mode)
        except FileNotFoundError:
            advice = "mount it, or take mode=600 and no user or group"
            raise BindError(
                f"{place.path!r} gets its rights by way of /proc, which is missing; {advice}", errno.ENOENT
            ) from None
    finally:
        os.close(fd)


def suits(place: Place, sock: socket.socket) -> bool:
    """Tell whether a socket is bound there."""
    if (sock.family, sock.type) != (socket.AF_UNIX, _KINDS[place.scheme]):
        return False
    path = os.fsdecode(sock.getsockname())  # an abstract one is bytes
    return path == place.path or (path[:1] not in ("", "\0") and os.path.abspath(path) == os.path.abspath(place.path))


def take_over(place: Place, listener: Listener, *, changed: bool) -> None:
    """Give the file of a socket that was handed on other rights, if its address asks for others now."""
    if not changed or place.path.startswith("\0"):
        return
    try:
        _set_rights(place)
    except FileNotFoundError:
        pass  # somebody has removed it; whoever looks whether it can be reached will tell
    except BindError:
        raise
    except OSError as error:
        raise _explain(place, error) from None


def _listen(listener: Listener, options: BindOptions) -> None:
    if listener.type == socket.SOCK_STREAM:
        listener.listen(options.backlog)


def _explain(place: Place, error: OSError) -> BindError:
    number = error.errno or 0
    if number == errno.EADDRINUSE:
        return AddressInUse(f"{place} is already in use by a live server; stop it, or take another path", number)
    folder = os.path.dirname(place.path) or "."
    remedy = {
        errno.ENOENT: "take another folder" if os.path.isdir(folder) else f"create the folder {folder!r} first",
        errno.ENOTDIR: f"{folder!r} is not a folder",
        errno.EACCES: f"this process may not write to the folder {folder!r}",
        errno.EPERM: "only root may give a socket to another user, or to a group that this process is not in",
    }.get(number, "see unix(7)")
    return BindError(f"cannot listen on {place}: {error.strerror or error}; {remedy}", number)


def tune(sock: socket.socket, options: BindOptions) -> None:
    """Set socket options: none; those of TCP mean nothing here, and Linux refuses SO_REUSEPORT."""


def shut_out(sock: socket.socket) -> float | None:
    """Refuse who comes (ECONNREFUSED), or let the kernel drop it; what waits stays.

    On Linux a listener whose reading side is shut still hands out its queue. Elsewhere that is not known.
    """
    if sock.type != socket.SOCK_STREAM:
        return 0.0 if _filters.drop_all(sock) else None
    if sys.platform != "linux":
        return None
    try:
        sock.shutdown(socket.SHUT_RD)
    except OSError:  # it does not listen
        return None
    return 0.0


def url(sock: socket.socket) -> str:
    """Return where a socket is bound: ``unix:/run/name.sock``, ``unixgram:@abstract``."""
    name = sock.getsockname()
    scheme = "unixgram" if sock.type == socket.SOCK_DGRAM else "unix"
    return _spell(scheme, os.fsdecode(name))


def _spell(scheme: str, path: str) -> str:
    from urllib.parse import quote

    shown = "@" + path[1:] if path.startswith("\0") else path
    return f"{scheme}:{quote(shown, safe='/@', errors='surrogateescape')}"


def describe(connection: socket.socket, client_address: Any) -> Peer:
    """Return the far end: its own path, mostly empty, and on a stream the process that connected. Never raises."""
    address = os.fsdecode(client_address) if isinstance(client_address, (str, bytes)) else str(client_address or "")
    if address.startswith("\0"):
        address = "@" + address[1:]
    return Peer(address, 0, socket.AF_UNIX, credentials=_credentials(connection))


def _credentials(connection: socket.socket) -> Credentials | None:
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except (OSError, AttributeError):  # closed already; an object of the program's own
        return None
    found = Credentials(*_UCRED.unpack(raw))
    return found if found.uid != -1 else None
