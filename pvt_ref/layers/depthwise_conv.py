"""Depth-wise convolution: each channel has its own kernel, and the map keeps its size.

The kernel mixes no channels. As a matrix product it would have one column, so it is written as a
sum of k_h k_w shifted maps, each times one number per channel.
"""

from pvt_ref.arrays import Array, array_module
from pvt_ref.layers.conv import ConvParams, pad, places, unpad
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class DepthwiseConvCache:
    """What :func:`depthwise_conv_backward` needs: x padded with zeros, for dW."""

    padded: Array


def depthwise_conv_forward(
    p: ConvParams, x: Array, ops: Ops = REFERENCE, keep: bool = True
) -> tuple[Array, DepthwiseConvCache | None]:
    """y_ij = sum_uv W_uv * x_(i+u-a, j+v-b) + bias; (a, b) is the kernel's middle, x is 0 outside.

    Args:
        p: weight (C, 1, k_h, k_w), k_h and k_w odd, and bias (C,) or None.
        x: (B, H, W, C), of the weights' dtype: float32 or float64.
        ops: not used.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, H, W, C) of x's dtype, and the cache.
    """
    xp = array_module(x)
    k = p.weight.shape[2:]
    padded = pad(x, (k[0] // 2, k[1] // 2))
    y = xp.zeros_like(x)  # (B, H, W, C)
    for u, v, index in places(k, x.shape[1:3]):
        y += padded[index] * p.weight[:, 0, u, v]  # (B, H, W, C)
    if p.bias is not None:
        y += p.bias
    return y, DepthwiseConvCache(padded) if keep else None


def depthwise_conv_backward(
    p: ConvParams, cache: DepthwiseConvCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, ConvParams]:
    """Gradients of :func:`depthwise_conv_forward`.

    Every W_uv multiplies a whole shifted map, so its gradient is a sum over the map, and dx is
    shifted the other way::

        dL/dW_uv = sum_ij dy_ij * x_(i+u-a, j+v-b)      dL/dx_(i+u-a, j+v-b) += dy_ij * W_uv

    Args:
        p: the forward's weight (C, 1, k_h, k_w) and bias (C,) or None.
        cache: from the forward.
        dy: dL/dy (B, H, W, C).
        ops: the table of operations; sums over rows come from it.

    Returns:
        dx (B, H, W, C) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    xp = array_module(dy)
    B, H, W, C = dy.shape
    k = p.weight.shape[2:]

    def sum_over_map(x: Array) -> Array:
        return ops[sum_rows].forward(None, xp.reshape(x, (B * H * W, C)), ops, keep=False)[0]

    # y += bias
    dbias = None if p.bias is None else sum_over_map(dy)
    # y += padded[index] * W_uv
    dweight = xp.empty(p.weight.shape, dtype=dy.dtype)
    dpadded = xp.zeros(cache.padded.shape, dtype=dy.dtype)
    for u, v, index in places(k, (H, W)):
        dweight[:, 0, u, v] = sum_over_map(dy * cache.padded[index])
        dpadded[index] += dy * p.weight[:, 0, u, v]
    # padded = pad(x)
    dx = unpad(dpadded, (k[0] // 2, k[1] // 2))  # (B, H, W, C)
    return dx, ConvParams(dweight, dbias)


depthwise_conv = Operation(depthwise_conv_forward, depthwise_conv_backward)
