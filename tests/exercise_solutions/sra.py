import numpy as np

from pvt_ref.blocks.sra import SRAParams
from pvt_ref.layers.attention import attention
from pvt_ref.layers.linear import linear
from pvt_ref.layers.patch_embed import PatchEmbedParams, patch_embed


def split(x, N):
    B, n, C = x.shape
    return x.reshape(B, n, N, C // N).transpose(0, 2, 1, 3)


def merge(x):
    B, N, n, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, n, N * d)


def sra_forward(p, x, ops, grid, settings):
    N, (B, _, C) = settings.num_heads, x.shape
    q, q_cache = ops[linear].forward(p.q, x, ops)
    reduced, sr_cache = x, None
    if p.sr is not None:
        sr = PatchEmbedParams(p.sr, p.norm)
        token_map = x.reshape(B, *grid, C)
        reduced, sr_cache = ops[patch_embed].forward(sr, token_map, ops, settings.norm_eps)
    kv, kv_cache = ops[linear].forward(p.kv, reduced, ops)
    k, v = split(kv[..., :C], N), split(kv[..., C:], N)
    heads, attn_cache = ops[attention].forward(None, (split(q, N), k, v), ops, settings.scale)
    y, proj_cache = ops[linear].forward(p.proj, merge(heads), ops)
    return y, (N, q_cache, sr_cache, kv_cache, attn_cache, proj_cache)


def sra_backward(p, cache, dy, ops):
    N, q_cache, sr_cache, kv_cache, attn_cache, proj_cache = cache
    dmerged, dproj = ops[linear].backward(p.proj, proj_cache, dy, ops)
    (dq, dk, dv), _ = ops[attention].backward(None, attn_cache, split(dmerged, N), ops)
    dkv = np.concatenate([merge(dk), merge(dv)], axis=-1)
    dreduced, dkv_weights = ops[linear].backward(p.kv, kv_cache, dkv, ops)
    dkeys, dsr, dnorm = dreduced, None, None
    if p.sr is not None:
        sr = PatchEmbedParams(p.sr, p.norm)
        dmap, dpatches = ops[patch_embed].backward(sr, sr_cache, dreduced, ops)
        dkeys, dsr, dnorm = dmap.reshape(dy.shape), dpatches.proj, dpatches.norm
    dqueries, dq_weights = ops[linear].backward(p.q, q_cache, merge(dq), ops)
    return dqueries + dkeys, SRAParams(dq_weights, dkv_weights, dproj, dsr, dnorm)
