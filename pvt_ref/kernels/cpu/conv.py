"""Convolution by lines of windows, which are unfolded and multiplied by the kernel in cache."""

from typing import Any

import numpy as np

from pvt_ref.arrays import Grid
from pvt_ref.kernels.cpu.linear import bias_gradient, for_many_rows, linear_rows, times_weight_rows
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, by_group, cut, share_columns
from pvt_ref.layers.conv import ConvParams, conv, places, windows_along
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import kernel_to_matrix, matrix_to_kernel
from pvt_ref.ops import Ops
from pvt_ref.tree import record


def padded_lines(
    x: np.ndarray, lines: slice, padding: Grid, name: str, scratch: Scratch
) -> np.ndarray:
    """Lines of a map x (H, W, C) padded with zeros, whose first line is 0; in thread's memory."""
    (H, W, C), (a, b) = x.shape, padding
    padded = scratch(name, lines.stop - lines.start, W + 2 * b, C, dtype=x.dtype)
    first, stop = (min(max(line - a, 0), H) for line in (lines.start, lines.stop))
    above, below = (max(line + a - lines.start, 0) for line in (first, stop))
    padded[:above] = 0
    padded[below:] = 0
    padded[above:below, :b] = 0
    padded[above:below, b + W :] = 0
    padded[above:below, b : b + W] = x[first:stop]
    return padded


def unfold_lines(
    x: np.ndarray,
    lines: slice,
    windows: np.ndarray,
    stride: int,
    padding: int,
    scratch: Scratch,
) -> None:
    """Writes these lines of windows of x (H, W, C) to windows (lines, w, k_h, k_w, C)."""
    (_, _, *k, _), s = windows.shape, stride
    reached = slice(lines.start * s, (lines.stop - 1) * s + k[0])
    padded = padded_lines(x, reached, (padding, padding), "conv.padded", scratch)
    down, right, channel = padded.strides
    windows[...] = np.lib.stride_tricks.as_strided(
        padded, windows.shape, (s * down, s * right, down, right, channel), writeable=False
    )


@record
class ConvCache:
    """What :func:`conv_backward` needs.

    Attributes:
        x: (B, H, W, C_in), a copy, since the input may be the caller's images.
    """

    x: np.ndarray
    stride: int
    padding: int


def conv_forward(
    p: ConvParams,
    x: np.ndarray,
    ops: Ops,
    stride: int,
    padding: int,
    keep: bool = True,
    *,
    tiling: Tiling,
) -> tuple[np.ndarray, ConvCache | None]:
    """As :func:`pvt_ref.layers.conv.conv_forward`, without an array of all windows."""
    (B, *size, C), (C_out, _, *k) = x.shape, p.weight.shape
    h, w = windows_along((size[0], size[1]), (k[0], k[1]), stride, padding)
    matrix = for_many_rows(LinearParams(kernel_to_matrix(p.weight), p.bias), B * h * w)
    width = matrix.weight.shape[1]
    y = np.empty((B, h, w, C_out), x.dtype)
    y_lines = y.reshape(B * h, w, C_out)

    def work(pieces: list[slice], scratch: Scratch) -> None:
        for lines in pieces:
            count = lines.stop - lines.start
            windows = scratch("conv.windows", count, w, *k, C, dtype=x.dtype)
            for b, part, within in by_group(lines, h):
                unfold_lines(x[b], part, windows[within], stride, padding, scratch)
            rows = y_lines[lines].reshape(count * w, C_out)
            linear_rows(matrix, windows.reshape(count * w, width), rows, scratch)

    tiling.run(work, B * h, tiling.rows(width) // w or 1, tokens=w)
    return y, ConvCache(x.copy(), stride, padding) if keep else None


def conv_backward(
    p: ConvParams, cache: ConvCache, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, ConvParams]:
    """As :func:`pvt_ref.layers.conv.conv_backward`.

    Lines of overlapping windows add to the same pixels, so each thread takes whole images.
    """
    x, stride, padding = cache.x, cache.stride, cache.padding
    (B, H, W, C), (C_out, _, *k), (h, w) = x.shape, p.weight.shape, dy.shape[1:3]
    matrix = for_many_rows(LinearParams(kernel_to_matrix(p.weight), p.bias), B * h * w)
    width = matrix.weight.shape[1]
    at_once = tiling.rows(width) // w or 1
    dx = np.empty(x.shape, dy.dtype)

    def work(pieces: list[slice], scratch: Scratch) -> np.ndarray:
        dmatrix = np.zeros((C_out, width), dy.dtype)
        part = scratch("conv.dmatrix", C_out, width, dtype=dy.dtype)
        dpadded = scratch("conv.dpadded", H + 2 * padding, W + 2 * padding, C, dtype=dy.dtype)
        for b in range(pieces[0].start, pieces[-1].stop):
            dpadded[...] = 0
            for lines in cut(slice(0, h), at_once):
                count = lines.stop - lines.start
                windows = scratch("conv.windows", count, w, *k, C, dtype=x.dtype)
                unfold_lines(x[b], lines, windows, stride, padding, scratch)
                rows = windows.reshape(count * w, width)
                dy_rows = dy[b, lines].reshape(count * w, C_out)

                def multiply(
                    columns: slice, scratch: Scratch, dy: Any = dy_rows, x: Any = rows
                ) -> None:
                    np.matmul(dy.T, x[:, columns], out=part[:, columns])

                share_columns(multiply, width, scratch)
                dmatrix += part
                times_weight_rows(matrix, dy_rows, rows, scratch)  # windows now has its gradient
                reached = dpadded[lines.start * stride :]
                for u, v, (_, down, right, _) in places((k[0], k[1]), (count, w), stride):
                    reached[down, right] += windows[:, :, u, v]
            dx[b] = dpadded[padding : padding + H, padding : padding + W]
        return dmatrix

    dmatrix = sum(tiling.run(work, B, 1, tokens=h * w))
    dbias = bias_gradient(matrix, dy.reshape(-1, C_out), ops)
    return dx, ConvParams(matrix_to_kernel(np.asarray(dmatrix), p.weight.shape), dbias)


conv_kernel = Kernel(conv, conv_forward, conv_backward, (linear,))
