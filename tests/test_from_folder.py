"""``python -m pvt_ref train DIR --out RUN``, from the photos to a file that classify takes."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kill_training import fingerprint, what_counts
from PIL import Image
from small_photos import CLASSES, write_colours, write_photos

import pvt_ref
from pvt_ref import REFERENCE
from pvt_ref.__main__ import main
from pvt_ref.app import with_image_size
from pvt_ref.data.folder import ImageFolder
from pvt_ref.data.labelled import confusion_matrix, evaluate
from pvt_ref.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    MissingFileError,
    RangeError,
    ShapeError,
    TrainingError,
)
from pvt_ref.train import draw_confusion, from_folder
from pvt_ref.train.from_folder import MODEL, RUN, START, Options, stratified_split, train_folder
from pvt_ref.train.loop import BEST, METRICS, STATE
from pvt_ref.train.options import add_options, recipe_values
from pvt_ref.tree import named_arrays

#: From nothing and quick; b0 is the smallest network that has a name.
QUICK = {"epochs": 2, "batch_size": 8, "seed": 3}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three colours, twenty photos each."""
    return write_colours(tmp_path_factory.mktemp("colours"), 20)


def options(**changes) -> Options:
    values = {"variant": "pvt_v2_b0", "size": 32, "recipe": QUICK, **changes}
    return Options(**values)


