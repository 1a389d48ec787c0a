"""The two training programs: their data, their options, and what they leave behind."""

import argparse
import dataclasses
import functools
import hashlib
import http.server
import importlib
import io
import json
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from strategies import rng_of

import pvt_ref
from pvt_ref import Model, count_cost
from pvt_ref.errors import TrainingError
from pvt_ref.train import Recipe, Run, evaluate, read_metrics, start_training
from pvt_ref.tree import map_arrays, named_arrays

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("cifar10_data", "train_cifar10", "train_digits", "training")
SCRIPTS += ("score_imagenette", "train_imagenette")


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """Import of a script by name, run in an empty folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def cifar(examples, monkeypatch, tmp_path):
    """Files of the real layout with 60 records each, of noise."""
    data = examples("cifar10_data")
    monkeypatch.setattr(data, "_RECORDS", 60)
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for number, name in enumerate((*data.TRAIN_FILES, *data.TEST_FILES)):
        records = rng_of(number).integers(0, 256, (60, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
    return data


# CIFAR-10's files ---------------------------------------------------------------------------------


def test_records_are_read_as_published(cifar, tmp_path):
    data = cifar.read_cifar10(tmp_path / "data", cifar.TRAIN_FILES)
    assert data.images.shape == (300, 3, 32, 32)
    raw = (tmp_path / "data" / "cifar-10-batches-bin" / "data_batch_2.bin").read_bytes()
    record = raw[3073 : 2 * 3073]
    assert data.labels[61] == record[0]
    assert data.images[61, 0, 0, 5] == record[1 + 5]  # red, first row
    assert data.images[61, 2, 31, 31] == record[-1]  # blue, last row
    inside = cifar.read_cifar10(tmp_path / "data" / "cifar-10-batches-bin", cifar.TEST_FILES)
    assert len(inside) == 60


def test_files_that_are_missing_cut_off_or_of_another_kind(cifar, tmp_path):
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    with pytest.raises(TrainingError, match=r"there is no test_batch\.bin\. .*cifar10_data\.py"):
        cifar.read_cifar10(tmp_path, cifar.TEST_FILES)
    path = folder / "test_batch.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(TrainingError, match="has 184,379 bytes; it must have 184,380"):
        cifar.read_cifar10(folder, cifar.TEST_FILES)
    path.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(TrainingError, match="a label is 10; CIFAR-10 has labels 0 to 9"):
        cifar.read_cifar10(folder, cifar.TEST_FILES)


@pytest.fixture
def server(cifar, tmp_path):
    """The archive of those files, on this machine, and its MD5."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(tmp_path / "data" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    content = buffer.getvalue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = content if self.path == "/a.tar.gz" else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", hashlib.md5(content).hexdigest()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_the_archive_is_fetched_checked_and_unpacked(cifar, server, tmp_path):
    address, md5 = server
    place = tmp_path / "new" / "folder"
    found = cifar.fetch_cifar10(place, f"{address}/a.tar.gz", md5)
    assert len(cifar.read_cifar10(found, cifar.TRAIN_FILES)) == 300
    assert {p.name for p in place.iterdir()} == {"cifar-10-batches-bin", "cifar-10-binary.tar.gz"}


def test_another_archive_is_refused_and_removed(cifar, server, tmp_path):
    address, _ = server
    with pytest.raises(TrainingError, match=f"and should have {cifar.MD5}"):
        cifar.fetch_cifar10(tmp_path / "new", f"{address}/a.tar.gz")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "new" / "cifar-10-binary.tar.gz").write_bytes(b"cut off")
    with pytest.raises(TrainingError, match=r"cut off or altered\. Delete it"):
        cifar.fetch_cifar10(tmp_path / "new")
    (tmp_path / "new" / "cifar-10-binary.tar.gz").unlink()
    for nonsense in ("nonsense", "ftp:/"):
        with pytest.raises(TrainingError, match="could not be fetched"):
            cifar.fetch_cifar10(tmp_path / "new", nonsense)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="could not be fetched"):
        cifar.fetch_cifar10(tmp_path / "file")
    with pytest.raises(TrainingError, match=r"could not be fetched: HTTP Error 404.*unpack it"):
        cifar.fetch_cifar10(tmp_path / "new", f"{address}/b.tar.gz")
    with pytest.raises(TrainingError, match="could not be fetched"):
        cifar.fetch_cifar10(tmp_path / "new", "http://127.0.0.1:9/a.tar.gz")
    assert list((tmp_path / "new").iterdir()) == []


