"""Linear by tiles of rows; gradients of weights by rows of the weight; sums over rows."""

import functools
from collections.abc import Sequence
from functools import partial

import numpy as np

from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling, cut, share_columns
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearCache, LinearParams, linear
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops


def linear_rows(p: LinearParams, x: np.ndarray, y: np.ndarray, scratch: Scratch) -> None:
    """Writes x W^T + b to y (rows, C_out)."""

    def work(columns: slice, scratch: Scratch) -> None:
        part = y[:, columns]
        np.matmul(x, p.weight[columns].T, out=part)
        if p.bias is not None:
            part += p.bias[columns]

    share_columns(work, y.shape[1], scratch)


def times_weight_rows(p: LinearParams, dy: np.ndarray, dx: np.ndarray, scratch: Scratch) -> None:
    """Back through a linear layer: writes dy W to dx (rows, C_in)."""

    def work(columns: slice, scratch: Scratch) -> None:
        np.matmul(dy, p.weight[:, columns], out=dx[:, columns])

    share_columns(work, dx.shape[1], scratch)


#: From this many rows on, a copy of the weight pays off: the product is a tenth faster with it.
_MANY_ROWS = 1024


def for_many_rows(p: LinearParams, rows: int) -> LinearParams:
    """The same weight; for many rows, a copy with W^T contiguous, which OpenBLAS reads faster."""
    if rows < _MANY_ROWS:
        return p
    weight = np.empty(p.weight.shape, p.weight.dtype, order="F")
    for part in cut(slice(0, len(weight)), 32):  # so that both arrays stay in cache
        weight[part] = p.weight[part]
    return LinearParams(weight, p.bias)


@functools.lru_cache(maxsize=64)
def ones(n: int, dtype: np.dtype) -> np.ndarray:
    """(n,) ones, for sums by a matrix product; read-only, since calls share them."""
    result = np.ones(n, dtype)
    result.flags.writeable = False
    return result


def column_sums(x: np.ndarray) -> np.ndarray:
    """Sums over the rows, (C,) float64: by products over few rows each, since float32 rounds."""
    sums = np.zeros(x.shape[1])
    for rows in cut(slice(0, len(x)), 256):
        sums += ones(rows.stop - rows.start, x.dtype) @ x[rows]
    return sums


class Sums(dict[str, np.ndarray]):
    """What the rows of a piece add to the gradients of biases and norms, by name, in float64."""

    def add(self, name: str, amount: np.ndarray) -> None:
        """Adds to the sum of this name."""
        self[name] = self.get(name, 0.0) + amount


def add_up(pieces: Sequence[Sums], name: str, dtype: np.dtype) -> np.ndarray:
    """The sum of this name over all pieces."""
    return np.sum([sums[name] for sums in pieces], axis=0).astype(dtype)


def weight_gradients(
    layers: Sequence[tuple[np.ndarray, np.ndarray, tuple[LayerNormParams, np.ndarray] | None]],
    tiling: Tiling,
) -> list[np.ndarray]:
    """dW = dy^T x (C_out, C_in) of several linear layers: dy (rows, C_out) and x (rows, C_in).

    Every thread computes some rows of a dW, over all tokens: there is nothing to add up afterwards,
    and the sums do not depend on the number of threads. The third element of a layer is None, or
    the norm before it and the gradient of the layer's bias. Then x is the normalised x_hat, and the
    input was x_hat * weight + bias. So dW is (dy^T x_hat) * weight + (dy^T 1) bias^T, where dy^T 1
    is the gradient of the layer's bias.
    """
    results = [np.empty((dy.shape[1], x.shape[1]), dy.dtype) for dy, x, _ in layers]
    # the threads share all rows of all dW, one below the other
    starts = np.cumsum([0] + [len(dW) for dW in results]).tolist()

    def work(tiles: list[slice], scratch: Scratch) -> None:
        for tile in tiles:
            for (dy, x, normed), dW, start in zip(layers, results, starts, strict=False):
                rows = slice(max(tile.start - start, 0), min(tile.stop - start, len(dW)))
                if rows.start >= rows.stop:
                    continue
                part = dW[rows]
                np.matmul(dy[:, rows].T, x, out=part)
                if normed is not None:
                    norm, dbias = normed
                    part *= norm.weight
                    part += np.multiply(dbias[rows, None], norm.bias)

    total, tokens = starts[-1], max(len(x) for _, x, _ in layers)
    tiling.run(work, total, total, tokens=max(1, tokens // 16))
    return results


def bias_gradient(p: LinearParams, dy: np.ndarray, ops: Ops) -> np.ndarray | None:
    """The sum of dy (rows, C_out) over the rows, from the table; None if there is no bias."""
    if p.bias is None:
        return None
    return ops[sum_rows].forward(None, dy, ops, keep=False)[0]


def linear_forward(
    p: LinearParams, x: np.ndarray, ops: Ops, keep: bool = True, *, tiling: Tiling
) -> tuple[np.ndarray, LinearCache | None]:
    """As :func:`pvt_ref.layers.linear.linear_forward`."""
    y = np.empty((*x.shape[:-1], p.weight.shape[0]), x.dtype)
    tiling.by_rows(partial(linear_rows, p), x, y, width=sum(p.weight.shape))
    return y, LinearCache(x) if keep else None


def linear_backward(
    p: LinearParams, cache: LinearCache, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, LinearParams]:
    """As :func:`pvt_ref.layers.linear.linear_backward`."""
    C_out, C_in = p.weight.shape
    dx = np.empty(cache.x.shape, dy.dtype)
    tiling.by_rows(partial(times_weight_rows, p), dy, dx, width=C_in + C_out)
    dy_rows = dy.reshape(-1, C_out)
    dbias = bias_gradient(p, dy_rows, ops)
    (dweight,) = weight_gradients([(dy_rows, cache.x.reshape(-1, C_in), None)], tiling)
    return dx, LinearParams(dweight, dbias)


linear_kernel = Kernel(linear, linear_forward, linear_backward)
