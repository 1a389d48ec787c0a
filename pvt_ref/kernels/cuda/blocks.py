"""The blocks of a stage on CUDA: each residual sum together with the norm that follows it.

The norm after the second sum of a block is the next block's first, which is why all blocks of a
stage are one operation. What is between the norms is the table's, but for spatial reduction: the
norm before it writes the tokens patch by patch, so nothing has to be cut out.
"""

from typing import Any

from pvt_ref.arrays import Array, Grid
from pvt_ref.blocks.conv_mlp import ConvMLPParams
from pvt_ref.blocks.sra import sra
from pvt_ref.blocks.transformer import (
    ATTENTIONS,
    MLPS,
    BlockCache,
    BlockParams,
    BlockSettings,
    block,
    blocks,
)
from pvt_ref.draws import Source, What, generator_at
from pvt_ref.kernels.cuda.launch import Cuda, Kernel, Order
from pvt_ref.kernels.cuda.layer_norm import (
    add_and_norm_rows,
    can_norm,
    norm_backward_rows,
    norm_rows,
)
from pvt_ref.kernels.cuda.sra import order_of, sra_backward, sra_forward
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import drop_path, dropout
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.softmax import softmax
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class BlocksCache:
    """The cache of each block, with caches of these kernels inside, and its order of tokens."""

    blocks: tuple[BlockCache, ...]
    orders: tuple[Order, ...]


def blocks_forward(
    p: tuple[BlockParams, ...],
    x: Array,
    ops: Ops,
    grid: Grid,
    settings: tuple[BlockSettings, ...],
    rng: Source = None,
    keep: bool = True,
    *,
    cuda: Cuda,
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.blocks.transformer.blocks_forward`."""
    if not p or not can_norm(p[0].norm1, x):
        return blocks.forward(p, x, ops, grid, settings, rng, keep)
    caches, last = [], len(p) - 1
    # the order of tokens that each block's attention wants from the norm before it
    orders = [
        order_of(p_k.attn, x, grid, settings_k.attn, rng)
        for p_k, settings_k in zip(p, settings, strict=True)
    ]
    y, norm1_cache = norm_rows(p[0].norm1, x, settings[0].norm_eps, cuda, orders[0])  # (B, n, C)
    for k, (p_k, settings_k, order) in enumerate(zip(p, settings, orders, strict=True)):
        rng_k = generator_at(rng, What.BLOCK, settings_k.number)
        rate = settings_k.drop_path_rate
        if order.R > 1:
            branch, attn_cache = sra_forward(
                p_k.attn, y, ops, order, settings_k.attn, rng_k, keep, cuda
            )  # (B, n, C)
        else:
            branch, attn_cache = ops[ATTENTIONS[type(p_k.attn)]].forward(
                p_k.attn, y, ops, grid, settings_k.attn, rng_k, keep=keep
            )  # (B, n, C)
        branch, path1_cache = ops[drop_path].forward(None, branch, ops, rate, rng_k, keep=keep)
        x, y, norm2_cache = add_and_norm_rows(p_k.norm2, x, branch, settings_k.norm_eps, cuda)
        told = (grid, settings_k.has_relu) if isinstance(p_k.mlp, ConvMLPParams) else ()
        branch, mlp_cache = ops[MLPS[type(p_k.mlp)]].forward(
            p_k.mlp, y, ops, *told, settings_k.drop_rate, rng_k, keep=keep
        )  # (B, n, C)
        branch, path2_cache = ops[drop_path].forward(None, branch, ops, rate, rng_k, keep=keep)
        if keep:
            parts = (norm1_cache, attn_cache, path1_cache, norm2_cache, mlp_cache, path2_cache)
            caches.append(BlockCache(*parts))
        if k < last:
            x, y, norm1_cache = add_and_norm_rows(
                p[k + 1].norm1, x, branch, settings[k + 1].norm_eps, cuda, orders[k + 1]
            )  # (B, n, C) each
        else:
            x = x + branch  # (B, n, C)
    return x, BlocksCache(tuple(caches), tuple(orders)) if keep else None


def blocks_backward(
    p: tuple[BlockParams, ...], cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, tuple[BlockParams, ...]]:
    """As :func:`pvt_ref.blocks.transformer.blocks_backward`; a norm adds the skip."""
    if not isinstance(cache, BlocksCache):
        return blocks.backward(p, cache, dy, ops)
    grads = []
    for p_k, c, order in zip(
        reversed(p), reversed(cache.blocks), reversed(cache.orders), strict=True
    ):
        # x = x + droppath(mlp(norm2(x)))
        dbranch, _ = ops[drop_path].backward(None, c.path2, dy, ops)  # (B, n, C)
        dbranch, dmlp = ops[MLPS[type(p_k.mlp)]].backward(p_k.mlp, c.mlp, dbranch, ops)
        dx, dnorm2 = norm_backward_rows(p_k.norm2, c.norm2, dbranch, dy, cuda)  # branch + skip
        # x = x + droppath(sra(norm1(x)))
        dbranch, _ = ops[drop_path].backward(None, c.path1, dx, ops)  # (B, n, C)
        if order.R > 1:
            dbranch, dattn = sra_backward(p_k.attn, c.attn, dbranch, ops, cuda)
        else:
            dbranch, dattn = ops[ATTENTIONS[type(p_k.attn)]].backward(
                p_k.attn, c.attn, dbranch, ops
            )  # (B, n, C)
        # branch + skip
        dy, dnorm1 = norm_backward_rows(p_k.norm1, c.norm1, dbranch, dx, cuda, order)
        grads.append(BlockParams(dnorm1, dattn, dnorm2, dmlp))
    return dy, tuple(reversed(grads))


blocks_kernel = Kernel(
    blocks,
    blocks_forward,
    blocks_backward,
    (block, layer_norm, sum_rows, sra, patch_embed, attention, softmax, dropout),
)
