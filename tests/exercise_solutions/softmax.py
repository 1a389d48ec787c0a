import numpy as np


def softmax_forward(p, x, ops):
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    y = e / np.sum(e, axis=-1, keepdims=True)
    return y, y


def softmax_backward(p, cache, dy, ops):
    y = cache
    inner = np.sum(dy * y, axis=-1, keepdims=True)
    return y * (dy - inner), None
