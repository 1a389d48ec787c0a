"""The whole network: its stages, with class logits or a pyramid of feature maps as output.

This file applies the operations of layers/ and blocks/ in order, and the backward goes through them
in reverse. The stages are those of sections 3.1 and 3.2 of the paper. The two outputs differ in
stage 4, as the authors' classifier and their dense backbones do: :func:`forward` starts it with the
cls token (section 4.1), :func:`forward_pyramid` does not (section 4.2).

Nothing is checked here: :mod:`pvt_ref.api` does that, and calls these functions.
"""

from collections.abc import Sequence
from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.blocks.transformer import blocks
from pvt_ref.draws import Source, What, generator_at
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import linear
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.position import position, positions
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.models.pvt.params import StageParams
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class StageCache:
    """The caches of the parts of stage i, and its grid (H_i, W_i)."""

    patch_embed: Any
    position: Any
    drop: Any  # None if nothing was dropped
    blocks: Any
    grid: Grid
    cls: bool  # whether the first token is the cls token


@record
class ClassifierCache:
    """What :func:`backward` needs: the caches of the parts, and the shape of the last tokens."""

    stages: tuple[StageCache, ...]
    norm: Any
    head: Any
    tokens_shape: tuple[int, ...]


def prepare(params: Any, config: Any, size: Grid) -> tuple[Array, ...]:
    """Each stage's table, (1, H_i W_i, C_i), or with its cls row, for images of that size."""
    tables = []
    for i, grid in enumerate(config.grids(*size), start=1):
        table, side = params.of_stage(i).pos_embed, config.table_sides[i - 1]
        has_cls = table.shape[1] > side * side
        rows = positions(table, grid, (side, side), has_cls)
        tables.append(array_module(rows).expand_dims(rows, axis=0))
    return tuple(tables)


