"""The optimiser's step by kernels for CUDA: clipping and AdamW for all arrays, in three launches.

It takes the place of :func:`~pvt_ref.train.gradients.clip_by_global_norm` and
:func:`~pvt_ref.train.adamw.adamw_step` where the table of operations is of those kernels. The host
waits once, for the norm.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, array_module, from_host
from pvt_ref.kernels.cuda.launch import Cuda, is_float32
from pvt_ref.kernels.cuda.optimizer import adamw, clip_factor, gather
from pvt_ref.ops import Ops
from pvt_ref.train.adamw import AdamW, AdamWState, is_decayed
from pvt_ref.train.checks import check_alike
from pvt_ref.tree import first_array, map_named, named_arrays

#: Factors of the learning rate by key; None: all are 1.
Factors = Mapping[str, float] | None


def settings_for(ops: Ops, params: Any) -> Cuda | None:
    """The kernels' settings if they can update these weights: all float32."""
    fits = isinstance(ops.settings, Cuda) and is_float32(*(w for _, w in named_arrays(params)))
    return ops.settings if fits else None


def trained(tree: Any, factors: Factors) -> list[Array]:
    """The arrays of weights that are not frozen."""
    return [x for key, x in named_arrays(tree) if factors is None or factors.get(key, 1.0)]


def rates(params: Any, t: int, lr: float, settings: AdamW, factors: Factors) -> np.ndarray:
    """What step t (from 1) multiplies with, (arrays, 3) float32: see optimizer.adamw."""
    bias_1, bias_2 = 1 - settings.beta1**t, 1 - settings.beta2**t
    rows: list[tuple[float, float, float]] = []
    for key, w in named_arrays(params):
        share = 1.0 if factors is None else factors.get(key, 1.0)
        if share:
            decayed = is_decayed(key, w, settings.decay_positions)
            decay = lr * settings.weight_decay * decayed * share
            rows.append((1 - decay, -lr * share / bias_1, 1 / math.sqrt(bias_2)))
    return np.array(rows, np.float32)


def update(
    params: Any,
    grads: Any,
    state: AdamWState,
    lr: float,
    settings: AdamW,
    factors: Factors,
    max_norm: float,
    scale: float | None,
    cuda: Cuda,
) -> tuple[Any, AdamWState, float]:
    """The new weights and state, and the norm of the gradients, which are scale times too large.

    If the norm is not finite, weights and state are as they were.
    """
    check_alike("grads", grads, params)
    like = first_array(params)
    w, g, m, v = (trained(tree, factors) for tree in (params, grads, state.m, state.v))
    arrays = gather(w, g, m, v)
    by = None if scale is None else from_host(np.array([scale], np.float32), like=like)
    clip = clip_factor(arrays, max_norm, cuda, by)
    table = from_host(rates(params, state.t + 1, lr, settings, factors), like=like)
    made = adamw(arrays, table, settings.beta1, settings.beta2, settings.eps, cuda, clip)
    norm = float(array_module(clip).reshape(clip[1:], ()))
    still = {key for key, share in (factors or {}).items() if not share}

    def with_new(tree: Any, new: tuple[Array, ...]) -> Any:
        each = iter(new)
        return map_named(lambda key, x: x if key in still else next(each), tree)

    trees = (params, state.m, state.v)
    new_w, new_m, new_v = (with_new(t, x) for t, x in zip(trees, made, strict=True))
    return new_w, AdamWState(state.t + math.isfinite(norm), new_m, new_v), norm
