from pvt_ref.blocks.transformer import block
from pvt_ref.exercises.network import StageParams
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.position import position


def stage_forward(p, x, ops, settings):
    B, H, W, _ = x.shape
    grid = (H // settings.patch_size, W // settings.patch_size)
    table_grid = (settings.table_side, settings.table_side)
    x, embed_cache = ops[patch_embed].forward(p.patch_embed, x, ops, settings.norm_eps)
    x, position_cache = ops[position].forward(p.pos_embed, x, ops, grid, table_grid, False)
    caches = []
    for p_k, settings_k in zip(p.blocks, settings.blocks, strict=True):
        x, cache = ops[block].forward(p_k, x, ops, grid, settings_k)
        caches.append(cache)
    return x.reshape(B, *grid, -1), (embed_cache, position_cache, caches)


def stage_backward(p, cache, dy, ops):
    embed_cache, position_cache, caches = cache
    B, h, w, C = dy.shape
    dx, dblocks = dy.reshape(B, h * w, C), []
    for p_k, cache_k in zip(reversed(p.blocks), reversed(caches), strict=True):
        dx, dblock = ops[block].backward(p_k, cache_k, dx, ops)
        dblocks.append(dblock)
    dx, dtable = ops[position].backward(p.pos_embed, position_cache, dx, ops)
    dx, dembed = ops[patch_embed].backward(p.patch_embed, embed_cache, dx, ops)
    return dx, StageParams(dembed, dtable, tuple(reversed(dblocks)))
