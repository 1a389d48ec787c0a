"""The columnar ViT: one scale, with logits from the cls token or a map of the patches as output.

As PVT's ``model.py``, this file applies the operations in order. It shares no pass with it: a ViT
has one table and one column of blocks, the map's tokens include the cls token, to which patches
attend, and maps of several blocks can be returned.

Nothing is checked here: :mod:`pvt_ref.api` does that, and calls these functions.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.blocks import transformer
from pvt_ref.draws import Source, What, generator_at
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import linear
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.position import position, positions
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.models.vit.config import ViTConfig, block_settings
from pvt_ref.models.vit.params import ViTParams
from pvt_ref.ops import Ops
from pvt_ref.tree import record, zeros_like


@record
class EntryCache:
    """Of what is done before the blocks; drop is None if nothing was dropped."""

    patch_embed: Any
    position: Any
    drop: Any


@record
class ClassifierCache:
    """What :func:`backward` needs: the caches of the parts, and the shape of the last tokens."""

    entry: EntryCache
    blocks: Any
    norm: Any
    head: Any
    tokens_shape: tuple[int, ...]


@record
class MapsCache:
    """What :func:`backward_pyramid` needs.

    ends are the numbers of the blocks of which there are maps, plus 1; blocks has a cache for the
    blocks up to the first of them, one for those from there to the second, and so on.
    """

    entry: EntryCache
    blocks: tuple[Any, ...]
    ends: tuple[int, ...]


def prepare(params: ViTParams, config: ViTConfig, size: Grid) -> tuple[Array, ...]:
    """The position table (1, 1 + n, C) as the only one of a tuple, resized for that image size."""
    (grid,), side = config.grids(*size), config.table_sides[0]
    rows = positions(params.pos_embed, grid, (side, side), True, config.position_resize)
    return (array_module(rows).expand_dims(rows, axis=0),)


def _entry_forward(
    p: ViTParams,
    images: Array,
    config: ViTConfig,
    ops: Ops,
    rng: Source,
    keep: bool,
    constants: Sequence[Array] | None,
) -> tuple[Array, EntryCache | None, Grid]:
    """images (B, C_0, H, W) to tokens (B, 1 + n, C), the cls token first, and their grid."""
    xp = array_module(images)
    P, C, side = config.patch_size, config.embed_dim, config.table_sides[0]
    grid = (images.shape[2] // P, images.shape[3] // P)
    x = xp.permute_dims(images, (0, 2, 3, 1))  # (B, H, W, C_0)
    x, embed_cache = ops[patch_embed].forward(
        p.patch_embed, x, ops, config.norm_eps, keep=keep
    )  # (B, n, C)
    token = xp.broadcast_to(p.cls_token, (x.shape[0], 1, C))  # (B, 1, C)
    x = xp.concat((token, x), axis=1)  # (B, 1 + n, C)
    # resized beforehand, the table's grid is that of the tokens
    table, table_grid = (p.pos_embed, (side, side)) if constants is None else (constants[0], grid)
    x, position_cache = ops[position].forward(
        table, x, ops, grid, table_grid, True, config.position_resize, keep=keep
    )
    drop_rng = generator_at(rng, What.STAGE_DROPOUT, 1)
    x, drop_cache = ops[dropout].forward(None, x, ops, config.drop_rate, drop_rng, keep=keep)
    return x, EntryCache(embed_cache, position_cache, drop_cache) if keep else None, grid


def _entry_backward(
    p: ViTParams, cache: EntryCache, dx: Array, ops: Ops
) -> tuple[Array, dict[str, Any]]:
    """Back from tokens dx (B, 1 + n, C) to the images, and the gradients of the weights passed."""
    xp = array_module(dx)
    # x = dropout(x + positions)
    dx, _ = ops[dropout].backward(None, cache.drop, dx, ops)
    dx, dpos = ops[position].backward(p.pos_embed, cache.position, dx, ops)
    # x = [cls; x], the same cls token for every sample
    dcls, _ = ops[sum_rows].forward(None, dx[:, 0, :], ops, keep=False)  # (C,)
    dcls = xp.reshape(dcls, (1, 1, -1))  # (1, 1, C)
    # x = patch_embed(images)
    dmap, dembed = ops[patch_embed].backward(p.patch_embed, cache.patch_embed, dx[:, 1:, :], ops)
    dimages = xp.permute_dims(dmap, (0, 3, 1, 2))
    return dimages, {"cls_token": dcls, "pos_embed": dpos, "patch_embed": dembed}


def forward(
    params: ViTParams,
    images: Array,
    config: ViTConfig,
    ops: Ops,
    rng: Source = None,
    keep: bool = True,
    constants: Sequence[Array] | None = None,
) -> tuple[Array, ClassifierCache | None]:
    """The classifier: all blocks, a layer norm, and the head on the cls row.

    Args:
        params: the weights.
        images: (B, C_0, H, W) of the weights' dtype.
        config: the configuration of the weights, embed_dim (C) and patch_size (P).
        ops: the table of operations.
        rng: source of the dropout and drop-path masks; None for inference.
        keep: whether to return a cache for the backward.
        constants: of :func:`prepare`; only without keep.

    Returns:
        logits (B, num_classes) and the cache.
    """
    x, entry, grid = _entry_forward(params, images, config, ops, rng, keep, constants)
    tokens_shape = x.shape  # (B, 1 + n, C)
    first = [x]
    del x  # or these tokens would live as long as the blocks compute
    x, blocks_cache = ops[transformer.blocks].forward(
        params.blocks, first.pop(), ops, grid, block_settings(config), rng, keep=keep
    )  # (B, 1 + n, C)
    x, norm_cache = ops[layer_norm].forward(params.norm, x, ops, config.norm_eps, keep=keep)
    logits, head_cache = ops[linear].forward(params.head, x[:, 0, :], ops, keep=keep)
    if entry is None:
        return logits, None
    return logits, ClassifierCache(entry, blocks_cache, norm_cache, head_cache, tokens_shape)


def backward(
    params: ViTParams, cache: ClassifierCache, dlogits: Array, ops: Ops
) -> tuple[ViTParams, Array]:
    """Gradients of :func:`forward`: of the weights, and dL/dimages (B, C_0, H, W).

    Only the cls row of the last tokens is read, so dL/dtokens is zero in all other rows.
    """
    # logits = head(x[:, 0])
    xp = array_module(dlogits)
    B, tokens, C = cache.tokens_shape
    n = tokens - 1
    dcls_row, dhead = ops[linear].backward(params.head, cache.head, dlogits, ops)  # (B, C)
    unread = xp.zeros((B, n, C), dtype=dlogits.dtype)
    dx = xp.concat((xp.expand_dims(dcls_row, axis=1), unread), axis=1)  # (B, 1 + n, C)
    # x = norm(x)
    dx, dnorm = ops[layer_norm].backward(params.norm, cache.norm, dx, ops)
    # x = blocks(x)
    dx, dblocks = ops[transformer.blocks].backward(params.blocks, cache.blocks, dx, ops)
    dimages, dentry = _entry_backward(params, cache.entry, dx, ops)
    return ViTParams(**dentry, blocks=dblocks, norm=dnorm, head=dhead), dimages


def forward_pyramid(
    params: ViTParams,
    images: Array,
    config: ViTConfig,
    ops: Ops,
    rng: Source = None,
    keep: bool = True,
    constants: Sequence[Array] | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[list[Array], MapsCache | None]:
    """The patch tokens after a block as a map, as SETR's heads take them (arXiv 2012.15840).

    Without the cls token, and before the final norm. Blocks after the last number are not computed.

    Args:
        params: the weights.
        images: (B, C_0, H, W) of the weights' dtype.
        config: the configuration of the weights, embed_dim (C) and patch_size (P).
        ops: the table of operations.
        rng: source of the dropout and drop-path masks; None for inference.
        keep: whether to return a cache for the backward.
        constants: of :func:`prepare`; only without keep.
        numbers: of the blocks, from 0, each larger than the one before; None is the last block.

    Returns:
        A map (B, C, H/P, W/P) for each number, and the cache.
    """
    xp = array_module(images)
    settings = block_settings(config)
    ends = (config.depth,) if numbers is None else tuple(k + 1 for k in numbers)
    x, entry, grid = _entry_forward(params, images, config, ops, rng, keep, constants)
    maps, caches = [], []
    for part in _parts(ends):
        before = [x]
        del x  # or these tokens would live as long as the blocks compute
        x, cache = ops[transformer.blocks].forward(
            params.blocks[part], before.pop(), ops, grid, settings[part], rng, keep=keep
        )  # (B, 1 + n, C)
        as_map = xp.reshape(x[:, 1:, :], (x.shape[0], *grid, x.shape[-1]))
        maps.append(xp.permute_dims(as_map, (0, 3, 1, 2)))
        caches.append(cache)
    return maps, None if entry is None else MapsCache(entry, tuple(caches), ends)


def backward_pyramid(
    params: ViTParams, cache: MapsCache, dmaps: Sequence[Array], ops: Ops
) -> tuple[ViTParams, Array]:
    """Gradients of :func:`forward_pyramid`, from dmaps (B, C, H/P, W/P), one for each map.

    A map is both an output and the input of the next block, so two gradients meet in it. The cls
    row is in no map: its gradient comes from the patches that attend to it. Weights that the maps
    do not use get zeros.
    """
    xp = array_module(dmaps[0])
    dblocks = zeros_like(params.blocks[cache.ends[-1] :])
    dx = None
    parts = list(_parts(cache.ends))
    for part, blocks_cache, dmap in reversed(list(zip(parts, cache.blocks, dmaps, strict=True))):
        B, C, h, w = dmap.shape
        n = h * w
        # map = x[:, 1:]
        dpatches = xp.reshape(xp.permute_dims(dmap, (0, 2, 3, 1)), (B, n, C))  # (B, n, C)
        dcls_row = xp.zeros((B, 1, C), dtype=dmap.dtype)
        dtokens = xp.concat((dcls_row, dpatches), axis=1)  # (B, 1 + n, C)
        dx = dtokens if dx is None else dtokens + dx  # the map, and the next block
        # x = blocks(x)
        dx, dpart = ops[transformer.blocks].backward(params.blocks[part], blocks_cache, dx, ops)
        dblocks = dpart + dblocks  # tuples
    dimages, dentry = _entry_backward(params, cache.entry, dx, ops)
    unread = {"norm": zeros_like(params.norm), "head": zeros_like(params.head)}
    return ViTParams(**dentry, blocks=dblocks, **unread), dimages


def _parts(ends: Sequence[int]) -> Iterator[slice]:
    """The blocks up to the first end, from there to the second, and so on."""
    for start, end in pairwise((0, *ends)):
        yield slice(start, end)
