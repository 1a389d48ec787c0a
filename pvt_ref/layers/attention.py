"""Scaled dot-product attention (paper eq. 4), for all heads and samples at once."""

from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.draws import Rng
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.softmax import softmax
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class AttentionCache:
    """The forward's own q, k and v, the weights A (B, N, n, m) after dropout, and the caches."""

    q: Array
    k: Array
    v: Array
    scale: float
    weights: Array
    softmax: Any
    drop: Any  # None if nothing was dropped


def attention_weights(q: Array, k: Array, scale: float, ops: Ops) -> Array:
    """A = Softmax(scale * q k^T), paper eq. 4, (B, N, n, m), of q (B, N, n, d), k (B, N, m, d)."""
    return ops[softmax].forward(None, _scores(q, k, scale), ops, keep=False)[0]


def _scores(q: Array, k: Array, scale: float) -> Array:
    """scale * q k^T of queries q (B, N, n, d) and keys k (B, N, m, d)."""
    xp = array_module(q)
    scores = q @ xp.matrix_transpose(k)  # (B, N, n, m)
    scores *= scale
    return scores


def attention_forward(
    p: None,
    x: tuple[Array, Array, Array],
    ops: Ops,
    scale: float,
    drop_rate: float = 0.0,
    rng: Rng = None,
    keep: bool = True,
) -> tuple[Array, AttentionCache | None]:
    """Attention(q, k, v) = Dropout(Softmax(scale * q k^T)) v, paper eq. 4.

    The paper takes it from Vaswani et al. 2017 (arXiv 1706.03762, eq. 1).

    Args:
        p: None.
        x: queries q (B, N, n, d), keys k (B, N, m, d) and values v (B, N, m, d), of one dtype.
        ops: the table of operations.
        scale: 1 / sqrt(d) in the paper.
        drop_rate: dropout on the attention weights, in [0, 1).
        rng: source of the dropout mask; None for inference.
        keep: whether to return a cache for the backward.

    Returns:
        (B, N, n, d) of q's dtype, and the cache.
    """
    q, k, v = x
    scores = _scores(q, k, scale)  # (B, N, n, m)
    weights, softmax_cache = ops[softmax].forward(None, scores, ops, keep=keep)  # (B, N, n, m)
    del scores  # no longer needed
    weights, drop_cache = ops[dropout].forward(None, weights, ops, drop_rate, rng, keep)
    y = weights @ v  # (B, N, n, d)
    if not keep:
        return y, None
    return y, AttentionCache(q, k, v, scale, weights, softmax_cache, drop_cache)


def attention_backward(
    p: None, cache: AttentionCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[tuple[Array, Array, Array], None]:
    """Gradients of :func:`attention_forward`, paper eq. 4.

    With S the scores, A the attention weights and A' those that dropout left, per head::

        y  = A' v               dA' = dy v^T          dv = A'^T dy
        A' = Dropout(A)         dA  = Dropout's mask on dA'
        A  = Softmax(S)         dS  = A * (dA - <dA, A>)
        S  = scale * q k^T      dq  = scale * dS k    dk = scale * dS^T q

    Args:
        p: None.
        cache: from the forward, k (B, N, m, d).
        dy: dL/dy (B, N, n, d).
        ops: the table that the forward was given.

    Returns:
        (dq, dk, dv), in the shapes of q, k and v, of dy's dtype; and None.
    """
    xp = array_module(dy)
    # y = weights @ v
    dv = xp.matrix_transpose(cache.weights) @ dy  # (B, N, m, d)
    dweights = dy @ xp.matrix_transpose(cache.v)  # (B, N, n, m)
    # weights = dropout(softmax(scores))
    dweights, _ = ops[dropout].backward(None, cache.drop, dweights, ops)  # (B, N, n, m)
    dscores, _ = ops[softmax].backward(None, cache.softmax, dweights, ops)  # (B, N, n, m)
    # scores = scale * q @ k^T
    dscores = dscores * cache.scale  # (B, N, n, m)
    dq = dscores @ cache.k  # (B, N, n, d)
    dk = xp.matrix_transpose(dscores) @ cache.q  # (B, N, m, d)
    return (dq, dk, dv), None


attention = Operation(attention_forward, attention_backward)
