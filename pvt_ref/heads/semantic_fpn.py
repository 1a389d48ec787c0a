"""Semantic FPN (Kirillov et al. 2019, arXiv 1901.02446): classes of pixels, from a pyramid.

Every level is enlarged to the size of the finest, 1/4 of the image, and the levels are summed.
"""

from collections.abc import Sequence
from typing import Any

from pvt_ref.arrays import Array, Grid
from pvt_ref.draws import Rng
from pvt_ref.heads import scale_head as scale_head_file
from pvt_ref.heads.scale_head import ScaleHeadBuffers, ScaleHeadParams, scale_head
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.dropout import dropout_channels
from pvt_ref.layers.resize import resize
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class SemanticFPNParams:
    """The classifier, a kernel (K, D, 1, 1) with a bias, and the levels; or their gradients.

    scale_heads holds, for levels 1 to 4, one unit, then 1, 2 and 3 times a unit and an enlargement.
    """

    conv_seg: ConvParams
    scale_heads: tuple[ScaleHeadParams, ...]


@record
class SemanticFPNBuffers:
    """The running statistics of the units of all levels."""

    scale_heads: tuple[ScaleHeadBuffers, ...]


@record
class SemanticFPNCache:
    """The caches of the parts; drop is None if nothing was dropped."""

    scale_heads: tuple[Any, ...]
    resizes: tuple[Any, ...]
    drop: Any
    conv_seg: Any


def semantic_fpn_forward(
    p: SemanticFPNParams,
    x: Sequence[Array],
    ops: Ops,
    buffers: SemanticFPNBuffers,
    batch_statistics: bool,
    drop_rate: float = 0.0,
    rng: Rng = None,
    keep: bool = True,
) -> tuple[Array, SemanticFPNCache | None]:
    """logits = conv1x1(dropout(S_1 + S_2 + S_3 + S_4)), with U a unit and up2 an enlargement::

        S_1 = U(Q_1)    S_2 = up2 U(Q_2)    S_3 = up2 U up2 U(Q_3)    S_4 = up2 U up2 U up2 U(Q_4)

    If a map has an odd side, the next one has half of it, rounded up, and S_i is too large. So each
    S_i is resized bilinearly to the size of S_1 before the sum.

    Args:
        p: the weights, conv_seg.weight (K, D, 1, 1).
        x: maps Q_i (B, H_i, W_i, C), finest first, of the weights' dtype.
        ops: the table of operations.
        buffers: the running statistics.
        batch_statistics: whether the norms use those of the batch instead (training).
        drop_rate: of whole channels, in [0, 1).
        rng: source of the dropout mask; None for inference.
        keep: whether to return a cache for the backward.

    Returns:
        logits (B, H_1, W_1, K) of x's dtype, and the cache.
    """
    size: Grid = x[0].shape[1:3]
    total, head_caches, resize_caches = None, [], []
    for p_i, x_i, buffers_i in zip(p.scale_heads, x, buffers.scale_heads, strict=True):
        s, cache = ops[scale_head].forward(p_i, x_i, ops, buffers_i, batch_statistics, keep=keep)
        head_caches.append(cache)
        s, cache = ops[resize].forward(None, s, ops, size, keep=keep)  # (B, H_1, W_1, D)
        resize_caches.append(cache)
        total = s if total is None else total + s  # (B, H_1, W_1, D)
    total, drop_cache = ops[dropout_channels].forward(None, total, ops, drop_rate, rng, keep)
    logits, seg_cache = ops[conv].forward(p.conv_seg, total, ops, 1, 0, keep=keep)
    if not keep:
        return logits, None  # (B, H_1, W_1, K)
    return logits, SemanticFPNCache(
        tuple(head_caches), tuple(resize_caches), drop_cache, seg_cache
    )  # (B, H_1, W_1, K)


def semantic_fpn_backward(
    p: SemanticFPNParams, cache: SemanticFPNCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[list[Array], SemanticFPNParams]:
    """Gradients of :func:`semantic_fpn_forward`: every summand gets the gradient of the sum.

    Args:
        p: the forward's weights, conv_seg.weight (K, D, 1, 1).
        cache: from the forward.
        dy: dL/dlogits (B, H_1, W_1, K).
        ops: the table that the forward was given.

    Returns:
        dL/dQ_i, maps (B, H_i, W_i, C), and the gradients of the weights; all of dy's dtype.
    """
    # logits = conv1x1(dropout(total))
    dtotal, dseg = ops[conv].backward(p.conv_seg, cache.conv_seg, dy, ops)  # (B, H_1, W_1, D)
    dtotal, _ = ops[dropout_channels].backward(None, cache.drop, dtotal, ops)  # (B, H_1, W_1, D)
    dx, dheads = [], []
    for p_i, head, resized in zip(p.scale_heads, cache.scale_heads, cache.resizes, strict=True):
        # total = total + resize(s)
        ds, _ = ops[resize].backward(None, resized, dtotal, ops)
        dx_i, dhead = ops[scale_head].backward(p_i, head, ds, ops)
        dx.append(dx_i)
        dheads.append(dhead)
    return dx, SemanticFPNParams(dseg, tuple(dheads))


def statistics(cache: SemanticFPNCache) -> SemanticFPNBuffers | None:
    """The statistics of a forward's batch; None if it used the running ones."""
    seen: Any = tuple(scale_head_file.statistics(c) for c in cache.scale_heads)
    return None if seen[0] is None else SemanticFPNBuffers(seen)


semantic_fpn = Operation(semantic_fpn_forward, semantic_fpn_backward)
