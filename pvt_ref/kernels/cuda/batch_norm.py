"""Batch norm on CUDA, with the ReLU of a head's unit in the same launches.

With running statistics, a forward is one launch. With those of a batch, the mean takes two more,
and then the variance another two: that way the variance of numbers far from 0 keeps its digits.
Only the input and the statistics are kept: the backward recomputes x_hat and the sign that ReLU
saw.
"""

import math
from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.heads.conv_unit import (
    ConvUnitBuffers,
    ConvUnitCache,
    ConvUnitParams,
    conv_unit,
)
from pvt_ref.kernels.cuda.launch import (
    MOST_NUMBERS,
    Cuda,
    Function,
    Kernel,
    blocks_for,
    is_float32,
)
from pvt_ref.kernels.cuda.sum_rows import add_parts, number_of_parts, sum_rows_forward
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams, batch_norm
from pvt_ref.layers.conv import conv
from pvt_ref.layers.relu import relu
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record

NORM = Function("batch_norm.cu", "batch_norm")
SQUARES = Function("batch_norm.cu", "batch_norm_squares")
SUMS = Function("batch_norm.cu", "batch_norm_sums")
BACKWARD = Function("batch_norm.cu", "batch_norm_backward")

#: Channels and rows of a block's threads, and rows of a single thread.
_BLOCK, _ROWS_OF_A_THREAD = (32, 8), 4

#: The epsilon of batch norm in the unit of heads.
_EPS = 1e-5


@record
class BatchNormCache:
    """What the backward needs: the input x (..., C), and the statistics that normalised it.

    mean and variance (C,) are the statistics of the batch, or None if the running ones were used;
    count is N.
    """

    x: Array
    used: tuple[Array, Array]
    eps: float
    has_relu: bool
    mean: Array | None
    variance: Array | None
    count: int


def can_normalise(
    p: BatchNormParams, size: int, x: Array, buffers: BatchNormBuffers, batch_statistics: bool
) -> bool:
    """Whether the kernels can normalise size numbers of x's dtype."""
    fits = is_float32(x, p.weight, p.bias, buffers.running_mean, buffers.running_var)
    several = size > p.weight.size or not batch_statistics  # or the readable one refuses them
    return fits and several and 0 < size <= MOST_NUMBERS


def _grid(rows: int, C: int) -> tuple[int, int]:
    """Numbers of blocks along the channels and along the rows, for elementwise work."""
    return blocks_for(C, _BLOCK[0]), min(blocks_for(rows, _BLOCK[1] * _ROWS_OF_A_THREAD), 65_535)


def _statistics(rows: Array, ops: Ops, cuda: Cuda) -> tuple[Array, Array]:
    """Mean and biased variance of the columns of rows (N, C)."""
    (N, C), xp = rows.shape, array_module(rows)
    mean = sum_rows_forward(None, rows, ops, keep=False, cuda=cuda)[0] / N  # (C,)
    parts = xp.empty((number_of_parts(N, C, cuda), C), xp.float64)
    cuda.launch(SQUARES, (_grid(N, C)[0], len(parts)), _BLOCK, (rows, mean, N, C, parts))
    return mean, add_parts(parts, cuda) / N  # (C,) each


def normalise(
    p: BatchNormParams,
    x: Array,
    ops: Ops,
    buffers: BatchNormBuffers,
    batch_statistics: bool,
    eps: float,
    has_relu: bool,
    cuda: Cuda,
) -> tuple[Array, BatchNormCache]:
    """Batch norm of x (..., C), or its ReLU, and the cache."""
    xp, C = array_module(x), x.shape[-1]
    x = xp.ascontiguousarray(x)
    y, rows = xp.empty_like(x), xp.reshape(x, (-1, C))  # (N, C)
    used, mean, variance = (buffers.running_mean, buffers.running_var), None, None
    if batch_statistics:
        used = mean, variance = _statistics(rows, ops, cuda)
    weights = (*map(xp.ascontiguousarray, (*used, p.weight, p.bias)), float(eps))
    N = len(rows)
    cuda.launch(NORM, _grid(N, C), _BLOCK, (rows, *weights, y, N, C, int(has_relu)))
    return y, BatchNormCache(x, used, eps, has_relu, mean, variance, N)


