"""A server's limits together."""

import pytest

from harken.admission import Admission, wanted
from harken.settings import Settings, share


@pytest.mark.parametrize(
    "profile, workers, total, part",
    [
        ("serve", 4, 100, 25),
        ("serve", 3, 100, 33),
        ("serve", 1, 100, 100),
        ("serve", 8, 2, 1),
        ("drop-in", 4, 100, 100),
    ],
)
def test_workers_share_what_holds_over_all(profile, workers, total, part):
    """Together they do not exceed it; the drop-in classes have no workers."""
    assert share(total, Settings(None, {"workers": workers}, profile)) == part
    assert share(None, Settings(None, {"workers": workers}, profile)) is None


def test_the_defaults_of_serve():
    """Ten thousand, but a thousand where each takes a thread; what was asked for holds everywhere."""
    found = []
    for engine, asked in (("green", {}), ("thread", {}), ("thread", {"max_connections": 5000})):
        admission = Admission()
        admission.refresh(Settings(None, asked, "serve"), engine)
        found.append(admission.crowd.maximum)
    assert found == [10_000, 1000, 5000]


def test_nothing_is_wanted_of_the_drop_in_classes():
    """No limit is set unless asked."""
    assert not wanted(Settings(None))
    assert wanted(Settings(None, {"deny": ["192.0.2.1"]}))
