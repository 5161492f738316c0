"""The live view: one page that needs no network but this server, and the policy that keeps it so."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cached_property
from importlib.resources import files

__all__ = ["VIEW", "View"]


class View:
    """The page, read when first asked for."""

    @cached_property
    def text(self) -> bytes:
        """The page, with its style and its program inside."""
        return files("harken.observe").joinpath("view.html").read_bytes()

    @cached_property
    def policy(self) -> str:
        """What a browser lets the page do: run the very program and style that are in it, and ask this server."""
        return (
            f"default-src 'none'; connect-src 'self'; style-src {self._hash(b'style')}; "
            f"script-src {self._hash(b'script')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def _hash(self, element: bytes) -> str:
        inside = re.search(rb"<%b>(.*?)</%b>" % (element, element), self.text, re.DOTALL)
        assert inside is not None
        digest = base64.b64encode(hashlib.sha256(inside[1]).digest()).decode()
        return f"'sha256-{digest}'"


VIEW = View()
