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

    def work(x: np.ndarray, y: np.ndarray, scratch: Scratch) -> None:
        np.subtract(x, np.maximum.reduce(x, axis=1, keepdims=True), y)
        np.exp(y, y)
        np.divide(y, np.add.reduce(y, axis=1, keepdims=True), y)

    tiling.by_rows(work, x, y)
    return y, SoftmaxCache(y) if keep else None


def softmax_backward(
    p: None, cache: SoftmaxCache, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, None]:
    """As :func:`pvt_ref.layers.softmax.softmax_backward`."""
    dx = np.empty(dy.shape, dy.dtype)

    def work(y: np.ndarray, dy: np.ndarray, dx: np.ndarray, scratch: Scratch) -> None:
        product = scratch("softmax.product", *y.shape, dtype=y.dtype)
        np.multiply(dy, y, out=dx)
        np.multiply(y, np.add.reduce(dx, axis=1, keepdims=True), out=product)
        dx -= product

    tiling.by_rows(work, cache.y, dy, dx)
    return dx, None


softmax_kernel = Kernel(softmax, softmax_forward, softmax_backward)
