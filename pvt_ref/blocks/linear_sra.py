"""Linear spatial-reduction attention of PVT v2 (arXiv 2106.13797): 49 keys for any image.

SRA cuts the map into patches of R x R tokens; this averages it to 7 x 7 cells instead, so the cost
of attention is linear in n. A map of fewer than 7 rows is enlarged.
"""

from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.blocks.sra import SRASettings, keys_and_values, merge_heads, split_heads
from pvt_ref.draws import Rng
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import PatchEmbedParams, patch_embed
from pvt_ref.layers.pool import pool
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record

#: Rows and columns of cells: m = 49.
CELLS = (7, 7)


@record
class LinearSRAParams:
    """W^Q, W^K over W^V, W^O and the reduction, or their gradients: as of an SRA with R = 1.

    Rows 0 to C-1 of kv (2C, C) give the keys, the others the values; q and kv may lack biases. The
    kernel sr is (C, C, 1, 1), a linear layer of each cell.
    """

    q: LinearParams
    kv: LinearParams
    proj: LinearParams
    sr: LinearParams
    norm: LayerNormParams


@record
class LinearSRACache:
    """The caches of the parts, and N; drop is None if nothing was dropped."""

    q: Any
    pool: Any
    sr: Any
    gelu: Any
    kv: Any
    attention: Any
    proj: Any
    drop: Any
    num_heads: int


def linear_sra_forward(
    p: LinearSRAParams,
    x: Array,
    ops: Ops,
    grid: Grid,
    settings: SRASettings,
    rng: Rng = None,
    keep: bool = True,
) -> tuple[Array, LinearSRACache | None]:
    """SRA (PVT's eq. 1 and 2) with GELU(LN(Pool(x) W^S)) for SR(x): the paper's Linear SRA.

    Args:
        p: the weights, sr.weight (C, C, 1, 1).
        x: tokens (B, n, C), of the weights' dtype, without a cls token.
        ops: the table of operations.
        grid: (H_i, W_i) of the tokens, of any size.
        settings: num_heads (N), scale, eps and dropout rates.
        rng: source of the dropout masks; None for inference.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, n, C) of x's dtype, and the cache.
    """
    xp, N, eps = array_module(x), settings.num_heads, settings.norm_eps
    q, q_cache = ops[linear].forward(p.q, x, ops, keep=keep)  # (B, n, C)
    token_map = xp.reshape(x, (x.shape[0], *grid, x.shape[-1]))  # (B, H_i, W_i, C)
    cells, pool_cache = ops[pool].forward(None, token_map, ops, CELLS, keep=keep)  # (B, 7, 7, C)
    reduction = PatchEmbedParams(p.sr, p.norm)  # patches of one cell
    cells, sr_cache = ops[patch_embed].forward(reduction, cells, ops, eps, keep=keep)  # (B, 49, C)
    cells, gelu_cache = ops[gelu].forward(None, cells, ops, keep=keep)  # (B, 49, C)
    kv, kv_cache = ops[linear].forward(p.kv, cells, ops, keep=keep)  # (B, 49, 2C)
    k, v = keys_and_values(kv, N)  # (B, N, 49, d) each
    heads, attention_cache = ops[attention].forward(
        None, (split_heads(q, N), k, v), ops, settings.scale, settings.attn_drop_rate, rng, keep
    )  # (B, N, n, d)
    y, proj_cache = ops[linear].forward(p.proj, merge_heads(heads), ops, keep=keep)  # (B, n, C)
    y, drop_cache = ops[dropout].forward(None, y, ops, settings.drop_rate, rng, keep)
    if not keep:
        return y, None
    return y, LinearSRACache(
        q_cache, pool_cache, sr_cache, gelu_cache, kv_cache, attention_cache, proj_cache,
        drop_cache, N,
    )  # fmt: skip


def linear_sra_backward(
    p: LinearSRAParams, cache: LinearSRACache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, LinearSRAParams]:
    """Gradients of :func:`linear_sra_forward`.

    x is used twice, by the queries and by the pooling, so two gradients meet in dx.

    Args:
        p: the weights, sr.weight (C, C, 1, 1).
        cache: from the forward, num_heads (N), pool.size (H_i, W_i).
        dy: dL/dy (B, n, C).
        ops: the table that the forward was given.

    Returns:
        dx (B, n, C) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    xp, reduction = array_module(dy), PatchEmbedParams(p.sr, p.norm)
    # y = dropout(Concat(heads) W^O)
    dy, _ = ops[dropout].backward(None, cache.drop, dy, ops)  # (B, n, C)
    dmerged, dproj = ops[linear].backward(p.proj, cache.proj, dy, ops)  # (B, n, C)
    # heads = Attention(q, k, v)
    dheads = split_heads(dmerged, cache.num_heads)  # (B, N, n, d)
    (dq, dk, dv), _ = ops[attention].backward(None, cache.attention, dheads, ops)
    # k, v = the two halves of cells W^KV
    dkv = xp.concat((merge_heads(dk), merge_heads(dv)), axis=-1)  # (B, 49, 2C)
    dcells, dkv_params = ops[linear].backward(p.kv, cache.kv, dkv, ops)  # (B, 49, C)
    # cells = gelu(LN(cells W^S))
    dcells, _ = ops[gelu].backward(None, cache.gelu, dcells, ops)  # (B, 49, C)
    dcells, dreduction = ops[patch_embed].backward(reduction, cache.sr, dcells, ops)  # (B, 7, 7, C)
    # cells = pool(x)
    dmap, _ = ops[pool].backward(None, cache.pool, dcells, ops)  # (B, H_i, W_i, C)
    dx_keys = xp.reshape(dmap, dy.shape)  # (B, n, C)
    # q = x W^Q
    dx_queries, dq_params = ops[linear].backward(p.q, cache.q, merge_heads(dq), ops)  # (B, n, C)
    dx = dx_queries + dx_keys  # x was the input of both
    grads = LinearSRAParams(dq_params, dkv_params, dproj, dreduction.proj, dreduction.norm)
    return dx, grads


linear_sra = Operation(linear_sra_forward, linear_sra_backward)
