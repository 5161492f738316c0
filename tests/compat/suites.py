"""CPython's own suites: which modules, and which classes of them, say something about `socketserver`."""

from __future__ import annotations

import fnmatch

# None: the whole module. Otherwise patterns of `Class.method`.
SUITES: dict[str, tuple[str, ...] | None] = {
    "test_socketserver": None,
    "test_httpservers": None,
    "test_xmlrpc": None,
    "test_docxmlrpc": None,
    "test_wsgiref": None,
    "test_urllib2_localnet": None,
    "test_logging": (
        "SocketHandlerTest.*",
        "UnixSocketHandlerTest.*",
        "DatagramHandlerTest.*",
        "UnixDatagramHandlerTest.*",
        "SysLogHandlerTest.*",
        "UnixSysLogHandlerTest.*",
        "IPv6SysLogHandlerTest.*",
        "HTTPHandlerTest.*",
        "ConfigDictTest.test_listen_*",
    ),
}


# A client's patience with nobody there: five seconds that no server plays a part in.
LEFT_OUT = ("*SocketHandlerTest.test_noserver",)


# A server of logging.config's that looks every second whether it shall end: what it does, another case sees too.
SLOW = ("ConfigDictTest.test_listen_config_10_ok", "ConfigDictTest.test_listen_verify")


def is_wanted(module: str, case: str, *, quick: bool = False) -> bool:
    """Tell whether a case (``test.module.Class.method``) belongs to the selection."""
    patterns = SUITES[module]
    tail = ".".join(case.split(".")[-2:])
    if any(fnmatch.fnmatchcase(tail, pattern) for pattern in (*LEFT_OUT, *(SLOW if quick else ()))):
        return False
    return patterns is None or any(fnmatch.fnmatchcase(tail, pattern) for pattern in patterns)
