"""Whole trainings: beside PyTorch, broken off and resumed, killed, misled, and on one batch."""

import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from closeness import relative
from kill_training import fingerprint, saved, what_counts
from rich.console import Console
from small_training import CONFIG, DATA, HELD_OUT, RECIPE, stripes, without_chance
from strategies import random_params, rng_of
from twin import our_losses, twin_losses

import pvt_ref
from pvt_ref import Model, ModelInfo, init_params, to_state_dict
from pvt_ref.checkpoint.whole_file import write_whole
from pvt_ref.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    MissingFileError,
    RangeError,
    ShapeError,
    TrainingError,
)
from pvt_ref.train import (
    StepReport,
    fit,
    load_state,
    loop,
    progress,
    read_metrics,
    save_state,
    start_training,
    train_step,
)
from pvt_ref.train.loop import BEST, CURVES, STATE
from pvt_ref.train.saved import describe_run
from pvt_ref.tree import map_named

HERE = Path(__file__).parent
LAST = RECIPE.epochs * 4
OTHER = dataclasses.replace(CONFIG, depths=(1, 1, 1, 1))


# Beside PyTorch -----------------------------------------------------------------------------------


@functools.cache
def pytorchs_hundred_steps(kind: str):
    """The same beside both tables: where they begin, by which recipe, and where they end."""
    recipe = dataclasses.replace(RECIPE, epochs=25)  # of 4 steps
    if kind == "plain":
        recipe = dataclasses.replace(without_chance(recipe), accumulate=1, clip_norm=None)
    if kind == "fine-tuned":
        frozen = ("patch_embed1", "block2.1")
        recipe = dataclasses.replace(recipe, layer_decay=0.8, frozen=frozen)
    state = start_training(init_params(CONFIG, rng_of(3), np.float64), len(DATA), seed=1)
    return state, recipe, twin_losses(state, DATA, CONFIG, recipe, 100)


@pytest.mark.parametrize("kind", ["augmented", "plain", "fine-tuned"])
def test_a_hundred_steps_are_pytorchs(kind):
    """Loss of each step within 1e-10, relative; every weight at the end within 1e-9."""
    state, recipe, (weights, average, theirs) = pytorchs_hundred_steps(kind)
    end, ours = our_losses(state, DATA, CONFIG, recipe, 100)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    for mine, other in ((end.params, weights), (end.average, average)):
        for key, x in to_state_dict(mine).items():
            np.testing.assert_allclose(x, other[key], rtol=0, atol=1e-9, err_msg=key)
    start, frozen = to_state_dict(state.params), tuple(f"{x}." for x in recipe.frozen)
    moving = [k for k in weights if "mlp" in k and not k.startswith(frozen)]
    moved = [relative(weights[k], start[k]) for k in moving]
    assert min(moved) > 0.005  # a training in which nothing happens would agree too


@pytest.mark.gpu
def test_steps_on_a_gpu_are_those_on_the_host(cupy):
    """The same functions on CuPy arrays; batches and masks are drawn on the host, alike."""
    state = start_training(init_params(CONFIG, rng_of(3), np.float64), len(DATA), seed=1)
    there = start_training(pvt_ref.to_device(state.params), len(DATA), seed=1)
    end, ours = our_losses(state, DATA, CONFIG, RECIPE, 12)
    end_there, theirs = our_losses(there, DATA, CONFIG, RECIPE, 12)
    np.testing.assert_allclose(theirs, ours, rtol=1e-9)
    for tree, other in ((end.params, end_there.params), (end.average, end_there.average)):
        host = to_state_dict(pvt_ref.to_numpy(other))
        for key, x in to_state_dict(tree).items():
            np.testing.assert_allclose(host[key], x, rtol=0, atol=1e-8, err_msg=key)


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_resumed_with_the_same_bits(cupy, tmp_path):
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "whole", device="cuda")
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "cut", device="cuda", stop_at_step=6)
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "cut", device="cuda", resume=True)
    assert fingerprint(saved(tmp_path / "cut")) == fingerprint(saved(tmp_path / "whole"))


