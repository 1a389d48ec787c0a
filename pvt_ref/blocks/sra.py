"""Spatial-reduction attention (paper section 3.3, eq. 1-3): few keys for many queries.

Queries are all n tokens. Keys and values come from SR(x), a patch embedding of the token map with
R x R patches, so that there are m = n / R^2 of them and attention costs R^2 times less.
"""

from dataclasses import dataclass
from typing import Any

from pvt_ref.arrays import Array, Grid, array_module
from pvt_ref.draws import Rng
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import PatchEmbedParams, patch_embed
from pvt_ref.ops import REFERENCE, Operation, Ops
from pvt_ref.tree import record


@dataclass(frozen=True, slots=True)
class SRASettings:
    """The settings of a block's attention, besides its weights."""

    num_heads: int  # N, a divisor of C
    scale: float  # 1 / sqrt(d) in the paper
    norm_eps: float  # of the norm in SR
    attn_drop_rate: float = 0.0  # of the attention weights
    drop_rate: float = 0.0  # of the result


@record
class SRAParams:
    """W^Q, W^K over W^V, W^O and the spatial reduction, or their gradients.

    q and proj have weights (C, C), kv (2C, C): rows 0 to C-1 make K, the others V. q and kv may
    lack biases. The kernel sr (C, C, R, R) and the norm after it are None if R = 1.
    """

    q: LinearParams
    kv: LinearParams
    proj: LinearParams
    sr: LinearParams | None
    norm: LayerNormParams | None


@record
class SRACache:
    """The caches of the parts, and N. sr is None if R = 1, drop if nothing was dropped."""

    q: Any
    sr: Any
    kv: Any
    attention: Any
    proj: Any
    drop: Any
    num_heads: int


def split_heads(x: Array, N: int) -> Array:
    """(B, n, C) to (B, N, n, d) with d = C / N: head j owns channels j*d to (j+1)*d - 1."""
    xp = array_module(x)
    B, n, C = x.shape
    return xp.permute_dims(xp.reshape(x, (B, n, N, C // N)), (0, 2, 1, 3))  # (B, N, n, d)


def merge_heads(x: Array) -> Array:
    """(B, N, n, d) to (B, n, C), Concat(head_0..head_{N-1}) of eq. 1: undoes split_heads."""
    xp = array_module(x)
    B, N, n, d = x.shape
    return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (B, n, N * d))  # (B, n, N*d)


def keys_and_values(kv: Array, N: int) -> tuple[Array, Array]:
    """(B, m, 2C), all of K before all of V, to k and v of (B, N, m, d) each."""
    C = kv.shape[-1] // 2
    return split_heads(kv[..., :C], N), split_heads(kv[..., C:], N)


def sra_forward(
    p: SRAParams,
    x: Array,
    ops: Ops,
    grid: Grid,
    settings: SRASettings,
    rng: Rng = None,
    keep: bool = True,
) -> tuple[Array, SRACache | None]:
    """SRA(Q, K, V) = Concat(head_0..head_{N-1}) W^O, paper eq. 1, with eq. 2::

        head_j = Attention(Q W_j^Q, SR(K) W_j^K, SR(V) W_j^V),    Q = K = V = x

    and with eq. 3, SR(x) = LN(Reshape(x, R) W^S).

    Args:
        p: the weights, sr.weight (C, C, R, R). If ``p.sr`` is None there is no reduction.
        x: tokens (B, n, C), of the weights' dtype. With R = 1 they may include a cls token.
        ops: the table of operations.
        grid: (H_i, W_i) of the tokens, multiples of R.
        settings: num_heads (N), scale, eps and dropout rates.
        rng: source of the dropout masks; None for inference.
        keep: whether to return a cache for the backward.

    Returns:
        y (B, n, C) of x's dtype, and the cache.
    """
    N = settings.num_heads
    q, q_cache = ops[linear].forward(p.q, x, ops, keep=keep)  # (B, n, C)
    if p.sr is None or p.norm is None:  # R = 1: every token is a key
        reduced, sr_cache = x, None
    else:
        reduction = PatchEmbedParams(p.sr, p.norm)
        token_map = array_module(x).reshape(x, (x.shape[0], *grid, x.shape[-1]))  # (B, H_i, W_i, C)
        reduced, sr_cache = ops[patch_embed].forward(
            reduction, token_map, ops, settings.norm_eps, keep=keep
        )  # (B, m, C)
    kv, kv_cache = ops[linear].forward(p.kv, reduced, ops, keep=keep)  # (B, m, 2C)
    k, v = keys_and_values(kv, N)  # (B, N, m, d) each
    heads, attention_cache = ops[attention].forward(
        None, (split_heads(q, N), k, v), ops, settings.scale, settings.attn_drop_rate, rng, keep
    )  # (B, N, n, d)
    y, proj_cache = ops[linear].forward(p.proj, merge_heads(heads), ops, keep=keep)  # (B, n, C)
    y, drop_cache = ops[dropout].forward(None, y, ops, settings.drop_rate, rng, keep)
    if not keep:
        return y, None
    return y, SRACache(q_cache, sr_cache, kv_cache, attention_cache, proj_cache, drop_cache, N)


def sra_backward(
    p: SRAParams, cache: SRACache, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, SRAParams]:
    """Gradients of :func:`sra_forward`, paper eq. 1 to 3.

    x is used twice, by the queries and by SR, so two gradients meet in dx.

    Args:
        p: the weights, sr.weight (C, C, R, R).
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
    # k, v = the two halves of reduced W^KV
    dkv = xp.concat((merge_heads(dk), merge_heads(dv)), axis=-1)  # (B, m, 2C)
    dreduced, dkv_params = ops[linear].backward(p.kv, cache.kv, dkv, ops)  # (B, m, C)
    # reduced = SR(x)
    if p.sr is None or p.norm is None:
        dx_keys, dsr, dnorm = dreduced, None, None
    else:
        reduction = PatchEmbedParams(p.sr, p.norm)
        dmap, dreduction = ops[patch_embed].backward(reduction, cache.sr, dreduced, ops)
        dx_keys = xp.reshape(dmap, dy.shape)  # (B, n, C)
        dsr, dnorm = dreduction.proj, dreduction.norm
    # q = x W^Q
    dx_queries, dq_params = ops[linear].backward(p.q, cache.q, merge_heads(dq), ops)  # (B, n, C)
    dx = dx_queries + dx_keys  # x was the input of both
    return dx, SRAParams(dq_params, dkv_params, dproj, dsr, dnorm)


sra = Operation(sra_forward, sra_backward)
