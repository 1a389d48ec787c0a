"""Configurations, the records of weights, and what moves, counts and saves them: no mathematics."""

import dataclasses
import math
from collections import OrderedDict, namedtuple
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from loose import loose
from strategies import configs, normal, random_params, rng_of

import pvt_ref
from pvt_ref import VARIANTS, Model, PVTConfig, PVTParams, count_cost
from pvt_ref.models.architecture import config_to_dict, param_shapes
from pvt_ref.models.pvt.config import VARIANTS as PVT_VARIANTS
from pvt_ref.tree import map_arrays, named_arrays

SMALL = replace(
    VARIANTS["pvt_tiny"],
    img_size=32,
    num_classes=5,
    embed_dims=(4, 8, 4, 8),
    num_heads=(1, 2, 1, 2),
    mlp_ratios=(1, 1, 1, 1),
    depths=(1, 1, 1, 1),
)
BARE = replace(SMALL, num_classes=0)

# The variants ---------------------------------------------------------------------------------

NARROW, WIDE = (64, 128, 320, 512), (128, 256, 512, 768)
TABLE = [  # name, C, N, L, parameters
    ("pvt_tiny", NARROW, (1, 2, 5, 8), (2, 2, 2, 2), 13_229_288),
    ("pvt_small", NARROW, (1, 2, 5, 8), (3, 4, 6, 3), 24_485_864),
    ("pvt_medium", NARROW, (1, 2, 5, 8), (3, 4, 18, 3), 44_208_104),
    ("pvt_large", NARROW, (1, 2, 5, 8), (3, 8, 27, 3), 61_369_320),
    ("pvt_huge_v2", WIDE, (2, 4, 8, 12), (3, 10, 60, 3), None),
]


