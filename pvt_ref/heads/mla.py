"""SETR-MLA (Zheng et al. 2021, arXiv 2012.15840): maps of several blocks of a ViT, aggregated.

All maps have the same size. The neck sums them, from the deepest block to the first; the head
enlarges each sum, concatenates them and classifies. This is MMSegmentation's version: SETR's own
code enlarges with align_corners, and its classifier has kernel 3.
"""

from collections.abc import Sequence
from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.heads import conv_unit as conv_unit_file
from pvt_ref.heads import scale_head as scale_head_file
from pvt_ref.heads.conv_unit import ConvUnitBuffers, ConvUnitParams, conv_unit
from pvt_ref.heads.scale_head import ScaleHeadBuffers, ScaleHeadParams, scale_head
from pvt_ref.heads.setr import NORM_EPS
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record

#: How many times as high and wide the head makes the maps.
SCALE = 4


@record
class MLAUnitsParams:
    """Units of kernel 1, that of the first block first, and of kernel 3, the deepest sum first."""

    channel_proj: tuple[ConvUnitParams, ...]
    feat_extract: tuple[ConvUnitParams, ...]


@record
class MLAUnitsBuffers:
    """The running statistics of the units."""

    channel_proj: tuple[ConvUnitBuffers, ...]
    feat_extract: tuple[ConvUnitBuffers, ...]


@record
class MLANeckParams:
    """The norm of each block's map, that of the first block first; and the units."""

    norm: tuple[LayerNormParams, ...]
    mla: MLAUnitsParams


@record
class MLANeckBuffers:
    """The running statistics of the units, one level down, as in the keys."""

    mla: MLAUnitsBuffers


@record
class MLANeckCache:
    """The caches of the parts, in the order of the weights."""

    norm: tuple[Any, ...]
    channel_proj: tuple[Any, ...]
    feat_extract: tuple[Any, ...]


def mla_neck_forward(
    p: MLANeckParams,
    x: Sequence[Array],
    ops: Ops,
    buffers: MLANeckBuffers,
    batch_statistics: bool,
    keep: bool = True,
) -> tuple[list[Array], MLANeckCache | None]:
    """y_j = U3(U1(LN(x_L)) + ... + U1(LN(x_(L-j)))) of L maps, j = 0..L-1: the deepest first.

    Args:
        p: the weights.
        x: maps (B, H, W, C), that of the first block first, of the weights' dtype.
        ops: the table of operations.
        buffers: the running statistics.
        batch_statistics: whether the norms use those of the batch instead (training).
        keep: whether to return a cache for the backward.

    Returns:
        maps (B, H, W, D) of x's dtype, and the cache.
    """
    projected, norms, projections = [], [], []
    for p_j, unit, buffers_j, x_j in zip(
        p.norm, p.mla.channel_proj, buffers.mla.channel_proj, x, strict=True
    ):
        y, cache = ops[layer_norm].forward(p_j, x_j, ops, NORM_EPS, keep=keep)  # (B, H, W, C)
        norms.append(cache)
        y, cache = ops[conv_unit].forward(unit, y, ops, buffers_j, batch_statistics, keep=keep)
        projections.append(cache)
        projected.append(y)
    total, out, extractions = None, [], []
    for unit, buffers_j, y in zip(
        p.mla.feat_extract, buffers.mla.feat_extract, reversed(projected), strict=True
    ):
        total = y if total is None else total + y
        y, cache = ops[conv_unit].forward(unit, total, ops, buffers_j, batch_statistics, keep=keep)
        extractions.append(cache)
        out.append(y)
    if not keep:
        return out, None
    return out, MLANeckCache(tuple(norms), tuple(projections), tuple(extractions))


def mla_neck_backward(
    p: MLANeckParams, cache: MLANeckCache, dy: Sequence[Array], ops: Ops = REFERENCE
) -> tuple[list[Array], MLANeckParams]:
    """Gradients of :func:`mla_neck_forward`.

    The map of block j is in its own sum and in all later ones. So the gradients of the sums are
    accumulated in turn, from the first block's to the deepest.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dy_j, maps (B, H, W, D), the deepest first.
        ops: the table that the forward was given.

    Returns:
        dL/dx_j, maps (B, H, W, C), that of the first block first; and the gradients of the weights.
    """
    dtotal, dprojected, dextractions = None, [], []
    for unit, cache_j, dy_j in zip(
        reversed(p.mla.feat_extract), reversed(cache.feat_extract), reversed(dy), strict=True
    ):
        # y = unit(total)
        dhere, dunit = ops[conv_unit].backward(unit, cache_j, dy_j, ops)  # (B, H, W, D)
        dextractions.append(dunit)
        # total = total + projected
        dtotal = dhere if dtotal is None else dtotal + dhere  # (B, H, W, D)
        dprojected.append(dtotal)
    dx, dnorms, dprojections = [], [], []
    for p_j, unit, norm_j, projection_j, dy_j in zip(
        p.norm, p.mla.channel_proj, cache.norm, cache.channel_proj, dprojected, strict=True
    ):
        # projected = unit(norm(x))
        dy_j, dunit = ops[conv_unit].backward(unit, projection_j, dy_j, ops)
        dprojections.append(dunit)
        dx_j, dnorm = ops[layer_norm].backward(p_j, norm_j, dy_j, ops)
        dnorms.append(dnorm)
        dx.append(dx_j)
    units = MLAUnitsParams(tuple(dprojections), tuple(reversed(dextractions)))
    return dx, MLANeckParams(tuple(dnorms), units)


