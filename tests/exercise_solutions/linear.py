import numpy as np

from pvt_ref.layers.linear import LinearParams


def linear_forward(p, x, ops):
    y = x @ p.weight.T
    if p.bias is not None:
        y = y + p.bias
    return y, x


def linear_backward(p, cache, dy, ops):
    x = cache
    rows_x = x.reshape(-1, x.shape[-1])
    rows_dy = dy.reshape(-1, dy.shape[-1])
    dweight = rows_dy.T @ rows_x
    dbias = None
    if p.bias is not None:
        dbias = np.sum(rows_dy, axis=0)
    dx = dy @ p.weight
    return dx, LinearParams(dweight, dbias)