@pytest.mark.parametrize(("name", "C", "N", "L", "parameters"), TABLE)
def test_variant(name, C, N, L, parameters):
    config = VARIANTS[name]
    assert config == PVTConfig(
        img_size=224,
        in_chans=3,
        num_classes=1000,
        patch_sizes=(4, 2, 2, 2),
        embed_dims=C,
        num_heads=N,
        mlp_ratios=(8, 8, 4, 4),
        qkv_bias=True,
        qk_scale=None,
        drop_rate=0,
        attn_drop_rate=0,
        drop_path_rate=0,
        depths=L,
        sr_ratios=(8, 4, 2, 1),
        norm_eps=1e-6,
        projection_norm_eps=1e-5,
    )
    count = sum(math.prod(shape) for shape in param_shapes(config).values())
    if parameters is None:
        assert round(count / 1e6, 1) == 304.9
    else:
        assert count == parameters
    assert [c // n for c, n in zip(C, N, strict=True)] == [64] * 4
    assert [config.of_stage(i).scale for i in range(1, 5)] == [1 / 8] * 4


def test_there_are_no_other_variants():
    assert list(PVT_VARIANTS) == [row[0] for row in TABLE]


# Configurations -------------------------------------------------------------------------------


def test_replace_validates_again():
    config = replace(SMALL, num_classes=7)
    assert config.num_classes == 7
    assert replace(config, num_classes=5) == SMALL
    with pytest.raises(pvt_ref.PVTError, match="num_heads 3 does not divide embed_dims 4"):
        replace(SMALL, num_heads=(3, 2, 1, 2))


def test_values_become_plain_python():
    config = loose(PVTConfig)(
        img_size=np.int64(64),
        embed_dims=[np.int32(64), 128, 320, 512],
        mlp_ratios=[8.0, np.float32(0.5), 4, 4],
        depths=[1, 1, 1, 1],
        drop_rate=np.float32(0.25),
        norm_eps=0,
        qk_scale=1,
    )
    plain = config_to_dict(config)
    assert plain["embed_dims"] == (64, 128, 320, 512)
    assert plain["mlp_ratios"] == (8, 0.5, 4, 4)
    assert list(plain) == [f.name for f in dataclasses.fields(PVTConfig)]
    for name, value in plain.items():
        values = value if type(value) is tuple else (value,)
        assert {type(v) for v in values} <= {int, float, bool, type(None)}, name
    for name in ("embed_dims", "num_heads", "depths", "sr_ratios", "patch_sizes", "mlp_ratios"):
        assert type(plain[name]) is tuple, name
    for name in ("drop_rate", "attn_drop_rate", "drop_path_rate", "norm_eps", "qk_scale"):
        assert type(plain[name]) is float, name
    assert PVTConfig(**plain) == config
    assert hash(PVTConfig(**plain)) == hash(config)


def test_configurations_are_frozen():
    with pytest.raises(FrozenInstanceError):
        SMALL.num_classes = 3
    with pytest.raises(FrozenInstanceError):
        SMALL.of_stage(1).depth = 3
    with pytest.raises((AttributeError, TypeError)):  # slots: a misspelt field is no new field
        SMALL.num_clases = 3
    with pytest.raises(TypeError):
        loose(PVTConfig)(224)  # by name only


def test_strides_grids_and_table_sides():
    config = VARIANTS["pvt_tiny"]
    assert config.strides == (4, 8, 16, 32)
    assert config.size_multiple == 32
    assert config.table_sides == (56, 28, 14, 7)
    assert config.grids(224, 224) == ((56, 56), (28, 28), (14, 14), (7, 7))
    assert config.grids(64, 96) == ((16, 24), (8, 12), (4, 6), (2, 3))
    odd = PVTConfig(img_size=72, patch_sizes=(3, 1, 2, 2), sr_ratios=(2, 4, 2, 1), num_classes=0)
    assert odd.strides == (3, 3, 6, 12)
    assert odd.size_multiple == 12
    assert odd.table_sides == (24, 24, 12, 6)
    assert odd.grids(12, 36) == ((4, 12), (4, 12), (2, 6), (1, 3))
    assert replace(odd, img_size=216, sr_ratios=(1, 1, 9, 1)).size_multiple == 108  # lcm(6 * 9, 12)


@given(config=configs())
def test_the_size_multiple_is_the_smallest_that_loses_no_pixel(config):
    def loses(size: int) -> bool:
        for P, R in zip(config.patch_sizes, config.sr_ratios, strict=True):
            size, rest = divmod(size, P)
            if rest or size % R:
                return True
        return size == 0

    smallest = next(size for size in range(1, 1000) if not loses(size))
    assert config.size_multiple == smallest
    with pytest.raises(pvt_ref.PVTError, match=f"multiples of {smallest}"):
        config.grids(2 * smallest, smallest + 1)


def test_stage_reads_off_what_a_stage_needs():
    config = replace(
        SMALL, mlp_ratios=(2, 1.5, 3, 1), qk_scale=0.3, drop_rate=0.1, attn_drop_rate=0.2
    )
    stage = config.of_stage(2)
    assert (stage.patch_size, stage.embed_dim, stage.num_heads, stage.hidden_dim) == (2, 8, 2, 12)
    assert (stage.depth, stage.sr_ratio, stage.scale) == (1, 4, 0.3)
    assert (stage.drop_rate, stage.attn_drop_rate) == (0.1, 0.2)
    assert (stage.norm_eps, stage.projection_norm_eps) == (1e-6, 1e-5)
    assert [SMALL.of_stage(i).scale for i in range(1, 5)] == [0.5] * 4  # 1 / sqrt(d), d = 4
    assert replace(SMALL, qk_scale=0).of_stage(1).scale == 0.0


@pytest.mark.parametrize("depths", [(2, 2, 2, 2), (3, 4, 6, 3), (1, 1, 1, 1), (1, 5, 2, 1)])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_drop_path_rates_grow_linearly_over_all_blocks(depths, rate):
    config = replace(SMALL, depths=depths, drop_path_rate=rate)
    per_stage = [config.of_stage(i).drop_path_rates for i in range(1, 5)]
    assert [len(rates) for rates in per_stage] == list(depths)
    np.testing.assert_allclose(
        np.concatenate(per_stage), np.linspace(0, rate, sum(depths)), rtol=1e-14
    )
    assert per_stage[0][0] == 0.0
    assert {type(r) for rates in per_stage for r in rates} == {float}


def test_only_the_last_block_has_the_whole_drop_path_rate():
    rates = replace(SMALL, drop_path_rate=0.3).of_stage(4).drop_path_rates
    assert rates == (0.3,)  # a stage of a single block


# Names, order, shapes -------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "golden.npz"
PREFIX = "tiny_224/logits/grad/"


@pytest.fixture(scope="module")
def authors_keys():
    """Keys of the released model's gradients, in the order of its state dict."""
    with np.load(GOLDEN) as file:
        names = [name.removeprefix(PREFIX) for name in file.files if name.startswith(PREFIX)]
    assert names[0] == "images"
    return names[1:]


def test_keys_and_their_order_are_the_authors(authors_keys):
    config = VARIANTS["pvt_tiny"]
    assert list(param_shapes(config)) == authors_keys
    zeros = {key: np.broadcast_to(np.float32(0), s) for key, s in param_shapes(config).items()}
    params = pvt_ref.from_state_dict(zeros, config)
    assert list(pvt_ref.to_state_dict(params)) == authors_keys
    shuffled = {key: zeros[key] for key in sorted(zeros)}
    assert list(pvt_ref.to_state_dict(pvt_ref.from_state_dict(shuffled, config))) == authors_keys


def test_shapes_are_those_of_the_released_files():
    shapes = param_shapes(VARIANTS["pvt_tiny"])
    expected = {
        "pos_embed1": (1, 3136, 64),
        "pos_embed3": (1, 196, 320),
        "pos_embed4": (1, 50, 512),
        "cls_token": (1, 1, 512),
        "patch_embed1.proj.weight": (64, 3, 4, 4),
        "patch_embed3.proj.weight": (320, 128, 2, 2),
        "patch_embed3.norm.bias": (320,),
        "block1.0.attn.q.weight": (64, 64),
        "block1.1.attn.kv.weight": (128, 64),
        "block1.1.attn.kv.bias": (128,),
        "block1.0.attn.sr.weight": (64, 64, 8, 8),
        "block3.1.attn.sr.weight": (320, 320, 2, 2),
        "block2.0.mlp.fc1.weight": (1024, 128),
        "block4.0.mlp.fc2.weight": (512, 2048),
        "norm.weight": (512,),
        "head.weight": (1000, 512),
        "head.bias": (1000,),
    }
    assert {key: shapes[key] for key in expected} == expected
    assert not [key for key in shapes if key.startswith("block4") and ("sr" in key)]


def test_what_a_configuration_lacks_is_none():
    params = random_params(replace(BARE, qkv_bias=False), 0)
    assert params.cls_token is params.norm is params.head is None
    assert params.block1[0].attn.q.bias is params.block1[0].attn.kv.bias is None
    assert params.block1[0].attn.proj.bias is not None
    assert params.block4[0].attn.sr is params.block4[0].attn.norm is None
    assert params.pos_embed4.shape == (1, 1, 8)  # no row for a cls token
    assert random_params(SMALL, 0).pos_embed4.shape == (1, 2, 8)


def test_a_stage_is_a_view_of_the_weights():
    params = random_params(SMALL, 0)
    for i in range(4):
        stage = params.of_stage(i + 1)
        assert stage.patch_embed is getattr(params, f"patch_embed{i + 1}")
        assert stage.pos_embed is getattr(params, f"pos_embed{i + 1}")
        assert stage.blocks is getattr(params, f"block{i + 1}")


# Fresh weights --------------------------------------------------------------------------------

INIT = replace(
    VARIANTS["pvt_tiny"],
    img_size=64,
    embed_dims=(32, 64, 40, 64),
    num_heads=(1, 2, 5, 4),
    mlp_ratios=(4, 4, 4, 4),
    num_classes=50,
)


@pytest.fixture(scope="module")
def fresh() -> dict[str, np.ndarray]:
    return pvt_ref.to_state_dict(pvt_ref.init_params(INIT, rng_of(5), np.float64))


def is_projection(key: str) -> bool:
    return (".proj." in key and key.startswith("patch_embed")) or ".sr." in key


def test_fresh_norms_and_linear_biases(fresh):
    seen = set()
    for key, x in fresh.items():
        owner, _, last = key.rpartition(".")
        if "norm" in owner.rpartition(".")[2]:
            np.testing.assert_array_equal(x, 1.0 if last == "weight" else 0.0, err_msg=key)
        elif last == "bias" and not is_projection(key):
            np.testing.assert_array_equal(x, 0.0, err_msg=key)
        else:
            assert np.all(x != 0), key
            continue
        seen.add(key)
    assert {"norm.weight", "norm.bias", "head.bias", "block1.0.mlp.fc1.bias"} <= seen
    assert {"block4.1.attn.kv.bias", "block1.0.attn.norm.weight", "patch_embed2.norm.bias"} <= seen


def test_fresh_linear_weights_tables_and_cls_token_are_normal(fresh):
    seen = set()
    for key, x in fresh.items():
        linear = key.endswith("weight") and x.ndim == 2
        if not linear and key != "cls_token" and not key.startswith("pos_embed"):
            continue
        seen.add(key)
        z = x.ravel() / 0.02
        assert abs(z.mean()) < 5 / math.sqrt(z.size), key
        assert abs(z.std() - 1) < 5 / math.sqrt(2 * z.size), key
        if z.size >= 2000:  # normal and not uniform: as many beyond 1 and 2 deviations
            assert abs((np.abs(z) < 1).mean() - 0.6827) < 0.05, key
            assert abs((np.abs(z) > 2).mean() - 0.0455) < 0.03, key
    assert {"cls_token", "pos_embed1", "pos_embed4", "head.weight"} <= seen
    assert {
        "block1.0.attn.q.weight",
        "block1.0.attn.proj.weight",
        "block3.1.mlp.fc2.weight",
    } <= seen
    together = np.concatenate([fresh[key].ravel() for key in seen]) / 0.02
    assert abs(together.mean()) < 0.01
    assert abs(together.std() - 1) < 0.01


def test_fresh_projections_are_uniform_like_pytorchs_convolutions(fresh):
    import torch

    checked = 0
    for key, x in fresh.items():
        if not is_projection(key):
            continue
        kernel = fresh[key.rpartition(".")[0] + ".weight"]
        bound = 1 / math.sqrt(math.prod(kernel.shape[1:]))
        assert np.abs(x).max() <= bound, key
        assert np.abs(x).max() > bound * (1 - 10 / x.size), key
        u = x.ravel() / bound
        assert abs(u.mean()) < 5 / math.sqrt(3 * u.size), key
        assert abs((u * u).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / u.size), key
        checked += 1
    assert checked == 2 * (4 + 6)  # weight and bias of each patch and reduction projection
    # the bound is what PyTorch gives a convolution by default, its bias included
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 20_000, 2, 2)
    bound = 1 / math.sqrt(3 * 2 * 2)
    for parameter in (conv.weight, conv.bias):
        largest = float(parameter.detach().abs().max())
        assert bound * 0.999 < largest <= bound * (1 + 1e-6)


