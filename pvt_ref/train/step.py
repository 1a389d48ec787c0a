"""One step of a training: from the state after s steps to the state after s + 1.

A state holds all that the rest of the training depends on: so a step is a function, a training can
be stopped after any of them, and going on from a saved one gives the same bits.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.api import backward, check_has_classifier, forward_with_cache
from pvt_ref.arrays import Array, array_module, describe_type, dtype_name, from_host, quietly
from pvt_ref.checks import is_whole
from pvt_ref.data.augment import cutout, mixup, one_hot, random_crop, random_flip
from pvt_ref.data.labelled import LabelledImages
from pvt_ref.errors import ArrayTypeError, RangeError, ShapeError, TrainingError, shown
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.models.architecture import check_params_type
from pvt_ref.models.pvt.config import PVTConfig
from pvt_ref.models.pvt.params import PVTParams
from pvt_ref.report.diagnosis import first_non_finite
from pvt_ref.train.adamw import AdamWState, adamw_init, adamw_step
from pvt_ref.train.checks import check_number, check_type
from pvt_ref.train.ema import ema_decay_of_step, ema_step
from pvt_ref.train.gradients import add_gradients, clip_by_global_norm
from pvt_ref.train.recipe import Recipe
from pvt_ref.train.schedule import config_of_epoch
from pvt_ref.tree import to_numpy


@dataclass(frozen=True, slots=True, eq=False)
class TrainState:
    """A training after ``step`` steps. No step changes one; it makes the next.

    Attributes:
        step: steps done.
        params: the weights.
        optimizer: what AdamW remembers.
        average: exponential moving average of params, in the same shapes.
        rng: state of the generator, as NumPy gives it.
        order: (N,) int64, the order of the N samples in the epoch in progress.
        epoch_loss: sum of the losses over the steps of the epoch in progress.
        epoch_hits: right answers among the samples of the epoch in progress.
        best_accuracy: of the averaged weights, on the samples held out; -1 before the first epoch.
        best_epoch: after how many epochs that was; 0 before the first.
        best_sha256: of the averaged weights then, by which their file is known; "" before.
    """

    step: int
    params: PVTParams
    optimizer: AdamWState
    average: PVTParams
    rng: Mapping[str, Any]
    order: np.ndarray
    epoch_loss: float = 0.0
    epoch_hits: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = 0
    best_sha256: str = ""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step was like.

    Attributes:
        loss: mean over the batch, label smoothing and mixup included.
        hits: samples of the batch whose likeliest class was (mostly) theirs.
        lr: the learning rate.
        grad_norm: norm of all gradients, before clipping.
    """

    loss: float
    hits: int
    lr: float
    grad_norm: float


def start_training(params: PVTParams, samples: int, seed: int) -> TrainState:
    """The state before the first step.

    Args:
        params: the first weights, NumPy or CuPy.
        samples: how many there are to learn from.
        seed: of the generator, at least 0.

    Returns:
        A state with step 0, whose average is params itself.

    Raises:
        ArrayTypeError: if params is not a PVTParams.
        RangeError: if samples is no whole number of at least 1, or seed of at least 0.
    """
    check_params_type(params)
    samples = check_number("samples", samples, least=1, most=2**31, whole=True)
    seed = check_number("seed", seed, least=0, whole=True)
    rng = np.random.Generator(np.random.PCG64(seed))
    order = np.arange(samples, dtype=np.int64)
    return TrainState(0, params, adamw_init(params), params, rng.bit_generator.state, order)


def train_step(
    state: TrainState, data: LabelledImages, config: PVTConfig, recipe: Recipe
) -> tuple[TrainState, StepReport]:
    """The next state: draw a batch, change it at random, forward, loss, backward, clip, update.

    Args:
        state: where the training stands; its arrays say on which device it runs.
        data: what it learns from; the same at every step.
        config: the model, with drop-path rates as they are at their peak.
        recipe: how.

    Returns:
        The next state, and how the step went.

    Raises:
        TrainingError: if the loss or a gradient is not finite; the message has the step, the
            learning rate, and the first layer whose output was not. The state passed in is whole.
            Also if there are fewer samples than a batch has, or they do not fit the model.
        RangeError: if a number in state is outside its range, or images would be moved by more
            than their size.
        ShapeError: as :func:`pvt_ref.forward_with_cache`; also if state is of another model, or of
            another number of samples.
        ArrayTypeError: as :func:`pvt_ref.forward_with_cache`; also for an argument of another type.
        ConfigError: as :func:`pvt_ref.forward_with_cache`; also for a bare backbone.
    """
    check_samples(data, "data", config, recipe)
    check_state(state, len(data))
    return quietly(_step, state, data, config, recipe)  # what is not finite is found, and named


