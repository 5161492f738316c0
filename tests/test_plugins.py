"""Parts by name: a module of the room, a dotted path, an entry point."""

import importlib.metadata
import sys
import types

import pytest

from harken import plugins
from harken.engines import Engine
from harken.errors import ConfigError


@pytest.mark.parametrize("name", ["inline", "thread", "pool", "fork"])
def test_each_engine_is_found_by_its_file(name):
    """The four engines are modules of the room."""
    assert issubclass(plugins.find("engines", name, "Engine"), Engine)


def test_names_are_the_public_files_of_the_room():
    """What begins with an underscore is no part."""
    assert {"inline", "thread", "pool", "fork"} <= set(plugins.names("engines"))
    assert [name for name in plugins.names("engines") if name.startswith("_")] == []


def test_a_dotted_path_is_imported(monkeypatch):
    """``package.module:Name`` gives a part of the user's own."""
    module = types.ModuleType("my_engines")
    module.Mine = object()
    monkeypatch.setitem(sys.modules, "my_engines", module)
    assert plugins.find("engines", "my_engines:Mine", "Engine") is module.Mine


@pytest.mark.parametrize("path", ["no_such_module_here:Engine", "json:NoSuchName"])
def test_a_dotted_path_that_leads_nowhere_is_a_config_error(path):
    """The message names the path and why it cannot be loaded."""
    with pytest.raises(ConfigError, match=f"cannot load '{path}' for engines: .+"):
        plugins.find("engines", path, "Engine")


def test_a_module_that_fails_is_a_config_error(tmp_path, monkeypatch):
    """With the module's own error as its cause."""
    tmp_path.joinpath("plugin_that_fails.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot load 'plugin_that_fails:X' for limits: ZeroDivisionError") as caught:
        plugins.find("limits", "plugin_that_fails:X", "Limit")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_unknown_name_is_refused_with_the_nearest():
    """A typing error is told from a part that is missing."""
    with pytest.raises(ConfigError, match=r"engines has no 'thred'; did you mean 'thread'\?"):
        plugins.find("engines", "thred", "Engine")


def test_an_entry_point_is_a_part_too(monkeypatch):
    """A package that declares ``harken.engines`` is found by the name it declares there."""
    point = importlib.metadata.EntryPoint("rocket", "collections:OrderedDict", "harken.engines")
    points = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **wanted: points.select(**wanted))
    import collections

    assert plugins.find("engines", "rocket", "Engine") is collections.OrderedDict
    with pytest.raises(ConfigError, match="did you mean 'rocket'"):
        plugins.find("engines", "roket", "Engine")


def test_an_own_module_wins_over_an_entry_point(monkeypatch):
    """A package cannot take ``thread`` for itself."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **wanted: pytest.fail("was asked"))
    assert plugins.find("engines", "thread", "Engine").__module__ == "harken.engines.thread"
