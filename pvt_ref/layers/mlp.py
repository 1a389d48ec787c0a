"""The feed-forward half of a block: widen E-fold, bend, narrow again, each token for itself."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.arrays import Array
from pvt_ref.layers.linear import LinearParams
from pvt_ref.ops import Ops


@dataclass(frozen=True, slots=True, eq=False)
class MLPParams:
    """The two linear layers, or their gradients."""

    fc1: LinearParams  # (E*C, C)
    fc2: LinearParams  # (C, E*C)


@dataclass(frozen=True, slots=True, eq=False)
class MLPCache:
    """The caches of the parts, each for its own backward."""

    fc1: Any
    gelu: Any
    drop1: Any
    fc2: Any
    drop2: Any


def mlp_forward(
    p: MLPParams,
    x: Array,
    ops: Ops,
    drop_rate: float = 0.0,
    rng: np.random.Generator | None = None,
    keep: bool = True,
) -> tuple[Array, MLPCache | None]:
    """y = drop(fc2(drop(GELU(fc1(x))))).

    Args:
        p: the weights.
        x: tokens (B, n, C).
        ops: the record of operations.
        drop_rate: dropout after the GELU and after fc2.
        rng: source of the dropout masks; None for inference.
        keep: whether a cache for the backward is returned; without it, it is None.

    Returns:
        (B, n, C) and the cache.
    """
    hidden, fc1_cache = ops.linear.forward(p.fc1, x, keep=keep)  # (B, n, E*C)
    hidden, gelu_cache = ops.gelu.forward(hidden, keep=keep)  # (B, n, E*C)
    hidden, drop1_cache = ops.dropout.forward(hidden, drop_rate, rng)
    y, fc2_cache = ops.linear.forward(p.fc2, hidden, keep=keep)  # (B, n, C)
    y, drop2_cache = ops.dropout.forward(y, drop_rate, rng)
    if not keep:
        return y, None
    return y, MLPCache(fc1_cache, gelu_cache, drop1_cache, fc2_cache, drop2_cache)


def mlp_backward(p: MLPParams, cache: MLPCache, dy: Array, ops: Ops) -> tuple[Array, MLPParams]:
    """Gradients of :func:`mlp_forward`: each step's own, in reverse order.

    Args:
        dy: dL/dy (B, n, C).

    Returns:
        dx (B, n, C) and the gradients of the weights.
    """
    # y = dropout(fc2(hidden))
    dy = ops.dropout.backward(cache.drop2, dy)  # (B, n, C)
    dhidden, dfc2 = ops.linear.backward(p.fc2, cache.fc2, dy)  # (B, n, E*C)
    # hidden = dropout(gelu(fc1(x)))
    dhidden = ops.dropout.backward(cache.drop1, dhidden)  # (B, n, E*C)
    dhidden = ops.gelu.backward(cache.gelu, dhidden)  # (B, n, E*C)
    dx, dfc1 = ops.linear.backward(p.fc1, cache.fc1, dhidden)  # (B, n, C)
    return dx, MLPParams(dfc1, dfc2)
