"""The command line without standard streams, with folders of all kinds, and foreign errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import pvt_ref
from pvt_ref import __main__
from pvt_ref.__main__ import main
from pvt_ref.data.picture_file import FORMATS, SUFFIXES

posix = pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes the streams")


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def in_a_shell(redirection, *arguments):
    """The program with a stream closed or redirected: status, output, errors.

    Buffered, as streams usually are: what could not be written is then tried again at exit.
    """
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-m", "pvt_ref", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={k: value for k, value in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )
    return done.returncode, done.stdout, done.stderr


# Streams that are not there -------------------------------------------------------------------


@posix
@pytest.mark.parametrize("errors", ["2>&-", *["2>/dev/full"] * os.path.exists("/dev/full")])
def test_without_standard_error_the_json_is_still_json(photo, tmp_path, errors):
    names = [str(tmp_path / "none.png"), photo]
    status, out, _ = in_a_shell(errors, "classify", *names, "--json", "--weights", "digits")
    assert status == 1
    assert ["error" in record for record in json.loads(out)] == [True, False]


@posix
@pytest.mark.parametrize("command", ["classify", "summary", "convert"])
def test_without_standard_output_nothing_is_done(command, photo, tmp_path):
    source, target = tmp_path / "w.safetensors", tmp_path / "x.safetensors"
    pvt_ref.save(source, pvt_ref.load("digits"))
    arguments = {"classify": [photo], "summary": ["digits"]}
    arguments["convert"] = [str(source), str(target)]
    status, _, err = in_a_shell(">&-", command, *arguments[command])
    assert status == 2
    assert err == "error: standard output is closed, so there is nowhere to print to\n"
    assert not target.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["summary", "pvt_tiny"], ["classify", "none.png", "--json"]])
def test_a_full_disk_is_status_2(arguments):
    status, _, err = in_a_shell(">/dev/full", *arguments)
    assert status == 2
    assert "No space left" in err
    assert "Traceback" not in err
    assert "Exception" not in err


def test_a_disk_that_is_full_in_the_end_is_status_2(capsys, monkeypatch):
    class Full:
        def flush(self):
            raise OSError(28, "No space left on device")

        def fileno(self):
            return descriptor

    descriptor = os.open(os.devnull, os.O_WRONLY)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(__main__, "_run", lambda argv: 0)
            patch.setattr(sys, "stdout", Full())
            status = main(["summary", "pvt_tiny"])
    finally:
        os.close(descriptor)
    assert status == 2
    assert "No space left" in capsys.readouterr().err


def test_the_help_tells_the_statuses(capsys):
    _, out, _ = run(capsys)
    said = " ".join(out.split())
    assert (
        "1 if some of several inputs failed; 2 if all failed, if the command is wrong, or if the"
        in said
    )


# Folders --------------------------------------------------------------------------------------


def test_a_folder_with_more_than_pictures(capsys, tmp_path):
    folder = tmp_path / "pics"
    for name in (".hidden.jpg", "._a.jpg"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7 of macOS")
    (folder / "dir.png").mkdir()
    for name in ("a.jpg", "b.JFIF"):
        Image.new("RGB", (40, 40)).save(folder / name, "JPEG")
    (folder / "notes.txt").touch()
    arguments = ("classify", str(folder), "--weights", "digits", "--json")
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert [Path(r["image"]).name for r in json.loads(out)] == ["a.jpg", "b.JFIF"]
    assert err == f"'{folder}': 1 file without a picture's suffix was skipped\n"
    (folder / "more.heic").touch()
    assert "': 2 files without a picture's suffix were skipped\n" in run(capsys, *arguments)[2]
    for name in ("a.jpg", "b.JFIF"):
        (folder / name).unlink()
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert "is a folder without pictures: it has 2 files, and no name ends in one of" in err


def test_every_usual_ending_of_the_formats_is_known():
    usual = [
        "apng",
        "bmp",
        "gif",
        "jfif",
        "jpe",
        "jpeg",
        "jpg",
        "mpo",
        "pbm",
        "pfm",
        "pgm",
        "png",
        "pnm",
        "ppm",
        "tif",
        "tiff",
        "webp",
    ]
    usual += ["avif"] * ("AVIF" in FORMATS)
    assert {f".{name}" for name in usual} <= set(SUFFIXES)
    assert not {".eps", ".ps", ".jp2", ".ico", ".heic", ".pdf"} & set(SUFFIXES)


# Foreign errors -------------------------------------------------------------------------------


def test_a_foreign_error_of_one_file_stops_no_other(capsys, monkeypatch, tmp_path):
    def load(name, **_):
        if "bad" in name:
            raise RuntimeError("not foreseen")
        return pvt_ref.load("digits")

    monkeypatch.setattr(__main__, "load", load)
    status, out, err = run(capsys, "convert", "a.pth", "bad.pth", "c.pth", str(tmp_path))
    assert status == 1
    assert out.count("written to ") == 2
    assert err == "error: 'bad.pth': RuntimeError: not foreseen\n"
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "c.safetensors"]


def test_no_memory_ends_a_command(capsys, monkeypatch, tmp_path):
    def load(*_, **__):
        raise MemoryError

    monkeypatch.setattr(__main__, "load", load)
    status, out, err = run(capsys, "convert", "a.pth", "b.pth", str(tmp_path))
    assert (status, out) == (2, "")
    assert err == "error: there is not enough memory for this\n"


def test_a_foreign_error_of_one_picture_stops_no_other(capsys, monkeypatch, photo, tmp_path):
    other = str(tmp_path / "bad.png")
    Image.new("RGB", (40, 40)).save(other)
    preprocess = pvt_ref.Model.preprocess

    def strange(self, images, size=None):
        if images[0] == other:
            raise RuntimeError("not foreseen")
        return preprocess(self, images, size)

    monkeypatch.setattr(pvt_ref.Model, "preprocess", strange)
    status, out, err = run(capsys, "classify", other, photo, "--weights", "digits", "--json")
    assert status == 1
    assert ["error" in record for record in json.loads(out)] == [True, False]
    assert "RuntimeError: not foreseen" in err
