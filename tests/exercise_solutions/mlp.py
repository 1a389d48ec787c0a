from pvt_ref.blocks.mlp import MLPParams
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.linear import linear


def mlp_forward(p, x, ops):
    hidden, fc1_cache = ops[linear].forward(p.fc1, x, ops)
    hidden, gelu_cache = ops[gelu].forward(None, hidden, ops)
    y, fc2_cache = ops[linear].forward(p.fc2, hidden, ops)
    return y, (fc1_cache, gelu_cache, fc2_cache)


def mlp_backward(p, cache, dy, ops):
    fc1_cache, gelu_cache, fc2_cache = cache
    dhidden, dfc2 = ops[linear].backward(p.fc2, fc2_cache, dy, ops)
    dhidden, _ = ops[gelu].backward(None, gelu_cache, dhidden, ops)
    dx, dfc1 = ops[linear].backward(p.fc1, fc1_cache, dhidden, ops)
    return dx, MLPParams(dfc1, dfc2)
