"""One step of a training: from the state after s steps to the state after s + 1.

A state holds everything that the rest of the training depends on, and random numbers come from
counters. So a training can be stopped after any step, and resuming a saved one gives the same bits.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pvt_ref.api import (
    backward,
    batch_buffers,
    check_has_classifier,
    choose_ops,
    forward_with_cache,
    with_buffers,
)
from pvt_ref.arrays import Array, dtype_name, from_host, quietly
from pvt_ref.checks import check_number, check_type
from pvt_ref.data.augment import (
    cutmix,
    cutout,
    mixup,
    one_hot,
    random_crop,
    random_erasing,
    random_flip,
)
from pvt_ref.data.samples import Samples
from pvt_ref.draws import Draws, SampleDraws, What, generator
from pvt_ref.errors import PVTError, RangeError, ShapeError, TrainingError, shown
from pvt_ref.models.architecture import architecture_of, architectures, check_params_type
from pvt_ref.ops import REFERENCE, Ops
from pvt_ref.report.diagnosis import first_non_finite
from pvt_ref.train.adamw import AdamWState, adamw_init, adamw_step
from pvt_ref.train.captured import Batch, CapturedSteps
from pvt_ref.train.data_parallel import ALONE, Part, Ranks, add_part, add_trees
from pvt_ref.train.ema import ema_decay_of_step, ema_step
from pvt_ref.train.gradients import add_gradients, clip_by_global_norm
from pvt_ref.train.image_loss import image_loss
from pvt_ref.train.loss_scale import LossScale, scale_for
from pvt_ref.train.on_device import settings_for, update
from pvt_ref.train.rates import learning_rate_factors, without_frozen
from pvt_ref.train.recipe import Recipe, SegmentationRecipe
from pvt_ref.train.schedule import config_of_epoch
from pvt_ref.train.segmentation import draw_pairs, pixel_loss
from pvt_ref.tree import first_array, map_arrays, record, to_numpy, without_buffers

#: Advice for a new start.
BEST_SO_FAR = "first=pvt_ref.load('.../best.safetensors').params begins with the best so far"


@record
class TrainState:
    """A training after ``step`` steps. No step changes one; it makes the next."""

    step: int  # steps done
    params: Any  # the weights
    optimizer: AdamWState
    average: Any  # exponential moving average of params, in the same shapes
    seed: int  # of all random numbers
    samples: int  # how many there are to learn from
    epoch_loss: float = 0.0  # sum of the losses over the steps of the epoch in progress
    epoch_hits: int = 0  # right answers among the samples of the epoch in progress
    best_accuracy: float = -1.0  # of average, on the samples held out; -1 before the first epoch
    best_epoch: int = 0  # after how many epochs that was; 0 before the first
    best_sha256: str = ""  # of average then, by which its file is known; "" before
    loss_scale: LossScale | None = None  # of half precision; None: the loss is not scaled


@dataclass(frozen=True, slots=True)
class StepReport:
    """The measurements of a step."""

    loss: float  # mean over the batch, with label smoothing and mixing
    hits: int  # samples of the batch whose most likely class was their (main) class
    lr: float  # the learning rate, of the head if layers have their own
    grad_norm: float  # norm of all gradients but those of frozen weights, before clipping
    skipped: bool = False  # whether weights stay: scaled gradients, and so grad_norm, not finite


def start_training(params: Any, samples: int, seed: int) -> TrainState:
    """The state before the first step.
    Raises: ArrayTypeError if params is not a record of parameters; RangeError if samples is not a
    whole number of at least 1, or seed of at least 0.

    Args:
        params: the first weights, NumPy or CuPy.
        samples: how many there are to learn from.
        seed: of all random numbers, at least 0.

    Returns:
        A state with step 0, whose average is params itself.
    """
    check_params_type(params)
    samples = check_number("samples", samples, least=1, most=2**31, whole=True)
    seed = check_number("seed", seed, least=0, whole=True)
    return TrainState(0, params, adamw_init(without_buffers(params)), params, seed, samples)


def train_step(
    state: TrainState,
    data: Samples,
    config: Any,
    recipe: Recipe,
    ranks: Ranks = ALONE,
    ops: Ops | None = None,
) -> tuple[TrainState, StepReport]:
    """The next state: draw a batch, change it at random, forward, loss, backward, clip, update.

    Args:
        state: the training so far; its arrays determine the device.
        data: the training samples; the same at every step.
        config: the model, with drop-path rates at their peak.
        recipe: the settings.
        ranks: the processes that share the step's micro-batches; all call this with the same.
        ops: the table of operations; None takes the default. If its precision is float16, the loss
            is scaled, and a step whose gradients are not finite changes no weight.

    Returns:
        The next state, and the measurements of the step.

    Raises:
        TrainingError: if the loss or a gradient is not finite, except gradients of frozen weights;
            the message has the step, the learning rate, and the first layer whose output was not.
            A scaled loss may give such gradients until the scale is small. Also if data do not
            fit, or the model lacks a weight that the recipe freezes.
        RangeError: if a number in state is outside its range, or crop_padding exceeds the images.
        ShapeError: if state is of another model, or of another number of samples.
        ArrayTypeError, ConfigError, PVTError: as :func:`pvt_ref.forward_with_cache`.
    """
    return next_step(state, data, config, recipe, ranks, ops)


def next_step(
    state: TrainState,
    data: Samples,
    config: Any,
    recipe: Recipe,
    ranks: Ranks,
    ops: Ops | None,
    captured: CapturedSteps | None = None,
) -> tuple[TrainState, StepReport]:
    """:func:`train_step`; with captured, the new state holds arrays that the step after changes."""
    check_type("ranks", ranks, Ranks, "from pvt_ref.train.data_parallel")
    check_samples(data, "data", config, recipe)
    check_state(state)
    if state.samples != len(data):
        raise ShapeError(f"state is of a training on {state.samples} samples; data has {len(data)}")
    # what is not finite is found, and named
    return quietly(_step, state, data, config, recipe, ranks, ops, captured)


def _step(
    state: TrainState,
    data: Samples,
    config: Any,
    recipe: Recipe,
    ranks: Ranks,
    ops: Ops | None,
    captured: CapturedSteps | None,
) -> tuple[TrainState, StepReport]:
    steps = recipe.steps_per_epoch(len(data))
    epoch, index = divmod(state.step, steps)
    factors = None  # all are 1; leaving them out saves 1 % of a small model's step
    if recipe.layer_decay < 1 or recipe.frozen:
        factors = learning_rate_factors(config, recipe.layer_decay, recipe.frozen)
    config = config_of_epoch(config, epoch, recipe.drop_path_ramp_epochs)
    row = architecture_of(config)
    has_norms = row.batch_buffers is not None
    ops = choose_ops(ops, first_array(state.params), row)
    scaling = scale_for(ops, state.loss_scale)
    scale = None if scaling is None else scaling.scale
    if index == 0:
        state = dataclasses.replace(state, epoch_loss=0.0, epoch_hits=0)
    chosen = batch_of_step(state.seed, state.step, len(data), recipe)[1]
    lr = recipe.learning_rate(state.step, steps)
    decay = ema_decay_of_step(state.step, recipe.ema_decay)
    now = _Moment(state.params, config, state.step, steps, lr)

    batches: Iterable[Batch] = (
        _drawn_batch(state, data, samples, chosen, config, recipe, epoch, micro_batch)
        for micro_batch, samples in shard_of(chosen, recipe, ranks)
    )
    replay, parts = None, []
    try:
        if captured is not None:
            batches = list(batches)
            replay = captured(state, batches, config, recipe, lr, factors, scale, decay)
        if replay is None:
            losses, parts = _passes(now, batches, recipe, ops, scale)
        else:
            losses = [
                _checked_loss(now, batch, value, hits)
                for batch, (value, hits) in zip(batches, replay.losses, strict=True)
            ]
    except PVTError as error:
        ranks.fail(error)
        raise
    loss, hits, moved = 0.0, 0, state.params
    for part_loss, part_hits, seen in itertools.chain(*ranks.gather(losses)):  # by micro-batch
        loss, hits = loss + part_loss, hits + part_hits
        if has_norms:
            moved = with_buffers(moved, seen)
    max_norm = math.inf if recipe.clip_norm is None else recipe.clip_norm

    # the loop looks at weights before it keeps them
    trained, optimizer, rule = without_buffers(state.params), state.optimizer, recipe.optimizer
    if replay is not None:
        norm, params, optimizer, average = replay[1:]
        skipped = _is_skipped(now, norm, max_norm, scaling, None)
    else:
        grads = ranks.sum(parts, recipe.accumulate)
        if factors is not None:
            grads = without_frozen(grads, factors)
        if (cuda := settings_for(ops, trained)) is not None:
            params, optimizer, norm = update(
                trained, grads, optimizer, lr, rule, factors, max_norm, scale, cuda
            )
            skipped = _is_skipped(now, norm, max_norm, scaling, grads)
        else:
            if scale is not None:
                grads = map_arrays(lambda g: g / scale, grads)
            grads, norm = clip_by_global_norm(grads, max_norm)
            params, skipped = trained, _is_skipped(now, norm, max_norm, scaling, grads)
            if not skipped:
                params, optimizer = adamw_step(trained, grads, optimizer, lr, rule, factors)
        if has_norms:
            params = dataclasses.replace(params, buffers=moved.buffers)
        average = ema_step(state.average, params, decay)
    changes = {"step": state.step + 1, "params": params, "optimizer": optimizer, "average": average}
    totals = {"epoch_loss": state.epoch_loss + loss, "epoch_hits": state.epoch_hits + hits}
    if scaling is not None:
        changes["loss_scale"] = scaling.after(not skipped)
    report = StepReport(loss, hits, lr, norm, skipped)
    return dataclasses.replace(state, **changes, **totals), report


class _Moment(NamedTuple):
    """A step before it is done: what it computes with, and where the training is."""

    params: Any
    config: Any
    step: int
    steps: int  # of an epoch
    lr: float

    def diverged(self, what: str, culprit: str) -> TrainingError:
        return diverged(what, self.step, self.steps, self.lr, culprit)


def _drawn_batch(
    state: TrainState,
    data: Samples,
    samples: np.ndarray,
    chosen: np.ndarray,
    config: Any,
    recipe: Recipe,
    epoch: int,
    micro_batch: int,
) -> Batch:
    """A micro-batch of the samples, of the batch that was chosen."""
    draws = Draws(state.seed, state.step, micro_batch)
    drawn = draw_batch(state.params, data, samples, config, recipe, epoch, draws)
    return Batch(draws, len(samples) / len(chosen), *drawn)


def _checked_loss(
    now: _Moment, batch: Batch, loss: float, hits: int, seen: Any = None
) -> tuple[float, int, Any]:
    """A micro-batch's share of the loss, its hits and buffers; refuses what is not finite."""
    if not math.isfinite(loss):
        culprit = first_non_finite(now.params, batch.images, now.config, batch.draws)
        raise now.diverged(f"the loss is {loss}", culprit)
    return batch.share * loss, hits, seen


