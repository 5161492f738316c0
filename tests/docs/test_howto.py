"""What the tutorials and how-to guides tell the reader to type works."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from blocks import ROOT, Block, blocks, pages

from harken.cli import COMMANDS, root

FOLDERS = ("tutorials", "how-to")
OWN = {"README.md", "index.md", "decisions"}
PYTHON = blocks("python", *FOLDERS)
CONSOLE = [
    pytest.param(line, id=f"{block}: {line}")
    for block in blocks("console", *FOLDERS)
    for line in re.findall(r"^\$ (.*)$", block.text.replace("\\\n", " "), re.MULTILINE)
]


def test_there_are_programs_to_run() -> None:
    """The pages hold programs and commands: a changed fence would hide them all."""
    assert len(PYTHON) > 5
    assert len(CONSOLE) > 10


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_program_runs(block: Block, tmp_path: Path, free_port: int, run_program) -> None:
    """Each program of a page runs to its end, or listens and ends by Ctrl-C."""
    compile(block.text, str(block), "exec")
    if block.excused:
        return
    program = tmp_path / "program.py"
    program.write_text(block.text.replace("8800", str(free_port)).replace("/run/", f"{tmp_path}/"))
    process = run_program(Path(__file__).with_name("run_block.py"), program, cwd=tmp_path)
    try:
        output, errors = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{block} neither ended nor listened")
    assert process.returncode == 0, f"{block}\n{output}{errors}"


@pytest.mark.parametrize("line", CONSOLE)
def test_command_exists(line: str) -> None:
    """Each command line of a page names a command, flags and make targets that exist."""
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[:1] == ["harken"]:
        check_harken(words[1:])
    elif words[:1] == ["make"]:
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    else:
        known = {"python", "nc", "source", "systemd-socket-activate", "bash", "pip", "openssl", "ssh", "systemctl", "docker", "kubectl"}
        assert words[0] in known


def check_harken(words: list[str]) -> None:
    """Fail unless the command and its flags exist."""
    if words[0].startswith("--"):
        assert words[0] in ("--help", "--version")
        return
    assert words[0] in COMMANDS
    command = root.get_command(None, words[0])  # type: ignore[arg-type]
    assert command is not None
    known = {"--help"} | flags(command)
    if isinstance(command, click.Group):
        verb = command.commands[next(word for word in words[1:] if not word.startswith("--"))]
        known |= flags(verb)
    for word in words[1:]:
        if word == "-m" or word.endswith(".py"):  # the rest is the program's own
            break
        if word.startswith("--"):
            assert word.partition("=")[0] in known


def flags(command: click.Command) -> set[str]:
    """All flags of a command."""
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def test_every_page_is_in_the_index() -> None:
    """A page to which no link leads is read by nobody; decisions are linked as a folder."""
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", index.read_text())}
    assert [str(page) for page in pages(".") if page not in linked and not {page.name, page.parent.name} & OWN] == []


@pytest.mark.parametrize("page", [*pages("."), ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link of a page names a file that exists."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
