"""The whole network: four stages, with class logits or a pyramid of feature maps as the output.

It differs from PVT (:mod:`pvt_ref.models.pvt.model`) in that patches overlap, a norm ends every
stage, and there are neither position tables nor a cls token: the classifier averages the tokens. So
both outputs are computed from the same four maps.

Nothing is checked here: :mod:`pvt_ref.api` does that, and calls these functions.
"""

from collections.abc import Sequence
from typing import Any

from pvt_ref.arrays import Array, array_module
from pvt_ref.blocks.transformer import blocks
from pvt_ref.draws import Source
from pvt_ref.layers.conv import conv
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import linear
from pvt_ref.models.pvt.model import channels_first, channels_last, to_map, to_tokens
from pvt_ref.models.pvt_v2.config import PVTv2Config
from pvt_ref.models.pvt_v2.params import OverlapEmbedParams, PVTv2Params, StageParams
from pvt_ref.ops import Ops
from pvt_ref.tree import record


@record
class StageCache:
    """The caches of stage i: of the patch embedding's convolution and norm, and of the rest."""

    conv: Any
    embed_norm: Any
    blocks: Any
    norm: Any


@record
class ClassifierCache:
    """What :func:`backward` needs: the caches of the parts, and the shape of F_4."""

    stages: tuple[StageCache, ...]
    head: Any
    map_shape: tuple[int, ...]


def prepare(params: PVTv2Params, config: PVTv2Config, size: tuple[int, int]) -> None:
    """Returns None: all that is computed depends on the images."""


def _stage_forward(
    p: StageParams, x: Array, config: PVTv2Config, i: int, ops: Ops, rng: Source, keep: bool
) -> tuple[Array, StageCache | None]:
    """A map x (B, H_{i-1}, W_{i-1}, C_{i-1}) to F_i (B, H_i, W_i, C_i)."""
    stage = config.of_stage(i)
    x, conv_cache = ops[conv].forward(
        p.patch_embed.proj, x, ops, stage.stride, stage.padding, keep=keep
    )  # (B, H_i, W_i, C_i)
    grid = x.shape[1:3]
    x = to_tokens(x)  # (B, n_i, C_i)
    x, embed_norm_cache = ops[layer_norm].forward(
        p.patch_embed.norm, x, ops, config.projection_norm_eps, keep=keep
    )  # (B, n_i, C_i)
    first = [x]
    del x  # else these tokens would stay in memory while the blocks compute
    x, blocks_cache = ops[blocks].forward(
        p.blocks, first.pop(), ops, grid, stage.blocks, rng, keep=keep
    )  # (B, n_i, C_i)
    x, norm_cache = ops[layer_norm].forward(p.norm, x, ops, config.norm_eps, keep=keep)
    x = to_map(x, grid)  # (B, H_i, W_i, C_i)
    return x, StageCache(conv_cache, embed_norm_cache, blocks_cache, norm_cache) if keep else None


def _stage_backward(
    p: StageParams, cache: StageCache, dmap: Array, ops: Ops
) -> tuple[Array, StageParams]:
    """Back from dmap (B, H_i, W_i, C_i), which is dL/dF_i, to the input of the stage."""
    map_shape = dmap.shape
    # x = norm(blocks(x))
    dx = to_tokens(dmap)  # (B, n_i, C_i)
    dx, dnorm = ops[layer_norm].backward(p.norm, cache.norm, dx, ops)  # (B, n_i, C_i)
    dx, dblocks = ops[blocks].backward(p.blocks, cache.blocks, dx, ops)  # (B, n_i, C_i)
    # x = norm(conv(x))
    dx, dembed_norm = ops[layer_norm].backward(p.patch_embed.norm, cache.embed_norm, dx, ops)
    dmap = to_map(dx, map_shape[1:3])  # (B, H_i, W_i, C_i)
    dbelow, dproj = ops[conv].backward(p.patch_embed.proj, cache.conv, dmap, ops)
    return dbelow, StageParams(OverlapEmbedParams(dproj, dembed_norm), dblocks, dnorm)


