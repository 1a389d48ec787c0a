"""Batch norm (Ioffe & Szegedy 2015, arXiv 1502.03167): each channel over all cells of a batch.

It is the only layer with state: running statistics follow those of the batches during training and
replace them in inference. The forward does not change them. They go in as a record of buffers, and
:func:`moved` makes the next record from the result of :func:`statistics`.
"""

import math
from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.errors import ShapeError
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import map_arrays, record

#: Share of a new batch in the running statistics, as in PyTorch.
MOMENTUM = 0.1


@record
class BatchNormParams:
    """Scale (weight) and shift (bias), (C,) each, or their gradients; 1 and 0 when drawn."""

    weight: Array
    bias: Array


@record
class BatchNormBuffers:
    """State, not weights: it has no gradient. 0, 1 and 0 at first.

    running_mean and running_var are (C,) each, the latter of unbiased variances;
    num_batches_tracked is an int64 array without axes.
    """

    running_mean: Array
    running_var: Array
    num_batches_tracked: Array


@record
class BatchNormCache:
    """x_hat (..., C), the normalised cells before weight and bias, and rstd (C,).

    mean and variance (C,) are the batch's, the variance biased; None if they were not used. count
    is the number of values of a channel.
    """

    x_hat: Array
    rstd: Array
    mean: Array | None
    variance: Array | None
    count: int


def batch_norm_forward(
    p: BatchNormParams,
    x: Array,
    ops: Ops,
    buffers: BatchNormBuffers,
    batch_statistics: bool,
    eps: float = 1e-5,
    keep: bool = True,
) -> tuple[Array, BatchNormCache | None]:
    """y = weight * (x - mean) / sqrt(variance + eps) + bias, channel by channel.

    Args:
        p: weight and bias, (C,) each.
        x: (..., C), of the weights' dtype: float32 or float64.
        ops: the table of operations; sums over rows come from it, accumulated in float64.
        buffers: running_mean and running_var, (C,) each.
        batch_statistics: whether mean and biased variance are those of x (training), instead of
            the running ones (inference).
        eps: added to the variance.
        keep: whether to return a cache for the backward.

    Returns:
        y (..., C) of x's dtype, and the cache.

    Raises:
        ShapeError: if batch statistics are asked for, and x has one value per channel.
    """
    xp = array_module(x)
    mean, variance = None, None
    if batch_statistics:
        rows = (-1, x.shape[-1])
        count = _count(x)
        if count < 2:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}: one value per channel, which has no variance. In "
                f"training, batch norm needs a larger batch, or a larger image, so that its last "
                f"map has several cells"
            )
        sums, _ = ops[sum_rows].forward(None, xp.reshape(x, rows), ops, keep=False)
        mean = sums / count  # (C,)
        x_hat = x - mean  # (..., C), centred so far
        squares = xp.reshape(x_hat * x_hat, rows)
        sums, _ = ops[sum_rows].forward(None, squares, ops, keep=False)
        variance = sums / count  # (C,)
        rstd = 1.0 / xp.sqrt(variance + eps)  # (C,)
    else:
        x_hat = x - buffers.running_mean  # (..., C), centred so far
        rstd = 1.0 / xp.sqrt(buffers.running_var + eps)  # (C,)
    x_hat *= rstd
    if not keep:
        x_hat *= p.weight
        x_hat += p.bias
        return x_hat, None
    return x_hat * p.weight + p.bias, BatchNormCache(x_hat, rstd, mean, variance, _count(x))


def batch_norm_backward(
    p: BatchNormParams, cache: BatchNormCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, BatchNormParams]:
    """Gradients of :func:`batch_norm_forward`.

    With batch statistics, x affects x_hat in three ways, as in
    :func:`~pvt_ref.layers.layer_norm.layer_norm_backward`: directly, through the mean and through
    the variance. Here both are over all values of a channel, which share one weight, so the
    means of g = dL/dx_hat = weight * dy follow from the gradients of bias and weight::

        dL/dx_j = rstd * (g_j - mean(g) - x_hat_j mean(g * x_hat))
                = rstd * weight * (dy_j - (dbias + x_hat_j dweight) / count)

    Its sum over a channel is 0, since a constant added to the channel changes nothing. Running
    statistics are constants: dL/dx = rstd * weight * dy. They get no gradient.

    Args:
        p: the forward's weight and bias, (C,) each.
        cache: from the forward.
        dy: dL/dy (..., C).
        ops: the table of operations; sums over rows come from it.

    Returns:
        dx (..., C) and the gradients of weight and bias, (C,) each, all of dy's dtype.
    """
    xp = array_module(dy)
    rows = (-1, dy.shape[-1])
    # y = x_hat * weight + bias
    dbias, _ = ops[sum_rows].forward(None, xp.reshape(dy, rows), ops, keep=False)  # (C,)
    products = xp.reshape(dy * cache.x_hat, rows)
    dweight, _ = ops[sum_rows].forward(None, products, ops, keep=False)  # (C,)
    # x_hat = (x - mean) * rstd
    if cache.mean is None:
        dx = dy * (p.weight * cache.rstd)  # (..., C)
    else:
        dx = dy - cache.x_hat * (dweight / cache.count)  # (..., C)
        dx -= dbias / cache.count
        dx *= p.weight * cache.rstd
    return dx, BatchNormParams(dweight, dbias)


def statistics(cache: Any) -> BatchNormBuffers | None:
    """The statistics of a forward's batch, as buffers; None if it used the running ones.

    The variance is unbiased, count/(count - 1) times the one that normalised the batch. Only mean,
    variance and count of the cache are read, so it may be a twin's.
    """
    if cache.mean is None or cache.variance is None:
        return None
    xp, count = array_module(cache.mean), cache.count
    one = xp.ones_like(cache.mean[0, ...], dtype=xp.int64)  # made where the others lie
    return BatchNormBuffers(cache.mean, cache.variance * (count / (count - 1)), one)


def moved(buffers: Any, seen: Any, momentum: float = MOMENTUM) -> Any:
    """Running statistics after a batch, (1 - momentum) old + momentum new; counts are added.

    Args:
        buffers: a record of buffers, nested as in the network.
        seen: the same record of the batch, from :func:`statistics`; None changes nothing.
        momentum: share of the batch.
    """
    if seen is None:
        return buffers

    def move(old: Array, new: Array) -> Array:
        xp = array_module(old)
        if xp.isdtype(old.dtype, "real floating"):
            return old * (1 - momentum) + new * momentum
        return xp.asarray(old + new, dtype=old.dtype)  # NumPy's sum is a scalar, not an array

    return map_arrays(move, buffers, seen)


def _count(x: Array) -> int:
    """The number of values of a channel of x (..., C)."""
    return math.prod(x.shape[:-1])


batch_norm = Operation(batch_norm_forward, batch_norm_backward)
