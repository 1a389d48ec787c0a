"""The whole network: four stages, read out as class logits or as a pyramid of feature maps.

This file says in what order the operations are applied, and the backward says it in reverse; what
they compute stands in layers/. The stages are those of sections 3.1 and 3.2 of the paper (Wang et
al., ICCV 2021, arXiv 2102.12122). Two readings share them but differ in the fourth, as the authors'
classifier and their dense backbones do: see :func:`forward` (section 4.1) and
:func:`forward_pyramid` (section 4.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, array_module, short_repr, sum_in_float64
from pvt_ref.boundary import (
    check_cache,
    check_cotangent,
    check_has_classifier,
    check_params,
    check_pyramid_cotangents,
    check_stages,
    choose_ops,
    prepare_images,
)
from pvt_ref.config import NUM_STAGES, PVTConfig
from pvt_ref.layers.sra import sra_weights
from pvt_ref.ops import Ops
from pvt_ref.params import PVTParams, StageParams, check_rng, zeros_like_params


@dataclass(frozen=True, slots=True, eq=False)
class StageCache:
    """The caches of the parts of stage i, each for its own backward.

    Attributes:
        patch_embed: of the patch embedding, which made (B, n_i, C_i).
        position: of the position embedding.
        drop: of the dropout after it; None if nothing was dropped.
        blocks: of each of the L_i blocks, in order.
        grid: (H_i, W_i).
        cls: whether the first token is the cls token.
    """

    patch_embed: Any
    position: Any
    drop: Any
    blocks: tuple[Any, ...]
    grid: tuple[int, int]  # (H_i, W_i): the shape that dL/dF_i must have
    cls: bool  # whether the first token's gradient is the cls token's

    __repr__ = short_repr


@dataclass(frozen=True, slots=True, eq=False)
class ClassifierCache:
    """Made by :func:`forward_with_cache` for :func:`backward`; it is not changed by it.

    Attributes:
        stages: the caches of the four stages.
        norm: of the final norm over (B, 1 + n_4, C_4).
        head: of the head, whose input is the cls row (B, C_4).
        tokens_shape: (B, 1 + n_4, C_4), of stage 4.
        dtype: of the weights.
        config: the configuration of the forward.
        ops: the record of operations that made the caches, and reads them.
    """

    stages: tuple[StageCache, ...]
    norm: Any
    head: Any
    tokens_shape: tuple[int, ...]  # of stage 4, (B, 1 + n_4, C_4)
    dtype: Any  # of the weights
    config: PVTConfig
    ops: Ops

    __repr__ = short_repr


@dataclass(frozen=True, slots=True, eq=False)
class PyramidCache:
    """Made by :func:`forward_pyramid_with_cache` for :func:`backward_pyramid`; never changed.

    Attributes:
        stages: the caches of the four stages.
        batch: B.
        dtype: of the weights.
        config: the configuration of the forward.
        ops: the record of operations that made the caches, and reads them.
    """

    stages: tuple[StageCache, ...]
    batch: int
    dtype: Any  # of the weights
    config: PVTConfig
    ops: Ops

    __repr__ = short_repr


# One stage ------------------------------------------------------------------------------------


def _enter_stage(
    p: StageParams,
    cls_token: Array | None,
    x: Array,
    config: PVTConfig,
    i: int,
    ops: Ops,
    rng: np.random.Generator | None,
    keep: bool,
) -> tuple[Array, tuple[Any, Any, Any], tuple[int, int]]:
    """Patch embedding, cls token (if given), position embedding, dropout: the blocks' input."""
    xp = array_module(x)
    stage = config.stage(i)
    grid = (x.shape[1] // stage.patch_size, x.shape[2] // stage.patch_size)
    x, embed_cache = ops.patch_embed.forward(
        p.patch_embed, x, ops, stage.projection_norm_eps, keep=keep
    )  # (B, n_i, C_i)
    if cls_token is not None:
        first = xp.broadcast_to(cls_token, (x.shape[0], 1, x.shape[-1]))  # (B, 1, C_4)
        x = xp.concat((first, x), axis=1)  # (B, 1 + n_4, C_4)
    side = config.table_sides[i]
    x, position_cache = ops.position.forward(
        p.pos_embed, x, grid, (side, side), cls=cls_token is not None, keep=keep
    )
    x, drop_cache = ops.dropout.forward(x, stage.drop_rate, rng)
    return x, (embed_cache, position_cache, drop_cache), grid


def _stage_forward(
    p: StageParams,
    cls_token: Array | None,
    x: Array,
    config: PVTConfig,
    i: int,
    ops: Ops,
    rng: np.random.Generator | None,
    keep: bool,
) -> tuple[Array, StageCache | None, tuple[int, int]]:
    """A map (B, H_{i-1}, W_{i-1}, C_{i-1}) to tokens (B, n_i, C_i), cls token first if given."""
    stage = config.stage(i)
    x, entry_caches, grid = _enter_stage(p, cls_token, x, config, i, ops, rng, keep)
    block_caches = []
    for block, drop_path_rate in zip(p.blocks, stage.drop_path_rates, strict=True):
        x, cache = ops.block.forward(block, x, ops, grid, stage, drop_path_rate, rng, keep=keep)
        block_caches.append(cache)
    if not keep:
        return x, None, grid
    cls = cls_token is not None
    return x, StageCache(*entry_caches, tuple(block_caches), grid, cls), grid


def _stage_backward(
    p: StageParams, cache: StageCache, dx: Array, config: PVTConfig, i: int, ops: Ops
) -> tuple[Array, StageParams, Array | None]:
    """dL/dtokens to dL/dmap, the stage's gradients, and the cls token's if it has one."""
    stage = config.stage(i)
    dblocks = []
    for block, block_cache in zip(reversed(p.blocks), reversed(cache.blocks), strict=True):
        dx, dblock = ops.block.backward(block, block_cache, dx, ops, stage)
        dblocks.append(dblock)
    # x = dropout(x + positions)
    dx = ops.dropout.backward(cache.drop, dx)
    dx, dpos = ops.position.backward(p.pos_embed, cache.position, dx)
    # x = [cls; x], the same cls token for every sample
    dcls = None
    if cache.cls:
        dcls = sum_in_float64(dx[:, :1, :], axis=0)  # (1, C_4)
        dcls = array_module(dx).expand_dims(dcls, axis=0)  # (1, 1, C_4)
        dx = dx[:, 1:, :]  # (B, n_4, C_4)
    # x = patch_embed(map)
    dmap, dembed = ops.patch_embed.backward(p.patch_embed, cache.patch_embed, dx, ops)
    return dmap, StageParams(dembed, dpos, tuple(reversed(dblocks))), dcls


def _to_map(x: Array, grid: tuple[int, int]) -> Array:
    """Tokens (B, n, C) to a map (B, H_i, W_i, C)."""
    return array_module(x).reshape(x, (x.shape[0], *grid, x.shape[-1]))


def _to_tokens(x_map: Array) -> Array:
    """A map (B, H_i, W_i, C) to tokens (B, n, C)."""
    B, H, W, C = x_map.shape
    return array_module(x_map).reshape(x_map, (B, H * W, C))


def _channels_last(images: Array) -> Array:
    """(B, C, H, W) to (B, H, W, C): inside, channels come last, as tokens have them."""
    return array_module(images).permute_dims(images, (0, 2, 3, 1))


def _channels_first(x_map: Array) -> Array:
    """(B, H, W, C) to (B, C, H, W)."""
    return array_module(x_map).permute_dims(x_map, (0, 3, 1, 2))


def _assemble(
    params: PVTParams,
    dstages: Sequence[StageParams],
    cls_token: Array | None = None,
    norm: Any = None,
    head: Any = None,
) -> PVTParams:
    """Gradients of the whole from those of the stages; zeros for what the pass did not use."""
    named: dict[str, Any] = {}
    for i, dstage in enumerate(dstages, start=1):
        named[f"patch_embed{i}"] = dstage.patch_embed
        named[f"pos_embed{i}"] = dstage.pos_embed
        named[f"block{i}"] = dstage.blocks
    for name, gradient in (("cls_token", cls_token), ("norm", norm), ("head", head)):
        unused = gradient is None
        named[name] = zeros_like_params(getattr(params, name)) if unused else gradient
    return PVTParams(**named)


# The classifier -------------------------------------------------------------------------------


def forward(
    params: PVTParams, images: Array, config: PVTConfig, *, ops: Ops | None = None
) -> Array:
    """Class logits, without keeping anything for a backward.

    The released classifier (paper sections 3.1, 3.2 and 4.1): stage 4 starts with the cls token;
    after its last block a layer norm, of which the cls row goes through the head. Memory does not
    grow with depth.

    Args:
        params: the weights, NumPy or CuPy, float32 or float64.
        images: (B, in_chans, H, W) normalised floats of the same library, H and W multiples of
            ``config.size_multiple``. Another float dtype is cast to the weights'.
        config: the configuration of the weights.
        ops: a record of operations; None takes the default.

    Returns:
        logits (B, num_classes) of the weights' dtype.

    Raises:
        ArrayTypeError: if an argument is of another type, images are not floats, or arrays lie on
            different devices or do not suit ops.
        ShapeError: if images are not (B, in_chans, H, W), H or W would lose pixels, the batch is
            empty, or params belong to another config.
        ConfigError: if the model is a bare backbone, which has no logits.
        RangeError: if ops is None and the environment variable PVT_REF_OPS names no record.
    """
    logits, _ = _classify(params, images, config, None, ops, keep=False)
    return logits


def forward_with_cache(
    params: PVTParams,
    images: Array,
    config: PVTConfig,
    rng: np.random.Generator | None = None,
    *,
    ops: Ops | None = None,
) -> tuple[Array, ClassifierCache]:
    """Class logits, and the cache for :func:`backward`.

    What is computed is what :func:`forward` computes, with dropout and drop path if there is an
    rng: without one nothing is dropped, whatever rates config has. Memory grows with depth.

    Args:
        params: the weights, NumPy or CuPy, float32 or float64.
        images: (B, in_chans, H, W) normalised floats, as for :func:`forward`.
        config: the configuration of the weights.
        rng: a NumPy generator turns dropout and drop path on, at the rates of config; None leaves
            them off, as for validation. The same seed draws the same masks on every device and for
            every dtype.
        ops: a record of operations; None takes the default.

    Returns:
        logits (B, num_classes) of the weights' dtype, and the cache.

    Raises:
        ArrayTypeError: as :func:`forward`; also if rng is not a NumPy generator.
        ShapeError: as :func:`forward`.
        ConfigError: as :func:`forward`.
        RangeError: as :func:`forward`.
    """
    if rng is not None:
        check_rng(rng)
    logits, cache = _classify(params, images, config, rng, ops, keep=True)
    assert cache is not None
    return logits, cache


def _classify(
    params: PVTParams,
    images: Array,
    config: PVTConfig,
    rng: np.random.Generator | None,
    ops: Ops | None,
    keep: bool,
) -> tuple[Array, ClassifierCache | None]:
    check_has_classifier(config)
    images = prepare_images(params, images, config)  # (B, in_chans, H, W)
    ops = choose_ops(ops, images)
    x = _channels_last(images)  # (B, H, W, in_chans)
    caches = []
    for i in range(NUM_STAGES):
        last = i == NUM_STAGES - 1
        cls_token = params.cls_token if last else None
        x, cache, grid = _stage_forward(
            params.stage(i), cls_token, x, config, i, ops, rng, keep
        )  # (B, n_i, C_i); stage 4: (B, 1 + n_4, C_4)
        caches.append(cache)
        if not last:
            x = _to_map(x, grid)  # (B, H_i, W_i, C_i)
    tokens_shape = x.shape
    x, norm_cache = ops.layer_norm.forward(params.norm, x, config.norm_eps, keep=keep)
    logits, head_cache = ops.linear.forward(params.head, x[:, 0, :], keep=keep)  # (B, classes)
    if not keep:
        return logits, None
    return logits, ClassifierCache(
        tuple(caches), norm_cache, head_cache, tokens_shape, x.dtype, config, ops
    )


def backward(
    params: PVTParams,
    cache: ClassifierCache,
    dlogits: Array,
    config: PVTConfig,
    *,
    ops: Ops | None = None,
) -> tuple[PVTParams, Array]:
    """Gradients of a scalar loss L through :func:`forward_with_cache`.

    The chain rule through head, norm and the stages 4 to 1. Only the cls row of the last tokens is
    read, so dL/dtokens is zero in all other rows.

    Args:
        params: the weights of the forward.
        cache: what the forward returned. It is read, never changed: it may serve several dlogits.
        dlogits: dL/dlogits (B, num_classes), float32 or float64, for instance from
            :func:`pvt_ref.cross_entropy`. It is cast to the weights' dtype.
        config: the configuration of the forward, the very same.
        ops: the forward's record (the default); another one cannot read its cache.

    Returns:
        grads, of params' type with dL/dw in the place of w, of its shape and dtype; and dL/dimages
        (B, in_chans, H, W), of the weights' dtype: float16, say, could not hold every gradient.

    Raises:
        ArrayTypeError: if an argument is of another type, dlogits are not floats or lie on another
            device, or the cache was made by another forward, with weights of another dtype or with
            other ops.
        ShapeError: if dlogits are not (B, num_classes), or params or cache belong to another
            config.
        ConfigError: if the model is a bare backbone, which has no logits.
    """
    check_has_classifier(config)
    check_params(params, config)
    ops = check_cache(cache, ClassifierCache, "forward_with_cache", params, config, ops)
    head = params.head
    assert head is not None
    batch = cache.tokens_shape[0]
    dlogits = check_cotangent("dlogits", dlogits, (batch, head.weight.shape[0]), head.weight)
    xp = array_module(dlogits)
    # logits = head(x[:, 0])
    dcls_row, dhead = ops.linear.backward(head, cache.head, dlogits)  # (B, C_4)
    dcls_row = xp.expand_dims(dcls_row, axis=1)  # (B, 1, C_4)
    B, n, C = cache.tokens_shape
    unread = xp.zeros_like(xp.broadcast_to(dcls_row, (B, n - 1, C)))  # only the cls row is read
    dx = xp.concat((dcls_row, unread), axis=1)  # (B, 1 + n_4, C_4)
    # x = norm(x)
    dx, dnorm = ops.layer_norm.backward(params.norm, cache.norm, dx)
    dstages: list[StageParams] = []
    dcls_token = None
    for i in reversed(range(NUM_STAGES)):
        dmap, dstage, dcls = _stage_backward(
            params.stage(i), cache.stages[i], dx, config, i, ops
        )  # (B, H_{i-1}, W_{i-1}, C_{i-1})
        dstages.insert(0, dstage)
        dcls_token = dcls if dcls is not None else dcls_token
        if i > 0:
            dx = _to_tokens(dmap)  # (B, n_{i-1}, C_{i-1})
    grads = _assemble(params, dstages, dcls_token, dnorm, dhead)
    return grads, _channels_first(dmap)


# The pyramid ----------------------------------------------------------------------------------


def forward_pyramid(
    params: PVTParams, images: Array, config: PVTConfig, *, ops: Ops | None = None
) -> list[Array]:
    """The feature maps F_1..F_4 for dense prediction, without keeping anything for a backward.

    The released detection and segmentation backbones (paper sections 3.1, 3.2 and 4.2): stage 4
    has no cls token (its position table is used without the cls row) and no final norm is applied.
    F_4 is therefore not what the classifier computes.

    Args:
        params: the weights, NumPy or CuPy, float32 or float64; they may lack a classifier.
        images: (B, in_chans, H, W) normalised floats, as for :func:`forward`.
        config: the configuration of the weights.
        ops: a record of operations; None takes the default.

    Returns:
        [F_1, F_2, F_3, F_4], (B, C_i, H_i, W_i) each, of the weights' dtype.

    Raises:
        ArrayTypeError: as :func:`forward`.
        ShapeError: as :func:`forward`.
        RangeError: if ops is None and the environment variable PVT_REF_OPS names no record.
    """
    maps, _ = _pyramid(params, images, config, None, ops, keep=False)
    return maps


def forward_pyramid_with_cache(
    params: PVTParams,
    images: Array,
    config: PVTConfig,
    rng: np.random.Generator | None = None,
    *,
    ops: Ops | None = None,
) -> tuple[list[Array], PyramidCache]:
    """The feature maps, and the cache for :func:`backward_pyramid`.

    What is computed is what :func:`forward_pyramid` computes, with dropout and drop path if there
    is an rng: without one nothing is dropped, whatever rates config has. Memory grows with depth.

    Args:
        params: the weights, NumPy or CuPy, float32 or float64; they may lack a classifier.
        images: (B, in_chans, H, W) normalised floats, as for :func:`forward`.
        config: the configuration of the weights.
        rng: a NumPy generator turns dropout and drop path on, as for :func:`forward_with_cache`.
        ops: a record of operations; None takes the default.

    Returns:
        [F_1, F_2, F_3, F_4], (B, C_i, H_i, W_i) each, of the weights' dtype, and the cache.

    Raises:
        ArrayTypeError: as :func:`forward`; also if rng is not a NumPy generator.
        ShapeError: as :func:`forward`.
        RangeError: if ops is None and the environment variable PVT_REF_OPS names no record.
    """
    if rng is not None:
        check_rng(rng)
    maps, cache = _pyramid(params, images, config, rng, ops, keep=True)
    assert cache is not None
    return maps, cache


def _pyramid(
    params: PVTParams,
    images: Array,
    config: PVTConfig,
    rng: np.random.Generator | None,
    ops: Ops | None,
    keep: bool,
) -> tuple[list[Array], PyramidCache | None]:
    images = prepare_images(params, images, config)  # (B, in_chans, H, W)
    ops = choose_ops(ops, images)
    x = _channels_last(images)  # (B, H, W, in_chans)
    maps, caches = [], []
    for i in range(NUM_STAGES):
        tokens, cache, grid = _stage_forward(
            params.stage(i), None, x, config, i, ops, rng, keep
        )  # (B, n_i, C_i)
        x = _to_map(tokens, grid)  # (B, H_i, W_i, C_i)
        maps.append(_channels_first(x))  # (B, C_i, H_i, W_i)
        caches.append(cache)
    if not keep:
        return maps, None
    return maps, PyramidCache(tuple(caches), images.shape[0], x.dtype, config, ops)


def backward_pyramid(
    params: PVTParams,
    cache: PyramidCache,
    dmaps: Sequence[Array | None],
    config: PVTConfig,
    *,
    ops: Ops | None = None,
) -> tuple[PVTParams, Array]:
    """Gradients of a scalar loss L through :func:`forward_pyramid_with_cache`.

    F_i is both an output and the input of stage i + 1, so two gradients meet in it: dL/dF_i and
    what comes back through that stage.

    Args:
        params: the weights of the forward.
        cache: what the forward returned. It is read, never changed.
        dmaps: dL/dF_1..dL/dF_4, (B, C_i, H_i, W_i) each, float32 or float64, cast to the weights'
            dtype; None for a map that L does not use.
        config: the configuration of the forward.
        ops: the forward's record (the default).

    Returns:
        grads, of params' type with dL/dw in the place of w, of its shape and dtype (zeros for cls
        token, final norm, head and the table's cls row); and dL/dimages (B, in_chans, H, W), of the
        weights' dtype.

    Raises:
        ArrayTypeError: if an argument is of another type, a map is not of floats or lies on another
            device, or the cache was made by another forward, with weights of another dtype or with
            other ops.
        ShapeError: if dmaps are not four, one has another shape than its map, or params or cache
            belong to another config.
    """
    check_params(params, config)
    ops = check_cache(cache, PyramidCache, "forward_pyramid_with_cache", params, config, ops)
    shapes = [
        (cache.batch, C, *stage.grid)
        for C, stage in zip(config.embed_dims, cache.stages, strict=True)
    ]
    dmaps = check_pyramid_cotangents(dmaps, shapes, params.pos_embed1)
    dstages: list[StageParams] = []
    dbelow = None  # dL/dF_i by way of stage i + 1
    for i in reversed(range(NUM_STAGES)):
        dx = _channels_last(dmaps[i])  # (B, H_i, W_i, C_i)
        if dbelow is not None:
            dx = dx + dbelow  # F_i is both an output and the next stage's input
        dbelow, dstage, _ = _stage_backward(
            params.stage(i), cache.stages[i], _to_tokens(dx), config, i, ops
        )  # (B, H_{i-1}, W_{i-1}, C_{i-1})
        dstages.insert(0, dstage)
    dimages = _channels_first(dbelow)  # (B, in_chans, H, W)
    return _assemble(params, dstages), dimages


# Attention, to look at ------------------------------------------------------------------------


def attention_maps(
    params: PVTParams,
    images: Array,
    config: PVTConfig,
    stages: Sequence[int] = (1, 2, 3, 4),
    *,
    ops: Ops | None = None,
) -> dict[tuple[int, int], Array]:
    """Where every query looks, in every block of the stages named: A of paper eq. 4.

    Stage 4 of a classifier includes the cls token, as query and key 0; a backbone has none. The
    weights are those of the readable layers (with the softmax, norms and products of ops), whatever
    stands for attention as a whole in ops.

    Args:
        params: the weights, NumPy or CuPy, float32 or float64; they may lack a classifier.
        images: (B, in_chans, H, W) normalised floats, as for :func:`forward`.
        config: the configuration of the weights.
        stages: numbers from 1 to 4.
        ops: a record of operations; None takes the default.

    Returns:
        By (stage, block), the weights (B, N_i, n_i, m_i) of every head, query and key, of params'
        dtype, rows summing to 1. Stages count from 1, blocks from 0, as in the keys of the weights.
        Keys are the m_i tokens after spatial reduction, in raster order. With a cls token, stage 4
        has 1 + n_4 queries and keys.

    Raises:
        RangeError: if a stage is not 1, 2, 3 or 4, or PVT_REF_OPS names no record, as for
            :func:`forward`.
        ArrayTypeError: as :func:`forward`.
        ShapeError: as :func:`forward`.
    """
    wanted = check_stages(stages)
    images = prepare_images(params, images, config)  # (B, in_chans, H, W)
    ops = choose_ops(ops, images)
    x = _channels_last(images)  # (B, H, W, in_chans)
    maps: dict[tuple[int, int], Array] = {}
    for i in range(max(wanted, default=0)):
        stage, p = config.stage(i), params.stage(i)
        cls_token = params.cls_token if i == NUM_STAGES - 1 else None
        x, _, grid = _enter_stage(p, cls_token, x, config, i, ops, None, keep=False)
        for b, block in enumerate(p.blocks):
            if i + 1 in wanted:
                normed, _ = ops.layer_norm.forward(block.norm1, x, stage.norm_eps, keep=False)
                maps[i + 1, b] = sra_weights(block.attn, normed, ops, grid, stage)
            x, _ = ops.block.forward(block, x, ops, grid, stage, keep=False)
        if cls_token is None:
            x = _to_map(x, grid)  # (B, H_i, W_i, C_i)
    return maps
