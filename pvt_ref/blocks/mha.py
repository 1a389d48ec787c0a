"""Multi-head self-attention of ViT (arXiv 2010.11929, appendix A): every token is a key.

It is spatial-reduction attention with R = 1 (``sra.py``), except that W^Q, W^K and W^V are one
matrix, as in the weights of DeiT and timm.
"""

from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.blocks.sra import SRASettings, merge_heads, split_heads
from pvt_ref.draws import Rng
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@record
class MHAParams:
    """W^Q over W^K over W^V, and W^O, or their gradients.

    Rows 0 to C-1 of qkv (3C, C) give Q, the next C give K, the others V; inside each, head j owns
    d = C / N rows. qkv may lack a bias.
    """

    qkv: LinearParams
    proj: LinearParams


@record
class MHACache:
    """The caches of the parts, and N. drop is None if nothing was dropped."""

    qkv: Any
    attention: Any
    proj: Any
    drop: Any
    num_heads: int


def mha_forward(
    p: MHAParams,
    x: Array,
    ops: Ops,
    grid: Grid,
    settings: SRASettings,
    rng: Rng = None,
    keep: bool = True,
) -> tuple[Array, MHACache | None]:
    """MSA(x) = Concat(head_0..head_{N-1}) W^O (arXiv 2010.11929, eq. 5 to 8)::

        head_j = Attention(x W_j^Q, x W_j^K, x W_j^V)

    Args:
        p: the weights, qkv.weight (3C, C).
        x: tokens (B, n, C), of the weights' dtype; they may include a cls token.
        ops: the table of operations.
        grid: of the tokens; not used.
        settings: num_heads (N), scale and dropout rates. Its eps is not used: there is no norm.
        rng: source of the dropout masks; None for inference.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, n, C) of x's dtype, and the cache.
    """
    N, C = settings.num_heads, x.shape[-1]
    qkv, qkv_cache = ops[linear].forward(p.qkv, x, ops, keep=keep)  # (B, n, 3C)
    q, k, v = (split_heads(qkv[..., i * C : (i + 1) * C], N) for i in range(3))
    heads, attention_cache = ops[attention].forward(
        None, (q, k, v), ops, settings.scale, settings.attn_drop_rate, rng, keep
    )  # (B, N, n, d)
    y, proj_cache = ops[linear].forward(p.proj, merge_heads(heads), ops, keep=keep)  # (B, n, C)
    y, drop_cache = ops[dropout].forward(None, y, ops, settings.drop_rate, rng, keep)
    if not keep:
        return y, None
    return y, MHACache(qkv_cache, attention_cache, proj_cache, drop_cache, N)


def mha_backward(
    p: MHAParams, cache: MHACache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, MHAParams]:
    """Gradients of :func:`mha_forward`.

    x is used three times, by queries, keys and values. With one matrix for all three, the
    product ``dqkv W`` adds their gradients.

    Args:
        p: the weights, qkv.weight (3C, C).
        cache: from the forward, num_heads (N).
        dy: dL/dy (B, n, C).
        ops: the table that the forward was given.

    Returns:
        dx (B, n, C) and the gradients of the weights, in their shapes; all of dy's dtype.
    """
    xp = array_module(dy)
    # y = dropout(Concat(heads) W^O)
    dy, _ = ops[dropout].backward(None, cache.drop, dy, ops)  # (B, n, C)
    dmerged, dproj = ops[linear].backward(p.proj, cache.proj, dy, ops)  # (B, n, C)
    # heads = Attention(q, k, v)
    dheads = split_heads(dmerged, cache.num_heads)  # (B, N, n, d)
    (dq, dk, dv), _ = ops[attention].backward(None, cache.attention, dheads, ops)
    # q, k, v = the three thirds of x W^QKV
    dqkv = xp.concat((merge_heads(dq), merge_heads(dk), merge_heads(dv)), axis=-1)  # (B, n, 3C)
    dx, dqkv_params = ops[linear].backward(p.qkv, cache.qkv, dqkv, ops)  # (B, n, C)
    return dx, MHAParams(dqkv_params, dproj)


mha = Operation(mha_forward, mha_backward)
