"""Figures add up, survive JSON, and are written as Prometheus reads them."""

import json
import sys

import pytest

from harken.errors import ConfigError
from harken.meter import SECONDS, Histogram
from harken.observe import exposition
from harken.observe.families import CAUSES, FAMILIES
from harken.observe.figures import Figures
from harken.records import REASONS

HERE = ("tcp://127.0.0.1:1",)


def exposed(figures):
    """The lines of the page that are no comments, as a dict."""
    text, _ = exposition.expose(figures, "")
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_figures_add_up_by_name_and_labels():
    """Numbers and histograms alike, also after a way through JSON."""
    times = Histogram()
    times.add(0.2)
    figures = Figures()
    for _ in range(2):
        figures.add("harken_accepted_total", HERE, 3)
        figures.observe("harken_handler_seconds", HERE, times)
    total = Figures(json.loads(json.dumps(figures.plain())))
    total.take(figures)
    lines = exposed(total)
    assert lines[f'harken_accepted_total{{listener="{HERE[0]}"}}'] == 12
    assert lines[f'harken_handler_seconds_count{{listener="{HERE[0]}"}}'] == 4
    assert lines[f'harken_handler_seconds_sum{{listener="{HERE[0]}"}}'] == pytest.approx(0.8)


def test_buckets_are_cumulative():
    """Each bucket counts those below it too, up to +Inf."""
    times = Histogram()
    for seconds in (0.0, 0.02, 1e9):
        times.add(seconds)
    figures = Figures()
    figures.observe("harken_hub_lag_seconds", (), times)
    lines = exposed(figures)
    buckets = [lines[f'harken_hub_lag_seconds_bucket{{le="{bound}"}}'] for bound in ("0.0001", "0.025", "3600.0")]
    assert buckets == [1, 2, 2]
    assert lines['harken_hub_lag_seconds_bucket{le="+Inf"}'] == 3
    assert sum(name.startswith("harken_hub_lag_seconds_bucket") for name in lines) == len(SECONDS) + 1


def test_only_what_lasts_is_kept_of_a_worker_that_has_gone():
    """Counters are kept, gauges are not: nothing of it is open any more."""
    figures, kept = Figures(), Figures()
    figures.add("harken_connections_open", HERE, 5)
    figures.add("harken_accepted_total", HERE, 5)
    kept.take(figures, lasting=True)
    assert kept.plain() == [["harken_accepted_total", list(HERE), [5]]]


def test_known_values_are_there_from_the_start():
    """A rate over a counter that appears at 1 would miss its first: reasons and causes stand at 0."""
    figures = Figures()
    figures.add("harken_connections_closed_total", (*HERE, "killed"), 2)
    lines = exposed(figures)
    reasons = {f'harken_connections_closed_total{{listener="{HERE[0]}",reason="{reason}"}}' for reason in REASONS}
    assert reasons <= lines.keys()
    assert sum(lines[name] for name in reasons) == 2
    assert {f'harken_worker_restarts_total{{cause="{cause}"}}' for cause in CAUSES} <= lines.keys()


def test_names_are_as_prometheus_wants_them():
    """Counters end in _total, times in seconds; each has a meaning and no label that clients choose."""
    for name, family in FAMILIES.items():
        assert (family.kind == "counter") == name.endswith("_total")
        assert family.kind in ("counter", "gauge", "histogram")
        assert family.meaning
        assert set(family.labels) <= {"listener", "reason", "cause", "state"}


def test_openmetrics_is_spoken_to_whoever_asks_for_it():
    """The client library chooses by the Accept header."""
    text, content_type = exposition.expose(Figures(), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    """One line, and what to type."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(exposition, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'harken\[metrics\]'"):
        exposition.check_installed()
