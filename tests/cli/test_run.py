"""``harken run``: a program finds everything as under ``python``, and harken where it looks for socketserver."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from harken import process
from harken.settings import Setting, declare_all

SECONDS = 30  # a program's start on a busy machine, with room to spare
SRC = Path(__file__).resolve().parents[2] / "src"

LOOK = """
import json, os, sys
print(json.dumps({
    "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0],
    "package": __package__, "spec": __spec__ and __spec__.name, "doc": __doc__,
    "loader": type(__loader__).__name__, "names": sorted(set(globals()) - {"__annotations__", "json", "os", "sys"}),
    "main": sys.modules["__main__"].__dict__ is globals(),
}))
"""


@pytest.fixture
def python(tmp_path):
    """Return a function that runs a Python program in ``tmp_path`` and returns the finished process."""

    def run(*words, **more):
        paths = [str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return run


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file below ``tmp_path``."""

    def put(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return put


@pytest.mark.parametrize(
    "words",
    [
        ("look.py",),
        ("folder/look.py", "-v", "--engine", "x", "--", "-m"),
        ("-m", "look", "a"),
        ("-m", "pkg.look", "--help"),
        ("-m", "pkg", "--bind", "b"),
        ("pkg", "x"),
        ("app.zip", "x"),
    ],
    ids=" ".join,
)
def test_a_program_sees_what_it_sees_under_python(python, write, tmp_path, words):
    """``__main__`` and its names, ``sys.argv``, ``sys.path[0]``: the same, for scripts, modules and archives."""
    import zipfile

    for name in ("look.py", "folder/look.py", "pkg/look.py", "pkg/__main__.py"):
        write(name, '"""Doc."""' + LOOK)
    write("pkg/__init__.py", "")
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", '"""Doc."""' + LOOK)
    expected = json.loads(python(*words).stdout)
    result = python("-m", "harken", "run", *words)
    assert result.stderr == ""
    assert json.loads(result.stdout) == expected


def test_a_compiled_program(python, write, tmp_path):
    """`python prog.pyc` runs what was compiled, also where the source is gone."""
    import py_compile

    source = write("prog.py", "import socketserver, sys\nprint(socketserver.__name__, __file__, sys.argv)\n")
    py_compile.compile(source, tmp_path / "prog.pyc")
    source.unlink()
    result = python("-m", "harken", "run", "prog.pyc", "-x")
    assert (result.stdout, result.stderr) == (f"harken {tmp_path / 'prog.pyc'} ['prog.pyc', '-x']\n", "")


@pytest.mark.parametrize("words", [("prog.py",), ("-m", "prog")])
def test_a_program_may_read_its_annotations(python, write, words):
    """Also before it has any."""
    write("prog.py", "print(__annotations__)\nx: int = 1\nprint(sorted(__annotations__))\n")
    assert python("-m", "harken", "run", *words).stdout == python(*words).stdout == "{}\n['x']\n"


def test_socketserver_is_harken(python, write):
    """``import socketserver``, in the program and in the library modules that it imports, gives harken."""
    write(
        "prog.py",
        """
        import socketserver, http.server, sys
        print(socketserver.__name__, http.server.HTTPServer.__mro__[1].__module__.partition(".")[0])
        """,
    )
    result = python("-m", "harken", "run", "prog.py")
    assert result.stdout == "harken harken\n"


def test_flags_reach_the_program(python, write):
    """Options before the script are settings of every server; those after it are the program's own."""
    write(
        "prog.py",
        """
        import sys
        from harken import settings
        print(settings.Settings(None)["pool_size"], sys.argv[1:])
        """,
    )
    result = python("-m", "harken", "run", "--pool-size", "5", "prog.py", "--pool-size", "6")
    assert result.stdout == "5 ['--pool-size', '6']\n"


SERVES_ONE = """
import socket, socketserver
with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
    with socket.create_connection(server.server_address):
        server.handle_request()
"""


def test_settings_of_a_service_are_not_dropped_in_silence(python, write):
    """Who takes them from ``serve`` is told that a program's own servers do without; the program runs all the same."""
    write("prog.py", SERVES_ONE)
    words = ["--workers", "2", "--user", "nobody", "--drain-timeout", "5", "--control", "none"]
    result = python("-m", "harken", "run", *words, "prog.py")
    first, second = result.stderr.splitlines()
    assert first.startswith("harken run: warning: --user, --workers: for programs that call harken.serve()")
    assert second.startswith("harken run: warning: --drain-timeout: for harken.serve() and drain()")
    assert result.returncode == 0


def test_settings_of_servers_are_not_spoken_of(python, write):
    """Nor those of a service in the environment, which may be somebody else's."""
    write("prog.py", SERVES_ONE)
    result = python("-m", "harken", "run", "--max-connections", "5", "prog.py", HARKEN_WORKERS="2")
    assert (result.returncode, result.stderr) == (0, "")


def test_every_setting_of_processes_is_known_as_one_of_a_service():
    """A setting that comes to this room is a service's, and `run` has to tell; single servers heed one of them."""
    declared = {
        value.name
        for found in pkgutil.iter_modules(process.__path__)
        for value in vars(importlib.import_module(f"harken.process.{found.name}")).values()
        if isinstance(value, Setting)
    }
    assert declared - {"worker_timeout"} == {name for name, value in declare_all().items() if value.process}


def test_the_access_log_of_an_unchanged_program(python, write, tmp_path):
    """A line for each connection of its servers, and of its children's."""
    write("prog.py", "import subprocess, sys\n" + SERVES_ONE + "subprocess.run([sys.executable, 'child.py'])\n")
    write("child.py", SERVES_ONE)
    result = python("-m", "harken", "run", "--access-log", "access.log", "prog.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "access.log").read_text().count(" reason=handler_returned ") == 2


def test_a_service_of_the_program_logs_once(python, write, tmp_path):
    """What `run` attached for the program's servers gives way to the service's own logs."""
    write(
        "prog.py",
        """
        import os, signal, socket, threading
        import harken

        class Say(harken.BaseRequestHandler):
            def handle(self):
                self.request.sendall(b"yes")

        def ask(event):
            with socket.create_connection(event.server.server_address) as client:
                client.recv(3)

        def end(event):
            os.kill(os.getpid(), signal.SIGTERM)

        harken.events.subscribe(lambda event: threading.Thread(target=ask, args=[event]).start(), "listening")
        harken.events.subscribe(end, "closed")
        harken.serve(Say, "tcp://127.0.0.1:0", workers=0)
        """,
    )
    logs = ["--log-level", "info", "--log-file", "run.log", "--access-log", "access.log"]
    result = python("-m", "harken", "run", *logs, "prog.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "run.log").read_text().count("listening:") == 1
    assert (tmp_path / "access.log").read_text().count(" reason=") == 1


@pytest.mark.parametrize(
    "body,status",
    [
        ("def f():\n    1 / 0\nf()", 1),
        ("import json\njson.loads('{')", 1),
        ("def f(:", 1),
        ("import sys\nsys.exit(7)", 7),
        ("raise SystemExit('sorry')", 1),
        ("open('/no/such/file')", 1),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise ValueError('second')", 1),
        ("import sys\nsys.excepthook = lambda k, v, t: print('hook', k.__name__, t.tb_lineno)\n1 / 0", 1),
    ],
)
def test_errors_and_exit_status_are_those_of_python(python, write, body, status):
    """Traceback, message and status: nothing of harken's stands in between."""
    write("prog.py", body + "\n")
    expected = python("prog.py")
    result = python("-m", "harken", "run", "prog.py")
    assert expected.returncode == status
    assert (result.returncode, result.stdout) == (status, expected.stdout)
    assert result.stderr == expected.stderr


def test_an_error_of_harkens_own_kind_keeps_its_traceback(python, write):
    """A program that trips over harken's checks sees where, as for any other error."""
    write("prog.py", "from harken.errors import ConfigError\nraise ConfigError('no such thing')\n")
    result = python("-m", "harken", "run", "prog.py")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "harken.errors.ConfigError: no such thing"
    assert "prog.py" in result.stderr
    assert "click" not in result.stderr


def test_ctrl_c_ends_as_under_python(run_program, write):
    """The traceback of the program alone, then death by SIGINT, which shells report as 130."""
    path = write("prog.py", "import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    process = run_program("-m", "harken", "run", path)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGINT
    assert err.startswith("Traceback (most recent call last):\n  File")
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert "harken" not in err


def test_threads_that_outlive_the_last_line_still_have_their_main(python, write):
    """A thread that goes on after the script's end pickles and finds ``__main__`` as under python."""
    write(
        "prog.py",
        """
        import pickle, threading
        class Thing: pass
        go = threading.Event()
        def later():
            threading.main_thread().join()
            print(type(pickle.loads(pickle.dumps(Thing()))).__name__, flush=True)
        threading.Thread(target=later).start()
        """,
    )
    result = python("-m", "harken", "run", "prog.py")
    assert (result.stdout, result.stderr, result.returncode) == ("Thing\n", "", 0)


@pytest.mark.parametrize(
    "words,line,status",
    [
        (("prgo.py",), "harken: no script 'prgo.py'; did you mean 'prog.py'?", 1),
        (("-m", "prgo"), "harken: no module named 'prgo'; did you mean 'prog'?", 1),
        (("-m", ".prog"), "harken: '.prog' is a relative name; name the module from its top package on", 1),
        (("-m", "http.servr"), "harken: no module named 'http.servr'; did you mean 'http.server'?", 1),
        (("-m", "json"), "harken: 'json' is a package without a __main__, so it cannot be run", 1),
        (("-m", "sys"), "harken: 'sys' is not made of Python code, so it cannot be run", 1),
        (("empty",), "harken: '{tmp_path}/empty' holds no __main__.py to run", 1),
        ((), "harken run: name a script, or a module by -m (see harken run --help)", 2),
        (("--engine", "thred", "prog.py"), "harken run: engine = 'thred' (flag --engine) is not one of", 2),
        (("--engin", "thread", "prog.py"), "harken run: No such option '--engin'. (Did you mean one of: ", 2),
    ],
)
def test_what_is_misspelt_is_one_line(python, tmp_path, words, line, status):
    """Each typo gets one line, with the nearest name."""
    tmp_path.joinpath("prog.py").touch()
    tmp_path.joinpath("empty").mkdir()
    result = python("-m", "harken", "run", *words)
    assert result.stderr.startswith(line.format(tmp_path=tmp_path))
    assert result.stderr.count("\n") == 1
    assert result.returncode == status


HELLO = """
import socket, socketserver, threading
class Hello(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"hello")
with socketserver.TCPServer(("127.0.0.1", 0), Hello) as server:
    threading.Thread(target=server.handle_request).start()
    with socket.create_connection(server.server_address) as client:
        while client.recv(100): pass
"""


def test_the_access_log_is_kept(python, write, tmp_path):
    """As under ``serve``."""
    write("prog.py", HELLO)
    result = python("-m", "harken", "run", "--access-log", "access", "prog.py")
    assert (result.returncode, result.stderr) == (0, "")
    (line,) = tmp_path.joinpath("access").read_text().splitlines()
    assert "bytes_out=5 reason=handler_returned" in line


@pytest.mark.parametrize("flag", ["--log-file", "--access-log"])
def test_a_log_that_cannot_be_opened_is_one_line(python, write, flag):
    """And the program does not begin."""
    write("prog.py", "print('begun')")
    result = python("-m", "harken", "run", flag, "missing/log", "prog.py")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "harken: the log 'missing/log' cannot be opened: No such file or directory\n"


def test_an_unknown_variable_is_a_warning(python, write):
    """The program runs, and its operator learns why nothing came of it."""
    write("prog.py", "print('done')\n")
    result = python("-m", "harken", "run", "prog.py", HARKEN_POOLSIZE="5")
    assert (result.returncode, result.stdout) == (0, "done\n")
    said = "harken run: warning: unknown variable HARKEN_POOLSIZE; did you mean 'HARKEN_POOL_SIZE'?\n"
    assert result.stderr == said


@pytest.mark.parametrize("name,value", [("HARKEN_POOL_SIZE", "many"), ("HARKEN_ENGINE", "thred")])
def test_a_wrong_variable_is_a_usage_error(python, write, name, value):
    """Status 2 and a line that names the variable, before the program begins."""
    write("prog.py", "print('begun')")
    result = python("-m", "harken", "run", "prog.py", **{name: value})
    assert (result.returncode, result.stdout) == (2, "")
    assert name in result.stderr


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_multiprocessing_children_run_on_harken_too(python, write, method):
    """Classes of ``__main__`` pickle, and a child finds the stand-in and the flags."""
    write(
        "prog.py",
        f"""
        import multiprocessing
        class Question:
            def ask(self):
                import socketserver
                from harken import settings
                return socketserver.__name__, settings.operator.flags["pool_size"]
        if __name__ == "__main__":
            with multiprocessing.get_context({method!r}).Pool(1) as pool:
                print(*pool.apply(Question.ask, (Question(),)))
        """,
    )
    result = python("-m", "harken", "run", "--pool-size", "9", "prog.py")
    assert (result.stdout, result.stderr) == ("harken 9\n", "")


def test_a_program_that_executes_itself_anew_stays_on_harken(python, write):
    """Reloaders start ``sys.executable`` with the script: flags and file go along."""
    config = write("conf/harken.toml", "pool_queue = 11\n")
    write(
        "prog.py",
        """
        import os, subprocess, sys, socketserver
        from harken import settings
        held = settings.operator
        print(socketserver.__name__, held.flags, held.file, held.path, flush=True)
        if sys.argv[1:]:
            os.chdir("/")
            sys.exit(subprocess.call([sys.executable, __file__]))
        """,
    )
    result = python("-m", "harken", "run", "--pool-size", "9", "--config", "conf/harken.toml", "prog.py", "again")
    line = f"harken {{'pool_size': '9'}} {{'pool_queue': 11}} {config}\n"
    assert result.stdout == line * 2
