"""Resizing maps line by line, with only the non-zero elements of each row of A_h and A_w."""

from functools import partial
from typing import NamedTuple

import numpy as np

from pvt_ref.arrays import Grid
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, by_group
from pvt_ref.layers.resize import ResizeCache, resize, resize_matrix
from pvt_ref.ops import Ops


class Taps(NamedTuple):
    """The non-zero elements of a sparse matrix (M, m), at most K in a row."""

    cells: np.ndarray  # (K, M), the columns; rows with fewer than K repeat one of theirs, ...
    weights: np.ndarray  # (K, M), ... with weight 0

    @classmethod
    def of(cls, A: np.ndarray, dtype: np.dtype) -> "Taps":
        """The non-zero elements of A. A row of zeros gets one element, with weight 0."""
        K = max(1, int((A != 0).sum(axis=1).max()))
        cells = np.argsort(A == 0, axis=1, kind="stable")[:, :K]  # non-zero elements first
        weights = np.take_along_axis(A, cells, axis=1)
        cells = np.where(weights == 0, cells[:, :1], cells)
        return cls(cells.T.copy(), weights.T.astype(dtype))


def mix(x: np.ndarray, taps: Taps, y: np.ndarray, scratch: Scratch) -> None:
    """y[..., j, :] = sum over k of weights[k, j] * x[..., cells[k, j], :].

    x (..., m, c), y (..., M, c), cells (K, M), weights (K, M, c) or an array that broadcasts to it.
    """
    np.take(x, taps.cells[0], axis=-2, out=y, mode="clip")  # any other mode copies y
    if len(taps.cells) == 1 and (taps.weights == 1).all():  # nearest copies
        return
    y *= taps.weights[0]
    other = scratch("resize.other", *y.shape, dtype=y.dtype)
    for cells, weights in zip(taps.cells[1:], taps.weights[1:], strict=True):
        np.take(x, cells, axis=-2, out=other, mode="clip")
        other *= weights
        y += other


def resize_lines(x: np.ndarray, A_h: np.ndarray, A_w: np.ndarray, tiling: Tiling) -> np.ndarray:
    """A_h x A_w^T for every channel of x (B, h, w, C).

    If the number of lines shrinks, they are mixed first and then resized along the width.
    """
    (B, h, w, C), H, W = x.shape, len(A_h), len(A_w)
    of_h, of_w = Taps.of(A_h, x.dtype), Taps.of(A_w, x.dtype)
    # repeated for each channel: NumPy then multiplies a line in one loop, instead of C at a time
    of_w = of_w._replace(weights=np.repeat(of_w.weights[:, :, None], C, axis=2))  # (K, W, C)
    y = np.empty((B, H, W, C), x.dtype)

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for tile in tiles:
            for b, lines, _ in by_group(tile, H):
                cells, weights = of_h.cells[:, lines], of_h.weights[:, lines, None]
                first, n, target = int(cells.min()), cells.shape[1], y[b, lines]
                seen = int(cells.max()) + 1 - first  # the number of lines that they depend on
                if h > H:
                    mixed = scratch("resize.mixed", n, w * C, dtype=x.dtype)
                    mix(x[b].reshape(h, w * C), Taps(cells, weights), mixed, scratch)
                    mix(mixed.reshape(n, w, C), of_w, target, scratch)
                else:
                    mixed = scratch("resize.mixed", seen, W, C, dtype=x.dtype)
                    mix(x[b, first : first + seen], of_w, mixed, scratch)
                    of_tile = Taps(cells - first, weights)
                    mix(mixed.reshape(seen, W * C), of_tile, target.reshape(n, W * C), scratch)

    tiling.run_lines(work, B * H, max(w, W), C)
    return y


def resize_forward(
    p: None,
    x: np.ndarray,
    ops: Ops,
    size: Grid,
    mode: str = "bilinear",
    align_corners: bool = False,
    keep: bool = True,
    *,
    tiling: Tiling,
) -> tuple[np.ndarray, ResizeCache | None]:
    """As :func:`pvt_ref.layers.resize.resize_forward`."""
    cache = ResizeCache(x.shape[1:3], mode, align_corners) if keep else None
    if tuple(size) == tuple(x.shape[1:3]):
        return x, cache
    make = partial(resize_matrix, mode=mode, align_corners=align_corners)
    A_h, A_w = make(size[0], x.shape[1]), make(size[1], x.shape[2])  # (H, h), (W, w)
    return resize_lines(np.ascontiguousarray(x), A_h, A_w, tiling), cache  # (B, H, W, C)


def resize_backward(
    p: None, cache: ResizeCache, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, None]:
    """As :func:`pvt_ref.layers.resize.resize_backward`: both matrices are transposed."""
    (h, w), (H, W) = cache.size, dy.shape[1:3]
    if (h, w) == (H, W):
        return dy, None
    make = partial(resize_matrix, mode=cache.mode, align_corners=cache.align_corners)
    A_h, A_w = make(H, h), make(W, w)  # (H, h), (W, w)
    return resize_lines(np.ascontiguousarray(dy), A_h.T, A_w.T, tiling), None  # (B, h, w, C)


resize_kernel = Kernel(resize, resize_forward, resize_backward)
