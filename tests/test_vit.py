"""The columnar ViT as a network of the family: its blocks, its files, and everywhere it goes.

What it computes is compared with others' numbers in test_golden.py and test_transformers.py.
Properties 56 and 57 of the catalogue that test_properties.py begins stand here.
"""

import dataclasses
import itertools
import json
import warnings
from collections import Counter

import numpy as np
import pytest
import safetensors.numpy
import torch
from closeness import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from loose import loose
from operations import backward, forward, sra_settings, table_under_test
from PIL import Image
from spelt_layouts import mmsegmentation_vit
from strategies import normal, random_params, rng_of, seeds, vit_cases
from test_checkpoint import as_torch, assert_same_state, random_state, to_foreign, write_pth
from test_ops import counted

import pvt_ref
from pvt_ref import (
    REFERENCE,
    VITS,
    Model,
    ModelInfo,
    Operation,
    Preprocessing,
    ViTConfig,
    ViTParams,
    blocked_ops,
    to_state_dict,
)
from pvt_ref.__main__ import main
from pvt_ref.blocks.mha import MHAParams, mha
from pvt_ref.blocks.mlp import MLPParams
from pvt_ref.blocks.sra import SRAParams, sra
from pvt_ref.blocks.transformer import ATTENTIONS, BlockParams, BlockSettings, block
from pvt_ref.checkpoint import load
from pvt_ref.checkpoint.key_maps import foreign_shapes, to_native
from pvt_ref.draws import Draws
from pvt_ref.errors import CheckpointError, ConfigError, DownloadError
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import LayerNormParams
from pvt_ref.layers.linear import LinearParams
from pvt_ref.models.architecture import architecture_of, known_variants, param_shapes
from pvt_ref.models.vit import VIT
from pvt_ref.models.vit.config import block_settings
from pvt_ref.models.vit.files import (
    DEIT,
    DEIT_BARE,
    HUGGING_FACE,
    HUGGING_FACE_BARE,
    MMSEGMENTATION,
)
from pvt_ref.report.diagnosis import first_non_finite
from pvt_ref.report.times import time_operations, time_stages
from pvt_ref.train import LabelledImages, Recipe, fit
from pvt_ref.tree import map_arrays, map_named, named_arrays, record
from pvt_ref.zoo import RELEASED

CONFIG = ViTConfig(
    img_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=3, mlp_ratio=2, num_classes=5
)
BARE = dataclasses.replace(CONFIG, num_classes=0)
IMAGES = normal(1, 2, 3, 16, 24)
TABLES = {"reference": REFERENCE, "blocked": blocked_ops(2, elements=64)}


# One block ----------------------------------------------------------------------------------------


