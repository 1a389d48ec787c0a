"""PVT v2's MLP by tiles of lines: expanded, convolved, activated and projected back in cache.

The convolution of a line also reads its neighbours, so every tile expands those again. Therefore
inference never stores the whole hidden layer.
"""

from functools import partial
from typing import Any

import numpy as np

from pvt_ref.arrays import Grid
from pvt_ref.blocks.conv_mlp import ConvMLPParams, DWConvParams, conv_mlp
from pvt_ref.draws import Rng
from pvt_ref.kernels.cpu.depthwise_conv import (
    after,
    by_image,
    kernel_gradient,
    kernel_of_lines,
    shifted_lines,
    sum_lines,
    to_weight,
)
from pvt_ref.kernels.cpu.gelu import gelu_rows
from pvt_ref.kernels.cpu.linear import (
    Sums,
    add_up,
    column_sums,
    for_many_rows,
    linear_rows,
    times_weight_rows,
    weight_gradients,
)
from pvt_ref.kernels.cpu.mlp import HiddenCache, hidden_backward_rows
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, share_columns, times
from pvt_ref.layers.conv import ConvParams
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.relu import relu
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class ConvMLPCache:
    """What :func:`conv_mlp_backward` needs: the input x (B*n, C), not a copy, and more arrays."""

    x: np.ndarray
    expanded: np.ndarray  # (B*n, E*C), the input of the convolution
    hidden: HiddenCache  # (B*n, E*C)
    grid: Grid  # (H_i, W_i)
    has_relu: bool


def conv_mlp_forward(
    p: ConvMLPParams,
    x: np.ndarray,
    ops: Ops,
    grid: Grid,
    has_relu: bool = False,
    drop_rate: float = 0.0,
    rng: Rng = None,
    keep: bool = True,
    *,
    tiling: Tiling,
) -> tuple[np.ndarray, Any]:
    """As :func:`pvt_ref.blocks.conv_mlp.conv_mlp_forward`, which is used if there is dropout."""
    if rng is not None and drop_rate > 0.0:
        return conv_mlp.forward(p, x, ops, grid, has_relu, drop_rate, rng, keep)
    (B, n, C), (H, W), wide, conv = x.shape, grid, len(p.fc1.weight), p.dwconv.dwconv
    kernel, k = kernel_of_lines(conv.weight, W), conv.weight.shape[2:]
    fc1, fc2 = (for_many_rows(each, B * n) for each in (p.fc1, p.fc2))
    tokens = np.ascontiguousarray(x).reshape(B * n, C)
    y = np.empty_like(tokens)
    cache = None
    if keep:
        expanded, activated, slope = (np.empty((B * n, wide), x.dtype) for _ in range(3))
        cache = ConvMLPCache(tokens, expanded, HiddenCache(activated, slope), grid, has_relu)

    def project(tile: slice, scratch: Scratch) -> None:
        """Computes the lines of a tile of y."""
        parts = by_image(tile, k[0], H)
        seen = slice(parts[0].seen.start, parts[-1].seen.stop)  # all that the tile needs
        rows, seen_rows = times(tile, W), times(seen, W)
        lend, slope = partial(scratch, dtype=x.dtype), None
        expanded = lend("conv_mlp.expanded", seen_rows.stop - seen_rows.start, wide)
        linear_rows(fc1, tokens[seen_rows], expanded, scratch)
        if has_relu:
            np.maximum(expanded, 0, out=expanded)
        if cache is None:
            hidden = lend("conv_mlp.hidden", rows.stop - rows.start, wide)
        else:
            cache.expanded[rows] = expanded[after(seen_rows.start, rows)]
            hidden, slope = cache.hidden.y[rows], cache.hidden.slope[rows]
        maps, hidden_maps = (each.reshape(-1, W, wide) for each in (expanded, hidden))

        def convolve(columns: slice, scratch: Scratch) -> None:
            bias = None if conv.bias is None else conv.bias[columns]
            for lines, sees, above in parts:
                part = maps[after(seen.start, sees), :, columns]
                target = hidden_maps[after(tile.start, lines), :, columns]
                shifted = shifted_lines(part, above, len(target), k, "shifted.x", scratch)
                sum_lines(kernel[..., columns], bias, shifted, target, scratch)
            gelu_rows(hidden[:, columns], scratch, None if slope is None else slope[:, columns])

        share_columns(convolve, wide, scratch)
        linear_rows(fc2, hidden, y[rows], scratch)

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for tile in tiles:
            project(tile, scratch)

    tiling.run_lines(work, B * H, W, wide)
    return y.reshape(x.shape), cache


