import numpy as np

from pvt_ref.layers.conv import ConvParams


def slices(u, v, h, w, stride):
    rows = slice(u, u + stride * (h - 1) + 1, stride)
    columns = slice(v, v + stride * (w - 1) + 1, stride)
    return (slice(None), rows, columns)


def conv_forward(p, x, ops, stride, padding):
    B, H, W, _ = x.shape
    C_out, _, k, _ = p.weight.shape
    frame = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    h = (H + 2 * padding - k) // stride + 1
    w = (W + 2 * padding - k) // stride + 1
    y = np.zeros((B, h, w, C_out), x.dtype)
    for u in range(k):
        for v in range(k):
            y += frame[slices(u, v, h, w, stride)] @ p.weight[:, :, u, v].T
    if p.bias is not None:
        y += p.bias
    return y, (frame, stride, padding)


def conv_backward(p, cache, dy, ops):
    frame, stride, padding = cache
    _, h, w, _ = dy.shape
    k = p.weight.shape[-1]
    dbias = np.sum(dy, axis=(0, 1, 2)) if p.bias is not None else None
    dweight = np.zeros(p.weight.shape, dy.dtype)
    dframe = np.zeros(frame.shape, dy.dtype)
    for u in range(k):
        for v in range(k):
            here = slices(u, v, h, w, stride)
            dweight[:, :, u, v] = np.tensordot(dy, frame[here], axes=((0, 1, 2), (0, 1, 2)))
            dframe[here] += dy @ p.weight[:, :, u, v]
    H, W = frame.shape[1] - 2 * padding, frame.shape[2] - 2 * padding
    dx = dframe[:, padding : padding + H, padding : padding + W]
    return dx, ConvParams(dweight, dbias)
