"""GELU in place, on tiles that stay in cache, and for float32 without the slow erf."""

import math

import numpy as np

from pvt_ref.kernels.cpu.threads import Scratch
from pvt_ref.kernels.cpu.tiling import Kernel, Tiling
from pvt_ref.layers.gelu import gelu
from pvt_ref.ops import Ops
from pvt_ref.tree import record

#: erf(x / sqrt(2)) ~ tanh(x Q(x^2)), with Q of degree 6, lowest power first. It was fitted
#: (tests/fit_gelu.py) so that the error of x Phi(x) is less than 7e-8. Rounding in float32 adds
#: five times that; the error of PyTorch's GELU is twice as large. NumPy computes tanh of many
#: numbers at a time, SciPy computes erf one by one.
TANH_FIT = (
    0.797884216,
    0.0363342841,
    -3.31304164e-05,
    -5.52400197e-05,
    3.96908944e-06,
    -1.33445104e-07,
    1.80558411e-09,
)


def _constants(dtype: type, *values: float) -> list[np.ndarray]:
    """Numbers as arrays: NumPy would convert floats at every call, holding the interpreter lock."""
    return [np.array(value, dtype) for value in values]


_FIT = _constants(np.float32, *TANH_FIT)
_COMMON = {
    np.dtype(dtype): _constants(dtype, 1.0, 0.5, -0.5, 1 / math.sqrt(2 * math.pi), math.sqrt(0.5))
    for dtype in (np.float32, np.float64)
}


def gelu_rows(
    x: np.ndarray, scratch: Scratch, slope: np.ndarray | None = None, bias: np.ndarray | None = None
) -> None:
    """Adds bias (width,) to x (rows, width), then replaces x by x Phi(x).

    If slope is given, it gets Phi(x) + x phi(x). A whole tile is computed at once, because threads
    wait for the interpreter lock between calls of NumPy.
    """
    if bias is not None:
        x += bias
    square = scratch("gelu.square", *x.shape, dtype=x.dtype)
    cdf = scratch("gelu.cdf", *x.shape, dtype=x.dtype)
    one, half, minus_half, peak, root_half = _COMMON[x.dtype]
    with np.errstate(over="ignore"):  # the square of 1e20 overflows, but its GELU is still right
        np.square(x, square)
        # erf(x / sqrt(2))
        if x.dtype == np.float32:
            np.multiply(square, _FIT[-1], cdf)
            for coefficient in _FIT[-2:0:-1]:
                np.add(cdf, coefficient, cdf)
                np.multiply(cdf, square, cdf)
            np.add(cdf, _FIT[0], cdf)
            np.multiply(cdf, x, cdf)
            np.tanh(cdf, cdf)
        else:
            import scipy.special  # slow to import, and not needed for float32

            np.multiply(x, root_half, cdf)
            scipy.special.erf(cdf, cdf)
        # Phi(x)
        np.add(cdf, one, cdf)
        np.multiply(cdf, half, cdf)
        if slope is not None:
            np.multiply(square, minus_half, square)
            np.exp(square, slope)
            np.multiply(slope, peak, slope)  # phi(x)
            np.multiply(slope, x, slope)
            np.add(slope, cdf, slope)
        np.multiply(x, cdf, x)


@record
class GeluCache:
    """What :func:`gelu_backward` needs: slope (...), the derivative of GELU at x."""

    slope: np.ndarray


def gelu_forward(
    p: None, x: np.ndarray, ops: Ops, keep: bool = True, *, tiling: Tiling
) -> tuple[np.ndarray, GeluCache | None]:
    """As :func:`pvt_ref.layers.gelu.gelu_forward`; in float32 with the fit ``TANH_FIT``."""
    y = np.empty(x.shape, x.dtype)
    slope = np.empty_like(y) if keep else None

    def work(x: np.ndarray, y: np.ndarray, slope: np.ndarray | None, scratch: Scratch) -> None:
        y[...] = x
        gelu_rows(y, scratch, slope)

    tiling.by_rows(work, x, y, slope)
    return y, None if slope is None else GeluCache(slope)


def gelu_backward(
    p: None, cache: GeluCache, dy: np.ndarray, ops: Ops, *, tiling: Tiling
) -> tuple[np.ndarray, None]:
    """As :func:`pvt_ref.layers.gelu.gelu_backward`."""
    dx = np.empty(dy.shape, dy.dtype)

    def work(dy: np.ndarray, slope: np.ndarray, dx: np.ndarray, scratch: Scratch) -> None:
        np.multiply(dy, slope, out=dx)

    tiling.by_rows(work, dy, cache.slope, dx)
    return dx, None


gelu_kernel = Kernel(gelu, gelu_forward, gelu_backward)
