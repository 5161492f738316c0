"""Filters of the kernel's on a listening socket, so that nothing new comes while what waits is taken."""

from __future__ import annotations

import array
import socket
import struct
import sys

__all__ = ["drop_all", "drop_syns"]

# asm-generic/socket.h; Python has no name for it. Architectures with numbers of their own are left without a filter.
_SO_ATTACH_FILTER = 26
_KNOWN = sys.platform == "linux" and socket.SOL_SOCKET == 1

# struct sock_filter of linux/filter.h: code, jump if true, jump if false, operand.
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD_BYTE, _AND, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x54, 0x15, 0x06
_FLAGS_AT, _SYN, _ACK = 13, 0x02, 0x10  # of a TCP header, which is where the kernel begins to read
_WHOLE = 0xFFFFFFFF

_NO_SYN = [
    (_LOAD_BYTE, 0, 0, _FLAGS_AT),
    (_AND, 0, 0, _SYN | _ACK),
    (_JUMP_IF_EQUAL, 0, 1, _SYN),
    (_RETURN, 0, 0, 0),
    (_RETURN, 0, 0, _WHOLE),
]
_NOTHING = [(_RETURN, 0, 0, 0)]


def drop_syns(listener: socket.socket) -> bool:
    """Let handshakes that have begun end, and begin none: a client's SYN is not answered, and it will try again.

    Returns:
        Whether the kernel took the filter.
    """
    return _attach(listener, _NO_SYN)


def drop_all(sock: socket.socket) -> bool:
    """Take no more datagrams in; those that wait stay. Tell whether the kernel took the filter."""
    return _attach(sock, _NOTHING)


def _attach(sock: socket.socket, program: list[tuple[int, int, int, int]]) -> bool:
    if not _KNOWN:
        return False
    code = array.array("B", b"".join(_INSTRUCTION.pack(*instruction) for instruction in program))
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), code.buffer_info()[0]))
    except OSError:  # a kernel without filters, or a sandbox that forbids them
        return False
    return True
