"""Depth-wise convolution by lines of a map: one call of einsum sums the shifted maps."""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from pvt_ref.arrays import Grid
from pvt_ref.kernels.cpu.linear import Sums, add_up, column_sums
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, by_group
from pvt_ref.layers.conv import ConvParams
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record


def kernel_of_lines(weight: np.ndarray, W: int) -> np.ndarray:
    """(k_h, k_w, W + b, C): the kernel (C, 1, k_h, k_w) repeated for each pixel of a line.

    NumPy then multiplies a line in one loop, instead of C numbers at a time.
    """
    C, _, k_h, k_w = weight.shape
    kernel = weight.transpose(2, 3, 1, 0)  # (k_h, k_w, 1, C)
    return np.ascontiguousarray(np.broadcast_to(kernel, (k_h, k_w, W + k_w // 2, C)))


class Lines(NamedTuple):
    """Some lines of one image, with line numbers over the whole batch."""

    lines: slice
    seen: slice  # the lines that the kernel reads for them
    above: int  # the number of lines of zeros above those


def by_image(tile: slice, k_h: int, H: int) -> list[Lines]:
    """A tile of lines, split where a new image of H lines begins."""
    a, parts = k_h // 2, []
    for b, within, _ in by_group(tile, H):
        lines = slice(max(within.start - a, 0), min(within.stop + a, H))
        seen, own = (slice(b * H + each.start, b * H + each.stop) for each in (lines, within))
        parts.append(Lines(own, seen, max(a - within.start, 0)))
    return parts


def after(start: int, lines: slice) -> slice:
    """The same lines, as a slice of an array that begins with line start."""
    return slice(lines.start - start, lines.stop - start)


def shifted_lines(
    seen: np.ndarray, above: int, count: int, k: Grid, name: str, scratch: Scratch
) -> np.ndarray:
    """(k_h, k_w, count, (W + b)*C): the shifted map for every element of the kernel.

    seen (lines, W, C) has the lines that exist; above is the number of missing lines before them.
    They are padded with zeros. The zeros to the right of a line also serve as those to the left of
    the next line, so each shifted map is a contiguous part of the thread's memory. The last
    b = k_w // 2 pixels of each line of results are meaningless.
    """
    (lines, W, C), b = seen.shape, k[1] // 2
    line, end = (W + b) * C, b * C
    memory = scratch(name, (count + 2 * (k[0] // 2)) * line + 2 * end, dtype=seen.dtype)
    framed = memory[end : len(memory) - end].reshape(-1, W + b, C)
    memory[:end] = 0
    memory[len(memory) - end :] = 0
    framed[:above] = 0
    framed[above + lines :] = 0
    framed[above : above + lines, :W] = seen
    framed[above : above + lines, W:] = 0
    one = memory.itemsize
    return as_strided(memory, (*k, count, line), (line * one, C * one, line * one, one))


def sum_lines(
    kernel: np.ndarray,
    bias: np.ndarray | None,
    shifted: np.ndarray,
    y: np.ndarray,
    scratch: Scratch,
) -> None:
    """Writes the sum of the shifted maps, each times its kernel weights, to y (lines, W, C)."""
    lines, W, C = y.shape
    summed = scratch("depthwise.summed", *shifted.shape[2:], dtype=y.dtype)
    np.einsum("uvlx,uvx->lx", shifted, kernel.reshape(*kernel.shape[:2], -1), out=summed)
    valid = summed.reshape(lines, -1, C)[:, :W]
    if bias is None:
        y[...] = valid
    else:
        np.add(valid, bias, out=y)


def kernel_gradient(shifted: np.ndarray, dshifted: np.ndarray, C: int) -> np.ndarray:
    """(k_h, k_w, C) float64: what these lines add, the sum of dy times each shifted map."""
    k_h, k_w, _, line = shifted.shape
    # dy itself, with zeros where results are meaningless
    found = np.einsum("uvlx,lx->uvx", shifted, dshifted[k_h // 2, k_w // 2])
    return found.reshape(k_h, k_w, line // C, C).sum(axis=2, dtype=np.float64)


def to_weight(dkernel: np.ndarray) -> np.ndarray:
    """(k_h, k_w, C) as a weight (C, 1, k_h, k_w)."""
    return np.ascontiguousarray(dkernel.transpose(2, 0, 1)[:, None])


@record
class DepthwiseConvCache:
    """What :func:`depthwise_conv_backward` needs: the input (B, H, W, C), not a copy."""

    x: np.ndarray


def depthwise_conv_forward(
    p: ConvParams, x: np.ndarray, ops: Ops, keep: bool = True, *, tiling: Tiling
) -> tuple[np.ndarray, DepthwiseConvCache | None]:
    """As :func:`pvt_ref.layers.depthwise_conv.depthwise_conv_forward`."""
    (B, H, W, C), k = x.shape, p.weight.shape[2:]
    kernel = kernel_of_lines(p.weight, W)
    y = np.empty(x.shape, x.dtype)
    x_lines, y_lines = (each.reshape(B * H, W, C) for each in (x, y))

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for tile in tiles:
            for lines, seen, above in by_image(tile, k[0], H):
                target = y_lines[lines]
                shifted = shifted_lines(x_lines[seen], above, len(target), k, "shifted.x", scratch)
                sum_lines(kernel, p.bias, shifted, target, scratch)

    tiling.run_lines(work, B * H, W, C)
    return y, DepthwiseConvCache(x) if keep else None


def depthwise_conv_backward(
    p: ConvParams, cache: DepthwiseConvCache, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, ConvParams]:
    """As :func:`pvt_ref.layers.depthwise_conv.depthwise_conv_backward`.

    dx is the same operation on dy, with the kernel rotated by 180 degrees.
    """
    (B, H, W, C), k = dy.shape, p.weight.shape[2:]
    turned = kernel_of_lines(p.weight[:, :, ::-1, ::-1], W)
    dx = np.empty(dy.shape, dy.dtype)
    x_lines, dy_lines, dx_lines = (each.reshape(B * H, W, C) for each in (cache.x, dy, dx))

    def work(tiles: list[slice], scratch: Scratch) -> Sums:
        sums = Sums()
        for tile in tiles:
            for lines, seen, above in by_image(tile, k[0], H):
                target = dx_lines[lines]
                shifted, dshifted = (
                    shifted_lines(each[seen], above, len(target), k, name, scratch)
                    for each, name in ((x_lines, "shifted.x"), (dy_lines, "shifted.dy"))
                )
                sum_lines(turned, None, dshifted, target, scratch)
                sums.add("kernel", kernel_gradient(shifted, dshifted, C))
            sums.add("bias", column_sums(dy_lines[tile].reshape(-1, C)))
        return sums

    pieces = tiling.run_lines(work, B * H, W, C)
    dbias = None if p.bias is None else add_up(pieces, "bias", dy.dtype)
    return dx, ConvParams(to_weight(add_up(pieces, "kernel", dy.dtype)), dbias)


depthwise_conv_kernel = Kernel(
    depthwise_conv, depthwise_conv_forward, depthwise_conv_backward, (sum_rows,)
)
