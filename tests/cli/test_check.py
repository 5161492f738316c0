"""``harken check``: the settings in force, and one clear line for whatever is wrong."""

from __future__ import annotations

import os
import re
import socket
import sys

import pytest

from harken.paths import from_start

PROGRAM = """
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self): pass
class Late(socketserver.BaseRequestHandler):
    async def handle(self): pass
class Nothing: pass
class Server(socketserver.ThreadingTCPServer):
    request_queue_size = 77
def function(): pass
"""


@pytest.fixture
def check(harken, clean):
    """Return a function that checks a target of a program, on a free port unless told otherwise."""
    clean.joinpath("chk_app.py").write_text(PROGRAM)

    def run(target, *words, bind="tcp://127.0.0.1:0"):
        return harken("check", target, "--bind", bind, *words)

    return run


def rows(out):
    """Return the table as ``{name: (value, source)}``."""
    cells = (line.split(None, 2) for line in out.splitlines()[1:-1])
    return {name: (value, source) for name, value, source in cells}


def test_every_setting_is_shown_with_its_origin(check, clean, monkeypatch):
    """Flag, environment, file and default each name themselves; the last line says ok."""
    clean.joinpath("harken.toml").write_text("pool-queue = 11\n")
    monkeypatch.setenv("HARKEN_POOL_SIZE", "12")
    status, out, err = check("chk_app:Echo", "--config", "harken.toml", "--backlog", "13")
    assert (status, err) == (0, "")
    table = rows(out)
    assert table["backlog"] == ("13", "flag --backlog")
    assert table["pool_size"] == ("12", "environment HARKEN_POOL_SIZE")
    assert table["pool_queue"] == ("11", f"file {clean / 'harken.toml'}")
    assert table["engine"] == ("thread", "default of serve")
    assert out.splitlines()[-1] == "ok: chk_app:Echo on tcp://127.0.0.1:0"


def test_a_server_class_has_the_defaults_of_the_drop_in(check):
    """Its class attributes count, and what nobody set is as in socketserver."""
    status, out, _ = check("chk_app:Server")
    assert status == 0
    table = rows(out)
    assert table["backlog"][0] == "77"
    assert table["backlog"][1].endswith("Server.request_queue_size")
    assert table["drain_timeout"] == ("0.0", "default of drop-in")


@pytest.mark.parametrize(
    "words, shown",
    [
        ([], ("1000", "default of serve with threads")),
        (["--engine", "green"], ("10000", "default of serve")),
        (["--max-connections", "5000"], ("5000", "flag --max-connections")),
    ],
)
def test_the_default_of_max_connections_is_the_engines(check, words, shown):
    """A thousand with threads, unless somebody says another number."""
    _, out, _ = check("chk_app:Echo", *words)
    (line,) = [line for line in out.splitlines() if line.startswith("max_connections ")]
    assert tuple(line.split(None, 2)[1:]) == shown


def test_every_address_is_bound_and_let_go(harken, clean, free_port):
    """The addresses are free again afterwards, and a Unix path is gone."""
    clean.joinpath("chk_app.py").write_text(PROGRAM)
    places = [f"tcp://127.0.0.1:{free_port}", f"udp://127.0.0.1:{free_port}", f"unix:{clean}/s"]
    words = [word for place in places for word in ("--bind", place)]
    for _ in range(2):
        status, out, _ = harken("check", "chk_app:Echo", *words)
        assert status == 0
        assert out.splitlines()[-1] == f"ok: chk_app:Echo on {', '.join(places)}"
    assert not clean.joinpath("s").exists()


