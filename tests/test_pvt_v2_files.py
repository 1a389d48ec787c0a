"""A PVT v2 in every layout: written by the library that owns it, or by its names spelt out here."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from loose import loose
from spelt_layouts import config_json, hugging_face_v2, mmdetection_v2, timm_v2_key
from test_checkpoint import as_torch, assert_same_state, random_state, refusal, to_foreign

import pvt_ref
from pvt_ref import VARIANTS, PVTConfig, PVTv2Config
from pvt_ref.__main__ import main
from pvt_ref.checkpoint import load
from pvt_ref.checkpoint.key_maps import foreign_shapes, to_native
from pvt_ref.checkpoint.recognise import find_models, recognise_config
from pvt_ref.errors import CheckpointError, DownloadError
from pvt_ref.models.architecture import param_shapes
from pvt_ref.models.pvt_v2.files import FILES
from pvt_ref.zoo import RELEASED

MICRO = PVTv2Config(
    img_size=32,
    num_classes=3,
    embed_dims=(4, 8, 12, 8),
    num_heads=(1, 2, 3, 4),
    mlp_ratios=(2, 1, 2, 3),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 1, 1),
)
LINEAR = dataclasses.replace(MICRO, linear=True)
BOTH = pytest.mark.parametrize("config", [MICRO, LINEAR], ids=["sr", "linear"])
PORT_EPS = {"norm_eps": 1e-6, "projection_norm_eps": 1e-6}


def bare(config):
    return dataclasses.replace(config, num_classes=0)


def written(path, state, legacy=False):
    torch.save(as_torch(state), path, _use_new_zipfile_serialization=not legacy)
    return path


# The authors' files -------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_authors_files(tmp_path, config, legacy):
    state = random_state(config)
    model = load(written(tmp_path / "v2.pth", state, legacy), config)
    assert_same_state(model, state)
    assert model.config == config
    assert model.source.startswith(
        "authors' layout, custom configuration, 3 classes, 32 px; eps 1e-06, and 1e-05 in the "
        "projection norms"
    )


@BOTH
def test_a_state_dict_goes_both_ways(config):
    state = random_state(config, np.float64)
    params = pvt_ref.from_state_dict(state, config)
    again = pvt_ref.to_state_dict(params)
    assert list(again) == list(param_shapes(config))
    assert all(again[key] is state[key] for key in state)


@pytest.mark.parametrize("layout", FILES.layouts, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", FILES.hub)
def test_a_variant_is_recognised_in_every_layout(name, layout):
    changes = {"num_classes": 0 if layout.has_classifier is False else 7, "in_chans": 1}
    config = dataclasses.replace(VARIANTS[name], **changes)
    state = {  # which takes no memory
        key: np.broadcast_to(np.float16(0), shape)
        for key, shape in foreign_shapes(layout, config).items()
    }
    (found,) = find_models({"state_dict": {f"module.{key}": x for key, x in state.items()}})
    assert found.layout is layout
    assert found.prefix == "module."
    assert recognise_config(found) == config


def test_a_variants_file_needs_no_configuration(tmp_path):
    config = dataclasses.replace(VARIANTS["pvt_v2_b0"], num_classes=7)
    state = random_state(config, np.float16)
    model = load(written(tmp_path / "v2.pth", state))
    assert model.config == config
    assert model.source == (
        "authors' layout, pvt_v2_b0, 7 classes, 224 px, float16 made float32; eps 1e-06, and "
        "1e-05 in the projection norms; assumed: heads as in pvt_v2_b0, eps of this layout's "
        "code, ImageNet's preprocessing"
    )
    assert_same_state(model, {key: x.astype(np.float32) for key, x in state.items()})


def test_a_dense_backbone_has_no_head_and_a_classifier_can_be_read_without(tmp_path):
    state = random_state(bare(MICRO))
    detector = {f"backbone.{k}": x for k, x in state.items()} | {"neck.w": np.ones((2, 2), "f4")}
    model = load(written(tmp_path / "detector.pth", detector), bare(MICRO))
    assert_same_state(model, state)
    assert load(written(tmp_path / "dense.pth", state), bare(MICRO)).config == bare(MICRO)
    state = random_state(MICRO)
    for rename in (str, timm_v2_key):
        path = written(tmp_path / "classifier.pth", {rename(k): x for k, x in state.items()})
        model = load(path, bare(MICRO))
        body = {k: x for k, x in state.items() if not k.startswith("head")}
        assert_same_state(model, body)
        assert "left out, since there is no head: head.bias, head.weight" in model.source
    assert "missing: head.weight (3, 8)" in refusal(tmp_path / "dense.pth", MICRO)


def test_the_two_versions_are_told_apart(tmp_path):
    path = written(tmp_path / "v2.pth", random_state(MICRO))
    other = PVTConfig(
        **{
            name: getattr(MICRO, name)
            for name in ("img_size", "num_classes", "embed_dims", "num_heads", "mlp_ratios")
        },
        depths=MICRO.depths,
        sr_ratios=MICRO.sr_ratios,
    )
    message = refusal(path, other)
    assert "it holds a PVT v2, but config is a PVTConfig" in message
    v1 = written(tmp_path / "v1.pth", random_state(other))
    assert load(v1, other).config == other
    assert "it holds a PVT, but config is a PVTv2Config" in refusal(v1, MICRO)
    assert "PVTv2Config(in_chans=3, num_classes=3, embed_dims=(4, 8, 12, 8)" in refusal(path, None)
    both = {f"a.{k}": x for k, x in random_state(MICRO).items()}
    both |= {f"b.{k}": x for k, x in random_state(other).items()}
    path = written(tmp_path / "both.pth", both)
    assert load(path, MICRO).config == MICRO
    assert load(path, other).config == other


def test_the_other_versions_weights_in_the_same_file_are_named(tmp_path):
    names = ("img_size", "num_classes", "embed_dims", "num_heads", "mlp_ratios", "depths")
    other = PVTConfig(**{name: getattr(MICRO, name) for name in names}, sr_ratios=MICRO.sr_ratios)
    state = random_state(MICRO)
    both = {f"a.{k}": x for k, x in state.items()}
    both |= {f"b.{k}": x for k, x in random_state(other).items()}
    path = written(tmp_path / "both.pth", both)
    model = load(path, MICRO)
    assert_same_state(model, state)
    assert "other weights in the file: entry='b'" in model.source
    assert "other weights in the file: entry='a'" in load(path, other).source
    assert "it holds a PVT, but config is a PVTv2Config" in refusal(path, MICRO, entry="b")
    message = refusal(path, None)
    assert "it holds several models. Choose one of: entry='a'; entry='b'" in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"linear": True}, "show linear=False"),
        ({"sr_ratios": (8, 4, 2, 1)}, "show sr_ratios=(4, 2, 1, 1)"),
        ({"depths": (1, 1, 1, 1), "num_classes": 5}, "show num_classes=3, depths=(1, 2, 1, 1)"),
        ({"qkv_bias": False}, "show qkv_bias=True"),
        ({"embed_dims": (4, 8, 12, 16)}, "show embed_dims=(4, 8, 12, 8)"),
    ],
)
def test_what_the_shapes_show_instead_is_said(tmp_path, changes, says):
    path = written(tmp_path / "v2.pth", random_state(MICRO))
    message = refusal(path, dataclasses.replace(MICRO, **changes))
    assert "The likely cause is a configuration of another variant" in message
    assert message.endswith(says)
    if "linear" in changes:
        path = written(tmp_path / "linear.pth", random_state(LINEAR))
        assert refusal(path, MICRO).endswith("show linear=True")  # then no shape shows ratios


def test_what_does_not_fit_is_listed(tmp_path):
    state = random_state(MICRO)
    del state["block2.1.mlp.dwconv.dwconv.bias"]
    state["norm3.weight"] = np.ones(5, np.float32)
    message = refusal(written(tmp_path / "spoilt.pth", state), MICRO)
    assert "missing: block2.1.mlp.dwconv.dwconv.bias (8,)" in message
    assert "mis-shaped: norm3.weight is (5,), the configuration needs (12,)" in message
    assert "The likely cause is a damaged file, or one of a related network" in message


# timm and MMDetection -----------------------------------------------------------------------------


@BOTH
def test_timm(tmp_path, config):
    state = random_state(config)
    theirs = {timm_v2_key(key): x for key, x in state.items()}
    assert "stages.1.downsample.proj.weight" in theirs
    model = load(written(tmp_path / "timm.pth", theirs), config)
    assert_same_state(model, state)
    assert model.source.startswith(
        "timm layout, custom configuration, 3 classes, 32 px; eps 1e-06,"
    )
    assert model.config == config


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_mmdetection(tmp_path, qkv_bias):
    config = dataclasses.replace(bare(MICRO), qkv_bias=qkv_bias)
    state = random_state(config)
    theirs = mmdetection_v2(state)
    if not qkv_bias:  # its attention then has no bias at all
        assert not any(k.endswith("out_proj.bias") for k in theirs)
        zeros = {k: np.zeros_like(x) for k, x in state.items() if k.endswith("attn.proj.bias")}
        state |= zeros
    model = load(written(tmp_path / "mm.pth", theirs), config)
    assert_same_state(model, state)
    assert model.config == dataclasses.replace(config, **PORT_EPS)
    assert "eps of this layout's code (pass eps=(1e-6, 1e-5)" in model.source
    assert "bare backbone" in refusal(tmp_path / "mm.pth", MICRO)


@BOTH
@pytest.mark.parametrize("layout", FILES.layouts, ids=lambda layout: layout.name)
def test_every_layout_gives_back_what_it_was_given(layout, config):
    config = bare(config) if layout.has_classifier is False else config
    state = random_state(config, np.float64)
    again = to_native(to_foreign(state, layout, config), layout, config)
    assert list(again) == list(state)
    for key, x in state.items():
        np.testing.assert_array_equal(again[key], x, err_msg=key)


# Hugging Face -------------------------------------------------------------------------------------


def hugging_face_model(config, kind: str = "PvtV2ForImageClassification", **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    settings = loose(transformers.PvtV2Config)(
        image_size=config.img_size,
        hidden_sizes=list(config.embed_dims),
        depths=list(config.depths),
        num_attention_heads=list(config.num_heads),
        mlp_ratios=list(config.mlp_ratios),
        sr_ratios=list(config.sr_ratios),
        linear_attention=config.linear,
        num_labels=config.num_classes,
        **more,
    )
    model = getattr(transformers, kind)(settings).double()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, and away from 0 and 1
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    return model.eval()


@BOTH
def test_hugging_face_saves_and_we_read(tmp_path, config):
    theirs = hugging_face_model(config, id2label={0: "cat", 1: "dog", 2: "cow"})
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(5).standard_normal((2, 3, 32, 64))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images)).logits.numpy()
    model = load(tmp_path)
    assert model.config == dataclasses.replace(config, **PORT_EPS)
    assert model.classes == ("cat", "dog", "cow")
    assert (
        "eps 1e-06 in every norm; read from model.safetensors; configuration from" in model.source
    )
    np.testing.assert_allclose(model(images), expected, rtol=1e-10)
    named = load(tmp_path / "model.safetensors", config, eps=(1e-6, 1e-5))
    assert named.config == config
    assert np.abs(named(images) - expected).max() > 1e-9
    said = dataclasses.replace(config, norm_eps=1e-3)
    with pytest.raises(CheckpointError, match=r"norm_eps is 0.001 in config and 1e-06 in config.j"):
        load(tmp_path, said)
    (tmp_path / "config.json").unlink()
    alone = load(tmp_path / "model.safetensors", config)
    assert alone.config == dataclasses.replace(config, **PORT_EPS)
    assert "assumed: eps of this layout's code (pass eps=(1e-6, 1e-5)" in alone.source


def test_hugging_faces_bare_model_and_the_body_of_its_classifier(tmp_path):
    theirs = hugging_face_model(MICRO, "PvtV2Model")
    theirs.save_pretrained(tmp_path / "bare")
    model = load(tmp_path / "bare")
    assert model.config == dataclasses.replace(bare(MICRO), **PORT_EPS)
    images = np.random.default_rng(5).standard_normal((1, 3, 64, 32))
    with torch.no_grad():
        result = theirs(torch.from_numpy(images), output_hidden_states=True)
    for mine, other in zip(model.pyramid(images), result.hidden_states, strict=True):
        np.testing.assert_allclose(mine, other.numpy(), rtol=1e-9, atol=1e-12)
    whole = hugging_face_model(MICRO)
    torch.save(whole.state_dict(), tmp_path / "whole.bin")
    body = load(tmp_path / "whole.bin", bare(MICRO), eps=1e-6)
    assert "the classifier is left out, as config asks" in body.source
    assert body.source.startswith("Hugging Face layout without classifier (under 'pvt_v2')")


def test_hugging_faces_backbone_for_detectors(tmp_path):
    theirs = hugging_face_model(MICRO, "PvtV2Backbone", out_features=["stage1", "stage3"])
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.config == dataclasses.replace(bare(MICRO), **PORT_EPS)
    images = np.random.default_rng(5).standard_normal((1, 3, 64, 32))
    with torch.no_grad():
        first, third = theirs(torch.from_numpy(images)).feature_maps
    maps = model.pyramid(images)
    np.testing.assert_allclose(maps[0], first.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(maps[2], third.numpy(), rtol=1e-9, atol=1e-12)


def test_the_names_spelt_out_by_hand_are_those_that_transformers_writes(tmp_path):
    import safetensors.numpy

    for config in (MICRO, LINEAR, dataclasses.replace(MICRO, qkv_bias=False)):
        hugging_face_model(config, qkv_bias=config.qkv_bias).save_pretrained(tmp_path)
        theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
        ours = hugging_face_v2(random_state(config))
        assert {k: x.shape for k, x in theirs.items()} == {k: x.shape for k, x in ours.items()}
        written_json = json.loads((tmp_path / "config.json").read_text())
        spelt = config_json(dataclasses.replace(config, norm_eps=1e-6))
        told = spelt.keys() - {"dtype", "id2label", "label2id", "transformers_version"}
        assert {k: written_json[k] for k in told} == {k: spelt[k] for k in told}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_sizes", [7, 3, 3, 5], r"patch_sizes is \[7, 3, 3, 5\]; known is \[7, 3, 3, 3\]"),
        ("strides", [2, 2, 2, 2], r"strides is \[2, 2, 2, 2\]; known is \[4, 2, 2, 2\]"),
        ("hidden_act", "relu", "hidden_act is 'relu'; known is 'gelu'"),
        ("num_encoder_blocks", 3, "num_encoder_blocks is 3"),
        ("image_size", [32, 64], r"image_size is \[32, 64\]"),
        ("model_type", "pvt", "model_type is 'pvt', not 'pvt_v2'"),
    ],
)
def test_a_config_json_of_another_network_is_refused(tmp_path, field, value, message):
    hugging_face_model(MICRO).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_json_file_of_our_own_fields_is_enough(tmp_path):
    state = random_state(LINEAR)
    path = written(tmp_path / "v2.pth", state)
    (tmp_path / "ours.json").write_text('{"linear": true, "num_heads": [1, 2, 3, 4]}')
    model = load(path, tmp_path / "ours.json")
    assert model.config == dataclasses.replace(LINEAR, img_size=224, sr_ratios=(8, 4, 2, 1))
    assert_same_state(model, state)
    (tmp_path / "few.json").write_text('{"num_heads": [1, 2, 3, 4]}')  # fits a PVT's as well
    assert load(path, tmp_path / "few.json").config.linear


# By name ------------------------------------------------------------------------------------------


def test_the_released_models_have_names(tmp_path, monkeypatch):
    names = {name: RELEASED[name] for name in RELEASED if "v2_b" in name}
    assert names == {
        **{f"pvt_v2_b{i}": f"OpenGVLab/pvt_v2_b{i}" for i in range(6)},
        "pvt_v2_b2_li": "OpenGVLab/pvt_v2_b2_linear",
    }
    monkeypatch.setenv("PVT_REF_WEIGHTS", str(tmp_path))
    with pytest.raises(DownloadError, match=r"releases/download/v2/pvt_v2_b2_li.pth to "):
        pvt_ref.load("pvt_v2_b2_li", mirror="http://127.0.0.1:9")
    state = random_state(VARIANTS["pvt_v2_b0"])
    written(tmp_path / "pvt_v2_b0.pth", state)
    model = pvt_ref.load("pvt_v2_b0")
    assert model.config == VARIANTS["pvt_v2_b0"]
    assert_same_state(model, state)
    assert "pvt_v2_b0.pth of the weights folder" in model.source


@BOTH
def test_the_command_line_converts_them(tmp_path, capsys, config):
    hugging_face_model(config).save_pretrained(tmp_path / "theirs")
    target = tmp_path / "ours.safetensors"
    arguments = ["convert", str(tmp_path / "theirs"), str(target), "--eps", "1e-6", "1e-5"]
    assert main(arguments) == 0
    assert "Hugging Face layout" in capsys.readouterr().out
    assert pvt_ref.load(target).config == config


# What a config.json or the shapes say -------------------------------------------------------------


def test_the_rates_of_a_config_json_are_each_its_own(tmp_path):
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    hugging_face_model(MICRO, **loose(rates), drop_path_rate=0.3).save_pretrained(tmp_path)
    config = dataclasses.replace(MICRO, drop_rate=0.1, attn_drop_rate=0.2, drop_path_rate=0.3)
    assert load(tmp_path).config == dataclasses.replace(config, **PORT_EPS)


@pytest.mark.parametrize("sr_ratios", [(4, 2, 1, 1), (8, 1, 2, 1), (1, 1, 1, 1)])
def test_the_ratios_are_seen_in_a_file(tmp_path, sr_ratios):
    config = dataclasses.replace(MICRO, img_size=224, sr_ratios=sr_ratios)
    path = written(tmp_path / "v2.pth", random_state(config))
    (tmp_path / "heads.json").write_text(
        json.dumps({"num_heads": config.num_heads, "linear": False})
    )
    assert load(path, tmp_path / "heads.json").config == config


def test_where_no_image_size_is_said_one_is_taken_that_the_ratios_divide(tmp_path):
    config = dataclasses.replace(MICRO, img_size=320, sr_ratios=(5, 2, 1, 1))
    path = written(tmp_path / "v2.pth", random_state(config))
    said = {"num_heads": config.num_heads, "sr_ratios": config.sr_ratios}
    (tmp_path / "few.json").write_text(json.dumps(said))
    assert load(path, tmp_path / "few.json").config == config


def test_timms_backbone_without_a_head_is_known_by_its_convolutions(tmp_path):
    state = random_state(bare(MICRO))
    path = written(tmp_path / "timm.pth", {timm_v2_key(key): x for key, x in state.items()})
    model = load(path, bare(MICRO))
    assert_same_state(model, state)
    assert model.source.startswith("timm layout, custom configuration, no classifier")
