"""Numbers by metric and labels, which can be added up: a worker's, or those of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from harken.meter import Histogram
from harken.observe.families import FAMILIES

__all__ = ["Figures"]

Key = tuple[str, tuple[str, ...]]


class Figures:
    """What was counted. A histogram is its sum, and how many fell into each of its buckets."""

    def __init__(self, plain: Iterable[Any] = ()) -> None:
        """Begin with what :meth:`plain` returned elsewhere."""
        self._numbers: dict[Key, list[float]] = {
            (name, tuple(labels)): list(numbers) for name, labels, numbers in plain if name in FAMILIES
        }

    def __iter__(self) -> Iterator[tuple[str, tuple[str, ...], list[float]]]:
        for (name, labels), numbers in self._numbers.items():
            yield name, labels, numbers

    def add(self, name: str, labels: tuple[str, ...], *numbers: float) -> None:
        """Add numbers to those that are there under this name and these labels."""
        there = self._numbers.get((name, labels))
        known = numbers if there is None else map(sum, zip(there, numbers, strict=True))
        self._numbers[name, labels] = list(known)

    def observe(self, name: str, labels: tuple[str, ...], times: Histogram) -> None:
        """Add a histogram."""
        self.add(name, labels, times.sum, *times.counts)

    def take(self, other: Figures, *, lasting: bool = False) -> None:
        """Add all of another's; with ``lasting`` only what stays when a worker goes."""
        for name, labels, numbers in other:
            if not lasting or FAMILIES[name].lasts:
                self.add(name, labels, *numbers)

    def raise_to(self, name: str, labels: tuple[str, ...], number: float) -> None:
        """Let a number that is there be at least ``number``."""
        self._numbers[name, labels] = [max(number, *self._numbers.get((name, labels), [number]))]

    def number(self, name: str, labels: tuple[str, ...] = ()) -> float:
        """Return one number; 0 where nothing was counted."""
        return self._numbers.get((name, labels), [0.0])[0]

    def plain(self) -> list[Any]:
        """Return all in what JSON can say."""
        return [[name, list(labels), numbers] for (name, labels), numbers in self._numbers.items()]
