"""GELU, exact: x times the normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415).

The popular tanh form is off by up to 5e-4, and PVT was trained with the exact one.
"""

import math

from pvt_ref.arrays import Array, array_module, erf
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class GeluCache:
    """What :func:`gelu_backward` needs: the forward's x (...), not a copy, and cdf, Phi(x)."""

    x: Array
    cdf: Array


def gelu_forward(
    p: None, x: Array, ops: Ops = REFERENCE, keep: bool = True
) -> tuple[Array, GeluCache | None]:
    """y = x Phi(x) with Phi(x) = (1 + erf(x / sqrt(2))) / 2.

    Args:
        p: None.
        x: (...), float32 or float64.
        ops: not used.
        keep: whether to return a cache for the backward.

    Returns:
        y (...) of x's dtype, and the cache.
    """
    cdf = erf(x * math.sqrt(0.5))  # (...), not yet shifted and halved
    cdf += 1.0
    cdf *= 0.5
    if not keep:
        cdf *= x
        return cdf, None
    return x * cdf, GeluCache(x, cdf)


def gelu_backward(p: None, cache: GeluCache, dy: Array, ops: Ops = REFERENCE) -> tuple[Array, None]:
    """Gradient of :func:`gelu_forward`: dL/dx = dL/dy * (Phi(x) + x phi(x)).

    phi(x) = exp(-x^2 / 2) / sqrt(2 pi) is Phi's derivative, the normal density.

    Args:
        p: None.
        cache: from the forward.
        dy: dL/dy (...).
        ops: not used.

    Returns:
        dx (...) of dy's dtype, and None.
    """
    xp = array_module(dy)
    x = cache.x
    density = xp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))  # phi(x)
    # y = x * cdf: the product rule, cdf' = density
    return dy * (cache.cdf + x * density), None


gelu = Operation(gelu_forward, gelu_backward)
