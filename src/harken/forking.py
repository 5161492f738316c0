# SPDX-License-Identifier: MIT
"""What a forked child has to put right before anything else runs in it.

A child has its parent's memory, and of the parent's threads only the one that forked. So a lock may be held there by
nobody who will release it, a count of threads is wrong, and descriptors are the parent's too. Whoever holds such things
says here what is to be done about it. Those are called in the order in which they were said, which is that of imports:
a waker is whole again before the hub that wakes by it.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

__all__ = ["in_child", "told_in_child"]


class _Told(Protocol):
    def after_fork(self) -> None: ...


T = TypeVar("T", bound=_Told)
F = TypeVar("F", bound=Callable[[], object])


def in_child(function: F) -> F:
    """Call ``function`` in each child that is forked from now on, whoever forks it; a decorator.

    What it raises is shown and dropped by ``os.fork``. Where processes cannot fork, it is never called.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function


def told_in_child(kind: type[T]) -> weakref.WeakSet[T]:
    """Return a weak set for what is of that ``kind``: in a forked child ``after_fork()`` of each member is called."""
    members: weakref.WeakSet[T] = weakref.WeakSet()

    @in_child
    def tell() -> None:
        for member in list(members):
            member.after_fork()

    return members
