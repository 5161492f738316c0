"""Options made from the declared settings."""

from __future__ import annotations

import click
import pytest

from harken import settings
from harken.cli import options
from harken.errors import ConfigError

pytestmark = pytest.mark.usefixtures("clean")


def parse(*words, **extra):
    """Parse the options as a command would."""
    command = click.Command("probe", callback=lambda: None, params=options.settings_options(**extra))
    command.main(list(words), standalone_mode=False)
    options.refuse_wrong_values()


def value(name):
    """Return what holds for a server, and whence."""
    return settings.Settings(None).find(name)


def test_every_setting_has_a_flag_with_help():
    """One option for each declaration: its words, its defaults and its variable."""
    made = {option.name: option for option in options.settings_options() if option.name != "config"}
    assert set(made) == set(options.load_settings())
    for name, option in made.items():
        declared = settings.REGISTRY[name]
        assert declared.flag in option.opts
        assert declared.variable in option.help


def test_a_flag_holds_for_every_server():
    """What the command line says stands above everything that the program says."""
    parse("--pool-size", "7", "--no-nodelay", "--engine=pool")
    assert value("pool_size") == (7, "flag --pool-size")
    assert value("nodelay") == (False, "flag --nodelay")
    assert value("engine").value == "pool"


def test_flag_environment_file_default(tmp_path, monkeypatch):
    """The order of precedence, peeled off one by one."""
    path = tmp_path / "harken.toml"
    path.write_text("pool-size = 1\n")
    monkeypatch.setenv("HARKEN_POOL_SIZE", "2")
    parse("--config", str(path), "--pool-size", "3")
    assert value("pool_size") == (3, "flag --pool-size")
    settings.operator.flags.clear()
    assert value("pool_size") == (2, "environment HARKEN_POOL_SIZE")
    monkeypatch.delenv("HARKEN_POOL_SIZE")
    assert value("pool_size") == (1, f"file {path}")


@pytest.mark.parametrize(
    "words",
    [
        ("--pool-size", "many"),
        ("--pool-size", "-1"),
        ("--drain-timeout", "soon"),
        ("--engine", "thred"),
        ("--config", "missing.toml"),
    ],
)
def test_a_wrong_flag_is_a_usage_error(words):
    """A value that is not allowed is refused before anything else happens, in a line that names it."""
    with pytest.raises(click.UsageError) as caught:
        parse(*words)
    assert words[1] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("HARKEN_POOL_SIZE", "many", r"pool_size = 'many' \(environment HARKEN_POOL_SIZE\)"),
        ("HARKEN_HUB", "quick", "HARKEN_HUB='quick' is no kind of hub; take compiled or fallback"),
    ],
)
def test_a_wrong_variable_is_a_usage_error(monkeypatch, name, value, words):
    """Also when no flag is given at all."""
    monkeypatch.setenv(name, value)
    with pytest.raises(click.UsageError, match=words):
        parse()


@pytest.mark.parametrize(
    "text,words",
    [
        ("pool_sise = 3", "unknown setting 'pool_sise'.*did you mean 'pool_size'"),
        ("pool_size = 'x'", "pool_size = 'x' .file .*is not a whole number"),
        ("pool_size =", "is not TOML"),
    ],
)
def test_a_wrong_file_is_a_usage_error(tmp_path, text, words):
    """Unknown names, wrong values and what is not TOML at all."""
    tmp_path.joinpath("harken.toml").write_text(text)
    with pytest.raises(click.UsageError, match=words):
        parse("--config", "harken.toml")


def test_the_refusal_of_a_file_can_be_chosen(tmp_path):
    """``check`` reports a wrong file as what it found, not as a wrong use of itself."""
    tmp_path.joinpath("harken.toml").write_text("pool_sise = 3")
    with pytest.raises(ConfigError):
        parse("--config", "harken.toml", refusal=ConfigError)


def test_addresses_come_from_flag_environment_file_default(tmp_path, monkeypatch):
    """``--bind`` above HARKEN_BIND above ``bind`` in the file above loopback."""
    assert options.addresses(()) == (options.BIND_DEFAULT,)
    path = tmp_path / "harken.toml"
    path.write_text('bind = ["tcp://:1", "udp://:1"]')
    settings.operator.load(path)
    assert options.addresses(()) == ("tcp://:1", "udp://:1")
    path.write_text('bind = "tcp://:2"')
    assert options.addresses(()) == ("tcp://:2",)
    monkeypatch.setenv("HARKEN_BIND", "tcp://:3, unix:/tmp/x")
    assert options.addresses(()) == ("tcp://:3", "unix:/tmp/x")
    assert options.addresses(("tcp://:4",)) == ("tcp://:4",)


@pytest.mark.parametrize("text", ["bind = 8800", "bind = [8800]"])
def test_a_bind_that_is_no_address_is_a_usage_error(tmp_path, text):
    """``bind`` in a file is text or a list of texts."""
    path = tmp_path / "harken.toml"
    path.write_text(text)
    settings.operator.load(path)
    with pytest.raises(click.UsageError, match="is not an address"):
        options.addresses(())


def test_unknown_variables_are_named_with_the_nearest(monkeypatch):
    """A misspelt variable would otherwise be silently nothing."""
    monkeypatch.setenv("HARKEN_POOL_SISE", "3")
    monkeypatch.setenv("HARKEN_BIND", "tcp://:0")
    monkeypatch.setenv("HARKEN_RUN", "{}")
    assert options.unknown_variables() == ["unknown variable HARKEN_POOL_SISE; did you mean 'HARKEN_POOL_SIZE'?"]


def test_what_kubernetes_tells_of_a_service_called_harken_is_nobodys_mistake(monkeypatch):
    """A port that somebody means by such a name is one."""
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_ECHO", "PORT_8800_TCP", "PORT_8800_TCP_ADDR"):
        monkeypatch.setenv(f"HARKEN_{name}", "10.0.0.1")
        monkeypatch.setenv(f"HARKEN_ECHO_{name}", "10.0.0.1")
    monkeypatch.setenv("HARKEN_PORT", "tcp://10.0.0.1:8800")
    assert options.unknown_variables() == []
    monkeypatch.setenv("HARKEN_PORT", "8800")
    (line,) = options.unknown_variables()
    assert line.startswith("unknown variable HARKEN_PORT")


def test_values_are_shown_as_they_are_typed():
    """None, booleans, lists and bytes in the words that flags and files take."""
    shown = [options.show(v) for v in (None, True, False, 0, 1, 1.5, (), ("a", "b"), b"", b"no\n", "x")]
    assert shown == ["none", "true", "false", "0", "1", "1.5", "empty", "a,b", "empty", "no\\n", "x"]
