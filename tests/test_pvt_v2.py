"""PVT v2 as a network of the family: its shape, its laws, and everything it goes through.

Properties 52 to 55 of the catalogue that test_properties.py begins stand here, and 43 of the MLP.
"""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from closeness import FORWARD, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from loose import loose
from operations import backward, forward, sra_settings, table_under_test
from PIL import Image
from strategies import normal, random_params, rng_of, seeds, v2_cases

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, Model, ModelInfo, Preprocessing, PVTv2Config, PVTv2Params
from pvt_ref.__main__ import main
from pvt_ref.blocks.conv_mlp import ConvMLPParams, DWConvParams
from pvt_ref.blocks.linear_sra import LinearSRAParams
from pvt_ref.blocks.mlp import MLPParams
from pvt_ref.errors import ConfigError, RangeError, ShapeError
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.models.architecture import architecture_of, param_shapes
from pvt_ref.models.pvt_v2 import PVT_V2
from pvt_ref.report.times import time_operations, time_stages
from pvt_ref.train import LabelledImages, Recipe, fit
from pvt_ref.tree import map_arrays, map_named, named_arrays, to_device

MICRO = PVTv2Config(
    img_size=32,
    num_classes=4,
    embed_dims=(6, 12, 20, 24),
    num_heads=(1, 2, 5, 4),
    mlp_ratios=(2, 3, 2, 2),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 2, 1),
)
LINEAR = dataclasses.replace(MICRO, linear=True)
BOTH = pytest.mark.parametrize("config", [MICRO, LINEAR], ids=["sr", "linear"])
INFO = ModelInfo(title="a small PVT v2", classes=("a", "b", "c", "d"))


# Shape --------------------------------------------------------------------------------------------

#: C, L and E; parameters with and without head; GMACs at 224 x 224; number of keys; drop path.
TABLE = {
    "pvt_v2_b0": ((32, 64, 160, 256), (2, 2, 2, 2), 8, 3_666_760, 3_409_760, 0.566, 178, 0.1),
    "pvt_v2_b1": ((64, 128, 320, 512), (2, 2, 2, 2), 8, 14_009_000, 13_496_000, 2.108, 178, 0.1),
    "pvt_v2_b2": ((64, 128, 320, 512), (3, 4, 6, 3), 8, 25_362_856, 24_849_856, 4.027, 334, 0.1),
    "pvt_v2_b2_li": ((64, 128, 320, 512), (3, 4, 6, 3), 8, 22_553_512, 22_040_512, 3.889, 346, 0.1),
    "pvt_v2_b3": ((64, 128, 320, 512), (3, 4, 18, 3), 8, 45_238_696, 44_725_696, 6.897, 574, 0.3),
    "pvt_v2_b4": ((64, 128, 320, 512), (3, 8, 27, 3), 8, 62_556_072, 62_043_072, 10.101, 834, 0.3),
    "pvt_v2_b5": ((64, 128, 320, 512), (3, 6, 40, 3), 4, 81_956_008, 81_443_008, 11.717, 1054, 0.3),
}


def test_the_variants_are_those_published():
    assert list(TABLE) == list(PVT_V2.variants)
    assert PVT_V2.variants.items() <= VARIANTS.items()


@pytest.mark.parametrize("name", TABLE)
def test_a_variant_costs_what_the_paper_says(name):
    C, L, E, parameters, without_head, gmacs, keys, drop_path = TABLE[name]
    config = VARIANTS[name]
    assert config == PVTv2Config(
        embed_dims=C,
        depths=L,
        mlp_ratios=(E, E, 4, 4),
        num_heads=(1, 2, 5, 8),
        sr_ratios=(8, 4, 2, 1),
        linear=name.endswith("_li"),
        drop_path_rate=drop_path,
    )
    shapes = param_shapes(config)
    assert len(shapes) == keys
    assert sum(map(math.prod, shapes.values())) == parameters
    cost = pvt_ref.count_cost(config)
    assert cost.parameters == parameters
    assert round(cost.macs / 1e9, 3) == gmacs
    assert pvt_ref.count_cost(config, pyramid=True).parameters == without_head
    assert [stage.keys for stage in cost.stages] == [49] * 4  # 7 x 7 at this size, in all of them
    assert architecture_of(config).describe(config) == f"{name}, 1000 classes, 224 px"


