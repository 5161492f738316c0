"""What the tests beside this file listen to."""

import pytest

from harken import events


@pytest.fixture
def told():
    """Every event of this test, in order."""
    seen = []
    end = events.subscribe(seen.append)
    yield seen
    end()
