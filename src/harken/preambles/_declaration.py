"""How a server is told to speak TLS: the class :class:`TLS`, the settings, and which of them holds.

This module is light: it only notes what was said. Files are read by ``_certificates.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harken import settings
from harken.errors import ConfigError, nearest
from harken.settings import setting

if TYPE_CHECKING:
    import ssl

    from harken.settings import Settings

__all__ = ["TLS", "File", "declared"]

# What a TLS may leave to the settings of these names, `tls_ca` and so on. A key goes with its certificate.
_WORDS = ("ca", "verify", "alpn", "sni", "min_version", "password", "mode")
MODES = ("always", "optional", "starttls")
VERIFY = ("auto", "none", "optional", "required")
VERSIONS = ("1.2", "1.3")

File = str | os.PathLike[str]
Password = File | bytes | Callable[[], str | bytes]


class Hidden(str):
    """A text that is not shown: somebody may have written a passphrase where its file belongs."""

    __slots__ = ()

    def __str__(self) -> str:
        return "(hidden)"

    __repr__ = __str__


class _Secret(settings.Kind):
    """The kind of ``tls_password``."""

    __slots__ = ()

    def fits(self, value: object) -> bool:
        return value is None or isinstance(value, (str, bytes, os.PathLike)) or callable(value)

    def check(self, value: Any) -> Any:
        if not self.fits(value):
            raise ValueError(f"is not {self.describe()}")
        return Hidden(value) if isinstance(value, str) else value

    def describe(self) -> str:
        return "the path of a file, a function that returns the passphrase, or none"


_list = settings.Kind("list", (list, tuple), optional=True)
_text = settings.text(optional=True)
for _name, _kind, _default, _meaning, _origin in (
    (
        "tls_key",
        _text,
        None,
        "PEM file of the certificate's private key; none: it is in `tls_cert`",
        "as ssl.SSLContext.load_cert_chain has it",
    ),
    (
        "tls_ca",
        _text,
        None,
        "PEM file, or directory as `openssl rehash` makes it, of the authorities that vouch for clients",
        "without it no client's certificate can be verified",
    ),
    (
        "tls_verify",
        settings.choice(*VERIFY),
        "auto",
        "whether clients must show a certificate; `auto`: `required` if `tls_ca` is set, else `none`",
        "who names authorities means to ask them",
    ),
    ("tls_alpn", _list, None, "protocols offered by ALPN, the preferred one first", "RFC 7301; none unless asked"),
    (
        "tls_sni",
        _list,
        None,
        "further certificates by the name that clients ask for: `NAME=CERT` or `NAME=CERT:KEY`; NAME may begin `*.`",
        "RFC 6066; who asks for another name gets `tls_cert`",
    ),
    (
        "tls_min_version",
        settings.choice(*VERSIONS),
        "1.2",
        "the oldest version of TLS that is spoken",
        "RFC 8996 retires what is older",
    ),
    (
        "tls_mode",
        settings.choice(*MODES),
        "always",
        "`always` TLS, `optional`: plain text too, told apart by the first byte, `starttls`: TLS when a handler asks",
        "a port speaks one of them unless asked",
    ),
    (
        "tls_password",
        _Secret("secret", (str,), optional=True),
        None,
        "file that holds the passphrase of `tls_key`, or a function that returns it; never shown or logged",
        "a passphrase on a command line is seen by everybody on the machine",
    ),
):
    setting(_name, _kind, _default, meaning=_meaning, origin=_origin)


@dataclass(frozen=True, eq=False)
class TLS:
    """How a server speaks TLS. Files are read when it starts, and read anew when they change.

    Attributes:
        cert: PEM file of the certificate and of those that vouch for it, in this order.
        key: PEM file of its private key; None: it is in ``cert``.
        ca: PEM file or directory of the authorities that vouch for clients.
        verify: whether clients must show a certificate: ``required`` (True), ``optional``, ``none`` (False), or None:
            required if ``ca`` is given. What they showed is ``peer.certificate``.
        alpn: protocols offered by ALPN, the preferred one first.
        sni: further certificates by the name that the client asks for (``*.example.org`` is every name of one label
            more): a file, or a pair of certificate and key. Everything else is the same for all names.
        min_version: ``1.2`` (as None) or ``1.3``, or an ``ssl.TLSVersion``.
        password: of the keys: a file that holds it, a function that returns it, or bytes.
        mode: ``always`` (as None), ``optional`` (plain text too, told apart by the first byte), or ``starttls`` (plain
            text until a handler calls ``start_tls()``).
        given: the words that were given, and so are not the settings' to say.
    """

    cert: File
    key: File | None = None
    ca: File | None = None
    verify: str | bool | None = None
    alpn: Sequence[str] = ()
    sni: Mapping[str, Any] = field(default_factory=dict)
    min_version: Any = None
    password: Password | None = field(default=None, repr=False)
    mode: str | None = None
    given: frozenset[str] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Bring the values into one shape.

        Raises:
            ConfigError: one of them can never be.
        """
        put = object.__setattr__
        put(self, "given", frozenset(name for name in _WORDS if getattr(self, name) not in (None, (), [], {}, "auto")))
        put(self, "verify", _verify(self.verify, self.ca))
        put(self, "min_version", _version(self.min_version or VERSIONS[0]))
        put(self, "mode", self.mode or MODES[0])
        put(self, "alpn", (self.alpn,) if isinstance(self.alpn, str) else tuple(self.alpn))
        put(self, "sni", {_asked(name): _pair(name, files) for name, files in dict(self.sni).items()})
        if self.mode not in MODES:
            raise ConfigError(
                f"TLS mode {self.mode!r} is not one of {', '.join(MODES)}{nearest(str(self.mode), MODES)}"
            )
        cert: Any = self.cert
        if not isinstance(cert, (str, os.PathLike)) or not os.fspath(cert):
            raise ConfigError(f"TLS needs a certificate: {self.cert!r} is not the path of a PEM file")

    def __str__(self) -> str:
        """Return it as ``--tls`` takes it, with the names of ``sni`` besides, and without the passphrase."""
        words: dict[str, Any] = {"cert": self.cert, "key": self.key, "ca": self.ca, "alpn": ",".join(self.alpn)}
        words |= {"verify": self.verify if self.ca else None}
        words |= {name: getattr(self, name) for name in ("min_version", "mode") if name in self.given}
        words["sni"] = ",".join(self.sni)
        return "&".join(f"{name}={value}" for name, value in words.items() if value)

    @classmethod
    def parse(cls, text: str) -> TLS:
        """Read ``cert=FILE&key=FILE&…``, as in ``--tls`` and behind the ``?`` of an address.

        Raises:
            ConfigError: a word is unknown, stands twice, or its value cannot be.
        """
        from urllib.parse import parse_qsl

        try:
            pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True)
        except ValueError:
            raise ConfigError(f"TLS options are NAME=VALUE, joined by '&': {text!r} is not") from None
        known = {"cert", "key", *_WORDS} - {"sni"}
        words: dict[str, Any] = {}
        for name, value in pairs:
            if name not in known:
                raise ConfigError(
                    f"TLS has no option {name!r}{nearest(name, known) or '; known are ' + _listed(known)}"
                )
            if name in words or not value:
                raise ConfigError(f"TLS option {name!r} {'stands twice' if name in words else 'has no value'}")
            words[name] = value.split(",") if name == "alpn" else value
        if "cert" not in words:
            raise ConfigError("TLS needs a certificate: add cert=FILE, and key=FILE unless the same file holds the key")
        return cls(**words)