# The programs -------------------------------------------------------------------------------------


def test_cifar10_from_start_to_end(cifar, examples, monkeypatch, capsys, tmp_path):
    program = examples("train_cifar10")
    monkeypatch.setattr(program, "HELD_OUT", 50)
    arguments = ["--data", "data", "--epochs", "1", "--batch-size", "50", "--warmup-epochs", "0.5"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_cifar10.py", *arguments])
    assert program.main(arguments) == 0
    out = capsys.readouterr().out
    assert "2,594,762 parameters, 250 samples, 1 epochs of 5 steps" in out
    model = pvt_ref.load(tmp_path / "runs" / "cifar10" / "model.safetensors")
    training = model.info.training
    assert training["command"] == " ".join(
        ["python", "examples/train_cifar10.py", "--data", "DIR", *arguments[2:]]
    )
    assert training["test_samples"] == 60
    loss, accuracy = evaluate(
        model.params, model.config, cifar.read_cifar10("data", cifar.TEST_FILES)
    )
    assert accuracy == training["test_accuracy"]
    _, held_out = program.split(cifar.read_cifar10("data", cifar.TRAIN_FILES))
    assert training["held_out_accuracy"] == evaluate(model.params, model.config, held_out)[1]
    assert program.main(["--data", "data", "--test", "runs/cifar10/model.safetensors"]) == 0
    assert f"test accuracy {accuracy:.4f}, loss {loss:.4f} (60 images)" in capsys.readouterr().out
    assert program.main([*arguments, "--resume"]) == 0  # nothing is left to do
    assert f"test_accuracy: {accuracy}" in capsys.readouterr().out
    assert program.main(arguments) == 2
    assert "holds a training already" in capsys.readouterr().err
    assert program.main([*arguments, "--resume", "--lr", "1"]) == 2
    assert "recipe.lr is 0.001 there and 1.0 here" in capsys.readouterr().err
    assert program.main([*arguments, "--folder", "x", "--lr", "-1"]) == 2
    assert "lr is -1.0" in capsys.readouterr().err


def test_the_held_out_part_and_the_test_set_are_never_learnt_from(cifar, examples, tmp_path):
    program = examples("train_cifar10")
    program.HELD_OUT = 50
    everything = cifar.read_cifar10("data", cifar.TRAIN_FILES)
    learnt, held_out = program.split(everything)
    assert len(learnt) == 250
    assert np.array_equal(np.concatenate([learnt.images, held_out.images]), everything.images)


def test_cifar10_for_pvt_v2_is_enlarged_as_pillow_does_it(cifar, examples, capsys):
    program = examples("train_cifar10")
    program.HELD_OUT = 50
    test = cifar.read_cifar10("data", cifar.TEST_FILES)
    assert program.at_size(test, 32) is test
    enlarged = program.at_size(test, 64)
    picture = Image.fromarray(test.images[7].transpose(1, 2, 0)).resize(
        (64, 64), Image.Resampling.BICUBIC
    )
    assert np.array_equal(enlarged.images[7].transpose(1, 2, 0), np.asarray(picture))
    assert np.array_equal(enlarged.labels, test.labels)
    arguments = ["--data", "data", "--network", "v2", "--epochs", "1", "--batch-size", "50"]
    assert program.main([*arguments, "--warmup-epochs", "0.5"]) == 0
    assert "2,089,130 parameters, 250 samples" in capsys.readouterr().out
    model = pvt_ref.load("runs/cifar10/model.safetensors")
    assert evaluate(model.params, model.config, enlarged)[1] == model.info.training["test_accuracy"]
    assert program.main(["--data", "data", "--test", "runs/cifar10/model.safetensors"]) == 0
    assert f"accuracy {model.info.training['test_accuracy']:.4f}" in capsys.readouterr().out


def test_cifar10s_models_are_small_enough(examples):
    program = examples("train_cifar10")
    assert max(count_cost(config).parameters for config in (program.V1, program.V2)) <= 4e6
    assert pvt_ref.load("cifar10").config.embed_dims == program.V1.embed_dims
    assert isinstance(program.RECIPE, Recipe)


def test_what_is_measured_is_what_is_written(examples, monkeypatch, tmp_path):
    """The rounded weights; and the command without what was only for this time."""
    training = examples("training")
    seen = []
    monkeypatch.setattr(training, "evaluate", lambda params, *_: seen.append(params) or (0.0, 0.5))
    model = pvt_ref.load("digits")
    exact = Model(map_arrays(lambda x: x * np.float32(1.0001), model.params), model.config)
    state = start_training(exact.params, 4, seed=0)
    monkeypatch.setattr(sys, "argv", ["x/train_digits.py", "--resume", "--seed", "1"])
    args = argparse.Namespace(seed=1, epochs=2, device="cpu")
    path = training.finish(Run(state, True, tmp_path), exact, [], None, {}, args)
    written = pvt_ref.load(path)
    assert written.info.training["command"] == "python examples/train_digits.py --seed 1"
    (measured,) = seen
    for (_, x), (_, y) in zip(*map(named_arrays, (measured, written.params)), strict=True):
        assert np.array_equal(x, y)
    assert not np.array_equal(written.params.head.weight, exact.params.head.weight)


def test_digits_span_black_to_white_evenly_by_class(examples):
    learnt, held_out = examples("train_digits").read_digits()
    assert held_out.images.max() > 250  # bicubic, from 255
    assert learnt.images.min() == 0
    counts = np.bincount(held_out.labels)
    assert counts.min() >= 35
    assert counts.max() <= 37


def test_digits_learn_in_a_few_epochs(examples, monkeypatch, capsys, tmp_path):
    program = examples("train_digits")
    monkeypatch.setattr(sys, "argv", ["train_digits.py"])
    assert program.main(["--epochs", "2", "--warmup-epochs", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "389,098 parameters, 1,437 samples, 2 epochs of 22 steps" in out
    lines = read_metrics(tmp_path / "runs" / "digits" / "metrics.jsonl")
    losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert losses[-1] < losses[0] < 2.31  # log 10 is chance
    model = pvt_ref.load(tmp_path / "runs" / "digits" / "model.safetensors")
    assert model.info.training["held_out_accuracy"] > 0.5
    assert model.config.num_classes == 10


def test_every_field_of_a_recipe_is_an_option(examples):
    training, recipe = examples("training"), examples("train_digits").RECIPE
    parser = argparse.ArgumentParser()
    training.add_run_arguments(parser, recipe, "runs/x")
    assert training.recipe_from(parser.parse_args([])) == recipe
    args = ["--frozen", "patch_embed1", "block1.0", "--layer-decay", "0.75", "--clip-norm", "none"]
    changed = {"frozen": ("patch_embed1", "block1.0"), "layer_decay": 0.75, "clip_norm": None}
    again = training.recipe_from(parser.parse_args([*args, "--no-flip"]))
    assert again == dataclasses.replace(recipe, **changed, flip=False)
    assert training.recipe_from(parser.parse_args(["--frozen"])) == recipe
    assert "--frozen [PREFIX ...]" in parser.format_help()


def test_stopped_it_says_how_to_go_on(examples, monkeypatch, capsys):
    program, training = examples("train_digits"), examples("training")
    monkeypatch.setattr(sys, "argv", ["examples/train_digits.py", "--seed", "3"])
    inner = training.fit
    monkeypatch.setattr(
        training, "fit", lambda *args, **options: inner(*args, **options, stop_at_step=2)
    )
    assert program.main(["--seed", "3"]) == 130
    out = capsys.readouterr().out
    assert "Stopped and saved after step 2 of 1320" in out
    assert "python examples/train_digits.py --seed 3 --resume" in out
    monkeypatch.setattr(
        training, "fit", lambda *args, **options: inner(*args, **options, stop_at_step=3)
    )
    assert program.main(["--seed", "3", "--resume"]) == 130
    assert "after step 3" in capsys.readouterr().out


def test_a_model_of_another_run_is_not_passed_off_as_this_ones(examples, monkeypatch, tmp_path):
    training = examples("training")
    monkeypatch.setattr(training, "evaluate", lambda *_: (0.0, 0.5))
    monkeypatch.setattr(sys, "argv", ["x/train_digits.py"])
    ours = pvt_ref.load("digits")
    heavier = map_arrays(lambda x: x * np.float32(1.01), ours.params)
    other = Model(heavier, ours.config, info=ours.info)
    args = argparse.Namespace(seed=1, epochs=2, device="cpu")
    run = Run(start_training(ours.params, 4, seed=0), True, tmp_path)
    path = training.finish(run, other, [], None, {}, args)
    with pytest.raises(TrainingError, match=r"model\.safetensors has other weights than"):
        training.finish(run, ours, [], None, {}, args)
    path.unlink()
    assert training.finish(run, ours, [], None, {"data": "\x1b[31m\nx"}, args) == path
    assert training.finish(run, ours, [], None, {}, args) == path  # what was measured stays


def test_what_a_model_file_says_is_printed_as_text(examples, monkeypatch, capsys, tmp_path):
    training = examples("training")
    monkeypatch.setattr(training, "evaluate", lambda *_: (0.0, 0.5))
    monkeypatch.setattr(sys, "argv", ["x/train_digits.py", "--folder", "\x1b[31m\udcff"])
    model = pvt_ref.load("digits")
    args = argparse.Namespace(seed=1, epochs=2, device="cpu")
    run = Run(start_training(model.params, 4, seed=0), True, tmp_path)
    training.finish(run, model, [], None, {"data": "[red]\x1b[31m\nsteps: 9"}, args)
    out = capsys.readouterr().out
    assert r"data: [red]\x1b[31m steps: 9" in out
    assert r"\x1b[31m\udcff" in training._how_to_resume()


def test_a_file_of_the_data_set_that_cannot_be_read_is_named(cifar, monkeypatch, tmp_path):
    """As on a disk that fails, or one that became shorter since its size was asked for."""
    for broken in (b"", OSError("Input/output error")):

        def read(_, broken=broken):
            if isinstance(broken, OSError):
                raise broken
            return broken

        monkeypatch.setattr(Path, "read_bytes", read)
        with pytest.raises(TrainingError, match=r"test_batch\.bin cannot be read"):
            cifar.read_cifar10(tmp_path / "data", cifar.TEST_FILES)
    with pytest.raises(TrainingError, match="there is no"):
        cifar.read_cifar10("nul\0", cifar.TEST_FILES)


@pytest.mark.parametrize("other", ["num_heads", "classes", "preprocessing", "training"])
def test_a_model_with_another_description_is_not_passed_off_either(
    other, examples, monkeypatch, tmp_path
):
    training = examples("training")
    monkeypatch.setattr(training, "evaluate", lambda *_: (0.0, 0.5))
    monkeypatch.setattr(sys, "argv", ["x/train_digits.py"])
    model = pvt_ref.load("digits")
    args = argparse.Namespace(seed=1, epochs=2, device="cpu")
    run = Run(start_training(model.params, 4, seed=0), True, tmp_path)
    path = training.finish(run, model, [], None, {"data": "digits"}, args)
    assert training.finish(run, model, [], None, {"data": "digits"}, args) == path
    written = pvt_ref.load(path)
    config, info = written.config, written.info
    if other == "num_heads":
        config = dataclasses.replace(config, num_heads=(1, 1, 1, 1))
    else:
        changed = {
            "classes": info.classes[::-1],
            "preprocessing": dataclasses.replace(info.preprocessing, mean=(0.25,)),
            "training": {**info.training, "seed": 2},
        }[other]
        info = dataclasses.replace(info, **{other: changed})
    pvt_ref.save(path, Model(written.params, config, info=info), dtype="float16")
    name = "seed" if other == "training" else other
    with pytest.raises(TrainingError, match=rf"model\.safetensors has other {name} than this run"):
        training.finish(run, model, [], None, {"data": "digits"}, args)


def test_a_model_that_is_in_the_way_is_found_before_the_training(examples, tmp_path, capsys):
    program, folder = examples("train_digits"), tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_text("")
    assert program.main(["--folder", str(folder)]) == 2
    assert "model.safetensors belongs to another run" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


# Imagenette ---------------------------------------------------------------------------------------


@pytest.fixture
def imagenette(examples, tmp_path):
    """The program, and photos of ten colours in its folders."""
    program = examples("train_imagenette")
    for part, count in (("train", 4), ("val", 2)):
        for k, folder in enumerate(program.CLASSES):
            place = tmp_path / "data" / part / folder
            place.mkdir(parents=True)
            for i in range(count):
                colour = (25 * k, 250 - 25 * k, 60 * i)
                Image.new("RGB", (48, 40), colour).save(place / f"{i}.jpg")
    return program


def test_imagenette_is_trained_stopped_resumed_and_scored_once(
    imagenette, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    command = ["--data", str(tmp_path / "data"), "--out", str(out)]
    given = ["--network", "v2", "--size", "32", "--epochs", "2", "--batch-size", "10"]
    given += ["--warmup-epochs", "1"]
    train_folder = imagenette.train_folder
    stopped = functools.partial(train_folder, stop_at_step=2)
    monkeypatch.setattr(imagenette, "train_folder", stopped)
    assert imagenette.main(command + given) == 130
    assert "--resume continues" in capsys.readouterr().out
    assert not (out / imagenette.SCORE).exists()
    monkeypatch.setattr(imagenette, "train_folder", train_folder)
    assert imagenette.main([*command, "--resume"]) == 0
    said = capsys.readouterr().out
    model = pvt_ref.load(out / "model.safetensors")
    assert model.classes == tuple(imagenette.CLASSES.values())
    assert type(model.config) is pvt_ref.PVTv2Config
    assert (model.config.img_size, model.config.num_classes) == (32, 10)
    held_out = json.loads((out / "run.json").read_text())["held_out"]
    assert len(held_out) == 10  # of train, one a class: no epoch is chosen by val
    photos = imagenette.photos(model, tmp_path / "data" / "val")
    assert len(photos) == 20
    accuracy = evaluate(model.params, model.config, photos)[1]
    assert f"{round(20 * accuracy)} of 20 photos are right" in said
    counts = np.diag([2] * 10)  # what was counted stays: it is not counted again
    (out / imagenette.SCORE).write_text(json.dumps(counts.tolist()))
    assert imagenette.main([*command, "--resume"]) == 0
    assert "20 of 20 photos are right" in capsys.readouterr().out
    assert imagenette.main(command) == 2
    assert "holds a training already" in capsys.readouterr().err


def test_imagenettes_networks_are_those_that_are_said(imagenette):
    shipped = pvt_ref.load("imagenette").config
    assert dataclasses.replace(shipped, num_classes=1000) == imagenette.V1
    for network in (imagenette.V1, imagenette.V2):
        config = dataclasses.replace(network, num_classes=10, img_size=128)
        assert count_cost(config).parameters < 4_900_000
