"""Depth-wise convolution by lines of a map, its shifted products made and added in cache."""

import numpy as np

from pvt_ref.kernels.cpu.conv import padded_lines
from pvt_ref.kernels.cpu.linear import Sums, add_up, column_sums
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, by_group
from pvt_ref.layers.conv import ConvParams
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record

#: So many numbers are worked on at once: line, product and sum then stay in a core's cache.
_AT_ONCE = 2**16


def _for_lines(weight: np.ndarray, W: int) -> np.ndarray:
    """(k_h, k_w, W, C): the kernel (C, 1, k_h, k_w) again for each pixel of a line.

    NumPy then multiplies a line in one loop, instead of C numbers at a time.
    """
    C, _, k_h, k_w = weight.shape
    kernel = weight.transpose(2, 3, 1, 0)  # (k_h, k_w, 1, C)
    return np.ascontiguousarray(np.broadcast_to(kernel, (k_h, k_w, W, C)))


def _sum_lines(kernel: np.ndarray, padded: np.ndarray, y: np.ndarray, scratch: Scratch) -> None:
    """y (lines, W, C), arbitrary before, becomes the sum of the products."""
    lines, W, _ = y.shape
    np.multiply(padded[:lines, :W], kernel[0, 0], out=y)
    product = scratch("depthwise.product", *y.shape, dtype=y.dtype)
    for u, v in list(np.ndindex(kernel.shape[:2]))[1:]:
        np.multiply(padded[u : u + lines, v : v + W], kernel[u, v], out=product)
        y += product


@record
class DepthwiseConvCache:
    """What :func:`depthwise_conv_backward` needs: the input (B, H, W, C), not a copy."""

    x: np.ndarray


def depthwise_conv_forward(
    p: ConvParams, x: np.ndarray, ops: Ops, keep: bool = True, *, tiling: Tiling
) -> tuple[np.ndarray, DepthwiseConvCache | None]:
    """As :func:`pvt_ref.layers.depthwise_conv.depthwise_conv_forward`."""
    B, H, W, C = x.shape
    kernel = _for_lines(p.weight, W)
    k_h, k_w = kernel.shape[:2]
    y = np.empty(x.shape, x.dtype)

    def work(pieces: list[slice], scratch: Scratch) -> None:
        for tile in pieces:
            for b, part, _ in by_group(tile, H):
                reached = slice(part.start, part.stop + k_h - 1)
                padded = padded_lines(
                    x[b], reached, (k_h // 2, k_w // 2), "depthwise.padded", scratch
                )
                _sum_lines(kernel, padded, y[b, part], scratch)
                if p.bias is not None:
                    y[b, part] += p.bias

    tiling.run(work, B * H, _lines(tiling, W, C), tokens=W)
    return y, DepthwiseConvCache(x) if keep else None


def depthwise_conv_backward(
    p: ConvParams, cache: DepthwiseConvCache, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, ConvParams]:
    """As :func:`pvt_ref.layers.depthwise_conv.depthwise_conv_backward`.

    dx is the same operation on dy, with the kernel turned by 180 degrees.
    """
    x = cache.x
    B, H, W, C = x.shape
    turned = _for_lines(p.weight[:, :, ::-1, ::-1], W)
    k_h, k_w = turned.shape[:2]
    dx = np.empty(x.shape, dy.dtype)

    def work(pieces: list[slice], scratch: Scratch) -> Sums:
        sums = Sums()
        for tile in pieces:
            for b, part, _ in by_group(tile, H):
                reached = slice(part.start, part.stop + k_h - 1)
                frame = (k_h // 2, k_w // 2)
                dpadded = padded_lines(dy[b], reached, frame, "depthwise.padded", scratch)
                _sum_lines(turned, dpadded, dx[b, part], scratch)
                padded = padded_lines(x[b], reached, frame, "depthwise.padded", scratch)
                dy_part = dy[b, part]
                product = scratch("depthwise.product", *dy_part.shape, dtype=dy.dtype)
                for u, v in np.ndindex(k_h, k_w):
                    seen = padded[u : u + len(dy_part), v : v + W]
                    np.multiply(dy_part, seen, out=product)
                    sums.add(f"weight {u} {v}", column_sums(product.reshape(-1, C)))
                if p.bias is not None:
                    sums.add("bias", column_sums(dy_part.reshape(-1, C)))
        return sums

    pieces = tiling.run(work, B * H, _lines(tiling, W, C), tokens=W)
    dweight = np.empty(p.weight.shape, dy.dtype)
    for u, v in np.ndindex(k_h, k_w):
        dweight[:, 0, u, v] = add_up(pieces, f"weight {u} {v}", dy.dtype)
    dbias = None if p.bias is None else add_up(pieces, "bias", dy.dtype)
    return dx, ConvParams(dweight, dbias)


def _lines(tiling: Tiling, W: int, C: int) -> int:
    """How many lines of (W, C) a tile has."""
    return max(1, min(tiling.elements, _AT_ONCE) // (W * C))


depthwise_conv_kernel = Kernel(
    depthwise_conv, depthwise_conv_forward, depthwise_conv_backward, (sum_rows,)
)
