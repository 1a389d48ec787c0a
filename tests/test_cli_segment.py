"""``python -m pvt_ref segment``: pictures in, overlays and class maps out, one by one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from segmentors import PVT, SEGMENTORS, params_of
from small_pairs import CLASSES, scene

import pvt_ref
from pvt_ref import Model, ModelInfo, app
from pvt_ref.__main__ import main
from pvt_ref.checkpoint import whole_file
from pvt_ref.data.overlay import class_colours

COLOURS = ((10, 20, 30), (200, 0, 10), (0, 200, 10), (10, 0, 200))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    info = ModelInfo(title="small", classes=CLASSES, colours=COLOURS)
    config = SEGMENTORS["pvt"]
    pvt_ref.save(path, Model(params_of(config, 1, np.float32), config, info=info))
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """A folder of three scenes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, seed in (("a.jpg", 1), ("b.png", 2), ("c.webp", 3)):
        Image.fromarray(scene(seed)[0]).save(folder / name)
    return folder


def run(capsys, *argv: object) -> tuple[int, str, str]:
    status = main(["segment", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def class_map(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.format == "PNG"
        return np.asarray(image)


def names(folder) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_it_writes_an_overlay_and_a_class_map(capsys, photos, weights, tmp_path):
    out = tmp_path / "new" / "folder"
    status, text, err = run(capsys, photos / "a.jpg", "--weights", weights, "--out", out)
    assert (status, err) == (0, "")
    assert names(out) == ["a.classes.png", "a.overlay.png"]
    expected = pvt_ref.load(weights).segment(photos / "a.jpg")[0]
    found = class_map(out / "a.classes.png")
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 1
    with Image.open(out / "a.classes.png") as image:
        shown = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(shown, np.array(COLOURS)[expected])
    with Image.open(out / "a.overlay.png") as image:
        assert image.mode == "RGB"
        assert image.height == 24
        tinted = np.asarray(image)[:, :32].astype(float)
    with Image.open(photos / "a.jpg") as photo:
        mixed = 0.45 * np.asarray(photo) + 0.55 * np.array(COLOURS)[expected]
    assert np.abs(tinted - mixed).max() <= 1
    lines = text.splitlines()
    assert lines[0] == f"{photos / 'a.jpg'} -> {out / 'a.overlay.png'}"
    counts = np.bincount(expected.ravel(), minlength=4)
    rows = [(CLASSES[k], f"{counts[k] / 768:.2%}") for k in np.argsort(-counts) if counts[k]]
    assert [tuple(line.split()) for line in lines if line.split()[0] in CLASSES] == rows


def test_json_tells_where_and_how_much(capsys, photos, weights, tmp_path):
    broken = photos / "broken.png"
    broken.write_bytes(b"no picture")
    given = [photos / "b.png", broken, photos / "c.webp"]
    status, text, err = run(capsys, *given, "--weights", weights, "--out", tmp_path, "--json")
    assert status == 1
    records = json.loads(text)
    assert text.strip() == json.dumps(records, indent=2)
    assert [record["image"] for record in records] == list(map(str, given))
    assert {record["weights"] for record in records} == {weights}
    assert "not a picture" in records[1]["error"]
    assert err.count("error: ") == 1
    for record in (records[0], records[2]):
        assert "error" not in record
        found = class_map(record["class_map"])
        shares = record["classes"]
        assert sum(shares.values()) == pytest.approx(1)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        for name, share in shares.items():
            assert share == (found == CLASSES.index(name)).mean()
        assert os.path.exists(record["overlay"])
    assert names(tmp_path / "photos") == ["a.jpg", "b.png", "broken.png", "c.webp"]


def test_a_bad_picture_costs_only_itself(capsys, photos, weights, tmp_path):
    (photos / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    out = tmp_path / "out"
    given = [photos / name for name in ("b.png", "nowhere.jpg", "a.jpg", "c.webp")]
    status, text, err = run(capsys, *given, "--weights", weights, "--out", out)
    assert status == 1
    assert err.count("error: ") == 2
    assert "nowhere.jpg" in err
    assert names(out) == ["a.classes.png", "a.overlay.png", "c.classes.png", "c.overlay.png"]
    assert text.count(" -> ") == 2
    assert not text.startswith("\n")
    status, text, _ = run(capsys, photos / "b.png", "--weights", weights, "--out", out)
    assert (status, text) == (2, "")


def test_a_folder_stands_for_its_pictures(capsys, photos, weights, tmp_path):
    (photos / "notes.txt").write_text("not a picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    status, text, err = run(capsys, empty, photos, "--weights", weights, "--out", out)
    assert status == 1
    assert "is a folder without pictures" in err
    assert "1 file without a picture's suffix was skipped" in err
    assert len(names(out)) == 6
    assert text.count(" -> ") == 3


def test_what_is_there_is_kept_unless_it_may_be_replaced(capsys, photos, weights, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.classes.png").write_bytes(b"precious")
    given = [photos / "a.jpg", photos / "b.png", "--weights", weights, "--out", out]
    status, _, err = run(capsys, *given)
    assert status == 1
    assert "a.classes.png' exists already. --force replaces it" in err
    assert (out / "a.classes.png").read_bytes() == b"precious"
    assert names(out) == ["a.classes.png", "b.classes.png", "b.overlay.png"]  # not the half of a
    status, _, err = run(capsys, *given, "--force")
    assert (status, err) == (0, "")
    assert class_map(out / "a.classes.png").shape == (24, 32)
    status, _, err = run(capsys, *given)
    assert status == 2
    assert err.count("exists already") == 2


def test_two_pictures_of_one_name_do_not_replace_each_other(capsys, photos, weights, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(scene(9)[0][:20]).save(other / "a.png")
    out = tmp_path / "out"
    given = [photos / "a.jpg", other / "a.png", "--weights", weights, "--out", out, "--force"]
    status, _, err = run(capsys, *given)
    assert status == 1
    assert "or was just made from an input of the same name. Choose another --out" in err
    assert str(other / "a.png") in err
    assert class_map(out / "a.classes.png").shape == (24, 32)


def test_a_picture_that_is_named_is_never_replaced(capsys, weights, tmp_path):
    for name in ("a.png", "a.overlay.png"):
        Image.fromarray(scene(9)[0]).save(tmp_path / name)
    before = (tmp_path / "a.overlay.png").read_bytes()
    given = [tmp_path / "a.png", tmp_path / "a.overlay.png", "--out", tmp_path, "--force"]
    status, _, err = run(capsys, *given, "--weights", weights)
    assert status == 1
    assert "a.overlay.png' is one of the input pictures" in err
    assert (tmp_path / "a.overlay.png").read_bytes() == before


def test_size_and_window_are_those_of_segment(capsys, photos, weights, tmp_path):
    model, photo = pvt_ref.load(weights), photos / "a.jpg"
    for options, expected in (
        (["--size", "64"], model.segment(photo, 64)[0]),
        (["--size", "64", "--window", "32"], model.segment(photo, 64, window=32)[0]),
        (["--size", "64", "--window", "64", "32"], model.segment(photo, 64, window=(64, 32))[0]),
    ):
        out = tmp_path / "-".join(options)
        assert run(capsys, photo, "--weights", weights, "--out", out, *options)[0] == 0
        np.testing.assert_array_equal(class_map(out / "a.classes.png"), expected)
    for options, says in (
        (["--size", "0"], "size is 0; it must be a whole number"),
        (["--window", "1", "2", "3"], "a side or (H, W)"),
    ):
        out = tmp_path / "none"
        status, text, err = run(capsys, photo, "--weights", weights, "--out", out, *options)
        assert (status, text) == (2, "")
        assert says in err
        assert not out.exists()


def test_without_colours_of_their_own_classes_have_vocs(capsys, photos, tmp_path):
    config = SEGMENTORS["pvt_v2"]
    path = tmp_path / "plain.safetensors"
    pvt_ref.save(path, Model(params_of(config, 3, np.float32), config))
    status, text, _ = run(capsys, photos / "b.png", "--weights", path, "--out", tmp_path)
    assert status == 0
    with Image.open(tmp_path / "b.classes.png") as image:
        found, shown = np.asarray(image), np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(shown, np.array(class_colours(4))[found])
    assert {line.split()[0] for line in text.splitlines()[3:]} <= set("0123")


def test_other_weights_are_refused_in_words(capsys, photos, tmp_path):
    classifier = PVT.__class__(**{"img_size": 32, "num_classes": 3, "depths": (1, 1, 1, 1)})
    path = tmp_path / "classifier.safetensors"
    pvt_ref.save(path, Model(params_of(classifier, dtype=np.float32), classifier))
    status, text, err = run(capsys, photos / "a.jpg", "--weights", path, "--out", tmp_path / "o")
    assert (status, text) == (2, "")
    assert "a PVT classifies a whole picture, not its pixels" in err
    assert "segmentation network" in err
    assert not (tmp_path / "o").exists()


def test_without_weights_camvid_answers_and_its_classes_are_named_once(capsys, photos, tmp_path):
    model = pvt_ref.load("camvid")
    note = f"camvid knows only these classes: {', '.join(model.classes)}. "
    given = [photos / "a.jpg", photos / "b.png", "--out", tmp_path / "o"]
    status, text, err = run(capsys, *given)
    assert (status, err) == (0, f"{note}--weights chooses another model\n")
    assert text.count(" -> ") == 2
    expected = model.segment(photos / "a.jpg")[0]
    np.testing.assert_array_equal(class_map(tmp_path / "o" / "a.classes.png"), expected)
    with Image.open(tmp_path / "o" / "a.classes.png") as image:
        shown = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(shown, np.array(model.info.colours)[expected])
    given += ["--force"]
    assert run(capsys, *given, "--weights", "camvid")[2] == ""  # who names it knows it
    status, text, err = run(capsys, *given, "--json")
    assert (status, err) == (0, "")
    assert {record["weights"] for record in json.loads(text)} == {"camvid"}
    status, _, err = run(capsys, tmp_path / "nowhere.jpg", "--out", tmp_path / "o")
    assert status == 2
    assert "knows only these classes" not in err


def test_classify_says_what_to_ask_a_segmentation_network(capsys, photos, weights):
    status = main(["classify", str(photos / "a.jpg"), "--weights", weights])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert "a segmentation network gives a class for every pixel" in captured.err


def test_each_picture_is_written_before_the_next_is_read(
    capsys, photos, weights, tmp_path, monkeypatch
):
    events = []
    read, write = app.read_rgb, whole_file.write_whole

    def noted_read(source):
        events.append(f"read {os.path.basename(source)}")
        return read(source)

    def noted_write(path, data):
        events.append(f"write {path.name}")
        write(path, data)

    monkeypatch.setattr(app, "read_rgb", noted_read)
    monkeypatch.setattr(whole_file, "write_whole", noted_write)
    for i in range(12):
        Image.fromarray(scene(i)[0]).save(photos / f"n{i:02}.png")
    status, text, _ = run(capsys, photos, "--weights", weights, "--out", tmp_path / "out")
    assert status == 0
    order = sorted(name for name in os.listdir(photos))
    assert len(order) == 15
    expected = []
    for name in order:
        stem = name.partition(".")[0]
        expected += [f"read {name}", f"write {stem}.overlay.png", f"write {stem}.classes.png"]
    assert events == expected
    assert text.count(" -> ") == 15


def test_an_out_that_is_no_folder_is_an_error_of_each(capsys, photos, weights, tmp_path):
    out = tmp_path / "file"
    out.write_text("in the way")
    given = [photos / "a.jpg", photos / "b.png"]
    status, text, err = run(capsys, *given, "--weights", weights, "--out", out)
    assert (status, text) == (2, "")
    assert err.count("error: ") == 2
    assert out.read_text() == "in the way"


def test_as_a_user_would(photos, weights):
    command = [sys.executable, "-W", "error", "-m", "pvt_ref", "segment", "a.jpg", "b.png"]
    done = subprocess.run(
        [*command, "--weights", weights], cwd=photos, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(pvt_ref.__file__))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    made = ["a.classes.png", "a.overlay.png", "b.classes.png", "b.overlay.png"]
    assert [name for name in names(photos) if name.count(".") == 2] == made
    assert done.stdout.startswith("a.jpg -> ./a.overlay.png")
