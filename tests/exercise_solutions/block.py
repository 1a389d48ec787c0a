from pvt_ref.blocks.mlp import mlp
from pvt_ref.blocks.sra import sra
from pvt_ref.blocks.transformer import BlockParams
from pvt_ref.layers.layer_norm import layer_norm


def block_forward(p, x, ops, grid, settings):
    eps = settings.norm_eps
    branch, norm1_cache = ops[layer_norm].forward(p.norm1, x, ops, eps)
    branch, attn_cache = ops[sra].forward(p.attn, branch, ops, grid, settings.attn)
    x = x + branch
    branch, norm2_cache = ops[layer_norm].forward(p.norm2, x, ops, eps)
    branch, mlp_cache = ops[mlp].forward(p.mlp, branch, ops)
    return x + branch, (norm1_cache, attn_cache, norm2_cache, mlp_cache)


def block_backward(p, cache, dy, ops):
    norm1_cache, attn_cache, norm2_cache, mlp_cache = cache
    dbranch, dmlp = ops[mlp].backward(p.mlp, mlp_cache, dy, ops)
    dbranch, dnorm2 = ops[layer_norm].backward(p.norm2, norm2_cache, dbranch, ops)
    dx = dbranch + dy
    dbranch, dattn = ops[sra].backward(p.attn, attn_cache, dx, ops)
    dbranch, dnorm1 = ops[layer_norm].backward(p.norm1, norm1_cache, dbranch, ops)
    return dbranch + dx, BlockParams(dnorm1, dattn, dnorm2, dmlp)
