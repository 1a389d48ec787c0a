"""Depth-wise 3 x 3 convolution on CUDA: one launch forward; backward, one for dx, two for sums."""

from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.kernels.cuda.launch import (
    THREADS,
    Cuda,
    Function,
    Kernel,
    blocks_for,
    is_float32,
    packed,
)
from pvt_ref.kernels.cuda.sum_rows import add_parts, number_of_parts
from pvt_ref.layers.conv import ConvParams
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record

CONV = Function("depthwise_conv.cu", "depthwise_conv")
SUMS = Function("depthwise_conv.cu", "depthwise_conv_sums")


def _convolve(x: Array, weight: Array, bias: Array | None, cuda: Cuda) -> Array:
    """x (B, H, W, C), contiguous, with a kernel weight (9, C)."""
    xp = array_module(x)
    (_, H, W, C), count = x.shape, x.size // 4
    y = xp.empty_like(x)
    bias = None if bias is None else packed(bias)
    arguments = (x, packed(weight), bias, y, count, H, W, C // 4)
    cuda.launch(CONV, (blocks_for(count),), (THREADS,), arguments)
    return y  # (B, H, W, C)


def _kernel_first(weight: Array) -> Array:
    """A weight (C, 1, 3, 3) as (9, C), a view."""
    xp = array_module(weight)
    return xp.permute_dims(xp.reshape(weight, (-1, 9)), (1, 0))  # (9, C)


@record
class DepthwiseConvCache:
    """What :func:`depthwise_conv_backward` needs: the forward's x (B, H, W, C)."""

    x: Array


def depthwise_conv_forward(
    p: ConvParams, x: Array, ops: Ops, keep: bool = True, *, cuda: Cuda
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.layers.depthwise_conv.depthwise_conv_forward`; its cache is x itself."""
    if not is_float32(x) or x.shape[-1] % 4 or p.weight.shape[2:] != (3, 3) or not x.size:
        return depthwise_conv.forward(p, x, ops, keep)
    x = packed(x)
    y = _convolve(x, _kernel_first(p.weight), p.bias, cuda)
    return y, DepthwiseConvCache(x) if keep else None


def depthwise_conv_backward(
    p: ConvParams, cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, ConvParams]:
    """As :func:`pvt_ref.layers.depthwise_conv.depthwise_conv_backward`, sums over rows included.

    dx is the same operation on dy, with the kernel rotated by 180 degrees.
    """
    if not isinstance(cache, DepthwiseConvCache):
        return depthwise_conv.backward(p, cache, dy, ops)
    xp = array_module(dy)
    (B, H, W, C), dy = dy.shape, packed(dy)
    dx = _convolve(dy, xp.flip(_kernel_first(p.weight), axis=0), None, cuda)
    count = number_of_parts(B * H * W, C, cuda)
    parts = xp.empty((count, 10 * C), xp.float64)
    grid, threads = (blocks_for(C, 32), count), (32, 8)
    cuda.launch(SUMS, grid, threads, (cache.x, dy, parts, B * H * W, H, W, C))
    sums = xp.reshape(add_parts(parts, cuda), (10, C))
    dweight = xp.reshape(xp.permute_dims(sums[:9], (1, 0)), p.weight.shape)
    return dx, ConvParams(dweight, None if p.bias is None else sums[9])


depthwise_conv_kernel = Kernel(
    depthwise_conv, depthwise_conv_forward, depthwise_conv_backward, (sum_rows,)
)
