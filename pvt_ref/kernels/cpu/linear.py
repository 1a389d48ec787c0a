"""Linear by blocks of rows; the gradients of weights by rows of the weight."""

import functools
from collections.abc import Sequence

import numpy as np

from pvt_ref.kernels.cpu.blocking import Blocking, cut, share_columns
from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.layers.linear import LinearParams
from pvt_ref.ops import Ops
from pvt_ref.tree import record


def linear_rows(p: LinearParams, x: np.ndarray, y: np.ndarray, scratch: Scratch) -> None:
    """y becomes x W^T + b, for a block of rows.

    Args:
        p: weight (C_out, C_in) and bias (C_out,) or None.
        x: (block, C_in).
        y: (block, C_out), written.
        scratch: what belongs to this thread.
    """

    def work(columns: slice, scratch: Scratch) -> None:
        del scratch
        linear_columns(p, x, y[:, columns], columns)

    share_columns(work, y.shape[1], scratch)


def linear_columns(p: LinearParams, x: np.ndarray, y: np.ndarray, columns: slice) -> None:
    """y becomes some columns of x W^T + b.

    Args:
        p: weight (C_out, C_in) and bias (C_out,) or None.
        x: (block, C_in).
        y: (block, columns), written.
        columns: which of the C_out.
    """
    np.matmul(x, p.weight[columns].T, out=y)
    if p.bias is not None:
        y += p.bias[columns]


def times_weight_rows(dy: np.ndarray, p: LinearParams, dx: np.ndarray, scratch: Scratch) -> None:
    """dx becomes dy W, for a block of rows: the way back through a linear layer.

    Args:
        dy: (block, C_out).
        p: weight (C_out, C_in); the bias is not looked at.
        dx: (block, C_in), written.
        scratch: what belongs to this thread.
    """

    def work(columns: slice, scratch: Scratch) -> None:
        del scratch
        np.matmul(dy, p.weight[:, columns], out=dx[:, columns])

    share_columns(work, dx.shape[1], scratch)


@functools.lru_cache(maxsize=64)
def ones(n: int, dtype: np.dtype) -> np.ndarray:
    """n ones, to add up by a matrix product; nobody may write into them.

    Args:
        n: how many.
        dtype: float32 or float64.

    Returns:
        (n,) of dtype, read-only: calls share it.
    """
    result = np.ones(n, dtype)
    result.flags.writeable = False
    return result


def column_sums(x: np.ndarray) -> np.ndarray:
    """Sums over the rows: by products of few rows each, since float32 rounds.

    Args:
        x: (rows, C).

    Returns:
        (C,) float64.
    """
    sums = np.zeros(x.shape[1])
    for rows in cut(slice(0, len(x)), 256):
        sums += ones(rows.stop - rows.start, x.dtype) @ x[rows]
    return sums


def add_up(parts: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The sum of what the pieces found, in dtype.

    Args:
        parts: arrays of one shape, float64.
        dtype: float32 or float64.

    Returns:
        An array of that shape and of dtype.
    """
    return np.sum(parts, axis=0).astype(dtype)


def weight_gradients(
    pairs: list[tuple[np.ndarray, np.ndarray]], blocking: Blocking
) -> list[np.ndarray]:
    """dW = dy^T x for several linear layers at once.

    Every thread makes some rows of a dW, over all tokens: there is nothing to add up afterwards,
    and the number of threads changes no sum.

    Args:
        pairs: dy (rows, C_out) and x (rows, C_in) of each layer.
        blocking: the settings.

    Returns:
        dW (C_out, C_in) of each layer, of its dy's dtype.
    """
    results = [np.empty((dy.shape[1], x.shape[1]), dy.dtype) for dy, x in pairs]
    # all rows of all dW, one below the other, are what the threads share
    starts = np.cumsum([0] + [len(dW) for dW in results])

    def work(blocks: list[slice], scratch: Scratch) -> None:
        del scratch
        for block in blocks:
            for (dy, x), dW, start in zip(pairs, results, starts, strict=False):
                rows = slice(max(block.start - start, 0), min(block.stop - start, len(dW)))
                if rows.start < rows.stop:
                    np.matmul(dy[:, rows].T, x, out=dW[rows])

    total = int(starts[-1])
    tokens = max(len(x) for _, x in pairs)
    blocking.run(work, total, total, tokens=max(1, tokens // 16))
    return results


@record
class LinearCache:
    """As the readable one.

    Attributes:
        x: (..., C_in).
    """

    x: np.ndarray  # (..., C_in)


def linear_forward(
    p: LinearParams, x: np.ndarray, ops: Ops, keep: bool = True, *, blocking: Blocking
) -> tuple[np.ndarray, LinearCache | None]:
    """As :func:`pvt_ref.layers.linear.linear_forward`.

    Args:
        p: weight (C_out, C_in) and bias (C_out,) or None.
        x: (..., C_in).
        keep: whether a cache for the backward is returned; without it, it is None.
        blocking: the settings.

    Returns:
        y (..., C_out) and the cache.
    """
    C_out, C_in = p.weight.shape
    y = np.empty((*x.shape[:-1], C_out), x.dtype)
    x_rows, y_rows = x.reshape(-1, C_in), y.reshape(-1, C_out)

    def work(blocks: list[slice], scratch: Scratch) -> None:
        for rows in blocks:
            linear_rows(p, x_rows[rows], y_rows[rows], scratch)

    blocking.run(work, len(y_rows), blocking.rows(C_in + C_out))
    return y, LinearCache(x) if keep else None


def linear_backward(
    p: LinearParams, cache: LinearCache, dy: np.ndarray, ops: Ops, *, blocking: Blocking
) -> tuple[np.ndarray, LinearParams]:
    """As :func:`pvt_ref.layers.linear.linear_backward`.

    Args:
        p: the forward's weight (C_out, C_in) and bias (C_out,) or None.
        cache: from the forward.
        dy: dL/dy (..., C_out).
        blocking: the settings.

    Returns:
        dx (..., C_in), and the gradients of weight (C_out, C_in) and bias (C_out,).
    """
    C_out, C_in = p.weight.shape
    dx = np.empty(cache.x.shape, dy.dtype)
    dx_rows, dy_rows = dx.reshape(-1, C_in), dy.reshape(-1, C_out)

    def work(blocks: list[slice], scratch: Scratch) -> np.ndarray:
        dbias = np.zeros(C_out)
        for rows in blocks:
            times_weight_rows(dy_rows[rows], p, dx_rows[rows], scratch)
            dbias += column_sums(dy_rows[rows])
        return dbias

    dbias = add_up(blocking.run(work, len(dy_rows), blocking.rows(C_in + C_out)), dy.dtype)
    (dweight,) = weight_gradients([(dy_rows, cache.x.reshape(-1, C_in))], blocking)
    return dx, LinearParams(dweight, None if p.bias is None else dbias)
