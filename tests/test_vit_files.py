"""Files that are almost a ViT's, and what their refusal says: what it is, and what to do."""

import dataclasses
import json

import numpy as np
import pytest
import spelt_layouts
from fuzz_layouts import LAYOUTS as SPELT
from fuzz_layouts import VIT, bare, good_state
from safetensors.numpy import save_file

import pvt_ref
from pvt_ref import VITS, Model, PVTv2Config, from_state_dict
from pvt_ref.checkpoint import load
from pvt_ref.errors import CheckpointError, NonFiniteError
from pvt_ref.models.architecture import param_shapes

DEIT, HUGGING_FACE, HUGGING_FACE_BARE, MMSEGMENTATION = SPELT["vit"]
TINY = VITS["deit_ti_16"]


def zeros(config=TINY):
    return {key: np.zeros(shape, np.float16) for key, shape in param_shapes(config).items()}


def refusal(path, state, config=None, **arguments):
    save_file({key: np.ascontiguousarray(x) for key, x in state.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        load(path, config, **arguments)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["dist_token", "head_dist.bias"], "a distilled DeiT ('dist_token', 'head_dist.bias')"),
        (["fc_norm.weight", "fc_norm.bias"], "a ViT with global pooling ('fc_norm.bias', 'fc_norm"),
        (["blocks.0.ls1.gamma"], "a ViT with LayerScale, such as DeiT III or DINOv2 ('blocks.0.ls"),
        (["blocks.3.gamma_1"], "a ViT with LayerScale"),
        (["norm_pre.weight"], "a ViT with further norms, such as CLIP's ('norm_pre.weight')"),
        (["blocks.1.attn.q_norm.weight"], "a ViT with further norms"),
        (["reg_token"], "a ViT with register tokens ('reg_token')"),
    ],
)
def test_relatives_of_a_vit_are_named(path, keys, says):
    state = zeros() | dict.fromkeys(keys, np.zeros(192, np.float16))
    for config in (None, TINY, "deit_ti_16", bare(TINY)):
        message = refusal(path, state, config)
        assert says in message
        assert "not read here" in message


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (DEIT, "cls_token"),
        (HUGGING_FACE, "vit.embeddings.cls_token"),
        (HUGGING_FACE_BARE, "embeddings.cls_token"),
        (MMSEGMENTATION, "cls_token"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_vit_without_cls_token_is_refused(path, layout, key):
    config = bare(VIT) if layout.head is False else VIT
    state = dict(good_state("vit", layout, config))
    del state[key]
    message = refusal(path, state, config)
    assert f"it has no {key}. The likely cause is a ViT that averages its patches" in message


def test_a_table_without_the_cls_row_is_not_one_of_another_size(path):
    state = zeros() | {"pos_embed": np.zeros((1, 196, 192), np.float16)}
    assert "pos_embed is (1, 196, 192), the configuration needs (1, 197, 192)" in refusal(
        path, state
    )
    message = refusal(path, state, TINY)
    assert "the configuration needs (1, 197, 192)" in message
    assert "The likely cause is a damaged file, or one of a related network" in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"img_size": 16}, "the shapes in the file show img_size=8"),
        ({"depth": 2, "mlp_ratio": 1}, "the shapes in the file show depth=3, mlp_ratio=2"),
        (
            {"num_classes": 5, "in_chans": 3},
            "the shapes in the file show in_chans=1, num_classes=3",
        ),
        ({"qkv_bias": False}, "the shapes in the file show qkv_bias=True"),
        ({"patch_size": 2, "img_size": 4}, "the shapes in the file show img_size=8, patch_size=4"),
    ],
)
@pytest.mark.parametrize("layout", [DEIT, HUGGING_FACE], ids=lambda layout: layout.name)
def test_what_the_shapes_show_instead_is_said(path, layout, changes, says):
    state = good_state("vit", layout, VIT)
    message = refusal(path, state, dataclasses.replace(VIT, **changes))
    assert "The likely cause is a configuration of another variant" in message
    assert message.endswith(says)


def test_a_json_file_of_another_network_is_named(path, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(dataclasses.asdict(PVTv2Config())))
    message = refusal(path, good_state("vit", DEIT, VIT), other)
    assert "it has the fields of a PVT v2, but the weights are of a ViT. Pass the file" in message


def test_eps_of_the_projection_norms_is_not_a_vits(path):
    message = refusal(path, good_state("vit", DEIT, VIT), VIT, eps=(1e-6, 1e-5))
    assert "eps is (1e-06, 1e-05); a ViT has 1. Pass one number" in message


def test_a_saved_vit_is_not_of_another_variant(path):
    params = from_state_dict(good_state("vit", DEIT, VIT), VIT)
    pvt_ref.save(path, Model(params, VIT))
    with pytest.raises(CheckpointError) as caught:
        load(path, "deit_ti_16")  # whose patches are larger than the pictures of this one
    message = str(caught.value)
    assert "patch_size is 4 in the file and 16 in config" in message
    assert "Leave config out: the file brings its own" in message


def test_eps_of_hugging_face_is_read_and_can_be_replaced(path):
    save_file(dict(good_state("vit", HUGGING_FACE, VIT)), path)
    fields = spelt_layouts.config_json(VIT) | {"layer_norm_eps": 1e-12}
    path.with_name("config.json").write_text(json.dumps(fields))
    for config in (None, VIT):
        model = load(path, config)
        assert model.config.norm_eps == 1e-12
        assert "eps 1e-12 in every norm" in model.source
    assert load(path, eps=1e-6).config.norm_eps == 1e-6
    with pytest.raises(CheckpointError, match=r"norm_eps is 1e-05 in config and 1e-12 in config.j"):
        load(path, dataclasses.replace(VIT, norm_eps=1e-5))


SIGNALLING = pytest.mark.parametrize(
    ("kind", "bits"), [(np.float16, 0x7D01), (np.float32, 0x7FA00001)]
)


def with_a_signalling_nan(layout, key, wide, kind, bits):
    """A state of kind, which has to become wider; a float32 one because the array wide is."""
    state = {key: x.astype(kind) for key, x in good_state("vit", layout, VIT).items()}
    if kind is np.float32:
        state[wide] = state[wide].astype(np.float64)
    state[key].view(f"u{state[key].itemsize}")[2] = bits
    return state


@SIGNALLING
def test_a_signalling_nan_is_refused_without_a_warning(path, kind, bits):
    state = with_a_signalling_nan(DEIT, "norm.bias", "norm.weight", kind, bits)
    assert "norm.bias holds 1 values of 6 that are NaN" in refusal(path, state, VIT)


@SIGNALLING
def test_a_signalling_nan_is_glued_without_a_warning(path, kind, bits):
    key = "vit.encoder.layer.1.attention.attention.key.bias"
    state = with_a_signalling_nan(HUGGING_FACE, key, "vit.layernorm.weight", kind, bits)
    assert "blocks.1.attn.qkv.bias holds 1 values of 18 that are NaN" in refusal(path, state, VIT)


@SIGNALLING
def test_a_signalling_nan_in_a_state_dict_gives_no_warning(kind, bits):
    state = with_a_signalling_nan(DEIT, "norm.bias", "norm.weight", kind, bits)
    params = from_state_dict(state, VIT)
    np.testing.assert_array_equal(np.isnan(params.norm.bias), np.arange(6) == 2)
    with pytest.raises(NonFiniteError, match=r"norm\.bias holds 1 values of 6 that are NaN"):
        Model(params, VIT)