def normalise_backward(
    p: BatchNormParams, cache: BatchNormCache, dy: Array, cuda: Cuda
) -> tuple[Array, BatchNormParams]:
    """dx (..., C) and the gradients of weight and bias."""
    xp, N, C = array_module(dy), cache.count, dy.shape[-1]
    dy = xp.ascontiguousarray(dy)
    weights = (*map(xp.ascontiguousarray, (*cache.used, p.weight, p.bias)), float(cache.eps))
    parts = xp.empty((number_of_parts(N, C, cuda), 2 * C), xp.float64)
    inputs, last = (cache.x, dy, *weights), (N, C, int(cache.has_relu))
    grid = _grid(N, C)
    cuda.launch(SUMS, (grid[0], len(parts)), _BLOCK, (*inputs, *last, parts))
    sums = add_parts(parts, cuda)  # (2C,)
    dx, of_batch = xp.empty_like(dy), cache.mean is not None
    cuda.launch(BACKWARD, grid, _BLOCK, (*inputs, sums if of_batch else None, dx, *last))
    return dx, BatchNormParams(sums[:C], sums[C:])


def batch_norm_forward(
    p: BatchNormParams,
    x: Array,
    ops: Ops,
    buffers: BatchNormBuffers,
    batch_statistics: bool,
    eps: float = 1e-5,
    keep: bool = True,
    *,
    cuda: Cuda,
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.layers.batch_norm.batch_norm_forward`; its cache is x itself."""
    if not can_normalise(p, x.size, x, buffers, batch_statistics):
        return batch_norm.forward(p, x, ops, buffers, batch_statistics, eps, keep)
    y, cache = normalise(p, x, ops, buffers, batch_statistics, eps, False, cuda)
    return y, cache if keep else None


def batch_norm_backward(
    p: BatchNormParams, cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, BatchNormParams]:
    """As :func:`pvt_ref.layers.batch_norm.batch_norm_backward`, sums over rows included."""
    if not isinstance(cache, BatchNormCache):
        return batch_norm.backward(p, cache, dy, ops)
    return normalise_backward(p, cache, dy, cuda)


def conv_unit_forward(
    p: ConvUnitParams,
    x: Array,
    ops: Ops,
    buffers: ConvUnitBuffers,
    batch_statistics: bool,
    keep: bool = True,
    *,
    cuda: Cuda,
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.heads.conv_unit.conv_unit_forward`: the norm's kernels apply the ReLU."""
    C_out, _, k, _ = p.conv.weight.shape
    size = math.prod(x.shape[:3]) * C_out
    if not can_normalise(p.bn, size, x, buffers.bn, batch_statistics):
        return conv_unit.forward(p, x, ops, buffers, batch_statistics, keep)
    y, conv_cache = ops[conv].forward(p.conv, x, ops, 1, k // 2, keep=keep)  # (B, H, W, C_out)
    y, cache = normalise(p.bn, y, ops, buffers.bn, batch_statistics, _EPS, True, cuda)
    return y, ConvUnitCache(conv_cache, cache, None) if keep else None


def conv_unit_backward(
    p: ConvUnitParams, cache: ConvUnitCache, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, ConvUnitParams]:
    """As :func:`pvt_ref.heads.conv_unit.conv_unit_backward`."""
    if cache.relu is not None:  # the cache of the readable forward
        return conv_unit.backward(p, cache, dy, ops)
    # y = relu(bn(conv(x)))
    dy, dbn = normalise_backward(p.bn, cache.bn, dy, cuda)  # (B, H, W, C_out)
    dx, dconv = ops[conv].backward(p.conv, cache.conv, dy, ops)  # (B, H, W, C_in)
    return dx, ConvUnitParams(dconv, dbn)


batch_norm_kernel = Kernel(batch_norm, batch_norm_forward, batch_norm_backward, (sum_rows,))
conv_unit_kernel = Kernel(
    conv_unit, conv_unit_forward, conv_unit_backward, (batch_norm, relu, sum_rows)
)
