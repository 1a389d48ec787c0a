"""States and metrics that somebody edited: this project's error, which names the field or line."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from kill_training import RUN, fingerprint, saved
from rich.console import Console
from small_training import CONFIG, DATA, HELD_OUT, RECIPE
from strategies import random_params

from pvt_ref.checkpoint.safetensors_file import TRAINING_KEY, pack, read_safetensors
from pvt_ref.errors import CheckpointError, MissingFileError, TrainingError
from pvt_ref.train import (
    draw_curves,
    fit,
    load_state,
    loop,
    read_metrics,
    save_state,
    start_training,
)
from pvt_ref.train.loop import CURVES, METRICS, STATE
from pvt_ref.train.saved import describe_run
from pvt_ref.tree import digest

#: More digits than Python turns into a number, more levels than a reader should go down.
DIGITS, DEEP = "7" * 5000, "[" * 100_000


def train(folder, **options):
    return fit(CONFIG, RECIPE, DATA, HELD_OUT, folder, log_steps=1, **options)


@pytest.fixture(scope="module")
def halfway_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halfway")
    train(folder, stop_at_step=6)
    return folder


@pytest.fixture
def halfway(halfway_once, tmp_path):
    return Path(shutil.copytree(halfway_once, tmp_path / "run"))


# States -------------------------------------------------------------------------------------------


def seal(path: Path, tensors, record: dict) -> None:
    """Writes a state with the right digest, whatever it says."""
    record = {name: value for name, value in record.items() if name != "sha256"}
    record["sha256"] = digest(tensors, record)
    path.write_bytes(pack(tensors, TRAINING_KEY, record))


def unseal(path: Path):
    tensors, metadata = read_safetensors(path)
    return tensors, json.loads(metadata[TRAINING_KEY])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": -1}, "state.optimizer.t is -1; it must be a whole number at least 0"),
        ({"t": "6"}, "state.optimizer.t is '6'"),
        ({"t": 10**300}, "state.optimizer.t is 1000"),
        ({"step": None}, "state.step is None"),
        ({"step": 6.0}, "state.step is 6.0"),
        ({"step": 13}, "step is 13, and can be 12 at most"),
        ({"step": 10**17}, "state.step is 100000000000000000"),
        ({"epoch_loss": "x"}, "state.epoch_loss is 'x'"),
        ({"epoch_loss": True}, "state.epoch_loss is True"),
        ({"epoch_hits": 28}, "state.epoch_hits is 28; .* at most 27"),
        ({"epoch_hits": 13}, "epoch_hits is 13, and can be 12 at most"),
        ({"epoch_hits": -1}, "state.epoch_hits is -1"),
        ({"best_accuracy": "x"}, "state.best_accuracy is 'x'"),
        ({"best_accuracy": 1.5}, "state.best_accuracy is 1.5"),
        ({"best_accuracy": -0.5}, "state.best_accuracy is -0.5"),
        ({"best_accuracy": -1.0}, "state.best_accuracy is -1.0"),
        ({"best_epoch": [1]}, r"state.best_epoch is \[1\]"),
        ({"best_epoch": 2}, "best_epoch is 2, and can be 1 at most"),
        ({"best_epoch": 0}, "state.best_"),
        ({"best_sha256": 5}, "state.best_sha256 is 5"),
        ({"best_sha256": ""}, "state.best_sha256 is ''"),
        ({"seed": None}, "state.seed is None; it must be a whole number at least 0"),
        ({"seed": -1}, "state.seed is -1"),
        ({"seed": 2**128 + 1}, "state.seed is 340"),
        ({"seed": 6}, "seed is 6, and 5 in the run"),
        ({"samples": 0}, "state.samples is 0"),
        ({"samples": "27"}, "state.samples is '27'"),
        ({"samples": 28}, "samples is 28, and 27 in the run"),
        ({"run": None}, "run is None"),
        ({"run": {"config": 5}}, "run is {'config': 5}"),
        ({"format": "pvt_ref training 1"}, "format 'pvt_ref training 1'.* version that began it"),
        (
            {"format": "pvt_ref training 2"},
            "of version 0.1.0, whose random numbers .* Go on with version 0.1.0, or start anew in "
            r"another folder; first=pvt_ref.load\('.../best.safetensors'\).params begins",
        ),
        ({"format": 2}, "a training of format 2"),
        ({"more": 1}, "'more' is missing or unknown"),
        ({"t": ...}, "'t' is missing or unknown"),
    ],
)
def test_a_sealed_state_with_a_wrong_field_is_refused_by_name(changes, message, halfway):
    tensors, record = unseal(halfway / STATE)
    record = {k: v for k, v in (record | changes).items() if v is not ...}
    seal(halfway / STATE, tensors, record)
    with pytest.raises(CheckpointError, match=f"training.safetensors.*{message}"):
        train(halfway, resume=True)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("m.norm.bias", lambda x: x * np.nan, "'m.norm.bias' holds NaN"),
        ("v.norm.bias", lambda x: x - 1, "'v.norm.bias' is a mean of squares, and is below 0"),
        ("v.norm.bias", lambda x: x[:3], "its v: .*mis-shaped: norm.bias"),
        (
            "average.norm.bias",
            lambda x: x.astype(np.float64),
            "'average.norm.bias' has dtype float6",
        ),
        ("params.pos_embed1", lambda x: x.astype(np.int32), "'.*' has dtype (int32|float32)"),
        (
            "average.norm.bias",
            lambda x: np.full_like(x, np.inf),
            "'average.norm.bias' holds NaN or",
        ),
        ("m.norm.bias", None, "its m: .*missing: norm.bias"),
        ("order", lambda _: np.arange(27), "unknown tensor, 'order'"),
        ("params.more", lambda _: np.ones(3, np.float32), "its params: .*unexpected: more"),
        ("more\x1b[31m", lambda _: np.ones(3), r"unknown tensor, 'more\\x1b\[31m'"),
    ],
)
def test_a_sealed_state_with_a_wrong_array_is_refused_by_name(key, change, message, halfway):
    tensors, record = unseal(halfway / STATE)
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors.get(key))
    seal(halfway / STATE, tensors, record)
    with pytest.raises(CheckpointError, match=f"(?s)training.safetensors.*{message}"):
        train(halfway, resume=True)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "[" * 500 + "]" * 500,
        f'{{"t": {DIGITS}}}',
        '{"t": NaN}',
        "null",
        "[1]",
        '"x"',
        "5",
        "",
    ],
)
def test_a_record_of_a_state_that_is_no_record_is_refused(text, tmp_path):
    head = json.dumps({"__metadata__": {TRAINING_KEY: text}}).encode()
    (tmp_path / STATE).write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(CheckpointError, match=r"training\.safetensors"):
        load_state(tmp_path / STATE, CONFIG, RUN, like=np.empty(0))


def test_what_is_no_file_is_no_state(tmp_path):
    where = tmp_path / STATE
    where.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        train(tmp_path, resume=True)
    where.rmdir()
    where.symlink_to(where)
    with pytest.raises(CheckpointError, match="not a regular file"):
        train(tmp_path, resume=True)
    with pytest.raises(TrainingError, match="holds a training already"):
        train(tmp_path)


def test_what_is_written_can_be_read(halfway):
    state = saved(halfway)
    save_state(str(halfway / "copy"), state, RUN)
    assert fingerprint(load_state(str(halfway / "copy"), CONFIG, RUN, np.empty(0))) == fingerprint(
        state
    )
    for run in (None, {"a": 1}, {"a": {"b": np.nan}}, {"a": {"b": {1, 2}}}):
        with pytest.raises(TrainingError, match="run "):
            save_state(halfway / "copy", state, run)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="could not be saved"):
        save_state(halfway / "no folder" / "x", state, RUN)


# Metrics ------------------------------------------------------------------------------------------

EPOCH = {
    "step": 7,
    "epoch": 2,
    "train_loss": 1.0,
    "train_accuracy": 0.5,
    "held_out_loss": 1.0,
    "held_out_accuracy": 0.5,
    "best_accuracy": 0.5,
    "best_epoch": 1,
}


def without(name: str) -> str:
    return json.dumps({k: v for k, v in EPOCH.items() if k != name})


WRONG_LINES = {
    '{"step": "x"}': "step is 'x'",
    '{"step": 7.5}': "step is 7.5",
    '{"step": true}': "step is True",
    '{"step": 0}': "step is 0",
    '{"step": 3}': "step is 3, and was 6 in the line before",
    f'{{"step": {DIGITS}}}': "5000 digits",
    f'{{"step": {"7" * 400}}}': "step is 77",
    "null": "needed is a JSON object with a step",
    "[1]": "needed is a JSON object with a step",
    "{}": "needed is a JSON object with a step",
    "x": "not JSON",
    "": "not JSON",
    "\xff\xfe": "not JSON",
    "[" * 30_000 + "]" * 30_000: "nested too deeply",
    DEEP: "too long",
    '{"step": 7, "step": 8}': "comes twice",
    '{"step": 7, "loss": NaN}': "NaN",
    '{"step": 7, "loss": "1"}': "loss is '1'",
    '{"step": 7, "lr": null}': "lr is None",
    '{"step": 7, "held_out_accuracy": 0.5}': "the line of an epoch has no epoch",
    without("epoch"): "the line of an epoch has no epoch",
    without("train_loss"): "the line of an epoch has no train_loss",
    json.dumps(EPOCH | {"held_out_accuracy": None}): "held_out_accuracy is None",
    json.dumps(EPOCH | {"held_out_accuracy": 1.5}): "held_out_accuracy is 1.5",
    json.dumps(EPOCH | {"epoch": 2.5}): "epoch is 2.5",
    json.dumps(EPOCH | {"train_loss": [1]}): r"train_loss is \[1\]",
    '{"step": "\x7f\\u001b[31m"}': r"step is '\\x7f\\x1b\[31m'",
}


@pytest.mark.parametrize("end", ["\n", '\n{"step": 9}\n'])
@pytest.mark.parametrize("line", WRONG_LINES, ids=range(len(WRONG_LINES)))
def test_a_wrong_line_of_metrics_is_named(line, end, halfway):
    path = halfway / METRICS
    with path.open("a", encoding="latin-1") as file:
        file.write(line + end)
    before = path.read_bytes()
    message = rf"metrics\.jsonl, line 7: .*{WRONG_LINES[line]}.*Mend the line, or delete it"
    for read in (read_metrics, lambda p: draw_curves(p, halfway / "x.png")):
        with pytest.raises(CheckpointError, match=message):
            read(path)
    with pytest.raises(CheckpointError, match=message):
        train(halfway, resume=True)
    assert path.read_bytes() == before


def test_a_last_line_that_was_cut_off_is_left_out(halfway):
    path = halfway / METRICS
    lines, text = read_metrics(path), json.dumps(EPOCH)
    for end in range(len(text)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + text[:end])
        assert read_metrics(path) == lines
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + text)
    assert read_metrics(path) == [*lines, EPOCH]  # only its end of line is missing


def test_what_is_no_file_is_no_metrics(halfway):
    path = halfway / METRICS
    path.unlink()
    with pytest.raises(MissingFileError, match="no such file"):
        read_metrics(path)
    path.mkdir()
    for act in (read_metrics, lambda _: train(halfway, resume=True)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be read.*not a regular"):
            act(path)
    path.rmdir()
    path.symlink_to(path)
    for act in (read_metrics, lambda _: train(halfway, resume=True)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be read"):
            act(path)
    if hasattr(os, "mkfifo"):
        path.unlink()
        os.mkfifo(path)
        for act in (read_metrics, lambda _: train(halfway, resume=True)):
            with pytest.raises(CheckpointError, match="not a regular file"):
                act(path)


def test_metrics_that_are_lost_are_said_to_be(halfway, tmp_path):
    (halfway / METRICS).unlink()
    with (tmp_path / "seen").open("w+") as file:
        console = Console(file=file, width=300)
        assert train(halfway, resume=True, console=console).finished
        file.seek(0)
        assert "metrics.jsonl lacks epochs that were done" in file.read()
    lines = read_metrics(halfway / METRICS)
    assert [line["step"] for line in lines] == list(range(7, 13))


@pytest.mark.parametrize("line", ['{"step": "x"}', "null", DEEP, "pipe"])
def test_metrics_that_are_damaged_while_it_runs(line, halfway, monkeypatch, tmp_path):
    """It goes on without a picture; a pipe ends it, and is not waited for."""
    path, inner = halfway / METRICS, loop.train_step

    def step(state, *rest):
        if state.step == 7:
            if line == "pipe":
                path.unlink()
                os.mkfifo(path)
            else:
                with path.open("a") as file:
                    file.write(line + "\n")
        return inner(state, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    with (tmp_path / "seen").open("w+") as file:
        console = Console(file=file, width=300)
        if line == "pipe":
            with pytest.raises(CheckpointError, match=r"could not be written .*(regular|device)"):
                train(halfway, resume=True, console=console)
            return
        assert train(halfway, resume=True, console=console).finished
        file.seek(0)
        assert "curves.png is not up to date" in file.read()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 8"):
        train(halfway, resume=True)


@pytest.mark.parametrize("loss", [1e308, -1e308, 5e-324])
def test_curves_of_any_numbers_can_be_drawn(loss, drawn, tmp_path):
    lines = [EPOCH | {"step": 2**52 + n, "epoch": 2**52 + n} for n in range(3)]
    for line, factor in zip(lines, (1, 0.5, -1), strict=True):
        line |= {"train_loss": loss * factor, "held_out_loss": -loss}
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(tmp_path / METRICS, tmp_path / CURVES)
    assert (tmp_path / CURVES).exists()


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_the_same_run_gives_the_same_picture(form, drawn, halfway):
    pictures = []
    for name in ("first", "second"):
        draw_curves(halfway / METRICS, halfway / f"{name}.{form}")
        pictures.append((halfway / f"{name}.{form}").read_bytes())
    assert pictures[0] == pictures[1]


def test_pictures_that_cannot_be_drawn(halfway):
    for name in ("x", "x.jpeg", "x.exe", ".png"):
        with pytest.raises(TrainingError, match=r"must end in \.png, \.svg or \.pdf"):
            draw_curves(halfway / METRICS, halfway / name)
    with pytest.raises(CheckpointError, match=r"x\.png could not be written"):
        draw_curves(halfway / METRICS, halfway / "no folder" / "x.png")
    assert not list(halfway.glob(".*"))


def test_a_run_of_before_a_recipe_had_some_field_goes_on(tmp_path):
    """It did what the field's default does."""
    path, state = (
        tmp_path / "state.safetensors",
        start_training(random_params(CONFIG, 0, np.float32), len(DATA), 5),
    )
    calm = dataclasses.replace(RECIPE, cutmix_alpha=0.0, erasing=0.0)
    run = describe_run(CONFIG, calm, DATA, HELD_OUT)
    later = ("cutmix_alpha", "erasing", "layer_decay", "frozen")
    old = {**run, "recipe": {k: v for k, v in run["recipe"].items() if k not in later}}
    assert len(old["recipe"]) == len(run["recipe"]) - 4
    save_state(path, state, old)
    assert fingerprint(load_state(path, CONFIG, run, np.empty(0))) == fingerprint(state)
    for change in ({"erasing": 0.5}, {"layer_decay": 0.5}, {"frozen": ("head",)}):
        other = describe_run(CONFIG, dataclasses.replace(calm, **change), DATA, HELD_OUT)
        with pytest.raises(TrainingError, match=f"recipe.{next(iter(change))} is "):
            load_state(path, CONFIG, other, np.empty(0))
    del old["recipe"]["mixup_alpha"]  # which every version has written
    save_state(path, state, old)
    with pytest.raises(TrainingError, match=r"recipe\.mixup_alpha is None there"):
        load_state(path, CONFIG, run, np.empty(0))