def _step(
    state: TrainState, data: LabelledImages, config: PVTConfig, recipe: Recipe
) -> tuple[TrainState, StepReport]:
    steps = recipe.steps_per_epoch(len(data))
    epoch, index = divmod(state.step, steps)
    config = config_of_epoch(config, epoch, recipe.drop_path_ramp_epochs)
    rng = generator(state.rng)
    if index == 0:
        order = rng.permutation(len(data))
        state = dataclasses.replace(state, order=order, epoch_loss=0.0, epoch_hits=0)
    chosen = state.order[index * recipe.batch_size : (index + 1) * recipe.batch_size]
    lr = recipe.learning_rate(state.step, steps)

    images, targets = draw_batch(state.params, data, chosen, config.num_classes, recipe, rng)
    loss, hits, grads = 0.0, 0, None
    for part in np.array_split(np.arange(len(chosen)), recipe.accumulate):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        before = rng.bit_generator.state  # for the diagnosis, if there must be one
        logits, cache = forward_with_cache(state.params, images[rows], config, rng)
        part_loss, dlogits = cross_entropy(logits, targets[rows], recipe.label_smoothing)
        value = float(part_loss)  # once: it makes the host wait for the device
        if not math.isfinite(value):
            culprit = first_non_finite(state.params, images[rows], config, generator(before))
            raise diverged(f"the loss is {value}", state.step, epoch, lr, culprit)
        part_grads, _ = backward(state.params, cache, dlogits, config)
        del cache  # the largest thing here; the next part makes its own
        share = len(part) / len(chosen)
        grads = add_gradients(grads, part_grads, share)
        loss += share * value
        hits += _count_hits(logits, targets[rows])
    assert grads is not None  # a batch has at least one part
    max_norm = math.inf if recipe.clip_norm is None else recipe.clip_norm
    grads, norm = clip_by_global_norm(grads, max_norm)
    largest = float(np.finfo(dtype_name(state.params.pos_embed1)).max)
    if not min(norm, max_norm) ** 2 < largest or not math.isfinite(norm):  # AdamW squares them
        culprit = first_non_finite(grads)
        raise diverged(f"the norm of the gradients is {norm}", state.step, epoch, lr, culprit)

    decay = ema_decay_of_step(state.step, recipe.ema_decay)
    # the loop looks at weights before it keeps them
    params, optimizer = adamw_step(state.params, grads, state.optimizer, lr, recipe.optimizer)
    average = ema_step(state.average, params, decay)
    following = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        optimizer=optimizer,
        average=average,
        rng=rng.bit_generator.state,
        epoch_loss=state.epoch_loss + loss,
        epoch_hits=state.epoch_hits + hits,
    )
    return following, StepReport(loss, hits, lr, norm)


def generator(rng_state: Mapping[str, Any]) -> np.random.Generator:
    """A generator that goes on where the state was taken.

    Args:
        rng_state: ``bit_generator.state`` of a PCG64.

    Returns:
        A new generator.

    Raises:
        RangeError: if it is none.
    """
    if not _is_rng_state(rng_state):
        raise RangeError(
            f"rng is {shown(rng_state)}; it must be bit_generator.state of a numpy.random.PCG64"
        )
    bits = np.random.PCG64()
    bits.state = dict(rng_state)  # type: ignore[assignment]
    return np.random.Generator(bits)


def _is_rng_state(value: Any) -> bool:
    """Whether NumPy could have given it: what it takes over unseen may be none all the same."""
    bounds = {"state": 2**128, "inc": 2**128}
    further = {"has_uint32": 2, "uinteger": 2**32}
    return (
        isinstance(value, Mapping)
        and value.keys() == {"bit_generator", "state", *further}
        and value["bit_generator"] == "PCG64"
        and isinstance(value["state"], Mapping)
        and value["state"].keys() == bounds.keys()
        and all(_is_below(value["state"][name], bound) for name, bound in bounds.items())
        and value["state"]["inc"] % 2 == 1
        and all(_is_below(value[name], bound) for name, bound in further.items())
    )


def _is_below(value: Any, bound: int) -> bool:
    return is_whole(value) and 0 <= value < bound


def check_samples(data: LabelledImages, name: str, config: PVTConfig, recipe: Recipe) -> None:
    """Refuses samples that a model cannot be trained on as a recipe says.

    Args:
        data: the samples.
        name: of them, for the message.
        config: the model.
        recipe: how it is to be trained.

    Raises:
        ArrayTypeError: if one of them is of another type.
        ConfigError: if the model is a bare backbone.
        TrainingError: if a label is no class of the model, or the channels are not its.
        ShapeError: if the model cannot take images of that size.
        RangeError: if images would be moved by more than their size.
    """
    check_has_classifier(config)
    check_type("recipe", recipe, Recipe)
    check_type(name, data, LabelledImages, "LabelledImages(images, labels, preprocessing)")
    data.check_fits(config, name)
    side = max(data.images.shape[2:])
    if recipe.crop_padding > side:
        raise RangeError(
            f"crop_padding is {recipe.crop_padding}, and images have only {side} pixels a side: "
            f"some would be moved out of sight"
        )