@pytest.mark.gpu
def test_what_surrounds_the_steps_works_on_a_gpu(cupy, tmp_path):
    """Measuring, answering, saving and naming what overflowed, in float32."""
    config, data = dataclasses.replace(CONFIG, drop_path_rate=0.0), DATA
    host = Model(
        init_params(config, rng_of(3)), config, info=ModelInfo(preprocessing=data.preprocessing)
    )
    there = pvt_ref.to_device(host)
    ours = pvt_ref.train.evaluate(host.params, config, data)
    theirs = pvt_ref.train.evaluate(there.params, config, data)
    assert theirs == pytest.approx(ours, rel=1e-4)
    pictures = list(data.images[:5, 0])
    for mine, other in zip(host.predict(pictures), there.predict(pictures), strict=True):
        assert [a.probability for a in other] == pytest.approx(
            [a.probability for a in mine], rel=1e-4
        )
    pvt_ref.save(tmp_path / "half.safetensors", there, dtype="float16")
    assert pvt_ref.load(tmp_path / "half.safetensors").config == config
    broken = map_named(
        lambda k, x: np.full_like(x, 3e38) if k == "block2.0.mlp.fc1.weight" else x, host.params
    )
    with pytest.raises(TrainingError, match=r"block2\.0\.mlp\.fc1 \(linear\)"):
        train_step(start_training(pvt_ref.to_device(broken), 27, seed=0), data, config, RECIPE)


# Learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_batch_is_learnt_by_heart(dtype):
    config = dataclasses.replace(CONFIG, drop_path_rate=0.0)
    batch = stripes(6, 4)
    recipe = dataclasses.replace(without_chance(RECIPE), epochs=60, lr=2e-2, accumulate=1)
    recipe = dataclasses.replace(recipe, label_smoothing=0.0, weight_decay=0.0)
    state = start_training(init_params(config, rng_of(1), dtype), 6, seed=0)
    losses = []
    while state.step < recipe.epochs:
        state, report = train_step(state, batch, config, recipe)
        losses.append(report.loss)
    assert losses[0] > 1.0  # log 3 is chance
    assert losses[-1] < 0.01
    assert report.hits == 6
    assert state.params.pos_embed1.dtype == dtype


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow():
    """Over 200 steps; a state (60 KB) or a cache that stayed each time would be over 10 MB."""
    recipe = dataclasses.replace(RECIPE, epochs=75, accumulate=1)
    config = dataclasses.replace(CONFIG, depths=(1, 1, 1, 1))
    state = start_training(init_params(config, rng_of(0)), len(DATA), seed=0)
    resident, objects = [], []
    for step in range(1, 301):
        state, _ = train_step(state, DATA, config, recipe)
        if step % 50 == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGESIZE"))
            objects.append(len(gc.get_objects()))
    # the first 100 steps fill pools and caches
    assert resident[-1] - resident[1] < 2e6, resident
    assert objects[-1] - objects[1] < 100, objects


# Stopping and going on ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert fit(CONFIG, RECIPE, DATA, HELD_OUT, folder, log_steps=1).finished
    return folder