def _passes(
    now: _Moment, batches: Iterable[Batch], recipe: Recipe, ops: Ops, scale: float | None
) -> tuple[list[tuple[float, int, Any]], list[Part]]:
    """Forward and backward of each micro-batch: what it tells, and sums of gradients."""
    row, loss_of = architecture_of(now.config), image_loss
    has_norms = row.batch_buffers is not None
    if row.dense:  # only kernels that can be captured resize otherwise than the readable layer
        has_kernels = settings_for(ops, without_buffers(now.params)) is not None
        loss_of = functools.partial(pixel_loss, ops=ops if has_kernels else REFERENCE)
    losses, parts = [], []
    for batch in batches:
        logits, cache = forward_with_cache(
            now.params, batch.images, now.config, batch.draws, ops=ops, batch_statistics=has_norms
        )
        loss, dlogits, hits = loss_of(logits, batch.targets, recipe)
        seen = to_numpy(batch_buffers(cache)) if has_norms else None
        # float waits for the device
        losses.append(_checked_loss(now, batch, float(loss), int(hits), seen))
        if scale is not None:
            dlogits = dlogits * scale
        grads, _ = backward(now.params, cache, dlogits, now.config)
        del cache  # the largest thing here; the next micro-batch makes its own
        grads = add_gradients(None, grads, batch.share)
        add_part(parts, Part(0, batch.draws.micro_batch, grads), add_trees)
    return losses, parts


