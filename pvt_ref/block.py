"""One transformer block: attention, then the MLP, each normalised first and added to its input.

Paper section 3.3. The norms stand before the branches, as in ViT (Dosovitskiy et al. 2021, arXiv
2010.11929, eq. 2 and 3).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, short_repr
from pvt_ref.config import StageConfig
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.mlp import MLPParams
from pvt_ref.layers.sra import SRAParams
from pvt_ref.ops import Ops


@dataclass(frozen=True, slots=True, eq=False)
class BlockParams:
    """The weights of one block, or their gradients.

    Attributes:
        norm1: before attention, weight and bias (C,) each.
        attn: W^Q (C, C), W^K over W^V (2C, C), W^O (C, C), and the spatial reduction (C, C, R, R).
        norm2: before the MLP, weight and bias (C,) each.
        mlp: fc1 (E*C, C) and fc2 (C, E*C).
    """

    norm1: LayerNormParams
    attn: SRAParams
    norm2: LayerNormParams
    mlp: MLPParams

    __repr__ = short_repr


@dataclass(frozen=True, slots=True, eq=False)
class BlockCache:
    """The caches of the parts, each for its own backward. Every part returned (B, n, C):

    Attributes:
        norm1: of the first norm.
        attn: of the attention.
        path1: of the drop path on it; None if nothing was dropped.
        norm2: of the second norm.
        mlp: of the MLP.
        path2: of the drop path on it; None if nothing was dropped.
    """

    norm1: Any
    attn: Any
    path1: Any
    norm2: Any
    mlp: Any
    path2: Any

    __repr__ = short_repr


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
    """x + SRA(LN(x)), then the same with the MLP (paper section 3.3)::

        x <- x + DropPath(SRA(LN_1(x)))
        x <- x + DropPath(MLP(LN_2(x)))

    Args:
        p: the weights.
        x: tokens (B, n, C), of the weights' dtype.
        ops: the record of operations.
        grid: (H_i, W_i) of the tokens, multiples of R.
        stage: settings of the stage.
        drop_path_rate: this block's own, in [0, 1).
        rng: source of the dropout and drop-path masks; None for inference.
        keep: whether a cache for the backward is returned; without it, it is None.

    Returns:
        (B, n, C) of x's dtype, and the cache.
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

    Where the forward splits x into a branch and a skip, the backward adds their two gradients: for
    y = x + f(x), dL/dx = dL/dy + J_f^T dL/dy.

    Args:
        p: the forward's weights.
        cache: from the forward.
        dy: dL/dy (B, n, C).
        ops: the record that the forward was given.
        stage: the forward's settings.

    Returns:
        dx (B, n, C) and the gradients of the weights, in the shapes of the weights, all of dy's
        dtype.
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