def test_a_port_in_use_is_named_with_its_holder(check):
    """Status 1, and who has it."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        url = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        status, _, err = check("chk_app:Echo", bind=url)
    assert status == 1
    assert err == f"harken: {url} is already in use by this process; stop it, or take another port\n"


@pytest.mark.parametrize(
    "target,line",
    [
        ("chk_ap:Echo", "no module named 'chk_ap'; did you mean 'chk_app'?"),
        ("chk_app:Ehco", "chk_app has no 'Ehco'; did you mean 'Echo'?"),
        ("chk_app:function", "chk_app:function is a function, not a handler class: give a class with handle()"),
        ("chk_app:Nothing", "chk_app:Nothing has no handle(), so it is not a handler class"),
        ("chk_app:Late", "Late.handle is async"),
        ("chk_app.py:Ehco", "chk_app.py has no 'Ehco'; did you mean 'Echo'?"),
    ],
)
def test_a_wrong_target_is_one_line_and_status_1(check, target, line):
    """What is wrong with a target, and what is near."""
    status, out, err = check(target)
    assert (status, out) == (1, "")
    assert err.startswith(f"harken: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "bind,line",
    [
        ("tpc://127.0.0.1:0", "no transport is called 'tpc'; did you mean 'tcp'?"),
        ("127.0.0.1:8800", "did you mean 'tcp://127.0.0.1:8800'?"),
        ("tcp://127.0.0.1", "has no port"),
        ("unix:/no/such/folder/s", "/no/such/folder"),
        ("tcp://192.0.2.1:0", "no interface of this machine has that address"),
    ],
)
def test_a_wrong_address_is_one_line_and_status_1(check, bind, line):
    """What is wrong with an address, and what is near."""
    status, _, err = check("chk_app:Echo", bind=bind)
    assert status == 1
    assert line in err
    assert err.count("\n") == 1


def test_an_unknown_setting_in_the_file_is_status_1(check, clean):
    """With the nearest name."""
    clean.joinpath("harken.toml").write_text("pool_sise = 1\n")
    status, _, err = check("chk_app:Echo", "--config", "harken.toml")
    assert status == 1
    assert "unknown setting 'pool_sise'" in err
    assert "did you mean 'pool_size'?" in err
    assert err.count("\n") == 1


def test_an_unknown_variable_is_a_warning(check, monkeypatch):
    """It may be somebody else's, so the check goes on."""
    monkeypatch.setenv("HARKEN_POOL_SISE", "1")
    status, _, err = check("chk_app:Echo")
    assert status == 0
    assert err == "harken check: warning: unknown variable HARKEN_POOL_SISE; did you mean 'HARKEN_POOL_SIZE'?\n"


@pytest.mark.parametrize("where", ["flag", "environment", "file"])
def test_a_wrong_value_is_status_2(check, clean, monkeypatch, where):
    """Wherever it stands, the line says where."""
    words = ()
    if where == "flag":
        words = ("--backlog", "x")
    elif where == "environment":
        monkeypatch.setenv("HARKEN_BACKLOG", "x")
    else:
        clean.joinpath("harken.toml").write_text("backlog = 'x'\n")
        words = ("--config", "harken.toml")
    status, out, err = check("chk_app:Echo", *words)
    assert (status, out) == (2, "")
    assert f"backlog = 'x' ({where} " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("written, shown", [('"027"', "027"), ('"0o7"', "007"), ('"none"', "none")])
def test_a_umask_is_shown_as_it_is_written(check, clean, written, shown):
    """In octal: 23 would be another one."""
    clean.joinpath("harken.toml").write_text(f"umask = {written}\n")
    status, out, _ = check("chk_app:Echo", "--config", "harken.toml")
    assert status == 0
    assert re.search(rf"^umask +{shown} +file ", out, re.MULTILINE)


@pytest.mark.parametrize("number", ["27", "0o27"])
def test_a_umask_in_the_file_stands_in_quotes(check, clean, number):
    """TOML has no number that begins with 0, and 77 without it would be 0115, by which the group reads."""
    clean.joinpath("harken.toml").write_text(f"umask = {number}\n")
    status, _, err = check("chk_app:Echo", "--config", "harken.toml")
    assert status == 2
    assert 'is decimal in TOML; write it in quotes, as in "027"' in err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--umask", "1777"], "umask = '1777' (flag --umask) is above the largest value allowed, 777"),
        (["--control", ""], "control = '' (flag --control) is empty; write a path, or none"),
    ],
)
def test_values_that_mean_nothing_are_refused(check, words, said):
    """The line is about the value, not about what comes of it."""
    status, _, err = check("chk_app:Echo", *words)
    assert status == 2
    assert said in err


def test_the_hub_in_use_is_named(check, clean, monkeypatch):
    """On the green engine alone; its variable is known."""
    from harken import _hub

    monkeypatch.setenv("HARKEN_HUB", "fallback")
    status, out, err = check("chk_app:Echo", "--engine", "green")
    assert (status, err) == (0, "")
    assert f"hub: {_hub.kind}" in out
    assert "hub:" not in check("chk_app:Echo", "--engine", "thread")[1]


