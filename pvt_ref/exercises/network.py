"""The last two operations of the exercises: a stage of the dense network, and the pyramid of them.

In the package they are part of the network, ``models/pvt/model.py``. Here they have the signatures
of operations, so that a reader's own can be marked and replace them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pvt_ref.arrays import Array
from pvt_ref.blocks.transformer import BlockSettings, blocks
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.layers.position import position
from pvt_ref.models.pvt.model import to_map, to_tokens
from pvt_ref.models.pvt.params import StageParams
from pvt_ref.ops import REFERENCE, Operation, Ops


@dataclass(frozen=True, slots=True)
class StageSettings:
    """The settings of a stage, besides its weights."""

    patch_size: int  # P
    norm_eps: float  # of the norm after the patch projection
    table_side: int  # the position table is made for table_side x table_side tokens
    blocks: tuple[BlockSettings, ...]  # of each block


def stage_forward(
    p: StageParams, x: Array, ops: Ops, settings: StageSettings, keep: bool = True
) -> tuple[Array, Any]:
    """F_i = Stage_i(F_{i-1}): patch embedding, positions, blocks, and back to a map."""
    grid = (x.shape[1] // settings.patch_size, x.shape[2] // settings.patch_size)
    table_grid = (settings.table_side, settings.table_side)
    x, embed_cache = ops[patch_embed].forward(p.patch_embed, x, ops, settings.norm_eps, keep=keep)
    x, position_cache = ops[position].forward(
        p.pos_embed, x, ops, grid, table_grid, False, keep=keep
    )
    x, blocks_cache = ops[blocks].forward(p.blocks, x, ops, grid, settings.blocks, keep=keep)
    return to_map(x, grid), (embed_cache, position_cache, blocks_cache) if keep else None


def stage_backward(
    p: StageParams, cache: Any, dy: Array, ops: Ops = REFERENCE
) -> tuple[Array, StageParams]:
    """Gradients of :func:`stage_forward`: the backward of each step, in reverse order."""
    embed_cache, position_cache, blocks_cache = cache
    dx, dblocks = ops[blocks].backward(p.blocks, blocks_cache, to_tokens(dy), ops)
    dx, dtable = ops[position].backward(p.pos_embed, position_cache, dx, ops)
    dx, dembed = ops[patch_embed].backward(p.patch_embed, embed_cache, dx, ops)
    return dx, StageParams(dembed, dtable, dblocks)


def pyramid_forward(
    p: tuple[StageParams, ...],
    x: Array,
    ops: Ops,
    settings: Sequence[StageSettings],
    keep: bool = True,
) -> tuple[list[Array], Any]:
    """The maps F_1, F_2 and so on: each stage takes the map of the one before."""
    maps, caches = [], []
    for p_i, settings_i in zip(p, settings, strict=True):
        x, cache = ops[stage].forward(p_i, x, ops, settings_i, keep=keep)
        maps.append(x)
        caches.append(cache)
    return maps, tuple(caches) if keep else None


def pyramid_backward(
    p: tuple[StageParams, ...], cache: Any, dy: Sequence[Array], ops: Ops = REFERENCE
) -> tuple[Array, tuple[StageParams, ...]]:
    """Gradients of :func:`pyramid_forward`: F_i is an output and the next stage's input."""
    dx, grads = None, []
    for p_i, cache_i, dy_i in zip(reversed(p), reversed(cache), reversed(dy), strict=True):
        dmap = dy_i if dx is None else dy_i + dx
        dx, dstage = ops[stage].backward(p_i, cache_i, dmap, ops)
        grads.insert(0, dstage)
    return dx, tuple(grads)


stage = Operation(stage_forward, stage_backward)
pyramid = Operation(pyramid_forward, pyramid_backward)
