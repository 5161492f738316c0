"""Figures as Prometheus reads them, by its own client library."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

from harken.errors import ConfigError
from harken.meter import SECONDS
from harken.observe.families import FAMILIES, Family
from harken.observe.figures import Figures

__all__ = ["check_installed", "expose"]


def check_installed() -> None:
    """See that the client library is there, without loading it.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("prometheus_client") is None:
        raise ConfigError("metrics needs prometheus-client: pip install 'harken[metrics]'")


def expose(figures: Figures, accept: str) -> tuple[bytes, str]:
    """Write figures down.

    Args:
        figures: of all workers.
        accept: what the reader's Accept header says.

    Returns:
        The text and its content type.
    """
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(_Collector(figures))
    try:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type
    except Exception:  # noqa: BLE001 - the library reads the header trustingly: what makes no sense asks for nothing
        encode, content_type = choose_encoder("")
        return encode(registry), content_type


class _Collector:
    """What the client library asks."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def describe(self) -> list[Any]:
        """Return nothing: the library need not check names against one another."""
        return []

    def collect(self) -> Iterator[Any]:
        """Return every family, in the order of their declarations."""
        from prometheus_client import core

        kinds = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
            "histogram": core.HistogramMetricFamily,
        }
        found: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in FAMILIES}
        for name, labels, numbers in self._figures:
            found[name][labels] = numbers
        for name, series in found.items():
            family = FAMILIES[name]
            shown = kinds[family.kind](name, family.meaning, labels=family.labels)
            for labels, numbers in _filled(family, series).items():
                if family.kind == "histogram":
                    shown.add_metric(labels, _buckets(numbers[1:]), numbers[0])
                else:
                    shown.add_metric(labels, numbers[0])
            yield shown


def _filled(family: Family, series: dict[tuple[str, ...], list[float]]) -> dict[tuple[str, ...], list[float]]:
    """Let every value that a label can have be there, so that its first increase is seen as one."""
    if not family.values:
        return series
    heads = {labels[:-1] for labels in series} or ({()} if len(family.labels) == 1 else set())
    return {(*head, value): [0.0] for head in sorted(heads) for value in family.values} | series


def _buckets(counts: list[float]) -> list[tuple[str, float]]:
    from prometheus_client.utils import floatToGoString

    return list(zip([*map(floatToGoString, SECONDS), "+Inf"], accumulate(counts), strict=True))
