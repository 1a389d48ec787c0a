"""Layer norm by tiles of rows; means are products with a vector of ones, which are fast in BLAS."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pvt_ref.kernels.cpu.linear import Sums, add_up, column_sums, ones
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling
from pvt_ref.layers.layer_norm import LayerNormCache, LayerNormParams, layer_norm
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops


def empty_layer_norm_cache(rows: int, C: int, dtype: np.dtype) -> LayerNormCache:
    """Room for x_hat (rows, C) and rstd (rows, 1)."""
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
    p: LayerNormParams, x: np.ndarray, eps: float, y: np.ndarray, cache: LayerNormCache | None
) -> None:
    """Writes LN(x) to y (rows, C), which may be x, and fills the cache, if it is not None."""
    x_hat = y if cache is None else cache.x_hat
    np.subtract(x, _row_means(x), out=x_hat)
    rstd = _mean_products(x_hat, x_hat)
    rstd += eps
    np.sqrt(rstd, out=rstd)
    np.divide(1.0, rstd, out=rstd)
    x_hat *= rstd
    np.multiply(x_hat, p.weight, out=y)
    y += p.bias
    if cache is not None:
        cache.rstd[...] = rstd


def _dx_rows(
    p: LayerNormParams, cache: LayerNormCache, dy: np.ndarray, dx: np.ndarray, scratch: Scratch
) -> None:
    """Writes the gradient of the rows to dx (rows, C), which may be dy."""
    product = scratch("layer_norm.product", *dy.shape, dtype=dy.dtype)
    np.multiply(dy, p.weight, out=dx)  # dL/dx_hat
    np.multiply(cache.x_hat, _mean_products(dx, cache.x_hat), out=product)
    dx -= _row_means(dx)
    dx -= product
    dx *= cache.rstd


def layer_norm_backward_rows(
    p: LayerNormParams,
    cache: LayerNormCache,
    dy: np.ndarray,
    dx: np.ndarray,
    sums: Sums,
    name: str,
    scratch: Scratch,
) -> None:
    """Writes the gradient to dx (rows, C), which may be dy; adds those of the weights to sums."""
    product = scratch("layer_norm.product", *dy.shape, dtype=dy.dtype)
    np.multiply(dy, cache.x_hat, out=product)
    sums.add(f"{name}.weight", column_sums(product))
    sums.add(f"{name}.bias", column_sums(dy))
    _dx_rows(p, cache, dy, dx, scratch)


def add_up_norm(pieces: Sequence[Sums], name: str, dtype: np.dtype) -> LayerNormParams:
    """The gradients of weight and bias, from the sums of the pieces."""
    return LayerNormParams(*(add_up(pieces, f"{name}.{w}", dtype) for w in ("weight", "bias")))


def layer_norm_forward(
    p: LayerNormParams, x: np.ndarray, ops: Ops, eps: float, keep: bool = True, *, tiling: Tiling
) -> tuple[np.ndarray, LayerNormCache | None]:
    """As :func:`pvt_ref.layers.layer_norm.layer_norm_forward`; its cache has the tokens in rows."""
    C = x.shape[-1]
    y = np.empty(x.shape, x.dtype)
    cache = empty_layer_norm_cache(x.size // C, C, x.dtype) if keep else None

    def work(x: Any, y: Any, cache: LayerNormCache | None, scratch: Scratch) -> None:
        layer_norm_rows(p, x, eps, y, cache)

    tiling.by_rows(work, x, y, cache)
    return y, cache


def layer_norm_backward(
    p: LayerNormParams, cache: LayerNormCache, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, LayerNormParams]:
    """As :func:`pvt_ref.layers.layer_norm.layer_norm_backward`."""
    dx, dy_rows = np.empty(dy.shape, dy.dtype), dy.reshape(cache.x_hat.shape)
    products = np.empty_like(dy_rows)

    def work(dy: Any, dx: Any, products: Any, cache: LayerNormCache, scratch: Scratch) -> None:
        np.multiply(dy, cache.x_hat, out=products)
        _dx_rows(p, cache, dy, dx, scratch)

    tiling.by_rows(work, dy_rows, dx, products, cache)
    dweight, _ = ops[sum_rows].forward(None, products, ops, keep=False)
    dbias, _ = ops[sum_rows].forward(None, dy_rows, ops, keep=False)
    return dx, LayerNormParams(dweight, dbias)


layer_norm_kernel = Kernel(layer_norm, layer_norm_forward, layer_norm_backward)
