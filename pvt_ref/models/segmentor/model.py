"""A segmentation network: a head turns the maps of a backbone into logits for every position.

Nothing is checked here: :mod:`pvt_ref.api` does that, and calls these functions.
"""

from collections.abc import Sequence
from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.draws import Source, What, generator_at
from pvt_ref.heads.fpn import fpn
from pvt_ref.heads.semantic_fpn import semantic_fpn
from pvt_ref.heads.semantic_fpn import statistics as semantic_fpn_statistics
from pvt_ref.heads.setr import setr
from pvt_ref.heads.setr import statistics as setr_statistics
from pvt_ref.layers.resize import resize
from pvt_ref.models.pvt.model import channels_first, channels_last
from pvt_ref.models.segmentor.config import SegmentorConfig, SemanticFPNHead
from pvt_ref.models.segmentor.params import SegmentorBuffers, SegmentorParams
from pvt_ref.ops import Ops
from pvt_ref.tree import record, zeros_like


@record
class SegmentorCache:
    """The caches of the parts, and those of stretching the image and undoing the stretch."""

    config: SegmentorConfig
    stretch: Any  # None if the image kept its size
    backbone: Any
    map_shapes: tuple[tuple[int, ...], ...]  # (B, C_i, H_i, W_i)
    neck: Any
    decode_head: Any
    back: Any  # None likewise


def prepare(params: SegmentorParams, config: SegmentorConfig, size: Grid) -> Any:
    """What images of that size, once stretched, do not change: the backbone's position tables."""
    return config.row.prepare(params.backbone, config.backbone, config.fitting_size(*size))


def _stretch(images: Array, config: SegmentorConfig, ops: Ops, keep: bool) -> tuple[Array, Any]:
    """images (B, C_0, H, W) as the backbone takes them: the released code stretches them."""
    size = config.fitting_size(*images.shape[2:])
    if size == tuple(images.shape[2:]):
        return images, None
    x, cache = ops[resize].forward(None, channels_last(images), ops, size, keep=keep)
    return channels_first(x), cache


def _stretch_backward(cache: Any, dimages: Array, ops: Ops) -> Array:
    if cache is None:
        return dimages
    dx, _ = ops[resize].backward(None, cache, channels_last(dimages), ops)
    return channels_first(dx)


def forward(
    params: SegmentorParams,
    images: Array,
    config: SegmentorConfig,
    ops: Ops,
    rng: Source = None,
    keep: bool = True,
    constants: Any = None,
    batch_statistics: bool = False,
) -> tuple[Array, SegmentorCache | None]:
    """The released network up to its logits, which are smaller than the image.

    Args:
        params: the weights.
        images: (B, C_0, H, W) of the weights' dtype.
        config: the configuration of the weights.
        ops: the table of operations.
        rng: source of the masks of dropout and drop path; None for inference.
        keep: whether to return a cache for the backward.
        constants: from :func:`prepare`, for images of that size; None makes its own.
        batch_statistics: whether batch norms take mean and variance of this batch.

    Returns:
        logits (B, num_classes, h, w) and the cache: (h, w) is the grid of F_1 for Semantic FPN, and
        4 or 16 times that of the last map for SETR; for a stretched image less, by its stretch.
    """
    x, stretch = _stretch(images, config, ops, keep)
    maps, backbone_cache = config.row.forward_pyramid(  # type: ignore[misc]
        params.backbone, x, config.backbone, ops, rng, keep, constants
    )
    shapes = tuple(tuple(y.shape) for y in maps)
    maps = [channels_last(y) for y in maps]  # (B, H_i, W_i, C_i)
    dropped = generator_at(rng, What.STAGE_DROPOUT, 0)
    buffers = params.buffers.decode_head  # type: ignore[union-attr]
    neck_cache, head = None, config.head
    if isinstance(head, SemanticFPNHead):
        maps, neck_cache = ops[fpn].forward(params.neck, maps, ops, keep=keep)
        y, head_cache = ops[semantic_fpn].forward(
            params.decode_head, maps, ops, buffers, batch_statistics, head.drop_rate, dropped,
            keep=keep,
        )  # fmt: skip
    else:
        scale = 4 if head.upsampling == "naive" else 2
        y, head_cache = ops[setr].forward(
            params.decode_head, maps[-1], ops, buffers, batch_statistics, scale, keep=keep
        )
    back = None
    if stretch is not None or x is not images:
        size = _shrunk(y.shape[1:3], images.shape[2:], x.shape[2:])
        y, back = ops[resize].forward(None, y, ops, size, keep=keep)
    y = channels_first(y)  # (B, num_classes, h, w)
    if not keep:
        return y, None
    return y, SegmentorCache(config, stretch, backbone_cache, shapes, neck_cache, head_cache, back)


