"""The heads of SETR (Zheng et al. 2021, arXiv 2012.15840) on the one map of a columnar ViT.

Naive enlarges once by 4, after a unit of kernel 1. PUP, progressive upsampling, enlarges four times
by 2, each time after a unit of kernel 3. As in MMSegmentation, the final norm of the ViT is part
of the head.
"""

from typing import Any

from pvt_ref.arrays import Array
from pvt_ref.heads import scale_head as scale_head_file
from pvt_ref.heads.scale_head import ScaleHeadBuffers, ScaleHeadParams, scale_head
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record

#: Of the layer norm, in SETR's own code and in MMSegmentation.
NORM_EPS = 1e-6


@record
class SETRParams:
    """The classifier (K, D, 1, 1), the norm, and pairs of a unit and an enlargement."""

    conv_seg: ConvParams
    norm: LayerNormParams
    up_convs: tuple[ScaleHeadParams, ...]


@record
class SETRBuffers:
    """The running statistics of the units."""

    up_convs: tuple[ScaleHeadBuffers, ...]


@record
class SETRCache:
    """The caches of the parts."""

    norm: Any
    up_convs: tuple[Any, ...]
    conv_seg: Any


def setr_forward(
    p: SETRParams,
    x: Array,
    ops: Ops,
    buffers: SETRBuffers,
    batch_statistics: bool,
    scale: int = 2,
    keep: bool = True,
) -> tuple[Array, SETRCache | None]:
    """logits = conv1x1(up U ... up U(LN(x))), with U a unit and up an enlargement.

    Args:
        p: the weights, conv_seg.weight (K, D, 1, 1); with one pair SETR-Naive, with four PUP.
        x: the map (B, H, W, C) of the last block, not normed, of the weights' dtype.
        ops: the table of operations.
        buffers: the running statistics.
        batch_statistics: whether the norms use those of the batch instead (training).
        scale: factor of height and width of each enlargement: 4 in SETR-Naive.
        keep: whether to return a cache for the backward.

    Returns:
        logits (B, s H, s W, K) of x's dtype, s the product of all scales; and the cache.
    """
    y, norm_cache = ops[layer_norm].forward(p.norm, x, ops, NORM_EPS, keep=keep)  # (B, H, W, C)
    caches = []
    for p_j, buffers_j in zip(p.up_convs, buffers.up_convs, strict=True):
        y, cache = ops[scale_head].forward(p_j, y, ops, buffers_j, batch_statistics, scale, keep)
        caches.append(cache)
    logits, seg_cache = ops[conv].forward(p.conv_seg, y, ops, 1, 0, keep=keep)
    return logits, SETRCache(norm_cache, tuple(caches), seg_cache) if keep else None


def setr_backward(
    p: SETRParams, cache: SETRCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, SETRParams]:
    """Gradients of :func:`setr_forward`: the backward of each step, in reverse order.

    With batch statistics and a unit of kernel 1, that of the norm's bias is 0: it adds a constant
    to the channels of the convolution, which batch norm subtracts.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dlogits, an array of their shape.
        ops: the table that the forward was given.

    Returns:
        dx (B, H, W, C) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    # logits = conv1x1(y)
    dy, dseg = ops[conv].backward(p.conv_seg, cache.conv_seg, dy, ops)
    # y = up(unit(y)), pair by pair
    dpairs = []
    for p_j, cache_j in zip(reversed(p.up_convs), reversed(cache.up_convs), strict=True):
        dy, dpair = ops[scale_head].backward(p_j, cache_j, dy, ops)
        dpairs.append(dpair)
    # y = norm(x)
    dx, dnorm = ops[layer_norm].backward(p.norm, cache.norm, dy, ops)
    return dx, SETRParams(dseg, dnorm, tuple(reversed(dpairs)))


def statistics(cache: SETRCache) -> SETRBuffers | None:
    """The statistics of a forward's batch; None if it used the running ones."""
    seen: Any = tuple(scale_head_file.statistics(c) for c in cache.up_convs)
    return None if seen[0] is None else SETRBuffers(seen)


setr = Operation(setr_forward, setr_backward)
