from pvt_ref.exercises.network import stage


def pyramid_forward(p, x, ops, settings):
    maps, caches = [], []
    for p_i, settings_i in zip(p, settings, strict=True):
        x, cache = ops[stage].forward(p_i, x, ops, settings_i)
        maps.append(x)
        caches.append(cache)
    return maps, caches


def pyramid_backward(p, cache, dy, ops):
    dbelow, grads = 0, []
    for p_i, cache_i, dy_i in zip(reversed(p), reversed(cache), reversed(dy), strict=True):
        dmap = dy_i + dbelow
        dbelow, dstage = ops[stage].backward(p_i, cache_i, dmap, ops)
        grads.append(dstage)
    return dbelow, tuple(reversed(grads))
