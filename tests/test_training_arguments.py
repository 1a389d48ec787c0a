"""Wrong arguments to everything in pvt_ref.train give this project's errors, and nothing else."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import CONFIG, DATA, HELD_OUT, RECIPE
from strategies import random_params, rng_of

import pvt_ref.train
from pvt_ref import ModelInfo
from pvt_ref.checks import check_number
from pvt_ref.errors import ArrayTypeError, PVTError, RangeError, ShapeError, TrainingError
from pvt_ref.train import (
    AdamW,
    Options,
    PairAugment,
    PhotoAugment,
    SegmentationRecipe,
    adamw_init,
    adamw_step,
    ema_step,
    fit,
    start_training,
    train_step,
)
from pvt_ref.train.checks import check_path
from pvt_ref.train.data_parallel import ALONE
from pvt_ref.train.saved import describe_run

PARAMS = random_params(CONFIG, 0, np.float32)
WIDER = random_params(CONFIG, 0, np.float64)
OTHER = random_params(dataclasses.replace(CONFIG, depths=(1, 1, 1, 1)), 0, np.float32)
STATE = start_training(PARAMS, len(DATA), 0)
RUN = describe_run(CONFIG, RECIPE, DATA, HELD_OUT)

#: Whatever a person could put in the place of something else.
NONSENSE: list[Any] = [
    None,
    True,
    -1,
    2.5,
    10**400,
    math.nan,
    -math.inf,
    "",
    "x\x1b[31m",
    "nul\0",
    "half \ud800",
    "7" * 5000,
    b"bytes",
    [],
    [[1, 2], [3]],
    (),
    {},
    {"a": 1},
    object(),
    print,
    int,
    np.float32(0.5),
    np.array(1.0),
    np.arange(3),
    np.array(["x"]),
    np.ma.masked_array([1.0], [True]),
    torch.zeros(2),
    1j,
    range(3),
    PARAMS,
    WIDER,
    OTHER,
    STATE,
    CONFIG,
    RECIPE,
    DATA,
]


SCHEDULE = {"step": 1, "total_steps": 9, "warmup_steps": 2, "peak": 1.0, "floor": 0.1}


def right(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Arguments that are right, by function."""
    path = tmp_path / "file"
    return {
        "AdamW": {"beta1": 0.9, "beta2": 0.9, "eps": 1.0, "weight_decay": 0.1}
        | {"decay_positions": True},
        "PairAugment": PairAugment().to_dict(),
        "PhotoAugment": PhotoAugment().to_dict(),
        "Recipe": RECIPE.to_dict(),
        "SegmentationRecipe": SegmentationRecipe(epochs=2, batch_size=4, accumulate=2).to_dict(),
        "adamw_init": {"params": PARAMS},
        "adamw_step": {"params": PARAMS, "grads": PARAMS, "state": adamw_init(PARAMS)}
        | {"lr": 0.1, "settings": AdamW(), "factors": {"head.bias": 0.5}},
        "add_gradients": {"total": PARAMS, "grads": PARAMS, "share": 0.5},
        "class_iou": {"counts": np.eye(3, dtype=int)},
        "clip_by_global_norm": {"grads": PARAMS, "max_norm": 1.0},
        "config_of_epoch": {"config": CONFIG, "epoch": 1, "ramp_epochs": 2},
        "count_pixels": {"answers": np.arange(3), "labels": np.arange(3), "num_classes": 3}
        | {"ignored": 255},
        "draw_curves": {"metrics": path, "picture": tmp_path / "x.png"},
        "drop_path_of_epoch": {"epoch": 1, "peak": 0.5, "ramp_epochs": 2},
        "ema_decay_of_step": {"step": 1, "decay": 0.5},
        "ema_step": {"average": PARAMS, "params": PARAMS, "decay": 0.5},
        "first_non_finite": {"tree": PARAMS, "images": DATA.batch(slice(0, 2), PARAMS.pos_embed1)}
        | {"config": CONFIG, "rng": rng_of(0)},
        "fit": {"config": CONFIG, "recipe": RECIPE, "data": DATA, "held_out": HELD_OUT}
        | {"folder": tmp_path / "run", "info": ModelInfo(), "first": PARAMS, "resume": False}
        | {"device": "cpu", "save_seconds": 1.0, "log_steps": 1, "stop_at_step": 0}
        | {"workers": None, "console": None, "ranks": ALONE, "ops": None},
        "draw_confusion": {"counts": np.eye(3), "classes": "abc", "picture": tmp_path / "y.png"},
        "Options": {"weights": None, "variant": "pvt_v2_b0", "size": 32, "augment": None}
        | {"class_names": None, "recipe": {"epochs": 1}, "damaged": None},
        "train_folder": {"data": tmp_path / "none", "out": tmp_path / "run", "options": Options()}
        | {"config": None, "resume": False, "device": "cpu", "workers": None, "console": None}
        | {"stop_at_step": 0, "ranks": ALONE, "ops": None},
        "global_norm": {"grads": PARAMS},
        "is_decayed": {"key": "pos_embed1", "x": PARAMS.pos_embed1, "decay_positions": False},
        "learning_rate_factors": {"config": CONFIG, "layer_decay": 0.5, "frozen": ("block1",)},
        "load_state": {"path": path, "config": CONFIG, "run": RUN, "like": np.empty(0)},
        "mean_iou": {"counts": np.eye(3, dtype=int)},
        "pixel_accuracy": {"counts": np.eye(3, dtype=int)},
        "read_metrics": {"path": path},
        "save_state": {"path": path, "state": STATE, "run": RUN},
        "start_training": {"params": PARAMS, "samples": 27, "seed": 0},
        "train_step": {"state": STATE, "data": DATA, "config": CONFIG, "recipe": RECIPE}
        | {"ranks": ALONE, "ops": None},
        **dict.fromkeys(("warmup_cosine", "warmup_poly"), SCHEDULE),
    }


