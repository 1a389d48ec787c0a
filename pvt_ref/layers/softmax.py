"""Softmax over the last axis: it turns scores into attention weights (paper eq. 4)."""

from pvt_ref.arrays import Array, array_module
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class SoftmaxCache:
    """What :func:`softmax_backward` needs: the forward's result y (..., m), not a copy."""

    y: Array


def softmax_forward(
    p: None, x: Array, ops: Ops = REFERENCE, keep: bool = True
) -> tuple[Array, SoftmaxCache | None]:
    """y_j = exp(x_j) / sum_k exp(x_k), over the last axis.

    The row's maximum is subtracted first: it cancels in the quotient, and exp cannot overflow.

    Args:
        p: None.
        x: (..., m), finite, float32 or float64.
        ops: not used.
        keep: whether to return a cache for the backward.

    Returns:
        y (..., m) of x's dtype, rows of non-negative numbers that sum to 1, and the cache.
    """
    xp = array_module(x)
    y = x - xp.max(x, axis=-1, keepdims=True)  # (..., m)
    y = xp.exp(y)
    y /= xp.sum(y, axis=-1, keepdims=True)
    return y, SoftmaxCache(y) if keep else None


def softmax_backward(
    p: None, cache: SoftmaxCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, None]:
    """Gradient of :func:`softmax_forward`.

    Each y_j depends on every x_k of its row, by the quotient rule::

        J_jk    = d y_j / d x_k = y_j (1[j = k] - y_k)
        dL/dx_k = sum_j dy_j J_jk = dy_k y_k - y_k sum_j dy_j y_j
        dL/dx   = y * (dy - <dy, y>)

    A row of dx sums to 0, because a shift of x changes nothing.

    Args:
        p: None.
        cache: from the forward.
        dy: dL/dy (..., m).
        ops: not used.

    Returns:
        dx (..., m) of dy's dtype, and None.
    """
    xp = array_module(dy)
    y = cache.y
    dx = dy * y  # (..., m)
    # y * (dy - <dy, y>), with y * dy at hand
    dx -= y * xp.sum(dx, axis=-1, keepdims=True)
    return dx, None


softmax = Operation(softmax_forward, softmax_backward)