def test_fresh_float32_is_fresh_float64_rounded(fresh):
    single = pvt_ref.to_state_dict(pvt_ref.init_params(INIT, rng_of(5), np.float32))
    by_default = pvt_ref.to_state_dict(pvt_ref.init_params(INIT, rng_of(5)))
    for key, x in fresh.items():
        assert single[key].dtype == by_default[key].dtype == np.float32
        np.testing.assert_array_equal(single[key], x.astype(np.float32), err_msg=key)
        np.testing.assert_array_equal(by_default[key], single[key], err_msg=key)
        assert x.shape == param_shapes(INIT)[key]


def test_the_seed_decides(fresh):
    again = pvt_ref.to_state_dict(pvt_ref.init_params(INIT, rng_of(5), "float64"))
    other = pvt_ref.to_state_dict(pvt_ref.init_params(INIT, rng_of(6), "float64"))
    for key, x in fresh.items():
        np.testing.assert_array_equal(again[key], x, err_msg=key)
    assert not np.array_equal(other["head.weight"], fresh["head.weight"])
    rng = rng_of(5)
    pvt_ref.init_params(INIT, rng, np.float64)
    second = pvt_ref.init_params(INIT, rng, np.float64)  # the generator has moved on
    assert not np.array_equal(second.head.weight, fresh["head.weight"])