@st.composite
def blocks(draw):
    """Weights of a ViT's block, those of PVT's block with R = 1 that is the same, and tokens."""
    B, n, N = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    C, bias, seed = N * draw(st.integers(2, 4)), draw(st.booleans()), draw(seeds)

    def linear(k, C_out, C_in, bias=True):
        weight = normal(seed + k, C_out, C_in) / C_in**0.5
        return LinearParams(weight, normal(seed + k, C_out) if bias else None)

    def norm(k):
        return LayerNormParams(1 + 0.3 * normal(seed + k, C), normal(seed + k + 1, C))

    qkv, proj = linear(1, 3 * C, C, bias), linear(2, C, C)
    q, kv = (
        LinearParams(qkv.weight[rows], qkv.bias[rows] if bias else None)
        for rows in (slice(C), slice(C, None))
    )
    mlp = MLPParams(linear(3, 2 * C, C), linear(4, C, 2 * C))
    ours, pvts = (
        BlockParams(norm(5), attn, norm(7), mlp)
        for attn in (MHAParams(qkv, proj), SRAParams(q, kv, proj, None, None))
    )
    attn = sra_settings(N, 1 / (C // N) ** 0.5, 1e-6)
    return ours, pvts, normal(seed, B, n, C), BlockSettings(1e-6, attn), seed


def run_block(p, x, settings, ops, seed=None):
    rng = None if seed is None else rng_of(seed)
    y, cache = ops[block].forward(p, x, ops, (1, x.shape[1]), settings, rng)
    return y, *ops[block].backward(p, cache, normal(3, *y.shape), ops)


@pytest.mark.parametrize("dropout", [False, True])
def test_56_a_vit_block_is_a_pvt_block_without_reduction(dropout):
    @given(blocks())
    def check(drawn):
        ours, pvts, x, told, seed = drawn
        if dropout:
            attn = dataclasses.replace(told.attn, attn_drop_rate=0.2, drop_rate=0.3)
            told = dataclasses.replace(told, attn=attn, drop_rate=0.3, drop_path_rate=0.4)
        ops = table_under_test()
        y, dx, grads = run_block(ours, x, told, ops, seed if dropout else None)
        their_y, their_dx, theirs = run_block(pvts, x, told, ops, seed if dropout else None)
        assert_near(y, their_y, 1e-13)
        assert_near(dx, their_dx, 1e-12)
        assert isinstance(grads.attn, MHAParams)
        glued = [
            np.concatenate((getattr(theirs.attn.q, kind), getattr(theirs.attn.kv, kind)))
            for kind in (("weight", "bias") if ours.attn.qkv.bias is not None else ("weight",))
        ]
        named = dict(named_arrays(grads))
        expected = {k: v for k, v in named_arrays(theirs) if "attn.q" not in k and ".kv" not in k}
        expected |= dict(zip(("attn.qkv.weight", "attn.qkv.bias"), glued, strict=False))
        assert named.keys() == expected.keys()
        largest = max(np.abs(g).max() for g in expected.values())
        for key, g in named.items():
            np.testing.assert_allclose(
                g, expected[key], rtol=1e-11, atol=1e-13 * largest, err_msg=key
            )

    check()


@given(drawn=blocks())
def test_57_without_a_table_tokens_can_change_places(drawn):
    ours, _, x, told, seed = drawn
    order = rng_of(seed).permutation(x.shape[1])
    y, cache = forward("mha", ours.attn, x, (1, x.shape[1]), told.attn)
    moved, moved_cache = forward("mha", ours.attn, x[:, order], (1, x.shape[1]), told.attn)
    np.testing.assert_allclose(moved, y[:, order], rtol=1e-11, atol=1e-12)
    dy = normal(seed, *y.shape)
    dx, grads = backward("mha", ours.attn, cache, dy)
    dmoved, others = backward("mha", ours.attn, moved_cache, dy[:, order])
    np.testing.assert_allclose(dmoved, dx[:, order], rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(others.qkv.weight, grads.qkv.weight, rtol=1e-10, atol=1e-11)


@settings(max_examples=20)
@given(case=vit_cases())
def test_57_without_a_table_patches_can_change_places(case):
    config, images = case.config, case.images()
    P, (B, C_0, H, W) = config.patch_size, images.shape
    params = dataclasses.replace(case.params(), pos_embed=0 * case.params().pos_embed)
    h, w = H // P, W // P
    order = rng_of(case.seed).permutation(h * w)
    patches = images.reshape(B, C_0, h, P, w, P).transpose(2, 4, 0, 1, 3, 5)
    patches = patches.reshape(h * w, B, C_0, P, P)[order].reshape(h, w, B, C_0, P, P)
    moved = patches.transpose(2, 3, 0, 4, 1, 5).reshape(images.shape)
    logits, (last,), z, (other,) = (
        f(params, x, config, ops=table_under_test())
        for x in (images, moved)
        for f in (pvt_ref.forward, pvt_ref.forward_pyramid)
    )
    assert_near(z, logits, 1e-11)
    shape = (B, config.embed_dim, h * w)
    assert_near(other.reshape(shape), last.reshape(shape)[..., order], 1e-11)


def test_the_block_kernel_takes_qkv_apart_without_a_copy_and_asks_for_no_part():
    calls = Counter()
    params = random_params(CONFIG, 0)
    table = blocked_ops(2).watched(lambda call: calls.update([call.operation.name]), params=params)
    logits, cache = pvt_ref.forward_with_cache(params, IMAGES, CONFIG, ops=table)
    pvt_ref.backward(params, cache, logits, CONFIG)
    assert calls["block"] == 2 * CONFIG.depth
    assert not calls.keys() & {"mha", "sra", "attention", "mlp"}


@record
class UniformParams:
    """Of an attention that no kernel knows: every token gets the mean of all, times a weight."""

    weight: np.ndarray


def uniform_forward(p, x, ops, grid, settings, rng=None, keep=True):
    return np.broadcast_to(x.mean(1, keepdims=True) * p.weight, x.shape), x if keep else None


def uniform_backward(p, cache, dy, ops):
    total = dy.sum(1, keepdims=True)
    dx = np.broadcast_to(total * p.weight / cache.shape[1], cache.shape)
    return dx, UniformParams((total * cache.mean(1, keepdims=True)).sum((0, 1)))


def test_the_block_kernel_steps_aside_for_attention_that_it_does_not_know(monkeypatch):
    op = Operation(uniform_forward, uniform_backward)
    monkeypatch.setitem(ATTENTIONS, UniformParams, op)
    p = random_params(CONFIG, 0).blocks[0]
    p = dataclasses.replace(p, attn=UniformParams(normal(5, 12)))
    x, told = normal(6, 2, 7, 12), block_settings(CONFIG)[0]
    results = [run_block(p, x, told, ops) for ops in TABLES.values()]
    for a, b in zip(*(dict(named_arrays(r)).values() for r in results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


# The table of operations --------------------------------------------------------------------------


def classify(ops):
    params = random_params(CONFIG, 0)
    logits, cache = pvt_ref.forward_with_cache(params, IMAGES, CONFIG, ops=ops)
    grads, dimages = pvt_ref.backward(params, cache, np.ones_like(logits), CONFIG)
    return [logits, dimages, *dict(named_arrays(grads)).values()]


def maps(ops):
    params = random_params(CONFIG, 0)
    found, cache = pvt_ref.forward_pyramid_with_cache(params, IMAGES, CONFIG, ops=ops)
    grads, dimages = pvt_ref.backward_pyramid(params, cache, found, CONFIG)
    return [*found, dimages, *dict(named_arrays(grads)).values()]


def test_a_vit_asks_for_no_more_than_its_row_says():
    asked = set()
    watched = REFERENCE.watched(lambda call: asked.add(call.operation))
    classify(watched)
    assert asked == VIT.operations


OPERATIONS = sorted(VIT.operations, key=lambda op: op.name)


@pytest.mark.parametrize("run", [classify, maps])
@pytest.mark.parametrize("op", OPERATIONS, ids=repr)
@pytest.mark.parametrize("table", TABLES)
def test_replacing_any_operation_of_a_vit_takes_effect(table, op, run):
    calls, expected = Counter(), run(TABLES[table])
    same = run(TABLES[table].replace(op, counted(op, calls)))
    assert calls[f"{op.name}.forward"] > 0
    largest = max(np.abs(x).max() for x in expected)
    for x, y in zip(same, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-10 * largest)
    other = run(TABLES[table].replace(op, counted(op, calls, factor=1.25)))
    assert max(np.abs(x - y).max() for x, y in zip(other, expected, strict=True)) > 1e-6 * largest


def test_a_vit_refuses_the_attention_of_a_pvt_and_the_other_way_round():
    ops = REFERENCE.replace(sra, sra)
    with pytest.raises(ConfigError, match="ops replaces sra, which a ViT never asks for"):
        pvt_ref.forward(random_params(CONFIG, 0), IMAGES, CONFIG, ops=ops)
    pvt = dataclasses.replace(pvt_ref.VARIANTS["pvt_tiny"], img_size=32)
    with pytest.raises(ConfigError, match="ops replaces mha, which a PVT never asks for"):
        pvt_ref.forward(
            pvt_ref.init_params(pvt, rng_of(0)),
            normal(0, 1, 3, 32, 32),
            pvt,
            ops=REFERENCE.replace(mha, mha),
        )


# Configuration and parameters ---------------------------------------------------------------------


def test_the_variants_and_their_names():
    shape = {
        name: (c.patch_size, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio)
        for name, c in VITS.items()
    }
    assert shape == {
        "deit_ti_16": (16, 192, 12, 3, 4),
        "deit_s_16": (16, 384, 12, 6, 4),
        "deit_b_16": (16, 768, 12, 12, 4),
        "deit_s_32": (32, 384, 12, 6, 4),
        "deit_s_4": (4, 384, 12, 6, 4),
        "vit_s_32": (32, 768, 8, 8, 3),
        "vit_s_16": (16, 768, 8, 8, 3),
        "vit_s_4": (4, 768, 8, 8, 3),
    }
    known = known_variants()
    assert known["deit_small_patch16_224"] is known["deit_s_16"] is VITS["deit_s_16"]
    assert ViTConfig() == VITS["deit_s_16"]
    assert all(c.norm_eps == 1e-6 and c.position_resize == "bicubic" for c in VITS.values())


def test_values_become_plain_python_and_blocks_are_told_what_the_config_says():
    config = loose(ViTConfig)(
        embed_dim=np.int64(12),
        num_heads=np.int32(2),
        depth=3,
        mlp_ratio=np.float32(2.5),
        qk_scale=np.float32(0.5),
        drop_rate=np.float64(0.1),
        attn_drop_rate=0.2,
        drop_path_rate=0.4,
        norm_eps=np.float32(0.25),
    )
    json.dumps(dataclasses.asdict(config))
    assert (config.hidden_dim, config.mlp_ratio) == (30, 2.5)
    assert type(ViTConfig(mlp_ratio=np.float64(3)).mlp_ratio) is int
    told = block_settings(config)
    assert [b.drop_path_rate for b in told] == pytest.approx([0, 0.2, 0.4])
    assert [b.number for b in told] == [0, 1, 2]
    assert {(b.norm_eps, b.drop_rate) for b in told} == {(0.25, 0.1)}
    attn = told[1].attn
    assert (attn.num_heads, attn.scale) == (2, 0.5)
    assert (attn.attn_drop_rate, attn.drop_rate) == (0.2, 0.1)
    assert block_settings(ViTConfig())[0].attn.scale == 1 / 8
    assert block_settings(ViTConfig(depth=1, drop_path_rate=0.3))[0].drop_path_rate == 0


def test_keys_and_their_order_are_deits():
    block_keys = [
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    first = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    blocks = [f"blocks.{k}.{key}" for k in range(3) for key in block_keys]
    last = ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert list(param_shapes(CONFIG)) == first + blocks + last
    assert list(param_shapes(BARE)) == first + blocks
    no_bias = param_shapes(dataclasses.replace(CONFIG, qkv_bias=False))
    assert param_shapes(CONFIG).keys() - no_bias.keys() == {
        f"blocks.{k}.attn.qkv.bias" for k in range(3)
    }
    assert param_shapes(CONFIG)["blocks.0.attn.qkv.weight"] == (36, 12)
    assert param_shapes(CONFIG)["pos_embed"] == (1, 17, 12)


def test_fresh_weights_are_drawn_as_deits():
    params = pvt_ref.init_params(VITS["deit_ti_16"], rng_of(0))
    assert isinstance(params, ViTParams)
    for x in (params.cls_token, params.pos_embed, params.blocks[0].attn.qkv.weight):
        assert 0.018 < x.std() < 0.022
    assert not params.blocks[0].attn.qkv.bias.any()
    bound = 1 / np.sqrt(3 * 16 * 16)
    assert 0.99 * bound < np.abs(params.patch_embed.proj.weight).max() <= bound
    assert params.patch_embed.norm is None


def test_a_backbone_has_the_maps_of_its_classifier():
    params = random_params(CONFIG, 0)
    bare = dataclasses.replace(params, norm=None, head=None)
    for numbers in (None, [0], [0, 2]):
        for a, b in zip(
            pvt_ref.forward_pyramid(params, IMAGES, CONFIG, blocks=numbers),
            pvt_ref.forward_pyramid(bare, IMAGES, BARE, blocks=numbers),
            strict=True,
        ):
            assert a.shape == (2, 12, 4, 6)
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match=r"num_classes 0: no head"):
        pvt_ref.forward(bare, IMAGES, BARE)


def test_without_numbers_the_map_is_that_of_the_last_block():
    params = random_params(CONFIG, 0)
    (last,) = pvt_ref.forward_pyramid(params, IMAGES, CONFIG)
    first, second, third = pvt_ref.forward_pyramid(params, IMAGES, CONFIG, blocks=[0, 1, 2])
    np.testing.assert_array_equal(last, third)
    assert np.abs(first - second).max() > 0.1
    # later blocks are not computed
    calls = Counter()
    ops = REFERENCE.watched(lambda call: calls.update([call.operation.name]))
    pvt_ref.forward_pyramid(params, IMAGES, CONFIG, blocks=[0], ops=ops)
    assert calls["block"] == 1


def test_blocks_draw_the_same_masks_however_many_maps_there_are():
    config = dataclasses.replace(CONFIG, drop_rate=0.2, attn_drop_rate=0.1, drop_path_rate=0.3)
    params = random_params(config, 0)
    for rng in (lambda: Draws(1, 2), lambda: rng_of(3)):
        (last,), _ = pvt_ref.forward_pyramid_with_cache(params, IMAGES, config, rng())
        some, _ = pvt_ref.forward_pyramid_with_cache(params, IMAGES, config, rng(), blocks=[0, 2])
        np.testing.assert_array_equal(some[1], last)
        assert np.abs(last - pvt_ref.forward_pyramid(params, IMAGES, config)[0]).max() > 0.1


def test_a_table_is_resized_as_the_configuration_says():
    params = random_params(CONFIG, 0)
    other = dataclasses.replace(CONFIG, position_resize="bilinear")
    assert (
        np.abs(
            pvt_ref.forward(params, IMAGES, CONFIG) - pvt_ref.forward(params, IMAGES, other)
        ).max()
        > 1e-3
    )
    square = IMAGES[..., :16]
    np.testing.assert_array_equal(
        pvt_ref.forward(params, square, CONFIG), pvt_ref.forward(params, square, other)
    )


# Files --------------------------------------------------------------------------------------------


LAYOUTS = {
    layout.name: layout
    for layout in (DEIT, DEIT_BARE, HUGGING_FACE, HUGGING_FACE_BARE, MMSEGMENTATION)
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_key_maps_lose_nothing(name, tmp_path):
    layout = LAYOUTS[name]
    wanted = {True: True, False: False, None: True}[layout.has_classifier]

    @settings(max_examples=15)
    @given(vit_cases(classifier=wanted), st.sampled_from([np.float32, np.float64]))
    def check(case, dtype):
        config = dataclasses.replace(case.config, norm_eps=layout.eps[0])
        state = random_state(config, dtype)
        without = layout is MMSEGMENTATION and not config.qkv_bias
        if without:  # this attention has both biases or none
            for key in state:
                if key.endswith("attn.proj.bias"):
                    state[key][:] = 0
        foreign = to_foreign(state, layout, config)
        assert {k: x.shape for k, x in foreign.items()} == foreign_shapes(layout, config)
        back = to_native(foreign, layout, config)
        for key, x in state.items():
            assert back[key].dtype == x.dtype
            np.testing.assert_array_equal(back[key], x, err_msg=key)
        if not without:
            assert sum(x.size for x in foreign.values()) == sum(x.size for x in state.values())
        safetensors.numpy.save_file(foreign, tmp_path / "f.safetensors")
        model = load(tmp_path / "f.safetensors", config)
        assert_same_state(model, state)
        assert model.config == config
        assert model.source.startswith(name)

    check()


def vit_state(config=CONFIG, dtype=np.float32):
    return random_state(config, dtype)


def test_deits_own_files_with_and_without_head(tmp_path):
    config = VITS["deit_ti_16"]
    state = {k: np.zeros(s, np.float16) for k, s in param_shapes(config).items()}
    path = write_pth(tmp_path / "deit.pth", {"model": as_torch(state)})
    model = load(path)
    assert model.config == config
    assert model.source.startswith(
        "DeiT layout (under 'model'), deit_ti_16, 1000 classes, 224 px, float16 made float32; eps "
        "1e-06 in every norm; assumed: heads as in deit_ti_16, eps of this layout's code"
    )
    without = {k: x for k, x in state.items() if not k.startswith("head.")}
    path = write_pth(tmp_path / "dino.pth", as_torch(without))
    model = load(path)
    assert model.config == dataclasses.replace(config, num_classes=0)
    assert "left out, since there is no head: norm.bias, norm.weight" in model.source
    model = load(tmp_path / "deit.pth", dataclasses.replace(config, num_classes=0))
    assert model.params.head is None
    assert "left out, since there is no head: head.bias, head.weight, norm.bias" in model.source


def test_the_legacy_format_and_a_wrapper_s_prefix(tmp_path):
    state = vit_state()
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        tree = {"state_dict": {f"module.{k}": x for k, x in as_torch(state).items()}}
        model = load(write_pth(tmp_path / "m.pth", tree, **options), CONFIG)
        assert_same_state(model, state)
        assert "(under 'state_dict.module')" in model.source


@pytest.mark.parametrize("keys", [("dist_token", "head_dist.weight"), ("head_dist.bias",)])
def test_a_distilled_deit_is_refused_and_named(keys, tmp_path):
    config = VITS["deit_ti_16"]
    state = {k: np.zeros(s, np.float16) for k, s in param_shapes(config).items()}
    state |= {"pos_embed": np.zeros((1, 198, 192), np.float16)}
    state |= {key: np.zeros((1, 1, 192), np.float16) for key in keys}
    path = write_pth(tmp_path / "distilled.pth", {"model": as_torch(state)})
    for stated in (None, config, "deit_ti_16"):
        with pytest.raises(CheckpointError, match=r"a distilled DeiT \(.*dist.*not read here"):
            load(path, stated)


def test_hugging_faces_distilled_deit_is_refused_before_its_config_is_read(tmp_path):
    foreign = to_foreign(vit_state(BARE), HUGGING_FACE_BARE, BARE)
    foreign = {f"deit.{key}": x for key, x in foreign.items()}
    foreign["deit.embeddings.distillation_token"] = np.zeros((1, 1, 12), np.float32)
    safetensors.numpy.save_file(foreign, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "deit", "hidden_size": 12}')
    with pytest.raises(CheckpointError, match=r"a distilled DeiT \('embeddings\.distillation_to"):
        load(tmp_path)


def test_other_vits_blocks_are_not_taken_for_a_vit(tmp_path):
    swin = {"patch_embed.proj.weight": (4, 3, 4, 4), "layers.0.blocks.0.norm1.weight": (4,)}
    swin |= {"layers.0.blocks.0.attn.qkv.weight": (12, 4), "norm.weight": (4,)}
    state = {key: np.zeros(shape, np.float32) for key, shape in swin.items()}
    with pytest.raises(CheckpointError, match="its 4 keys are of no known layout"):
        load(write_pth(tmp_path / "swin.pth", as_torch(state)))


def test_problems_are_named_as_in_the_file(tmp_path):
    foreign = to_foreign(vit_state(), HUGGING_FACE, CONFIG)
    del foreign["vit.encoder.layer.1.attention.attention.value.bias"]
    foreign["vit.layernorm.weight"] = np.zeros(5, np.float32)
    foreign["vit.extra"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(foreign, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "f.safetensors", CONFIG)
    message = str(caught.value)
    assert "missing: vit.encoder.layer.1.attention.attention.value.bias (12,)" in message
    assert "mis-shaped: vit.layernorm.weight is (5,)" in message
    assert "unexpected: vit.extra (1,)" in message
    assert message.count("\n  - ") == 3
    path = write_pth(tmp_path / "other.pth", as_torch(vit_state()))
    with pytest.raises(CheckpointError, match=r"shapes show ViTConfig\(img_size=16, patch_size=4,"):
        load(path)


# Hugging Face -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_model():
    """A small float64 ViTForImageClassification with eps and labels of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    torch.manual_seed(3)
    model = transformers.ViTForImageClassification(
        loose(transformers.ViTConfig)(
            image_size=16,
            patch_size=4,
            hidden_size=12,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=24,
            layer_norm_eps=3e-5,
            id2label={0: "cat", 1: "dog", 2: "a bird", 3: "d", 4: "e"},
            attn_implementation="sdpa",
        )
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    return model.eval()


def test_a_folder_of_save_pretrained_is_read_with_its_config(their_model, tmp_path):
    their_model.save_pretrained(tmp_path)
    keys = safetensors.numpy.load_file(tmp_path / "model.safetensors").keys()
    assert "vit.encoder.layer.0.attention.attention.query.weight" in keys  # the names of old
    model = load(tmp_path)
    assert model.config == dataclasses.replace(CONFIG, norm_eps=3e-5)
    assert model.classes == ("cat", "dog", "a bird", "d", "e")
    with torch.no_grad():
        theirs = their_model(torch.tensor(IMAGES), interpolate_pos_encoding=True).logits.numpy()
    np.testing.assert_allclose(model(IMAGES), theirs, rtol=1e-10)
    assert "configuration from config.json beside it" in model.source
    assert "heads" not in model.source  # they were said
    assert load(tmp_path, eps=1e-6).config.norm_eps == 1e-6
    with pytest.raises(CheckpointError, match=r"eps is \(1e-06, 1e-05\); a ViT has 1"):
        load(tmp_path, eps=(1e-6, 1e-5))


def test_a_vit_model_is_a_backbone(their_model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    their_model.save_pretrained(tmp_path / "whole")
    bare = transformers.ViTModel(their_model.config).double()
    bare.load_state_dict(their_model.vit.state_dict(), strict=False)  # all but the pooler
    bare.save_pretrained(tmp_path / "bare")
    whole = load(tmp_path / "whole")
    for model in (load(tmp_path / "bare"), load(tmp_path / "whole", whole.config and BARE)):
        assert model.config.num_classes == 0
        assert model.config.norm_eps == 3e-5
        np.testing.assert_array_equal(model.pyramid(IMAGES)[0], whole.pyramid(IMAGES)[0])
    assert "pooler.dense.weight" in load(tmp_path / "bare").source


def test_what_a_config_json_does_not_say(their_model, tmp_path):
    their_model.save_pretrained(tmp_path)
    place = tmp_path / "config.json"
    fields = json.loads(place.read_text())

    def change(**changes):
        left = {k: v for k, v in {**fields, **changes}.items() if v is not None}
        place.write_text(json.dumps(left))

    change(num_attention_heads=None)
    with pytest.raises(CheckpointError, match="embed_dim 12 are those of no variant"):
        load(tmp_path)
    change(layer_norm_eps=None, image_size=[16, 16])
    model = load(tmp_path)
    assert model.config == dataclasses.replace(CONFIG, norm_eps=1e-12)
    assert "eps of this layout's code (pass eps=1e-6 for DeiT's training setting)" in model.source
    for changes, says in (
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"image_size": [16, 32]}, r"img_size is \[16, 32\]; both are square"),
        ({"intermediate_size": "24"}, "intermediate_size is '24' and hidden_size 12"),
        ({"hidden_size": 0}, "hidden_size 0; both must be positive"),
        ({"num_attention_heads": 5}, "num_heads 5 does not divide embed_dim 12"),
        ({"model_type": "deit"}, "another model: model_type is 'deit', not 'vit'"),
    ):
        change(**changes)
        with pytest.raises((CheckpointError, ConfigError), match=says):
            load(tmp_path)


def test_a_width_of_variants_with_different_heads_does_not_tell_the_heads(tmp_path):
    config = VITS["deit_b_16"]
    state = {k: np.zeros(s, np.float16) for k, s in param_shapes(config).items()}
    foreign = to_foreign(state, HUGGING_FACE, config)
    safetensors.numpy.save_file(foreign, tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors").config == dataclasses.replace(
        config, norm_eps=1e-12
    )
    fields = {"model_type": "vit", "hidden_size": 768, "intermediate_size": 3072}
    fields |= {"num_hidden_layers": 12, "patch_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="768 are those of variants with different ones"):
        load(tmp_path)


# MMSegmentation -----------------------------------------------------------------------------------


def test_a_segmentor_s_backbone(tmp_path):
    state = vit_state(BARE)
    theirs = {f"backbone.{k}": x for k, x in as_torch(mmsegmentation_vit(state)).items()}
    theirs |= {f"backbone.ln1.{kind}": torch.ones(12) for kind in ("weight", "bias")}
    theirs["decode_head.conv_seg.weight"] = torch.ones(150, 12, 1, 1)
    path = write_pth(tmp_path / "setr.pth", {"meta": {}, "state_dict": theirs})
    bilinear = dataclasses.replace(BARE, position_resize="bilinear")
    model = load(path, bilinear)
    assert_same_state(model, state)
    assert model.config == bilinear
    assert "left out: 'decode_head.conv_seg.weight'" in model.source
    assert "ln1.weight" in model.source
    with pytest.raises(CheckpointError, match="bare backbone"):
        load(path, CONFIG)


def test_a_segmentor_s_variant_by_itself_resizes_as_setr(tmp_path):
    config = dataclasses.replace(VITS["deit_ti_16"], num_classes=0, img_size=512)
    state = {k: np.zeros(s, np.float16) for k, s in param_shapes(config).items()}
    path = write_pth(tmp_path / "setr.pth", as_torch(mmsegmentation_vit(state)))
    model = load(path)
    assert model.config == dataclasses.replace(config, position_resize="bilinear")
    assert "deit_ti_16, no classifier, 512 px, bilinear resizing" in model.source


def test_a_variant_s_name_leaves_the_resizing_to_the_layout(tmp_path):
    config = dataclasses.replace(VITS["deit_ti_16"], num_classes=0)
    state = {k: np.zeros(s, np.float16) for k, s in param_shapes(config).items()}
    path = write_pth(tmp_path / "setr.pth", as_torch(mmsegmentation_vit(state)))
    bilinear = dataclasses.replace(config, position_resize="bilinear")
    assert load(path, "deit_ti_16").config == bilinear
    (tmp_path / "c.json").write_text('{"num_classes": 0, "embed_dim": 192}')
    assert load(path, tmp_path / "c.json").config == bilinear
    assert load(path, config).config == config  # a whole configuration says it
    pvt_ref.save(tmp_path / "saved.safetensors", load(path))
    assert load(tmp_path / "saved.safetensors", "deit_ti_16").config == bilinear


def test_a_file_without_a_head_may_be_setrs_own(tmp_path):
    whole = VITS["deit_ti_16"]
    bare = dataclasses.replace(whole, num_classes=0)
    state = {k: np.zeros(s, np.float16) for k, s in param_shapes(whole).items()}
    headless = {k: x for k, x in state.items() if not k.startswith("head.")}
    path = write_pth(tmp_path / "headless.pth", as_torch(headless))
    (tmp_path / "c.json").write_text('{"num_classes": 0, "embed_dim": 192}')
    for config in (None, "deit_ti_16", tmp_path / "c.json"):
        model = load(path, config)
        assert model.config == bare
        assert "bicubic resizing of the position table (SETR resizes bil" in model.source
    said = model.source.partition("assumed: ")[2]
    asked = dataclasses.replace(model.config, position_resize="bilinear")
    assert "config=dataclasses.replace(model.config, position_resize='bilinear')" in said
    assert load(path, asked).config == asked
    (tmp_path / "said.json").write_text(json.dumps(dataclasses.asdict(asked)))
    for config in (bare, asked, tmp_path / "said.json"):  # which say how
        assert "resizing of the position table" not in load(path, config).source
    # one with a head is DeiT's or timm's, also where only its backbone is wanted
    path = write_pth(tmp_path / "whole.pth", as_torch(state))
    for config in (None, "deit_ti_16", bare, tmp_path / "c.json"):
        assert "resizing" not in load(path, config).source


# Names --------------------------------------------------------------------------------------------


def test_released_names(tmp_path, monkeypatch):
    assert RELEASED["deit_s_16"] == "facebook/deit-small-patch16-224"
    config = VITS["deit_ti_16"]
    state = {k: np.zeros(s, np.float16) for k, s in param_shapes(config).items()}
    monkeypatch.setenv("PVT_REF_WEIGHTS", str(tmp_path))
    write_pth(tmp_path / "deit_tiny_patch16_224.pth", {"model": as_torch(state)})
    for name in ("deit_ti_16", "deit_tiny_patch16_224"):
        model = pvt_ref.load(name)
        assert model.config == config
        assert len(model.classes) == 1000
        assert "assumed" not in model.source
    # those of Hugging Face are read with the authors' eps, too
    foreign = to_foreign(state, HUGGING_FACE, config)
    safetensors.numpy.save_file(foreign, tmp_path / "deit_ti_16.safetensors")
    assert pvt_ref.load("deit_ti_16").config.norm_eps == 1e-6
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("deit_b_16", "deit_base_patch16_224"):
        with pytest.raises(DownloadError) as caught:
            pvt_ref.load(name)
        assert "deit/deit_base_patch16_224-b5f2ef4d.pth" in str(caught.value)
        assert "facebook/deit-base-patch16-224" in str(caught.value)
    with pytest.raises(DownloadError, match="vit_s_16: its weights were never released"):
        pvt_ref.load("vit_s_16")


# Everywhere ---------------------------------------------------------------------------------------

INFO = ModelInfo(title="a ViT", classes=("a", "b", "c", "d", "e"))


@pytest.mark.parametrize("config", [CONFIG, BARE], ids=["classifier", "backbone"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_file_of_it_is_read_as_it_was_saved(tmp_path, dtype, config):
    config = dataclasses.replace(config, position_resize="bilinear", mlp_ratio=2.5, norm_eps=1e-5)
    info = INFO if config.has_classifier else ModelInfo()
    model = Model(random_params(config, 0, dtype), config, info=info)
    pvt_ref.save(tmp_path / "vit.safetensors", model)
    again = pvt_ref.load(tmp_path / "vit.safetensors")
    assert again.config == config
    assert_same_state(again, to_state_dict(model.params))


def test_a_model_of_it_predicts_pictures():
    model = Model(random_params(CONFIG, 0), CONFIG, info=INFO)
    pictures = [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
    answers = model.predict(pictures)
    assert {p.label for p in answers[0]} == set("abcde")
    x = model.preprocess(pictures)
    assert int(model(x)[0].argmax()) == answers[0][0].index
    assert [m.shape for m in model.pyramid(x)] == [(2, 12, 4, 4)]
    assert [m.shape for m in model.pyramid(x, blocks=[0, 1])] == [(2, 12, 4, 4)] * 2
    assert model.feature_info == [{"num_chs": 12, "reduction": 4}]
    wide = dataclasses.replace(CONFIG, patch_size=2, embed_dim=6)
    other = Model(random_params(wide, 0), wide)
    for blocks in (None, [0, 2]):
        for said, m in itertools.product(other.feature_info, other.pyramid(IMAGES, blocks=blocks)):
            assert said == {"num_chs": m.shape[1], "reduction": IMAGES.shape[3] / m.shape[3]}
    assert "ViT of 3 blocks, 12 channels, 5 classes" in repr(model)
    assert "stage 1: grid 4x4" in model.summary()


def test_a_new_head_and_other_channels():
    model = Model(random_params(CONFIG, 0), CONFIG, info=INFO)
    larger = pvt_ref.with_new_head(model, 7, rng_of(0))
    assert larger(normal(1, 2, 3, 8, 8)).shape == (2, 7)
    assert larger.params.blocks[0].attn.qkv.weight is model.params.blocks[0].attn.qkv.weight
    grey = pvt_ref.with_channels(model, 1)
    assert grey(normal(1, 2, 1, 8, 8)).shape == (2, 5)
    bare = Model(dataclasses.replace(model.params, norm=None, head=None), BARE)
    (a,), (b,) = pvt_ref.with_new_head(bare, 4, rng_of(0)).pyramid(IMAGES), bare.pyramid(IMAGES)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)
def test_where_it_looks_and_how_long_it_takes(ops):
    for config in (CONFIG, BARE):
        params = random_params(config, 0)
        looks = pvt_ref.attention_maps(params, IMAGES, config, ops=ops)
        assert looks.keys() == {(1, 0), (1, 1), (1, 2)}
        for weights in looks.values():
            assert weights.shape == (2, 3, 25, 25)
            np.testing.assert_allclose(weights.sum(-1), 1)
    assert len(time_stages(random_params(CONFIG, 0), IMAGES, CONFIG, repeats=1, ops=ops)) == 2


def test_it_learns_with_all_options_stops_and_goes_on(tmp_path):
    config = dataclasses.replace(
        CONFIG, depth=2, drop_rate=0.05, attn_drop_rate=0.05, drop_path_rate=0.1
    )
    rng = rng_of(0)
    labels = rng.integers(0, 5, 40)
    pixels = 50 * labels[:, None, None, None] + rng.integers(0, 40, (40, 3, 16, 16))
    data = LabelledImages(pixels.astype("uint8"), labels, Preprocessing())
    recipe = Recipe(
        epochs=16,
        batch_size=10,
        accumulate=2,
        lr=2e-2,
        warmup_epochs=1,
        decay_positions=True,
        mixup_alpha=0.2,
        crop_padding=1,
        cutout=2,
        ema_decay=0.9,
        drop_path_ramp_epochs=2,
    )
    half = fit(config, recipe, data, data, tmp_path / "run", info=INFO, stop_at_step=15)
    assert not half.finished
    run = fit(config, recipe, data, data, tmp_path / "run", info=INFO, resume=True)
    assert run.finished
    whole = fit(config, recipe, data, data, tmp_path / "whole", info=INFO)
    for (key, a), (_, b) in zip(
        named_arrays(run.state.params), named_arrays(whole.state.params), strict=True
    ):
        assert a.tobytes() == b.tobytes(), key
    assert run.state.best_accuracy > 0.5
    assert pvt_ref.load(tmp_path / "run" / "best.safetensors").config == config


def test_the_command_line_takes_it(tmp_path, capsys):
    model = Model(random_params(CONFIG, 0, np.float32), CONFIG, info=INFO)
    weights = str(tmp_path / "vit.safetensors")
    pvt_ref.save(weights, model)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    assert main(["classify", str(tmp_path / "red.png"), "--weights", weights, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)[0]
    assert {p["label"] for p in answer["predictions"]} == set("abcde")
    assert main(["summary", "deit_ti_16"]) == 0
    assert "5,717,416" in capsys.readouterr().out
    assert main(["summary", weights, "--pyramid"]) == 0
    assert "a ViT" in capsys.readouterr().out
    deit = tmp_path / "deit.pth"
    torch.save(as_torch(to_state_dict(model.params)), deit)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(dataclasses.asdict(CONFIG)))
    arguments = ["convert", str(deit), str(tmp_path / "again.safetensors")]
    assert main([*arguments, "--config", str(config)]) == 0
    assert pvt_ref.load(tmp_path / "again.safetensors").config == CONFIG


def test_its_row():
    assert architecture_of(CONFIG) is VIT
    assert VIT.map_blocks(CONFIG) == 3


# What a configuration and its files say -----------------------------------------------------------


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES)
def test_a_factor_of_the_scores_may_stand_in_the_queries_weights_as_well(ops):
    params = random_params(CONFIG, 0)
    queries = np.arange(3 * CONFIG.embed_dim) < CONFIG.embed_dim

    def halved(key, x):
        if ".attn.qkv." not in key:
            return x
        return np.where(queries.reshape(-1, *[1] * (x.ndim - 1)), x / 2, x)

    said, one = (dataclasses.replace(CONFIG, qk_scale=scale) for scale in (0.5, 1.0))
    y = pvt_ref.forward(params, IMAGES, said, ops=ops)
    same = pvt_ref.forward(map_named(halved, params), IMAGES, one, ops=ops)
    np.testing.assert_allclose(same, y, rtol=1e-12)
    assert np.abs(pvt_ref.forward(params, IMAGES, one, ops=ops) - y).max() > 1e-6


def test_a_scale_of_zero_looks_everywhere_alike():
    config = dataclasses.replace(CONFIG, qk_scale=0)
    for weights in pvt_ref.attention_maps(random_params(CONFIG, 0), IMAGES, config).values():
        np.testing.assert_allclose(weights, 1 / 25, rtol=1e-12)


def test_a_thousand_blocks_are_the_most():
    v2 = pvt_ref.VARIANTS["pvt_v2_b0"]
    assert ViTConfig(depth=1000).depth == 1000
    assert dataclasses.replace(v2, depths=(1, 1, 1000, 1)).depths[2] == 1000
    with pytest.raises(ConfigError, match="depth is 1001; it must be at most 1000"):
        ViTConfig(depth=1001)
    with pytest.raises(ConfigError, match=r"depths is \(1, 1, 1001, 1\); each must be at most"):
        dataclasses.replace(v2, depths=(1, 1, 1001, 1))


def test_rates_and_a_broken_ratio_of_a_config_json(tmp_path):
    config = dataclasses.replace(
        CONFIG, mlp_ratio=2.5, drop_rate=0.1, attn_drop_rate=0.2, norm_eps=1e-12
    )
    foreign = to_foreign(vit_state(config), HUGGING_FACE, config)
    safetensors.numpy.save_file(foreign, tmp_path / "model.safetensors")
    said = {"model_type": "vit", "hidden_size": 12, "num_hidden_layers": 3, "image_size": 16}
    said |= {"patch_size": 4, "num_attention_heads": 3, "intermediate_size": 30}
    said |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert load(tmp_path).config == config


def test_the_deviation_of_grey_is_the_mean_of_the_three():
    preprocessing = Preprocessing("RGB", (0.5, 0.4, 0.3), (0.1, 0.2, 0.6))
    info = ModelInfo(classes=INFO.classes, preprocessing=preprocessing)
    grey = pvt_ref.with_channels(Model(random_params(CONFIG, 0), CONFIG, info=info), 1)
    assert grey.info.preprocessing.mean == pytest.approx([0.4])
    assert grey.info.preprocessing.std == pytest.approx([0.3])


def test_the_pass_that_warms_up_counts_in_no_time(monkeypatch):
    """By a clock that only GELU moves: a thousand seconds in the first pass, one in the others."""
    now, calls = [0.0], [0]

    def slow(*args, **kwargs):
        now[0] += 1000 if calls[0] < CONFIG.depth else 1
        calls[0] += 1
        return gelu.forward(*args, **kwargs)

    monkeypatch.setattr("pvt_ref.report.times.time.perf_counter", lambda: now[0])
    ops, params = REFERENCE.replace(gelu, Operation(slow, gelu.backward)), random_params(CONFIG, 0)
    assert time_stages(params, IMAGES, CONFIG, 1, ops=ops) == [CONFIG.depth, 0]
    calls[0] = 0
    by_operation = time_operations(params, IMAGES, CONFIG, 1, ops=ops)
    assert by_operation[1, "mlp.gelu"] == CONFIG.depth
    assert sum(by_operation.values()) == CONFIG.depth


def test_what_the_shapes_of_a_file_say(tmp_path):
    config = dataclasses.replace(CONFIG, mlp_ratio=2.5, qkv_bias=False, in_chans=1)
    path = write_pth(tmp_path / "vit.pth", as_torch(vit_state(config)))
    (tmp_path / "heads.json").write_text('{"num_heads": 3, "depth": 3}')
    assert load(path, tmp_path / "heads.json").config == config


def test_hugging_faces_bare_model_alone_has_the_eps_of_its_code(tmp_path):
    foreign = to_foreign(vit_state(BARE), HUGGING_FACE_BARE, BARE)
    safetensors.numpy.save_file(foreign, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors", BARE)
    assert model.config == dataclasses.replace(BARE, norm_eps=1e-12)
    assert "eps of this layout's code (pass eps=1e-6 for DeiT's training setting)" in model.source


def test_a_distilled_backbone_is_known_by_its_token(tmp_path):
    state = vit_state(BARE) | {"dist_token": np.zeros((1, 1, 12), np.float32)}
    state["pos_embed"] = np.zeros((1, 18, 12), np.float32)
    with pytest.raises(CheckpointError, match=r"a distilled DeiT \('?dist_token.*not read here"):
        load(write_pth(tmp_path / "distilled.pth", as_torch(state)), BARE)


def test_before_the_blocks_it_drops_at_drop_rate():
    silent = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    params = map_named(  # the branches of all blocks add nothing
        lambda key, x: np.zeros_like(x) if key.endswith(silent) else x, random_params(CONFIG, 0)
    )
    y = pvt_ref.forward(params, IMAGES, CONFIG)
    inside = dataclasses.replace(CONFIG, attn_drop_rate=0.5)
    z, _ = pvt_ref.forward_with_cache(params, IMAGES, inside, rng_of(0))
    np.testing.assert_allclose(z, y, rtol=1e-12)
    before = dataclasses.replace(CONFIG, drop_rate=0.5)
    z, _ = pvt_ref.forward_with_cache(params, IMAGES, before, rng_of(0))
    assert np.abs(z - y).max() > 1e-3


def test_other_heads_make_another_model():
    for changes in ({"num_heads": 12}, {"qkv_bias": False}, {"qk_scale": 0.1}, {"depth": 11}):
        described = VIT.describe(dataclasses.replace(VITS["deit_s_16"], **changes))
        assert described.startswith(f"ViT of {changes.get('depth', 12)} blocks, 384 channels, ")


@pytest.mark.parametrize("maps", [False, True], ids=["classifier", "maps"])
def test_its_gradients_with_dropout_are_slopes(maps):
    config = dataclasses.replace(CONFIG, drop_rate=0.2, attn_drop_rate=0.1, drop_path_rate=0.3)
    params, direction, along = random_params(config, 0), random_params(config, 9), IMAGES[::-1]

    def run(p, images):
        if maps:
            return pvt_ref.forward_pyramid_with_cache(p, images, config, rng_of(5), blocks=[0, 2])
        return pvt_ref.forward_with_cache(p, images, config, rng_of(5))

    y, cache = run(params, IMAGES)
    back = pvt_ref.backward_pyramid if maps else pvt_ref.backward
    grads, dimages = back(params, cache, y, config)

    def at(h):
        moved, _ = run(map_arrays(lambda w, v: w + h * v, params, direction), IMAGES + h * along)
        return sum((a * b).sum() for a, b in zip(moved, y, strict=True))

    slope = (dimages * along).sum()
    pairs = zip(named_arrays(grads), named_arrays(direction), strict=True)
    slope += sum((g * v).sum() for (_, g), (_, v) in pairs)
    np.testing.assert_allclose((at(1e-6) - at(-1e-6)) / 2e-6, slope, rtol=1e-6)


def test_an_overflow_by_dropout_itself_is_found_with_the_generator_only():
    config = dataclasses.replace(CONFIG, drop_rate=0.9)
    params = random_params(config, 0, np.float32)
    params = dataclasses.replace(params, pos_embed=np.full_like(params.pos_embed, 1e38))
    images = IMAGES[..., :16].astype(np.float32)
    found = first_non_finite(params, images, config, rng_of(0))
    assert found.endswith("is the dropout inside the network")
    assert "dropout" not in first_non_finite(params, images, config)


def test_a_grid_has_as_many_rows_as_the_image_is_high():
    assert pvt_ref.VARIANTS["deit_s_16"].grids(32, 64) == ((2, 4),)
