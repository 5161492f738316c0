"""The Grafana dashboard asks for what there is."""

import json
import re
from pathlib import Path

from harken.observe.families import FAMILIES

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples" / "grafana-dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
SERIES = {name + suffix: family for name, family in FAMILIES.items() for suffix in SUFFIXES[family.kind]}


def test_each_query_names_metrics_that_exist():
    """And every family but one or two of detail has a place on the board."""
    asked = {name for query in QUERIES for name in re.findall(r"\bharken_\w+", query)}
    assert asked <= SERIES.keys()
    assert FAMILIES.keys() - {SERIES[name].name for name in asked} == {"harken_accepted_total"}


def test_each_query_groups_by_labels_that_exist():
    """Labels of the families, and those that Prometheus adds."""
    for query in QUERIES:
        known = {label for name in re.findall(r"\bharken_\w+", query) for label in SERIES[name].labels}
        used = {label for group in re.findall(r"by \(([\w, ]+)\)", query) for label in group.split(", ")}
        used |= set(re.findall(r"[{,](\w+)=~?\"", query))
        assert used <= known | {"instance", "le"}, query


def test_rates_are_taken_of_what_only_rises():
    """A rate of a gauge, or a counter without one, shows nothing that means anything."""
    for query in QUERIES:
        for name in re.findall(r"\bharken_\w+", query):
            rated = re.search(rf"(rate|increase)\({name}\b", query) is not None
            assert rated == SERIES[name].lasts, query


def test_panels_stand_side_by_side():
    """No two of them overlap, and each has a number of its own."""
    places = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & places, panel["title"]
        assert at["x"] + at["w"] <= 24
        places |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