def _is_skipped(
    now: _Moment, norm: float, max_norm: float, scaling: LossScale | None, grads: Any
) -> bool:
    """Whether a smaller scale of the loss may mend the gradients; refuses what it would not."""
    largest = float(np.finfo(dtype_name(first_array(now.params))).max)
    finite = math.isfinite(norm)
    if finite and min(norm, max_norm) ** 2 < largest:  # AdamW squares them
        return False
    if not finite and scaling is not None and not scaling.is_least:
        return True
    culprit = "A CUDA graph keeps none of them to look at" if grads is None else ""
    raise now.diverged(f"the norm of the gradients is {norm}", culprit or first_non_finite(grads))


@functools.lru_cache(maxsize=2)  # every step asks
def order_of_epoch(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The samples' numbers in the order of an epoch, (N,) int64, read-only."""
    order = generator(seed, What.ORDER, epoch).permutation(samples)
    order.flags.writeable = False
    return order


def batch_of_step(seed: int, step: int, samples: int, recipe: Recipe) -> tuple[int, np.ndarray]:
    """The epoch that a step belongs to, and the samples of its batch, (batch_size,)."""
    epoch, index = divmod(step, recipe.steps_per_epoch(samples))
    first = index * recipe.batch_size
    return epoch, order_of_epoch(seed, epoch, samples)[first : first + recipe.batch_size]


def shard_of(chosen: np.ndarray, recipe: Recipe, ranks: Ranks) -> list[tuple[int, np.ndarray]]:
    """Of a batch, the micro-batches that a rank computes: their numbers, and their samples."""
    parts = np.array_split(chosen, recipe.accumulate)
    return [(number, parts[number]) for number in ranks.share(recipe.accumulate)]


def draw_batch(
    params: Any,
    data: Samples,
    chosen: np.ndarray,
    config: Any,
    recipe: Recipe,
    epoch: int,
    draws: Draws,
) -> tuple[Array, Array]:
    """A micro-batch: the chosen samples, changed at random as the recipe says.

    Crop, flip, cutout and erasing of a sample depend on seed and epoch only, mixup and CutMix on
    the micro-batch. Returns images (B, C, H, W) and int64 labels (B,), or, mixed, distributions
    (B, K). Of pairs, images and labels (B, H, W).
    """
    if architecture_of(config).dense:
        return draw_pairs(params, data, chosen, draws.seed, epoch)
    like = first_array(params)
    rng = SampleDraws(draws.seed, epoch, chosen)
    pixels = data.drawn_pixels(chosen, draws.seed, epoch)
    images = random_crop(data.preprocessing.normalize(pixels, like), recipe.crop_padding, rng)
    if recipe.flip:
        images = random_flip(images, rng)
    images = cutout(images, recipe.cutout, rng)
    images = random_erasing(images, recipe.erasing, rng)
    labels = data.labels[chosen].astype(np.int64)
    both = (mixup, recipe.mixup_alpha), (cutmix, recipe.cutmix_alpha)
    mixing = [(mix, alpha) for mix, alpha in both if alpha > 0]
    if not mixing:
        return images, from_host(labels, like=like)
    shared = draws.at(What.MIXUP)
    # a draw only if there is a choice
    mix, alpha = mixing[shared.integers(2)] if len(mixing) == 2 else mixing[0]
    return mix(images, one_hot(labels, config.num_classes, like), alpha, shared)


def check_samples(data: Samples, name: str, config: Any, recipe: Recipe) -> None:
    """Refuses samples that do not suit a model and a recipe, and a recipe that does not suit it.
    Raises: RangeError, TrainingError and others.
    """
    check_has_classifier(config)
    dense = architecture_of(config).dense
    check_type("recipe", recipe, SegmentationRecipe if dense else Recipe)
    if isinstance(recipe, SegmentationRecipe):
        _check_segmentation(recipe, config, dense)
    learning_rate_factors(config, recipe.layer_decay, recipe.frozen)
    check_type(name, data, Samples, "such as LabelledImages(images, labels, preprocessing)")
    if data.has_label_maps != dense:
        needed = "a class for every pixel: LabelledPairs" if dense else "one class for each image"
        raise TrainingError(f"{name} are {type(data).__name__}; this network learns {needed}")
    data.check_fits(config, name)
    side = max(data.size)
    if recipe.crop_padding > side:
        raise RangeError(f"crop_padding is {recipe.crop_padding}, and images have {side} a side")


def _check_segmentation(recipe: SegmentationRecipe, config: Any, dense: bool) -> None:
    """Refuses settings that would be ignored or do not fit. Raises: TrainingError."""
    if not dense:
        what = "recipe is a SegmentationRecipe, and this network learns one class for each image"
        raise TrainingError(f"{what}. Use a plain Recipe")
    given, classes = len(recipe.class_weights), config.num_classes
    if given not in (0, classes):
        what = f"recipe has {given} class_weights, and the model {classes} classes"
        raise TrainingError(f"{what}. Give one for each, or () to weigh all alike")


def check_state(state: TrainState) -> None:
    """Refuses a state that no training can be in. Raises: ArrayTypeError or RangeError."""
    check_type("state", state, TrainState, "from start_training or the step before")
    check_type("state.optimizer", state.optimizer, AdamWState)
    check_params_type(state.params)
    samples = check_number("state.samples", state.samples, least=1, most=2**31, whole=True)
    rows = (row for row in architectures() if row.params_type is type(state.params))
    answers = 2**53 if any(row.dense for row in rows) else samples  # or one for each pixel
    bounds = {"step": 2**53, "seed": None, "epoch_hits": answers, "best_epoch": 2**53}
    for name, most in bounds.items():
        check_number(f"state.{name}", getattr(state, name), least=0, most=most, whole=True)
    check_number("state.optimizer.t", state.optimizer.t, least=0, most=2**53, whole=True)
    if state.loss_scale is not None:
        check_type("state.loss_scale", state.loss_scale, LossScale, "or None")
    check_number("state.epoch_loss", state.epoch_loss, least=0)
    none = state.best_epoch == 0  # no epoch has been measured
    accuracy = check_number("state.best_accuracy", state.best_accuracy, least=-1, most=1)
    digest = state.best_sha256
    if accuracy < 0 and not (none and accuracy == -1):
        raise RangeError(f"state.best_accuracy is {accuracy}; it must be from 0 to 1, or -1 before")
    if not isinstance(digest, str) or not re.fullmatch("" if none else "[0-9a-f]{64}", digest):
        form = f"{'empty' if none else '64 hexadecimal digits'} with best_epoch {state.best_epoch}"
        raise RangeError(f"state.best_sha256 is {shown(digest)}; it must be {form}")


def diverged(what: str, step: int, steps: int, lr: float, culprit: str) -> TrainingError:
    """The error that ends a training at a step, with its epoch and learning rate."""
    return TrainingError(
        f"{what} at step {step + 1} (epoch {step // steps + 1}), with learning rate {lr:.3g}. "
        f"{culprit}. The saved state is intact, but resuming would end here again. Likely causes: "
        f"a learning rate too high, a warm-up too short, no clipping of gradients. Start again in "
        f"another folder with a smaller learning rate; {BEST_SO_FAR}"
    )
