"""Trainings of segmentation networks: learnt by heart, broken off, resumed, shared, refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeness import assert_near
from hypothesis import given
from hypothesis import strategies as st
from segmentors import PVT, SEGMENTORS, params_of
from small_pairs import AUGMENT, CLASSES, COLOURS, CONFIG, RECIPE, VOID, pairs, write_pairs
from small_training import CONFIG as CLASSIFIER
from small_training import DATA as IMAGES
from small_training import RECIPE as IMAGE_RECIPE
from strategies import rng_of
from test_data_parallel import MPI, run, same

import pvt_ref
from pvt_ref import ModelInfo, init_params
from pvt_ref.api import batch_buffers, forward_with_cache, with_buffers
from pvt_ref.data.iou import count_pixels, mean_iou, pixel_accuracy
from pvt_ref.data.pairs import LabelledPairs
from pvt_ref.data.preprocessing import IMAGENET, Preprocessing
from pvt_ref.dense import resize_logits
from pvt_ref.draws import Draws, What, generator
from pvt_ref.errors import (
    ArrayTypeError,
    CheckpointError,
    ImageError,
    RangeError,
    ShapeError,
    TrainingError,
)
from pvt_ref.models.architecture import buffer_keys, count_keys
from pvt_ref.models.segmentor.config import SemanticFPNHead
from pvt_ref.train import (
    draw_curves,
    ema_decay_of_step,
    fit,
    learning_rate_factors,
    read_metrics,
    start_training,
    train_step,
)
from pvt_ref.train.loop import BEST, CURVES, METRICS
from pvt_ref.train.recipe import Recipe, SegmentationRecipe
from pvt_ref.train.schedule import config_of_epoch, warmup_poly
from pvt_ref.train.segmentation import evaluate_pixels
from pvt_ref.train.step import batch_of_step, draw_batch
from pvt_ref.tree import named_arrays, without_buffers

STEPS = 2  # an epoch: 10 scenes in batches of 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_pairs(root / "learnt", 10)
    write_pairs(root / "held_out", 3, seed=1)
    return root


@pytest.fixture
def data(scenes):
    return pairs(scenes / "learnt", whole=(24, 48), augment=AUGMENT)


@pytest.fixture
def held_out(scenes):
    return pairs(scenes / "held_out")


# Learning -----------------------------------------------------------------------------------------


def test_four_frames_are_learnt_by_heart(tmp_path):
    data = pairs(write_pairs(tmp_path, 4), (48, 64))
    config = dataclasses.replace(
        CONFIG,
        backbone=dataclasses.replace(PVT, embed_dims=(8, 16, 12, 8), drop_path_rate=0.0),
        head=SemanticFPNHead(neck_channels=12, channels=12, drop_rate=0.0),
    )
    recipe = SegmentationRecipe(
        epochs=110, batch_size=4, lr=1e-2, lr_floor=1e-4, warmup_epochs=5, ema_decay=0.0,
        weight_decay=0.0,
    )  # fmt: skip
    state = start_training(init_params(config, rng_of(2)), 4, seed=0)
    for _ in range(recipe.epochs):
        state, _ = train_step(state, data, config, recipe)
    _, counts = evaluate_pixels(state.params, config, data)
    assert pixel_accuracy(counts) > 0.95
    assert mean_iou(counts) > 0.8


@pytest.mark.parametrize("name", ["pvt_v2", "linear", "naive", "pup"])
def test_every_network_trains_is_saved_and_goes_on(name, data, held_out, tmp_path):
    config = SEGMENTORS[name]
    recipe = dataclasses.replace(RECIPE, epochs=1)
    whole = fit(config, recipe, data, held_out, tmp_path / "whole", log_steps=1)
    assert whole.finished
    fit(config, recipe, data, held_out, tmp_path / "cut", log_steps=1, stop_at_step=1)
    fit(config, recipe, data, held_out, tmp_path / "cut", log_steps=1, resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert pvt_ref.load(tmp_path / "whole" / BEST).config == config


# The same bits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    data = pairs(scenes / "learnt", whole=(24, 48), augment=AUGMENT)
    done = fit(CONFIG, RECIPE, data, pairs(scenes / "held_out"), folder, log_steps=1, workers=1)
    assert done.finished
    assert done.state.step == RECIPE.epochs * STEPS
    return folder


@pytest.mark.parametrize("stops", [(1,), (2, 3), (5,)], ids=str)
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    stops, undisturbed, data, held_out, tmp_path
):
    for number, stop in enumerate([*stops, None]):
        done = fit(
            CONFIG, RECIPE, data, held_out, tmp_path, log_steps=1, stop_at_step=stop,
            resume=number > 0,
        )  # fmt: skip
        assert done.finished == (stop is None)
    assert same(tmp_path, undisturbed)


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_change_no_bit(workers, undisturbed, data, held_out, tmp_path):
    fit(CONFIG, RECIPE, data, held_out, tmp_path, log_steps=1, workers=workers)
    assert same(tmp_path, undisturbed)


@MPI
def test_ranks_change_no_bit(scenes, tmp_path):
    script = Path(__file__).parent / "mpi_segmentation.py"
    for ranks in (0, 2):
        done = run(ranks, script, tmp_path / str(ranks), scenes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 4") == max(ranks, 1)
    assert same(tmp_path / "0", tmp_path / "2")


def test_a_run_that_is_another_is_not_resumed(undisturbed, data, held_out, tmp_path):
    folder = tmp_path / "run"
    fit(CONFIG, RECIPE, data, held_out, folder, stop_at_step=1)
    for changes, says in (
        ({"class_weights": (1.0, 1.0, 1.0, 1.0)}, "recipe.class_weights is"),
        ({"loss_mean": "all"}, "recipe.loss_mean is 'counted' there and 'all' here"),
        ({"schedule": "cosine"}, "recipe.schedule is 'poly' there and 'cosine' here"),
    ):
        recipe = dataclasses.replace(RECIPE, **changes)
        with pytest.raises(TrainingError, match=says):
            fit(CONFIG, recipe, data, held_out, folder, resume=True)
    other = dataclasses.replace(CONFIG, head=SemanticFPNHead(neck_channels=6, channels=4))
    with pytest.raises(TrainingError, match=r"config\.head is"):
        fit(other, RECIPE, data, held_out, folder, resume=True)
    fit(CONFIG, RECIPE, data, held_out, folder, resume=True, log_steps=1)


# Running statistics -------------------------------------------------------------------------------


def first_state(config=CONFIG, samples: int = 10, dtype: Any = np.float64):
    return start_training(init_params(config, rng_of(4), dtype), samples, seed=RECIPE.seed)


def test_running_statistics_take_one_micro_batch_after_the_other(data):
    """All forwards of a step begin with the same weights, and the statistics move in order."""
    recipe = dataclasses.replace(RECIPE, accumulate=3)
    state = first_state()
    after, _ = train_step(state, data, CONFIG, recipe)
    config = config_of_epoch(CONFIG, 0, recipe.drop_path_ramp_epochs)
    epoch, chosen = batch_of_step(state.seed, 0, len(data), recipe)
    params = state.params
    for number, part in enumerate(np.array_split(chosen, 3)):
        draws = Draws(state.seed, 0, number)
        images, _ = draw_batch(params, data, part, config, recipe, epoch, draws)
        _, cache = forward_with_cache(state.params, images, config, draws, batch_statistics=True)
        params = with_buffers(params, batch_buffers(cache))
    found = dict(named_arrays(after.params.buffers))
    for key, x in named_arrays(params.buffers):
        np.testing.assert_array_equal(found[key], x, err_msg=key)
    counts = [x for key, x in found.items() if key in count_keys(CONFIG)]
    assert [int(x) for x in counts] == [3] * 7


def test_running_statistics_are_averaged_and_have_no_moments(data):
    state = first_state()
    average = dict(named_arrays(state.average))
    for step in range(3):
        state, _ = train_step(state, data, CONFIG, RECIPE)
        decay = ema_decay_of_step(step, RECIPE.ema_decay)
        for key, x in named_arrays(state.params):
            if key in count_keys(CONFIG):
                average[key] = x
            else:
                average[key] = decay * average[key] + (1 - decay) * x
    found = dict(named_arrays(state.average))
    assert found.keys() == average.keys()
    for key, x in found.items():
        np.testing.assert_allclose(x, average[key], rtol=1e-12, atol=1e-15, err_msg=key)
        assert x.dtype == average[key].dtype
    assert state.optimizer.m.buffers is state.optimizer.v.buffers is None
    moved = dict(named_arrays(state.params.buffers))
    assert any(np.abs(moved[key]).max() > 0.01 for key in moved if key.endswith("mean"))


def test_what_is_saved_has_them(undisturbed, data, held_out):
    best = pvt_ref.load(undisturbed / BEST)
    line = read_metrics(undisturbed / METRICS)[-1]
    loss, counts = evaluate_pixels(best.params, CONFIG, held_out)
    lines = [x for x in read_metrics(undisturbed / METRICS) if "held_out_miou" in x]
    measured = lines[line["best_epoch"] - 1]
    assert measured["held_out_loss"] == loss
    assert measured["held_out_miou"] == line["best_miou"] == mean_iou(counts)
    counted = {int(x) for k, x in named_arrays(best.params) if k in count_keys(CONFIG)}
    assert counted == {line["best_epoch"] * STEPS * RECIPE.accumulate}
    fresh = init_params(CONFIG, rng_of(0))
    keys = buffer_keys(CONFIG) - count_keys(CONFIG)
    old, new = (dict(named_arrays(p)) for p in (fresh, best.params))
    assert all((old[key] != new[key]).any() for key in keys)


def test_frozen_weights_stay_and_running_statistics_move(data):
    recipe = dataclasses.replace(RECIPE, frozen=("backbone", "neck"))
    state = first_state()
    after, _ = train_step(state, data, CONFIG, recipe)
    old, new = (dict(named_arrays(s.params)) for s in (state, after))
    changed = {key for key in old if (old[key] != new[key]).any()}
    assert changed == {key for key in old if key.startswith("decode_head.")}
    factors = learning_rate_factors(CONFIG, 0.5)
    assert factors.keys() == dict(named_arrays(without_buffers(state.params))).keys()
    assert {factors[k] for k in factors if k.startswith(("neck", "decode_head"))} == {1}
    assert factors["backbone.patch_embed1.proj.weight"] == 0.5**6
    assert factors["backbone.block4.0.mlp.fc2.bias"] == 0.5
    with pytest.raises(TrainingError, match="no key of the model is that, or begins so"):
        learning_rate_factors(CONFIG, 1.0, ["decode_head.scale_heads.0.0.bn.running_mean"])


def test_position_tables_and_vectors_of_a_backbone_are_not_decayed(data):
    for name in ("pvt", "naive"):
        config = SEGMENTORS[name]
        state = first_state(config)
        recipe = dataclasses.replace(RECIPE, weight_decay=0.0)
        plain, _ = train_step(state, data, config, recipe)
        decayed, report = train_step(
            state, data, config, dataclasses.replace(recipe, weight_decay=0.5)
        )
        old, a, b = (dict(named_arrays(s.params)) for s in (state, plain, decayed))
        for key, w in old.items():
            if key in buffer_keys(config):
                np.testing.assert_array_equal(a[key], b[key])
                continue
            matrix = w.ndim > 1 and "pos_embed" not in key and "cls_token" not in key
            expected = a[key] - (report.lr * 0.5 * w if matrix else 0)
            np.testing.assert_allclose(b[key], expected, rtol=1e-10, atol=1e-14, err_msg=key)


# What is learnt from, and how it is measured ------------------------------------------------------


def test_a_micro_batch_is_what_the_pairs_give(data):
    state = first_state(dtype=np.float32)
    images, labels = draw_batch(
        state.params, data, np.array([3, 7]), CONFIG, RECIPE, 2, Draws(RECIPE.seed, 9)
    )
    assert (images.shape, images.dtype) == ((2, 3, 32, 64), np.float32)
    assert (labels.shape, labels.dtype) == ((2, 32, 64), np.int64)
    drawn = data.drawn_pixels(np.array([3, 7]), RECIPE.seed, 2)
    np.testing.assert_array_equal(labels, drawn[:, 3])
    expected = drawn[:, :3].transpose(0, 2, 3, 1) / 255
    expected = (expected - IMAGENET.mean) / IMAGENET.std
    assert_near(images, expected.transpose(0, 3, 1, 2), 1e-6)


def test_epochs_are_measured_at_the_size_of_the_labels(held_out):
    params = params_of(CONFIG)
    loss, counts = evaluate_pixels(params, CONFIG, held_out)
    total, expected = 0.0, np.zeros((4, 4), int)
    for i in range(3):
        pixels, labels = held_out.pair(i)
        x = (pixels.transpose(1, 2, 0) / 255 - IMAGENET.mean) / IMAGENET.std
        logits = pvt_ref.forward(params, x.transpose(2, 0, 1)[None], CONFIG)
        full = resize_logits(logits, (32, 64), (24, 32))[0]
        valid = labels != 255
        log_p = full - np.log(np.exp(full).sum(axis=0))
        picked = np.take_along_axis(log_p, np.where(valid, labels, 0)[None].astype(int), 0)[0]
        total -= picked[valid].sum()
        expected += count_pixels(full.argmax(axis=0), labels, 4)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(loss, total / counts.sum(), rtol=1e-10)
    assert counts.sum() == 3 * 22 * 32  # the last two rows of a scene are void


def test_hits_and_losses_of_an_epoch_add_up(data):
    state = first_state()
    reports = []
    for _ in range(3):
        state, report = train_step(state, data, CONFIG, RECIPE)
        reports.append(report)
    assert state.epoch_hits == reports[2].hits  # the second epoch has begun
    assert state.epoch_loss == reports[2].loss
    assert 0 < reports[0].hits < 4 * 32 * 64
    assert all(math.isfinite(r.loss) and r.grad_norm > 0 for r in reports)


@given(
    st.integers(1, 10**5),
    st.floats(0, 1),
    st.integers(0, 300),
    st.floats(1e-6, 1),
    st.sampled_from([0.0, 1e-7]),
)
def test_poly_falls_as_mmcvs(total, done, warmup, peak, floor):
    step = min(int(done * total), total - 1)
    # mmcv: (base - min) (1 - progress / max)^power + min, times (cur + 1) / warmup before its end
    expected = (peak - floor) * (1 - step / total) ** 0.9 + floor
    expected *= min(1, (step + 1) / warmup) if warmup else 1
    assert warmup_poly(step, total, warmup, peak, floor) == pytest.approx(expected, rel=1e-12)


def test_poly_of_a_recipe():
    recipe = dataclasses.replace(RECIPE, epochs=40, lr=2e-4, warmup_epochs=0)
    assert recipe.learning_rate(0, 1000) == 2e-4
    assert recipe.learning_rate(20_000, 1000) == pytest.approx(2e-4 * 0.5**0.9)
    assert 0 < recipe.learning_rate(39_999, 1000) < 2e-8
    assert recipe.learning_rate(40_000, 1000) == 0
    assert warmup_poly(50_000, 40_000, 0, 1.0, 0.25) == 0.25
    warm = dataclasses.replace(recipe, warmup_epochs=2)
    assert warm.learning_rate(999, 1000) == pytest.approx(2e-4 * (1 - 999 / 40000) ** 0.9 / 2)
    cosine = dataclasses.replace(recipe, schedule="cosine")
    assert cosine.learning_rate(20_000, 1000) == pytest.approx(1e-4)
    assert Recipe(epochs=1, batch_size=1).schedule == "cosine"
    arguments: Any
    for arguments in ((-1, 5, 0, 1.0), (0, 5.5, 0, 1.0), (0, 5, -1, 1.0), (0, 5, 0, -1.0)):
        with pytest.raises(RangeError, match="it must be a"):
            warmup_poly(*arguments)


def test_an_evaluation_decodes_few_pictures_ahead(tmp_path, monkeypatch):
    data, pair, read, ahead = pairs(write_pairs(tmp_path, 12)), LabelledPairs.pair, [], []

    def counted(self, i):
        read.append(i)
        return pair(self, i)

    def looked_at(*given, **more):
        ahead.append(len(read) - len(ahead) - 1)  # this picture is no longer ahead
        return pvt_ref.forward(*given, **more)

    monkeypatch.setattr(LabelledPairs, "pair", counted)
    monkeypatch.setattr("pvt_ref.train.segmentation.forward", looked_at)
    evaluate_pixels(params_of(CONFIG), CONFIG, data)
    assert len(ahead) == 12
    assert max(ahead) <= 4


# Lines and pictures -------------------------------------------------------------------------------


def test_metrics_have_miou_and_epochs_are_compared_by_it(undisturbed):
    lines = read_metrics(undisturbed / METRICS)
    epochs = [line for line in lines if "held_out_miou" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    best = (-1.0, 0)
    for line in epochs:
        best = max(best, (line["held_out_miou"], line["epoch"]), key=lambda x: x[0])
        assert (line["best_miou"], line["best_epoch"]) == best
        assert "best_accuracy" not in line
        assert 0 < line["train_accuracy"] < 1
        assert 0 < line["held_out_accuracy"] < 1
    assert (undisturbed / CURVES).exists()
    state = json.loads((undisturbed / METRICS).read_text().splitlines()[-1])
    assert state == lines[-1]


def test_the_accuracy_of_a_training_is_of_all_its_pixels(data, scenes, tmp_path):
    whole = pairs(scenes / "held_out", size=(64, 64))  # crops are smaller than what is held out
    fit(CONFIG, RECIPE, data, whole, tmp_path, log_steps=1, stop_at_step=STEPS)
    (line,) = (x for x in read_metrics(tmp_path / METRICS) if "held_out_miou" in x)
    state, hits, loss = first_state_of(data), 0, 0.0
    for _ in range(STEPS):
        state, report = train_step(state, data, CONFIG, RECIPE)
        hits, loss = hits + report.hits, loss + report.loss
    assert line["train_accuracy"] == hits / (STEPS * 4 * 32 * 64)
    assert line["train_loss"] == loss / STEPS


def first_state_of(data):
    """Where a run of RECIPE begins."""
    first = init_params(CONFIG, generator(RECIPE.seed, What.FIRST_WEIGHTS))
    return start_training(first, len(data), RECIPE.seed)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"held_out_miou": 1.5}, "held_out_miou is 1.5"),
        ({"held_out_miou": "high"}, "held_out_miou is 'high'"),
        ({"best_miou": None}, "best_miou is None"),
    ],
)
def test_lines_that_no_run_writes_are_refused(changes, says, undisturbed, tmp_path):
    lines = read_metrics(undisturbed / METRICS)
    lines[-1] |= changes
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match=f"line {len(lines)}: {says}"):
        read_metrics(path)
    del lines[-1]["best_miou"]
    lines[-1] |= {"held_out_miou": 0.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match="the line of an epoch has no best_miou"):
        read_metrics(path)


def test_metrics_of_another_run_are_not_gone_on_with(data, held_out, tmp_path):
    fit(CONFIG, RECIPE, data, held_out, tmp_path, log_steps=1, stop_at_step=STEPS)
    path = tmp_path / METRICS
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[-1] |= {"held_out_miou": 0.999, "best_miou": 0.999}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match=r"the last best_miou is 0.999, and .* in the saved"):
        fit(CONFIG, RECIPE, data, held_out, tmp_path, resume=True)


def test_curves_show_both_scores(drawn, undisturbed, tmp_path):
    draw_curves(undisturbed / METRICS, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<!-- pixel accuracy and mean IoU (held out, best: " in text
    assert "<!-- mean IoU, held out -->" in text


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"flip": True}, "flip is True, which is for classification. PairAugment changes photos"),
        ({"mixup_alpha": 0.2}, "mixup_alpha is 0.2, which is for classification"),
        ({"cutmix_alpha": 1.0}, "cutmix_alpha is 1.0"),
        ({"crop_padding": 4}, "crop_padding is 4"),
        ({"cutout": 8}, "cutout is 8"),
        ({"erasing": 0.1}, "erasing is 0.1"),
        ({"class_weights": (1, -1)}, r"class_weights\[1\] is -1"),
        ({"class_weights": (1, "2")}, r"class_weights\[1\] is '2'"),
        ({"class_weights": (math.inf,)}, r"class_weights\[0\] is inf"),
        ({"class_weights": 3.0}, "class_weights are 3.0; they must be a tuple of numbers"),
        ({"loss_mean": "sum"}, "loss_mean is 'sum'; it must be 'counted' or 'all'"),
        ({"loss_mean": ["all"]}, "loss_mean is"),
        ({"schedule": "step"}, "schedule is 'step'; it must be 'cosine' or 'poly'"),
    ],
    ids=str,
)
def test_wrong_recipes_are_refused(changes, says):
    with pytest.raises(RangeError, match=says):
        dataclasses.replace(RECIPE, **changes)


def test_a_recipe_is_made_again_of_its_dictionary():
    made = dataclasses.replace(RECIPE, class_weights=[1, 2, 3, 4])
    assert made.class_weights == (1.0, 2.0, 3.0, 4.0)
    assert SegmentationRecipe(**json.loads(json.dumps(made.to_dict()))) == made


def begin(config, recipe, data, held_out, folder):
    """Both ways to a first step, which must refuse alike, and leave nothing behind."""
    with pytest.raises(Exception) as first:  # noqa: PT011 (compared below)
        fit(config, recipe, data, held_out, folder)
    assert not folder.exists()
    state = start_training(params_of(config, dtype=np.float32), len(data), seed=0)
    with pytest.raises(type(first.value)) as second:
        train_step(state, data, config, recipe)
    return first.value, second.value


def test_samples_of_the_wrong_kind_are_refused_both_ways(data, held_out, tmp_path):
    for error in begin(CONFIG, RECIPE, IMAGES, IMAGES, tmp_path / "a"):
        assert isinstance(error, TrainingError)
        assert "are LabelledImages; this network learns a class for every pixel: Lab" in str(error)
    for error in begin(CLASSIFIER, IMAGE_RECIPE, data, held_out, tmp_path / "b"):
        assert isinstance(error, TrainingError)
        assert "are LabelledPairs; this network learns one class for each image" in str(error)
    with pytest.raises(TrainingError, match="held out are LabelledImages; this network learns a"):
        fit(CONFIG, RECIPE, data, IMAGES, tmp_path / "c")


def test_a_recipe_of_the_wrong_kind_is_refused_both_ways(data, held_out, tmp_path):
    plain = Recipe(epochs=1, batch_size=4, flip=False, crop_padding=0)
    for error in begin(CONFIG, plain, data, held_out, tmp_path / "a"):
        assert isinstance(error, ArrayTypeError)
        assert "recipe is a Recipe; it must be a SegmentationRecipe" in str(error)
    for error in begin(CLASSIFIER, RECIPE, IMAGES, IMAGES, tmp_path / "b"):
        assert isinstance(error, TrainingError)
        assert "recipe is a SegmentationRecipe, and this network learns one class" in str(error)


def test_as_many_weights_as_classes(data, held_out, tmp_path):
    recipe = dataclasses.replace(RECIPE, class_weights=(1, 2, 3))
    for error in begin(CONFIG, recipe, data, held_out, tmp_path / "a"):
        assert isinstance(error, TrainingError)
        assert "recipe has 3 class_weights, and the model 4 classes" in str(error)


def test_other_classes_or_preprocessing_are_refused(data, held_out, scenes, tmp_path):
    five = dataclasses.replace(CONFIG, num_classes=5)
    with pytest.raises(TrainingError, match="have 4 classes, but the model has 5"):
        fit(five, dataclasses.replace(RECIPE, class_weights=()), data, held_out, tmp_path / "a")
    other = pairs(scenes / "held_out", preprocessing=Preprocessing("RGB", (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(TrainingError, match="both must be prepared alike"):
        fit(CONFIG, RECIPE, data, other, tmp_path / "a")


def test_a_damaged_label_map_ends_a_training_by_name(held_out, tmp_path):
    root = write_pairs(tmp_path / "scenes", 4)
    (root / "labels" / "002.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"labels/002.png"):
        fit(CONFIG, RECIPE, pairs(root), held_out, tmp_path / "run")


def test_what_is_held_out_must_have_labels(data, scenes, tmp_path):
    nothing = pairs(scenes / "held_out", replaced=dict.fromkeys((0, 1, 2, 3, VOID), 255))
    with pytest.raises(TrainingError, match="what is held out has no pixel with a label"):
        fit(CONFIG, RECIPE, data, nothing, tmp_path / "run")


def test_a_batch_without_a_label_changes_nothing_but_by_decay(scenes):
    nothing = pairs(scenes / "learnt", replaced=dict.fromkeys((0, 1, 2, 3, VOID), 255))
    recipe = dataclasses.replace(RECIPE, weight_decay=0.0)
    state = first_state()
    after, report = train_step(state, nothing, CONFIG, recipe)
    assert report.loss == report.hits == report.grad_norm == 0
    for (key, a), (_, b) in zip(
        named_arrays(without_buffers(state.params)),
        named_arrays(without_buffers(after.params)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b, err_msg=key)


def test_one_value_a_channel_ends_a_training_in_words(scenes, held_out, tmp_path):
    data = pairs(scenes / "learnt", (32, 32))
    recipe = dataclasses.replace(RECIPE, accumulate=4)  # an image each, and a last map of one cell
    with pytest.raises(ShapeError, match="batch norm needs a larger batch, or a larger image"):
        fit(CONFIG, recipe, data, held_out, tmp_path / "run")


def test_info_goes_into_the_best_weights(data, held_out, tmp_path):
    info = ModelInfo(title="scenes", classes=CLASSES, colours=tuple(map(tuple, COLOURS.tolist())))
    fit(CONFIG, RECIPE, data, held_out, tmp_path, info=info, stop_at_step=STEPS)
    best = pvt_ref.load(tmp_path / BEST)
    assert best.info == dataclasses.replace(info, preprocessing=data.preprocessing)
    assert best.segment(data.read(0)[0])[0].shape == (24, 32)
