"""Units and enlargements in turn, which bring a coarse map to the size of a finer one.

Enlarging by 2 several times is not the same as enlarging once: each time new cells are interpolated
and the next unit processes them.
"""

from typing import Any

from pvt_ref.arrays import Array
from pvt_ref.heads import conv_unit as conv_unit_file
from pvt_ref.heads.conv_unit import (
    ConvUnitBuffers,
    ConvUnitCache,
    ConvUnitParams,
    conv_unit,
)
from pvt_ref.layers.resize import resize
from pvt_ref.ops import REFERENCE, Operation, Ops

#: The steps in turn: a unit, or None for an enlargement, which has no weights. So the index in the
#: tuple is the number in the key, as in PyTorch's ``Sequential``.
ScaleHeadParams = tuple[ConvUnitParams | None, ...]

#: The running statistics of the units, in their places.
ScaleHeadBuffers = tuple[ConvUnitBuffers | None, ...]


def scale_head_forward(
    p: ScaleHeadParams,
    x: Array,
    ops: Ops,
    buffers: ScaleHeadBuffers,
    batch_statistics: bool,
    scale: int = 2,
    keep: bool = True,
) -> tuple[Array, tuple[Any, ...] | None]:
    """Unit, enlarge, unit, enlarge and so on, bilinearly, as the weights say.

    Args:
        p: weights of the units, and None for each enlargement.
        x: (B, H, W, C_in), of the weights' dtype.
        ops: the table of operations.
        buffers: running statistics of the units, and None for each enlargement.
        batch_statistics: whether the norms use those of the batch instead (training).
        scale: factor of height and width of each enlargement.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, s H, s W, C_out) of x's dtype, s the product of all scales; and the cache.
    """
    caches = []
    for p_k, buffers_k in zip(p, buffers, strict=True):
        if p_k is None:
            size = (scale * x.shape[1], scale * x.shape[2])
            x, cache = ops[resize].forward(None, x, ops, size, keep=keep)
        else:
            x, cache = ops[conv_unit].forward(p_k, x, ops, buffers_k, batch_statistics, keep=keep)
        caches.append(cache)
    return x, tuple(caches) if keep else None


def scale_head_backward(
    p: ScaleHeadParams, cache: tuple[Any, ...], dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, ScaleHeadParams]:
    """Gradients of :func:`scale_head_forward`: the backward of each step, in reverse order.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dy, an array of y's shape.
        ops: the table that the forward was given.

    Returns:
        dx (B, H, W, C_in), and the gradients of the weights, None for each enlargement.
    """
    grads: list[ConvUnitParams | None] = []
    for p_k, cache_k in zip(reversed(p), reversed(cache), strict=True):
        dy, dunit = ops[resize if p_k is None else conv_unit].backward(p_k, cache_k, dy, ops)
        grads.append(dunit)
    return dy, tuple(reversed(grads))


def statistics(cache: tuple[Any, ...]) -> ScaleHeadBuffers | None:
    """The statistics of a forward's batch; None if it used the running ones."""
    units = [isinstance(cache_k, ConvUnitCache) for cache_k in cache]
    seen = [conv_unit_file.statistics(c) if u else None for c, u in zip(cache, units, strict=True)]
    return None if seen[units.index(True)] is None else tuple(seen)


scale_head = Operation(scale_head_forward, scale_head_backward)
