"""Softmax by tiles of rows, in place."""

import numpy as np

from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling
from pvt_ref.layers.softmax import SoftmaxCache, softmax
from pvt_ref.ops import Ops


def softmax_forward(
    p: None, x: np.ndarray, ops: Ops, keep: bool = True, *, tiling: Tiling
) -> tuple[np.ndarray, SoftmaxCache | None]:
    """As :func:`pvt_ref.layers.softmax.softmax_forward`."""
    y = np.empty(x.shape, x.dtype)
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), np.reshape(y, (-1, x.shape[-1]), copy=False)

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for rows in tiles:
            tile, y_tile = x_rows[rows], y_rows[rows]
            np.subtract(tile, np.maximum.reduce(tile, axis=1, keepdims=True), y_tile)
            np.exp(y_tile, y_tile)
            np.divide(y_tile, np.add.reduce(y_tile, axis=1, keepdims=True), y_tile)

    tiling.run(work, len(y_rows), tiling.rows(y_rows.shape[1]))
    return y, SoftmaxCache(y) if keep else None


def softmax_backward(
    p: None, cache: SoftmaxCache, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, None]:
    """As :func:`pvt_ref.layers.softmax.softmax_backward`."""
    dx = np.empty(dy.shape, dy.dtype)
    shape = (-1, dy.shape[-1])
    y_rows, dy_rows = cache.y.reshape(shape), dy.reshape(shape)
    dx_rows = np.reshape(dx, shape, copy=False)

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for rows in tiles:
            y, tile = y_rows[rows], dx_rows[rows]
            product = scratch("softmax.product", *y.shape, dtype=y.dtype)
            np.multiply(dy_rows[rows], y, out=tile)
            np.multiply(y, np.add.reduce(tile, axis=1, keepdims=True), out=product)
            tile -= product

    tiling.run(work, len(dx_rows), tiling.rows(dx_rows.shape[1]))
    return dx, None


softmax_kernel = Kernel(softmax, softmax_forward, softmax_backward)
