"""Dropout (Srivastava et al. 2014) and drop path (stochastic depth, Huang et al. 2016).

Dropout: Journal of Machine Learning Research 15, 1929-1958. Drop path: arXiv 1603.09382.

Both multiply by a random mask of 0 and 1/(1 - rate), so that the expectation is the input. Masks
are drawn on the host from a NumPy generator: one seed gives the same masks on every device and for
every dtype. Without a generator nothing is dropped, whatever the rate: there is no other switch
between training and inference.
"""

from dataclasses import dataclass

import numpy as np

from pvt_ref.arrays import Array, array_module, from_host, short_repr


@dataclass(frozen=True, slots=True, eq=False)
class DropCache:
    """What :func:`drop_backward` needs.

    Attributes:
        mask: bool, True where x was kept: x's shape (dropout), or (B, 1, ..., 1) (drop path).
        gain: 1 / (1 - rate), what the rest was multiplied by.
    """

    mask: Array  # bool, x's shape (dropout) or (B, 1, ..., 1) (drop path): dy goes where x went
    gain: float  # 1 / (1 - rate)

    __repr__ = short_repr


def dropout_forward(
    x: Array, rate: float, rng: np.random.Generator | None
) -> tuple[Array, DropCache | None]:
    """Each element is zero with probability rate, else divided by 1 - rate.

    Args:
        x: (...), float32 or float64.
        rate: in [0, 1).
        rng: source of the mask. None (inference) leaves x as it is, and so does rate 0.

    Returns:
        y (...) of x's dtype, and the cache. If nothing was dropped, x itself and None.
    """
    return _drop(x, x.shape, rate, rng)


def drop_path_forward(
    x: Array, rate: float, rng: np.random.Generator | None
) -> tuple[Array, DropCache | None]:
    """Each sample is zero as a whole with probability rate, else divided by 1 - rate.

    Args:
        x: (B, ...), the output of a residual branch, float32 or float64.
        rate: in [0, 1).
        rng: source of the mask, one draw a sample. None or rate 0 leaves x as it is.

    Returns:
        y (B, ...) of x's dtype, and the cache. If nothing was dropped, x itself and None.
    """
    return _drop(x, (x.shape[0],) + (1,) * (x.ndim - 1), rate, rng)


def _drop(
    x: Array, mask_shape: tuple[int, ...], rate: float, rng: np.random.Generator | None
) -> tuple[Array, DropCache | None]:
    if rng is None or rate == 0.0:
        return x, None
    # float32 draws whatever x is: float32 and float64 runs then share their masks
    kept = rng.random(mask_shape, dtype=np.float32) >= rate
    cache = DropCache(from_host(kept, like=x), 1.0 / (1.0 - rate))
    return _apply(cache, x), cache


def _apply(cache: DropCache, x: Array) -> Array:
    y = x * cache.gain
    y *= array_module(x).astype(cache.mask, x.dtype)
    return y


def drop_backward(cache: DropCache | None, dy: Array) -> Array:
    """Gradient of :func:`dropout_forward` and :func:`drop_path_forward`: the same mask again.

    Args:
        cache: from the forward; None if nothing was dropped.
        dy: dL/dy, y's shape.

    Returns:
        dx, dy's shape and dtype; dy itself if nothing was dropped.
    """
    return dy if cache is None else _apply(cache, dy)
