"""Resizing and pooling on CUDA: both axes in one launch, forward and backward.

Only the non-zero entries of the two small resizing matrices are copied to the device. They are
constants, so resizing can be captured in a CUDA graph.
"""

import functools
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.kernels.cpu.resize import Taps
from pvt_ref.kernels.cuda.capture import constant
from pvt_ref.kernels.cuda.launch import (
    MOST_NUMBERS,
    THREADS,
    Cuda,
    Function,
    Kernel,
    blocks_for,
    is_float32,
    packed,
)
from pvt_ref.layers.pool import PoolCache, pool, pool_matrix
from pvt_ref.layers.resize import MakeMatrix, ResizeCache, resize, resize_matrix
from pvt_ref.ops import Ops


@functools.cache
def matrix_of(mode: str, align_corners: bool) -> MakeMatrix:
    """The function that makes resizing matrices; the same object for the same arguments."""
    return functools.partial(resize_matrix, mode=mode, align_corners=align_corners)


@functools.lru_cache(maxsize=256)
def _taps(make: MakeMatrix, new: Grid, old: Grid, transposed: bool) -> tuple[Any, ...]:
    """Cells and weights of both axes, concatenated, and K of each axis; on the host."""
    axes = list(zip(new, old, strict=True))
    matrices = [make(o, n).T if transposed else make(n, o) for n, o in axes]
    taps = [Taps.of(A, np.dtype(np.float32)) for A in matrices]
    cells = np.concatenate([each.cells.ravel() for each in taps]).astype(np.int32)
    weights = np.concatenate([each.weights.ravel() for each in taps])
    return cells, weights, *(len(each.cells) for each in taps)


def separable(
    x: Array, size: Grid, make: MakeMatrix, cuda: Cuda, transposed: bool = False
) -> Array:
    """A_h x A_w^T, or with the transposes A_h^T x A_w, for every channel: (B, H, W, C).

    x is (B, h, w, C), and size is (H, W).
    """
    xp, (B, h, w, C), (H, W) = array_module(x), x.shape, size
    cells, weights, K_h, K_w = _taps(make, (H, W), (h, w), transposed)
    x, y = packed(x), xp.empty((B, H, W, C), x.dtype)
    width = 1 if C % 4 else 4
    function = Function("resize.cu", "resize", (("PIECE", "float4" if width == 4 else "float"),))
    taps, count = [constant(host, like=x) for host in (cells, weights)], y.size // width
    sizes = (count, h, w, H, W, C // width, K_h, K_w)
    cuda.launch(function, (blocks_for(count),), (THREADS,), (x, *taps, y, *sizes))
    return y


def _can_resize(x: Array, size: Grid) -> bool:
    """Whether an int of the kernel can count the numbers of both maps (B, ..., C)."""
    B, _, _, C = x.shape
    return is_float32(x) and x.size > 0 and 0 < B * size[0] * size[1] * C <= MOST_NUMBERS


def resize_forward(
    p: None,
    x: Array,
    ops: Ops,
    size: Grid,
    mode: str = "bilinear",
    align_corners: bool = False,
    keep: bool = True,
    *,
    cuda: Cuda,
) -> tuple[Array, ResizeCache | None]:
    """As :func:`pvt_ref.layers.resize.resize_forward`."""
    size, old = (size[0], size[1]), (x.shape[1], x.shape[2])
    if size == old or not _can_resize(x, size):
        return resize.forward(p, x, ops, size, mode, align_corners, keep)
    y = separable(x, size, matrix_of(mode, align_corners), cuda)
    return y, ResizeCache(old, mode, align_corners) if keep else None


def resize_backward(
    p: None, cache: ResizeCache, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, None]:
    """As :func:`pvt_ref.layers.resize.resize_backward`."""
    size = (cache.size[0], cache.size[1])
    if size == tuple(dy.shape[1:3]) or not _can_resize(dy, size):
        return resize.backward(p, cache, dy, ops)
    make = matrix_of(cache.mode, cache.align_corners)
    return separable(dy, size, make, cuda, transposed=True), None


def pool_forward(
    p: None, x: Array, ops: Ops, size: Grid, keep: bool = True, *, cuda: Cuda
) -> tuple[Array, PoolCache | None]:
    """As :func:`pvt_ref.layers.pool.pool_forward`."""
    if not _can_resize(x, size):
        return pool.forward(p, x, ops, size, keep)
    y = separable(x, (size[0], size[1]), pool_matrix, cuda)
    return y, PoolCache((x.shape[1], x.shape[2])) if keep else None


def pool_backward(
    p: None, cache: PoolCache, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, None]:
    """As :func:`pvt_ref.layers.pool.pool_backward`."""
    if not _can_resize(dy, cache.size):
        return pool.backward(p, cache, dy, ops)
    return separable(dy, cache.size, pool_matrix, cuda, transposed=True), None


resize_kernel = Kernel(resize, resize_forward, resize_backward)
pool_kernel = Kernel(pool, pool_forward, pool_backward)
