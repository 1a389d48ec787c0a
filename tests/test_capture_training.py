"""Trainings by CUDA's kernels and graphs: on the stand-in for CuPy with emulated kernels, and on a
GPU.

The layers are the readable ones, for which the stand-in is enough; the optimiser is the kernels'.
"""

import dataclasses
import io
import math
import sys

import cuda_on_cpu
import numpy as np
import pytest
import small_pairs
import small_training
from closeness import relative
from cuda_on_cpu import Emulation
from recording_cupy import RecordingCuPy, launched_by
from rich.console import Console
from segmentors import SEGMENTORS, params_of
from small_training import DATA, HELD_OUT
from strategies import random_params

import pvt_ref
from pvt_ref import REFERENCE, Operation, Ops
from pvt_ref.arrays import is_cupy, is_numpy
from pvt_ref.draws import Draws, What
from pvt_ref.errors import TrainingError
from pvt_ref.kernels.cuda import table
from pvt_ref.kernels.cuda.batch_norm import conv_unit_kernel
from pvt_ref.kernels.cuda.capture import Captured
from pvt_ref.kernels.cuda.launch import Cuda
from pvt_ref.kernels.cuda.position import position_kernel
from pvt_ref.kernels.cuda.resize import resize_kernel
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.train import LossScale, fit, start_training, train_step
from pvt_ref.train.captured import CapturedSteps, _Graph, draw_again
from pvt_ref.train.data_parallel import ALONE, Ranks
from pvt_ref.train.loop import METRICS, STATE
from pvt_ref.train.on_device import settings_for
from pvt_ref.train.step import next_step
from pvt_ref.tree import map_arrays, named_arrays

no_gxx = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)
#: Dropout of tokens too, so that a block draws masks of several shapes.
CONFIG = dataclasses.replace(small_training.CONFIG, drop_rate=0.1)
#: Of one kind from its first step on.
RECIPE = dataclasses.replace(small_training.RECIPE, drop_path_ramp_epochs=0)
PARAMS = random_params(CONFIG, 1, np.float32)
#: Of a segmentation network, with batch norms.
PIXEL_CONFIG = SEGMENTORS["pvt"]
PIXEL_PARAMS = params_of(PIXEL_CONFIG, 1, np.float32)
PIXEL_RECIPE = dataclasses.replace(small_pairs.RECIPE, drop_path_ramp_epochs=0)


@dataclasses.dataclass(frozen=True)
class Half(Cuda):
    """Settings of kernels that compute in float16, whatever multiplies."""

    precision: str = "float16"

    def __post_init__(self):
        pass  # products and precision may not belong together: the tests' own layers round


@pytest.fixture
def fake(monkeypatch):
    made = RecordingCuPy()
    monkeypatch.setitem(sys.modules, "cupy", made)
    return made


def kernels(twins=None, kind=Cuda, **settings):
    """A table for the stand-in: readable layers, and emulated kernels for the rest."""
    cuda = kind(launched_by(Emulation()), 6, **settings)
    return Ops(twins, name="cuda kernels", accepts=is_cupy, settings=cuda)


def begin(cupy=None, scale=None):
    params = PARAMS if cupy is None else map_arrays(cupy.asarray, PARAMS)
    state = start_training(params, len(DATA), RECIPE.seed)
    return dataclasses.replace(state, loss_scale=scale)


def trees(state):
    return (state.params, state.optimizer.m, state.optimizer.v, state.average)


def bits(state):
    """Every bit of a state, wherever it lies."""
    numbers = (state.step, state.optimizer.t, state.epoch_loss, state.epoch_hits, state.loss_scale)
    arrays = [x for tree in trees(state) for _, x in named_arrays(pvt_ref.to_numpy(tree))]
    return numbers, [x.tobytes() for x in arrays]


def run(count, ops, cupy=None, recipe=RECIPE, captured=None, scale=None, config=CONFIG):
    """So many steps: the bits after each, the reports, and how many graphs were launched."""
    state, after, reports = begin(cupy, scale), [], []
    launches = []
    for _ in range(count):
        if cupy is not None:
            cupy.history.clear()
        state, report = next_step(state, DATA, config, recipe, ALONE, ops, captured)
        reports.append(report)
        after.append(bits(state))
        launches.append(cupy and sum(entry[0] == "launch" for entry in cupy.history))
    return after, reports, launches, state


EVERY = {
    "everything random": {},
    "one micro-batch, hard labels": {"accumulate": 1, "mixup_alpha": 0.0, "cutmix_alpha": 0.0},
    "unclipped, no average": {"clip_norm": None, "ema_decay": 0.0, "accumulate": 1},
    "fine-tuning": {"layer_decay": 0.7, "frozen": ("patch_embed1", "block1"), "accumulate": 1},
}

