"""A whole step of a training as one CUDA graph: forward, loss, backward, clipping, AdamW, average.

The graph changes weights where they lie, so it owns them: :class:`CapturedSteps` copies those of
the training into arrays of its own, and the states of later steps hold these. Whoever keeps a state
beyond the next step has to copy it, as saving does.

What a step draws or looks up goes in as arrays: the micro-batches, the numbers that masks are drawn
from, learning rates, and how fast the average moves.

Several ranks exchange their gradients amid a step, by MPI through the host, so their steps are
launched as usual.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pvt_ref.api import backward, batch_buffers, forward_with_cache, with_buffers
from pvt_ref.arrays import Array, array_module, dtype_name, from_host
from pvt_ref.draws import Draws, What
from pvt_ref.errors import DeviceError
from pvt_ref.kernels.cuda.capture import REFUSED, SEEN, Captured, capture, replays
from pvt_ref.kernels.cuda.optimizer import adamw, clip_factor, gather
from pvt_ref.models.architecture import architecture_of
from pvt_ref.ops import Ops
from pvt_ref.train.adamw import AdamWState
from pvt_ref.train.data_parallel import Part, add_part, add_trees, add_up_parts
from pvt_ref.train.gradients import add_gradients
from pvt_ref.train.image_loss import image_loss
from pvt_ref.train.on_device import Factors, rates, settings_for, trained
from pvt_ref.train.recipe import Recipe
from pvt_ref.train.segmentation import pixel_loss_of_targets, pixel_targets
from pvt_ref.tree import first_array, map_arrays, to_numpy, without_buffers


class Batch(NamedTuple):
    """A micro-batch: what it draws, its share of the batch, images and targets."""

    draws: Draws
    share: float
    images: Array
    targets: Array


class Replay(NamedTuple):
    """What a replayed step gives. losses has loss and right answers of each micro-batch."""

    losses: list[tuple[float, int]]
    norm: float
    params: Any
    optimizer: AdamWState
    average: Any


# Masks --------------------------------------------------------------------------------------------

#: Where a forward draws, and how many numbers.
_Note = tuple[What, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _NotedDraws(Draws):
    """The same draws, which note where they are asked and for what."""

    notes: list[_Note] = field(default_factory=list, compare=False)

    def at(self, what: What, where: int = 0) -> Any:
        rng = Draws.at(self, what, where)

        def random(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            self.notes.append((what, where, tuple(shape)))
            return rng.random(shape, dtype=dtype)

        return _Random(random)


@dataclass(frozen=True, slots=True)
class _GivenDraws(Draws):
    """Draws that were made before: numbers (n,) on the device, in the order of the notes."""

    notes: tuple[_Note, ...] = ()
    numbers: Any = None

    def at(self, what: What, where: int = 0) -> Any:
        parts, start = [], 0
        for noted_what, noted_where, shape in self.notes:
            stop = start + math.prod(shape)
            if (noted_what, noted_where) == (what, where):
                parts.append(array_module(self.numbers).reshape(self.numbers[start:stop], shape))
            start = stop
        given = iter(parts)
        return _Random(lambda shape, dtype: next(given))


@dataclass(frozen=True, slots=True)
class _Random:
    """Of a generator what masks ask for."""

    random: Any


def draw_again(draws: Draws, notes: Sequence[_Note]) -> np.ndarray:
    """The numbers of a step, (n,) float32, in the order in which they were noted."""
    rngs = {(what, where): draws.at(what, where) for what, where, _ in notes}
    numbers = [
        rngs[what, where].random(shape, dtype=np.float32).reshape(-1)
        for what, where, shape in notes
    ]
    return np.concatenate([np.empty(0, np.float32), *numbers])


# Steps --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured step, and the draws of each of its micro-batches."""

    replay: Captured
    notes: tuple[tuple[_Note, ...], ...]


