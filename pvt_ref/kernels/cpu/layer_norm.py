"""Layer norm by blocks of rows; means are products with a vector of ones, which BLAS is fast at."""

import numpy as np

from pvt_ref.kernels.cpu.blocking import Blocking
from pvt_ref.kernels.cpu.linear import add_up, column_sums, ones
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class LayerNormCache:
    """As the readable one, with the tokens in rows.

    Attributes:
        x_hat: (rows, C), the normalised tokens.
        rstd: (rows, 1), 1 / sqrt(variance + eps).
    """

    x_hat: np.ndarray  # (rows, C)
    rstd: np.ndarray  # (rows, 1)


def empty_layer_norm_cache(rows: int, C: int, dtype: np.dtype) -> LayerNormCache:
    """Room for so many rows.

    Args:
        rows: how many.
        C: channels.
        dtype: float32 or float64.

    Returns:
        A cache of arrays (rows, C) and (rows, 1), with arbitrary values.
    """
    return LayerNormCache(np.empty((rows, C), dtype), np.empty((rows, 1), dtype))


def _row_means(x: np.ndarray) -> np.ndarray:
    """(rows, 1)."""
    means = x @ ones(x.shape[1], x.dtype)
    means /= x.shape[1]
    return means[:, None]


def _mean_products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The mean of x * y over each row, (rows, 1), without an array of products."""
    means = np.vecdot(x, y)
    means /= x.shape[1]
    return means[:, None]


def layer_norm_rows(
    p: LayerNormParams,
    x: np.ndarray,
    eps: float,
    y: np.ndarray,
    rows: slice,
    cache: LayerNormCache | None,
) -> None:
    """y becomes LN(x), for a block of rows.

    Args:
        p: weight and bias, (C,) each.
        x: (block, C).
        eps: added to the variance.
        y: (block, C), written; may be x.
        rows: which rows of the cache the block has.
        cache: keeps what the backward needs; None if nobody needs it.
    """
    x_hat = y if cache is None else cache.x_hat[rows]
    np.subtract(x, _row_means(x), out=x_hat)
    rstd = _mean_products(x_hat, x_hat)
    rstd += eps
    np.sqrt(rstd, out=rstd)
    np.divide(1.0, rstd, out=rstd)
    x_hat *= rstd
    np.multiply(x_hat, p.weight, out=y)
    y += p.bias
    if cache is not None:
        cache.rstd[rows] = rstd


def layer_norm_backward_rows(
    p: LayerNormParams,
    cache: LayerNormCache,
    rows: slice,
    dy: np.ndarray,
    dx: np.ndarray,
    sums: LayerNormParams,
    scratch: Scratch,
) -> None:
    """dx becomes the gradient of a block's rows, and sums grow by those of weight and bias.

    Args:
        p: weight and bias, (C,) each.
        cache: as in :func:`layer_norm_rows`.
        rows: as in :func:`layer_norm_rows`.
        dy: dL/dy (block, C).
        dx: (block, C), written; may be dy.
        sums: float64 (C,) each, added to.
        scratch: memory of this thread.
    """
    x_hat = cache.x_hat[rows]
    product = scratch("layer_norm.product", *dy.shape, dtype=dy.dtype)
    np.multiply(dy, x_hat, out=product)
    sums.weight[...] += column_sums(product)
    sums.bias[...] += column_sums(dy)
    np.multiply(dy, p.weight, out=dx)  # dL/dx_hat
    np.multiply(x_hat, _mean_products(dx, x_hat), out=product)
    dx -= _row_means(dx)
    dx -= product
    dx *= cache.rstd[rows]


def zero_sums(p: LayerNormParams) -> LayerNormParams:
    """Where the gradients of weight and bias are added up: in double precision.

    Args:
        p: weight and bias, (C,) each.

    Returns:
        Zeros (C,) for each, float64.
    """
    return LayerNormParams(np.zeros(p.weight.shape), np.zeros(p.bias.shape))


def add_sums(sums: list[LayerNormParams], dtype: np.dtype) -> LayerNormParams:
    """The gradients of weight and bias from those of the pieces.

    Args:
        sums: of each piece, float64 (C,) for weight and bias.
        dtype: float32 or float64.

    Returns:
        Their sums, (C,) each, of dtype.
    """
    return LayerNormParams(
        add_up([s.weight for s in sums], dtype), add_up([s.bias for s in sums], dtype)
    )


def layer_norm_forward(
    p: LayerNormParams,
    x: np.ndarray,
    ops: Ops,
    eps: float,
    keep: bool = True,
    *,
    blocking: Blocking,
) -> tuple[np.ndarray, LayerNormCache | None]:
    """As :func:`pvt_ref.layers.layer_norm.layer_norm_forward`.

    Args:
        p: weight and bias, (C,) each.
        x: (..., C).
        eps: added to the variance.
        keep: whether a cache for the backward is returned; without it, it is None.
        blocking: the settings.

    Returns:
        y (..., C) and the cache.
    """
    C = x.shape[-1]
    y = np.empty(x.shape, x.dtype)
    x_rows, y_rows = x.reshape(-1, C), y.reshape(-1, C)
    cache = empty_layer_norm_cache(*y_rows.shape, x.dtype) if keep else None

    def work(blocks: list[slice], scratch: Scratch) -> None:
        del scratch
        for rows in blocks:
            layer_norm_rows(p, x_rows[rows], eps, y_rows[rows], rows, cache)

    blocking.run(work, len(y_rows), blocking.rows(C))
    return y, cache


def layer_norm_backward(
    p: LayerNormParams, cache: LayerNormCache, dy: np.ndarray, ops: Ops, *, blocking: Blocking
) -> tuple[np.ndarray, LayerNormParams]:
    """As :func:`pvt_ref.layers.layer_norm.layer_norm_backward`.

    Args:
        p: the forward's weight and bias, (C,) each.
        cache: from the forward.
        dy: dL/dy (..., C).
        blocking: the settings.

    Returns:
        dx (..., C) and the gradients of weight and bias, (C,) each.
    """
    dx = np.empty(dy.shape, dy.dtype)
    dx_rows, dy_rows = dx.reshape(cache.x_hat.shape), dy.reshape(cache.x_hat.shape)

    def work(blocks: list[slice], scratch: Scratch) -> LayerNormParams:
        sums = zero_sums(p)
        for rows in blocks:
            layer_norm_backward_rows(p, cache, rows, dy_rows[rows], dx_rows[rows], sums, scratch)
        return sums

    sums = blocking.run(work, len(dx_rows), blocking.rows(dy.shape[-1]))
    return dx, add_sums(sums, dy.dtype)