def _listed(words: set[str]) -> str:
    return ", ".join(sorted(words))


def _verify(value: Any, ca: Any) -> str:
    if value is None or value == "auto":
        return "required" if ca else "none"
    word = {"CERT_NONE": "none", "CERT_OPTIONAL": "optional", "CERT_REQUIRED": "required"}.get(
        getattr(value, "name", "")
    )  # an ssl.VerifyMode is an int, and True is one too
    if word is None:
        word = ("required" if value else "none") if isinstance(value, bool) else str(value)
    if word not in VERIFY:
        raise ConfigError(f"TLS verify={value!r} is not one of {', '.join(VERIFY)}{nearest(word, VERIFY)}")
    if word != "none" and not ca:
        raise ConfigError(f"TLS verify={word!r} needs ca=FILE: the authorities that vouch for clients")
    return word


def _version(value: Any) -> str:
    word = str(getattr(value, "name", value)).removeprefix("TLSv").replace("_", ".")
    if word not in VERSIONS:
        raise ConfigError(
            f"TLS min_version={value!r} is not {' or '.join(VERSIONS)}; for anything older give an ssl.SSLContext"
        )
    return word


def _asked(name: str) -> str:
    """Return a name of ``sni`` as clients ask for it: in ASCII letters (RFC 6066, 3), and without a last dot."""
    try:
        found = name.lower().rstrip(".").encode("idna").decode("ascii")
    except UnicodeError:
        found = ""
    if not found or "*" in found.removeprefix("*."):
        raise ConfigError(f"TLS sni: no client can ask for {name!r}; write a host's name, or *. and a domain's")
    return found


