import math

import numpy as np


def matrix(new, old, dtype):
    A = np.zeros((new, old), dtype)
    for u in range(new):
        centre = max((u + 0.5) * old / new - 0.5, 0.0)
        left = math.floor(centre)
        right = min(left + 1, old - 1)
        A[u, left] += 1 - (centre - left)
        A[u, right] += centre - left
    return A


def position_forward(p, x, ops, grid, table_grid, cls):
    (H, W), (h, w), C = grid, table_grid, x.shape[-1]
    A_h, A_w = matrix(H, h, p.dtype), matrix(W, w, p.dtype)
    cls_rows = p.shape[1] - h * w
    cells = p[0, cls_rows:].reshape(h, w, C)
    rows = np.einsum("ui,vj,ijc->uvc", A_h, A_w, cells).reshape(H * W, C)
    if cls:
        rows = np.concatenate([p[0, :1], rows])
    return x + rows, (A_h, A_w, cls)


def position_backward(p, cache, dy, ops):
    A_h, A_w, cls = cache
    (H, h), (W, w), C = A_h.shape, A_w.shape, dy.shape[-1]
    drows = np.sum(dy, axis=0)
    dcells = drows[int(cls) :].reshape(H, W, C)
    dtable = np.zeros_like(p)
    cls_rows = p.shape[1] - h * w
    dtable[0, cls_rows:] = np.einsum("ui,vj,uvc->ijc", A_h, A_w, dcells).reshape(h * w, C)
    if cls:
        dtable[0, 0] = drows[0]
    return dy, dtable
