"""Attention of a block on CUDA: with spatial reduction, or with every token as a key.

With reduction, the tokens are stored in R x R blocks. In that order the patches are contiguous
rows, so no patches have to be cut out. Attention does not depend on the order of its queries, and
writes its result in raster order. The caller, ``blocks.py``, stores the tokens in this order.

Without reduction, queries, keys and values come from the same rows, by one product as in a ViT: the
matrices W^Q and W^KV of a PVT are joined for that.
"""

from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.blocks.mha import MHAParams
from pvt_ref.blocks.sra import (
    SRAParams,
    SRASettings,
    keys_and_values,
    merge_heads,
    split_heads,
)
from pvt_ref.draws import Rng, Source
from pvt_ref.kernels.cuda.attention import attend, attention_backward, can_attend
from pvt_ref.kernels.cuda.launch import Cuda, Order
from pvt_ref.kernels.cuda.layer_norm import can_norm, norm_backward_rows, norm_rows
from pvt_ref.kernels.cuda.linear import linear_rows
from pvt_ref.kernels.cuda.weights import can_join, joined, taken_apart
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.linear import LinearCache, LinearParams, linear
from pvt_ref.layers.patch_embed import kernel_to_matrix, matrix_to_kernel
from pvt_ref.ops import Ops
from pvt_ref.tree import record


def order_of(p: Any, x: Array, grid: Grid, settings: SRASettings, rng: Source) -> Order | None:
    """The order in which this attention needs its tokens x (B, n, C).

    None: the kernels cannot compute this attention, and the table's own is used.
    """
    if not can_attend(x.shape[2] // settings.num_heads, settings.attn_drop_rate, rng):
        return None
    if isinstance(p, MHAParams) or can_join(p):
        return Order()
    if not isinstance(p, SRAParams) or p.sr is None or p.norm is None or not can_norm(p.norm, x):
        return None
    R = p.sr.weight.shape[-1]
    return Order(grid[1], R) if R > 1 else None


@record
class SRAInBlocksCache:
    """The caches of the parts, and N; drop is None if nothing was dropped.

    Without reduction, together has the joined weights, qkv is the cache of their product, and q,
    sr, norm and kv are None. With reduction, together and qkv are None.
    """

    together: MHAParams | None
    qkv: Any
    q: Any
    sr: Any
    norm: Any
    kv: Any
    attention: Any
    proj: Any
    drop: Any
    num_heads: int


def sra_forward(
    p: Any,
    x: Array,
    ops: Ops,
    order: Order,
    settings: SRASettings,
    rng: Rng,
    keep: bool,
    cuda: Cuda,
    residual: Array | None = None,
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.blocks.sra.sra_forward`, for tokens x (B, n, C) in the given order.

    p holds the weights of that function or of :func:`pvt_ref.blocks.mha.mha_forward`. If there is a
    residual (B, n, C), in raster order, it is added to y, and nothing is dropped.
    """
    xp, (B, n, C), N = array_module(x), x.shape, settings.num_heads
    together = qkv_cache = q_cache = sr_cache = norm_cache = kv_cache = None
    if order.R == 1:
        together = p if isinstance(p, MHAParams) else joined(p)
        y, qkv_cache = ops[linear].forward(together.qkv, x, ops, keep=keep)  # (B, n, 3C)
        qkv = (split_heads(y[..., :C], N), *keys_and_values(y[..., C:], N))
    else:
        q, q_cache = ops[linear].forward(p.q, x, ops, keep=keep)  # (B, n, C)
        matrix = LinearParams(kernel_to_matrix(p.sr.weight), p.sr.bias)  # (C, R*R*C)
        patches = xp.reshape(x, (B, -1, order.R * order.R * C))  # (B, m, R*R*C)
        reduced, sr_cache = ops[linear].forward(matrix, patches, ops, keep=keep)  # (B, m, C)
        reduced, norm_cache = norm_rows(p.norm, reduced, settings.norm_eps, cuda)  # (B, m, C)
        kv, kv_cache = ops[linear].forward(p.kv, reduced, ops, keep=keep)  # (B, m, 2C)
        qkv = (split_heads(q, N), *keys_and_values(kv, N))
    heads, attention_cache = attend(qkv, settings.scale, keep, cuda, order)  # (B, n, N, d)
    merged = xp.reshape(heads, (B, n, C))  # (B, n, C), in raster order
    if residual is not None:
        y = linear_rows(p.proj, merged, cuda, residual)  # (B, n, C)
        proj_cache, drop_cache = LinearCache(merged), None
    else:
        y, proj_cache = ops[linear].forward(p.proj, merged, ops, keep=keep)  # (B, n, C)
        y, drop_cache = ops[dropout].forward(None, y, ops, settings.drop_rate, rng, keep)
    if not keep:
        return y, None
    parts = (together, qkv_cache, q_cache, sr_cache, norm_cache, kv_cache)
    return y, SRAInBlocksCache(*parts, attention_cache, proj_cache, drop_cache, N)


def sra_backward(
    p: Any, cache: SRAInBlocksCache, dy: Array, ops: Ops, cuda: Cuda
) -> tuple[Array, Any]:
    """As :func:`pvt_ref.blocks.sra.sra_backward`; the tokens of dx have the forward's order."""
    xp, N = array_module(dy), cache.num_heads
    # y = dropout(Concat(heads) W^O)
    dy, _ = ops[dropout].backward(None, cache.drop, dy, ops)  # (B, n, C)
    dmerged, dproj = ops[linear].backward(p.proj, cache.proj, dy, ops)  # (B, n, C)
    # heads = Attention(q, k, v)
    dheads = split_heads(dmerged, N)  # (B, N, n, d)
    (dq, dk, dv), _ = attention_backward(None, cache.attention, dheads, ops, cuda=cuda)
    dq, dk, dv = map(merge_heads, (dq, dk, dv))  # (B, n, C), (B, m, C) twice
    if cache.together is not None:
        # q, k, v = the three thirds of x W^QKV
        dqkv = xp.concat((dq, dk, dv), axis=-1)  # (B, n, 3C)
        dx, dparams = ops[linear].backward(cache.together.qkv, cache.qkv, dqkv, ops)  # (B, n, C)
        grads = MHAParams(dparams, dproj)
        return dx, grads if isinstance(p, MHAParams) else taken_apart(grads)
    # k, v = the two halves of reduced W^KV
    dkv = xp.concat((dk, dv), axis=-1)  # (B, m, 2C)
    dreduced, dkv_params = ops[linear].backward(p.kv, cache.kv, dkv, ops)  # (B, m, C)
    # reduced = LN(patches W^S)
    dreduced, dnorm = norm_backward_rows(p.norm, cache.norm, dreduced, None, cuda)
    matrix = LinearParams(kernel_to_matrix(p.sr.weight), p.sr.bias)
    dpatches, dmatrix = ops[linear].backward(matrix, cache.sr, dreduced, ops)  # (B, m, R*R*C)
    dsr = LinearParams(matrix_to_kernel(dmatrix.weight, p.sr.weight.shape), dmatrix.bias)
    # q = x W^Q
    dx_queries, dq_params = ops[linear].backward(p.q, cache.q, dq, ops)  # (B, n, C)
    dx = dx_queries + xp.reshape(dpatches, dx_queries.shape)  # x was the input to both
    return dx, SRAParams(dq_params, dkv_params, dproj, dsr, dnorm)