# The optimiser by kernels -------------------------------------------------------------------------


@no_gxx
@pytest.mark.parametrize("name", ["everything random", "fine-tuning"])
def test_kernels_update_as_the_readable_optimiser_does(name):
    recipe = dataclasses.replace(RECIPE, **EVERY[name])
    readable = Ops(name="readable", accepts=is_numpy)
    by_kernels = Ops(name="x", accepts=is_numpy, settings=Cuda(Emulation(5), 6))
    assert settings_for(by_kernels, PARAMS) is by_kernels.settings
    assert settings_for(readable, PARAMS) is None
    assert settings_for(by_kernels, map_arrays(lambda w: w.astype(np.float64), PARAMS)) is None
    _, expected, _, theirs = run(3, readable, recipe=recipe)
    _, reports, _, mine = run(3, by_kernels, recipe=recipe)
    for report, other in zip(reports, expected, strict=True):
        assert report.loss == pytest.approx(other.loss, rel=1e-5)
        assert report.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    for tree, other in zip(trees(mine), trees(theirs), strict=True):
        for (key, x), (_, y) in zip(named_arrays(tree), named_arrays(other), strict=True):
            if key.split(".")[0] in recipe.frozen:
                assert x.tobytes() == y.tobytes()
            else:
                assert relative(x, y) < 2e-5 or np.abs(x - y).max() < 1e-7, key
    assert mine.optimizer.t == 3


@no_gxx
def test_a_frozen_weight_is_no_culprit():
    def spoilt(p, cache, dy, ops):
        dx, grads = patch_embed.backward(p, cache, dy, ops)
        return dx, map_arrays(lambda g: np.full_like(g, np.inf), grads)

    twins = {patch_embed: Operation(patch_embed.forward, spoilt)}
    ops = Ops(twins, name="x", accepts=is_numpy, settings=Cuda(Emulation(5), 6))
    recipe = dataclasses.replace(RECIPE, accumulate=1, frozen=("patch_embed1", "block1"))
    with pytest.raises(TrainingError) as found:
        run(1, ops, recipe=recipe)
    assert "patch_embed2" in str(found.value)
    assert "patch_embed1" not in str(found.value)


def half_backward(p, cache, dy, ops):
    dx, grads = linear.backward(p, cache, through_half(dy), ops)
    return dx, LinearParams(through_half(grads.weight), grads.bias)


def through_half(x):
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def broken_backward(p, cache, dy, ops):
    dx, grads = linear.backward(p, cache, dy, ops)
    return dx, LinearParams(grads.weight * math.nan, grads.bias)


BROKEN = {linear: Operation(linear.forward, broken_backward)}
IN_HALF = {linear: Operation(linear.forward, half_backward)}


@no_gxx
def test_kernels_leave_out_a_step_whose_gradients_are_not_finite():
    ops = Ops(IN_HALF, name="x", accepts=is_numpy, settings=Half(Emulation(), 6))
    before = begin(scale=LossScale(2.0**35))
    state, report = train_step(before, DATA, CONFIG, RECIPE, ops=ops)
    assert report.skipped
    assert state.loss_scale == LossScale(2.0**34, 0, 1)
    assert (state.step, state.optimizer.t) == (1, 0)
    for tree, other in zip(trees(state)[:3], trees(before)[:3], strict=True):
        for (key, x), (_, y) in zip(named_arrays(tree), named_arrays(other), strict=True):
            assert x.tobytes() == y.tobytes(), key
    broken = Ops(BROKEN, name="x", accepts=is_numpy, settings=Cuda(Emulation(), 6))
    with pytest.raises(TrainingError, match="norm of the gradients is nan"):
        train_step(begin(), DATA, CONFIG, RECIPE, ops=broken)


@no_gxx
def test_a_scale_that_is_a_power_of_two_changes_no_bit_there_either():
    ops = Ops(name="x", accepts=is_numpy, settings=Cuda(Emulation(), 6))
    plain, expected, _, _ = run(2, ops)
    scaled, reports, _, _ = run(2, ops, scale=LossScale(2.0**9))
    assert reports == expected
    for (numbers, arrays), (others, theirs) in zip(scaled, plain, strict=True):
        assert numbers[:-1] == others[:-1]
        assert arrays == theirs


# A step as a graph --------------------------------------------------------------------------------


@no_gxx
@pytest.mark.parametrize("name", EVERY)
def test_a_captured_step_has_the_bits_of_a_launched_one(name, fake):
    recipe = dataclasses.replace(RECIPE, **EVERY[name])
    ops = kernels()
    expected, told, launches, _ = run(5, ops, fake, recipe)
    assert launches == [0] * 5
    after, reports, launches, _ = run(5, ops, fake, recipe, CapturedSteps(ops))
    assert launches == [0, 1, 1, 1, 1]  # over the end of an epoch
    assert reports == told
    assert after == expected