def _shrunk(grid: Sequence[int], size: Sequence[int], stretched: Sequence[int]) -> Grid:
    """The grid of logits, made smaller by as much as the image was stretched."""
    h, w = (max(round(g * n / s), 1) for g, n, s in zip(grid, size, stretched, strict=True))
    return h, w


def backward(
    params: SegmentorParams, cache: SegmentorCache, dlogits: Array, ops: Ops
) -> tuple[SegmentorParams, Array]:
    """Gradients of :func:`forward`; running statistics get none.

    From dlogits (B, num_classes, h, w) it returns the gradients of the weights, with None in place
    of the buffers, and dL/dimages (B, C_0, H, W).
    """
    config = cache.config
    dy = channels_last(dlogits)  # (B, h, w, num_classes)
    if cache.back is not None:
        dy, _ = ops[resize].backward(None, cache.back, dy, ops)
    dneck = None
    if isinstance(config.head, SemanticFPNHead):
        dmaps, dhead = ops[semantic_fpn].backward(params.decode_head, cache.decode_head, dy, ops)
        dmaps, dneck = ops[fpn].backward(params.neck, cache.neck, dmaps, ops)
        dmaps = [channels_first(dx) for dx in dmaps]  # (B, C_i, H_i, W_i)
    else:
        dlast, dhead = ops[setr].backward(params.decode_head, cache.decode_head, dy, ops)
        xp = array_module(dlast)
        dmaps = [xp.zeros(shape, dtype=dlast.dtype) for shape in cache.map_shapes[:-1]]
        dmaps.append(channels_first(dlast))
    dbackbone, dimages = config.row.backward_pyramid(  # type: ignore[misc]
        params.backbone, cache.backbone, dmaps, ops
    )
    grads = SegmentorParams(dbackbone, dneck, dhead, None)
    return grads, _stretch_backward(cache.stretch, dimages, ops)


@record
class PyramidCache:
    """The caches of the stretch, None if there was none, and of the backbone."""

    config: SegmentorConfig
    stretch: Any
    backbone: Any


def forward_pyramid(
    params: SegmentorParams,
    images: Array,
    config: SegmentorConfig,
    ops: Ops,
    rng: Source = None,
    keep: bool = True,
    constants: Any = None,
) -> tuple[list[Array], PyramidCache | None]:
    """The backbone's maps, which the head reads; arguments as for :func:`forward`."""
    x, stretch = _stretch(images, config, ops, keep)
    maps, cache = config.row.forward_pyramid(  # type: ignore[misc]
        params.backbone, x, config.backbone, ops, rng, keep, constants
    )
    return maps, PyramidCache(config, stretch, cache) if keep else None


def backward_pyramid(
    params: SegmentorParams, cache: PyramidCache, dmaps: Sequence[Array], ops: Ops
) -> tuple[SegmentorParams, Array]:
    """Gradients of :func:`forward_pyramid`; neck and head, which the maps do not use, get zeros."""
    dbackbone, dimages = cache.config.row.backward_pyramid(  # type: ignore[misc]
        params.backbone, cache.backbone, dmaps, ops
    )
    unread = zeros_like(params.neck), zeros_like(params.decode_head)
    grads = SegmentorParams(dbackbone, *unread, None)
    return grads, _stretch_backward(cache.stretch, dimages, ops)


def batch_buffers(cache: SegmentorCache) -> SegmentorBuffers | None:
    """The batch's statistics of the batch norms; None if they used the running ones."""
    seen = semantic_fpn_statistics if cache.neck is not None else setr_statistics
    statistics = seen(cache.decode_head)
    return None if statistics is None else SegmentorBuffers(statistics)