def test_resumed_is_bit_for_bit_the_same(undisturbed, tmp_path):
    """Six runs, each stopped twice; together they stop after every step."""
    expected = fingerprint(saved(undisturbed))
    stopped = [(first, LAST - first) for first in range(1, LAST // 2)]
    for stops in [*stopped, (LAST // 2 - 1, LAST // 2)]:
        folder = tmp_path / "-".join(map(str, stops))
        for resume, stop in enumerate([*stops, None]):
            done = fit(
                CONFIG,
                RECIPE,
                DATA,
                HELD_OUT,
                folder,
                resume=bool(resume),
                stop_at_step=stop,
                log_steps=1,
            )
            assert done.finished == (stop is None)
            assert done.state.step == (stop or LAST)
            assert saved(folder).step == done.state.step  # nothing that was done is done again
        assert fingerprint(saved(folder)) == expected, stops
        assert fingerprint(done.state) == expected
        assert what_counts(folder) == what_counts(undisturbed)
        assert (folder / BEST).read_bytes() == (undisturbed / BEST).read_bytes()


def run_script(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        cwd=HERE,
        timeout=300,
        check=False,
        **options,
    )


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_killed_fifteen_times():
    done = run_script("kill_training.py", "--rounds", "15")
    assert done.returncode == 0, done.stderr
    assert "killed 15 times; the bits are the same" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_killed_ten_times_while_threads_read_photos():
    done = run_script("kill_training.py", "--photos", "--rounds", "10")
    assert done.returncode == 0, done.stderr
    assert "killed 10 times; the bits are the same" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_what_was_saved():
    done = run_script("kill_training.py", "--full-disk")
    assert done.returncode == 0, done.stderr
    assert "The last saved state is intact" in done.stdout
    assert "bytes free" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT for one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_after_the_step_in_progress(number, tmp_path, undisturbed):
    """And the run goes on from there. (Signals reach the main thread, so a process of its own.)"""
    code = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(HERE)!r})
from small_training import CONFIG, DATA, HELD_OUT, RECIPE
from pvt_ref.train import fit
from pvt_ref.train import loop
loop.draw_curves = lambda *_: None
inner = loop.train_step
def step(state, *rest):
    if state.step == 6:
        os.kill(os.getpid(), {int(number)})
    return inner(state, *rest)
loop.train_step = step
before = signal.getsignal(signal.SIGINT)
done = fit(CONFIG, RECIPE, DATA, HELD_OUT, {str(tmp_path)!r}, log_steps=1)
print(done.finished, done.state.step, signal.getsignal(signal.SIGINT) == before)
"""
    done = run_script("-c", code)
    assert done.stdout.split() == ["False", "7", "True"], done.stderr
    assert saved(tmp_path).step == 7
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, resume=True, log_steps=1)
    assert fingerprint(saved(tmp_path)) == fingerprint(saved(undisturbed))


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT for one process")
def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
from small_training import CONFIG, DATA, HELD_OUT, RECIPE
from pvt_ref.train import fit
from pvt_ref.train import loop
loop.draw_curves = lambda *_: None
inner = loop.train_step
def step(state, *rest):
    if state.step == 6:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    return inner(state, *rest)
loop.train_step = step
before = signal.getsignal(signal.SIGINT)
try:
    fit(CONFIG, RECIPE, DATA, HELD_OUT, {str(tmp_path)!r})
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGINT) == before)
"""
    done = run_script("-c", code)
    assert done.stdout.split() == ["interrupted", "True"], done.stderr
    assert saved(tmp_path).step == 4  # of the last epoch


def test_equal_accuracy_keeps_the_earlier_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *_: (1.0, 0.5))
    done = fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path)
    assert (done.state.best_epoch, done.state.best_accuracy) == (1, 0.5)


def test_the_epochs_line_is_there_before_the_state_that_knows_of_it(tmp_path, monkeypatch):
    def save_and_look(path, state, run):
        lines = read_metrics(tmp_path / "metrics.jsonl") if state.step else []
        assert len([line for line in lines if "held_out_loss" in line]) == state.step // 4
        save_state(path, state, run)

    monkeypatch.setattr(loop, "save_state", save_and_look)
    assert fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path).finished


def test_it_saves_when_the_time_has_come(tmp_path, monkeypatch):
    """With a clock that goes ten seconds a look, and once in between for each save."""
    steps = []
    inner = loop.save_state
    monkeypatch.setattr(
        loop,
        "save_state",
        lambda path, state, run: steps.append(state.step) or inner(path, state, run),
    )
    clock = itertools.count(0, 10)
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    recipe = dataclasses.replace(RECIPE, epochs=1, warmup_epochs=1, batch_size=2, accumulate=1)
    fit(CONFIG, recipe, DATA, HELD_OUT, tmp_path, save_seconds=25)  # 13 steps
    assert steps == [0, 3, 6, 9, 12, 13]


def test_the_clock_of_the_bar_leaves_the_evaluation_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    shown = progress.Progress(None, 10, 0)
    line = {"epoch": 1, "train_loss": 1, "train_accuracy": 1, "held_out_loss": 1}
    for _ in range(5):
        now[0] += 2
        shown.step(StepReport(1.0, 3, 0.1, 1.0), batch_size=8, answers=8)
        now[0] += 100
        shown.epoch(line | {"held_out_accuracy": 1, "best_accuracy": 1, "images_per_second": 1})
    assert shown.images_per_second == pytest.approx(4)