PIXELS = {
    "weighted, averaged": {},
    "fine-tuning, all pixels counted": {
        **{"accumulate": 1, "frozen": ("backbone",), "ema_decay": 0.0, "clip_norm": None},
        **{"loss_mean": "all", "class_weights": ()},
    },
}


@pytest.fixture
def scenes(tmp_path):
    return small_pairs.pairs(small_pairs.write_pairs(tmp_path, 10), augment=small_pairs.AUGMENT)


@no_gxx
@pytest.mark.parametrize("name", PIXELS)
def test_a_captured_step_of_segmentation_has_the_bits_of_a_launched_one(name, fake, scenes):
    recipe = dataclasses.replace(PIXEL_RECIPE, **PIXELS[name])
    cuda = Cuda(launched_by(Emulation()), 6, products="cupy")
    needed = (conv_unit_kernel, resize_kernel, position_kernel)
    twins = {kernel.readable: kernel.with_settings(cuda) for kernel in needed}
    ops = Ops(twins, name="cuda kernels", accepts=is_cupy, settings=cuda)
    results = []
    for captured in (None, CapturedSteps(ops)):
        state = start_training(map_arrays(fake.asarray, PIXEL_PARAMS), len(scenes), recipe.seed)
        after, launches = [], []
        for _ in range(3):
            fake.history.clear()
            state, report = next_step(state, scenes, PIXEL_CONFIG, recipe, ALONE, ops, captured)
            after.append((bits(state), report))
            launches.append(sum(entry[0] == "launch" for entry in fake.history))
        results.append(after)
        assert launches == ([0, 0, 0] if captured is None else [0, 1, 1])
    assert results[0] == results[1]
    seen = pvt_ref.to_numpy(state.params.buffers)
    assert [n for key, n in named_arrays(seen) if key.endswith("tracked")] == [
        n + 3 * recipe.accumulate
        for key, n in named_arrays(PIXEL_PARAMS.buffers)
        if key.endswith("tracked")
    ]


@no_gxx
def test_a_captured_step_is_left_out_too(fake):
    ops, first = kernels(IN_HALF, Half), LossScale(2.0**19)
    expected, told, _, _ = run(7, ops, fake, scale=first)
    after, reports, launches, state = run(7, ops, fake, RECIPE, CapturedSteps(ops), first)
    assert launches == [0] + [1] * 6
    assert list(map(repr, reports)) == list(map(repr, told))  # NaN is not equal to itself
    assert after == expected
    assert 1 < state.loss_scale.skipped < 7
    assert state.optimizer.t == 7 - state.loss_scale.skipped


@no_gxx
def test_another_kind_of_step_is_captured_anew(fake):
    """As drop path grows from epoch to epoch, so that masks are drawn where none were."""
    ops, recipe = kernels(), dataclasses.replace(RECIPE, drop_path_ramp_epochs=2)
    expected, _, _, _ = run(7, ops, fake, recipe)
    after, _, launches, _ = run(7, ops, fake, recipe, CapturedSteps(ops))
    assert launches == [0, 1, 1, 1, 0, 1, 1]
    assert after == expected


@no_gxx
def test_a_step_that_cannot_be_captured_is_launched(fake):
    fake.products_captured = False
    ops = kernels()
    expected, _, _, _ = run(4, ops, fake)
    after, _, launches, _ = run(4, ops, fake, captured=CapturedSteps(ops))
    assert launches == [0, 0, 0, 0]
    assert after == expected


@no_gxx
def test_a_loss_that_is_not_finite_ends_a_captured_training(fake):
    ops = kernels()
    captured, state = CapturedSteps(ops), begin(fake)
    for _ in range(3):
        state, _ = next_step(state, DATA, CONFIG, RECIPE, ALONE, ops, captured)
    state.params.head.bias[...] = math.inf
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step 4"):
        next_step(state, DATA, CONFIG, RECIPE, ALONE, ops, captured)


def test_what_can_be_captured(fake):
    params = map_arrays(fake.asarray, PARAMS)
    assert CapturedSteps.can(kernels(), params)
    assert CapturedSteps.can(kernels(), map_arrays(fake.asarray, PIXEL_PARAMS))
    assert not CapturedSteps.can(kernels(capture=False), params)
    assert not CapturedSteps.can(REFERENCE, params)
    assert not CapturedSteps.can(kernels(), PARAMS)
    wide = map_arrays(lambda w: fake.asarray(w.astype(np.float64)), PARAMS)
    assert not CapturedSteps.can(kernels(), wide)


