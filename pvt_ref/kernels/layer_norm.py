"""Layer norm by blocks of rows; means are products with a vector of ones, which BLAS is fast at."""

from dataclasses import dataclass

import numpy as np

from pvt_ref.kernels.blocking import Blocking
from pvt_ref.kernels.linear import column_sums
from pvt_ref.kernels.threads import Scratch
from pvt_ref.layers.layer_norm import LayerNormParams


def _row_means(x: np.ndarray) -> np.ndarray:
    """(rows, 1)."""
    means = x @ np.ones(x.shape[1], x.dtype)
    means /= x.shape[1]
    return means[:, None]


def _mean_products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The mean of x * y over each row, (rows, 1), without an array of products."""
    means = np.einsum("rc,rc->r", x, y)
    means /= x.shape[1]
    return means[:, None]


def normalize_rows(x: np.ndarray, eps: float, x_hat: np.ndarray) -> np.ndarray:
    """x_hat becomes (x - mean) * rstd, for a block of rows.

    Returns:
        rstd (rows, 1).
    """
    np.subtract(x, _row_means(x), out=x_hat)
    rstd = _mean_products(x_hat, x_hat)
    rstd += eps
    np.sqrt(rstd, out=rstd)
    np.divide(1.0, rstd, out=rstd)
    x_hat *= rstd
    return rstd


def affine_rows(p: LayerNormParams, x_hat: np.ndarray, y: np.ndarray) -> None:
    """y becomes x_hat * weight + bias; y may be x_hat."""
    np.multiply(x_hat, p.weight, out=y)
    y += p.bias


def layer_norm_rows(p: LayerNormParams, x: np.ndarray, eps: float, y: np.ndarray) -> None:
    """y becomes LN(x), keeping nothing."""
    normalize_rows(x, eps, y)
    affine_rows(p, y, y)


def layer_norm_backward_rows(
    p: LayerNormParams,
    x_hat: np.ndarray,
    rstd: np.ndarray,
    dy: np.ndarray,
    dx: np.ndarray,
    sums: LayerNormParams,
    scratch: Scratch,
) -> None:
    """dx becomes the gradient of a block's rows, and sums grow by those of weight and bias.

    Args:
        p: weight and bias.
        x_hat, rstd: what :func:`normalize_rows` made, (rows, C) and (rows, 1).
        dy: dL/dy (rows, C).
        dx: (rows, C), written; may be dy.
        sums: float64 (C,) each, added to.
        scratch: memory of this thread.
    """
    product = scratch("layer_norm.product", *dy.shape, dtype=dy.dtype)
    np.multiply(dy, x_hat, out=product)
    sums.weight[...] += column_sums(product)
    sums.bias[...] += column_sums(dy)
    np.multiply(dy, p.weight, out=dx)  # dL/dx_hat
    np.multiply(x_hat, _mean_products(dx, x_hat), out=product)
    dx -= _row_means(dx)
    dx -= product
    dx *= rstd


def zero_sums(p: LayerNormParams) -> LayerNormParams:
    """Where the gradients of weight and bias are added up: in double precision."""
    return LayerNormParams(np.zeros(p.weight.shape), np.zeros(p.bias.shape))


def add_sums(sums: list[LayerNormParams], dtype: np.dtype) -> LayerNormParams:
    """The gradients of weight and bias from those of the pieces."""
    return LayerNormParams(
        sum(s.weight for s in sums).astype(dtype), sum(s.bias for s in sums).astype(dtype)
    )


@dataclass(frozen=True, slots=True, eq=False)
class LayerNormCache:
    """As the readable one, with the tokens in rows."""

    x_hat: np.ndarray  # (rows, C)
    rstd: np.ndarray  # (rows, 1)


def layer_norm_forward(
    p: LayerNormParams, x: np.ndarray, eps: float, keep: bool = True, *, blocking: Blocking
) -> tuple[np.ndarray, LayerNormCache | None]:
    """As :func:`pvt_ref.layers.layer_norm.layer_norm_forward`."""
    C = x.shape[-1]
    y = np.empty(x.shape, x.dtype)
    x_rows, y_rows = x.reshape(-1, C), y.reshape(-1, C)
    x_hat = np.empty_like(y_rows) if keep else y_rows
    rstd = np.empty((len(y_rows), 1), x.dtype)

    def work(piece: slice, scratch: Scratch) -> None:
        del scratch
        for rows in blocking.cut(piece):
            rstd[rows] = normalize_rows(x_rows[rows], eps, x_hat[rows])
            affine_rows(p, x_hat[rows], y_rows[rows])

    blocking.run(work, len(y_rows), C)
    return y, LayerNormCache(x_hat, rstd) if keep else None


def layer_norm_backward(
    p: LayerNormParams, cache: LayerNormCache, dy: np.ndarray, *, blocking: Blocking
) -> tuple[np.ndarray, LayerNormParams]:
    """As :func:`pvt_ref.layers.layer_norm.layer_norm_backward`."""
    dx = np.empty(dy.shape, dy.dtype)
    dx_rows, dy_rows = dx.reshape(cache.x_hat.shape), dy.reshape(cache.x_hat.shape)

    def work(piece: slice, scratch: Scratch) -> LayerNormParams:
        sums = zero_sums(p)
        for rows in blocking.cut(piece):
            layer_norm_backward_rows(
                p, cache.x_hat[rows], cache.rstd[rows], dy_rows[rows], dx_rows[rows], sums, scratch
            )
        return sums

    sums = blocking.run(work, *dx_rows.shape)
    return dx, add_sums(sums, dy.dtype)
