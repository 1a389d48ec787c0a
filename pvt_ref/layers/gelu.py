"""GELU, exact: x times the normal distribution function.

Hendrycks and Gimpel 2016, arXiv 1606.08415.

The popular tanh form is off by up to 5e-4, and PVT was trained with the exact one.
"""

import math
from dataclasses import dataclass

from pvt_ref.arrays import Array, array_module, erf, short_repr


@dataclass(frozen=True, slots=True, eq=False)
class GeluCache:
    """What :func:`gelu_backward` needs.

    Attributes:
        x: (...), the forward's input, not a copy.
        cdf: (...), Phi(x).
    """

    x: Array  # (...), its density is made from it
    cdf: Array  # (...), Phi(x): not worth a second error function

    __repr__ = short_repr


def gelu_forward(x: Array, keep: bool = True) -> tuple[Array, GeluCache | None]:
    """y = x Phi(x) with Phi(x) = (1 + erf(x / sqrt(2))) / 2.

    Args:
        x: (...), float32 or float64.
        keep: whether a cache for the backward is returned; without it, it is None.

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


def gelu_backward(cache: GeluCache, dy: Array) -> Array:
    """Gradient of :func:`gelu_forward`: dL/dx = dL/dy * (Phi(x) + x phi(x)).

    phi(x) = exp(-x^2 / 2) / sqrt(2 pi) is Phi's derivative, the normal density.

    Args:
        cache: from the forward.
        dy: dL/dy (...).

    Returns:
        dx (...) of dy's dtype.
    """
    xp = array_module(dy)
    x = cache.x
    density = xp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))  # phi(x)
    # y = x * cdf: the product rule, cdf' = density
    return dy * (cache.cdf + x * density)