def _pair(name: str, files: Any) -> tuple[File, File | None]:
    match files:
        case TLS():
            return files.cert, files.key
        case str() | os.PathLike():
            return files, None
        case (cert, key):
            return cert, key
    raise ConfigError(
        f"TLS sni: {name!r} leads to {files!r}, which is neither a file nor a pair of certificate and key"
    )


def declared(values: Settings, listener: Any = None) -> TLS | ssl.SSLContext:
    """Return what a server's address and settings say: the address above the settings, ``tls`` above ``tls_cert``.

    What the operator says (flags, environment, file) stands above what the program says. What a :class:`TLS` does not
    say, the settings of its words do; but an address that is one of TLS is always so, unless it says a mode itself.

    Raises:
        ConfigError: nothing names a certificate, or a value is wrong.
    """
    own = getattr(listener, "tls", None)
    if isinstance(own, TLS):
        return _completed(own, values, mode=own.mode)
    found = _of_settings(values, mode=MODES[0] if own is not None else None)
    if found is None:
        which = getattr(listener, "url", "a TLS address")
        raise ConfigError(f"{which} needs a certificate: add ?cert=FILE&key=FILE to it, or set --tls-cert")
    return found


def _of_settings(values: Settings, mode: str | None) -> TLS | ssl.SSLContext | None:
    whole, cert = values.find("tls"), values.find("tls_cert")
    operator, registry = settings.operator, settings.REGISTRY
    above = operator.find(registry["tls_cert"]) and not operator.find(registry["tls"])
    if whole.value is None or above:
        if cert.value is None:
            return None
        return _completed(TLS(cert.value, values["tls_key"]), values, mode=mode)
    if isinstance(whole.value, TLS):
        return _completed(whole.value, values, mode=mode, programs=not operator.find(registry["tls"]))
    for name in _WORDS:
        found = operator.find(registry[f"tls_{name}"])
        if found is not None and name not in ("password", "mode"):
            raise ConfigError(
                f"tls_{name} ({found.source}): the program has an ssl.SSLContext of its own, which that cannot change; "
                "set tls_cert, to take its place"
            )
    return whole.value  # type: ignore[no-any-return]


def _completed(tls: TLS, values: Settings, *, mode: str | None, programs: bool = False) -> TLS:
    """Add what the settings say, where it says nothing; the operator is heard also where a program says something."""
    said = {name: values.find(f"tls_{name}") for name in _WORDS}
    words: dict[str, Any] = {}
    for name, found in said.items():
        operators = programs and settings.operator.find(settings.REGISTRY[f"tls_{name}"]) is not None
        if _is_said(found) and (operators or name not in tls.given):
            words[name] = found.value
    if mode is not None:
        words["mode"] = mode
    if all(getattr(tls, name) == value for name, value in words.items()):
        return tls  # the same one: its certificates are loaded once
    if "sni" in words:
        words["sni"] = dict(map(_read_sni, words["sni"] or ()))
    kept = {name: getattr(tls, name) for name in tls.given}
    return TLS(tls.cert, tls.key, **kept | words)


def _is_said(found: settings.Value) -> bool:
    return found.value is not None and not found.source.startswith("default")


def _read_sni(text: str) -> tuple[str, Any]:
    name, equals, files = text.partition("=")
    cert, colon, key = files.partition(":")
    if not (name and equals and cert):
        raise ConfigError(f"tls_sni: {text!r} is not NAME=CERT or NAME=CERT:KEY")
    return name.strip(), (cert, key if colon else None)
