"""Softmax by blocks of rows, in place."""

import numpy as np

from pvt_ref.kernels.cpu.blocking import Blocking
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class SoftmaxCache:
    """As the readable one.

    Attributes:
        y: (..., m), the forward's result.
    """

    y: np.ndarray  # (..., m)


def softmax_forward(
    p: None, x: np.ndarray, ops: Ops, keep: bool = True, *, blocking: Blocking
) -> tuple[np.ndarray, SoftmaxCache | None]:
    """As :func:`pvt_ref.layers.softmax.softmax_forward`.

    Args:
        x: (..., m), finite.
        keep: whether a cache for the backward is returned; without it, it is None.
        blocking: the settings.

    Returns:
        y (..., m), rows of non-negative numbers that sum to 1, and the cache.
    """
    y = np.empty(x.shape, x.dtype)
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1])

    def work(blocks: list[slice], scratch: Scratch) -> None:
        del scratch
        for rows in blocks:
            block = y_rows[rows]
            np.subtract(x_rows[rows], np.maximum.reduce(x_rows[rows], axis=1, keepdims=True), block)
            np.exp(block, block)
            np.divide(block, np.add.reduce(block, axis=1, keepdims=True), block)

    blocking.run(work, len(y_rows), blocking.rows(y_rows.shape[1]))
    return y, SoftmaxCache(y) if keep else None


def softmax_backward(
    p: None, cache: SoftmaxCache, dy: np.ndarray, ops: Ops, *, blocking: Blocking
) -> tuple[np.ndarray, None]:
    """As :func:`pvt_ref.layers.softmax.softmax_backward`.

    Args:
        cache: from the forward.
        dy: dL/dy (..., m).
        blocking: the settings.

    Returns:
        dx (..., m).
    """
    dx = np.empty(dy.shape, dy.dtype)
    shape = (-1, dy.shape[-1])
    y_rows, dx_rows, dy_rows = cache.y.reshape(shape), dx.reshape(shape), dy.reshape(shape)

    def work(blocks: list[slice], scratch: Scratch) -> None:
        for rows in blocks:
            y, block = y_rows[rows], dx_rows[rows]
            product = scratch("softmax.product", *y.shape, dtype=y.dtype)
            np.multiply(dy_rows[rows], y, out=block)
            np.multiply(y, np.add.reduce(block, axis=1, keepdims=True), out=product)
            block -= product

    blocking.run(work, len(dx_rows), blocking.rows(dx_rows.shape[1]))
    return dx, None
