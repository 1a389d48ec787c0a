from pvt_ref.layers.softmax import softmax


def attention_forward(p, x, ops, scale):
    q, k, v = x
    scores = scale * (q @ k.swapaxes(-1, -2))
    weights, softmax_cache = ops[softmax].forward(None, scores, ops)
    return weights @ v, (q, k, v, scale, weights, softmax_cache)


def attention_backward(p, cache, dy, ops):
    q, k, v, scale, weights, softmax_cache = cache
    dv = weights.swapaxes(-1, -2) @ dy
    dweights = dy @ v.swapaxes(-1, -2)
    dscores, _ = ops[softmax].backward(None, softmax_cache, dweights, ops)
    dq = scale * (dscores @ k)
    dk = scale * (dscores.swapaxes(-1, -2) @ q)
    return (dq, dk, dv), None
