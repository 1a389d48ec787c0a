from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import PatchEmbedParams


def as_matrix(p):
    kernel = p.proj.weight.transpose(0, 2, 3, 1)
    return LinearParams(kernel.reshape(len(kernel), -1), p.proj.bias)


def patch_embed_forward(p, x, ops, eps):
    P = p.proj.weight.shape[-1]
    B, H, W, C_in = x.shape
    x = x.reshape(B, H // P, P, W // P, P, C_in)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    patches = x.reshape(B, (H // P) * (W // P), P * P * C_in)
    tokens, linear_cache = ops[linear].forward(as_matrix(p), patches, ops)
    y, norm_cache = ops[layer_norm].forward(p.norm, tokens, ops, eps)
    return y, (linear_cache, norm_cache, (B, H, W, C_in))


def patch_embed_backward(p, cache, dy, ops):
    linear_cache, norm_cache, (B, H, W, C_in) = cache
    C, _, P, _ = p.proj.weight.shape
    dtokens, dnorm = ops[layer_norm].backward(p.norm, norm_cache, dy, ops)
    dpatches, dlinear = ops[linear].backward(as_matrix(p), linear_cache, dtokens, ops)
    dx = dpatches.reshape(B, H // P, W // P, P, P, C_in)
    dx = dx.transpose(0, 1, 3, 2, 4, 5)
    dx = dx.reshape(B, H, W, C_in)
    dkernel = dlinear.weight.reshape(C, P, P, C_in).transpose(0, 3, 1, 2)
    return dx, PatchEmbedParams(LinearParams(dkernel, dlinear.bias), dnorm)
