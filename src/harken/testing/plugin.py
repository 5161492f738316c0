"""Fixtures for pytest: ``harken_server`` and ``harken_client``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harken.testing import Client, Served

__all__ = ["harken_client", "harken_server"]


@pytest.fixture
def harken_server() -> Iterator[Callable[..., Served]]:
    """Serve handlers on free ports until the test ends.

    ``harken_server(Handler, engine="pool")`` takes what :func:`harken.testing.serve` takes and returns its
    :class:`~harken.testing.Served`.
    """
    from harken import testing

    with contextlib.ExitStack() as running:

        def start(handler: Callable[..., Any], *addresses: str, **settings: Any) -> Served:
            return running.enter_context(testing.serve(handler, *addresses, **settings))

        yield start


@pytest.fixture
def harken_client() -> Iterator[Callable[..., Client]]:
    """Talk to handlers that have no port until the test ends.

    ``harken_client(Handler)`` takes what :func:`harken.testing.connect` takes. The test fails if a handler raised.
    """
    from harken import testing

    with contextlib.ExitStack() as open_clients:

        def start(handler: Callable[..., Any], **options: Any) -> Client:
            return open_clients.enter_context(testing.connect(handler, **options))

        yield start
