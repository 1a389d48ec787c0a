"""One step of a training: from the state after s steps to the state after s + 1.

A state holds all that the rest of the training depends on, and random numbers come from counters:
so a training can be stopped after any step, and going on from a saved one gives the same bits.
"""

import dataclasses
import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.api import (
    backward,
    batch_buffers,
    check_has_classifier,
    forward_with_cache,
    with_buffers,
)
from pvt_ref.arrays import Array, array_module, dtype_name, from_host, quietly
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
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.models.architecture import architecture_of, architectures, check_params_type
from pvt_ref.report.diagnosis import first_non_finite
from pvt_ref.train.adamw import AdamWState, adamw_init, adamw_step
from pvt_ref.train.data_parallel import ALONE, Part, Ranks, add_part, add_trees
from pvt_ref.train.ema import ema_decay_of_step, ema_step
from pvt_ref.train.gradients import add_gradients, clip_by_global_norm
from pvt_ref.train.rates import learning_rate_factors, without_frozen
from pvt_ref.train.recipe import Recipe, SegmentationRecipe
from pvt_ref.train.schedule import config_of_epoch
from pvt_ref.train.segmentation import draw_pairs, pixel_loss
from pvt_ref.tree import first_array, record, to_numpy, without_buffers

#: For those who start anew.
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


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step was like."""

    loss: float  # mean over the batch, label smoothing and mixing included
    hits: int  # samples of the batch whose likeliest class was (mostly) theirs
    lr: float  # the learning rate, of the head if layers have their own
    grad_norm: float  # norm of all gradients but those of frozen weights, before clipping


def start_training(params: Any, samples: int, seed: int) -> TrainState:
    """The state before the first step.
    Raises: ArrayTypeError if params is no record of parameters; RangeError if samples is no whole
    number of at least 1, or seed of at least 0.

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
    state: TrainState, data: Samples, config: Any, recipe: Recipe, ranks: Ranks = ALONE
) -> tuple[TrainState, StepReport]:
    """The next state: draw a batch, change it at random, forward, loss, backward, clip, update.

    Args:
        state: where the training stands; its arrays say on which device it runs.
        data: what it learns from; the same at every step.
        config: the model, with drop-path rates as they are at their peak.
        recipe: how.
        ranks: the processes that share the step's micro-batches; all call this with the same.

    Returns:
        The next state, and how the step went.

    Raises:
        TrainingError: if the loss or a gradient is not finite, but for gradients of frozen weights;
            the message has the step, the learning rate, and the first layer whose output was not.
            Also if data do not suit, or the model lacks what the recipe freezes.
        RangeError: if a number in state is outside its range, or crop_padding exceeds the images.
        ShapeError: if state is of another model, or of another number of samples.
        ArrayTypeError, ConfigError, PVTError: as :func:`pvt_ref.forward_with_cache`.
    """
    check_type("ranks", ranks, Ranks, "from pvt_ref.train.data_parallel")
    check_samples(data, "data", config, recipe)
    check_state(state)
    if state.samples != len(data):
        raise ShapeError(f"state is of a training on {state.samples} samples; data has {len(data)}")
    # what is not finite is found, and named
    return quietly(_step, state, data, config, recipe, ranks)


