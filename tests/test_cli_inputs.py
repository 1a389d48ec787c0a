"""The command line with many inputs, bad ones among them, and outputs that are gone or taken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from strategies import rng_of

import pvt_ref
from pvt_ref import VARIANTS, __main__
from pvt_ref.__main__ import main
from pvt_ref.report.tables import text_table


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def pictures(tmp_path):
    """A folder with three pictures, a text, and a folder with a fourth picture."""
    folder = tmp_path / "pictures"
    (folder / "inside").mkdir(parents=True)
    for name, colour in (("b.png", "red"), ("a.JPG", "blue"), ("c.webp", "green")):
        Image.new("RGB", (40, 40), colour).save(folder / name)
    Image.new("RGB", (40, 40)).save(folder / "inside" / "d.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


# Many pictures, some of them bad --------------------------------------------------------------


def test_a_bad_picture_costs_only_itself(capsys, pictures):
    (pictures / "b.png").write_bytes(b"no picture at all")
    names = [str(pictures / name) for name in ("a.JPG", "b.png", "nowhere.png", "c.webp")]
    status, out, err = run(capsys, "classify", *names, "--weights", "digits", "--top", "1")
    assert status == 1
    tables = out.split("\n\n")
    assert [table.splitlines()[0] for table in tables] == [names[0], names[3]]
    assert err.count("error: ") == 2
    assert "not a picture" in err
    assert "there is no file" in err
    model = pvt_ref.load("digits")
    for table, name in zip(tables, (names[0], names[3]), strict=True):
        assert table.splitlines()[-1].split()[0] == model.predict(name)[0][0].label


def test_json_is_a_list_with_the_errors_in_it(capsys, pictures):
    names = [str(pictures / name) for name in ("nowhere.png", "a.JPG", "notes.txt")]
    status, out, err = run(capsys, "classify", *names, "--weights", "digits", "--json")
    assert status == 1
    first, second, third = records = json.loads(out)
    assert [record["image"] for record in records] == names
    assert "there is no file" in first["error"]
    assert second["predictions"][0]["label"] in set("0123456789")
    assert "error" not in second
    assert "not a picture" in third["error"]
    assert out.strip() == json.dumps(records, indent=2)
    assert err.count("error: ") == 2


def test_nothing_that_can_be_read_is_status_2(capsys, pictures):
    name = str(pictures / "notes.txt")
    assert run(capsys, "classify", name, "--weights", "digits")[:2] == (2, "")
    status, out, _ = run(capsys, "classify", name, name, "--weights", "digits", "--json")
    assert status == 2
    assert ["error" in record for record in json.loads(out)] == [True, True]


def test_a_folder_stands_for_its_pictures_by_name(capsys, pictures, tmp_path):
    status, out, err = run(capsys, "classify", str(pictures), "--weights", "digits")
    assert (status, err) == (0, f"'{pictures}': 1 file without a picture's suffix was skipped\n")
    found = [block.splitlines()[0] for block in out.split("\n\n")]
    assert found == [str(pictures / name) for name in ("a.JPG", "b.png", "c.webp")]
    (tmp_path / "empty").mkdir()
    status, out, err = run(capsys, "classify", str(tmp_path / "empty"), "--weights", "digits")
    assert (status, out) == (2, "")
    assert "a folder without pictures" in err
    both = [str(tmp_path / "empty"), str(pictures)]
    status, out, _ = run(capsys, "classify", *both, "--weights", "digits", "--json")
    assert status == 1
    assert ["error" in record for record in json.loads(out)] == [True, False, False, False]


def test_without_weights_imagenette_answers_and_its_classes_are_named_once(capsys, pictures):
    names = [str(pictures / name) for name in ("a.JPG", "notes.txt", "c.webp")]
    model = pvt_ref.load("imagenette")
    note = f"imagenette knows only these classes: {', '.join(model.classes)}. "
    status, out, err = run(capsys, "classify", *names, "--top", "1")
    assert status == 1
    for table, name in zip(out.split("\n\n"), (names[0], names[2]), strict=True):
        (answer,) = model.predict(name, top=1)[0]
        assert table.splitlines()[-1].split() == [
            *answer.label.split(),
            f"{answer.probability:.4f}",
        ]
    assert err.count(note) == 1
    assert err.splitlines()[-1].startswith(note)  # below the tables and the errors
    assert "knows" not in out
    # who named the weights, or reads by program, or got no answer, is not told
    assert run(capsys, "classify", names[0], "--weights", "imagenette", "--top", "1")[2] == ""
    status, out, err = run(capsys, "classify", names[0], "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)[0]["weights"] == "imagenette"
    assert "knows" not in run(capsys, "classify", names[1])[2]
    assert run(capsys, "classify", names[0], "--weights", "")[0] == 2  # no default for ""


def test_names_and_labels_of_strangers_are_text(capsys, tmp_path):
    config = VARIANTS["pvt_tiny"]
    config = pvt_ref.PVTConfig(img_size=32, num_classes=2, depths=(1, 1, 1, 1))
    info = pvt_ref.ModelInfo(title="t\x1b[2J\nfake", classes=("[red]x[/red]", "a\x1b[31m\nb"))
    params = pvt_ref.init_params(config, rng_of(0))
    weights = tmp_path / "w.safetensors"
    pvt_ref.save(weights, pvt_ref.Model(params, config, info=info))
    name = str(tmp_path / "p\n\x1b[31m.png")
    Image.new("RGB", (40, 40)).save(name)
    status, out, err = run(capsys, "classify", name, "--weights", str(weights))
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 5
    assert "[red]x[/red]" in out
    assert r"a\x1b[31m\nb" in out
    assert r"p\n\x1b[31m.png" in out.splitlines()[0]
    status, out, err = run(capsys, "summary", str(weights))
    assert out.splitlines()[0] == r"t\x1b[2J\nfake"
    assert "\x1b" not in out + err
    _, out, _ = run(capsys, "classify", name, "--weights", str(weights), "--json")
    assert {p["label"] for p in json.loads(out)[0]["predictions"]} == set(info.classes)


def test_cells_of_a_table_are_text():
    table = text_table(["[bold]a[/bold]", "b"], [["[red]x[/red]", "\x07"]], ["\u202e[/]", "\n"])
    heading, _, first, _, last = table.splitlines()
    assert heading.split() == ["[bold]a[/bold]", "b"]
    assert first.split() == ["[red]x[/red]", r"\x07"]
    assert last.split() == [r"\u202e[/]", r"\n"]


# Weights files --------------------------------------------------------------------------------


def test_summary_of_weights_in_the_package_and_in_a_file(capsys, tmp_path):
    _, out, _ = run(capsys, "summary", "cifar10")
    model = pvt_ref.load("cifar10")
    assert out.startswith(f"{model.info.title}\n{model.source}\ncifar10, image 32x32, batch 1")
    assert f"{pvt_ref.count_cost(model.config).parameters:,}" in out
    path = str(tmp_path / "own.safetensors")
    pvt_ref.save(path, model)
    _, out, _ = run(capsys, "summary", path, "--size", "64")
    assert f"\n{path}, image 64x64, batch 1" in out
    status, _, err = run(capsys, "summary", str(tmp_path / "none.pth"))
    assert status == 2
    assert "no such file" in err


def test_what_a_file_does_not_tell_is_passed_on(capsys, monkeypatch, tmp_path):
    given = []

    def load(name, **options):
        given.append((name, options))
        return pvt_ref.load("digits")

    monkeypatch.setattr(__main__, "load", load)
    asked = ["--config", "pvt_tiny", "--entry", "model_ema"]
    photo = str(tmp_path / "a.png")
    Image.new("RGB", (40, 40)).save(photo)
    assert run(capsys, "classify", photo, "--weights", "w.pth", *asked)[0] == 0
    assert run(capsys, "summary", "w.pth", *asked)[0] == 0
    assert run(capsys, "convert", "w.pth", str(tmp_path / "x.safetensors"), *asked)[0] == 0
    options = {"config": "pvt_tiny", "entry": "model_ema"}
    assert given == [("w.pth", options), ("w.pth", options), ("w.pth", {"eps": None, **options})]
    status, _, err = run(capsys, "summary", "pvt_tiny", *asked)
    assert status == 2
    assert "./pvt_tiny" in err


def test_convert_replaces_no_file_unless_told(capsys, tmp_path):
    source, target = str(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    pvt_ref.save(source, pvt_ref.load("digits"))
    target.write_text("precious")
    status, out, err = run(capsys, "convert", source, str(target))
    assert (status, out) == (2, "")
    assert "exists already. --force replaces it" in err
    assert target.read_text() == "precious"
    assert run(capsys, "convert", "--force", source, str(target))[0] == 0
    assert pvt_ref.load(target).config == pvt_ref.load("digits").config
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere.safetensors")
    assert run(capsys, "convert", source, str(tmp_path / "dangling.safetensors"))[0] == 2


def test_convert_of_several_into_a_folder(capsys, tmp_path):
    folder, others = tmp_path / "out", tmp_path / "others"
    folder.mkdir()
    others.mkdir()
    names = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for name in (*names, str(others / "a.safetensors")):
        pvt_ref.save(name, pvt_ref.load("digits"))
    arguments = [*names, str(others / "a.safetensors"), str(tmp_path / "none.pth"), str(folder)]
    status, out, err = run(capsys, "convert", "--force", *arguments)
    assert status == 1
    assert out.count("written to ") == 2
    assert "just made from a file of the same name" in err
    assert "none.pth" in err
    assert sorted(os.listdir(folder)) == ["a.safetensors", "b.safetensors"]
    status, _, err = run(capsys, "convert", *names, str(tmp_path / "new.safetensors"))
    assert status == 2
    assert "is not a folder" in err
    assert run(capsys, "convert", names[0], str(folder), "--force")[0] == 0


# The shell ------------------------------------------------------------------------------------


def test_without_a_command_there_is_help(capsys):
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    assert "classify" in out
    assert "Exit status" in out


@pytest.mark.parametrize("arguments", [["summary", "pvt_tiny"], ["--help"]], ids=str)
def test_a_reader_who_leaves_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)  # as head does, once it has its line
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pvt_ref", *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.stderr == b""
    # argparse itself passes over a pipe that is closed while it writes
    assert done.returncode in ((141,) if "summary" in arguments else (0, 141))


def test_ctrl_c_is_no_traceback(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "load", interrupted)
    assert run(capsys, "classify", "x.png") == (130, "", "")


def test_help_imports_nothing_that_only_computing_or_printing_needs():
    code = (
        "import sys\n"
        "from pvt_ref.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'scipy', 'rich', 'huggingface_hub'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


# Model.predict --------------------------------------------------------------------------------


def test_predict_each_gives_errors_in_their_places(pictures):
    model = pvt_ref.load("cifar10")
    paths = [pictures / name for name in ("a.JPG", "notes.txt", "c.webp")]
    first, second, third = model.predict_each(paths, top=2)
    assert isinstance(second, pvt_ref.PVTError)
    assert "notes.txt" in str(second)
    for answer, path in ((first, paths[0]), (third, paths[2])):
        assert isinstance(answer, list)
        (alone,) = model.predict(path, top=2)
        assert [a.index for a in answer] == [a.index for a in alone]
        np.testing.assert_allclose(
            [a.probability for a in answer], [a.probability for a in alone], rtol=1e-5
        )
    with pytest.raises(pvt_ref.PVTError, match=r"notes\.txt"):
        model.predict(paths)
    sized = model.predict([paths[0]], size=(64, 96))
    assert sized == list(model.predict_each([paths[0]], size=(64, 96)))
    np.testing.assert_array_equal(
        sized[0][0].probability, model.predict(model.preprocess(paths[0], (64, 96)))[0][0][2]
    )


class Watched(pvt_ref.Model):
    """Notes how many images come together, and computes nothing."""

    def __call__(self, images, *, ops=None):
        seen.append(images.shape[0])
        return np.zeros((images.shape[0], self.config.num_classes))


seen: list[int] = []


@pytest.fixture
def watched():
    model = pvt_ref.load("cifar10")
    seen.clear()
    return Watched(model.params, model.config, info=model.info)


def test_predict_each_reads_an_iterator_a_few_at_a_time(watched, pictures):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield pictures / "a.JPG"

    answers = watched.predict_each(endless())
    for _ in range(65):
        next(answers)
    assert taken == 128
    taken = 0
    next(watched.predict_each(endless(), size=448))
    assert taken == 2
    assert list(watched.predict_each(iter([]))) == []


def test_predict_of_many_is_bounded_in_memory(watched, pictures):
    assert len(watched.predict([pictures / "a.JPG"] * 150)) == 150
    assert seen == [64, 64, 22]
    seen.clear()
    watched.predict(np.zeros((5, 3, 640, 640), np.float32) - 1)
    assert seen == [1] * 5


def test_predict_each_refuses_at_once_what_no_picture_can_mend():
    model = pvt_ref.load("digits")
    wrong: Any
    for wrong in ({"top": 0}, {"size": 33}, {"size": "x"}):
        with pytest.raises(pvt_ref.PVTError):
            model.predict_each(["a.png"], **wrong)  # before the first is asked for


def test_classify_at_another_size(capsys):
    photo = str(Path(__file__).parents[1] / "examples" / "chelsea.jpg")
    of_cifar = ["classify", photo, "--weights", "cifar10", "--top", "1"]
    status, out, _ = run(capsys, *of_cifar, "--size", "192")
    assert status == 0
    assert out.splitlines()[-1].split() == ["cat", "0.6226"]
    status, out, _ = run(capsys, *of_cifar, "--size", "96", "128", "--json")
    (answer,) = pvt_ref.load("cifar10").predict([photo], top=1, size=(96, 128))[0]
    assert json.loads(out)[0]["predictions"] == [answer._asdict()]
    for wrong in (["100"], ["0"], ["-16"], ["1", "2", "3"]):
        status, out, err = run(capsys, "classify", photo, "missing.jpg", "--size", *wrong)
        assert (status, out, err.count("error:")) == (2, "", 1)  # once, not for every picture