def test_the_seed_says_the_first_weights(tmp_path):
    firsts = []
    for seed in (5, 6):
        recipe = dataclasses.replace(RECIPE, seed=seed)
        done = fit(CONFIG, recipe, DATA, HELD_OUT, tmp_path / str(seed), stop_at_step=0)
        firsts.append(to_state_dict(done.state.params))
        expected = init_params(CONFIG, np.random.default_rng([seed, 1]))
        assert all(np.array_equal(x, firsts[-1][k]) for k, x in to_state_dict(expected).items())
    assert not np.array_equal(firsts[0]["head.weight"], firsts[1]["head.weight"])


def test_it_also_runs_beside_the_main_thread(tmp_path):
    done = []
    thread = threading.Thread(
        target=lambda: done.append(fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, stop_at_step=1))
    )
    thread.start()
    thread.join()
    assert done[0].state.step == 1


# What a run leaves behind -------------------------------------------------------------------------


def test_the_folder_of_a_run(undisturbed):
    assert {p.name for p in undisturbed.iterdir()} == {STATE, BEST, "metrics.jsonl", CURVES}
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, LAST + 1))
    epochs = [line for line in lines if "held_out_accuracy" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert all(0 <= line["train_accuracy"] <= 1 for line in epochs)
    for line in lines:
        assert line["lr"] == RECIPE.learning_rate(line["step"] - 1, 4)
    for line in epochs:  # 24 samples an epoch, three are left over
        assert round(line["train_accuracy"] * 24, 9).is_integer()
    assert epochs[-1]["train_accuracy"] == saved(undisturbed).epoch_hits / 24
    best = max(line["held_out_accuracy"] for line in epochs)
    model = pvt_ref.load(undisturbed / BEST)
    assert model.info.preprocessing == DATA.preprocessing
    assert epochs[-1]["best_accuracy"] == best == saved(undisturbed).best_accuracy
    # what is kept is what did best
    loss, accuracy = pvt_ref.train.evaluate(model.params, model.config, HELD_OUT)
    chosen = epochs[saved(undisturbed).best_epoch - 1]
    assert (loss, accuracy) == (chosen["held_out_loss"], chosen["held_out_accuracy"])
    assert (undisturbed / CURVES).read_bytes().startswith(b"\x89PNG")


def test_metrics_of_steps_that_were_not_saved_are_dropped(tmp_path):
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, stop_at_step=3, log_steps=1)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 99.0}) + '\n{"step": 5, "lo')
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, resume=True, stop_at_step=5, log_steps=1)
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[3].get("loss") != 99.0


def test_a_person_sees_how_it_goes(tmp_path):
    with (tmp_path / "seen").open("w+") as file:
        console = Console(file=file, force_terminal=True, width=160)
        fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "run", console=console)
        file.seek(0)
        seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.read())
    assert re.search(r"12/12 .*loss \d\.\d+  acc \d\.\d+  [\d,]+ images/s .*left", seen)
    assert re.search(r"epoch   3  loss \d.* held out: .* \(best", seen)


def test_first_weights_can_be_given(tmp_path):
    params = random_params(CONFIG, 8, np.float32)
    done = fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, first=params, stop_at_step=1)
    expected, _ = train_step(start_training(params, len(DATA), RECIPE.seed), DATA, CONFIG, RECIPE)
    assert fingerprint(done.state) == fingerprint(expected)


# Bad input ----------------------------------------------------------------------------------------


def test_a_folder_in_use_is_not_overwritten(undisturbed):
    with pytest.raises(TrainingError, match="holds a training already"):
        fit(CONFIG, RECIPE, DATA, HELD_OUT, undisturbed)


def test_there_must_be_something_to_go_on_with(tmp_path):
    with pytest.raises(MissingFileError, match="without --resume"):
        fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, resume=True)


