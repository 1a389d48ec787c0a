"""One step of a training: from the state after s steps to the state after s + 1.

A state holds all that the rest of the training depends on: so a step is a function, a training can
be stopped after any of them, and going on from a saved one gives the same bits.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, array_module, dtype_name, from_host, to_numpy
from pvt_ref.config import PVTConfig
from pvt_ref.errors import TrainingError
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.model import backward, forward_with_cache
from pvt_ref.params import PVTParams
from pvt_ref.train.adamw import AdamWState, adamw_init, adamw_step
from pvt_ref.train.augment import cutout, mixup, one_hot, random_crop, random_flip
from pvt_ref.train.data import LabelledImages
from pvt_ref.train.diagnosis import first_non_finite
from pvt_ref.train.ema import ema_decay_of_step, ema_step
from pvt_ref.train.gradients import add_gradients, clip_by_global_norm
from pvt_ref.train.recipe import Recipe
from pvt_ref.train.schedule import config_of_epoch


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
        best_epoch: after how many epochs that was.
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
        ValueError: if seed is below 0.
    """
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
            Also if there are fewer samples than a batch has.
        RangeError: if a label is no class of the model; also as :func:`pvt_ref.forward`.
        ShapeError: as :func:`pvt_ref.forward_with_cache`.
        ArrayTypeError: as :func:`pvt_ref.forward_with_cache`.
        ConfigError: as :func:`pvt_ref.forward_with_cache`.
    """
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
        with np.errstate(all="ignore"):  # what is not finite is found below, and named
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
    with np.errstate(all="ignore"):  # the loop looks at weights before it keeps them
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
        ValueError: if it is the state of another kind.
    """
    bits = np.random.PCG64()
    bits.state = dict(rng_state)  # type: ignore[assignment]
    return np.random.Generator(bits)


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
        culprit: a sentence of :func:`~pvt_ref.train.diagnosis.first_non_finite`.

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
