"""Until when certificates hold, and what is said of those that do not for long."""

from __future__ import annotations

import datetime as dt
import ssl

import pytest
import trustme

from harken.preambles._validity import remarks_on, validity

UTC = dt.UTC


@pytest.fixture(scope="module")
def authority():
    """One for all."""
    return trustme.CA()


@pytest.fixture
def issued(authority, tmp_path):
    """Return a function that writes a certificate with an end."""

    def issue(end, begin=None):
        path = tmp_path / "site.pem"
        made = authority.issue_cert("localhost", not_after=end, not_before=begin)
        path.write_bytes(b"a comment\n" + b"".join(pem.bytes() for pem in made.cert_chain_pems))
        return path

    return issue


@pytest.mark.parametrize("year", [2049, 2050, 2120])
def test_the_times_are_read(issued, year):
    """Also where the year has four digits, which is from 2050 on."""
    end = dt.datetime(year, 2, 3, 4, 5, 6, tzinfo=UTC)
    begin = dt.datetime(2001, 1, 2, tzinfo=UTC)
    assert validity(str(issued(end, begin))) == (begin.timestamp(), end.timestamp())


def test_it_is_what_openssl_says(issued):
    """By CPython's own decoder, which is for its tests alone."""
    path = issued(dt.datetime.now(UTC) + dt.timedelta(days=90))
    told = ssl._ssl._test_decode_cert(str(path))
    assert validity(str(path)) == (
        ssl.cert_time_to_seconds(told["notBefore"]),
        ssl.cert_time_to_seconds(told["notAfter"]),
    )


@pytest.mark.parametrize(
    "days, words",
    [
        (-1, "expired on"),
        (0.5, "expires in 0 days"),
        (12.5, "expires in 12 days"),
        (29.5, "expires in 29 days"),
        (30.5, None),
    ],
)
def test_what_is_said(issued, days, words):
    """An end that is near or past, and when that is."""
    end = dt.datetime.now(UTC) + dt.timedelta(days=days)
    path = issued(end, end - dt.timedelta(days=90))
    lines = remarks_on([path])
    assert len(lines) == (words is not None)
    if words is not None:
        assert words in lines[0]
        assert end.strftime("%Y-%m-%d") in lines[0]
        assert str(path) in lines[0]


def test_one_that_does_not_hold_yet(issued):
    """The clock may be wrong."""
    now = dt.datetime.now(UTC)
    (line,) = remarks_on([issued(now + dt.timedelta(days=99), now + dt.timedelta(days=2))])
    assert "does not hold before" in line


def test_a_file_without_a_certificate(tmp_path):
    """It is named."""
    (tmp_path / "none.pem").write_text("nothing")
    with pytest.raises(ValueError, match=r"none\.pem holds no certificate"):
        validity(str(tmp_path / "none.pem"))
