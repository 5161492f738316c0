"""Whether a file could be written: what stands in the way is told as opening the file would tell it."""

import errno
import os
import types

import pytest

from harken.errors import ConfigError
from harken.process.pidfile import PidFile
from harken.process.writable import check_file, check_folder


@pytest.fixture
def forbid(monkeypatch):
    """Return a function that forbids writing to what ends in a word; root may write anywhere."""
    real = os.access

    def forbid(end):
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(end) and real(path, mode))

    return forbid


@pytest.mark.parametrize("name", ["new", "old", "link"])
def test_a_file_that_can_be_written_stays_as_it_is(tmp_path, name):
    """One that is there, one that is not, and one where a link leads."""
    tmp_path.joinpath("old").write_text("old")
    tmp_path.joinpath("link").symlink_to("target")
    check_file(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["link", "old"]
    assert tmp_path.joinpath("old").read_text() == "old"


@pytest.mark.parametrize("where", ["missing/file", "old/file", "folder", "link"])
def test_the_error_is_that_of_opening_it(tmp_path, where):
    """No such folder, a file for a folder, a folder for a file, a link that leads to none of them."""
    tmp_path.joinpath("old").write_text("old")
    tmp_path.joinpath("folder").mkdir()
    tmp_path.joinpath("link").symlink_to("missing/file")
    with pytest.raises(OSError) as opened:
        open(tmp_path / where, "a").close()
    with pytest.raises(OSError) as checked:
        check_file(tmp_path / where)
    assert checked.value.errno == opened.value.errno


@pytest.mark.parametrize("flag,number", [(0, errno.EACCES), (os.ST_RDONLY, errno.EROFS)])
def test_why_nothing_can_be_written_is_told(tmp_path, monkeypatch, forbid, flag, number):
    """No permission, or a disk that is read only."""
    forbid("")
    monkeypatch.setattr(os, "statvfs", lambda _path: types.SimpleNamespace(f_flag=flag))
    for check in (check_folder, check_file):
        with pytest.raises(OSError) as told:
            check(tmp_path / "x" if check is check_file else tmp_path)
        assert told.value.errno == number


def test_a_pid_file_of_ours_in_a_folder_of_others_will_do(tmp_path, forbid):
    """It is written over, where its folder lets nobody put another in its place."""
    path = tmp_path / "pid"
    forbid("/.")
    with pytest.raises(ConfigError, match="Permission denied"):
        PidFile(str(path)).check()
    path.write_text("")
    PidFile(str(path)).check()
    forbid("")
    with pytest.raises(ConfigError, match="Permission denied"):
        PidFile(str(path)).check()
