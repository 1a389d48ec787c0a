"""Dropout (Srivastava et al. 2014, Journal of Machine Learning Research 15, 1929-1958), dropout of
whole channels, and drop path (stochastic depth, Huang et al. 2016, arXiv 1603.09382).

All multiply by a random mask of 0 and 1/(1 - rate), so that the expectation is the input. Masks
are drawn on the host: one seed gives the same masks on every device and for every dtype. Without a
generator nothing is dropped: there is no other switch between training and inference.
"""

import numpy as np

from pvt_ref.arrays import Array, array_module, from_host
from pvt_ref.draws import Rng
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class DropCache:
    """The mask, True where x was kept, with axes of 1 to broadcast; gain is 1 / (1 - rate)."""

    mask: Array
    gain: float


def dropout_forward(
    p: None, x: Array, ops: Ops, rate: float, rng: Rng, keep: bool = True
) -> tuple[Array, DropCache | None]:
    """Each element is zero with probability rate, else divided by 1 - rate.

    Args:
        p: None.
        x: (...), float32 or float64.
        ops: not used.
        rate: in [0, 1).
        rng: source of the mask. None (inference) leaves x as it is, and so does rate 0.
        keep: whether to return a cache for the backward.

    Returns:
        y (...) of x's dtype, and the cache. If nothing was dropped, x itself and None.
    """
    return _drop(x, x.shape, rate, rng, keep)


def drop_path_forward(
    p: None, x: Array, ops: Ops, rate: float, rng: Rng, keep: bool = True
) -> tuple[Array, DropCache | None]:
    """Each sample is zero as a whole with probability rate, else divided by 1 - rate.

    Args:
        p: None.
        x: (B, ...), the output of a residual branch.
        ops: not used.
        rate: in [0, 1).
        rng: source of the mask, one draw per sample; None as for :func:`dropout_forward`.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, ...) and the cache, as :func:`dropout_forward`.
    """
    return _drop(x, (x.shape[0],) + (1,) * (x.ndim - 1), rate, rng, keep)


def dropout_channels_forward(
    p: None, x: Array, ops: Ops, rate: float, rng: Rng, keep: bool = True
) -> tuple[Array, DropCache | None]:
    """Each channel of a sample is zero as a whole with probability rate, else divided by 1 - rate.

    Neighbours in a map are similar, so dropping single elements removes little information
    (Tompson et al. 2015, arXiv 1411.4280; PyTorch: ``Dropout2d``).

    Args:
        p: None.
        x: (B, ..., C), a map.
        ops: not used.
        rate: in [0, 1).
        rng: source of the mask, one draw for each sample and channel; None as for
            :func:`dropout_forward`.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, ..., C) and the cache, as :func:`dropout_forward`.
    """
    return _drop(x, (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1]), rate, rng, keep)


def _drop(
    x: Array, mask_shape: tuple[int, ...], rate: float, rng: Rng, keep: bool
) -> tuple[Array, DropCache | None]:
    if rng is None or rate == 0.0:
        return x, None
    # float32 draws for any x, so that float32 and float64 runs share their masks
    kept = rng.random(mask_shape, dtype=np.float32) >= rate
    cache = DropCache(from_host(kept, like=x), 1.0 / (1.0 - rate))
    return _apply(cache, x), cache if keep else None


def _apply(cache: DropCache, x: Array) -> Array:
    y = x * cache.gain
    y *= array_module(x).astype(cache.mask, x.dtype)
    return y


def dropout_backward(
    p: None, cache: DropCache | None, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, None]:
    """Gradient of :func:`dropout_forward`: the same mask again.

    Args:
        p: None.
        cache: from the forward; None if nothing was dropped.
        dy: dL/dy, y's shape.
        ops: not used.

    Returns:
        dx, dy's shape and dtype, dy itself if nothing was dropped; and None.
    """
    return (dy if cache is None else _apply(cache, dy)), None


def drop_path_backward(
    p: None, cache: DropCache | None, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, None]:
    """Gradient of :func:`drop_path_forward`: the same mask again.

    Args:
        p: None.
        cache: from the forward; None if nothing was dropped.
        dy: dL/dy (B, ...).
        ops: not used.

    Returns:
        dx (B, ...), as :func:`dropout_backward`; and None.
    """
    return (dy if cache is None else _apply(cache, dy)), None


def dropout_channels_backward(
    p: None, cache: DropCache | None, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, None]:
    """Gradient of :func:`dropout_channels_forward`: the same mask again.

    Args:
        p: None.
        cache: from the forward; None if nothing was dropped.
        dy: dL/dy (B, ..., C).
        ops: not used.

    Returns:
        dx (B, ..., C), as :func:`dropout_backward`; and None.
    """
    return (dy if cache is None else _apply(cache, dy)), None


dropout = Operation(dropout_forward, dropout_backward)
drop_path = Operation(drop_path_forward, drop_path_backward)
dropout_channels = Operation(dropout_channels_forward, dropout_channels_backward)
