"""Resizing: y = A_h x A_w^T for every channel of a map, with one small matrix for each axis.

Bilinear, bicubic and nearest resizing, and adaptive pooling (``pool.py``), differ only in the
matrix; position tables (``position.py``) are resized by the same product. It is linear, and its
transpose is A_h^T dy A_w.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from pvt_ref.arrays import Array, Grid, array_module, from_host
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record

#: Makes the matrix (out_size, in_size) of one axis, float64, on the host.
MakeMatrix = Callable[[int, int], np.ndarray]


@record
class ResizeCache:
    """Only the size (H, W) of x and the mode, and no array, since the forward is linear."""

    size: Grid
    mode: str
    align_corners: bool


def _cubic(s: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel at distance s, with a = -3/4 as in PyTorch."""
    a, s = -0.75, np.abs(s)
    near = ((a + 2) * s - (a + 3)) * s * s + 1  # up to 1
    far = ((a * s - 5 * a) * s + 8 * a) * s - 4 * a  # from 1 to 2
    return np.where(s <= 1, near, far)


#: Weights of the cells around a centre, which lies t right of the centre of cell 0.
_WEIGHTS = {
    "bilinear": lambda t: {0: 1 - t, 1: t},
    "bicubic": lambda t: {k: _cubic(t - k) for k in (-1, 0, 1, 2)},
}


def resize_matrix(
    out_size: int, in_size: int, mode: str = "bilinear", align_corners: bool = False
) -> np.ndarray:
    """Resizing along one axis as a matrix (out_size, in_size), float64, on the host.

    The centre of output cell i lies at ``(i + 1/2) in_size/out_size - 1/2`` on the input's axis;
    with align_corners at ``i (in_size - 1)/(out_size - 1)``, so that the outermost centres agree.
    The cell interpolates the two cells around its centre (bicubic: four), by distance; beyond the
    border it uses the last one. Nearest takes exactly the cell ``floor(i in_size/out_size)``;
    PyTorch rounds the quotient to float32 and is off for some sizes, such as 26 to 44.
    """
    cells = np.arange(out_size)
    A = np.zeros((out_size, in_size))
    if mode == "nearest":
        A[cells, cells * in_size // out_size] = 1
        return A
    if align_corners:
        centre = cells * ((in_size - 1) / max(out_size - 1, 1))
    else:
        centre = (cells + 0.5) * (in_size / out_size) - 0.5
    if mode == "bilinear":
        centre = np.maximum(centre, 0)  # before the first cell
    left = np.floor(centre).astype(int)
    toward_right = centre - left
    for k, weight in _WEIGHTS[mode](toward_right).items():
        # accumulate: at the border, several of them are the same cell
        A[cells, np.clip(left + k, 0, in_size - 1)] += weight
    return A


def separable(x: Array, size: Grid, make: MakeMatrix) -> Array:
    """A_h x A_w^T for every channel.

    Args:
        x: (B, h, w, C).
        size: (H, W), height and width of the result.
        make: gives A_h and A_w by their shapes.
    """
    return _product(x, size, *_matrices(x, make, size, x.shape[1:3]))  # (B, H, W, C)


def separable_transpose(dy: Array, size: Grid, make: MakeMatrix) -> Array:
    """The transpose of :func:`separable`: A_h^T dy A_w for every channel.

    Args:
        dy: (B, H, W, C).
        size: (h, w) of the forward's x.
        make: the forward's.
    """
    A_h, A_w = _matrices(dy, make, dy.shape[1:3], size)
    return _product(dy, size, A_h.T, A_w.T)  # (B, h, w, C)


def _matrices(
    like: Array, make: MakeMatrix, size: Grid, old: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """A_h and A_w, from old (h, w) to size (H, W)."""
    make = getattr(array_module(like), "separable_matrix", make)  # arrays without numbers need none
    A_h = make(size[0], old[0])  # (H, h)
    A_w = make(size[1], old[1])  # (W, w)
    return A_h, A_w


def _product(x: Array, size: Grid, A_h: np.ndarray, A_w: np.ndarray) -> Array:
    """A_h along the height and A_w along the width: x (B, h, w, C), size (H, W)."""
    xp = array_module(x)
    B, h, w, C = x.shape
    H, W = size
    A_h, A_w = (xp.astype(from_host(A, like=x), x.dtype) for A in (A_h, A_w))
    x = A_h @ xp.reshape(x, (B, h, w * C))  # (B, H, w*C)
    x = xp.permute_dims(xp.reshape(x, (B, H, w, C)), (0, 2, 1, 3))  # (B, w, H, C)
    x = A_w @ xp.reshape(x, (B, w, H * C))  # (B, W, H*C)
    return xp.permute_dims(xp.reshape(x, (B, W, H, C)), (0, 2, 1, 3))  # (B, H, W, C)


def resize_forward(
    p: None,
    x: Array,
    ops: Ops,
    size: Grid,
    mode: str = "bilinear",
    align_corners: bool = False,
    keep: bool = True,
) -> tuple[Array, ResizeCache | None]:
    """y = A_h x A_w^T for every channel (PyTorch: ``interpolate``, without antialiasing).

    Args:
        p: None.
        x: (B, H, W, C), float32 or float64.
        ops: not used.
        size: height and width of y.
        mode: "nearest", "bilinear" or "bicubic".
        align_corners: whether the centres of the outermost cells agree, instead of their borders.
            Not used for nearest.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, ..., C) of x's dtype, x itself if it has that size already; and the cache.
    """
    cache = ResizeCache(x.shape[1:3], mode, align_corners) if keep else None
    if tuple(size) == tuple(x.shape[1:3]):  # both matrices are 1
        return x, cache
    make = partial(resize_matrix, mode=mode, align_corners=align_corners)
    return separable(x, size, make), cache


def resize_backward(
    p: None, cache: ResizeCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, None]:
    """Gradient of :func:`resize_forward`: dL/dx = A_h^T dL/dy A_w for every channel.

    A cell that contributed to several gets the gradients of all, weighted by its shares; one that
    contributed to none gets 0.

    Args:
        p: None.
        cache: from the forward, size (H, W) of its x.
        dy: dL/dy (B, ..., C), y's shape.
        ops: not used.

    Returns:
        dx (B, H, W, C) of dy's dtype, dy itself if nothing was resized; and None.
    """
    if tuple(dy.shape[1:3]) == tuple(cache.size):
        return dy, None
    make = partial(resize_matrix, mode=cache.mode, align_corners=cache.align_corners)
    # y = A_h x A_w^T
    return separable_transpose(dy, cache.size, make), None  # (B, H, W, C)


resize = Operation(resize_forward, resize_backward)