def conv_mlp_backward(
    p: ConvMLPParams, cache: Any, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, ConvMLPParams]:
    """As :func:`pvt_ref.blocks.conv_mlp.conv_mlp_backward`."""
    if not isinstance(cache, ConvMLPCache):
        return conv_mlp.backward(p, cache, dy, ops)
    (B, _, C), (H, W), conv = dy.shape, cache.grid, p.dwconv.dwconv
    k, wide = conv.weight.shape[2:], len(conv.weight)
    turned = kernel_of_lines(conv.weight[:, :, ::-1, ::-1], W)
    dy_rows = np.ascontiguousarray(dy).reshape(-1, C)
    dconvolved, dexpanded = (np.empty_like(cache.expanded) for _ in range(2))
    dx = np.empty_like(dy_rows)
    maps, dmaps, dtargets = (
        each.reshape(-1, W, wide) for each in (cache.expanded, dconvolved, dexpanded)
    )

    def back_to_convolution(tiles: list[slice], scratch: Scratch) -> Sums:
        sums = Sums()
        for rows in tiles:
            slope, dy, dhidden = cache.hidden.slope[rows], dy_rows[rows], dconvolved[rows]
            sums.add("fc2", column_sums(dy))
            sums.add("conv", hidden_backward_rows(p.fc2, slope, dy, dhidden, scratch))
        return sums

    def back_through_tile(tile: slice, sums: Sums, scratch: Scratch) -> None:
        parts, rows = by_image(tile, k[0], H), times(tile, W)

        def convolve(columns: slice, scratch: Scratch) -> tuple[np.ndarray, np.ndarray]:
            dkernel = np.zeros((*k, columns.stop - columns.start))
            for lines, seen, above in parts:
                target = dtargets[lines, :, columns]
                shifted, dshifted = (
                    shifted_lines(each[seen, :, columns], above, len(target), k, name, scratch)
                    for each, name in ((maps, "shifted.x"), (dmaps, "shifted.dy"))
                )
                sum_lines(turned[..., columns], None, dshifted, target, scratch)
                dkernel += kernel_gradient(shifted, dshifted, target.shape[2])
            dpart = dexpanded[rows, columns]
            if cache.has_relu:
                dpart *= cache.expanded[rows, columns] > 0
            return dkernel, column_sums(dpart)

        dkernels, dbiases = zip(*share_columns(convolve, wide, scratch), strict=True)
        sums.add("kernel", np.concatenate(dkernels, axis=-1))
        sums.add("fc1", np.concatenate(dbiases))
        times_weight_rows(p.fc1, dexpanded[rows], dx[rows], scratch)

    def back_through_convolution(tiles: list[slice], scratch: Scratch) -> Sums:
        sums = Sums()
        for tile in tiles:
            back_through_tile(tile, sums, scratch)
        return sums

    row_sums = tiling.run(back_to_convolution, len(dy_rows), tiling.rows(wide))
    line_sums = tiling.run_lines(back_through_convolution, B * H, W, wide)
    layers = [(dexpanded, cache.x, None), (dy_rows, cache.hidden.y, None)]
    dweights = weight_gradients(layers, tiling)

    def gradients(of: Any, weight: np.ndarray, pieces: list[Sums], name: str) -> tuple[Any, Any]:
        return weight, None if of.bias is None else add_up(pieces, name, dy.dtype)

    dkernel = to_weight(add_up(line_sums, "kernel", dy.dtype))
    return dx.reshape(dy.shape), ConvMLPParams(
        LinearParams(*gradients(p.fc1, dweights[0], line_sums, "fc1")),
        DWConvParams(ConvParams(*gradients(conv, dkernel, row_sums, "conv"))),
        LinearParams(*gradients(p.fc2, dweights[1], row_sums, "fc2")),
    )


conv_mlp_kernel = Kernel(
    conv_mlp,
    conv_mlp_forward,
    conv_mlp_backward,
    (linear, relu, depthwise_conv, gelu, dropout, sum_rows),
)