def neck_statistics(cache: MLANeckCache) -> MLANeckBuffers | None:
    """Those of a forward's batch; None if it took the running ones."""
    projections, extractions = (
        tuple(conv_unit_file.statistics(unit) for unit in units)
        for units in (cache.channel_proj, cache.feat_extract)
    )
    if projections[0] is None:
        return None
    seen: Any = projections, extractions  # of all units, then
    return MLANeckBuffers(MLAUnitsBuffers(*seen))


@record
class MLAHeadParams:
    """The classifier (K, L*D, 1, 1), and for each of L maps two units and an enlargement."""

    conv_seg: ConvParams
    up_convs: tuple[ScaleHeadParams, ...]


@record
class MLAHeadBuffers:
    """The running statistics of the units."""

    up_convs: tuple[ScaleHeadBuffers, ...]


@record
class MLAHeadCache:
    """The caches of the parts."""

    up_convs: tuple[Any, ...]
    conv_seg: Any


def mla_head_forward(
    p: MLAHeadParams,
    x: Sequence[Array],
    ops: Ops,
    buffers: MLAHeadBuffers,
    batch_statistics: bool,
    keep: bool = True,
) -> tuple[Array, MLAHeadCache | None]:
    """logits = conv1x1(Concat_j up4 U U(x_j)), with U a unit of kernel 3.

    Args:
        p: the weights.
        x: maps (B, H, W, D), as the neck gives them, of the weights' dtype.
        ops: the table of operations.
        buffers: the running statistics.
        batch_statistics: whether the norms use those of the batch instead (training).
        keep: whether to return a cache for the backward.

    Returns:
        logits (B, 4H, 4W, K) of x's dtype, and the cache.
    """
    large, caches = [], []
    for p_j, x_j, buffers_j in zip(p.up_convs, x, buffers.up_convs, strict=True):
        y, cache = ops[scale_head].forward(p_j, x_j, ops, buffers_j, batch_statistics, SCALE, keep)
        large.append(y)
        caches.append(cache)
    side_by_side = array_module(large[0]).concat(large, axis=-1)
    logits, seg_cache = ops[conv].forward(p.conv_seg, side_by_side, ops, 1, 0, keep=keep)
    return logits, MLAHeadCache(tuple(caches), seg_cache) if keep else None


def mla_head_backward(
    p: MLAHeadParams, cache: MLAHeadCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[list[Array], MLAHeadParams]:
    """Gradients of :func:`mla_head_forward`: each map gets those of its own channels.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dlogits (B, 4H, 4W, K).
        ops: the table that the forward was given.

    Returns:
        dL/dx_j, maps (B, H, W, D), and the gradients of the weights; all of dy's dtype.
    """
    # logits = conv1x1(concat(large))
    dlarge, dseg = ops[conv].backward(p.conv_seg, cache.conv_seg, dy, ops)
    width = dlarge.shape[-1] // len(p.up_convs)
    dx, dheads = [], []
    for j, (p_j, cache_j) in enumerate(zip(p.up_convs, cache.up_convs, strict=True)):
        # large[j] = up(unit(unit(x)))
        own = dlarge[..., j * width : (j + 1) * width]
        dx_j, dhead = ops[scale_head].backward(p_j, cache_j, own, ops)
        dx.append(dx_j)
        dheads.append(dhead)
    return dx, MLAHeadParams(dseg, tuple(dheads))


def head_statistics(cache: MLAHeadCache) -> MLAHeadBuffers | None:
    """Those of a forward's batch; None if it took the running ones."""
    seen: Any = tuple(scale_head_file.statistics(cache_j) for cache_j in cache.up_convs)
    return None if seen[0] is None else MLAHeadBuffers(seen)


mla_neck = Operation(mla_neck_forward, mla_neck_backward)
mla_head = Operation(mla_head_forward, mla_head_backward)