def test_another_run_is_not_continued(undisturbed):
    config = dataclasses.replace(CONFIG, drop_path_rate=0.1)
    recipe = dataclasses.replace(RECIPE, lr=1e-3, epochs=5)
    message = r"(?s)config.drop_path_rate is 0.3 there and 0.1 here.*recipe.epochs is 3 there and 5"
    with pytest.raises(TrainingError, match=message):
        fit(config, recipe, DATA, HELD_OUT, undisturbed, resume=True)
    with pytest.raises(TrainingError, match=r"data\.sha256"):
        fit(CONFIG, RECIPE, stripes(27, 9), HELD_OUT, undisturbed, resume=True)
    for part in ("images", "labels"):  # one pixel, one label
        changed = getattr(DATA, part).copy()
        changed.flat[5] = 2 - changed.flat[5] % 2
        other = dataclasses.replace(DATA, **{part: changed})
        with pytest.raises(TrainingError, match=r"data\.sha256"):
            fit(CONFIG, RECIPE, other, HELD_OUT, undisturbed, resume=True)
    with pytest.raises(TrainingError, match=r"held_out\.sha256"):
        fit(CONFIG, RECIPE, DATA, stripes(9, 9), undisturbed, resume=True)


def test_labels_out_of_range_and_other_devices(tmp_path):
    wrong = pvt_ref.train.LabelledImages(DATA.images, DATA.labels + 1, DATA.preprocessing)
    with pytest.raises(TrainingError, match="held out: labels run from 1 to 3"):
        fit(CONFIG, RECIPE, DATA, wrong, tmp_path / "run")
    for device in ("tpu", "cuda:1"):
        with pytest.raises(DeviceError, match=f"device is '{device}'"):
            fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "run", device=device)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be made"):
        fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"info": ModelInfo(classes=("a", "b"))}, ConfigError, "info names 2 classes"),
        ({"first": random_params(OTHER, 0)}, ShapeError, "do not belong to this config"),
        ({"log_steps": 0}, RangeError, "log_steps is 0"),
        ({"save_seconds": math.nan}, RangeError, "save_seconds is nan"),
        ({"stop_at_step": -1}, RangeError, "stop_at_step is -1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(options, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_backbone_and_unlike_preparations_are_refused(tmp_path):
    backbone = dataclasses.replace(CONFIG, num_classes=0)
    with pytest.raises(ConfigError, match="bare backbone"):
        fit(backbone, RECIPE, DATA, HELD_OUT, tmp_path)
    other = dataclasses.replace(HELD_OUT, preprocessing=pvt_ref.Preprocessing("L", (0.1,), (1,)))
    with pytest.raises(TrainingError, match="prepared alike"):
        fit(CONFIG, RECIPE, DATA, other, tmp_path)


@pytest.mark.parametrize("name", [BEST, "metrics.jsonl"])
def test_results_of_a_run_whose_state_was_deleted_are_not_overwritten(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(TrainingError, match=f"holds a training already .{name}"):
        fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_no_training_ends_for_want_of_a_picture(tmp_path, capsys):
    (tmp_path / CURVES).mkdir()  # so it cannot be written
    with (tmp_path / "seen").open("w+") as file:
        done = fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, console=Console(file=file, width=300))
        file.seek(0)
        assert "curves.png could not be written" in file.read()
    assert done.finished
    (tmp_path / CURVES).rmdir()
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, resume=True)  # nothing is left to do but this
    assert (tmp_path / CURVES).is_file()


def test_what_a_killed_process_left_is_swept_up(tmp_path):
    (tmp_path / ".0123456789abcdef.tmp").write_text("half of a state")
    (tmp_path / ".mine.tmp").write_text("somebody's")
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, stop_at_step=1)
    assert [p.name for p in tmp_path.glob(".*")] == [".mine.tmp"]