@pytest.fixture(scope="module")
def whole(colours, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train_folder(colours, out, options())


# From the command line ----------------------------------------------------------------------------


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_fine_tuned_from_weights_and_asked(colours, tmp_path, capsys):
    out = tmp_path / "run"
    given = ("--weights", "cifar10", "--epochs", 4, "--batch-size", 9, "--lr", 1e-3)
    status, said, complaint = run(capsys, "train", colours, "--out", out, *given)
    assert (status, complaint) == (0, "")
    assert "54 photos of 3 classes to learn from, 6 held out" in said
    assert "6 of 6 photos held out are right: 100.00%" in said
    names = {p.name for p in out.iterdir()}
    files = {RUN, START, STATE, BEST, METRICS, MODEL, "confusion.png", "curves.png"}
    assert names == files
    for colour in ("blue", "green", "red"):
        photo = colours / colour / "7.jpg"
        status, said, _ = run(capsys, "classify", photo, "--weights", out / MODEL, "--top", 1)
        assert status == 0
        assert colour in said.splitlines()[-1]


def test_what_was_measured_is_in_the_file(colours, whole):
    model = pvt_ref.load(str(whole.folder / MODEL))
    held_out = json.loads((whole.folder / RUN).read_text())["held_out"]
    assert len(held_out) == 6
    assert [sum(name.startswith(c) for name in held_out) for c in model.classes] == [2, 2, 2]
    photos = ImageFolder(colours, 32)
    chosen = [photos.files.index(name) for name in held_out]
    accuracy = evaluate(model.params, model.config, photos.subset(chosen))[1]
    said = model.info.training
    assert said["held_out_accuracy"] == accuracy
    assert (said["samples"], said["held_out_samples"], said["recipe"]["epochs"]) == (54, 6, 2)
    assert said["options"]["variant"] == "pvt_v2_b0"
    assert said["augment"] == "strong"
    assert model.info.classes == ("blue", "green", "red")
    assert model.config.img_size == 32


def test_photos_held_out_are_not_learnt_from(colours, tmp_path, monkeypatch):
    seen = {}

    def look(config, recipe, learnt, held_out, *rest, **options):
        seen.update(learnt=set(learnt.files), held_out=set(held_out.files), augment=learnt.augment)
        assert held_out.augment is None
        raise TrainingError("enough")

    monkeypatch.setattr(from_folder, "fit", look)
    with pytest.raises(TrainingError, match="enough"):
        train_folder(colours, tmp_path / "run", options())
    assert len(seen["learnt"]) == 54
    assert len(seen["held_out"]) == 6
    assert not seen["learnt"] & seen["held_out"]
    assert seen["learnt"] | seen["held_out"] == set(ImageFolder(colours).files)
    assert seen["augment"] == from_folder.AUGMENTS["strong"]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_of_photos_held_out_is_taken(name, tmp_path, monkeypatch):
    write_colours(tmp_path / "data/train", 3)
    write_colours(tmp_path / f"data/{name}", 2)
    shutil.rmtree(tmp_path / f"data/{name}/blue")  # a class without photos held out
    seen = {}

    def look(config, recipe, learnt, held_out, *rest, **options):
        seen.update(learnt=learnt, held_out=held_out, recipe=recipe, config=config)
        raise TrainingError("enough")

    monkeypatch.setattr(from_folder, "fit", look)
    with pytest.raises(TrainingError, match="enough"):
        train_folder(tmp_path / "data", tmp_path / "run", Options(weights="cifar10"))
    assert len(seen["learnt"]) == 9
    assert seen["held_out"].files == ("green/0.jpg", "green/1.jpg", "red/0.jpg", "red/1.jpg")
    assert seen["held_out"].labels.tolist() == [1, 1, 2, 2]
    assert seen["learnt"].augment == from_folder.AUGMENTS["light"]
    assert seen["learnt"].size == (32, 32)
    assert (seen["recipe"].epochs, seen["recipe"].batch_size) == (10, 9)
    assert seen["recipe"].layer_decay == 0.75
    assert seen["config"].num_classes == 3


def write_one(folder: Path, count: int) -> None:
    """So many black photos in a class's folder."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")


def test_the_head_stays_where_the_classes_are_the_same(tmp_path, monkeypatch):
    model = pvt_ref.load("cifar10")  # whose classes are in the order of their names
    for name in model.classes:
        for i in range(2):
            path = tmp_path / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({name: name.upper() for name in model.classes}))
    seen = {}

    def look(*rest, first, info, **options):
        seen.update(first=first, info=info)
        raise TrainingError("enough")

    monkeypatch.setattr(from_folder, "fit", look)
    for file, kept in ((None, True), (str(names), False)):
        given = Options(weights="cifar10", class_names=file)
        with pytest.raises(TrainingError, match="enough"):
            train_folder(tmp_path / "data", tmp_path / f"run{kept}", given)
        assert np.array_equal(seen["first"].head.weight, model.params.head.weight) == kept
        same = model.params.patch_embed1.proj.weight
        np.testing.assert_array_equal(seen["first"].patch_embed1.proj.weight, same)
        expected = model.classes if kept else tuple(map(str.upper, model.classes))
        assert seen["info"].classes == expected
        assert seen["info"].preprocessing == model.info.preprocessing


@pytest.fixture
def begun(monkeypatch):
    """What fit is called with; it does nothing."""
    seen = {}

    def look(config, recipe, learnt, held_out, *rest, **options):
        seen.update(recipe=recipe, learnt=learnt, held_out=held_out, **options)
        raise TrainingError("enough")

    def begin(*arguments, **rest):
        with pytest.raises(TrainingError, match="enough"):
            train_folder(*arguments, **rest)
        return seen

    monkeypatch.setattr(from_folder, "fit", look)
    return begin


def test_a_head_whose_classes_stand_in_another_order_is_new(tmp_path, begun):
    model = pvt_ref.load("cifar10")
    for name in model.classes:
        write_one(tmp_path / "data" / name, 2)
    exchanged = dict(zip(model.classes, (*model.classes[1:], model.classes[0]), strict=True))
    given = Options(weights="cifar10", class_names=exchanged)
    seen = begun(tmp_path / "data", tmp_path / "run", given)
    assert set(seen["info"].classes) == set(model.classes)
    assert not np.array_equal(seen["first"].head.weight, model.params.head.weight)


def test_a_damaged_photo_held_out_leaves_its_namesake_to_be_learnt(tmp_path, begun):
    """The other way round, too: train and val have photos of the same names."""
    data = tmp_path / "data"
    for part in ("train", "val"):
        write_colours(data / part, 3)
    (data / "val/red/1.jpg").write_bytes(b"")
    (data / "train/blue/2.jpg").write_bytes(b"")
    given = Options(weights="cifar10", damaged="skip")
    seen = begun(data, tmp_path / "run", given)
    every = {f"{colour}/{i}.jpg" for colour in ("blue", "green", "red") for i in range(3)}
    assert set(seen["learnt"].files) == every - {"blue/2.jpg"}
    assert set(seen["held_out"].files) == every - {"red/1.jpg"}


@pytest.mark.parametrize("from_nothing", [False, True])
def test_the_last_learning_rate_follows_the_first(from_nothing, colours, tmp_path, begun):
    start = options() if from_nothing else Options(weights="cifar10")
    recipes = []
    for k, recipe in enumerate(({}, {"lr": 0.02})):
        given = dataclasses.replace(start, recipe=recipe)
        recipes.append(begun(colours, tmp_path / str(k), given)["recipe"])
    assert [recipe.lr_floor for recipe in recipes] == [recipe.lr / 100 for recipe in recipes]
    assert recipes[1].lr == 0.02


def test_no_damaged_photo_is_held_out(tmp_path, begun):
    """Of each class two of ten can be read: one to learn from, and one to hold out."""
    data = write_colours(tmp_path / "data", 10)
    good = {f"{colour}/{i}.jpg" for colour in ("blue", "green", "red") for i in (3, 8)}
    for photo in data.rglob("*.jpg"):
        if photo.relative_to(data).as_posix() not in good:
            photo.write_bytes(b"")
    seen = begun(data, tmp_path / "run", Options(weights="cifar10", damaged="skip"))
    assert (len(seen["learnt"]), len(seen["held_out"])) == (3, 3)
    assert {*seen["learnt"].files, *seen["held_out"].files} == good


def test_few_photos_are_one_batch_of_those_that_are_learnt_from(colours, tmp_path, begun):
    seen = begun(colours, tmp_path / "run", Options(weights="cifar10"))
    assert seen["recipe"].batch_size == len(seen["learnt"]) == 54


# Going on -----------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_bit_for_bit_the_same(colours, whole, tmp_path):
    out = tmp_path / "run"
    assert not train_folder(colours, out, options(), stop_at_step=5).finished
    assert not (out / MODEL).exists()
    moved = shutil.copytree(colours, tmp_path / "moved")  # the photos, by their names
    done = train_folder(moved, out, Options(), resume=True, workers=3)
    assert done.finished
    assert fingerprint(done.state) == fingerprint(whole.state)
    assert what_counts(out) == what_counts(whole.folder)
    assert (out / MODEL).read_bytes() == (whole.folder / MODEL).read_bytes()
    again = train_folder(colours, out, options(), resume=True)  # nothing is left to do
    assert fingerprint(again.state) == fingerprint(whole.state)


def test_resumed_before_the_first_step(colours, whole, tmp_path):
    """Killed between the record of the run and the first state."""
    out = tmp_path / "run"
    out.mkdir()
    for name in (RUN, START):
        shutil.copy(whole.folder / name, out / name)
    done = train_folder(colours, out, Options(), resume=True, stop_at_step=1)
    assert done.state.step == 1


def test_the_default_may_be_said_when_it_goes_on(colours, whole, tmp_path):
    out = shutil.copytree(whole.folder, tmp_path / "run")
    assert train_folder(colours, out, options(augment="strong"), resume=True).finished


def test_a_run_that_cannot_go_on_yet_keeps_its_record(colours, whole, tmp_path):
    """Killed before the first state; and then the photos are elsewhere."""
    out = tmp_path / "run"
    out.mkdir()
    for name in (RUN, START):
        shutil.copy(whole.folder / name, out / name)
    with pytest.raises(MissingFileError, match="there is no folder"):
        train_folder(tmp_path / "elsewhere", out, Options(), resume=True)
    assert {path.name for path in out.iterdir()} == {RUN, START}


def test_what_is_measured_at_the_end_is_what_is_written(colours, whole, tmp_path, monkeypatch):
    """Weights in half precision."""
    out, seen = shutil.copytree(whole.folder, tmp_path / "run"), []
    inner = from_folder.confusion_matrix

    def measure(params, *rest):
        seen.append(params)
        return inner(params, *rest)

    monkeypatch.setattr(from_folder, "confusion_matrix", measure)
    train_folder(colours, out, Options(), resume=True)
    (measured,) = seen
    written = pvt_ref.load(str(out / MODEL)).params
    for (key, x), (_, y) in zip(*map(named_arrays, (measured, written)), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=key)


def test_other_options_do_not_go_on(colours, tmp_path):
    out = tmp_path / "run"
    train_folder(colours, out, options(), stop_at_step=1)
    wrong = Options(size=64, augment="light", recipe={"epochs": 3, "seed": 3, "lr": 1.0})
    with pytest.raises(TrainingError) as error:
        train_folder(colours, out, wrong, resume=True)
    said = str(error.value)
    assert "size is 32 there and 64 here" in said
    assert "augment is 'strong' there and 'light' here" in said
    assert "epochs is 2 there and 3 here" in said
    assert "lr is 0.001 there and 1.0 here" in said
    assert "seed" not in said


def test_other_photos_do_not_go_on(colours, tmp_path):
    out, data = tmp_path / "run", shutil.copytree(colours, tmp_path / "data")
    train_folder(data, out, options(), stop_at_step=1)
    Image.new("RGB", (9, 9)).save(data / "red/new.png")
    with pytest.raises(TrainingError, match=r"data\.samples is 54 there and 55 here"):
        train_folder(data, out, Options(), resume=True)


def test_a_folder_of_another_run_is_refused(colours, whole, tmp_path):
    with pytest.raises(TrainingError, match=r"holds a training already \(run\.json, start"):
        train_folder(colours, whole.folder, options())
    with pytest.raises(MissingFileError, match="no such folder, so no training to go on with"):
        train_folder(colours, tmp_path / "none", Options(), resume=True)
    with pytest.raises(MissingFileError, match=r"run\.json cannot be read"):
        train_folder(colours, tmp_path, Options(), resume=True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: [],
        lambda record: {**record, "format": "pvt_ref folder run 9"},
        lambda record: {k: v for k, v in record.items() if k != "damaged"},
        lambda record: {**record, "options": {**record["options"], "colour": "red"}},
        lambda record: {**record, "options": {**record["options"], "recipe": None}},
        lambda record: {**record, "augment": "much"},
    ],
)
def test_edited_records_are_refused(edit, colours, whole, tmp_path):
    out = shutil.copytree(whole.folder, tmp_path / "run")
    record = json.loads((out / RUN).read_text())
    (out / RUN).write_text(json.dumps(edit(record)))
    with pytest.raises(CheckpointError, match="no record of a run that this version reads"):
        train_folder(colours, out, Options(), resume=True)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_second_process_is_refused_until_the_first_is_killed(colours, whole, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pvt_ref", "train", str(colours), "--out", str(out)]
    given = ["--variant", "pvt_v2_b0", "--size", "32", "--epochs", "2", "--batch-size", "8"]
    given += ["--seed", "3"]
    process = subprocess.Popen([*command, *given], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / STATE).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)

    def again(*more):
        return subprocess.run(
            [*command, *more], capture_output=True, text=True, check=False, timeout=300
        )

    try:
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        for more, why in (((), "a training already"), (("--resume",), r"\(process \d+ on ")):
            refused = again(*more)
            assert refused.returncode == 2
            assert re.search(why, refused.stderr), refused.stderr
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = again("--resume")
    assert done.returncode == 0, done.stderr
    assert what_counts(out) == what_counts(whole.folder)


# Damaged photos -----------------------------------------------------------------------------------


@pytest.fixture
def with_damage(colours, tmp_path):
    data = shutil.copytree(colours, tmp_path / "data")
    (data / "green/3.jpg").write_bytes(b"")
    whole = (data / "red/4.jpg").read_bytes()
    (data / "red/4.jpg").write_bytes(whole[:200])
    return data


def test_damaged_photos_are_refused_by_name(with_damage, tmp_path, capsys):
    out = tmp_path / "run"
    status, _, said = run(capsys, "train", with_damage, "--out", out, "--variant", "pvt_v2_b0")
    assert status == 2
    assert "2 photos cannot be read:" in said
    assert "green/3.jpg' is empty" in said
    assert "red/4.jpg' cannot be decoded" in said
    assert "leave them out: --damaged skip" in said
    assert not out.exists()


def test_damaged_photos_are_left_out_by_choice(with_damage, tmp_path):
    out = tmp_path / "run"
    train_folder(with_damage, out, options(damaged="skip"), stop_at_step=3)
    record = json.loads((out / RUN).read_text())
    assert [name for name, _ in record["damaged"][0]] == ["green/3.jpg", "red/4.jpg"]
    done = train_folder(with_damage, out, Options(), resume=True)
    assert done.finished
    assert done.state.samples == 58 - 6


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (Options(variant="pvt_v3"), TrainingError, r"variant is 'pvt_v3'; known are pvt_tiny"),
        (Options(weights="cifar10", variant="pvt_tiny"), TrainingError, r"not of pvt_tiny; they"),
        (Options(weights="cifar10", variant="pvt_v2_b0"), TrainingError, r"they are for a PVTC"),
        (Options(weights="camvid"), TrainingError, "segmentation network learns a class for every"),
        (Options(variant="fpn_pvt_tiny"), TrainingError, "Name a classifier; LabelledPairs"),
        (Options(weights="no/such.file"), MissingFileError, r"no/such\.file"),
        (Options(weights="cifar10", size=31), ConfigError, "img_size 31 is not a multiple"),
        (Options(weights="cifar10", class_names="none.txt"), MissingFileError, "none.txt"),
        (Options(weights="digits", recipe={"epochs": 0}), RangeError, "epochs is 0"),
        (Options(weights="digits", recipe={"seed": -1}), RangeError, "seed is -1"),
        (Options(weights="digits", recipe={"seed": "x"}), RangeError, "seed is 'x'"),
        (
            Options(weights="cifar10", recipe={"frozen": ["blok1"]}),
            TrainingError,
            "'blok1'; no key",
        ),
        (Options(weights="cifar10", recipe={"batch_size": 99}), TrainingError, "fewer than one"),
    ],
)
def test_options_that_contradict_are_refused_before_anything_is_written(
    given, error, match, colours, tmp_path
):
    out = tmp_path / "run"
    with pytest.raises(error, match=match):
        train_folder(colours, out, given)
    assert not out.exists()


def test_a_precision_is_the_cuda_kernels(capsys, colours, tmp_path, monkeypatch):
    given = ("train", colours, "--out", tmp_path / "run", "--precision", "float16")
    status, _, err = run(capsys, *given)
    assert status == 2
    assert "--precision is float16, but the device is cpu" in err
    assert not (tmp_path / "run").exists()
    seen = []

    def train(*_, ops, **more):
        seen.append((ops, more["device"]))
        raise TrainingError("seen")

    monkeypatch.setattr("pvt_ref.train.options.train_folder", train)
    assert run(capsys, *given, "--device", "cuda")[0] == 2
    ((ops, device),) = seen
    assert (ops.settings.precision, device) == ("float16", "cuda")
    assert run(capsys, *given[:-2])[0] == 2
    assert seen[1] == (None, "cpu")


def test_a_table_is_what_photos_are_learnt_with(colours, tmp_path):
    asked = []
    ops = REFERENCE.watched(lambda call: asked.append(call.path))
    done = train_folder(colours, tmp_path / "run", options(), ops=ops, stop_at_step=1)
    assert done.state.step == 1
    assert asked


def test_a_wrong_device_leaves_nothing_behind_and_other_files_stay(colours, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DeviceError, match="device is 'gpu'"):
        train_folder(colours, out, options(), device="gpu")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert not train_folder(colours, out, options(), stop_at_step=1).finished  # the same, mended


def test_a_full_disk_at_the_start_leaves_nothing_behind(colours, tmp_path, monkeypatch):
    def full(path, model, dtype=None):
        raise CheckpointError(f"{path}: No space left on device")

    monkeypatch.setattr(from_folder, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        train_folder(colours, tmp_path / "run", options())
    assert not (tmp_path / "run").exists()


def test_one_class_and_one_photo_are_refused(tmp_path):
    write_colours(tmp_path / "data", 1)
    with pytest.raises(TrainingError, match=r"no class of .* has two photos"):
        train_folder(tmp_path / "data", tmp_path / "run", options())
    for name in ("red", "green"):
        shutil.rmtree(tmp_path / "data" / name)
    with pytest.raises(TrainingError, match="has one class, 'blue'; it needs at least two"):
        train_folder(tmp_path / "data", tmp_path / "run", options())


def test_two_folders_held_out_are_refused(tmp_path):
    for name in ("train", "val", "valid"):
        write_colours(tmp_path / "data" / name, 1)
    with pytest.raises(TrainingError, match="has the folders val and valid; one of them"):
        train_folder(tmp_path / "data", tmp_path / "run", options())


# Parts --------------------------------------------------------------------------------------------


def test_what_is_switched_off_is_given_too():
    parser = argparse.ArgumentParser()
    add_options(parser)
    given = ["photos", "--out", "run"]
    assert recipe_values(parser.parse_args(given)) == {}
    given += ["--no-flip", "--clip-norm", "none", "--weight-decay", "0", "--frozen"]
    off = {"flip": False, "clip_norm": None, "weight_decay": 0.0, "frozen": []}
    assert recipe_values(parser.parse_args(given)) == off


@pytest.mark.parametrize(
    "text",
    [
        "blue sky\ngreen  grass land\n\nred blood\n",
        '{"blue": "sky", "green": "grass land", "red": "blood"}',
        '{"red": "blood", "violet": "iris", "blue": "sky", "green": "grass land"}',
    ],
)
def test_class_names_from_a_file(text, tmp_path):
    file = tmp_path / "names"
    file.write_text("\ufeff" + text, encoding="utf-8")
    names = from_folder._class_names(("blue", "green", "red"), str(file))
    assert names == ("sky", "grass land", "blood")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("blue sky\nred blood", "no name for the folder 'green'"),
        ('{"blue": "sky", "green": 3, "red": "blood"}', "no name for the folder 'green'"),
        ("blue a\ngreen a\nred b", "two folders the same name"),
        ('{"blue": ', "not JSON"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(text, match, tmp_path):
    file = tmp_path / "names"
    file.write_text(text)
    with pytest.raises(pvt_ref.PVTError, match=match):
        from_folder._class_names(("blue", "green", "red"), str(file))


def test_a_split_takes_its_share_of_every_class():
    labels = np.repeat([0, 1, 2, 3, 5], [100, 19, 2, 1, 45])
    chosen = stratified_split(labels, 0.1, 0)
    assert np.bincount(labels[chosen], minlength=6).tolist() == [10, 2, 1, 0, 0, 4]
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(stratified_split(labels, 0.1, 0), chosen)
    assert not np.array_equal(stratified_split(labels, 0.1, 1), chosen)
    # a class's choice is its own: others that come or go change nothing
    np.testing.assert_array_equal(stratified_split(labels[:119], 0.1, 0), chosen[:12])
    assert len(stratified_split(np.arange(4), 0.5, 0)) == 0
    with pytest.raises(ValueError, match="share is 1"):
        stratified_split(labels, 1, 0)


def test_classes_of_as_many_photos_are_not_split_alike():
    chosen = stratified_split(np.repeat([0, 1], [100, 100]), 0.1, 0)
    assert not np.array_equal(chosen[:10], chosen[10:] - 100)


def test_a_model_for_another_size_computes_the_same():
    for name, other in (("imagenette", 96), ("digits", 32)):
        model = pvt_ref.load(name)
        changed = with_image_size(model, other)
        assert changed.config.img_size == other
        x = np.random.default_rng(0).standard_normal((2, model.config.in_chans, other, other))
        x = x.astype(np.float32)
        np.testing.assert_allclose(changed(x), model(x), atol=1e-6)
        assert (
            pvt_ref.count_cost(changed.config).macs == pvt_ref.count_cost(model.config, other).macs
        )
    small = pvt_ref.PVTv2Config(embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), depths=(1,) * 4)
    model = pvt_ref.Model(pvt_ref.init_params(small, np.random.default_rng(0)), small)
    assert with_image_size(model, 64).params is not None
    with pytest.raises(ConfigError, match="img_size 33 is not a multiple"):
        with_image_size(pvt_ref.load("imagenette"), 33)


def test_the_picture_of_what_was_taken_for_what(tmp_path):
    counts = np.array([[5, 1, 0], [0, 7, 2], [0, 0, 0]])
    for suffix in (".png", ".svg", ".pdf"):
        path = tmp_path / f"confusion{suffix}"
        draw_confusion(counts, ("$a_1$", "b" * 50, "nothing"), path)
        assert path.stat().st_size > 1000
    text = (tmp_path / "confusion.svg").read_text()
    assert text.count("<!-- 7 -->") == 1
    many = np.eye(100, dtype=int)
    draw_confusion(many, [str(k) for k in range(100)], tmp_path / "many.png")
    with pytest.raises(ShapeError, match=r"\(2, 2\)"):
        draw_confusion(counts, ("a", "b"), tmp_path / "x.png")
    with pytest.raises(TrainingError, match=r"must end in \.png"):
        draw_confusion(counts, ("a", "b", "c"), tmp_path / "x.jpeg")


def test_a_confusion_matrix_counts(colours, whole):
    model = pvt_ref.load(str(whole.folder / MODEL))
    photos = ImageFolder(colours, 32).subset(range(0, 60, 3))
    counts = confusion_matrix(model.params, model.config, photos)
    assert counts.sum(axis=1).tolist() == np.bincount(photos.labels).tolist()
    answers = [model.predict([photos.path(i)], top=1)[0][0].index for i in range(20)]
    for true in range(3):
        for answered in range(3):
            pairs = zip(photos.labels, answers, strict=True)
            assert counts[true, answered] == sum(p == (true, answered) for p in pairs)


def test_grey_photos_for_a_grey_network(tmp_path):
    data = write_photos(tmp_path / "data", 40, 1)
    given = Options(weights="digits", recipe={"epochs": 1, "batch_size": 8})
    done = train_folder(data, tmp_path / "run", given)
    model = pvt_ref.load(str(done.folder / MODEL))
    assert model.classes == CLASSES
    assert model.config.in_chans == 1
    assert Path(done.folder / "confusion.png").exists()