class CapturedSteps:
    """The steps of one training: each kind is captured when it comes the second time.

    A kind is a configuration with its drop rates, a recipe, and the shapes of the batches. Only the
    graph of the last kind is kept.
    """

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self._owned: tuple[Any, Any, Any, Any] | None = None  # params, m, v, average
        self._kind: Any = None
        self._known: Any = None  # of that kind: nothing, SEEN, REFUSED or a _Graph

    @staticmethod
    def can(ops: Ops, params: Any) -> bool:
        """Whether steps with that table can be captured: in float32, on CUDA."""
        fits = settings_for(ops, without_buffers(params)) is not None
        return fits and replays(ops, first_array(params))

    def __call__(
        self,
        state: Any,
        batches: Sequence[Batch],
        config: Any,
        recipe: Recipe,
        lr: float,
        factors: Factors,
        scale: float | None,
        decay: float,
    ) -> Replay | None:
        """The step, replayed; None if it has to be made as usual.

        Args:
            state: a TrainState.
            batches: all micro-batches of the step.
            config: with the drop-path rates of this step.
            recipe: of the training.
            lr: of this step.
            factors: of lr.
            scale: of the loss, or None.
            decay: of the average.
        """
        inputs = [x for batch in batches for x in self._inputs(batch, config, recipe)]
        kind = (config, recipe, scale is None, *((x.shape, dtype_name(x)) for x in inputs))
        if kind != self._kind:
            self._kind, self._known = kind, SEEN
            return None
        if self._known is REFUSED:
            return None
        owned = self._own(state)
        params, m, v, average = owned
        numbers = np.array([1 - decay, 1.0 if scale is None else scale], np.float32)
        t = state.optimizer.t + 1
        host = [numbers, rates(without_buffers(params), t, lr, recipe.optimizer, factors)]
        if self._known is SEEN:
            self._known = self._capture(
                owned, batches, inputs, host, config, recipe, factors, scale
            )
            if self._known is REFUSED:
                self._owned = None
                return None
        graph: _Graph = self._known
        drawn = [draw_again(b.draws, notes) for b, notes in zip(batches, graph.notes, strict=True)]
        given = [from_host(x, like=inputs[0]) for x in (*host, *map(_at_least_one, drawn))]
        losses, clip = to_numpy(graph.replay(*given, *inputs))
        norm = float(clip[1])
        optimizer = AdamWState(t if math.isfinite(norm) else t - 1, m, v)
        losses = [(float(loss), int(hits)) for loss, hits in losses]
        return Replay(losses, norm, params, optimizer, average)

    @staticmethod
    def _inputs(batch: Batch, config: Any, recipe: Any) -> tuple[Array, ...]:
        """Images, and what the loss takes: labels would be checked, for which the host has to wait.

        Of classes of images their distribution (B, K); of pixels labels (B, H, W), distributions
        (B, K, H, W), and what their losses are multiplied by.
        """
        images, targets = batch.images, batch.targets
        if architecture_of(config).dense:
            t, share = pixel_targets(images, targets, config.num_classes, recipe)
            return images, targets, t, from_host(share, like=images)
        if targets.ndim == 2:
            return images, targets
        xp = array_module(targets)
        classes = from_host(np.arange(config.num_classes), like=targets)
        return images, xp.astype(xp.expand_dims(targets, axis=1) == classes, images.dtype)

    def _own(self, state: Any) -> tuple[Any, Any, Any, Any]:
        """The graph's own arrays, with what a state holds copied there if it does not lie there."""
        given = (state.params, state.optimizer.m, state.optimizer.v, state.average)
        owned = self._owned
        if owned is None:
            owned = self._owned = map_arrays(lambda x: x.copy(), given)
        elif any(mine is not x for mine, x in zip(owned, given, strict=True)):
            map_arrays(_write, owned, given)
        return owned

    def _capture(
        self,
        owned: tuple[Any, Any, Any, Any],
        batches: Sequence[Batch],
        inputs: list[Array],
        host: list[np.ndarray],
        config: Any,
        recipe: Recipe,
        factors: Factors,
        scale: float | None,
    ) -> Any:
        ops, (params, m, v, average) = self.ops, owned
        row = architecture_of(config)
        has_norms = row.batch_buffers is not None
        notes, drawn = [], []
        for batch in batches:
            draws = _NotedDraws(batch.draws.seed, batch.draws.step, batch.draws.micro_batch)
            forward_with_cache(
                params, batch.images, config, draws, ops=ops, batch_statistics=has_norms
            )
            notes.append(tuple(draws.notes))
            drawn.append(draw_again(batch.draws, draws.notes))
        shares, count = [batch.share for batch in batches], len(batches)
        max_norm = math.inf if recipe.clip_norm is None else recipe.clip_norm
        optimizer = recipe.optimizer
        constants = (optimizer.beta1, optimizer.beta2, optimizer.eps)

        def step(numbers: Array, rates: Array, *rest: Array) -> Any:
            parts: list[Part] = []
            losses, after = [], params
            each = len(inputs) // count
            for i in range(count):
                first = count + each * i
                images, targets = rest[first], rest[first + 1 : first + each]
                draws = _GivenDraws(0, 0, i, notes[i], rest[i])
                logits, cache = forward_with_cache(
                    params, images, config, draws, ops=ops, batch_statistics=has_norms
                )
                if row.dense:
                    labels, t, share = targets
                    loss, dlogits, hits = pixel_loss_of_targets(logits, labels, t, share, ops)
                else:
                    loss, dlogits, hits = image_loss(logits, targets[0], recipe)
                losses.append((loss, hits))
                if has_norms:
                    after = with_buffers(after, batch_buffers(cache))
                if scale is not None:
                    dlogits = dlogits * numbers[1]
                grads, _ = backward(params, cache, dlogits, config)
                del cache
                add_part(parts, Part(0, i, add_gradients(None, grads, shares[i])), add_trees)
            grads = add_up_parts(parts, add_trees)
            cuda = ops.settings
            trees = (without_buffers(params), grads, m, v)
            arrays = gather(*(trained(x, factors) for x in trees), in_place=True)
            clip = clip_factor(arrays, max_norm, cuda, None if scale is None else numbers[1:])
            adamw(arrays, rates, *constants, cuda, clip)

            if has_norms:
                map_arrays(_write, params.buffers, after.buffers)

            def move(a: Array, w: Array) -> None:  # as ema_step
                counts = not dtype_name(w).startswith("float")
                _write(a, w if counts or not recipe.ema_decay else a + numbers[0] * (w - a))

            map_arrays(move, average, params)
            return losses, clip

        before = map_arrays(lambda x: x.copy(), owned)
        given = [from_host(x, like=inputs[0]) for x in (*host, *map(_at_least_one, drawn))]
        try:
            return _Graph(capture(step, *given, *inputs), tuple(notes))
        except DeviceError:
            return REFUSED
        finally:
            map_arrays(_write, owned, before)  # the runs that warm up have changed them


def _write(x: Array, value: Array) -> None:
    x[...] = value


def _at_least_one(numbers: np.ndarray) -> np.ndarray:
    """The numbers, or one that nobody asks for: an array of a graph is not empty."""
    return numbers if numbers.size else np.zeros(1, np.float32)
