"""A file is written whole or not at all, and keeps what its owner decided about it."""

import os
import socket
import stat
import sys
from pathlib import Path

import pytest
from test_checkpoint import TINY, make_model

from pvt_ref.checkpoint import load, save
from pvt_ref.checkpoint import whole_file as whole_file_module
from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.errors import CheckpointError

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions and files")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@posix
@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o664, 0o200])
def test_the_permissions_of_an_older_file_are_kept(tmp_path, permissions):
    path = tmp_path / "m.safetensors"
    save(path, make_model())
    path.chmod(permissions)
    save(path, make_model(seed=1))
    assert mode(path) == permissions
    link = tmp_path / "link.safetensors"
    link.symlink_to(path.name)
    save(link, make_model(seed=2))
    assert link.is_symlink()
    assert mode(path) == permissions


@posix
def test_nobody_else_can_read_the_new_file_before_it_is_in_place(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(b"old")
    path.chmod(0o600)
    modes = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (modes.append(os.fstat(number).st_mode), fsync(number))
    )
    write_whole(path, b"new")
    assert stat.S_IMODE(modes[0]) == 0o600
    assert path.read_bytes() == b"new"


@posix
def test_what_is_no_writable_file_is_left_alone(tmp_path):
    read_only = tmp_path / "read_only.safetensors"
    save(read_only, make_model())
    read_only.chmod(0o444)
    before = read_only.read_bytes()
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path has few characters
        try:
            bound.bind("socket.safetensors")
        finally:
            os.chdir(here)
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    (tmp_path / "null.safetensors").symlink_to("/dev/null")
    there = sorted(tmp_path.iterdir())
    for name, says in (
        ("read_only", "PermissionError: the existing file is read-only"),
        ("folder", "IsADirectoryError"),
        ("pipe", "a pipe, a device or a socket"),
        ("socket", "a pipe, a device or a socket"),
        ("null", "a pipe, a device or a socket"),
        ("a", "OSError: Too many levels of symbolic links"),
    ):
        with pytest.raises(CheckpointError, match=says) as caught:
            save(tmp_path / f"{name}.safetensors", make_model(seed=1))
        assert f"{name}.safetensors: could not be saved" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == there
    assert read_only.read_bytes() == before
    assert mode(read_only) == 0o444
    assert stat.S_ISFIFO((tmp_path / "pipe.safetensors").stat().st_mode)


@posix
def test_a_link_to_nothing_is_filled(tmp_path):
    (tmp_path / "link").symlink_to("new")
    write_whole(tmp_path / "link", b"x")
    assert (tmp_path / "new").read_bytes() == b"x"
    assert (tmp_path / "link").is_symlink()


def interrupt_at(line, function, *arguments):
    """Calls function with a KeyboardInterrupt at its line-th line; False if it has no more."""
    left = line
    files = (whole_file_module.__file__, os.path.join(os.path.dirname(os.__file__), "pathlib"))

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.startswith(files):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return left <= 0


@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "m"
    for line in range(1, 500):
        path.write_bytes(b"old")
        interrupted = interrupt_at(line, write_whole, path, b"new")
        assert [p.name for p in tmp_path.iterdir()] == ["m"], line
        assert path.read_bytes() in (b"old", b"new")
        if not interrupted:
            break
    assert 15 < line < 499
    assert path.read_bytes() == b"new"


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_save_can_be_done_again(tmp_path):
    path = tmp_path / "m.safetensors"
    for line in (1, 5, 9, 14):
        assert interrupt_at(line, save, path, make_model())
    save(path, make_model())
    assert load(path).config == TINY


@pytest.mark.parametrize("first", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_interrupts_while_it_clears_up_leave_nothing_behind(tmp_path, monkeypatch, first, times):
    unlink, left = Path.unlink, times

    def interrupted(path, *args):
        nonlocal left
        left -= 1
        if left >= 0:
            raise KeyboardInterrupt
        unlink(path, *args)

    def strike(number):
        raise first

    (tmp_path / "m").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", strike)
    monkeypatch.setattr(Path, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "m", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").read_bytes() == b"old"