def test_a_damaged_state_is_refused(tmp_path):
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, stop_at_step=1)
    whole = (tmp_path / STATE).read_bytes()
    for place in rng_of(2).integers(8, len(whole), 40).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises((CheckpointError, TrainingError)):
            saved(tmp_path)
    (tmp_path / STATE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        saved(tmp_path)
    (tmp_path / STATE).write_bytes(whole)
    saved(tmp_path)


def test_a_state_is_no_model_and_says_so(undisturbed):
    with pytest.raises(CheckpointError, match=r"saved state of a training.* best\.safetensors"):
        pvt_ref.load(undisturbed / STATE)


def test_divergence_stops_with_step_rate_and_layer(tmp_path):
    key = "block2.0.mlp.fc1.weight"
    params = map_named(
        lambda k, x: np.full_like(x, 3e38) if k == key else x,
        init_params(CONFIG, rng_of(1), np.float32),
    )
    message = r"at step 1 \(epoch 1\), with learning rate 0.00075. .*block2.0.mlp.fc1 \(linear\)"
    with pytest.raises(TrainingError, match=message):
        fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, first=params)
    assert saved(tmp_path).step == 0


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_weights_that_overflow_are_neither_saved_nor_measured(clip_norm, tmp_path):
    recipe = dataclasses.replace(
        without_chance(RECIPE), lr=1e38, warmup_epochs=0, clip_norm=clip_norm, batch_size=27
    )
    with pytest.raises(TrainingError, match=r"with learning rate 1e\+38\. The first .* finite is"):
        fit(CONFIG, recipe, DATA, HELD_OUT, tmp_path)
    config_and_run = CONFIG, describe_run(CONFIG, recipe, DATA, HELD_OUT)
    kept = load_state(tmp_path / STATE, *config_and_run, like=np.empty(0))
    assert kept.step == 0
    assert not (tmp_path / BEST).exists()


def test_a_loss_beyond_all_numbers_on_what_is_held_out_is_called_so(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1, warmup_epochs=0, lr=1e-30, lr_floor=0)
    first = map_named(
        lambda k, x: np.full_like(x, 3e38) if k == "head.bias" else x,
        init_params(CONFIG, rng_of(1)),
    )
    first.head.bias[0] *= -1
    easy = stripes(27, 3)  # all of a class whose logit is finite and largest
    easy = dataclasses.replace(easy, labels=np.ones(27, int))
    hard = dataclasses.replace(HELD_OUT, labels=np.zeros(9, int))
    recipe = dataclasses.replace(recipe, label_smoothing=0.0, mixup_alpha=0.0)
    with pytest.raises(TrainingError, match=r"loss on what is held out is inf at step 4 .epoch 1"):
        fit(CONFIG, recipe, easy, hard, tmp_path, first=first)


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    """What a power cut would show: the content must be on the disk before the name points to it."""
    events = []
    for name in ("fsync", "replace"):
        inner = getattr(os, name)

        def note(*args, name=name, inner=inner):
            kind = (
                "of a folder" if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode) else ""
            )
            events.append(f"{name} {kind}".strip())
            return inner(*args)

        monkeypatch.setattr(os, name, note)
    write_whole(tmp_path / "x", b"1")
    assert events == ["fsync", "replace", "fsync of a folder"]
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "x", b"2")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"1"


def interrupt(*_):
    raise KeyboardInterrupt


def test_gradients_too_large_for_their_squares_are_called_so():
    params = map_named(
        lambda k, x: x * 1e21 if k == "head.weight" else x, random_params(CONFIG, 2, np.float32)
    )
    recipe = dataclasses.replace(RECIPE, clip_norm=None)
    with pytest.raises(TrainingError, match=r"norm of the gradients is .* squares are too large"):
        train_step(start_training(params, len(DATA), seed=0), DATA, CONFIG, recipe)
    train_step(start_training(params, len(DATA), seed=0), DATA, CONFIG, RECIPE)  # clipped: fine


def test_info_goes_with_the_best_weights(tmp_path):
    info = ModelInfo(title="stripes", classes=("across", "along", "none"))
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, info=info)
    model = pvt_ref.load(tmp_path / BEST)
    assert model.classes == ("across", "along", "none")
    picture = DATA.images[0, 0]
    (answer,) = model.predict([picture], top=1)
    assert answer[0].label in model.classes


def test_without_matplotlib_there_is_no_picture(drawn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path, stop_at_step=4)
    assert not (tmp_path / CURVES).exists()
    assert (tmp_path / "metrics.jsonl").exists()
