"""The sum over the rows of a matrix: the last step of the gradients of biases and norms."""

from pvt_ref.arrays import Array, array_module, sum_in_float64
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class SumRowsCache:
    """The number of rows."""

    rows: int


def sum_rows_forward(
    p: None, x: Array, ops: Ops = REFERENCE, keep: bool = True
) -> tuple[Array, SumRowsCache | None]:
    """y_j = sum_r x_rj, accumulated in float64.

    Args:
        p: None.
        x: (rows, C), float32 or float64.
        ops: not used.
        keep: whether to return a cache for the backward.

    Returns:
        y (C,) of x's dtype, and the cache.
    """
    y = sum_in_float64(x, axis=0)  # (C,)
    return y, SumRowsCache(x.shape[0]) if keep else None


def sum_rows_backward(
    p: None, cache: SumRowsCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, None]:
    """Gradient of :func:`sum_rows_forward`: every row gets dL/dy.

    Args:
        p: None.
        cache: from the forward.
        dy: dL/dy (C,).
        ops: not used.

    Returns:
        dx (rows, C) of dy's dtype, read-only, and None.
    """
    return array_module(dy).broadcast_to(dy, (cache.rows, *dy.shape)), None


sum_rows = Operation(sum_rows_forward, sum_rows_backward)
