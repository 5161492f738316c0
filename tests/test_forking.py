# SPDX-License-Identifier: MIT
"""What is called in a forked child, and in which order."""

from __future__ import annotations

import os

import pytest

from harken.forking import told_in_child


class Told:
    """Notes in its log that it was told."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def after_fork(self) -> None:
        """Note it."""
        self.log.append(self.name)


class Mute(Told):
    """Raises instead."""

    def after_fork(self) -> None:
        """Raise."""
        raise ValueError(self.name)


def log_of_child(log: list[str]) -> list[str]:
    """Fork, and return the log as the child has it."""
    end, childs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(childs, " ".join(log).encode())
        os._exit(0)
    os.close(childs)
    os.waitpid(pid, 0)
    with os.fdopen(end) as file:
        return file.read().split()


def test_members_are_told_in_the_order_of_their_sets() -> None:
    """A set that was made first is told first; the parent is told nothing, nor is whoever is gone."""
    log: list[str] = []
    first, second = told_in_child(Told), told_in_child(Told)
    kept = [Told("second", log), Told("first", log)]
    second.add(kept[0])
    first.add(kept[1])
    first.add(Told("gone", log))
    assert log_of_child(log) == ["first", "second"]
    assert log == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_raises_does_not_keep_other_sets_from_being_told() -> None:
    """What a member raises is shown, and the child goes on."""
    log: list[str] = []
    first, second = told_in_child(Told), told_in_child(Told)
    kept = [Mute("mute", log), Told("second", log)]
    first.add(kept[0])
    second.add(kept[1])
    assert log_of_child(log) == ["second"]
