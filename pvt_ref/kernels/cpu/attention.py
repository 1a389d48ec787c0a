"""Attention that computes, uses and discards its scores by tiles of queries.

No array of all n x m scores exists, so memory grows with the number of tokens, not with its square.
The backward recomputes the scores instead of keeping them: one more product, much less memory.
Scores have the keys first, (N, m, queries), so that the softmax runs along a short axis and
computes many queries side by side.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from pvt_ref.draws import Rng
from pvt_ref.kernels.cpu.linear import ones
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, by_group, cut
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.softmax import softmax
from pvt_ref.ops import Ops
from pvt_ref.tree import record

#: Queries (N, n, d), keys (N, m, d) and values (N, m, d) of an image, or of a batch, (B, ...) each.
QKV = tuple[np.ndarray, np.ndarray, np.ndarray]


def _sum_over_keys(x: np.ndarray) -> np.ndarray:
    """(N, 1, queries) of x (N, m, queries), by a matrix product: a plain sum rounds worse."""
    return np.matmul(ones(x.shape[1], x.dtype)[None], x)


def _weights(q: np.ndarray, k: np.ndarray, scale: float, scratch: Scratch) -> np.ndarray:
    """Softmax(scale * k q^T), (N, m, queries)."""
    (N, queries, _), m = q.shape, k.shape[1]
    weights = scratch("attention.weights", N, m, queries, dtype=q.dtype)
    np.matmul(k, q.transpose(0, 2, 1), out=weights)
    weights *= scale
    np.subtract(weights, np.maximum.reduce(weights, axis=1, keepdims=True), weights)
    np.exp(weights, weights)
    np.divide(weights, _sum_over_keys(weights), weights)
    return weights


def _queries(q: np.ndarray, k: np.ndarray, tiling: Tiling) -> list[slice]:
    """Tiles of queries whose scores fit in memory for one tile."""
    row = k.shape[0] * k.shape[1]  # scores of a query, all heads
    return list(cut(slice(0, q.shape[1]), max(1, tiling.elements // row)))


def attend_rows(qkv: QKV, scale: float, y: np.ndarray, scratch: Scratch, tiling: Tiling) -> None:
    """Writes Softmax(scale * q k^T) v (paper eq. 4) to y, for some queries and all keys."""
    q, k, v = qkv
    for part in _queries(q, k, tiling):
        weights = _weights(q[:, part], k, scale, scratch)
        np.matmul(weights.transpose(0, 2, 1), v, out=y[:, part])


def attend_backward_rows(
    qkv: QKV, scale: float, dy: np.ndarray, dqkv: QKV, scratch: Scratch, tiling: Tiling
) -> None:
    """Writes the gradient to dq; adds the contributions of these queries to dk and dv.

    The equations are those of :func:`pvt_ref.layers.attention.attention_backward`.
    """
    (q, k, v), (dq, dk, dv) = qkv, dqkv
    for part in _queries(q, k, tiling):
        weights = _weights(q[:, part], k, scale, scratch)
        dv += np.matmul(weights, dy[:, part])
        dscores = scratch("attention.dscores", *weights.shape, dtype=dy.dtype)
        np.matmul(v, dy[:, part].transpose(0, 2, 1), out=dscores)  # dL/dweights
        dscores *= weights
        weights *= _sum_over_keys(dscores)
        dscores -= weights
        dscores *= scale
        np.matmul(dscores.transpose(0, 2, 1), k, out=dq[:, part])
        dk += np.matmul(dscores, q[:, part])


@record
class AttentionCache:
    """What the scores are recomputed from: the forward's own arrays, and scale."""

    qkv: QKV
    scale: float


def attention_forward(
    p: None,
    x: QKV,
    ops: Ops,
    scale: float,
    drop_rate: float = 0.0,
    rng: Rng = None,
    keep: bool = True,
    *,
    tiling: Tiling,
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.layers.attention.attention_forward`, which is used if there is dropout.

    Dropout on the attention weights needs all of them at once.
    """
    if rng is not None and drop_rate > 0.0:
        return attention.forward(p, x, ops, scale, drop_rate, rng, keep)
    q, k, v = x
    B, N, n, d = q.shape
    y = np.empty((B, n, N, d), q.dtype).transpose(0, 2, 1, 3)  # (B, N, n, d), ready to be merged

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for rows in tiles:
            for b, part, _ in by_group(rows, n):
                attend_rows((q[b, :, part], k[b], v[b]), scale, y[b, :, part], scratch, tiling)

    tiling.run(work, B * n, tiling.rows(N * (d + k.shape[2])))
    return y, AttentionCache(x, scale) if keep else None


def attention_backward(
    p: None, cache: Any, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[QKV, None]:
    """As :func:`pvt_ref.layers.attention.attention_backward`."""
    if not isinstance(cache, AttentionCache):
        return attention.backward(p, cache, dy, ops)
    q, k, v = cache.qkv
    B, N, n, d = q.shape
    dq = np.empty(q.shape, q.dtype)

    def work(tiles: list[slice], scratch: Scratch) -> dict[int, np.ndarray]:
        parts = defaultdict(lambda: np.zeros((2, *k.shape[1:]), k.dtype))  # dk and dv by image
        for rows in tiles:
            for b, part, _ in by_group(rows, n):
                qkv, dqkv = (q[b, :, part], k[b], v[b]), (dq[b, :, part], *parts[b])
                attend_backward_rows(qkv, cache.scale, dy[b, :, part], dqkv, scratch, tiling)
        return parts

    dkv = np.zeros((2, *k.shape), k.dtype)
    for parts in tiling.run(work, B * n, tiling.rows(N * (d + k.shape[2]))):
        for b, part in parts.items():
            dkv[:, b] += part
    return (dq, dkv[0], dkv[1]), None


attention_kernel = Kernel(attention, attention_forward, attention_backward, (softmax, dropout))
