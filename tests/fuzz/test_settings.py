"""Whatever is written for a setting is a value of its kind or one clear line."""

import math

import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

from harken import settings
from harken.errors import ConfigError
from harken.settings import Kind, Operator, Settings, known

EXAMPLES = 60
fuzz = hypothesis_settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

ALL = sorted(settings.declare_all())
KINDS = [
    settings.count(),
    settings.count(1, optional=True),
    settings.seconds(optional=True),
    settings.size(),
    settings.flag(optional=True),
    settings.choice("text", "json"),
    settings.text(optional=True),
    Kind("list", (tuple,)),
]
LIKELY = st.sampled_from("0 1 -1 none NaN inf 1e9 0x10 1_000 ٣ 4KiB 99999999999999999999 true off a:b ,".split())
WRITTEN = st.text(max_size=30) | LIKELY


@fuzz
@given(kind=st.sampled_from(KINDS), written=WRITTEN)
def test_text_is_a_value_or_a_value_error(kind, written):
    """Nothing else is raised, and a value that was read is one that the kind takes."""
    try:
        value = kind.parse(written)
    except ValueError as error:
        assert str(error).startswith("is ")
        assert "\n" not in str(error)
    else:
        assert kind.check(value) == value
        assert not isinstance(value, float) or math.isfinite(value)


@fuzz
@given(name=st.sampled_from(ALL), written=WRITTEN)
def test_a_keyword_is_taken_or_named(name, written):
    """The one line of a ConfigError names setting and source."""
    try:
        Settings(object(), {name: written}).find(name)
    except ConfigError as error:
        assert str(error).startswith(f"{name} = ")
        assert "(keyword argument)" in str(error)


@fuzz
@given(value=st.integers(min_value=0) | st.floats(min_value=0, max_value=settings.MAX_SECONDS))
def test_numbers_are_read_as_they_were_written(value):
    """``str`` and back, for counts and for seconds."""
    kind = settings.count() if isinstance(value, int) else settings.seconds()
    try:
        written = str(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return
    assert kind.parse(written) == value


@fuzz
@given(parts=st.lists(st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]), min_size=1)))
def test_lists_are_read_as_they_were_written(parts):
    """Separated by commas, without the blanks around them."""
    wanted = tuple(part.strip() for part in parts if part.strip())
    assert Kind("list", (tuple,)).parse(",".join(parts)) == wanted


@fuzz
@given(name=st.text(max_size=20))
def test_any_name_is_known_or_refused(name):
    """An unknown name gives one line, whatever is in it."""
    try:
        assert known(name, "a test").name in ALL
    except ConfigError as error:
        assert repr(name) in str(error)
        assert "\n" not in str(error)


@fuzz
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_read_or_refused(tmp_path, content):
    """A ConfigError that names the file, and nothing is half read."""
    path = tmp_path / "harken.toml"
    path.write_bytes(content)
    operator = Operator()
    try:
        operator.load(path)
    except ConfigError as error:
        assert "harken.toml" in str(error)
        assert operator.file == {}


@pytest.mark.parametrize("name", ALL)
def test_the_default_of_each_setting_survives_a_round_trip(name):
    """What ``harken check`` prints can be written back."""
    declared = known(name, "a test")
    for value in (declared.default, declared.serve):
        if isinstance(value, bytes):
            continue
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
            assert declared.kind.parse(value) == ()
            continue
        written = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        assert declared.kind.parse(written) == value