def test_numbers_are_drawn_as_the_places_draw_them():
    draws = Draws(3, 7, 1)
    notes = [(What.BLOCK, 0, (2, 1)), (What.STAGE_DROPOUT, 4, (3,)), (What.BLOCK, 0, (4,))]
    rng, other = draws.at(What.BLOCK, 0), draws.at(What.STAGE_DROPOUT, 4)
    expected = [rng.random((2, 1), dtype=np.float32), other.random(3, dtype=np.float32)]
    expected.append(rng.random(4, dtype=np.float32))
    numbers = draw_again(draws, notes)
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, np.concatenate([x.reshape(-1) for x in expected]))
    assert draw_again(draws, []).shape == (0,)


@no_gxx
def test_fit_replays_its_steps_and_saves_what_a_training_without_graphs_saves(
    fake, tmp_path, monkeypatch
):
    monkeypatch.setenv("PVT_REF_OPS", "kernels")

    def train(folder, capture, **options):
        ops = kernels(capture=capture)
        monkeypatch.setattr(table, "cuda_kernels", lambda: ops)
        fake.history.clear()
        done = fit(
            CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / folder, device="cuda", log_steps=1, **options
        )
        assert not len(ops.settings.arranged)  # these weights change
        return done, sum(entry[0] == "launch" for entry in fake.history)

    direct, launches = train("direct", capture=False, stop_at_step=6)
    assert launches == 0
    replayed, launches = train("replayed", capture=True, stop_at_step=3)
    assert launches == 2
    held = bits(replayed.state)
    replayed, launches = train("replayed", capture=True, stop_at_step=6, resume=True)
    assert launches == 2
    assert held != bits(replayed.state)
    assert bits(replayed.state) == bits(direct.state)
    for name in (STATE, "best.safetensors"):
        mine, theirs = (
            (tmp_path / folder / name).read_bytes() for folder in ("replayed", "direct")
        )
        assert mine == theirs
    assert (tmp_path / "replayed" / METRICS).exists()


class OneOfTwo(Ranks):
    """The first of two ranks, which hears nothing of the other."""

    size = 2


@no_gxx
@pytest.mark.parametrize("ranks", [OneOfTwo(), ALONE], ids=["two", "one"])
def test_several_ranks_launch_their_steps_and_say_so(ranks, fake, tmp_path):
    ops, said = kernels(), io.StringIO()
    fit(
        CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / "run", device="cuda", stop_at_step=2, ops=ops,
        ranks=ranks, console=Console(file=said, width=300),
    )  # fmt: skip
    launches = sum(entry[0] == "launch" for entry in fake.history)
    assert launches == (ranks is ALONE)
    words = "2 ranks launch every kernel of a step, with the same bits: a CUDA graph cannot hold"
    assert (words in said.getvalue()) == (ranks is not ALONE)


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY)
def test_on_a_gpu_a_captured_step_has_the_bits_of_a_launched_one(name, cupy):
    recipe = dataclasses.replace(RECIPE, **EVERY[name])
    ops, results = table.cuda_kernels(), []
    for captured in (None, CapturedSteps(ops), CapturedSteps(ops)):  # the same bits twice
        state = begin(cupy)
        for _ in range(6):
            state, report = next_step(state, DATA, CONFIG, recipe, ALONE, ops, captured)
        assert captured is None or isinstance(captured._known, _Graph)
        results.append((bits(state), report))
    assert results[0] == results[1] == results[2]


@pytest.mark.gpu
def test_on_a_gpu_a_training_goes_on_with_the_same_bits(cupy, tmp_path, monkeypatch):
    monkeypatch.setenv("PVT_REF_OPS", "kernels")
    replays, replay = [], Captured.__call__

    def counted(self, *arrays):
        replays.append(self)
        return replay(self, *arrays)

    monkeypatch.setattr(Captured, "__call__", counted)

    def train(folder, **options):
        return fit(CONFIG, RECIPE, DATA, HELD_OUT, tmp_path / folder, device="cuda", **options)

    whole = train("whole")
    train("parts", stop_at_step=5)
    assert bits(train("parts", resume=True).state) == bits(whole.state)
    assert len(replays) > 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIXELS)
def test_on_a_gpu_a_captured_step_of_segmentation_has_the_bits_of_a_launched_one(
    name, cupy, scenes
):
    recipe = dataclasses.replace(PIXEL_RECIPE, **PIXELS[name])
    ops, results = table.cuda_kernels(), []
    for captured in (None, CapturedSteps(ops), CapturedSteps(ops)):  # the same bits twice
        state = start_training(map_arrays(cupy.asarray, PIXEL_PARAMS), len(scenes), recipe.seed)
        for _ in range(4):
            state, report = next_step(state, scenes, PIXEL_CONFIG, recipe, ALONE, ops, captured)
        assert captured is None or isinstance(captured._known, _Graph)
        results.append((bits(state), report))
    assert results[0] == results[1] == results[2]