def test_fresh_arrays_are_all_different(fresh):
    drawn = [x.ravel()[:4] for x in fresh.values() if np.ptp(x.ravel()) > 0]
    assert len({x.tobytes() for x in drawn}) == len(drawn)


# State dicts ----------------------------------------------------------------------------------


@given(config=configs())
@settings(max_examples=20)
def test_state_dict_round_trip_shares_the_arrays(config):
    params = random_params(config, 3)
    state = pvt_ref.to_state_dict(params)
    assert {key: x.shape for key, x in state.items()} == param_shapes(config)
    again = pvt_ref.from_state_dict(state, config)
    assert isinstance(again, PVTParams)
    for key, x in named_arrays(again):
        assert x is state[key], key
    assert list(state) == [key for key, _ in named_arrays(params)]


def test_a_key_names_the_way_to_its_array():
    params = random_params(SMALL, 3)
    state = pvt_ref.to_state_dict(params)
    assert state["block1.0.attn.q.weight"] is params.block1[0].attn.q.weight
    assert state["patch_embed3.norm.bias"] is params.patch_embed3.norm.bias
    assert state["block2.0.attn.sr.bias"] is params.block2[0].attn.sr.bias
    assert state["block4.0.mlp.fc2.weight"] is params.block4[0].mlp.fc2.weight
    assert state["pos_embed4"] is params.pos_embed4
    assert state["head.bias"] is params.head.bias


