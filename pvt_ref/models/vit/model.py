"""The weights and passes of a columnar ViT: one stage of a PVT with R = 1, and its classifier."""

import math
from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.blocks.transformer import BlockParams, blocks
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import PatchEmbedParams, patch_embed
from pvt_ref.layers.position import position, positions
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.models import parts
from pvt_ref.models.architecture import Leaf
from pvt_ref.models.vit.config import NORM_EPS, ViTConfig, block_settings
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class ViTParams:
    """The weights of a ViT, or their gradients.

    Attributes:
        cls_token: (1, 1, C).
        pos_embed: (1, 1 + n, C), row 0 is the cls token's.
        patch_embed: projection (C, C_0, P, P) and its bias, without a norm.
        blocks: of width C.
        norm: the final norm, (C,) each.
        head: weight (num_classes, C), bias (num_classes,).
    """

    cls_token: Array
    pos_embed: Array
    patch_embed: PatchEmbedParams
    blocks: tuple[BlockParams, ...]
    norm: LayerNormParams
    head: LinearParams


def build_params(config: ViTConfig, make: parts.Make) -> ViTParams:
    """A record of parameters, every array made by ``make(leaf)``."""
    C, hidden = config.embed_dim, config.mlp_ratio * config.embed_dim
    proj = "patch_embed.proj", C, config.in_chans, config.patch_size
    return ViTParams(
        cls_token=make(Leaf("cls_token", (1, 1, C), "normal")),
        pos_embed=make(Leaf("pos_embed", (1, 1 + math.prod(config.table_grid), C), "normal")),
        patch_embed=PatchEmbedParams(parts.projection(make, *proj), norm=None),
        blocks=tuple(parts.block(make, f"blocks.{k}", C, hidden, 1) for k in range(config.depth)),
        norm=parts.norm(make, "norm", C),
        head=parts.linear(make, "head", config.num_classes, C),
    )


def prepare(params: ViTParams, config: ViTConfig, size: tuple[int, int]) -> Array:
    """(1, 1 + n, C): the position table, resized for images of that size."""
    rows = positions(params.pos_embed, config.grids(*size)[0], config.table_grid, True)
    return array_module(rows).expand_dims(rows, axis=0)


def forward(
    params: ViTParams,
    images: Array,
    config: ViTConfig,
    ops: Ops,
    rng: Any = None,
    keep: bool = True,
    constants: Array | None = None,
) -> tuple[Array, tuple[Any, ...] | None]:
    """Logits (B, num_classes), of the cls row after all blocks, norm and head; and the cache."""
    xp = array_module(images)
    (grid,) = config.grids(*images.shape[2:])
    x = xp.permute_dims(images, (0, 2, 3, 1))  # (B, H, W, C_0)
    x, embed_cache = ops[patch_embed].forward(params.patch_embed, x, ops, NORM_EPS, keep=keep)
    token = xp.broadcast_to(params.cls_token, (x.shape[0], 1, x.shape[-1]))  # (B, 1, C)
    x = xp.concat((token, x), axis=1)  # (B, 1 + n, C)
    table, table_grid = params.pos_embed, config.table_grid
    if constants is not None:
        table, table_grid = constants, grid
    x, position_cache = ops[position].forward(table, x, ops, grid, table_grid, True, keep=keep)
    first, shape = [x], x.shape
    del x  # or these tokens would live as long as the blocks compute
    x, blocks_cache = ops[blocks].forward(
        params.blocks, first.pop(), ops, grid, block_settings(config), rng, keep=keep
    )  # (B, 1 + n, C)
    x, norm_cache = ops[layer_norm].forward(params.norm, x, ops, NORM_EPS, keep=keep)
    logits, head_cache = ops[linear].forward(params.head, x[:, 0, :], ops, keep=keep)
    if not keep:
        return logits, None
    return logits, (embed_cache, position_cache, blocks_cache, norm_cache, head_cache, shape)


def backward(
    params: ViTParams, cache: tuple[Any, ...], dlogits: Array, ops: Ops
) -> tuple[ViTParams, Array]:
    """Gradients of :func:`forward`: of the weights, and dL/dimages (B, C_0, H, W)."""
    xp = array_module(dlogits)
    embed_cache, position_cache, blocks_cache, norm_cache, head_cache, (B, n, C) = cache
    # logits = head(norm(x)[:, 0])
    drow, dhead = ops[linear].backward(params.head, head_cache, dlogits, ops)  # (B, C)
    drow = xp.expand_dims(drow, axis=1)  # (B, 1, C)
    unread = xp.zeros_like(xp.broadcast_to(drow, (B, n - 1, C)))  # (B, n - 1, C)
    dx = xp.concat((drow, unread), axis=1)  # (B, n, C)
    dx, dnorm = ops[layer_norm].backward(params.norm, norm_cache, dx, ops)
    # x = blocks([cls; patches] + positions)
    dx, dblocks = ops[blocks].backward(params.blocks, blocks_cache, dx, ops)
    dx, dpos = ops[position].backward(params.pos_embed, position_cache, dx, ops)
    dcls, _ = ops[sum_rows].forward(None, dx[:, 0, :], ops, keep=False)  # (C,)
    dcls = xp.reshape(dcls, (1, 1, -1))  # (1, 1, C)
    # patches = patch_embed(images)
    dx, dembed = ops[patch_embed].backward(params.patch_embed, embed_cache, dx[:, 1:, :], ops)
    grads = ViTParams(dcls, dpos, dembed, dblocks, dnorm, dhead)
    return grads, xp.permute_dims(dx, (0, 3, 1, 2))  # (B, C_0, H, W)
