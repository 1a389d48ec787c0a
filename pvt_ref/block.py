"""One transformer block: attention, then the MLP, each normalised first and added to its input."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.arrays import Array
from pvt_ref.config import StageConfig
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.mlp import MLPParams
from pvt_ref.layers.sra import SRAParams
from pvt_ref.ops import Ops


@dataclass(frozen=True, slots=True, eq=False)
class BlockParams:
    """The weights of one block, or their gradients."""

    norm1: LayerNormParams
    attn: SRAParams
    norm2: LayerNormParams
    mlp: MLPParams


@dataclass(frozen=True, slots=True, eq=False)
class BlockCache:
    """The caches of the parts, each for its own backward."""

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
    grid: tuple[int, int],
    stage: StageConfig,
    drop_path_rate: float = 0.0,
    rng: np.random.Generator | None = None,
    keep: bool = True,
) -> tuple[Array, BlockCache | None]:
    """x + SRA(LN(x)), then the same with the MLP.

    Args:
        p: the weights.
        x: tokens (B, n, C).
        ops: the record of operations.
        grid: (H_i, W_i) of the tokens.
        stage: settings of the stage.
        drop_path_rate: this block's own.
        rng: source of the dropout and drop-path masks; None for inference.
        keep: whether a cache for the backward is returned; without it, it is None.

    Returns:
        (B, n, C) and the cache.
    """
    branch, norm1_cache = ops.layer_norm.forward(p.norm1, x, stage.norm_eps, keep=keep)
    branch, attn_cache = ops.sra.forward(p.attn, branch, ops, grid, stage, rng, keep=keep)
    branch, path1_cache = ops.drop_path.forward(branch, drop_path_rate, rng)
    x = x + branch  # (B, n, C)
    branch, norm2_cache = ops.layer_norm.forward(p.norm2, x, stage.norm_eps, keep=keep)
    branch, mlp_cache = ops.mlp.forward(p.mlp, branch, ops, stage.drop_rate, rng, keep=keep)
    branch, path2_cache = ops.drop_path.forward(branch, drop_path_rate, rng)
    x = x + branch  # (B, n, C)
    if not keep:
        return x, None
    return x, BlockCache(norm1_cache, attn_cache, path1_cache, norm2_cache, mlp_cache, path2_cache)


def block_backward(
    p: BlockParams, cache: BlockCache, dy: Array, ops: Ops, stage: StageConfig
) -> tuple[Array, BlockParams]:
    """Gradients of :func:`block_forward`.

    Where the forward splits x into a branch and a skip, the backward adds their two gradients.

    Args:
        dy: dL/dy (B, n, C).

    Returns:
        dx (B, n, C) and the gradients of the weights.
    """
    # x = x + droppath(mlp(norm2(x)))
    dbranch = ops.drop_path.backward(cache.path2, dy)  # (B, n, C)
    dbranch, dmlp = ops.mlp.backward(p.mlp, cache.mlp, dbranch, ops)
    dbranch, dnorm2 = ops.layer_norm.backward(p.norm2, cache.norm2, dbranch)
    dx = dbranch + dy  # branch + skip
    # x = x + droppath(sra(norm1(x)))
    dbranch = ops.drop_path.backward(cache.path1, dx)  # (B, n, C)
    dbranch, dattn = ops.sra.backward(p.attn, cache.attn, dbranch, ops, stage)
    dbranch, dnorm1 = ops.layer_norm.backward(p.norm1, cache.norm1, dbranch)
    dx = dbranch + dx  # branch + skip
    return dx, BlockParams(dnorm1, dattn, dnorm2, dmlp)