def test_any_mapping_will_do_and_is_left_as_it_was():
    state = OrderedDict(pvt_ref.to_state_dict(random_params(SMALL, 3)))
    before = dict(state)
    pvt_ref.from_state_dict(state, SMALL)
    assert state == before


def test_half_precision_becomes_single():
    state = pvt_ref.to_state_dict(random_params(SMALL, 3, np.float32))
    halves = {key: x.astype(np.float16) for key, x in state.items()}
    params = pvt_ref.from_state_dict(halves, SMALL)
    for key, x in named_arrays(params):
        assert x.dtype == np.float32, key
        np.testing.assert_array_equal(x, halves[key].astype(np.float32), err_msg=key)
    some = dict(state) | {"norm.bias": halves["norm.bias"]}
    params = pvt_ref.from_state_dict(some, SMALL)
    assert params.norm.bias.dtype == np.float32
    assert params.norm.weight is state["norm.weight"]


@pytest.mark.parametrize("narrow", [np.float16, np.float32])
def test_one_float64_makes_all_float64(narrow):
    state = pvt_ref.to_state_dict(random_params(SMALL, 3, np.float32))
    state = {key: x.astype(narrow) for key, x in state.items()}
    state["cls_token"] = state["cls_token"].astype(np.float64)
    params = pvt_ref.from_state_dict(state, SMALL)
    for key, x in named_arrays(params):
        assert x.dtype == np.float64, key
        np.testing.assert_array_equal(x, state[key], err_msg=key)
    assert params.cls_token is state["cls_token"]
    pvt_ref.forward(params, normal(0, 1, 3, 32, 32), SMALL)


