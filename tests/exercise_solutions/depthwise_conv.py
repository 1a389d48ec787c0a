import numpy as np

from pvt_ref.layers.conv import ConvParams


def depthwise_conv_forward(p, x, ops):
    _, H, W, _ = x.shape
    k = p.weight.shape[-1]
    a = k // 2
    frame = np.pad(x, ((0, 0), (a, a), (a, a), (0, 0)))
    y = np.zeros_like(x) + p.bias
    for u in range(k):
        for v in range(k):
            y += frame[:, u : u + H, v : v + W] * p.weight[:, 0, u, v]
    return y, frame


def depthwise_conv_backward(p, cache, dy, ops):
    frame = cache
    _, H, W, _ = dy.shape
    k = p.weight.shape[-1]
    a = k // 2
    dbias = np.sum(dy, axis=(0, 1, 2))
    dweight = np.zeros(p.weight.shape, dy.dtype)
    dframe = np.zeros(frame.shape, dy.dtype)
    for u in range(k):
        for v in range(k):
            dweight[:, 0, u, v] = np.sum(dy * frame[:, u : u + H, v : v + W], axis=(0, 1, 2))
            dframe[:, u : u + H, v : v + W] += dy * p.weight[:, 0, u, v]
    return dframe[:, a : a + H, a : a + W], ConvParams(dweight, dbias)
