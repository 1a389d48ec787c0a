"""The building block of heads: a convolution without bias, batch norm, ReLU."""

from typing import Any

from pvt_ref.arrays import Array
from pvt_ref.layers import batch_norm as batch_norm_file
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams, batch_norm
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.relu import relu
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class ConvUnitParams:
    """The kernel (C_out, C_in, k, k) and the norm, or their gradients.

    There is no bias, because batch norm would subtract it with the mean.
    """

    conv: ConvParams
    bn: BatchNormParams


@record
class ConvUnitBuffers:
    """The running statistics of the norm."""

    bn: BatchNormBuffers


@record
class ConvUnitCache:
    """The caches of the three parts."""

    conv: Any
    bn: Any
    relu: Any


def conv_unit_forward(
    p: ConvUnitParams,
    x: Array,
    ops: Ops,
    buffers: ConvUnitBuffers,
    batch_statistics: bool,
    keep: bool = True,
) -> tuple[Array, ConvUnitCache | None]:
    """y = ReLU(BatchNorm(conv(x))), a map of the same size.

    Args:
        p: conv.weight (C_out, C_in, k, k), k odd, and the norm.
        x: (B, H, W, C_in), of the weights' dtype: float32 or float64.
        ops: the table of operations.
        buffers: the running statistics.
        batch_statistics: whether the norm uses those of the batch instead (training).
        keep: whether to return a cache for the backward.

    Returns:
        y (B, H, W, C_out) of x's dtype, and the cache.
    """
    padding = p.conv.weight.shape[2] // 2
    y, conv_cache = ops[conv].forward(p.conv, x, ops, 1, padding, keep=keep)  # (B, H, W, C_out)
    y, bn_cache = ops[batch_norm].forward(p.bn, y, ops, buffers.bn, batch_statistics, keep=keep)
    y, relu_cache = ops[relu].forward(None, y, ops, keep=keep)  # (B, H, W, C_out)
    return y, ConvUnitCache(conv_cache, bn_cache, relu_cache) if keep else None


def conv_unit_backward(
    p: ConvUnitParams, cache: ConvUnitCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, ConvUnitParams]:
    """Gradients of :func:`conv_unit_forward`: the backward of each step, in reverse order.

    Args:
        p: the forward's weights, conv.weight (C_out, C_in, k, k).
        cache: from the forward.
        dy: dL/dy (B, H, W, C_out).
        ops: the table that the forward was given.

    Returns:
        dx (B, H, W, C_in) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    # y = relu(bn(conv(x)))
    dy, _ = ops[relu].backward(None, cache.relu, dy, ops)  # (B, H, W, C_out)
    dy, dbn = ops[batch_norm].backward(p.bn, cache.bn, dy, ops)  # (B, H, W, C_out)
    dx, dconv = ops[conv].backward(p.conv, cache.conv, dy, ops)  # (B, H, W, C_in)
    return dx, ConvUnitParams(dconv, dbn)


def statistics(cache: ConvUnitCache) -> ConvUnitBuffers | None:
    """The statistics of a forward's batch; None if it used the running ones."""
    seen = batch_norm_file.statistics(cache.bn)
    return None if seen is None else ConvUnitBuffers(seen)


conv_unit = Operation(conv_unit_forward, conv_unit_backward)
