"""Scaled dot-product attention (paper eq. 4), for all heads and samples at once."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, array_module, short_repr
from pvt_ref.ops import Ops


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCache:
    """What :func:`attention_backward` needs.

    Attributes:
        q: queries (B, N, n, d), the forward's own.
        k: keys (B, N, m, d), the forward's own.
        v: values (B, N, m, d), the forward's own.
        scale: the factor on the scores.
        weights: (B, N, n, m), A after dropout.
        softmax: cache of the softmax over the scores (B, N, n, m).
        drop: cache of the dropout on A; None if nothing was dropped.
    """

    q: Array  # (B, N, n, d), dk needs it
    k: Array  # (B, N, m, d), dq needs it
    v: Array  # (B, N, m, d), dA needs it
    scale: float
    weights: Array  # (B, N, n, m), after dropout: dv needs them
    softmax: Any
    drop: Any  # None if nothing was dropped

    __repr__ = short_repr


def attention_weights(q: Array, k: Array, scale: float, ops: Ops) -> Array:
    """A = Softmax(scale * q k^T) of paper eq. 4: a row is the picture "where does this query look".

    Args:
        q: queries (B, N, n, d).
        k: keys (B, N, m, d), of the same dtype.
        scale: 1 / sqrt(d) in the paper.
        ops: the record of operations.

    Returns:
        (B, N, n, m) of q's dtype, rows summing to 1.
    """
    return ops.softmax.forward(_scores(q, k, scale), keep=False)[0]


def _scores(q: Array, k: Array, scale: float) -> Array:
    xp = array_module(q)
    scores = q @ xp.matrix_transpose(k)  # (B, N, n, m)
    scores *= scale
    return scores


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    ops: Ops,
    scale: float,
    drop_rate: float = 0.0,
    rng: np.random.Generator | None = None,
    keep: bool = True,
) -> tuple[Array, AttentionCache | None]:
    """Attention(q, k, v) = Dropout(Softmax(scale * q k^T)) v, paper eq. 4.

    The paper takes it from Vaswani et al. 2017 (arXiv 1706.03762, eq. 1).

    Args:
        q: queries (B, N, n, d).
        k: keys (B, N, m, d).
        v: values (B, N, m, d), all three of one dtype, float32 or float64.
        ops: the record of operations.
        scale: 1 / sqrt(d) in the paper.
        drop_rate: dropout on the weights, in [0, 1).
        rng: source of the dropout mask; None for inference.
        keep: whether a cache for the backward is returned; without it, it is None.

    Returns:
        (B, N, n, d) of q's dtype, and the cache.
    """
    weights, softmax_cache = ops.softmax.forward(_scores(q, k, scale), keep=keep)  # (B, N, n, m)
    weights, drop_cache = ops.dropout.forward(weights, drop_rate, rng)
    y = weights @ v  # (B, N, n, d)
    if not keep:
        return y, None
    return y, AttentionCache(q, k, v, scale, weights, softmax_cache, drop_cache)


def attention_backward(cache: AttentionCache, dy: Array, ops: Ops) -> tuple[Array, Array, Array]:
    """Gradients of :func:`attention_forward`, paper eq. 4.

    With S the scores, A the weights and A' those that dropout left, per head::

        y  = A' v               dA' = dy v^T          dv = A'^T dy
        A' = Dropout(A)         dA  = Dropout's mask on dA'
        A  = Softmax(S)         dS  = A * (dA - <dA, A>)
        S  = scale * q k^T      dq  = scale * dS k    dk = scale * dS^T q

    Args:
        cache: from the forward.
        dy: dL/dy (B, N, n, d).
        ops: the record that the forward was given.

    Returns:
        dq (B, N, n, d), dk (B, N, m, d) and dv (B, N, m, d), of dy's dtype.
    """
    xp = array_module(dy)
    # y = weights @ v
    dv = xp.matrix_transpose(cache.weights) @ dy  # (B, N, m, d)
    dweights = dy @ xp.matrix_transpose(cache.v)  # (B, N, n, m)
    # weights = dropout(softmax(scores))
    dweights = ops.dropout.backward(cache.drop, dweights)  # (B, N, n, m)
    dscores = ops.softmax.backward(cache.softmax, dweights)  # (B, N, n, m)
    # scores = scale * q @ k^T
    dscores = dscores * cache.scale  # (B, N, n, m)
    dq = dscores @ cache.k  # (B, N, n, d)
    dk = xp.matrix_transpose(dscores) @ cache.q  # (B, N, m, d)
    return dq, dk, dv
