"""Attention whose scores are made, used and forgotten block by block of queries.

No array of all n x m scores exists, so memory grows with the number of tokens, not with its square.
The backward makes the scores again rather than remember them: one product more, much less memory.
Scores stand keys first, (N, m, queries), so that the softmax runs along a short axis and computes
many queries side by side.
"""

from typing import Any

import numpy as np

from pvt_ref.kernels.cpu.blocking import Blocking, by_group, cut
from pvt_ref.kernels.cpu.linear import ones
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.layers import attention as readable
from pvt_ref.ops import Ops
from pvt_ref.tree import record


def _sum_over_keys(x: np.ndarray) -> np.ndarray:
    """(N, 1, queries) of x (N, m, queries), as a matrix product: a plain sum rounds worse."""
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


def _queries(q: np.ndarray, k: np.ndarray, blocking: Blocking) -> list[slice]:
    """Blocks of queries whose scores may be held at once."""
    row = k.shape[0] * k.shape[1]  # scores of a query, all heads
    return list(cut(slice(0, q.shape[1]), max(1, blocking.elements // row)))


def attend_rows(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    y: np.ndarray,
    scratch: Scratch,
    blocking: Blocking,
) -> None:
    """y becomes Softmax(scale * q k^T) v (paper eq. 4), for some queries of one image.

    Args:
        q: (N, queries, d).
        k: (N, m, d), all keys of the image.
        v: (N, m, d), all values of the image.
        scale: 1 / sqrt(d) in the paper.
        y: (N, queries, d), written.
        scratch: memory of this thread.
        blocking: the settings.
    """
    for part in _queries(q, k, blocking):
        weights = _weights(q[:, part], k, scale, scratch)
        np.matmul(weights.transpose(0, 2, 1), v, out=y[:, part])


def attend_backward_rows(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    dy: np.ndarray,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    scratch: Scratch,
    blocking: Blocking,
) -> None:
    """dq becomes the gradient of some queries of one image; dk and dv grow by what they add.

    The equations are those of :func:`pvt_ref.layers.attention.attention_backward`.

    Args:
        q: (N, queries, d).
        k: (N, m, d), all keys of the image.
        v: (N, m, d), all values of the image.
        scale: as in :func:`attend_rows`.
        dy: dL/dy (N, queries, d).
        dq: (N, queries, d), written.
        dk: (N, m, d), added to.
        dv: (N, m, d), added to.
        scratch: memory of this thread.
        blocking: the settings.
    """
    for part in _queries(q, k, blocking):
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
    """What the scores are made from again.

    Attributes:
        q: queries (B, N, n, d).
        k: keys (B, N, m, d).
        v: values (B, N, m, d).
        scale: the factor on the scores.
    """

    q: np.ndarray  # (B, N, n, d)
    k: np.ndarray  # (B, N, m, d)
    v: np.ndarray  # (B, N, m, d)
    scale: float


def attention_forward(
    p: None,
    x: tuple[np.ndarray, np.ndarray, np.ndarray],
    ops: Ops,
    scale: float,
    drop_rate: float = 0.0,
    rng: np.random.Generator | None = None,
    keep: bool = True,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.layers.attention.attention_forward`.

    Dropout on the weights wants all of them: then the readable function computes.

    Args:
        q: queries (B, N, n, d).
        k: keys (B, N, m, d).
        v: values (B, N, m, d).
        ops: the record of operations, for the readable function.
        scale: 1 / sqrt(d) in the paper.
        drop_rate: dropout on the weights, in [0, 1).
        rng: source of the dropout mask; None for inference.
        keep: whether a cache for the backward is returned; without it, it is None.
        blocking: the settings.

    Returns:
        (B, N, n, d), whose memory lies as (B, n, N, d), and the cache.
    """
    if rng is not None and drop_rate > 0.0:
        return readable.attention_forward(p, x, ops, scale, drop_rate, rng, keep)
    q, k, v = x
    B, N, n, d = q.shape
    y = np.empty((B, n, N, d), q.dtype).transpose(0, 2, 1, 3)  # (B, N, n, d), ready to be merged

    def work(blocks: list[slice], scratch: Scratch) -> None:
        for rows in blocks:
            for b, part, _ in by_group(rows, n):
                attend_rows(q[b, :, part], k[b], v[b], scale, y[b, :, part], scratch, blocking)

    blocking.run(work, B * n, blocking.rows(N * (d + k.shape[2])))
    return y, AttentionCache(q, k, v, scale) if keep else None


def attention_backward(
    p: None, cache: Any, dy: np.ndarray, ops: Ops, *, blocking: Blocking
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], None]:
    """As :func:`pvt_ref.layers.attention.attention_backward`.

    Args:
        cache: from the forward.
        dy: dL/dy (B, N, n, d).
        ops: the record of operations, for the readable function.
        blocking: the settings.

    Returns:
        dq (B, N, n, d), dk (B, N, m, d) and dv (B, N, m, d).
    """
    if not isinstance(cache, AttentionCache):
        return readable.attention_backward(p, cache, dy, ops)
    q, k, v = cache.q, cache.k, cache.v
    B, N, n, d = q.shape
    dq = np.empty(q.shape, q.dtype)

    def work(blocks: list[slice], scratch: Scratch) -> dict[int, np.ndarray]:
        parts: dict[int, np.ndarray] = {}  # of the images that the piece has queries of
        for rows in blocks:
            for b, part, _ in by_group(rows, n):
                if b not in parts:
                    parts[b] = np.zeros((2, *k.shape[1:]), k.dtype)
                dk, dv = parts[b]
                attend_backward_rows(
                    q[b, :, part], k[b], v[b], cache.scale, dy[b, :, part], dq[b, :, part],
                    dk, dv, scratch, blocking,
                )  # fmt: skip
        return parts

    dkv = np.zeros((2, *k.shape), k.dtype)
    for parts in blocking.run(work, B * n, blocking.rows(N * (d + k.shape[2]))):
        for b, part in parts.items():
            dkv[:, b] += part
    return (dq, dkv[0], dkv[1]), None
