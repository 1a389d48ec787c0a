"""Linear: y = x W^T + b for every token. W is (out, in), as PyTorch stores it."""

from pvt_ref.arrays import Array, array_module
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class LinearParams:
    """weight (C_out, C_in) and bias (C_out,) or None, or their gradients.

    The patch and spatial-reduction projections use it too, with a weight of (C_out, C_in, P, P).
    """

    weight: Array
    bias: Array | None


@record
class LinearCache:
    """What :func:`linear_backward` needs: the forward's input x (..., C_in), not a copy, for dW."""

    x: Array


def linear_forward(
    p: LinearParams, x: Array, ops: Ops = REFERENCE, keep: bool = True
) -> tuple[Array, LinearCache | None]:
    """y = x W^T + b over the last axis.

    Args:
        p: weight (C_out, C_in) and bias (C_out,) or None.
        x: (..., C_in), of the weights' dtype: float32 or float64.
        ops: not used.
        keep: whether to return a cache for the backward.

    Returns:
        y (..., C_out) of x's dtype, and the cache.
    """
    xp = array_module(x)
    C_out, C_in = p.weight.shape
    rows = xp.reshape(x, (-1, C_in))  # (rows, C_in): one 2-D product is what GPUs do best
    y = rows @ xp.matrix_transpose(p.weight)  # (rows, C_out)
    if p.bias is not None:
        y += p.bias
    y = xp.reshape(y, (*x.shape[:-1], C_out))  # (..., C_out)
    return y, LinearCache(x) if keep else None


def linear_backward(
    p: LinearParams, cache: LinearCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, LinearParams]:
    """Gradients of :func:`linear_forward`.

    With y_r = W x_r + b for every row r, the chain rule gives::

        dL/dW = sum_r dy_r x_r^T      dL/db = sum_r dy_r      dL/dx_r = W^T dy_r

    Args:
        p: the forward's weight (C_out, C_in) and bias (C_out,) or None.
        cache: from the forward.
        dy: dL/dy (..., C_out).
        ops: the table of operations; sums over rows come from it.

    Returns:
        dx (..., C_in) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    xp = array_module(dy)
    C_out, C_in = p.weight.shape
    dy_rows = xp.reshape(dy, (-1, C_out))  # (rows, C_out)
    x_rows = xp.reshape(cache.x, (-1, C_in))  # (rows, C_in)
    # y += p.bias
    dbias = None
    if p.bias is not None:
        dbias, _ = ops[sum_rows].forward(None, dy_rows, ops, keep=False)  # (C_out,)
    # y = rows @ W^T
    dweight = xp.matrix_transpose(dy_rows) @ x_rows  # (C_out, C_in)
    dx = xp.reshape(dy_rows @ p.weight, cache.x.shape)  # (..., C_in)
    return dx, LinearParams(dweight, dbias)


linear = Operation(linear_forward, linear_backward)
