"""The blocks of a stage on CUDA: each residual sum is fused with the norm that follows it.

The norm after the second sum of a block is the first norm of the next block. That is why all blocks
of a stage are one operation. The parts between the norms come from the table, with two exceptions.
The norm before spatial reduction writes the tokens patch by patch, so no patches have to be cut
out. And where nothing is dropped, the last product of an attention or of a plain MLP adds the
residual.
"""

from typing import Any, NamedTuple

from pvt_ref.arrays import Array, Grid
from pvt_ref.blocks.mha import mha
from pvt_ref.blocks.mlp import mlp
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
from pvt_ref.draws import Rng, Source, What, generator_at
from pvt_ref.kernels.cuda.launch import Cuda, Kernel, Order
from pvt_ref.kernels.cuda.layer_norm import (
    RASTER,
    add_and_norm_rows,
    can_norm,
    norm_backward_rows,
    norm_rows,
)
from pvt_ref.kernels.cuda.mlp import can_mlp, mlp_rows
from pvt_ref.kernels.cuda.product import fuses_residual
from pvt_ref.kernels.cuda.sra import order_of, sra_backward, sra_forward
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import drop_path, dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.linear import linear
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.softmax import softmax
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class BlocksCache:
    """The cache of each block, which holds caches of these kernels, and its order of tokens.

    An order is None if the table's own attention was used.
    """

    blocks: tuple[BlockCache, ...]
    orders: tuple[Order | None, ...]


class _BranchArgs(NamedTuple):
    """Arguments that both branches of a block share."""

    ops: Ops
    grid: Grid
    settings: BlockSettings
    rng: Rng
    keep: bool
    cuda: Cuda

    def fuses(self, x: Array) -> bool:
        """Whether a branch's last product may add the residual: only if nothing is dropped."""
        settings = self.settings
        rates = (settings.drop_path_rate, settings.drop_rate, settings.attn.drop_rate)
        return fuses_residual(x, self.cuda) and (self.rng is None or not any(rates))


def _after_attention(
    p: BlockParams, x: Array, y: Array, order: Order | None, args: _BranchArgs
) -> tuple[Array, Array | None, Any, Any]:
    """x (B, n, C) + SRA(y) and None, or x and the branch to add; caches of SRA and drop path."""
    ops, grid, settings, rng, keep, cuda = args
    if order is not None:
        residual = x if args.fuses(x) else None
        inputs = (p.attn, y, ops, order, settings.attn, rng, keep, cuda)
        branch, cache = sra_forward(*inputs, residual)  # (B, n, C)
        if residual is not None:
            return branch, None, cache, None
    else:
        branch, cache = ops[ATTENTIONS[type(p.attn)]].forward(
            p.attn, y, ops, grid, settings.attn, rng, keep=keep
        )  # (B, n, C)
    rate = settings.drop_path_rate
    branch, path_cache = ops[drop_path].forward(None, branch, ops, rate, rng, keep=keep)
    return x, branch, cache, path_cache


def _after_mlp(
    p: BlockParams, x: Array, y: Array, args: _BranchArgs
) -> tuple[Array, Array | None, Any, Any]:
    """The same for x (B, n, C) + MLP(y)."""
    ops, grid, settings, rng, keep, cuda = args
    is_plain = MLPS[type(p.mlp)] == mlp
    if is_plain and args.fuses(x) and can_mlp(p.mlp, y, settings.drop_rate, rng):
        total, cache = mlp_rows(p.mlp, y, keep, cuda, x)  # (B, n, C)
        return total, None, cache, None
    more = () if is_plain else (grid, settings.has_relu)
    branch, cache = ops[MLPS[type(p.mlp)]].forward(
        p.mlp, y, ops, *more, settings.drop_rate, rng, keep=keep
    )  # (B, n, C)
    rate = settings.drop_path_rate
    branch, path_cache = ops[drop_path].forward(None, branch, ops, rate, rng, keep=keep)
    return x, branch, cache, path_cache


def _sum_and_norm(
    p: LayerNormParams,
    x: Array,
    branch: Array | None,
    eps: float,
    cuda: Cuda,
    order: Order | None = None,
) -> tuple[Array, Array, Any]:
    """x (B, n, C) + branch, or x if it is the sum already; its norm in this order; the cache."""
    order = order or RASTER
    if branch is None:
        return x, *norm_rows(p, x, eps, cuda, order)
    return add_and_norm_rows(p, x, branch, eps, cuda, order)


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
    # the order of tokens that each block's attention needs from the norm before it
    orders = [
        order_of(p_k.attn, x, grid, settings_k.attn, rng)
        for p_k, settings_k in zip(p, settings, strict=True)
    ]
    first = orders[0] or RASTER
    y, norm1_cache = norm_rows(p[0].norm1, x, settings[0].norm_eps, cuda, first)  # (B, n, C)
    for k, (p_k, settings_k, order) in enumerate(zip(p, settings, orders, strict=True)):
        rng_k, eps = generator_at(rng, What.BLOCK, settings_k.number), settings_k.norm_eps
        args = _BranchArgs(ops, grid, settings_k, rng_k, keep, cuda)
        x, branch, attn_cache, path1_cache = _after_attention(p_k, x, y, order, args)
        x, y, norm2_cache = _sum_and_norm(p_k.norm2, x, branch, eps, cuda)  # (B, n, C)
        x, branch, mlp_cache, path2_cache = _after_mlp(p_k, x, y, args)
        if keep:
            parts = (norm1_cache, attn_cache, path1_cache, norm2_cache, mlp_cache, path2_cache)
            caches.append(BlockCache(*parts))
        if k < last:
            x, y, norm1_cache = _sum_and_norm(
                p[k + 1].norm1, x, branch, settings[k + 1].norm_eps, cuda, orders[k + 1]
            )  # (B, n, C) each
        elif branch is not None:
            x = x + branch  # (B, n, C)
    return x, BlocksCache(tuple(caches), tuple(orders)) if keep else None


def blocks_backward(
    p: tuple[BlockParams, ...], cache: Any, dy: Array, ops: Ops, *, cuda: Cuda
) -> tuple[Array, tuple[BlockParams, ...]]:
    """As :func:`pvt_ref.blocks.transformer.blocks_backward`; the norm's kernel adds the skip."""
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
        if order is not None:
            dbranch, dattn = sra_backward(p_k.attn, c.attn, dbranch, ops, cuda)
        else:
            dbranch, dattn = ops[ATTENTIONS[type(p_k.attn)]].backward(
                p_k.attn, c.attn, dbranch, ops
            )  # (B, n, C)
        # branch + skip
        dy, dnorm1 = norm_backward_rows(p_k.norm1, c.norm1, dbranch, dx, cuda, order or RASTER)
        grads.append(BlockParams(dnorm1, dattn, dnorm2, dmlp))
    return dy, tuple(reversed(grads))


blocks_kernel = Kernel(
    blocks,
    blocks_forward,
    blocks_backward,
    absorbs=(
        *(block, layer_norm, sum_rows, sra, mha, patch_embed, attention, softmax, dropout),
        *(drop_path, mlp, linear, gelu),
    ),
)
