"""One transformer block: attention, then the MLP, each normalised first and added to its input.

Paper section 3.3. The norms come before the branches, as in ViT (arXiv 2010.11929, eq. 2 and 3).
"""

from dataclasses import dataclass
from typing import Any

from pvt_ref.arrays import Array, Grid
from pvt_ref.blocks.conv_mlp import ConvMLPParams, conv_mlp
from pvt_ref.blocks.linear_sra import LinearSRAParams, linear_sra
from pvt_ref.blocks.mha import MHAParams, mha
from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.blocks.sra import SRAParams, SRASettings, sra
from pvt_ref.draws import Rng, Source, What, generator_at
from pvt_ref.layers.dropout import drop_path
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """The settings of a block, besides its weights."""

    norm_eps: float  # of both norms
    attn: SRASettings
    drop_rate: float = 0.0  # of the MLP
    drop_path_rate: float = 0.0
    number: int = 0  # its number in the network, from 0; identifies the block's random draws
    has_relu: bool = False  # before the convolution, if the MLP has one


#: The operation of an attention, by the type of its weights.
ATTENTIONS: dict[type, Operation] = {SRAParams: sra, LinearSRAParams: linear_sra, MHAParams: mha}

#: The operation of an MLP, by the type of its weights.
MLPS: dict[type, Operation] = {MLPParams: mlp, ConvMLPParams: conv_mlp}


@record
class BlockParams:
    """The weights of one block, or their gradients; the types of attn and mlp choose its kind."""

    norm1: LayerNormParams
    attn: Any  # a key of ATTENTIONS
    norm2: LayerNormParams
    mlp: Any  # a key of MLPS


@record
class BlockCache:
    """The caches of the parts; a drop path's (path1, path2) is None if nothing was dropped."""

    norm1: Any
    attn: Any
    path1: Any
    norm2: Any
    mlp: Any
    path2: Any


def block_forward(
    p: BlockParams,
    x: Array,
    ops: Ops,
    grid: Grid,
    settings: BlockSettings,
    rng: Rng = None,
    keep: bool = True,
) -> tuple[Array, BlockCache | None]:
    """x + SRA(LN(x)), then the same with the MLP (paper section 3.3)::

        x <- x + DropPath(SRA(LN_1(x)))
        x <- x + DropPath(MLP(LN_2(x)))

    Args:
        p: the weights.
        x: tokens (B, n, C), of the weights' dtype.
        ops: the table of operations.
        grid: (H_i, W_i) of the tokens, multiples of R.
        settings: of the block.
        rng: source of the dropout and drop-path masks; None for inference.
        keep: whether to return a cache for the backward.

    Returns:
        (B, n, C) of x's dtype, and the cache.
    """
    eps, rate = settings.norm_eps, settings.drop_path_rate
    branch, norm1_cache = ops[layer_norm].forward(p.norm1, x, ops, eps, keep=keep)  # (B, n, C)
    attention = ops[ATTENTIONS[type(p.attn)]]
    branch, attn_cache = attention.forward(p.attn, branch, ops, grid, settings.attn, rng, keep=keep)
    branch, path1_cache = ops[drop_path].forward(None, branch, ops, rate, rng, keep=keep)
    x = x + branch  # (B, n, C)
    branch, norm2_cache = ops[layer_norm].forward(p.norm2, x, ops, eps, keep=keep)  # (B, n, C)
    # a convolution needs the grid of the tokens
    told = (grid, settings.has_relu) if isinstance(p.mlp, ConvMLPParams) else ()
    branch, mlp_cache = ops[MLPS[type(p.mlp)]].forward(
        p.mlp, branch, ops, *told, settings.drop_rate, rng, keep=keep
    )  # (B, n, C)
    branch, path2_cache = ops[drop_path].forward(None, branch, ops, rate, rng, keep=keep)
    x = x + branch  # (B, n, C)
    if not keep:
        return x, None
    return x, BlockCache(norm1_cache, attn_cache, path1_cache, norm2_cache, mlp_cache, path2_cache)


def block_backward(
    p: BlockParams, cache: BlockCache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, BlockParams]:
    """Gradients of :func:`block_forward`.

    Where the forward splits x into a branch and a skip, the backward adds their two gradients: for
    y = x + f(x), dL/dx = dL/dy + J_f^T dL/dy.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dy (B, n, C).
        ops: the table that the forward was given.

    Returns:
        dx (B, n, C) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    # x = x + droppath(mlp(norm2(x)))
    dbranch, _ = ops[drop_path].backward(None, cache.path2, dy, ops)  # (B, n, C)
    dbranch, dmlp = ops[MLPS[type(p.mlp)]].backward(p.mlp, cache.mlp, dbranch, ops)
    dbranch, dnorm2 = ops[layer_norm].backward(p.norm2, cache.norm2, dbranch, ops)
    dx = dbranch + dy  # branch + skip
    # x = x + droppath(sra(norm1(x)))
    dbranch, _ = ops[drop_path].backward(None, cache.path1, dx, ops)  # (B, n, C)
    attention = ops[ATTENTIONS[type(p.attn)]]
    dbranch, dattn = attention.backward(p.attn, cache.attn, dbranch, ops)
    dbranch, dnorm1 = ops[layer_norm].backward(p.norm1, cache.norm1, dbranch, ops)
    dx = dbranch + dx  # branch + skip
    return dx, BlockParams(dnorm1, dattn, dnorm2, dmlp)


def blocks_forward(
    p: tuple[BlockParams, ...],
    x: Array,
    ops: Ops,
    grid: Grid,
    settings: tuple[BlockSettings, ...],
    rng: Source = None,
    keep: bool = True,
) -> tuple[Array, tuple[Any, ...] | None]:
    """All blocks of a stage in order; a twin may fuse the end of one with the start of the next.

    Args:
        p: the weights of each block.
        x: tokens (B, n, C), of the weights' dtype.
        ops: the table of operations.
        grid: (H_i, W_i) of the tokens, multiples of R.
        settings: of each block.
        rng: as for :func:`block_forward`; of :class:`~pvt_ref.draws.Draws` each takes its own.
        keep: whether to return a cache for the backward.

    Returns:
        (B, n, C) of x's dtype, and the cache.
    """
    caches = []
    for p_k, settings_k in zip(p, settings, strict=True):
        rng_k = generator_at(rng, What.BLOCK, settings_k.number)
        x, cache = ops[block].forward(p_k, x, ops, grid, settings_k, rng_k, keep=keep)  # (B, n, C)
        caches.append(cache)
    return x, tuple(caches) if keep else None


def blocks_backward(
    p: tuple[BlockParams, ...], cache: tuple[Any, ...], dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, tuple[BlockParams, ...]]:
    """Gradients of :func:`blocks_forward`: the backward of each block, from last to first.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dy (B, n, C).
        ops: the table that the forward was given.

    Returns:
        dx (B, n, C) and the gradients of each block's weights, all of dy's dtype.
    """
    grads = []
    for p_k, cache_k in zip(reversed(p), reversed(cache), strict=True):
        dy, dblock = ops[block].backward(p_k, cache_k, dy, ops)  # (B, n, C)
        grads.append(dblock)
    return dy, tuple(reversed(grads))


block = Operation(block_forward, block_backward)
blocks = Operation(blocks_forward, blocks_backward)