def _step(
    state: TrainState, data: Samples, config: Any, recipe: Recipe, ranks: Ranks
) -> tuple[TrainState, StepReport]:
    steps = recipe.steps_per_epoch(len(data))
    epoch, index = divmod(state.step, steps)
    factors = None  # all are 1; left out, they save 1 % of a small model's step
    if recipe.layer_decay < 1 or recipe.frozen:
        factors = learning_rate_factors(config, recipe.layer_decay, recipe.frozen)
    config = config_of_epoch(config, epoch, recipe.drop_path_ramp_epochs)
    row = architecture_of(config)
    has_norms, loss_of = row.batch_buffers is not None, pixel_loss if row.dense else image_loss
    if index == 0:
        state = dataclasses.replace(state, epoch_loss=0.0, epoch_hits=0)
    chosen = batch_of_step(state.seed, state.step, len(data), recipe)[1]
    lr = recipe.learning_rate(state.step, steps)

    told, parts = [], []
    try:
        for micro_batch, samples in shard_of(chosen, recipe, ranks):
            draws = Draws(state.seed, state.step, micro_batch)
            images, targets = draw_batch(state.params, data, samples, config, recipe, epoch, draws)
            logits, cache = forward_with_cache(
                state.params, images, config, draws, batch_statistics=has_norms
            )
            part_loss, dlogits, part_hits = loss_of(logits, targets, recipe)
            value = float(part_loss)  # once: it makes the host wait for the device
            if not math.isfinite(value):
                culprit = first_non_finite(state.params, images, config, draws)
                raise diverged(f"the loss is {value}", state.step, steps, lr, culprit)
            part_grads, _ = backward(state.params, cache, dlogits, config)
            seen = to_numpy(batch_buffers(cache)) if has_norms else None
            del cache  # the largest thing here; the next micro-batch makes its own
            share = len(samples) / len(chosen)
            add_part(parts, Part(0, micro_batch, add_gradients(None, part_grads, share)), add_trees)
            told.append((share * value, part_hits, seen))
    except PVTError as error:
        ranks.fail(error)
        raise
    loss, hits, moved = 0.0, 0, state.params
    for part_loss, part_hits, seen in itertools.chain(*ranks.gather(told)):  # by micro-batch
        loss, hits = loss + part_loss, hits + part_hits
        if has_norms:
            moved = with_buffers(moved, seen)
    grads = ranks.sum(parts, recipe.accumulate)
    if factors is not None:
        grads = without_frozen(grads, factors)
    max_norm = math.inf if recipe.clip_norm is None else recipe.clip_norm
    grads, norm = clip_by_global_norm(grads, max_norm)
    largest = float(np.finfo(dtype_name(first_array(state.params))).max)
    if not min(norm, max_norm) ** 2 < largest or not math.isfinite(norm):  # AdamW squares them
        culprit = first_non_finite(grads)
        raise diverged(f"the norm of the gradients is {norm}", state.step, steps, lr, culprit)

    decay = ema_decay_of_step(state.step, recipe.ema_decay)
    # the loop looks at weights before it keeps them
    trained = without_buffers(state.params)
    params, optimizer = adamw_step(trained, grads, state.optimizer, lr, recipe.optimizer, factors)
    if has_norms:
        params = dataclasses.replace(params, buffers=moved.buffers)
    average = ema_step(state.average, params, decay)
    changes = {"step": state.step + 1, "params": params, "optimizer": optimizer, "average": average}
    totals = {"epoch_loss": state.epoch_loss + loss, "epoch_hits": state.epoch_hits + hits}
    return dataclasses.replace(state, **changes, **totals), StepReport(loss, hits, lr, norm)


def image_loss(logits: Array, targets: Array, recipe: Recipe) -> tuple[Array, Array, int]:
    """Loss of logits (B, K), its gradient, and how many are right (mixed: about the larger one)."""
    xp = array_module(logits)
    loss, dlogits = cross_entropy(logits, targets, recipe.label_smoothing)
    if targets.ndim == 2:  # mixed: the class with the larger share
        targets = xp.argmax(targets, axis=1)
    return loss, dlogits, int(to_numpy(xp.sum(xp.argmax(logits, axis=1) == targets)))


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
    """Refuses what of such a recipe would be ignored, or does not fit. Raises: TrainingError."""
    if not dense:
        what = "recipe is a SegmentationRecipe, and this network learns one class for each image"
        raise TrainingError(f"{what}. Needed is a plain Recipe")
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
    """The error that ends a training after so many steps, of so many an epoch, at a rate lr."""
    return TrainingError(
        f"{what} at step {step + 1} (epoch {step // steps + 1}), with learning rate {lr:.3g}. "
        f"{culprit}. What was saved before is whole, but resuming would end here again. Likely "
        f"causes: a learning rate too high, a warm-up too short, no clipping of gradients. Start "
        f"anew in another folder with a smaller one; {BEST_SO_FAR}"
    )