def _stage_forward(
    p: StageParams,
    cls_token: Array | None,
    x: Array,
    config: Any,
    i: int,
    ops: Ops,
    rng: Source,
    keep: bool,
    constants: Sequence[Array] | None,
) -> tuple[Array, StageCache | None, tuple[int, int]]:
    """A map x (B, H_{i-1}, W_{i-1}, C_{i-1}) to tokens (B, n_i, C_i), cls token first if given."""
    xp = array_module(x)
    stage, side = config.of_stage(i), config.table_sides[i - 1]
    grid = (x.shape[1] // stage.patch_size, x.shape[2] // stage.patch_size)
    x, embed_cache = ops[patch_embed].forward(
        p.patch_embed, x, ops, stage.projection_norm_eps, keep=keep
    )  # (B, n_i, C_i)
    cls = cls_token is not None
    if cls_token is not None:
        token = xp.broadcast_to(cls_token, (x.shape[0], 1, x.shape[-1]))  # (B, 1, C_i)
        x = xp.concat((token, x), axis=1)  # (B, 1 + n_i, C_i)
    # resized beforehand, the table's grid is that of the tokens
    table, table_grid = p.pos_embed, (side, side)
    if constants is not None:
        table, table_grid = constants[i - 1], grid
    x, position_cache = ops[position].forward(table, x, ops, grid, table_grid, cls, keep=keep)
    entry_rng = generator_at(rng, What.STAGE_DROPOUT, i)
    x, drop_cache = ops[dropout].forward(None, x, ops, stage.drop_rate, entry_rng, keep=keep)
    first = [x]
    del x  # else these tokens would stay alive while the blocks compute
    x, blocks_cache = ops[blocks].forward(
        p.blocks, first.pop(), ops, grid, stage.blocks, rng, keep=keep
    )  # (B, n_i, C_i), or (B, 1 + n_i, C_i)
    if not keep:
        return x, None, grid
    return x, StageCache(embed_cache, position_cache, drop_cache, blocks_cache, grid, cls), grid


def _stage_backward(
    p: StageParams, cache: StageCache, dx: Array, ops: Ops
) -> tuple[Array, StageParams, Array | None]:
    """Back from dx (B, n_i, C_i) or (B, 1 + n_i, C_i), on cache.grid (H_i, W_i), to the map."""
    xp = array_module(dx)
    # x = blocks(x)
    dx, dblocks = ops[blocks].backward(p.blocks, cache.blocks, dx, ops)
    # x = dropout(x + positions)
    dx, _ = ops[dropout].backward(None, cache.drop, dx, ops)
    dx, dpos = ops[position].backward(p.pos_embed, cache.position, dx, ops)
    # x = [cls; x], the same cls token for every sample
    dcls = None
    if cache.cls:
        dcls, _ = ops[sum_rows].forward(None, dx[:, 0, :], ops, keep=False)  # (C_i,)
        dcls = xp.reshape(dcls, (1, 1, -1))  # (1, 1, C_i)
        dx = dx[:, 1:, :]  # (B, n_i, C_i)
    # x = patch_embed(map)
    dmap, dembed = ops[patch_embed].backward(p.patch_embed, cache.patch_embed, dx, ops)
    return dmap, StageParams(dembed, dpos, dblocks), dcls


def to_map(x: Array, grid: Grid) -> Array:
    """Tokens (B, n, C) to a map (B, H_i, W_i, C)."""
    return array_module(x).reshape(x, (x.shape[0], *grid, x.shape[-1]))


def to_tokens(x_map: Array) -> Array:
    """A map (B, H_i, W_i, C) to tokens (B, n, C)."""
    B, H, W, C = x_map.shape
    return array_module(x_map).reshape(x_map, (B, H * W, C))


def channels_last(images: Array) -> Array:
    """(B, C, H, W) to (B, H, W, C): inside the network channels come last, as in tokens."""
    return array_module(images).permute_dims(images, (0, 2, 3, 1))


def channels_first(x_map: Array) -> Array:
    """(B, H, W, C) to (B, C, H, W)."""
    return array_module(x_map).permute_dims(x_map, (0, 3, 1, 2))


def forward(
    params: Any,
    images: Array,
    config: Any,
    ops: Ops,
    rng: Source = None,
    keep: bool = True,
    constants: Sequence[Array] | None = None,
) -> tuple[Array, ClassifierCache | None]:
    """The released classifier (paper sections 3.1, 3.2 and 4.1).

    Stage 4 starts with the cls token; after its last block comes a layer norm, whose cls row goes
    through the head. Returns logits (B, num_classes) and the cache.

    Args:
        params: the weights.
        images: (B, C_0, H, W) of the weights' dtype.
        config: the configuration of the weights.
        ops: the table of operations.
        rng: source of the dropout and drop-path masks; None for inference.
        keep: whether to return a cache for the backward.
        constants: of :func:`prepare`; only without keep.
    """
    x = channels_last(images)  # (B, H, W, C_0)
    caches, count = [], len(config.channels)
    for i in range(1, count + 1):
        cls_token = params.cls_token if i == count else None
        x, cache, grid = _stage_forward(
            params.of_stage(i), cls_token, x, config, i, ops, rng, keep, constants
        )
        caches.append(cache)
        if i < count:
            x = to_map(x, grid)  # (B, H_i, W_i, C_i)
    tokens_shape = x.shape  # (B, 1 + n_4, C_4)
    x, norm_cache = ops[layer_norm].forward(params.norm, x, ops, config.norm_eps, keep=keep)
    logits, head_cache = ops[linear].forward(params.head, x[:, 0, :], ops, keep=keep)
    if not keep:
        return logits, None
    return logits, ClassifierCache(tuple(caches), norm_cache, head_cache, tokens_shape)


def backward(params: Any, cache: ClassifierCache, dlogits: Array, ops: Ops) -> tuple[Any, Array]:
    """Gradients of :func:`forward`: the chain rule through head, norm and all stages.

    The head reads only the cls row of the last tokens, so dL/dtokens is zero in all other rows.
    From dlogits (B, num_classes) it returns the gradients of the weights and dL/dimages (B, C_0,
    H, W).
    """
    xp = array_module(dlogits)
    B, n, C_4 = cache.tokens_shape
    # logits = head(x[:, 0])
    dcls_row, dhead = ops[linear].backward(params.head, cache.head, dlogits, ops)  # (B, C_4)
    dcls_row = xp.expand_dims(dcls_row, axis=1)  # (B, 1, C_4)
    unread = xp.zeros_like(xp.broadcast_to(dcls_row, (B, n - 1, C_4)))  # (B, n_4, C_4)
    dx = xp.concat((dcls_row, unread), axis=1)  # (B, 1 + n_4, C_4)
    # x = norm(x)
    dx, dnorm = ops[layer_norm].backward(params.norm, cache.norm, dx, ops)
    dstages: list[StageParams] = []
    dcls_token = None
    for i in range(len(cache.stages), 0, -1):
        dmap, dstage, dcls = _stage_backward(params.of_stage(i), cache.stages[i - 1], dx, ops)
        dstages.insert(0, dstage)
        dcls_token = dcls if dcls is not None else dcls_token
        if i > 1:
            dx = to_tokens(dmap)  # (B, n_{i-1}, C_{i-1})
    grads = params.gradients(dstages, cls_token=dcls_token, norm=dnorm, head=dhead)
    return grads, channels_first(dmap)


def forward_pyramid(
    params: Any,
    images: Array,
    config: Any,
    ops: Ops,
    rng: Source = None,
    keep: bool = True,
    constants: Sequence[Array] | None = None,
) -> tuple[list[Array], tuple[StageCache, ...] | None]:
    """The feature maps F_1..F_4 of the released backbones (paper sections 3.1, 3.2 and 4.2).

    Stage 4 has no cls token (its position table is used without the cls row) and no final norm is
    applied. F_4 is therefore not what the classifier computes. Arguments as for :func:`forward`, of
    images (B, C_0, H, W); returns [F_1, F_2, F_3, F_4], (B, C_i, H_i, W_i) each, and the cache.
    """
    x = channels_last(images)  # (B, H, W, C_0)
    maps, caches = [], []
    for i in range(1, len(config.channels) + 1):
        tokens, cache, grid = _stage_forward(
            params.of_stage(i), None, x, config, i, ops, rng, keep, constants
        )
        x = to_map(tokens, grid)  # (B, H_i, W_i, C_i)
        maps.append(channels_first(x))
        caches.append(cache)
    return maps, tuple(caches) if keep else None


def backward_pyramid(
    params: Any, cache: tuple[StageCache, ...], dmaps: Sequence[Array], ops: Ops
) -> tuple[Any, Array]:
    """Gradients of :func:`forward_pyramid`.

    F_i is both an output and the input of stage i + 1, so two gradients meet in it: dL/dF_i and
    the gradient through that stage. Weights that the maps do not use get zeros.

    Args:
        dmaps: dL/dF_1..dL/dF_4, (B, C_i, H_i, W_i) each; the others are as for :func:`backward`.
    """
    dstages: list[StageParams] = []
    dbelow = None  # dL/dF_i through stage i + 1
    for i in range(len(cache), 0, -1):
        dx = channels_last(dmaps[i - 1])  # (B, H_i, W_i, C_i)
        if dbelow is not None:
            dx = dx + dbelow  # F_i is both an output and the next stage's input
        dx = to_tokens(dx)  # (B, n_i, C_i)
        dbelow, dstage, _ = _stage_backward(params.of_stage(i), cache[i - 1], dx, ops)
        dstages.insert(0, dstage)
    return params.gradients(dstages), channels_first(dbelow)
