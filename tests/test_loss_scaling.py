"""Training with a scaled loss, on NumPy: by tables that say float16, or that round to it."""

import dataclasses
import json
import math

import numpy as np
import pytest
from closeness import relative
from kill_training import fingerprint
from loose import loose
from small_training import CONFIG, DATA, HELD_OUT, RECIPE
from strategies import random_params

from pvt_ref import REFERENCE, Operation, Ops
from pvt_ref.checkpoint.safetensors_file import TRAINING_KEY, read_safetensors
from pvt_ref.errors import ArrayTypeError, CheckpointError, RangeError, TrainingError
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.train import (
    LossScale,
    fit,
    load_state,
    read_metrics,
    save_state,
    start_training,
    train_step,
)
from pvt_ref.train.loop import METRICS, STATE
from pvt_ref.tree import map_arrays, named_arrays

PARAMS = random_params(CONFIG, 1, np.float32)


@dataclasses.dataclass(frozen=True)
class Half:
    """Settings of a table that computes in float16; that is all a training asks of it."""

    precision: str = "float16"


def through_half(x):
    """x as products in half precision see it."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(x.dtype)


def half_forward(p, x, ops, keep=True):
    return linear.forward(p, through_half(x), ops, keep=keep)


def half_backward(p, cache, dy, ops):
    dx, grads = linear.backward(p, cache, through_half(dy), ops)
    return through_half(dx), LinearParams(through_half(grads.weight), grads.bias)


#: The readable layers, said to be half precision; and some that are, in every linear layer.
SAID = Ops(name="said to be half", settings=Half())
HALF = Ops({linear: Operation(half_forward, half_backward)}, name="half", settings=Half())


def steps(state, count, ops, recipe=RECIPE):
    reports = []
    for _ in range(count):
        state, report = train_step(state, DATA, CONFIG, recipe, ops=ops)
        reports.append(report)
    return state, reports


def begin(scale=None, params=PARAMS):
    state = start_training(params, len(DATA), RECIPE.seed)
    return dataclasses.replace(state, loss_scale=scale)


def bits(state):
    trees = (state.params, state.optimizer.m, state.optimizer.v, state.average)
    return [x.tobytes() for tree in trees for _, x in named_arrays(tree)]


# The scale ----------------------------------------------------------------------------------------


def test_it_halves_after_a_step_left_out_and_doubles_after_many_good_ones():
    scale = LossScale()
    assert scale == LossScale(65536.0, 0, 0)
    for step in range(1, 2000):
        scale = scale.after(True)
        assert scale == LossScale(65536.0, step, 0)
    scale = scale.after(True)
    assert scale == LossScale(131072.0, 0, 0)
    scale = scale.after(True).after(False)
    assert scale == LossScale(65536.0, 0, 1)
    for _ in range(100):
        scale = scale.after(False)
    assert scale == LossScale(2.0**-14, 0, 101)
    assert scale.is_least
    largest = LossScale(2.0**40, 1999)
    assert largest.after(True) == LossScale(2.0**40, 0)
    assert not largest.is_least


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scale": 3.0}, "power of two, which rounds nothing"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": math.inf}, "scale is inf"),
        ({"scale": "8"}, "scale is '8'"),
        ({"good_steps": 2000}, "good_steps is 2000"),
        ({"skipped": -1}, "skipped is -1"),
        ({"skipped": 1.5}, "skipped is 1.5"),
    ],
)
def test_a_scale_that_none_can_be_is_refused(fields, words):
    with pytest.raises(RangeError, match=words):
        LossScale(**fields)


def test_what_is_no_scale_is_refused_in_a_state():
    with pytest.raises(ArrayTypeError, match=r"state.loss_scale is a float"):
        train_step(begin(65536.0), DATA, CONFIG, RECIPE)


# Steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**-10, 1.0, 2.0**16])
def test_a_power_of_two_changes_no_bit_of_float32(scale):
    plain, expected = steps(begin(), 5, REFERENCE)
    scaled, reports = steps(begin(LossScale(scale)), 5, SAID)
    assert reports == expected
    assert bits(scaled) == bits(plain)
    assert scaled.loss_scale == LossScale(scale, 5, 0)
    assert plain.loss_scale is None


def test_only_float16_begins_with_a_scale():
    assert steps(begin(), 1, SAID)[0].loss_scale == LossScale(2.0**16, 1)
    for precision in ("float32", "bfloat16", "tf32"):
        table = Ops(name="x", settings=Half(precision))
        assert steps(begin(), 1, table)[0].loss_scale is None
    # whoever has one keeps it: m and v do not depend on it, and t counts without its skips
    assert steps(begin(LossScale(4.0)), 1, REFERENCE)[0].loss_scale == LossScale(4.0, 1)


def gradients(scale, ops, params=PARAMS):
    """Of the first step: m is a tenth of them."""
    recipe = dataclasses.replace(RECIPE, clip_norm=None)
    state, _ = steps(begin(scale, params), 1, ops, recipe)
    return dict(named_arrays(state.optimizer.m))


def test_gradients_too_small_for_half_precision_survive():
    far = dataclasses.replace(PARAMS, head=map_arrays(lambda w: w * 1e-4, PARAMS.head))
    exact = gradients(None, REFERENCE, far)
    scaled = gradients(LossScale(2.0**10), HALF, far)
    unscaled = gradients(LossScale(1.0), HALF, far)
    key = "block1.0.mlp.fc1.weight"
    assert np.abs(exact[key]).max() > 0
    assert relative(scaled[key], exact[key]) < 0.02
    assert relative(unscaled[key], exact[key]) > 0.2


def test_a_step_whose_gradients_are_not_finite_is_left_out():
    before = begin(LossScale(2.0**30, 7, 0))
    before = dataclasses.replace(before, average=map_arrays(lambda w: w + 1, PARAMS))
    state, (report,) = steps(before, 1, HALF)
    assert report.skipped
    assert not math.isfinite(report.grad_norm)
    assert math.isfinite(report.loss)
    assert state.loss_scale == LossScale(2.0**29, 0, 1)
    assert (state.step, state.optimizer.t) == (1, 0)
    assert state.params is before.params
    assert state.optimizer is before.optimizer
    assert relative(state.average.head.weight, PARAMS.head.weight) > 0  # it moves as always
    assert bits(state) != bits(before)
    assert state.epoch_loss == report.loss
    state, reports = steps(state, 30, HALF)
    left_out = sum(r.skipped for r in reports)
    assert 0 < left_out < 29
    assert state.loss_scale.scale == 2.0 ** (29 - left_out)
    assert state.loss_scale.skipped == 1 + left_out
    assert state.optimizer.t == state.step - state.loss_scale.skipped
    assert not reports[-1].skipped
    assert relative(state.params.head.weight, PARAMS.head.weight) > 0


def test_what_no_scale_mends_ends_the_training():
    def broken(p, cache, dy, ops):
        dx, grads = linear.backward(p, cache, dy, ops)
        return dx, LinearParams(grads.weight * np.float32(np.nan), grads.bias)

    table = Ops({linear: Operation(linear.forward, broken)}, name="x", settings=Half())
    with pytest.raises(TrainingError, match="norm of the gradients is nan"):
        steps(begin(LossScale(2.0**-12)), 4, table)
    huge = map_arrays(lambda w: w * 1e30, PARAMS)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf)"):
        steps(begin(params=huge), 1, SAID)


# Files --------------------------------------------------------------------------------------------


def train(folder, ops=HALF, **options):
    return fit(CONFIG, RECIPE, DATA, HELD_OUT, folder, log_steps=1, ops=ops, **options)


def test_scale_and_skips_are_saved_and_resumed_to_the_bit(tmp_path, monkeypatch):
    first = LossScale(2.0**20)  # too large: the first steps are left out
    monkeypatch.setattr("pvt_ref.train.step.scale_for", lambda ops, so_far: so_far or first)
    whole = train(tmp_path / "whole")
    assert whole.state.loss_scale.skipped > 1
    assert whole.state.optimizer.t == whole.state.step - whole.state.loss_scale.skipped
    for stop in (1, 5, 8):
        train(tmp_path / "parts", stop_at_step=stop, resume=stop > 1)
    parts = train(tmp_path / "parts", resume=True)
    assert fingerprint(parts.state) == fingerprint(whole.state)
    assert parts.state.loss_scale == whole.state.loss_scale
    lines = read_metrics(tmp_path / "whole" / METRICS)
    assert len(lines) == whole.state.step
    assert sum("loss" in line and "grad_norm" not in line for line in lines) > 0


def test_a_file_without_a_scale_is_as_before(tmp_path):
    state, _ = steps(begin(), 1, REFERENCE)
    save_state(tmp_path / "a", state, {"x": {}})
    record = json.loads(read_safetensors(tmp_path / "a")[1][TRAINING_KEY])
    assert "loss_scale" not in record
    assert load_state(tmp_path / "a", CONFIG, {"x": {}}, np.empty(0)).loss_scale is None
    scaled = dataclasses.replace(state, loss_scale=LossScale(2.0**-3, 17, 0))
    save_state(tmp_path / "b", scaled, {"x": {}})
    again = load_state(tmp_path / "b", CONFIG, {"x": {}}, np.empty(0))
    assert again.loss_scale == scaled.loss_scale
    assert bits(again) == bits(state)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "loss_scale is 5; it must have scale, good_steps, skipped"),
        ({"scale": 8.0}, "it must have scale, good_steps, skipped"),
        ({"scale": 3.0, "good_steps": 0, "skipped": 0}, "scale is 3.0; it must be a power of two"),
        ({"scale": 8.0, "good_steps": 0, "skipped": 2}, "t is 2 after step 2, 2 of them skipped"),
    ],
)
def test_an_edited_scale_is_refused(value, words, tmp_path):
    from test_training_files import seal, unseal

    train(tmp_path, stop_at_step=2, ops=SAID)
    tensors, record = unseal(tmp_path / STATE)
    assert record["loss_scale"] == {"scale": 65536.0, "good_steps": 2, "skipped": 0}
    seal(tmp_path / STATE, tensors, record | {"loss_scale": value})
    with pytest.raises(CheckpointError, match=words):
        train(tmp_path, ops=SAID, resume=True)


def test_evaluation_uses_the_same_table(tmp_path):
    asked = []

    def noted(p, x, ops, keep=True):
        asked.append(keep)
        return linear.forward(p, x, ops, keep=keep)

    table = Ops({linear: Operation(noted, linear.backward)}, name="noted")
    train(tmp_path, ops=table, stop_at_step=4)
    assert {True, False} == set(asked)
    with pytest.raises(ArrayTypeError, match="ops is a int"):
        train(tmp_path / "x", ops=loose(5))
