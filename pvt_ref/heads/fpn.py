"""Feature pyramid network (Lin et al. 2017, arXiv 1612.03144): coarse maps inform finer ones.

Fine maps show edges, coarse maps the objects they belong to. Every level is projected to one width,
the enlarged coarser levels are added, and the sum is smoothed. There is no norm or activation.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from pvt_ref.arrays import Array, Grid
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.resize import resize
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class FPNConvParams:
    """A kernel and its bias, one level down, as in MMSegmentation's keys."""

    conv: ConvParams


@record
class FPNParams:
    """Two convolutions for each level i, finest first, or their gradients.

    The kernels of lateral_convs are (C, C_i, 1, 1), those of fpn_convs (C, C, 3, 3).
    """

    lateral_convs: tuple[FPNConvParams, ...]
    fpn_convs: tuple[FPNConvParams, ...]


@record
class FPNCache:
    """The caches of all convolutions and enlargements, those of the finest level first."""

    lateral_convs: tuple[Any, ...]
    resizes: tuple[Any, ...]
    fpn_convs: tuple[Any, ...]


def fpn_forward(
    p: FPNParams, x: Sequence[Array], ops: Ops, keep: bool = True
) -> tuple[list[Array], FPNCache | None]:
    """Q_i = conv3x3(G_i), where the sum runs from the coarsest level to the finest::

        G_i     <- W_i F_i + b_i
        G_(i-1) <- G_(i-1) + nearest(G_i)        i = 4, 3, 2

    Args:
        p: the weights.
        x: maps F_i (B, H_i, W_i, C_i), finest first, of the weights' dtype.
        ops: the table of operations.
        keep: whether to return a cache for the backward.

    Returns:
        maps Q_i (B, H_i, W_i, C) of x's dtype, and the cache.
    """
    laterals, lateral_caches = _convolve(p.lateral_convs, x, ops, 0, keep)
    resize_caches = []
    for i in range(len(laterals) - 1, 0, -1):
        finer: Grid = laterals[i - 1].shape[1:3]
        told, cache = ops[resize].forward(None, laterals[i], ops, finer, "nearest", keep=keep)
        laterals[i - 1] += told  # its own array, and in no cache
        del told  # memory is fullest below
        resize_caches.insert(0, cache)
    one_by_one = (laterals.pop(0) for _ in p.fpn_convs)  # none outlives its convolution
    y, fpn_caches = _convolve(p.fpn_convs, one_by_one, ops, 1, keep)
    if not keep:
        return y, None
    return y, FPNCache(tuple(lateral_caches), tuple(resize_caches), tuple(fpn_caches))


def _convolve(
    p: Sequence[FPNConvParams], x: Iterable[Array], ops: Ops, padding: int, keep: bool
) -> tuple[list[Array], list[Any]]:
    """The convolution of each level, and their caches."""
    done = [
        ops[conv].forward(p_i.conv, x_i, ops, 1, padding, keep=keep)
        for p_i, x_i in zip(p, x, strict=True)
    ]
    return [y for y, _ in done], [cache for _, cache in done]


def fpn_backward(
    p: FPNParams, cache: FPNCache, dy: Sequence[Array], ops: Ops = REFERENCE
) -> tuple[list[Array], FPNParams]:
    """Gradients of :func:`fpn_forward`.

    The running sum is traversed in reverse, from the finest level to the coarsest: G_i was used by
    its own convolution and, enlarged, by G_(i-1), so dL/dG_i is the sum of both gradients.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dQ_i, maps (B, H_i, W_i, C).
        ops: the table that the forward was given.

    Returns:
        dL/dF_i, maps (B, H_i, W_i, C_i), and the gradients of the weights; all of dy's dtype.
    """
    # Q_i = conv3x3(G_i)
    dlaterals, dfpn = _convolve_backward(p.fpn_convs, cache.fpn_convs, dy, ops)
    # G_(i-1) = G_(i-1) + nearest(G_i)
    for i in range(1, len(dlaterals)):
        dtold, _ = ops[resize].backward(None, cache.resizes[i - 1], dlaterals[i - 1], ops)
        dlaterals[i] = dlaterals[i] + dtold
    # G_i = W_i F_i + b_i
    dx, dlateral = _convolve_backward(p.lateral_convs, cache.lateral_convs, dlaterals, ops)
    return dx, FPNParams(dlateral, dfpn)


def _convolve_backward(
    p: Sequence[FPNConvParams], caches: Sequence[Any], dy: Sequence[Array], ops: Ops
) -> tuple[list[Array], tuple[FPNConvParams, ...]]:
    """Gradients of :func:`_convolve` with respect to x and the weights."""
    done = [
        ops[conv].backward(p_i.conv, cache, dy_i, ops)
        for p_i, cache, dy_i in zip(p, caches, dy, strict=True)
    ]
    return [dx for dx, _ in done], tuple(FPNConvParams(dconv) for _, dconv in done)


fpn = Operation(fpn_forward, fpn_backward)
