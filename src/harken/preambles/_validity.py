"""Until when certificates hold: read from their DER by hand, since Python's ``ssl`` tells it of a peer's alone.

The way to the two times is that of RFC 5280, 4.1: a certificate is a sequence of tbsCertificate and more, and that one
of version, serial number, signature, issuer, validity and more.
"""

from __future__ import annotations

import calendar
import os
import re
import ssl
import time
from collections.abc import Iterable, Iterator

from harken.preambles._declaration import File

__all__ = ["remarks_on", "validity"]

# Days before its end at which a certificate is spoken of: Let's Encrypt's are to be renewed thirty days before theirs.
SOON_DAYS = 30
_DAY_SECONDS = 86400

_PEM = re.compile(b"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----.+?-----END [A-Z0-9 ]*CERTIFICATE-----", re.DOTALL)
_VERSION, _UTC_TIME = 0xA0, 0x17


def remarks_on(files: Iterable[File]) -> list[str]:
    """Say of each certificate that does not hold, or not for long, a line."""
    return [line for file in files if (line := _remark(os.fspath(file), time.time())) is not None]


def _remark(file: str | bytes, now: float) -> str | None:
    name = os.fsdecode(file)
    begin, end = validity(file)
    day = time.strftime("%Y-%m-%d", time.gmtime(end if now >= begin else begin))
    if now < begin:
        return f"TLS certificate {name} does not hold before {day}; look at the clock of this machine, or at the file"
    if now >= end:
        return f"TLS certificate {name} expired on {day}; renew it"
    days = int((end - now) / _DAY_SECONDS)
    return f"TLS certificate {name} expires in {days} days, on {day}; renew it" if days < SOON_DAYS else None


def validity(file: str | bytes) -> tuple[int, int]:
    """Return from when until when the first certificate in a PEM file holds, in seconds since the epoch.

    Raises:
        ValueError: there is none.
    """
    with open(file, "rb") as stream:
        found = _PEM.search(stream.read())
    if found is None:
        raise ValueError(f"{os.fsdecode(file)} holds no certificate")
    body = found[0].split(b"-----")[2]
    der = ssl.PEM_cert_to_DER_cert(f"-----BEGIN CERTIFICATE-----{body.decode('ascii')}-----END CERTIFICATE-----")
    (_, certificate), *_ = _parts(der)
    (_, signed), *_ = _parts(certificate)
    fields = [content for tag, content in _parts(signed) if tag != _VERSION]
    begin, end = (_seconds(tag, content) for tag, content in _parts(fields[3]))
    return begin, end


def _parts(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Give tag and content of each value in DER."""
    at = 0
    while at < len(data):
        tag, size = data[at], data[at + 1]
        at += 2
        if size & 0x80:  # so many bytes that tell the length
            at += size & 0x7F
            size = int.from_bytes(data[at - (size & 0x7F) : at], "big")
        yield tag, data[at : at + size]
        at += size


def _seconds(tag: int, text: bytes) -> int:
    """Read a time, RFC 5280, 4.1.2.5: of two digits for the year those below 50 are of this century."""
    digits = text.decode("ascii")
    if tag == _UTC_TIME:
        digits = ("20" if digits[:2] < "50" else "19") + digits
    return calendar.timegm(time.strptime(digits, "%Y%m%d%H%M%SZ"))