def test_keys_come_in_the_authors_order():
    shapes = param_shapes(MICRO)
    assert [key for key in shapes if not key.startswith("block")] == [
        f"{part}{i}{leaf}"
        for i in range(1, 5)
        for part, leaves in (
            ("patch_embed", (".proj.weight", ".proj.bias", ".norm.weight", ".norm.bias")),
            ("norm", (".weight", ".bias")),
        )
        for leaf in leaves
    ] + ["head.weight", "head.bias"]
    block = [key.removeprefix("block1.0.") for key in shapes if key.startswith("block1.0.")]
    parts = ["norm1", *(f"attn.{x}" for x in ("q", "kv", "proj", "sr", "norm")), "norm2"]
    parts += ["mlp.fc1", "mlp.dwconv.dwconv", "mlp.fc2"]
    assert block == [f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")]
    assert shapes["block1.0.mlp.dwconv.dwconv.weight"] == (12, 1, 3, 3)
    assert shapes["block1.0.attn.sr.weight"] == (6, 6, 4, 4)
    assert shapes["patch_embed1.proj.weight"] == (6, 3, 7, 7)
    assert param_shapes(LINEAR)["block4.0.attn.sr.weight"] == (24, 24, 1, 1)
    assert "block4.0.attn.sr.weight" not in shapes
    bare = dataclasses.replace(MICRO, num_classes=0, qkv_bias=False)
    assert set(shapes) - set(param_shapes(bare)) == {
        *("head.weight", "head.bias"),
        *(key for key in shapes if key.endswith(("attn.q.bias", "attn.kv.bias"))),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dims": (6, 12, 20)}, "embed_dims is .*; it must be four whole numbers"),
        ({"num_heads": (4, 2, 5, 4)}, "stage 1: num_heads 4 does not divide embed_dims 6"),
        ({"mlp_ratios": (0.7, 2, 2, 2)}, "stage 1: embed_dims 6 times mlp_ratios 0.7"),
        ({"linear": 1}, "linear is 1; it must be True or False"),
        ({"qkv_bias": None}, "qkv_bias is None; it must be True or False"),
        ({"depths": (1, 2, 1, 2000)}, "depths is .*; each must be at most 1000"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"drop_path_rate": 1}, r"drop_path_rate is 1; it must be in \[0, 1\)"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0"),
        ({"img_size": 36}, "img_size 36 makes 9 rows of tokens in stage 1, no multiple of .* 4"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"this PVT v2 cannot be built:\n  - {message}") as caught:
        dataclasses.replace(MICRO, **changes)
    assert str(caught.value).endswith("change it with dataclasses.replace.")
    assert "VARIANTS['pvt_v2_b0']" in str(caught.value)


def test_all_reasons_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        loose(PVTv2Config)(depths=(1, 1, 1, 0), linear="yes", num_heads=(3, 2, 5, 8))
    assert str(caught.value).count("\n  - ") == 3


def test_a_stage_is_asked_for_by_its_number():
    assert MICRO.of_stage(1)[:2] == (4, 3)
    assert MICRO.of_stage(4)[:2] == (2, 1)
    b0 = VARIANTS["pvt_v2_b0"]
    rates = [block.drop_path_rate for i in range(1, 5) for block in b0.of_stage(i).blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 8))
    assert [b.number for i in range(1, 5) for b in MICRO.of_stage(i).blocks] == [0, 1, 2, 3, 4]
    assert {b.has_relu for i in range(1, 5) for b in LINEAR.of_stage(i).blocks} == {True}
    i: Any
    for i in (0, 5, 1.0, True):
        with pytest.raises(RangeError, match="stages count from 1 to 4"):
            MICRO.of_stage(i)


@given(st.integers(1, 400), st.integers(1, 400))
def test_a_size_fits_if_reduction_loses_no_token(height, width):
    expected = [(height, width)]
    for stride in (4, 2, 2, 2):
        expected.append(tuple(-(-side // stride) for side in expected[-1]))
    assert dataclasses.replace(MICRO, linear=True).grids(height, width) == tuple(expected[1:])
    lost = [
        i
        for i, (grid, R) in enumerate(zip(expected[1:], MICRO.sr_ratios, strict=True), start=1)
        if grid[0] % R or grid[1] % R
    ]
    if not lost:
        assert MICRO.grids(height, width) == tuple(expected[1:])
        return
    with pytest.raises(ShapeError, match=f"{height}x{width} does not fit: its grid in stage") as e:
        MICRO.grids(height, width)
    assert f"in stage {lost[0]} is {expected[lost[0]][0]}x{expected[lost[0]][1]}" in str(e.value)
    padded = [-(-side // 32) * 32 for side in (height, width)]
    assert f"or pad to {padded[0]}x{padded[1]} with pvt_ref.pad_to_multiple(images, 32)" in str(
        e.value
    )
    MICRO.grids(*padded)


def test_sizes_that_are_none_are_refused():
    for size in ((0, 32), (32, -4)):
        with pytest.raises(ShapeError, match="must be positive numbers of pixels"):
            LINEAR.grids(*size)
    with pytest.raises(ShapeError, match="must be whole numbers of pixels"):
        LINEAR.grids(loose(32.0), 32)
    assert (MICRO.size_multiple, LINEAR.size_multiple) == (32, 1)
    assert MICRO.grids(61, 64) == MICRO.grids(64, 64)  # no multiple of 4, and nothing is lost
    with pytest.raises(ShapeError, match="225x224 does not fit: its grid in stage 1 is 57x56"):
        pvt_ref.forward(params_of(), normal(0, 1, 3, 225, 224), MICRO)


# Numbers ------------------------------------------------------------------------------------------


def params_of(config=MICRO, dtype: Any = np.float64, seed=0):
    return random_params(config, seed, dtype)


def test_first_weights_are_drawn_as_released():
    config = dataclasses.replace(MICRO, embed_dims=(30, 60, 100, 120), img_size=64)
    for built in (config, dataclasses.replace(config, linear=True)):
        params = pvt_ref.init_params(built, rng_of(0), np.float64)
        for key, x in named_arrays(params):
            if x.ndim == 1:
                norm = ".norm" in f".{key}" and key.endswith("weight")
                assert np.all(x == (1 if norm else 0)), key
                continue
            groups = x.shape[0] if "dwconv" in key else 1
            expected = 0.02
            if x.ndim == 4:
                expected = math.sqrt(2 * groups / (x.shape[0] * x.shape[2] * x.shape[3]))
            assert abs(x.mean()) < 5 * expected / math.sqrt(x.size), key
            np.testing.assert_allclose(x.std(), expected, rtol=5 / math.sqrt(2 * x.size))


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_version_2_computes_on_every_library(config, dtype, library):
    params = map_arrays(library.asarray, params_of(config, dtype))
    images = normal(1, 2, 3, 64, 32, dtype=dtype)
    logits, cache = pvt_ref.forward_with_cache(params, library.asarray(images), config, rng_of(0))
    grads, dimages = pvt_ref.backward(params, cache, logits, config)
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, library.asarray(images), config)
    more, _ = pvt_ref.backward_pyramid(params, cache, maps, config)
    own, own_images = params_of(config, dtype), images
    expected = pvt_ref.forward(own, own_images, config, ops=REFERENCE)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(np.asarray(logits), expected, atol=tolerance, rtol=tolerance)
    for tree in (grads, more):
        assert isinstance(tree, PVTv2Params)
        for (key, x), (_, w) in zip(named_arrays(tree), named_arrays(own), strict=True):
            assert np.asarray(x).dtype == dtype, key
            assert tuple(x.shape) == w.shape, key
    assert not np.any(np.asarray(more.head.weight))
    assert tuple(dimages.shape) == images.shape


@BOTH
def test_its_gradients_are_slopes(config):
    config = dataclasses.replace(config, drop_rate=0.2, attn_drop_rate=0.1, drop_path_rate=0.3)
    params, images = params_of(config), normal(1, 3, 3, 64, 96)
    logits, cache = pvt_ref.forward_with_cache(params, images, config, rng_of(5))
    dlogits = normal(2, *logits.shape)
    grads, dimages = pvt_ref.backward(params, cache, dlogits, config)
    direction, along = random_params(config, 9), normal(3, *images.shape)

    def at(h):
        moved = map_arrays(lambda w, v: w + h * v, params, direction)
        y, _ = pvt_ref.forward_with_cache(moved, images + h * along, config, rng_of(5))
        return (y * dlogits).sum()

    slope = (dimages * along).sum()
    pairs = zip(named_arrays(grads), named_arrays(direction), strict=True)
    slope += sum((g * v).sum() for (_, g), (_, v) in pairs)
    np.testing.assert_allclose((at(1e-6) - at(-1e-6)) / 2e-6, slope, rtol=1e-6)


@BOTH
def test_the_key_half_of_a_bias_has_no_influence(config):
    params, images = params_of(config), normal(1, 2, 3, 64, 32)
    logits, cache = pvt_ref.forward_with_cache(params, images, config)
    grads, _ = pvt_ref.backward(params, cache, logits, config)
    for key, g in named_arrays(grads):
        if key.endswith("attn.kv.bias"):
            C = len(g) // 2
            assert np.abs(g[:C]).max() < 1e-12 * np.abs(g[C:]).max(), key


@settings(max_examples=20)
@given(case=v2_cases())
def test_52_mean_pooling_ignores_the_order_of_tokens(case):
    params, images, config, ops = case.params(), case.images(), case.config, table_under_test()
    logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
    maps, maps_cache = pvt_ref.forward_pyramid_with_cache(params, images, config, ops=ops)
    B, C_4 = maps[-1].shape[:2]
    tokens = maps[-1].reshape(B, C_4, -1)
    n = tokens.shape[-1]
    for order in (np.arange(n), rng_of(case.seed).permutation(n)):
        by_hand = tokens[..., order].mean(axis=-1) @ params.head.weight.T + params.head.bias
        assert_near(logits, by_hand, FORWARD)
    # hence every token gets the same gradient, whatever the image
    dlogits = normal(case.seed, *logits.shape)
    grads, dimages = pvt_ref.backward(params, cache, dlogits, config)
    dtoken = (dlogits @ params.head.weight / n)[:, :, None, None]
    dmaps = [None, None, None, np.broadcast_to(dtoken, maps[-1].shape)]
    by_maps, dimages_by_maps = pvt_ref.backward_pyramid(params, maps_cache, dmaps, config)
    largest = max(np.abs(g).max() for _, g in named_arrays((grads, dimages)))
    for (key, g), (_, other) in zip(
        named_arrays((grads, dimages)), named_arrays((by_maps, dimages_by_maps)), strict=True
    ):
        if "head" not in key:
            np.testing.assert_allclose(g, other, rtol=0, atol=1e-11 * largest, err_msg=key)


@settings(max_examples=20)
@given(case=v2_cases(classifier=False))
def test_53_every_map_is_normed(case):
    config = dataclasses.replace(case.config, norm_eps=1e-9)
    plain = map_named(
        lambda key, x: np.ones_like(x) if "weight" in key else np.zeros_like(x), case.params()
    )
    norms = {f"norm{i}": getattr(plain, f"norm{i}") for i in range(1, 5)}
    params = dataclasses.replace(case.params(), **norms)
    for x in pvt_ref.forward_pyramid(params, case.images(), config, ops=table_under_test()):
        np.testing.assert_allclose(x.mean(axis=1), 0, atol=1e-12)
        np.testing.assert_allclose(x.std(axis=1), 1, rtol=1e-3)


@settings(max_examples=15)
@given(st.integers(1, 70), st.integers(1, 70))
def test_54_linear_attention_has_49_keys_at_any_size(height, width):
    maps = pvt_ref.attention_maps(
        params_of(LINEAR), normal(1, 1, 3, height, width), LINEAR, ops=table_under_test()
    )
    assert set(maps) == {(1, 0), (2, 0), (2, 1), (3, 0), (4, 0)}
    for (stage, _), weights in maps.items():
        h, w = LINEAR.grids(height, width)[stage - 1]
        assert weights.shape == (1, LINEAR.num_heads[stage - 1], h * w, 49)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-12)


@given(a=st.integers(1, 2), b=st.integers(1, 3), N=st.integers(1, 2), seed=seeds)
def test_55_tokens_of_a_cell_can_change_places(a, b, N, seed):
    # with cells of a x b tokens the means, hence keys and values, stay; the outputs move along
    grid, C = (7 * a, 7 * b), 4
    rng, shapes = rng_of(seed), ((C, C), (2 * C, C), (C, C), (C, C, 1, 1))
    q, kv, proj, sr = (
        LinearParams(rng.standard_normal(s), rng.standard_normal(s[0])) for s in shapes
    )
    p = LinearSRAParams(q, kv, proj, sr, LayerNormParams(np.ones(C), np.zeros(C)))
    told = sra_settings(N, 0.5, 1e-5)
    cells = rng.standard_normal((2, 49, a * b, C))
    order = rng.permutation(a * b)

    def run(cells):
        x = cells.reshape(2, 7, 7, a, b, C).transpose(0, 1, 3, 2, 4, 5).reshape(2, -1, C)
        y, _ = forward("linear_sra", p, x, grid, told)
        by_cell = y.reshape(2, 7, a, 7, b, C).transpose(0, 1, 3, 2, 4, 5)
        return by_cell.reshape(2, 49, a * b, C)

    np.testing.assert_allclose(run(cells[:, :, order]), run(cells)[:, :, order], atol=1e-11)


@given(grid=st.tuples(st.integers(1, 6), st.integers(1, 6)), hidden=st.integers(1, 9), seed=seeds)
def test_43_a_centred_kernel_makes_an_mlp_without_it(grid, hidden, seed):
    rng, C = rng_of(seed), 4
    one_hot = np.zeros((hidden, 1, 3, 3))
    one_hot[:, :, 1, 1] = 1
    fc1 = LinearParams(rng.standard_normal((hidden, C)), rng.standard_normal(hidden))
    fc2 = LinearParams(rng.standard_normal((C, hidden)), rng.standard_normal(C))
    x = rng.standard_normal((2, grid[0] * grid[1], C))
    p = ConvMLPParams(fc1, DWConvParams(ConvParams(one_hot, np.zeros(hidden))), fc2)
    y, cache = forward("conv_mlp", p, x, grid)
    plain, plain_cache = forward("mlp", MLPParams(fc1, fc2), x)
    np.testing.assert_allclose(y, plain, rtol=1e-11, atol=1e-12)
    dy = normal(seed, *y.shape)
    dx, grads = backward("conv_mlp", p, cache, dy)
    plain_dx, plain_grads = backward("mlp", MLPParams(fc1, fc2), plain_cache, dy)
    np.testing.assert_allclose(dx, plain_dx, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(grads.fc1.weight, plain_grads.fc1.weight, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(grads.fc2.weight, plain_grads.fc2.weight, rtol=1e-10, atol=1e-10)


def test_a_pixel_shift_of_a_stride_moves_the_first_map():
    """Convolutions go with the image, away from the border that the padding reaches."""
    config = dataclasses.replace(LINEAR, depths=(1, 1, 1, 1))
    params = params_of(config)
    images = normal(1, 1, 3, 64, 64)
    p = params.patch_embed1.proj
    x, shifted = (np.moveaxis(y, 1, -1) for y in (images, np.roll(images, 4, axis=3)))
    a, b = (conv.forward(p, y, REFERENCE, 4, 3)[0] for y in (x, shifted))
    np.testing.assert_allclose(b[:, :, 2:], a[:, :, 1:-1], rtol=1e-12)


def test_types_of_weights_say_which_attention_and_mlp_it_is():
    for config, kind in ((MICRO, "SRAParams"), (LINEAR, "LinearSRAParams")):
        block = params_of(config).block1[0]
        assert type(block.attn).__name__ == kind
        assert isinstance(block.mlp, ConvMLPParams)
    assert all(isinstance(b.attn, LinearSRAParams) for b in params_of(LINEAR).block4)


@BOTH
def test_the_tables_agree_and_their_parts_compute(config):
    params, images = params_of(config), normal(1, 2, 3, 64, 96)
    asked = set()
    table = pvt_ref.blocked_ops(2)
    watched = table.watched(lambda call: asked.add(call.operation.name), params=params)
    y, cache = pvt_ref.forward_with_cache(params, images, config, ops=table)
    np.testing.assert_allclose(pvt_ref.forward(params, images, config, ops=watched), y, rtol=1e-10)
    z, other = pvt_ref.forward_with_cache(params, images, config, ops=REFERENCE)
    np.testing.assert_allclose(y, z, rtol=1e-10)
    for (key, a), (_, b) in zip(
        named_arrays(pvt_ref.backward(params, cache, z, config)),
        named_arrays(pvt_ref.backward(params, other, z, config)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(np.abs(b).max(), 1), err_msg=key)
    readable = {op.name for op in PVT_V2.operations} - {"sum_rows"}
    assert asked <= readable
    assert {"conv", "block"} <= asked
    # the kernel of a block computes all of it, but for linear attention; that of the MLP likewise
    parts = {"linear_sra", "pool", "conv_mlp", "attention", "patch_embed"}
    assert parts & asked == (parts if config.linear else set())
    assert not asked & {"depthwise_conv", "relu"}


@BOTH
def test_the_tables_agree_where_samples_drop_a_branch_and_threads_share_channels(config):
    config = dataclasses.replace(config, drop_path_rate=0.5, mlp_ratios=(12, 8, 8, 8))
    params, images = params_of(config), normal(1, 5, 3, 32, 64)  # few rows: channels are shared
    found = []
    for table in (REFERENCE, pvt_ref.blocked_ops(3)):
        y, cache = pvt_ref.forward_with_cache(params, images, config, ops=table, rng=rng_of(2))
        found.append(named_arrays((y, *pvt_ref.backward(params, cache, np.cos(y), config))))
    for (key, a), (_, b) in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(np.abs(a).max(), 1), err_msg=key)


def test_a_replacement_is_asked_for_or_refused():
    from pvt_ref.layers.depthwise_conv import depthwise_conv
    from pvt_ref.layers.position import position

    params, images = params_of(), normal(1, 1, 3, 32, 32)
    calls = []

    def forward(*args, **kwargs):
        calls.append(1)
        return depthwise_conv.forward(*args, **kwargs)

    twin = pvt_ref.Operation(forward, depthwise_conv.backward)
    for table in (REFERENCE, pvt_ref.blocked_ops(1)):
        calls.clear()
        pvt_ref.forward(params, images, MICRO, ops=table.replace(depthwise_conv, twin))
        assert len(calls) == sum(MICRO.depths)
    with pytest.raises(ConfigError, match="ops replaces position, which a PVT v2 never asks for"):
        pvt_ref.forward(params, images, MICRO, ops=REFERENCE.replace(position, position))


# Everything it goes through -----------------------------------------------------------------------


@BOTH
def test_a_file_of_it_is_read_as_it_was_saved(config, tmp_path):
    model = Model(params_of(config, np.float32), config, info=INFO)
    pvt_ref.save(tmp_path / "v2.safetensors", model)
    again = pvt_ref.load(tmp_path / "v2.safetensors")
    assert again.config == config
    assert again.info == INFO
    for (key, a), (_, b) in zip(
        named_arrays(again.params), named_arrays(model.params), strict=True
    ):
        assert a.tobytes() == b.tobytes(), key


@BOTH
def test_a_model_of_it_predicts_pictures(config):
    model = Model(params_of(config, np.float32), config, info=INFO)
    pictures = [Image.new("RGB", (40, 50), color) for color in ("red", "blue")]
    answers = model.predict(pictures)
    assert [{p.label for p in answer} for answer in answers] == [set("abcd")] * 2
    images = model.preprocess(pictures, (64, 32))
    assert [x.shape for x in model.pyramid(images)] == [
        (2, C, 64 // s, 32 // s) for C, s in zip(config.embed_dims, (4, 8, 16, 32), strict=True)
    ]
    for size in [(64, 32), (61, 64)]:  # 61 pixels make 16, 8, 4 and 2 rows
        maps = model.pyramid(normal(0, 1, 3, *size, dtype=np.float32))
        for said, x in zip(model.feature_info, maps, strict=True):
            assert said.keys() == {"num_chs", "reduction"}
            sides = [math.ceil(side / said["reduction"]) for side in size]
            assert x.shape == (1, said["num_chs"], *sides)
    assert "custom configuration, 4 classes, 32 px" in repr(model)
    np.testing.assert_array_equal(to_device(model, "cpu")(images), model(images))
    larger = pvt_ref.with_new_head(model, 7, rng_of(0))
    assert larger(images).shape == (2, 7)
    bare = dataclasses.replace(config, num_classes=0)
    body = Model(dataclasses.replace(model.params, head=None), bare)
    assert pvt_ref.with_new_head(body, 3, rng_of(0))(images).shape == (2, 3)
    grey = pvt_ref.with_channels(model, 1)
    same = np.repeat(images[:, :1], 3, axis=1)
    np.testing.assert_allclose(grey(images[:, :1]), model(same), atol=1e-4)
    prepared = pvt_ref.prepare(model.params, config, (64, 32))
    np.testing.assert_array_equal(pvt_ref.forward(prepared, images), model(images))


@BOTH
@pytest.mark.parametrize("pyramid", [False, True])
def test_its_bill_is_what_it_multiplies(config, pyramid):
    cost = pvt_ref.count_cost(config, (64, 96), batch=2, pyramid=pyramid)
    shapes, macs = param_shapes(config), 0 if pyramid else 2 * 4 * 24
    for i, (h, w) in enumerate(config.grids(64, 96)):
        n, C, L, R = h * w, config.embed_dims[i], config.depths[i], config.sr_ratios[i]
        E, m = config.mlp_ratios[i], 49 if config.linear else n // R**2
        macs += 2 * n * math.prod(shapes[f"patch_embed{i + 1}.proj.weight"])
        reduce = m * math.prod(shapes.get(f"block{i + 1}.0.attn.sr.weight", (0,)))
        attention = 2 * n * C * C + 2 * m * C * C + 2 * n * m * C
        macs += 2 * L * (reduce + attention + 2 * n * E * C * C + 9 * E * C * n)
    assert cost.macs == macs
    items = {(item.stage, item.operation) for item in cost.items}
    assert {(1, "patch_embed.proj"), (1, "mlp.dwconv.dwconv"), (1, "norm")} <= items
    assert ((4, "attn.pool") in items) is config.linear
    assert cost.peak_bytes > 2 * 3 * 64 * 96 * 4
    assert cost.cache_bytes > cost.peak_bytes


def test_its_times_are_those_of_its_stages():
    params, images = params_of(LINEAR), normal(1, 1, 3, 32, 32)
    assert len(time_stages(params, images, LINEAR, repeats=1)) == 5
    found = time_operations(params, images, LINEAR, repeats=1, ops=REFERENCE)
    assert {(2, "mlp.dwconv.dwconv"), (2, "attn.sr"), (3, "patch_embed.norm")} <= set(found)


def test_it_learns_stops_and_goes_on(tmp_path):
    rng = rng_of(0)
    labels = rng.integers(0, 4, 40)
    pixels = 60 * labels[:, None, None, None] + rng.integers(0, 40, (40, 3, 32, 32))
    data = LabelledImages(pixels.astype("uint8"), labels, Preprocessing())
    config = dataclasses.replace(
        LINEAR, depths=(1, 1, 1, 1), drop_rate=0.05, attn_drop_rate=0.05, drop_path_rate=0.1
    )
    recipe = Recipe(
        epochs=12, batch_size=10, lr=3e-3, accumulate=2, ema_decay=0.9, mixup_alpha=0.1, cutout=4,
        drop_path_ramp_epochs=2,
    )  # fmt: skip
    run = fit(config, recipe, data, data, tmp_path / "run", info=INFO)
    assert run.finished
    assert run.state.best_accuracy > 0.5
    assert pvt_ref.load(tmp_path / "run" / "best.safetensors").config == config


def test_the_command_line_takes_it(tmp_path, capsys):
    model = Model(params_of(LINEAR, np.float32), LINEAR, info=INFO)
    weights = str(tmp_path / "v2.safetensors")
    pvt_ref.save(weights, model)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    assert main(["classify", str(tmp_path / "red.png"), "--weights", weights, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)[0]
    assert {p["label"] for p in answer["predictions"]} == set("abcd")
    assert main(["summary", "pvt_v2_b0"]) == 0
    out = capsys.readouterr().out
    assert "3,666,760" in out
    assert "mlp.dwconv.dwconv x2" in out
    assert main(["summary", weights, "--size", "45", "61"]) == 0
    assert "a small PVT v2" in capsys.readouterr().out
    assert main(["convert", weights, str(tmp_path / "again.safetensors")]) == 0
    assert pvt_ref.load(tmp_path / "again.safetensors").config == LINEAR


# What a configuration says ------------------------------------------------------------------------


@BOTH
def test_a_factor_of_the_scores_may_stand_in_the_queries_weights_as_well(config):
    params, images = params_of(config), normal(1, 2, 3, 64, 32)
    halved = map_named(lambda key, x: x / 2 if ".attn.q." in key else x, params)
    said, one = (dataclasses.replace(config, qk_scale=scale) for scale in (0.5, 1.0))
    for ops in (REFERENCE, None):
        y = pvt_ref.forward(params, images, said, ops=ops)
        np.testing.assert_allclose(pvt_ref.forward(halved, images, one, ops=ops), y, rtol=1e-12)
        assert np.abs(pvt_ref.forward(params, images, one, ops=ops) - y).max() > 1e-6


@pytest.mark.parametrize("sr_ratios", [(8, 4, 2, 1), (3, 4, 1, 1), (5, 1, 1, 3), (1, 1, 1, 1)])
def test_the_size_multiple_is_the_smallest_that_all_stages_divide(sr_ratios):
    config = dataclasses.replace(MICRO, img_size=960, sr_ratios=sr_ratios)
    g = config.size_multiple
    assert config.grids(g, 2 * g) == tuple((g // s, 2 * g // s) for s in config.strides)
    sides = [s * R for s, R in zip(config.strides, sr_ratios, strict=True)]
    assert [n for n in range(1, g + 1) if not any(n % side for side in sides)] == [g]


def test_an_image_far_too_small_is_told_a_size_that_fits():
    with pytest.raises(ShapeError, match=r"5x70 does not fit.* resize to 32x64, or pad to 32x96"):
        MICRO.grids(5, 70)


def test_ratios_may_be_broken_if_hidden_units_are_whole():
    config = dataclasses.replace(MICRO, mlp_ratios=(1.5, 2.5, 0.5, 2))
    shapes = param_shapes(config)
    hidden = [shapes[f"block{i}.0.mlp.fc1.weight"][0] for i in range(1, 5)]
    assert hidden == [9, 30, 10, 48]
    assert pvt_ref.forward(params_of(config), normal(1, 1, 3, 32, 32), config).shape == (1, 4)


def test_what_is_no_structure_leaves_a_variant_its_name():
    variant = VARIANTS["pvt_v2_b2"]
    changes = {"img_size": 256, "in_chans": 4, "num_classes": 10, "norm_eps": 1e-5}
    changes |= {"projection_norm_eps": 1e-6, "drop_rate": 0.1, "attn_drop_rate": 0.1}
    for name, value in {**changes, "drop_path_rate": 0.0}.items():
        assert PVT_V2.describe(dataclasses.replace(variant, **{name: value})).startswith(
            "pvt_v2_b2, "
        ), name
    other = dataclasses.replace(variant, qkv_bias=False)
    assert PVT_V2.describe(other).startswith("custom configuration, ")
