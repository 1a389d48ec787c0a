"""Attention on CUDA: the softmax is updated key by key, so the forward has no array of scores.

The backward has two such arrays for a short time, the weights and the gradients of the scores. A
PVT has few keys, and the gradients of keys and values are then matrix products.
"""

from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.draws import Rng, Source
from pvt_ref.kernels.cuda.launch import (
    Cuda,
    Function,
    Kernel,
    Order,
    address,
    blocks_for,
    is_float32,
    packed,
)
from pvt_ref.kernels.cuda.product import multiply
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.softmax import softmax
from pvt_ref.ops import Ops
from pvt_ref.tree import record

#: Threads of a block, as defined in the kernels.
_THREADS = 128

#: A query with more numbers does not fit into the registers of its threads.
_MOST_WIDTH = 256

#: (a, b): with at least a * ``Cuda.blocks`` queries, b threads share a query, otherwise eight. Few
#: threads per query save work, if there are enough queries to keep the GPU busy. These numbers were
#: the fastest for an earlier version of the kernels on an H100.
_FEW_LANES = {"attention": (75, 2), "attention_backward": (225, 4)}


def _function(name: str, shape: tuple[int, ...], cuda: Cuda) -> tuple[Function, int]:
    """The kernel for queries of shape (B, N, n, d), and the number of queries of a block."""
    (B, N, n, d), (many, few) = shape, _FEW_LANES[name]
    lanes = few if B * N * n >= many * cuda.blocks and d <= 64 else 8
    return Function(f"{name}.cu", name, (("D", d), ("LANES", lanes))), _THREADS // lanes


def _rows(x: Array) -> Array:
    """x (B, N, n, d) in a layout that kernels can read: rows of d contiguous, aligned numbers."""
    steps, width = x.strides, 4 * x.itemsize
    aligned = address(x) % width == 0 and all(step % width == 0 for step in steps[:3])
    if aligned and steps[3] == x.itemsize and min(steps) > 0:
        return x
    return packed(x)


def _with_steps(x: Array) -> tuple[Any, ...]:
    """x (B, N, n, d), and its steps between images, heads and rows in pieces of four numbers."""
    return x, *(step // (4 * x.itemsize) for step in x.strides[:3])


@record
class AttentionCache:
    """What :func:`attention_backward` needs: the inputs, y and log2 of the sums (B, N, n)."""

    qkv: tuple[Array, Array, Array]
    scale: float
    y: Array
    log_sum: Array
    order: Order


def can_attend(d: int, drop_rate: float, rng: Source) -> bool:
    """Whether the kernels can compute heads of d channels; nothing may be dropped."""
    return d % 4 == 0 and d <= _MOST_WIDTH and (rng is None or drop_rate == 0.0)


def attend(
    x: tuple[Array, Array, Array], scale: float, keep: bool, cuda: Cuda, order: Order
) -> tuple[Array, AttentionCache | None]:
    """y (B, n, N, d), ready to be merged, in raster order, for queries in the given order."""
    q, k, v = map(_rows, x)
    (B, N, n, d), m = q.shape, k.shape[2]
    xp = array_module(q)
    y = xp.empty((B, n, N, d), q.dtype)
    log_sum = xp.empty((B, N, n), q.dtype) if keep else None
    function, in_block = _function("attention", q.shape, cuda)
    inputs = (*_with_steps(q), *_with_steps(k), *_with_steps(v), float(scale))
    arguments = (*inputs, y, log_sum, n, m, *order)
    cuda.launch(function, (B * blocks_for(n, in_block), N), (_THREADS,), arguments)
    return y, AttentionCache((q, k, v), scale, y, log_sum, order) if keep else None


def attention_forward(
    p: None,
    x: tuple[Array, Array, Array],
    ops: Ops,
    scale: float,
    drop_rate: float = 0.0,
    rng: Rng = None,
    keep: bool = True,
    *,
    cuda: Cuda,
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.layers.attention.attention_forward`, which is used if there is dropout."""
    if not (can_attend(x[0].shape[3], drop_rate, rng) and is_float32(*x) and x[0].size):
        return attention.forward(p, x, ops, scale, drop_rate, rng, keep)
    y, cache = attend(x, scale, keep, cuda, Order())
    return array_module(y).permute_dims(y, (0, 2, 1, 3)), cache  # (B, N, n, d)


def attention_backward(
    p: None, cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[tuple[Array, Array, Array], None]:
    """As :func:`pvt_ref.layers.attention.attention_backward`; the weights are recomputed."""
    if not isinstance(cache, AttentionCache):
        return attention.backward(p, cache, dy, ops)
    (q, k, v), dy = cache.qkv, _rows(dy)
    (B, N, n, d), m = q.shape, k.shape[2]
    xp = array_module(dy)
    dq = xp.empty((B, n, N, d), q.dtype)
    weights, dscores = (xp.empty((B, N, m, n), q.dtype) for _ in range(2))
    function, in_block = _function("attention_backward", q.shape, cuda)
    steps = [each for x in (q, k, v, dy) for each in _with_steps(x)]
    outputs = (dq, weights, dscores)
    inputs = (*steps, float(cache.scale), cache.y, cache.log_sum)
    arguments = (*inputs, *outputs, n, m, *cache.order)
    cuda.launch(function, (B * blocks_for(n, in_block), N), (_THREADS,), arguments)
    dk, dv = multiply(dscores, q, cuda), multiply(weights, dy, cuda)  # (B, N, m, d) each
    return (xp.permute_dims(dq, (0, 2, 1, 3)), dk, dv), None


attention_kernel = Kernel(attention, attention_forward, attention_backward, (softmax, dropout))
