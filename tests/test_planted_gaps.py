"""What planted mistakes showed that no other test asks; see tests/planted_bugs/."""

import dataclasses

import numpy as np
from small_training import CONFIG
from strategies import random_params, rng_of

from pvt_ref import (
    REFERENCE,
    backward_pyramid,
    blocked_ops,
    forward,
    forward_pyramid,
    forward_pyramid_with_cache,
    forward_with_cache,
    prepare,
    to_state_dict,
)
from pvt_ref.blocks.transformer import block
from pvt_ref.draws import Draws, SampleDraws, What, generator
from pvt_ref.layers.attention import attention
from pvt_ref.layers.dropout import dropout
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import layer_norm
from pvt_ref.layers.linear import linear
from pvt_ref.layers.patch_embed import patch_embed
from pvt_ref.ops import Operation

DEEP = dataclasses.replace(CONFIG, depths=(2, 1, 2, 1), drop_rate=0.2, drop_path_rate=0.3)


def test_every_block_and_every_stage_draws_from_a_generator_of_its_own():
    """Masks differ between them, so no two may be given the same key."""
    params = random_params(DEEP, 0, np.float32)
    images = rng_of(1).standard_normal((2, 1, 16, 16), np.float32)
    for run in (forward_with_cache, forward_pyramid_with_cache):
        blocks, stages = [], []

        def look(call, blocks=blocks, stages=stages):
            if call.operation == block:
                blocks.append(tuple(call.args[5].bit_generator.seed_seq.entropy))
            elif call.path == "dropout":  # of a stage; those of a block have its path
                stages.append(tuple(call.args[4].bit_generator.seed_seq.entropy))

        watched = REFERENCE.watched(before=look, only=[block, dropout], params=params)
        run(params, images, DEEP, Draws(3, 7, 2), ops=watched)
        assert blocks == [(3, What.BLOCK, 7, 2, number) for number in range(6)]
        assert stages == [(3, What.STAGE_DROPOUT, 7, 2, stage) for stage in (1, 2, 3, 4)]


def test_a_replacement_leaves_the_twins_that_do_not_absorb_it():
    """Or one replaced operation would cost four times, since only readable ones were left."""
    table = blocked_ops()
    twin = Operation(lambda *args, **kwargs: gelu.forward(*args, **kwargs), gelu.backward)
    expected = {op: kept for op, kept in table.twins.items() if gelu not in kept.absorbs}
    assert {linear, layer_norm, attention, patch_embed} <= expected.keys()
    assert dict(table.replace(gelu, twin).twins) == expected | {gelu: twin}


def test_tables_prepared_for_tall_images_are_not_used_for_wide_ones():
    """Both have as many pixels and tokens, so nothing else would notice."""
    params = random_params(CONFIG, 0, np.float64)
    wide = rng_of(1).standard_normal((1, 1, 16, 32))
    prepared = prepare(params, CONFIG, (32, 16))
    np.testing.assert_array_equal(forward(prepared, wide), forward(params, wide, CONFIG))
    for x, y in zip(
        forward_pyramid(prepared, wide), forward_pyramid(params, wide, CONFIG), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_each_sample_of_an_epoch_is_changed_by_numbers_of_its_own():
    draws = SampleDraws(5, 2, [4, 1, 7])
    numbers = draws.random(3)
    expected = [generator(5, What.AUGMENTATION, 2, sample).random() for sample in (4, 1, 7)]
    assert numbers.tolist() == expected
    assert len(set(expected)) == 3


def test_zeros_for_what_a_pyramid_leaves_unused_are_arrays_of_their_own():
    params = random_params(CONFIG, 0, np.float32)
    images = rng_of(1).standard_normal((1, 1, 16, 16), np.float32)
    maps, cache = forward_pyramid_with_cache(params, images, CONFIG)
    grads, _ = backward_pyramid(params, cache, maps, CONFIG)
    unused = {key: x for key, x in to_state_dict(grads).items() if not x.any()}
    assert {"cls_token", "norm.weight", "head.bias"} <= unused.keys()
    for key, x in unused.items():
        x += 1  # refused where one row is seen as all
        assert (x == 1).all(), key