# A new head -----------------------------------------------------------------------------------


def test_a_new_head_and_all_else_the_same_objects():
    model = Model(random_params(SMALL, 3), SMALL, "from somewhere")
    tuned = pvt_ref.with_new_head(model, 11, rng_of(1))
    assert tuned.config == replace(SMALL, num_classes=11)
    assert tuned.params.head.weight.shape == (11, 8)
    np.testing.assert_array_equal(tuned.params.head.bias, np.zeros(11))
    for f in dataclasses.fields(PVTParams):
        same = getattr(tuned.params, f.name) is getattr(model.params, f.name)
        assert same == (f.name != "head"), f.name
    assert model.params.head.weight.shape == (5, 8)  # the old model is as it was
    assert "from somewhere" in tuned.source
    assert "11 classes" in tuned.source
    images = normal(4, 2, 3, 32, 32)
    assert tuned(images).shape == (2, 11)
    for a, b in zip(tuned.pyramid(images), model.pyramid(images), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_new_head_of_the_same_count_is_new_all_the_same():
    model = Model(random_params(SMALL, 3), SMALL)
    tuned = pvt_ref.with_new_head(model, 5, rng_of(1))
    assert not np.any(tuned.params.head.weight == model.params.head.weight)
    again = pvt_ref.with_new_head(model, 5, rng_of(1))
    np.testing.assert_array_equal(again.params.head.weight, tuned.params.head.weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("config", [SMALL, BARE], ids=["classifier", "backbone"])
def test_a_new_head_is_drawn_like_a_fresh_one(dtype, config):
    model = Model(random_params(config, 3, dtype), config)
    tuned = pvt_ref.with_new_head(model, 2000, rng_of(1))
    weight = tuned.params.head.weight
    assert abs(weight.std() - 0.02) < 0.0005
    assert abs(weight.mean()) < 0.0008
    for key, x in named_arrays(tuned.params):
        assert x.dtype == dtype, key


def test_a_backbone_becomes_a_classifier_with_the_same_pyramid():
    model = Model(random_params(BARE, 3), BARE)
    tuned = pvt_ref.with_new_head(model, 7, rng_of(1))
    images = normal(4, 2, 3, 64, 32)  # also where the tables are resized
    assert tuned(images).shape == (2, 7)
    for a, b in zip(tuned.pyramid(images), model.pyramid(images), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(tuned.params.pos_embed4[:, 1:], model.params.pos_embed4)
    assert 0 < np.abs(tuned.params.pos_embed4[:, 0]).max() < 0.2
    assert 0 < np.abs(tuned.params.cls_token).max() < 0.2
    np.testing.assert_array_equal(tuned.params.norm.weight, 1.0)
    np.testing.assert_array_equal(tuned.params.norm.bias, 0.0)
    changed = {"pos_embed4", "cls_token", "norm", "head"}
    for f in dataclasses.fields(PVTParams):
        same = getattr(tuned.params, f.name) is getattr(model.params, f.name)
        assert same == (f.name not in changed), f.name


# Model ----------------------------------------------------------------------------------------


def test_model_is_its_functions():
    params = random_params(SMALL, 3)
    model = Model(params, SMALL)
    images = normal(4, 2, 3, 64, 32)
    np.testing.assert_array_equal(model(images), pvt_ref.forward(params, images, SMALL))
    maps = model.pyramid(images)
    for a, b in zip(maps, pvt_ref.forward_pyramid(params, images, SMALL), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [x.shape[1:] for x in maps] == [(4, 16, 8), (8, 8, 4), (4, 4, 2), (8, 2, 1)]
    assert model.source == "made in memory"


def test_model_is_frozen_and_keeps_nothing():
    model: Any = Model(random_params(SMALL, 3), SMALL)
    with pytest.raises(FrozenInstanceError):
        model.params = None
    with pytest.raises(FrozenInstanceError):
        model.params.head = None
    with pytest.raises((AttributeError, TypeError)):
        model.cache = 1  # slots: there is no place for it
    before = {key: x.tobytes() for key, x in named_arrays(model.params)}
    first = model(normal(4, 1, 3, 32, 32))
    model(normal(5, 3, 3, 64, 64))
    model.pyramid(normal(6, 1, 3, 32, 32))
    np.testing.assert_array_equal(model(normal(4, 1, 3, 32, 32)), first)
    assert {key: x.tobytes() for key, x in named_arrays(model.params)} == before
    assert not hasattr(model, "__dict__")


@pytest.mark.parametrize("size", [None, 64, (32, 96)])
def test_summary_names_source_and_totals(size):
    model = Model(random_params(SMALL, 3), SMALL, "read from weights.pth")
    text = model.summary(size)
    cost = count_cost(SMALL, size)
    assert text.startswith("read from weights.pth\n")
    total = next(line for line in text.splitlines() if line.startswith("total"))
    parameters = sum(x.size for _, x in named_arrays(model.params))
    assert total.split()[-4:] == [
        f"{parameters:,}",
        f"{cost.macs / 1e6:,.2f}",
        f"{cost.peak_bytes / 2**20:,.2f}",
        f"{cost.cache_bytes / 2**20:,.2f}",
    ]
    height, width = cost.size
    assert f"image {height}x{width}, batch 1" in text


# Moving and mapping ---------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


def all_kinds_of_trees():
    x, y = normal(0, 2, 3), normal(1, 4)
    params = random_params(replace(BARE, qkv_bias=False), 0)
    yield x
    yield params
    yield Model(params, replace(BARE, qkv_bias=False), "a source")
    yield [x, (y, None)]
    yield Pair(x, [y])
    yield {"a": x, "b": {"c": (y,)}, "name": "no array", "count": 3}
    yield params.of_stage(1)  # a named tuple of records
    yield None
    yield ()


def type_name(x) -> str:
    return type(x).__name__


def leaves(tree) -> list:
    found = []
    map_arrays(lambda x: found.append(x) or x, tree)
    return found


@pytest.mark.parametrize("tree", list(all_kinds_of_trees()), ids=type_name)
def test_map_arrays_keeps_the_structure(tree):
    doubled = map_arrays(lambda x: 2 * x, tree)
    assert type(doubled) is type(tree)
    old, new = leaves(tree), leaves(doubled)
    assert len(old) == len(new)
    for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(2 * a, b)
    total = map_arrays(lambda a, b, c: a + b + c, tree, doubled, tree)
    for a, b in zip(old, leaves(total), strict=True):
        np.testing.assert_allclose(4 * a, b)
    if isinstance(tree, dict):
        assert list(doubled) == list(tree)
        assert (doubled["name"], doubled["count"]) == ("no array", 3)
    if isinstance(tree, Model):
        assert (doubled.config, doubled.source) == (tree.config, "a source")
        assert doubled.params.head is None


@pytest.mark.parametrize("tree", list(all_kinds_of_trees()), ids=type_name)
def test_the_host_is_where_numpy_arrays_are(tree):
    for moved in (pvt_ref.to_numpy(tree), pvt_ref.to_device(tree, "cpu")):
        assert type(moved) is type(tree)
        for a, b in zip(leaves(tree), leaves(moved), strict=True):
            assert b is a  # nothing is copied that is there already


def test_map_arrays_refuses_trees_of_different_length():
    with pytest.raises(ValueError, match="shorter"):
        map_arrays(np.add, [np.ones(1), np.ones(1)], [np.ones(1)])


def test_to_numpy_fetches_the_arrays_of_other_libraries():
    import array_api_strict

    params = random_params(SMALL, 3)
    there = map_arrays(array_api_strict.asarray, params)
    back = pvt_ref.to_numpy(there)
    for (key, a), (_, b) in zip(named_arrays(params), named_arrays(back), strict=True):
        assert type(b) is np.ndarray
        np.testing.assert_array_equal(a, b, err_msg=key)
