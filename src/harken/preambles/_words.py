"""Why a TLS handshake failed, in one line for the operator, without anything secret."""

from __future__ import annotations

import ssl

__all__ = ["HANDSHAKE", "of_error", "of_plain_text"]

# The first byte of a TLS connection: a record of type handshake. RFC 8446, 5.1.
HANDSHAKE = 0x16

_METHODS = b"GET POST HEAD PUT DELETE OPTIONS PATCH CONNECT TRACE PRI".split()  # RFC 9110, 9.3; PRI: HTTP/2's preface

# By OpenSSL's reason: what it means where it is met, on a server.
_REASONS = {
    "HTTP_REQUEST": "plain HTTP on the TLS port",
    "HTTPS_PROXY_REQUEST": "plain HTTP on the TLS port",
    "WRONG_VERSION_NUMBER": "the peer does not speak TLS",
    "UNSUPPORTED_PROTOCOL": "the peer offers only versions of TLS that are too old (min_version)",
    "VERSION_TOO_LOW": "the peer offers only versions of TLS that are too old (min_version)",
    "NO_PROTOCOLS_AVAILABLE": "the peer and this server have no version of TLS in common",
    "NO_SHARED_CIPHER": "the peer and this server have no cipher in common",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "the peer accepts no signature that the certificate's key can make",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer sent no certificate, which verify demands",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer demands a certificate of its own kind",
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not trust the certificate: it does not know who issued it",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the peer does not trust the certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer does not trust the certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the peer finds that the certificate has expired",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the peer refuses this version of TLS",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the peer refuses what this server offers",
}


def of_error(error: ssl.SSLError) -> str:
    """Say what went wrong in a handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate was refused: {error.verify_message}"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) or error.reason == "UNEXPECTED_EOF_WHILE_READING":
        return "the peer went away during the TLS handshake"
    reason = error.reason or ""
    if reason in _REASONS:
        return _REASONS[reason]
    return f"the TLS handshake failed: {reason.lower().replace('_', ' ') or 'OpenSSL gives no reason'}"


def of_plain_text(first: bytes) -> str:
    """Say what a peer sent that should have begun a handshake.

    Args:
        first: its first bytes, or none when it closed at once.
    """
    if not first:
        return "the peer closed before the TLS handshake"
    word, space, _ = first.partition(b" ")
    if word in _METHODS if space else any(method.startswith(word) for method in _METHODS):
        return "plain HTTP on the TLS port"
    return f"the peer does not speak TLS: its first bytes are {first!r}"