@pytest.mark.parametrize("networks", [(), ("--proxy-from", "")])
def test_headers_of_proxies_need_to_be_trusted(harken, check, networks):
    """``--proxy`` without ``--proxy-from`` would believe anybody: ``check`` says so, and ``serve`` does not start."""
    status, _, err = check("chk_app:Echo", "--proxy", "v2", *networks)
    assert status == 1
    assert "proxy = 'v2' needs proxy_from" in err
    status, _, err = harken("serve", "chk_app:Echo", "--bind", "tcp://127.0.0.1:0", "--proxy", "v2", *networks)
    assert status == 2
    assert "proxy = 'v2' needs proxy_from" in err
    status, _, err = check("chk_app:Echo", "--proxy", "v2", "--proxy-from", "127.0.0.0/8, unix:")
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ["--user", "nobdy"],
        ["--group", "nobdy"],
        ["--chdir", "missing"],
        ["--user", "nobody", "--chdir", "private"],
        ["--pidfile", "missing/pid"],
        ["--pidfile", "private"],
        ["--control", "missing/control"],
        ["--log-file", "missing/log"],
        ["--log-file", "private"],
        ["--access-log", "missing/log"],
        ["--metrics", "SERVED"],
        ["--metrics", "unix:pages", "--metrics-token", "missing"],
        ["--bind", "SERVED"],
        ["--tls-verify", "optional"],
        ["--tls-ca", "clients.pem"],
        ["--limits", "missing:Quota"],
        ["--limits", "json:loads"],
        ["--limits", "http.cookiejar:Cookie"],
        ["--engine", "json:loads"],
        ["--engine", "collections:OrderedDict"],
        ["--engine", "chk_wrong:Engine"],
        ["--engine", "green", "--loop", "uvloop"],
    ],
)
def test_what_serve_refuses_check_refuses_in_the_same_words(harken, clean, free_port, run_program, monkeypatch, words):
    """What comes after the settings and before the first connection: files, users, one place wanted twice."""
    clean.joinpath("chk_app.py").write_text(PROGRAM)
    clean.joinpath("private").mkdir(mode=0o700)
    clean.joinpath("uvloop.py").write_text("raise ImportError('as where it is not installed')\n")
    clean.joinpath("chk_wrong.py").write_text("1 / 0\n")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    served = f"tcp://127.0.0.1:{free_port}"
    words = [word.replace("SERVED", served) for word in words]
    words = [f"{clean / 'chk_app.py'}:Echo", "--bind", served, "--control", "none", *words]
    before = sorted(os.listdir())
    status, out, err = harken("check", *words)
    assert (status, out) == (1, "")
    assert sorted(os.listdir()) == before
    serving = run_program("-m", "harken", "serve", *words, cwd=clean)
    assert serving.wait(20) == 1
    assert err in serving.stderr.read()


def test_a_check_leaves_everything_as_it_was(check, clean, monkeypatch):
    """No file is made, emptied or left behind, and the process stays where and who it is."""
    clean.joinpath("log").write_text("a line\n")
    before = sorted(os.listdir())
    words = ("--log-file", "log", "--access-log", "access", "--pidfile", "pid", "--control", "control")
    words += ("--metrics", "unix:page", "--chdir", "/", "--group", str(os.getegid()))
    target = f"{clean / 'chk_app.py'}:Echo"  # and not a module, which is meant from `chdir`
    status, out, err = check(target, *words)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"ok: {target} on tcp://127.0.0.1:0"
    assert [name for name in sorted(os.listdir()) if name != "__pycache__"] == before
    assert clean.joinpath("log").read_text() == "a line\n"
    assert os.getcwd() == str(clean)
    monkeypatch.chdir("/")
    assert from_start("x") == "/x"


def test_a_pid_file_that_is_held_is_refused(check, clean):
    """By the process that it names, and it goes on to name it."""
    clean.joinpath("pid").write_text(f"{os.getppid()}\n")
    status, _, err = check("chk_app:Echo", "--pidfile", "pid")
    assert status == 1
    assert f"process {os.getppid()} holds it and runs" in err
    assert clean.joinpath("pid").read_text() == f"{os.getppid()}\n"


def test_a_server_class_needs_no_files_of_serve(check):
    """It is run by ``harken run``, which has no PID file, no control socket and no user to become."""
    assert check("chk_app:Server", "--pidfile", "/missing/pid", "--user", "nobdy").status == 0