def forward(
    params: PVTv2Params,
    images: Array,
    config: PVTv2Config,
    ops: Ops,
    rng: Source = None,
    keep: bool = True,
    constants: None = None,
) -> tuple[Array, ClassifierCache | None]:
    """The released classifier: the head is applied to the mean of the tokens of F_4.

    Args:
        params: the weights.
        images: (B, C_0, H, W) of the weights' dtype.
        config: the configuration of the weights.
        ops: the table of operations.
        rng: source of the dropout and drop-path masks; None for inference.
        keep: whether to return a cache for the backward.
        constants: none.

    Returns:
        logits (B, num_classes) and the cache.
    """
    x = channels_last(images)  # (B, H, W, C_0)
    caches = []
    for i in range(1, len(config.channels) + 1):
        x, cache = _stage_forward(params.of_stage(i), x, config, i, ops, rng, keep)
        caches.append(cache)
    mean = array_module(x).mean(to_tokens(x), axis=1)  # (B, C_4)
    logits, head_cache = ops[linear].forward(params.head, mean, ops, keep=keep)
    return logits, ClassifierCache(tuple(caches), head_cache, x.shape) if keep else None


def backward(
    params: PVTv2Params, cache: ClassifierCache, dlogits: Array, ops: Ops
) -> tuple[PVTv2Params, Array]:
    """Gradients of :func:`forward`: every token of F_4 gets the same share of the mean's gradient.

    From dlogits (B, num_classes) it computes those of the weights, and dL/dimages (B, C_0, H, W).
    """
    xp = array_module(dlogits)
    B, H_4, W_4, C_4 = cache.map_shape
    # logits = head(mean(x))
    dmean, dhead = ops[linear].backward(params.head, cache.head, dlogits, ops)  # (B, C_4)
    dtoken = xp.reshape(dmean / (H_4 * W_4), (B, 1, 1, C_4))  # (B, 1, 1, C_4)
    dx = xp.broadcast_to(dtoken, cache.map_shape)  # (B, H_4, W_4, C_4)
    dstages: list[StageParams] = []
    for i in range(len(cache.stages), 0, -1):
        dx, dstage = _stage_backward(params.of_stage(i), cache.stages[i - 1], dx, ops)
        dstages.insert(0, dstage)
    return params.gradients(dstages, head=dhead), channels_first(dx)


def forward_pyramid(
    params: PVTv2Params,
    images: Array,
    config: PVTv2Config,
    ops: Ops,
    rng: Source = None,
    keep: bool = True,
    constants: None = None,
) -> tuple[list[Array], tuple[StageCache, ...] | None]:
    """The feature maps F_1..F_4 of the released backbones, normed; the classifier uses the last.

    Arguments as for :func:`forward`, with images (B, C_0, H, W); returns [F_1, F_2, F_3, F_4],
    (B, C_i, H_i, W_i) each, and the cache.
    """
    x = channels_last(images)  # (B, H, W, C_0)
    maps, caches = [], []
    for i in range(1, len(config.channels) + 1):
        x, cache = _stage_forward(params.of_stage(i), x, config, i, ops, rng, keep)
        maps.append(channels_first(x))
        caches.append(cache)
    return maps, tuple(caches) if keep else None


def backward_pyramid(
    params: PVTv2Params, cache: tuple[StageCache, ...], dmaps: Sequence[Array], ops: Ops
) -> tuple[PVTv2Params, Array]:
    """Gradients of :func:`forward_pyramid`; the head, which the maps do not use, gets zeros.

    F_i is both an output and the input of stage i + 1, so two gradients meet in it.

    Args:
        params: the forward's weights.
        cache: from the forward.
        dmaps: dL/dF_1..dL/dF_4, (B, C_i, H_i, W_i) each.
        ops: the table that the forward was given.
    """
    dstages: list[StageParams] = []
    dbelow = None  # the part of dL/dF_i that comes from stage i + 1
    for i in range(len(cache), 0, -1):
        dx = channels_last(dmaps[i - 1])  # (B, H_i, W_i, C_i)
        if dbelow is not None:
            dx = dx + dbelow  # F_i is both an output and the next stage's input
        dbelow, dstage = _stage_backward(params.of_stage(i), cache[i - 1], dx, ops)
        dstages.insert(0, dstage)
    return params.gradients(dstages), channels_first(dbelow)
