"""The attention weights of every query, from a watched forward pass."""

from collections.abc import Iterable
from types import EllipsisType
from typing import Any

from pvt_ref.api import choose_ops, forward, forward_pyramid
from pvt_ref.arrays import Array
from pvt_ref.checks import check_stages
from pvt_ref.layers.attention import attention, attention_weights
from pvt_ref.models.architecture import architecture_of
from pvt_ref.ops import Call, Ops


def attention_maps(
    params: Any,
    images: Array,
    config: Any,
    stages: Iterable[int] | EllipsisType = ...,
    *,
    ops: Ops | None = None,
) -> dict[tuple[int, int], Array]:
    """The attention weights A of paper eq. 4 in every block of the stages.

    Raises: PVTError as :func:`pvt_ref.forward`; a RangeError also if a stage is not one.

    Args:
        params: as for :func:`pvt_ref.forward`; they may lack a classifier.
        images: (B, in_chans, H, W) normalised floats.
        config: the configuration of the weights.
        stages: numbers of stages, from 1; by default, all of the network.
        ops: a table of operations; None takes the default.

    Returns:
        By (stage, block), the attention weights (B, N_i, n_i, m_i) of every head, query and key, of
        params' dtype, rows summing to 1. Stages count from 1, blocks from 0, as in the keys of the
        weights. Keys are the m_i tokens after spatial reduction, in raster order. The last stage of
        a classifier has the cls token as query and key 0.
    """
    row = architecture_of(config)
    count = len(config.channels)
    wanted = set(range(1, count + 1)) if stages is ... else check_stages(stages, count)
    table = choose_ops(ops, images, row)
    maps: dict[tuple[int, int], Array] = {}

    def look(call: Call) -> None:
        place = row.place(call.path)
        if place is not None and place.block is not None and place.stage in wanted:
            q, k, _ = call.args[1]
            maps[place.stage, place.block] = attention_weights(q, k, call.args[3], table)

    watched = table.watched(look, only=[attention], params=params)
    run = forward if config.has_classifier else forward_pyramid
    run(params, images, config, ops=watched)
    return maps