RECORDS = {
    "AdamWState",
    "LossScale",
    "Run",
    "StepReport",
    "TrainState",
}  # made by the functions, seen by them
#: Of samples and their augmentation, which other tests look at.
ELSEWHERE = {"LabelledImages", "cutmix", "cutout", "evaluate", "mixup", "one_hot"} | {
    *("random_crop", "random_erasing", "random_flip", "ImageFolder", "confusion_matrix"),
    *("LabelledPairs", "evaluate_pixels"),
}


def test_the_catalogue_is_whole(tmp_path):
    functions = right(tmp_path)
    assert set(pvt_ref.train.__all__) == set(functions) | RECORDS | ELSEWHERE
    for name, arguments in functions.items():
        expected = inspect.signature(getattr(pvt_ref.train, name)).parameters
        assert list(expected) == list(arguments), name


NAMES = sorted(set(pvt_ref.train.__all__) - RECORDS - ELSEWHERE)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_give_this_projects_errors(name, tmp_path, monkeypatch):
    """One argument at a time. (A few of the values are right for some arguments.)"""
    monkeypatch.chdir(tmp_path)
    function: Callable[..., Any] = getattr(pvt_ref.train, name)
    tried, messages = 0, []
    for argument in right(tmp_path)[name]:
        for value in NONSENSE:
            folder = tmp_path / f"{argument}{tried}"
            folder.mkdir()
            arguments = right(folder)[name] | {argument: value}
            tried += 1
            try:
                function(**arguments)
            except PVTError as error:
                messages.append(str(error))
            except BaseException as error:
                pytest.fail(f"{argument}={str(value)[:60]!a}: {type(error).__name__}: {error}")
    assert len(messages) > 0.6 * tried
    assert not any("\x1b" in message or len(message) > 5000 for message in messages)


@pytest.mark.parametrize("place", ["grads", "m", "v"])
def test_trees_of_other_models_are_refused_rather_than_broadcast(place):
    for wrong, kind in ((OTHER, ShapeError), (WIDER, ArrayTypeError)):
        trees = {name: wrong if name == place else PARAMS for name in ("grads", "m", "v")}
        state = dataclasses.replace(adamw_init(PARAMS), m=trees["m"], v=trees["v"])
        with pytest.raises(kind, match=rf"in {place}|{place} and params|state\.{place}"):
            adamw_step(PARAMS, trees["grads"], state, 0.1, AdamW())
    with pytest.raises(ShapeError, match=r"only params has block2\.1"):
        ema_step(OTHER, PARAMS, 0.5)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"step": -1}, RangeError, "state.step is -1"),
        ({"seed": -1}, RangeError, "state.seed is -1"),
        ({"seed": None}, RangeError, "state.seed is None"),
        ({"samples": 0}, RangeError, "state.samples is 0"),
        ({"samples": 26}, ShapeError, "a training on 26 samples; data has 27"),
        ({"optimizer": None}, ArrayTypeError, "state.optimizer is a NoneType"),
        ({"average": OTHER}, ShapeError, "average and params"),
        ({"epoch_hits": 28}, RangeError, "state.epoch_hits is 28"),
    ],
)
def test_a_state_that_no_training_leaves_is_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        train_step(dataclasses.replace(STATE, **change), DATA, CONFIG, RECIPE)


def test_images_are_not_moved_out_of_sight(tmp_path):
    recipe = dataclasses.replace(RECIPE, crop_padding=17)
    with pytest.raises(RangeError, match="crop_padding is 17, and images have 16 a side"):
        train_step(STATE, DATA, CONFIG, recipe)
    with pytest.raises(RangeError, match="crop_padding is 17"):
        fit(CONFIG, recipe, DATA, HELD_OUT, tmp_path)
    with pytest.raises(RangeError, match="crop_padding is 100000"):
        dataclasses.replace(RECIPE, crop_padding=100_000)


def test_labels_that_are_no_classes_are_refused_with_mixup_too():
    """One-hot, such a label would be a row of zeros, which learns nothing and says nothing."""
    data = dataclasses.replace(DATA, labels=DATA.labels + 1)
    with pytest.raises(TrainingError, match="labels run from 1 to 3"):
        train_step(STATE, data, CONFIG, RECIPE)


def test_numbers_are_taken_as_they_are_or_refused():
    for value in (5, np.int8(5), np.uint64(5)):
        assert type(check_number("x", value, whole=True)) is int
    for value in (0.5, np.float32(0.5), 1):
        assert type(check_number("x", value)) is float
    seed = np.random.SeedSequence().entropy
    assert check_number("seed", seed, whole=True) == seed  # 128 bits
    for value in (10**400, "7" * 5000, math.inf, True, 2**129):
        with pytest.raises(RangeError, match=r"x is .{1,90}; it must be"):
            check_number("x", value, whole=True)
    with pytest.raises(RangeError):
        check_number("x", 10**400)


def test_paths_that_no_file_can_have(tmp_path):
    assert check_path("path", str(tmp_path)) == tmp_path
    for value in ("", "a\0", "half \ud800", "x" * 5000):
        with pytest.raises(TrainingError, match=r"path is '.*, which no file"):
            check_path("path", value)
    with pytest.raises(TrainingError, match="cannot be made"):
        fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / ("x" * 300))