def check_state(state: TrainState, samples: int) -> None:
    """Refuses a state that no training can be in. (Its weights are checked where they are used.)

    Args:
        state: of a training.
        samples: how many there are to learn from.

    Raises:
        ArrayTypeError: if it is of another type, or its order not an array of int64.
        ShapeError: if its order is one of another number of samples.
        RangeError: if a field of it is outside its range; the message names it.
    """
    check_type("state", state, TrainState, "from start_training or the step before")
    check_type("state.optimizer", state.optimizer, AdamWState)
    check_params_type(state.params)
    order = state.order
    if not isinstance(order, np.ndarray) or order.dtype != np.int64:
        kind = f"dtype {order.dtype}" if isinstance(order, np.ndarray) else describe_type(order)
        raise ArrayTypeError(f"state.order is {kind}; it must be a NumPy array of int64")
    if order.shape != (samples,) or not samples:
        raise ShapeError(
            f"state.order has shape {order.shape}; with {samples} samples it must be ({samples},)"
        )
    inside = order.min() >= 0 and order.max() < samples
    if not inside or np.bincount(order, minlength=samples).max() > 1:
        raise RangeError("state.order is not the samples' numbers, each once, in some order")
    for name, most in {"step": 2**53, "epoch_hits": samples, "best_epoch": 2**53}.items():
        check_number(f"state.{name}", getattr(state, name), least=0, most=most, whole=True)
    check_number("state.optimizer.t", state.optimizer.t, least=0, most=2**53, whole=True)
    check_number("state.epoch_loss", state.epoch_loss, least=0)
    none = state.best_epoch == 0  # no epoch has been measured
    accuracy = check_number("state.best_accuracy", state.best_accuracy, least=-1, most=1)
    digest = state.best_sha256
    if accuracy < 0 and not (none and accuracy == -1):
        raise RangeError(f"state.best_accuracy is {accuracy}; it must be from 0 to 1, or -1 before")
    if not isinstance(digest, str) or not re.fullmatch("" if none else "[0-9a-f]{64}", digest):
        raise RangeError(
            f"state.best_sha256 is {shown(digest)}; with best_epoch {state.best_epoch} it must be "
            f"{'empty' if none else '64 hexadecimal digits'}"
        )
    try:
        generator(state.rng)
    except RangeError as error:
        raise RangeError(f"state.{error}") from None


def draw_batch(
    params: PVTParams,
    data: LabelledImages,
    chosen: np.ndarray,
    classes: int,
    recipe: Recipe,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Some of the samples, changed at random as the recipe says.

    Args:
        params: say on which device and of which dtype the batch is to be.
        data: all samples.
        chosen: (B,) integers, the places of those wanted.
        classes: K.
        recipe: which changes.
        rng: what they are drawn from: crop, flip, cutout, mixup, in this order.

    Returns:
        images (B, C, H, W) of params' dtype, and targets: int64 labels (B,), or with mixup
        distributions (B, K) of params' dtype.
    """
    like = params.pos_embed1
    images = random_crop(data.batch(chosen, like), recipe.crop_padding, rng)
    if recipe.flip:
        images = random_flip(images, rng)
    images = cutout(images, recipe.cutout, rng)
    labels = data.labels[chosen].astype(np.int64)
    if recipe.mixup_alpha == 0:
        return images, from_host(labels, like=like)
    return mixup(images, one_hot(labels, classes, like), recipe.mixup_alpha, rng)


def _count_hits(logits: Array, targets: Array) -> int:
    xp = array_module(logits)
    if targets.ndim == 2:  # mixed: the class with the larger share
        targets = xp.argmax(targets, axis=1)
    return int(to_numpy(xp.sum(xp.argmax(logits, axis=1) == targets)))


def diverged(what: str, step: int, epoch: int, lr: float, culprit: str) -> TrainingError:
    """The error that ends a training.

    Args:
        what: what is not finite, for the message.
        step: steps done before the one that failed.
        epoch: epochs done before.
        lr: the learning rate of the step.
        culprit: a sentence of :func:`~pvt_ref.report.diagnosis.first_non_finite`.

    Returns:
        The error, to be raised.
    """
    return TrainingError(
        f"{what} at step {step + 1} (epoch {epoch + 1}), with learning rate {lr:.3g}. {culprit}. "
        f"What was saved before is whole, but resuming would end here again. Likely causes: a "
        f"learning rate too high, a warm-up too short, no clipping of gradients. Start anew in "
        f"another folder with a smaller one; first=pvt_ref.load('.../best.safetensors').params "
        f"begins with the best weights so far"
    )
