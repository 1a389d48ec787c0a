from pvt_ref.heads.scale_head import scale_head
from pvt_ref.heads.semantic_fpn import SemanticFPNParams
from pvt_ref.layers.conv import conv
from pvt_ref.layers.resize import resize


def semantic_fpn_forward(p, x, ops, buffers, batch_statistics):
    size, total, caches = x[0].shape[1:3], 0, []
    for p_i, x_i, buffers_i in zip(p.scale_heads, x, buffers.scale_heads, strict=True):
        s, head_cache = ops[scale_head].forward(p_i, x_i, ops, buffers_i, batch_statistics)
        s, resize_cache = ops[resize].forward(None, s, ops, size)
        total = total + s
        caches.append((head_cache, resize_cache))
    logits, seg_cache = ops[conv].forward(p.conv_seg, total, ops, 1, 0)
    return logits, (caches, seg_cache)


def semantic_fpn_backward(p, cache, dy, ops):
    caches, seg_cache = cache
    dtotal, dseg = ops[conv].backward(p.conv_seg, seg_cache, dy, ops)
    dx, dheads = [], []
    for p_i, (head_cache, resize_cache) in zip(p.scale_heads, caches, strict=True):
        ds, _ = ops[resize].backward(None, resize_cache, dtotal, ops)
        dx_i, dhead = ops[scale_head].backward(p_i, head_cache, ds, ops)
        dx.append(dx_i)
        dheads.append(dhead)
    return dx, SemanticFPNParams(dseg, tuple(dheads))
