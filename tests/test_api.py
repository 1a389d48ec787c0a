"""What the public functions do around a network's core, and how little it costs."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from loose import loose
from strategies import ModelCase, normal, rng_of

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, PVTConfig, blocked_ops
from pvt_ref.errors import ArrayTypeError, ShapeError
from pvt_ref.models.architecture import known_variants
from pvt_ref.tree import map_arrays, named_arrays

CONFIG = PVTConfig(
    img_size=32,
    num_classes=5,
    embed_dims=(4, 8, 12, 16),
    num_heads=(1, 2, 3, 4),
    mlp_ratios=(2, 2, 2, 2),
    depths=(1, 1, 1, 1),
    sr_ratios=(4, 2, 1, 1),
)
CASE = ModelCase(CONFIG, 2, (64, 32), 1)
BARE = ModelCase(dataclasses.replace(CONFIG, num_classes=0), 2, (64, 32), 1)


@pytest.mark.parametrize("ops", [REFERENCE, blocked_ops(2)], ids=repr)
@pytest.mark.parametrize("size", [(64, 32), (32, 32), None])
def test_prepared_weights_give_the_same_bits(ops, size):
    params, images = CASE.params(), CASE.images()
    prepared = pvt_ref.prepare(params, CONFIG, size)
    expected = pvt_ref.forward(params, images, CONFIG, ops=ops)
    np.testing.assert_array_equal(pvt_ref.forward(prepared, images, ops=ops), expected)
    np.testing.assert_array_equal(pvt_ref.forward(prepared, images, CONFIG, ops=ops), expected)
    maps = pvt_ref.forward_pyramid(params, images, CONFIG, ops=ops)
    for x, y in zip(pvt_ref.forward_pyramid(prepared, images, ops=ops), maps, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_prepared_backbone_gives_the_same_maps():
    prepared = pvt_ref.prepare(BARE.params(), BARE.config, (64, 32))
    expected = pvt_ref.forward_pyramid(BARE.params(), BARE.images(), BARE.config)
    for x, y in zip(pvt_ref.forward_pyramid(prepared, BARE.images()), expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_gradients_of_prepared_weights_are_those_of_the_weights():
    params, images = CASE.params(), CASE.images()
    prepared = pvt_ref.prepare(params, CONFIG, (64, 32))
    logits, cache = pvt_ref.forward_with_cache(prepared, images, rng=rng_of(0))
    grads, dimages = pvt_ref.backward(prepared, cache, logits)
    logits, cache = pvt_ref.forward_with_cache(params, images, CONFIG, rng_of(0))
    expected, expected_dimages = pvt_ref.backward(params, cache, logits, CONFIG)
    np.testing.assert_array_equal(dimages, expected_dimages)
    for (key, x), (_, y) in zip(named_arrays(grads), named_arrays(expected), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=key)


def test_what_cannot_be_prepared_is_refused():
    params = CASE.params()
    with pytest.raises(ShapeError, match="does not fit"):
        pvt_ref.prepare(params, CONFIG, 33)
    with pytest.raises(ShapeError, match="size is 'large'"):
        pvt_ref.prepare(params, CONFIG, loose("large"))
    with pytest.raises(ArrayTypeError, match="params is a NoneType"):
        pvt_ref.prepare(None, CONFIG)
    with pytest.raises(ShapeError, match="params do not belong to this config"):
        pvt_ref.prepare(params, dataclasses.replace(CONFIG, num_classes=6))
    prepared = pvt_ref.prepare(params, CONFIG)
    with pytest.raises(ShapeError, match="prepared with another config; leave config out"):
        pvt_ref.forward(prepared, CASE.images(), dataclasses.replace(CONFIG, norm_eps=0.1))
    with pytest.raises(ShapeError, match="images have 1 channels"):
        pvt_ref.forward(prepared, normal(0, 1, 1, 32, 32))


def test_weights_that_were_checked_with_one_config_are_checked_again_with_another():
    params, images = CASE.params(), CASE.images()
    pvt_ref.forward(params, images, CONFIG)
    for wrong in (dataclasses.replace(CONFIG, depths=(1, 1, 1, 2)), BARE.config):
        with pytest.raises(ShapeError, match="params do not belong to this config"):
            pvt_ref.forward_pyramid(params, images, wrong)
    mixed = dataclasses.replace(params, head=map_arrays(lambda x: x.astype("f4"), params.head))
    with pytest.raises(ArrayTypeError, match="params mix numpy float64"):
        pvt_ref.forward(mixed, images, CONFIG)


def frames_of(call) -> int:
    """How many functions of the package a call enters."""
    package, count = str(Path(pvt_ref.__file__).parent), 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(package)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def test_a_forward_of_four_blocks_enters_few_functions():
    # not a time, which would be the machine's: what stands between one operation and the next
    params, images = CASE.params(), CASE.images()
    pvt_ref.forward(params, images, CONFIG, ops=REFERENCE)
    assert frames_of(lambda: pvt_ref.forward(params, images, CONFIG, ops=REFERENCE)) <= 600


def test_huge_has_a_name_that_is_not_that_of_pvt_v2():
    assert known_variants()["pvt_v1_huge"] is VARIANTS["pvt_huge_v2"]
    assert set(VARIANTS) <= set(known_variants())


def test_what_is_imported_later_is_there_all_the_same():
    for name in pvt_ref.__all__:
        assert getattr(pvt_ref, name) is not None
        assert name in dir(pvt_ref)
    with pytest.raises(AttributeError, match="module 'pvt_ref' has no attribute 'nothing'"):
        _ = pvt_ref.nothing
