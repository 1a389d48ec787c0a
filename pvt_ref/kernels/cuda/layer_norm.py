"""Layer norm on CUDA: a few threads hold a row in registers; it is read once and written once."""

from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.kernels.cuda.launch import (
    THREADS,
    Cuda,
    Function,
    Kernel,
    Order,
    blocks_for,
    is_float32,
    packed,
)
from pvt_ref.kernels.cuda.sum_rows import add_parts
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record

#: The usual order of tokens.
RASTER = Order()

#: Wider rows do not fit into the registers of a warp: the backward accumulates in float64.
_MOST_CHANNELS = 1024


def lanes_and_pieces(C: int, backward: bool = False) -> tuple[int, int]:
    """The number of threads that share a row of C numbers, a power of two, and the pieces of each.

    In the forward, it is chosen such that all threads have the same work, unless that would be
    fewer than eight; in the backward, such that each thread has few pieces, because its sums need
    four registers per number.
    """
    pieces = C // 4
    even = pieces & -pieces  # the largest power of two that divides
    most = even if even >= 8 and not backward else 1 << (pieces - 1).bit_length()
    lanes = min(most, 32)
    return lanes, -(-pieces // lanes)


def _function(name: str, C: int) -> tuple[Function, int]:
    """The kernel for rows of C numbers, and the number of rows of a block."""
    lanes, pieces = lanes_and_pieces(C, name == "layer_norm_backward")
    return Function("layer_norm.cu", name, (("LANES", lanes), ("PIECES", pieces))), THREADS // lanes


@record
class LayerNormCache:
    """What :func:`layer_norm_backward` needs: the forward's x (rows, C), not a copy, and eps."""

    x: Array
    eps: float


def _tokens(x: Array) -> int:
    """The number of tokens per image of x (..., n, C)."""
    return x.shape[-2] if x.ndim > 1 else 1


def can_norm(p: LayerNormParams, x: Array) -> bool:
    """Whether the kernels can normalise these rows."""
    C = x.shape[-1]
    return is_float32(x, p.weight) and C % 4 == 0 and C <= _MOST_CHANNELS and x.size > 0


def norm_rows(
    p: LayerNormParams, x: Array, eps: float, cuda: Cuda, order: Order = RASTER
) -> tuple[Array, LayerNormCache]:
    """LN(x) of x (..., n, C), with its tokens in the given order, and the cache, which is free."""
    xp, C = array_module(x), x.shape[-1]
    rows = xp.reshape(packed(x), (-1, C))  # (rows, C)
    y = xp.empty(x.shape, x.dtype)
    function, in_block = _function("layer_norm", C)
    weights = (packed(p.weight), packed(p.bias), float(eps))
    arguments = (rows, *weights, y, len(rows), C // 4, _tokens(x), *order)
    cuda.launch(function, (blocks_for(len(rows), in_block),), (THREADS,), arguments)
    return y, LayerNormCache(rows, eps)


def add_and_norm_rows(
    p: LayerNormParams, x: Array, branch: Array, eps: float, cuda: Cuda, order: Order = RASTER
) -> tuple[Array, Array, LayerNormCache]:
    """x + branch (..., n, C), its norm with tokens in the given order, and the norm's cache."""
    xp, C, x, branch = array_module(x), x.shape[-1], packed(x), packed(branch)
    total, y, rows = xp.empty_like(x), xp.empty_like(x), x.size // C
    function, in_block = _function("add_layer_norm", C)
    sizes = (rows, C // 4, _tokens(x), *order)
    weights = (packed(p.weight), packed(p.bias), float(eps))
    arguments = (x, branch, *weights, total, y, *sizes)
    cuda.launch(function, (blocks_for(rows, in_block),), (THREADS,), arguments)
    return total, y, LayerNormCache(xp.reshape(total, (rows, C)), eps)


def norm_backward_rows(
    p: LayerNormParams,
    cache: LayerNormCache,
    dy: Array,
    skip: Array | None,
    cuda: Cuda,
    order: Order = RASTER,
) -> tuple[Array, LayerNormParams]:
    """dx (..., n, C), to which skip is added if there is one, and the gradients of the weights.

    The tokens of dy are in the given order.
    """
    xp = array_module(dy)
    rows, C = cache.x.shape
    dy, skip = packed(dy), None if skip is None else packed(skip)
    dx = xp.empty(dy.shape, dy.dtype)
    function, in_block = _function("layer_norm_backward", C)
    blocks = min(blocks_for(rows, in_block), cuda.blocks)
    parts = xp.empty((blocks, 2 * C), xp.float64)
    sizes = (rows, C // 4, _tokens(dy), *order)
    weights = (packed(p.weight), float(cache.eps))
    arguments = (cache.x, *weights, dy, skip, dx, parts, *sizes)
    cuda.launch(function, (blocks,), (THREADS,), arguments, shared=2 * C * 8)
    sums = add_parts(parts, cuda)
    return dx, LayerNormParams(sums[:C], sums[C:])


def layer_norm_forward(
    p: LayerNormParams, x: Array, ops: Ops, eps: float, keep: bool = True, *, cuda: Cuda
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.layers.layer_norm.layer_norm_forward`; its cache is x itself."""
    if not can_norm(p, x):
        return layer_norm.forward(p, x, ops, eps, keep)
    y, cache = norm_rows(p, x, eps, cuda)
    return y, cache if keep else None


def layer_norm_backward(
    p: LayerNormParams, cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, LayerNormParams]:
    """As :func:`pvt_ref.layers.layer_norm.layer_norm_backward`, sums over rows included."""
    if not isinstance(cache, LayerNormCache):
        return layer_norm.backward(p, cache, dy, ops)
    return norm_backward_rows(p, cache, dy, None, cuda)


layer_norm_kernel = Kernel(layer_norm, layer_norm_forward, layer_norm_backward, (sum_rows,))
