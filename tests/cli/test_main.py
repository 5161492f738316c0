"""The command itself: help, version, what is misspelt, and what it loads."""

from __future__ import annotations

import importlib
import subprocess
import sys

import click
import pytest

from harken.cli import COMMANDS


def test_help_names_every_command_and_loads_none(harken):
    """``--help`` shows the table of commands without importing one of them."""
    loaded = {name for name in sys.modules if name.startswith("harken.cli.")}
    status, out, _ = harken("--help")
    assert status == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert {name for name in sys.modules if name.startswith("harken.cli.")} == loaded


def test_no_command_shows_the_help_and_is_a_usage_error(harken):
    """``harken`` alone says what there is, on stderr, with status 2."""
    status, out, err = harken()
    assert (status, out) == (2, "")
    assert "serve" in err


def test_version(harken):
    """``--version`` says which harken on which Python."""
    status, out, _ = harken("--version")
    assert status == 0
    assert out.startswith("harken ")
    assert sys.version.split()[0] in out


@pytest.mark.parametrize("word,near", [("serv", "serve"), ("chek", "check"), ("rum", "run"), ("explian", "explain")])
def test_a_misspelt_command_gets_the_nearest(harken, word, near):
    """A wrong command is one line that names the nearest one."""
    status, _, err = harken(word)
    assert status == 2
    assert err == f"harken: no command {word!r}; did you mean {near!r}? (see harken --help)\n"


def test_a_command_like_none_gets_the_list(harken):
    """Where nothing is near, all are named."""
    _, _, err = harken("xyzzy")
    assert "serve, run, check, explain" in err


def test_a_misspelt_flag_gets_the_nearest(harken):
    """A wrong flag is one line, status 2, with the nearest flag."""
    status, _, err = harken("check", "--enigne", "thread", "app:Handler")
    assert status == 2
    assert "'--enigne'" in err
    assert "--engine" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_with_help(name, harken):
    """Each name of the table leads to a command that explains itself and each of its options."""
    command = importlib.import_module(f"harken.cli.{name}").command
    assert isinstance(command, click.Command)
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    status, out, _ = harken(name, "--help")
    assert status == 0
    assert out.startswith(f"Usage: harken {name}")


@pytest.mark.parametrize("name", ["serve", "run", "check"])
def test_a_command_loads_nothing_that_is_built_on_socketserver(name):
    """A command that imported socketserver's users would hide them from the stand-in that ``run`` puts in its place."""
    code = (
        "import sys, harken.cli, importlib\n"
        f"importlib.import_module('harken.cli.{name}')\n"
        "from harken.cli.options import load_settings; load_settings()\n"
        "print([m for m in ('socketserver', 'http.server', 'logging.config', 'xmlrpc.server') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout == "[]\n"


NOWHERE = """
import os, sys
os.rmdir(os.getcwd())
os.execv(sys.executable, [sys.executable, "-m", "harken", *sys.argv[1:]])
"""


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_working_directory_that_was_removed_is_named(run_program, tmp_path, command):
    """The system's word for it does not say what is missing."""
    (tmp_path / "app.py").write_text("class Nothing:\n    def handle(self): pass\n    __init__ = handle\n")
    (tmp_path / "gone").mkdir()
    words = (command, f"{tmp_path / 'app.py'}:Nothing", "--bind", "tcp://127.0.0.1:0")
    process = run_program("-c", NOWHERE, *words, cwd=tmp_path / "gone")
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (
        1,
        "harken: the working directory was removed; change to one that is there\n",
    )


def test_a_script_runs_where_the_working_directory_was_removed(run_program, tmp_path):
    """By its whole path, as under ``python``."""
    (tmp_path / "script.py").write_text("print(__file__)\n")
    (tmp_path / "gone").mkdir()
    process = run_program("-c", NOWHERE, "run", tmp_path / "script.py", cwd=tmp_path / "gone")
    assert process.communicate(timeout=30) == (f"{tmp_path / 'script.py'}\n", "")


def test_a_missing_greenlet_is_one_line(run_program, tmp_path):
    """As where harken was installed without what it needs."""
    program = "import sys; sys.modules['greenlet'] = None; from harken.cli import main; main()"
    process = run_program("-c", program, "serve", "app:Echo", cwd=tmp_path)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (
        1,
        "harken: green threads need greenlet, which is not installed: pip install greenlet\n",
    )
