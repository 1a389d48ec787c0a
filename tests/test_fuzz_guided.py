"""The target that atheris drives, without atheris: good inputs are read, damaged ones refused."""

import subprocess
import sys
from pathlib import Path

import fuzz_atheris
import pytest

TARGET = Path(fuzz_atheris.__file__)


@pytest.mark.parametrize("reader", fuzz_atheris.READERS)
def test_seeds_are_read_and_damage_is_refused(reader):
    seeds = fuzz_atheris.seeds(reader)
    assert seeds
    for data in seeds:
        assert fuzz_atheris.one_input(reader, data) == "read"
        assert fuzz_atheris.one_input(reader, data[: len(data) // 3]) == "refused"
    assert fuzz_atheris.one_input(reader, b"") == "refused"
    assert fuzz_atheris.one_input(reader, b"\xff" * 40) == "refused"


def test_a_picture_s_seeds_are_of_many_formats():
    assert len({data[:2] for data in fuzz_atheris.seeds("picture")}) == 7


def test_what_no_reader_may_raise_comes_through(monkeypatch):
    def broken(data):
        raise KeyError("slot")

    def warning(data):
        import warnings

        warnings.warn("odd", stacklevel=1)

    monkeypatch.setitem(fuzz_atheris.READERS, "pickle", broken)
    with pytest.raises(KeyError):
        fuzz_atheris.one_input("pickle", b"")
    monkeypatch.setitem(fuzz_atheris.READERS, "pickle", warning)
    with pytest.raises(UserWarning, match="odd"):
        fuzz_atheris.one_input("pickle", b"")


def test_without_atheris_it_says_how_to_get_it():
    code = (
        f"import sys, runpy; sys.modules['atheris'] = None; sys.argv = ['x', 'pickle']; "
        f"runpy.run_path({str(TARGET)!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "pip install '.[fuzz]'" in run.stderr
    assert "fuzz_checkpoints.py runs everywhere" in run.stderr
