"""Adaptive average pooling: a map of any size becomes one of a given size, by means over cells.

Along an axis of H inputs, cell i of h averages the inputs from floor(i H/h) up to, but excluding,
ceil((i + 1) H/h). Neighbouring cells overlap if h does not divide H. If h is larger than H it
enlarges the map; if H divides h, it repeats inputs. PVT v2 reduces its keys with it, to 7 x 7.
"""

import numpy as np

from pvt_ref.arrays import Array, Grid
from pvt_ref.layers.resize import separable, separable_transpose
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class PoolCache:
    """Only the size (H, W) of x, and no array, since the forward is linear."""

    size: Grid


def pool_matrix(out_size: int, in_size: int) -> np.ndarray:
    """The means along one axis as a matrix (out_size, in_size), float64, on the host."""
    i, inputs = np.arange(out_size)[:, None], np.arange(in_size)
    first, end = i * in_size // out_size, -(-(i + 1) * in_size // out_size)  # rounded down and up
    return ((first <= inputs) & (inputs < end)) / (end - first)


def pool_forward(
    p: None, x: Array, ops: Ops, size: Grid, keep: bool = True
) -> tuple[Array, PoolCache | None]:
    """y = A_h x A_w^T for every channel, the means over overlapping cells.

    Args:
        p: None.
        x: (B, H, W, C), float32 or float64.
        ops: not used.
        size: height and width of y.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, ..., C) of x's dtype, and the cache.
    """
    return separable(x, size, pool_matrix), PoolCache(x.shape[1:3]) if keep else None


def pool_backward(p: None, cache: PoolCache, dy: Array, ops: Ops = REFERENCE) -> tuple[Array, None]:
    """Gradient of :func:`pool_forward`: dL/dx = A_h^T dL/dy A_w for every channel.

    Each input gets its share of the gradient of every cell that it belongs to.

    Args:
        p: None.
        cache: from the forward, size (H, W) of its x.
        dy: dL/dy (B, ..., C), y's shape.
        ops: not used.

    Returns:
        dx (B, H, W, C) of dy's dtype, and None.
    """
    return separable_transpose(dy, cache.size, pool_matrix), None  # (B, H, W, C)


pool = Operation(pool_forward, pool_backward)
