"""Convolution of a map: unfold its windows, one per row, and multiply them by the kernel.

With a stride smaller than the kernel, windows overlap, so a pixel lies in several rows. Unfolding
is then not a permutation, as it is for patches (``patch_embed.py``), and its transpose sums the
gradients of each pixel.
"""

from collections.abc import Iterator
from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import kernel_to_matrix, matrix_to_kernel
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class ConvParams:
    """weight (C_out, C_in, k_h, k_w) and bias (C_out,) or None, or their gradients.

    The depth-wise convolution uses it too, with a weight of (C, 1, k_h, k_w).
    """

    weight: Array
    bias: Array | None


@record
class ConvCache:
    """The cache of the product, which holds the windows; size (H, W) of x, stride and padding."""

    linear: Any
    size: Grid
    stride: int
    padding: int


def pad(x: Array, padding: Grid) -> Array:
    """x padded with zeros; x itself if the padding is 0.

    Args:
        x: (B, H, W, C).
        padding: (a, b), rows above and below, columns left and right.
    """
    if padding == (0, 0):
        return x
    xp = array_module(x)
    B, H, W, C = x.shape
    a, b = padding
    padded = xp.zeros((B, H + 2 * a, W + 2 * b, C), dtype=x.dtype)  # (B, H + 2a, W + 2b, C)
    padded[:, a : a + H, b : b + W, :] = x
    return padded


def unpad(padded: Array, padding: Grid) -> Array:
    """A map without its padding: the transpose of :func:`pad`.

    Args:
        padded: (B, H, W, C), with the padding.
        padding: (a, b), as for :func:`pad`.
    """
    _, H, W, _ = padded.shape
    a, b = padding
    return padded[:, a : H - a, b : W - b, :]  # (B, H - 2a, W - 2b, C)


def windows_along(size: Grid, k: Grid, stride: int, padding: int) -> Grid:
    """(h, w), how many windows of k (k_h, k_w) lie in a map of size (H, W)."""
    h, w = ((n + 2 * padding - k_n) // stride + 1 for n, k_n in zip(size, k, strict=True))
    return h, w


def places(k: Grid, grid: Grid, stride: int = 1) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    """(u, v) in a window of k (k_h, k_w), and the index of these pixels in all (h, w) windows.

    The slices of one (u, v) meet every pixel at most once, so ``+=`` on them is safe.
    """
    for u in range(k[0]):
        for v in range(k[1]):
            down, right = (
                slice(first, first + stride * (n - 1) + 1, stride)
                for first, n in zip((u, v), grid, strict=True)
            )
            yield u, v, (slice(None), down, right, slice(None))


def unfold(x: Array, k: Grid, stride: int, padding: int) -> Array:
    """The windows of a map, one flattened window per row, in the order of patchify. New memory.

    Without padding and with k equal to the stride, windows are patches.

    Args:
        x: (B, H, W, C), of any dtype.
        k: (k_h, k_w), height and width of a window.
        stride: from one window to the next.
        padding: rows and columns of zeros on each side.
    """
    xp = array_module(x)
    B, H, W, C = x.shape
    k_h, k_w = k
    h, w = windows_along((H, W), k, stride, padding)
    padded = pad(x, (padding, padding))
    windows = xp.empty((B, h, w, k_h, k_w, C), dtype=x.dtype)  # (B, h, w, k_h, k_w, C)
    for u, v, index in places(k, (h, w), stride):
        windows[:, :, :, u, v, :] = padded[index]
    return xp.reshape(windows, (B, h * w, k_h * k_w * C))  # (B, h*w, k_h*k_w*C)


def fold(windows: Array, size: Grid, k: Grid, stride: int, padding: int) -> Array:
    """The transpose of :func:`unfold`: every pixel gets the sum over the windows that it lies in.

    Args:
        windows: (B, n, D), one flattened window per row.
        size: (H, W) of the map; pixels that no window reaches get 0.
        k: (k_h, k_w), height and width of a window.
        stride: from one window to the next.
        padding: rows and columns of zeros on each side.
    """
    xp = array_module(windows)
    (B, _, D), (H, W), (k_h, k_w) = windows.shape, size, k
    C = D // (k_h * k_w)
    h, w = windows_along(size, k, stride, padding)
    windows = xp.reshape(windows, (B, h, w, k_h, k_w, C))  # (B, h, w, k_h, k_w, C)
    padded = xp.zeros((B, H + 2 * padding, W + 2 * padding, C), dtype=windows.dtype)
    for u, v, index in places(k, (h, w), stride):
        padded[index] += windows[:, :, :, u, v, :]
    return unpad(padded, (padding, padding))  # (B, H, W, C)


def conv_forward(
    p: ConvParams, x: Array, ops: Ops, stride: int, padding: int, keep: bool = True
) -> tuple[Array, ConvCache | None]:
    """y_ij = sum_uv W_uv x_(is+u, js+v) + b, over a map padded with zeros.

    Args:
        p: weight (C_out, C_in, k_h, k_w) and bias (C_out,) or None.
        x: (B, H, W, C_in), of the weights' dtype: float32 or float64.
        ops: the table of operations.
        stride: s, from one window to the next, along both axes.
        padding: rows and columns of zeros on each side.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, h, w, C_out) of x's dtype, h = floor((H + 2 padding - k_h)/s) + 1 and w likewise, and
        the cache, which is k_h k_w/s^2 times as large as x.
    """
    xp = array_module(x)
    size, k = x.shape[1:3], p.weight.shape[2:]
    h, w = windows_along(size, k, stride, padding)
    matrix = LinearParams(kernel_to_matrix(p.weight), p.bias)  # (C_out, k_h*k_w*C_in)
    windows = unfold(x, k, stride, padding)  # (B, h*w, k_h*k_w*C_in)
    y, linear_cache = ops[linear].forward(matrix, windows, ops, keep=keep)  # (B, h*w, C_out)
    y = xp.reshape(y, (x.shape[0], h, w, y.shape[-1]))  # (B, h, w, C_out)
    return y, ConvCache(linear_cache, size, stride, padding) if keep else None


def conv_backward(
    p: ConvParams, cache: ConvCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, ConvParams]:
    """Gradients of :func:`conv_forward`.

    unfold is a matrix Pi of zeros and ones, with a 1 for each element of a window that is not
    padding: y = Pi x W^T + b. So dL/dx = Pi^T dL/dwindows, and Pi^T is fold.

    Args:
        p: the forward's weight (C_out, C_in, k_h, k_w) and bias (C_out,) or None.
        cache: from the forward, size (H, W).
        dy: dL/dy (B, h, w, C_out).
        ops: the table that the forward was given.

    Returns:
        dx (B, H, W, C_in) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    xp = array_module(dy)
    B, h, w, C_out = dy.shape
    matrix = LinearParams(kernel_to_matrix(p.weight), p.bias)
    # y = windows W^T + b
    dy_rows = xp.reshape(dy, (B, h * w, C_out))  # (B, h*w, C_out)
    dwindows, dmatrix = ops[linear].backward(matrix, cache.linear, dy_rows, ops)
    grads = ConvParams(matrix_to_kernel(dmatrix.weight, p.weight.shape), dmatrix.bias)
    # windows = unfold(x)
    dx = fold(dwindows, cache.size, p.weight.shape[2:], cache.stride, cache.padding)
    return dx, grads  # (B, H, W, C_in)


conv = Operation(conv_forward, conv_backward)
