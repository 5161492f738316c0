"""Relative paths in settings lead from where the process was started."""

import subprocess
import sys

SEVERAL = """
import os, sys
from harken.paths import change_directory, from_start
print(from_start("x"))
change_directory(sys.argv[1])
change_directory("deeper")
print(os.getcwd(), from_start("x"), from_start("/y"), from_start("../z"), sep="\\n")
"""
GONE = """
import os, sys
from harken.paths import change_directory, from_start
os.rmdir(os.getcwd())
change_directory(sys.argv[1])
print(os.getcwd(), from_start("x"), sep="\\n")
"""


def run(text, start, *words):
    """Return the lines that a program prints which is started there."""
    done = subprocess.run([sys.executable, "-c", text, *words], cwd=start, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_paths_lead_from_the_start_after_several_changes(tmp_path):
    """The first directory counts, and absolute paths stay what they are."""
    start, other = tmp_path / "start", tmp_path / "other"
    start.mkdir()
    (other / "deeper").mkdir(parents=True)
    before = f"{start}/x"
    assert run(SEVERAL, start, str(other)) == [before, f"{other}/deeper", before, "/y", f"{tmp_path}/z"]


def test_a_start_that_was_removed_is_no_obstacle(tmp_path):
    """Nothing can be meant from there any more."""
    (tmp_path / "start").mkdir()
    assert run(GONE, tmp_path / "start", str(tmp_path)) == [str(tmp_path), f"{tmp_path}/x"]
