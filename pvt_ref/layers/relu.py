"""ReLU: max(x, 0)."""

from pvt_ref.arrays import Array, array_module
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class ReluCache:
    """What :func:`relu_backward` needs: the forward's x (...), not a copy, for its sign."""

    x: Array


def relu_forward(
    p: None, x: Array, ops: Ops = REFERENCE, keep: bool = True
) -> tuple[Array, ReluCache | None]:
    """y = max(x, 0).

    Args:
        p: None.
        x: (...), float32 or float64.
        ops: not used.
        keep: whether to return a cache for the backward.

    Returns:
        y (...) of x's dtype, and the cache.
    """
    xp = array_module(x)
    return xp.maximum(x, xp.zeros_like(x)), ReluCache(x) if keep else None


def relu_backward(p: None, cache: ReluCache, dy: Array, ops: Ops = REFERENCE) -> tuple[Array, None]:
    """Gradient of :func:`relu_forward`: dL/dx = dL/dy where x > 0, else 0.

    At 0, where max(x, 0) has no derivative, it is 0 by convention.

    Args:
        p: None.
        cache: from the forward.
        dy: dL/dy (...).
        ops: not used.

    Returns:
        dx (...) of dy's dtype, and None.
    """
    xp = array_module(dy)
    return xp.where(cache.x > 0, dy, xp.zeros_like(dy)), None


relu = Operation(relu_forward, relu_backward)
