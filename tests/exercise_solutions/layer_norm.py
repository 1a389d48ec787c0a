import numpy as np

from pvt_ref.layers.layer_norm import LayerNormParams


def layer_norm_forward(p, x, ops, eps):
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred**2, axis=-1, keepdims=True)
    rstd = 1 / np.sqrt(variance + eps)
    x_hat = centred * rstd
    y = x_hat * p.weight + p.bias
    return y, (x_hat, rstd)


def layer_norm_backward(p, cache, dy, ops):
    x_hat, rstd = cache
    axes = tuple(range(dy.ndim - 1))
    dbias = np.sum(dy, axis=axes)
    dweight = np.sum(dy * x_hat, axis=axes)
    g = dy * p.weight
    mean_g = np.mean(g, axis=-1, keepdims=True)
    mean_gx = np.mean(g * x_hat, axis=-1, keepdims=True)
    dx = rstd * (g - mean_g - x_hat * mean_gx)
    return dx, LayerNormParams(dweight, dbias)
