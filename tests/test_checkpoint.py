"""Reading and writing weights: every kind of file, really written by the library that owns it."""

import argparse
import collections
import dataclasses
import io
import json
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import warnings
import zipfile
import zlib
from typing import Any

import ml_dtypes  # noqa: F401  (bfloat16 for safetensors.numpy)
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from loose import loose
from strategies import assert_all_drawn, configs, float_dtypes

import pvt_ref
from pvt_ref import VARIANTS, Model, ModelInfo, PVTConfig, from_state_dict, to_state_dict
from pvt_ref.checkpoint import files as files_module
from pvt_ref.checkpoint import load, save
from pvt_ref.checkpoint.key_maps import foreign_shapes, pieces, to_native
from pvt_ref.checkpoint.pth import PthFile
from pvt_ref.checkpoint.safetensors_file import METADATA_KEY, to_bytes
from pvt_ref.checkpoint.stated import from_argument
from pvt_ref.errors import ArrayTypeError, CheckpointError, ConfigError, MissingFileError
from pvt_ref.layers.linear import LinearParams
from pvt_ref.models import architecture
from pvt_ref.models.architecture import Leaf, config_to_dict, param_shapes
from pvt_ref.models.layouts import Files, Layout
from pvt_ref.models.pvt.files import AUTHORS, AUTHORS_DENSE, HUGGING_FACE, MMDETECTION
from pvt_ref.tree import digest

TINY = PVTConfig(
    img_size=32,
    num_classes=3,
    embed_dims=(4, 8, 12, 8),
    num_heads=(1, 2, 3, 4),
    mlp_ratios=(2, 1, 2, 3),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 1, 1),
)
BARE = dataclasses.replace(TINY, num_classes=0)
PORT_EPS = {"norm_eps": 1e-6, "projection_norm_eps": 1e-6}
HINT = (
    "eps of this layout's code (pass eps=(1e-6, 1e-5) for the authors' training setting), "
    "ImageNet's "
)


def random_state(config, dtype: Any = np.float32, seed=0):
    """Different numbers in every array."""
    return {
        key: np.random.default_rng([seed, zlib.crc32(key.encode())])
        .standard_normal(shape)
        .astype(dtype)
        for key, shape in param_shapes(config).items()
    }


def to_foreign(state, layout, config):
    """A native state by the keys of a layout: the pieces read the other way."""
    foreign = {}
    for piece in pieces(layout, config):
        x = state[piece.key]
        if piece.foreign not in foreign:
            foreign[piece.foreign] = np.zeros(piece.foreign_shape, x.dtype)
        target = foreign[piece.foreign][piece.foreign_region]
        target[...] = x[piece.region].reshape(target.shape)
    return foreign


def as_torch(state):
    return {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in state.items()}


def make_model(config=TINY, dtype=np.float32, seed=0):
    return Model(from_state_dict(random_state(config, dtype, seed), config), config)


def assert_same_state(model, state):
    found = to_state_dict(model.params)
    assert list(found) == list(param_shapes(model.config))
    assert found.keys() == state.keys()
    for key, x in found.items():
        assert isinstance(x, np.ndarray), key
        assert x.dtype == state[key].dtype, key
        assert x.shape == state[key].shape, key
        assert x.tobytes() == np.ascontiguousarray(state[key]).tobytes(), key


def write_pth(path, tree, **options):
    torch.save(tree, path, **options)
    return path


def refusal(path, config: Any = TINY, kind: type[Exception] = CheckpointError, **arguments) -> str:
    """The message with which load refuses path."""
    with pytest.raises(kind) as caught:
        load(path, config, **arguments)
    assert str(path) in str(caught.value)
    return str(caught.value)


def rewrite_zip(path, change, compression=zipfile.ZIP_STORED):
    """Writes the archive again, its entries (name to bytes) changed in place by change."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def replace_pickle(path, data):
    """A file as PyTorch writes it, except for its pickle."""
    write_pth(path, as_torch(random_state(TINY)))
    (name,) = [n for n in zipfile.ZipFile(path).namelist() if n.endswith("data.pkl")]
    return rewrite_zip(path, lambda entries: entries.update({name: data}))


# --- the authors' files ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("config", [TINY, BARE], ids=["classifier", "backbone"])
def test_the_authors_state_dict(tmp_path, dtype, config):
    state = random_state(config, dtype)
    model = load(write_pth(tmp_path / "pvt.pth", as_torch(state)), config)
    assert_same_state(model, state)
    assert model.config == config
    assert model.source.startswith("authors' layout, custom configuration, ")
    assert model.source.endswith(
        "; eps 1e-06, and 1e-05 in the projection norms; assumed: ImageNet's preprocessing"
    )
    for key, x in to_state_dict(model.params).items():
        assert x.flags.c_contiguous, key
        assert x.flags.writeable, key
        assert x.flags.owndata or x.base.flags.owndata, key


def test_a_training_checkpoint_gives_its_model(tmp_path):
    torch.manual_seed(0)
    state = random_state(TINY)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "model": collections.OrderedDict(as_torch(state)),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "epoch": 299,
        "loss": torch.tensor(0.25),
        "args": argparse.Namespace(lr=5e-4, model="pvt", resume="", betas=(0.9, None), eval=False),
    }
    model = load(write_pth(tmp_path / "checkpoint.pth", checkpoint), TINY)
    assert_same_state(model, state)
    assert model.source.startswith("authors' layout (under 'model'), ")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_and_parameters_instead_of_tensors(tmp_path, protocol):
    state = random_state(TINY)
    tree = collections.OrderedDict(
        (key, torch.nn.Parameter(x)) for key, x in as_torch(state).items()
    )
    loose(tree)._metadata = {"": {"version": 1}}  # as Module.state_dict() has it
    path = write_pth(tmp_path / "p.pth", tree, pickle_protocol=protocol)
    assert_same_state(load(path, TINY), state)


@pytest.mark.parametrize(
    ("name", "num_classes", "img_size"), [("pvt_tiny", 7, 96), ("pvt_medium", 0, 32)]
)
def test_a_variant_is_recognised_up_to_classes_and_size(tmp_path, name, num_classes, img_size):
    config = dataclasses.replace(VARIANTS[name], num_classes=num_classes, img_size=img_size)
    state = {k: torch.zeros(s, dtype=torch.float16) for k, s in param_shapes(config).items()}
    model = load(write_pth(tmp_path / "variant.pth", state))
    assert model.config == config
    classes = f"{num_classes} classes" if num_classes else "no classifier"
    assert model.source == (
        f"authors' layout, {name}, {classes}, {img_size} px, float16 made float32; "
        f"eps 1e-06, and 1e-05 in the projection norms; assumed: heads as in {name}, eps of this "
        f"layout's code, ImageNet's preprocessing"
    )


def test_the_authors_detectors_skip_the_cls_row(tmp_path):
    state = random_state(BARE)
    file_state = {f"backbone.{k}": x for k, x in as_torch(state).items()}
    table = file_state["backbone.pos_embed4"]
    file_state["backbone.pos_embed4"] = torch.cat((torch.full_like(table[:, :1], 9.0), table), 1)
    file_state["neck.lateral_convs.0.conv.weight"] = torch.ones(2, 2)
    path = write_pth(tmp_path / "retinanet.pth", {"meta": {"epoch": 12}, "state_dict": file_state})
    model = load(path, BARE)
    assert_same_state(model, state)
    assert model.source.startswith(
        "authors' dense-prediction layout (under 'state_dict.backbone'), "
    )


def test_a_safetensors_of_the_authors_layout(tmp_path):
    state = random_state(TINY)
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file(as_torch(state), tmp_path / "a.safetensors", metadata)
        assert_same_state(load(tmp_path / "a.safetensors", TINY), state)
    safetensors.torch.save_file(as_torch(state), tmp_path / "b.safetensors", {"epoch": "3"})
    model = load(tmp_path / "b.safetensors", TINY)
    assert_same_state(model, state)
    assert "; metadata of another program is ignored" in model.source


def test_content_decides_and_not_the_suffix(tmp_path):
    state = random_state(TINY)
    write_pth(tmp_path / "zip.safetensors", as_torch(state))
    assert_same_state(load(tmp_path / "zip.safetensors", TINY), state)
    save(tmp_path / "own.safetensors", make_model())
    (tmp_path / "own.safetensors").rename(tmp_path / "own.pth")
    assert_same_state(load(str(tmp_path / "own.pth")), state)


def test_transposed_sliced_and_shared_tensors(tmp_path):
    state = as_torch(random_state(TINY))
    key = "block1.0.mlp.fc1.weight"
    transposed = state[key].t().contiguous().t()
    assert not transposed.is_contiguous()
    flat = torch.cat([x.flatten() for k, x in state.items() if k.startswith("block2")])
    parts = iter(flat.split([x.numel() for k, x in state.items() if k.startswith("block2")]))
    tree = {k: next(parts).view_as(x) if k.startswith("block2") else x for k, x in state.items()}
    tree[key] = transposed
    wide = torch.zeros(3, 2 * TINY.embed_dims[3])
    wide[:, ::2] = state["head.weight"]
    tree["head.weight"] = wide[:, ::2]
    assert tree["head.weight"].stride() == (2 * TINY.embed_dims[3], 2)
    path = write_pth(tmp_path / "views.pth", tree)
    names = zipfile.ZipFile(path).namelist()
    assert len([n for n in names if "/data/" in n]) < len(state)  # block2 shares one storage
    model = load(path, TINY)
    assert_same_state(model, random_state(TINY))
    q = to_state_dict(model.params)["block2.0.attn.q.weight"]
    other = to_state_dict(model.params)["block2.0.attn.proj.weight"]
    assert not np.shares_memory(q, other)


def test_a_big_endian_file(tmp_path):
    state = random_state(TINY, np.float64)
    path = write_pth(tmp_path / "big.pth", as_torch(state))

    def swap(entries):
        for name, data in entries.items():
            if "/data/" in name:
                entries[name] = np.frombuffer(data, "<f8").astype(">f8").tobytes()
            elif name.endswith("byteorder"):
                entries[name] = b"big"

    model = load(rewrite_zip(path, swap), TINY)
    assert_same_state(model, state)

    def spoil(entries):
        for name in entries:
            if name.endswith("byteorder"):
                entries[name] = b"middle"

    assert "byteorder" in refusal(rewrite_zip(path, spoil))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(tmp_path, suffix, dtype):
    halves = {key: x.to(dtype) for key, x in as_torch(random_state(TINY)).items()}
    path = tmp_path / f"half.{suffix}"
    if suffix == "pth":
        torch.save(halves, path)
    else:
        safetensors.torch.save_file(halves, path)
    model = load(path, TINY)
    assert_same_state(model, {key: x.to(torch.float32).numpy() for key, x in halves.items()})
    assert f"{str(dtype).removeprefix('torch.')} made float32" in model.source


# --- Hugging Face ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """(model, folder): a small random float64 PvtForImageClassification, saved both ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    torch.manual_seed(0)
    model = transformers.PvtForImageClassification(
        transformers.PvtConfig(
            image_size=TINY.img_size,
            hidden_sizes=list(TINY.embed_dims),
            depths=list(TINY.depths),
            num_attention_heads=list(TINY.num_heads),
            mlp_ratios=loose(list(TINY.mlp_ratios)),
            sequence_reduction_ratios=list(TINY.sr_ratios),
            num_labels=TINY.num_classes,
        )
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, and away from 0 and 1
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    model.eval()
    folder = tmp_path_factory.mktemp("hugging_face")
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model, folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_logits(hugging_face, name):
    theirs, folder = hugging_face
    model = load(folder / name, TINY, eps=1e-6)
    images = np.random.default_rng(5).standard_normal((2, 3, 32, 32))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images)).logits.numpy()
    logits = model(images)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, expected, rtol=1e-10)
    k = theirs.pvt.encoder.block[1][1].attention.self.key.weight.detach().numpy()
    v = theirs.pvt.encoder.block[1][1].attention.self.value.weight.detach().numpy()
    kv = to_state_dict(model.params)["block2.1.attn.kv.weight"]
    np.testing.assert_array_equal(kv, np.concatenate((k, v)))


def test_hugging_face_pvt_tiny_by_itself(hugging_face, tmp_path):
    import transformers

    theirs = transformers.PvtForImageClassification(transformers.PvtConfig())
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path / "model.safetensors")
    assert model.config == dataclasses.replace(VARIANTS["pvt_tiny"], **PORT_EPS)
    assert model.source == (
        "Hugging Face layout, pvt_tiny, 1000 classes, 224 px; eps 1e-06 in every norm; "
        "configuration from config.json beside it; assumed: ImageNet's class names, ImageNet's "
        "preprocessing"
    )
    (tmp_path / "config.json").unlink()
    model = load(tmp_path / "model.safetensors")
    assert model.config == dataclasses.replace(VARIANTS["pvt_tiny"], **PORT_EPS)
    assert model.source == (
        "Hugging Face layout, pvt_tiny, 1000 classes, 224 px; eps 1e-06 in every norm; assumed: "
        f"heads as in pvt_tiny, {HINT}class names, ImageNet's preprocessing"
    )
    model = load(tmp_path / "model.safetensors", eps=(1e-6, 1e-5))
    assert model.config == VARIANTS["pvt_tiny"]
    assert "px; eps 1e-06, and 1e-05 in the projection norms; assumed: heads" in model.source
    assert "eps of" not in model.source


def test_a_hugging_face_backbone_has_no_classifier(hugging_face, tmp_path):
    theirs, _ = hugging_face
    torch.save(theirs.pvt.state_dict(), tmp_path / "pvt_model.bin")
    message = refusal(tmp_path / "pvt_model.bin")
    assert "bare backbone" in message
    assert "num_classes=0" in message


def test_hugging_face_problems_are_named_as_in_the_file(hugging_face, tmp_path):
    theirs, _ = hugging_face
    state = dict(theirs.state_dict())
    del state["pvt.encoder.block.0.0.attention.self.value.bias"]
    state["pvt.encoder.layer_norm.weight"] = torch.ones(5, dtype=torch.float64)
    state["pvt.pooler.weight"] = torch.ones(1, dtype=torch.float64)
    torch.save(state, tmp_path / "spoilt.bin")
    message = refusal(tmp_path / "spoilt.bin")
    assert "missing: pvt.encoder.block.0.0.attention.self.value.bias (4,)" in message
    assert "mis-shaped: pvt.encoder.layer_norm.weight is (5,)" in message
    assert "unexpected: pvt.pooler.weight (1,)" in message
    assert message.count("\n  - ") == 3


# --- MMDetection -------------------------------------------------------------------------------


def mmdetection_state(state, config):
    """The layout of MMDetection's PyramidVisionTransformer, written out by hand."""
    out = {}
    for i in range(4):
        ours = f"patch_embed{i + 1}"
        for leaf in ("weight", "bias"):
            out[f"layers.{i}.0.projection.{leaf}"] = state[f"{ours}.proj.{leaf}"]
            out[f"layers.{i}.0.norm.{leaf}"] = state[f"{ours}.norm.{leaf}"]
        out[f"layers.{i}.1.0.pos_embed"] = state[f"pos_embed{i + 1}"]
        for b in range(config.depths[i]):
            ours, theirs = f"block{i + 1}.{b}", f"layers.{i}.1.{b + 1}"
            for leaf in ("weight", "bias"):
                for n in ("norm1", "norm2"):
                    out[f"{theirs}.{n}.{leaf}"] = state[f"{ours}.{n}.{leaf}"]
                if f"{ours}.attn.q.{leaf}" in state:
                    q, kv = state[f"{ours}.attn.q.{leaf}"], state[f"{ours}.attn.kv.{leaf}"]
                    out[f"{theirs}.attn.attn.in_proj_{leaf}"] = np.concatenate((q, kv))
                out[f"{theirs}.attn.attn.out_proj.{leaf}"] = state[f"{ours}.attn.proj.{leaf}"]
                if f"{ours}.attn.sr.{leaf}" in state:
                    out[f"{theirs}.attn.sr.{leaf}"] = state[f"{ours}.attn.sr.{leaf}"]
                    out[f"{theirs}.attn.norm.{leaf}"] = state[f"{ours}.attn.norm.{leaf}"]
                for fc, n in (("fc1", 0), ("fc2", 3)):
                    x = state[f"{ours}.mlp.{fc}.{leaf}"]
                    x = x[:, :, None, None] if leaf == "weight" else x
                    out[f"{theirs}.ffn.layers.{n}.{leaf}"] = x
    return out


def detector(state, config):
    backbone = {f"backbone.{k}": x for k, x in mmdetection_state(state, config).items()}
    return {
        "meta": {"epoch": 12, "CLASSES": ("person", "bicycle"), "config": "model = dict()"},
        "state_dict": collections.OrderedDict(
            as_torch(backbone)
            | {
                "neck.fpn_convs.0.conv.weight": torch.ones(2, 2, 3, 3),
                "bbox_head.retina_cls.bias": torch.ones(9),
                "bbox_head.bn.num_batches_tracked": torch.tensor(7),
            }
        ),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]},
    }


@pytest.mark.parametrize("nested", [True, False], ids=["detector", "bare"])
def test_mmdetection_backbone(tmp_path, nested):
    state = random_state(BARE)
    tree = detector(state, BARE) if nested else as_torch(mmdetection_state(state, BARE))
    model = load(write_pth(tmp_path / "mm.pth", tree), BARE)
    assert_same_state(model, state)
    assert model.params.cls_token is None
    assert model.params.norm is None
    assert model.params.head is None
    assert len(model.pyramid(np.zeros((1, 3, 32, 32), np.float32))) == 4
    where = " (under 'state_dict.backbone')" if nested else ""
    assert model.source.startswith(f"MMDetection layout{where}, custom configuration, no class")


def test_mmdetection_variant_by_itself(tmp_path):
    config = dataclasses.replace(VARIANTS["pvt_small"], num_classes=0, img_size=64)
    state = {k: np.zeros(s, np.float16) for k, s in param_shapes(config).items()}
    model = load(write_pth(tmp_path / "mm.pth", detector(state, config)))
    assert model.config == dataclasses.replace(config, **PORT_EPS)
    assert model.source == (
        "MMDetection layout (under 'state_dict.backbone'), pvt_small, no classifier, 64 px, "
        f"float16 made float32; eps 1e-06 in every norm; left out: "
        f"'neck.fpn_convs.0.conv.weight', 'bbox_head.retina_cls.bias'; assumed: heads as in "
        f"pvt_small, {HINT}preprocessing"
    )


def test_mmdetection_without_qkv_bias_has_no_output_bias_either(tmp_path):
    keys = set(torch.nn.MultiheadAttention(4, 2, bias=False).state_dict())
    assert keys == {"in_proj_weight", "out_proj.weight"}
    config = dataclasses.replace(BARE, qkv_bias=False)
    state = random_state(config)
    for key in state:
        if key.endswith("attn.proj.bias"):
            state[key][:] = 0
    theirs = mmdetection_state(state, config)
    theirs = {k: x for k, x in theirs.items() if not k.endswith("out_proj.bias")}
    path = write_pth(tmp_path / "mm.pth", as_torch(theirs))
    assert_same_state(load(path, config), state)
    assert "missing" in refusal(path, BARE)


def test_mmdetection_needs_a_configuration_without_classifier(tmp_path):
    path = write_pth(tmp_path / "mm.pth", detector(random_state(BARE), BARE))
    message = refusal(path, TINY)
    assert "bare backbone" in message
    assert "num_classes=0" in message


def test_mmdetection_problems_are_named_as_in_the_file(tmp_path):
    tree = detector(random_state(BARE), BARE)
    del tree["state_dict"]["backbone.layers.0.1.1.attn.attn.in_proj_weight"]
    tree["state_dict"]["backbone.layers.0.2.weight"] = torch.ones(4)
    message = refusal(write_pth(tmp_path / "mm.pth", tree), BARE)
    assert "missing: backbone.layers.0.1.1.attn.attn.in_proj_weight (12, 4)" in message
    assert "unexpected: backbone.layers.0.2.weight (4,)" in message
    assert message.count("\n  - ") == 2


# --- eps and configuration ---------------------------------------------------------------------


def test_eps_can_be_given_for_every_kind_of_file(tmp_path):
    paths = [tmp_path / "a.pth", tmp_path / "m.pth", tmp_path / "o.safetensors"]
    write_pth(paths[0], as_torch(random_state(BARE)))
    write_pth(paths[1], as_torch(mmdetection_state(random_state(BARE), BARE)))
    save(paths[2], make_model(BARE))
    for path in paths:
        config = load(path, BARE).config  # its eps are the defaults: nobody chose them
        assert config == (dataclasses.replace(BARE, **PORT_EPS) if path == paths[1] else BARE)
        chosen = dataclasses.replace(BARE, norm_eps=2e-6)
        assert load(path, chosen).config == chosen
        config = load(path, BARE, eps=1e-3).config
        assert (config.norm_eps, config.projection_norm_eps) == (1e-3, 1e-3)
        config = load(path, BARE, eps=loose([0, 2e-5])).config
        assert (config.norm_eps, config.projection_norm_eps) == (0.0, 2e-5)
    stored = dataclasses.replace(BARE, norm_eps=3e-6, projection_norm_eps=3e-6)
    save(paths[2], make_model(stored))
    model = load(paths[2])
    assert model.config == stored
    assert "; eps 3e-06 in every norm; assumed: ImageNet's preprocessing" in model.source
    model = load(paths[2], BARE)
    assert model.config == stored
    assert "eps as it was saved" in model.source


@pytest.mark.parametrize("eps", ["1e-6", -1, math.nan, (1e-6,), (1e-6, 1e-6, 1e-6), True])
def test_unsuitable_eps(tmp_path, eps):
    save(tmp_path / "o.safetensors", make_model())
    with pytest.raises(ConfigError, match="eps"):
        load(tmp_path / "o.safetensors", eps=eps)


def test_unsuitable_arguments(tmp_path):
    save(tmp_path / "o.safetensors", make_model())
    with pytest.raises(ArrayTypeError, match="PVTConfig"):
        load(tmp_path / "o.safetensors", 3)
    path: Any
    for path in (None, 3, b"o.safetensors"):
        with pytest.raises(ArrayTypeError, match="path"):
            load(path)
    with pytest.raises(CheckpointError, match="NUL"):
        load("o\0.safetensors")
    with pytest.raises(ArrayTypeError, match=r"save\(path, model\)"):
        save(str(tmp_path / "x.safetensors"), loose({}))
    with pytest.raises(ArrayTypeError, match="path"):
        loose(save)(make_model(), tmp_path / "x.safetensors")
    for name in ("x.pth", "x"):
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            save(tmp_path / name, make_model())


def test_a_custom_model_needs_its_configuration(tmp_path):
    odd = dataclasses.replace(TINY, mlp_ratios=(2, 1, 2, 1.5))
    message = refusal(write_pth(tmp_path / "c.pth", as_torch(random_state(odd))), None)
    assert "shapes do not show head counts (num_heads)" in message
    for shown in (
        "img_size=32",
        "num_classes=3",
        "embed_dims=(4, 8, 12, 8)",
        "mlp_ratios=(2, 1, 2, 1.5)",
        "depths=(1, 2, 1, 1)",
        "sr_ratios=(4, 2, 1, 1)",
    ):
        assert shown in message
    path = write_pth(tmp_path / "m.pth", as_torch(mmdetection_state(random_state(BARE), BARE)))
    assert "depths=(1, 2, 1, 1)" in refusal(path, None)
    keys = [f"patch_embed1.proj.weight{i}" for i in range(3)] + ["pos_embed1"]
    path = write_pth(tmp_path / "few.pth", {key: torch.ones(2) for key in keys})
    assert "none of pvt_tiny" in refusal(path, None)


def test_all_problems_come_together(tmp_path):
    state = as_torch(random_state(TINY))
    del state["block2.1.attn.kv.bias"], state["norm.weight"]
    state |= {"extra.weight": torch.ones(2), "epoch": 3, 5: torch.ones(1)}
    state["head.weight"] = torch.ones(4, 8)
    state["head.bias"] = torch.ones(3, dtype=torch.int64)
    message = refusal(write_pth(tmp_path / "spoilt.pth", state))
    for line in (
        "missing: block2.1.attn.kv.bias (16,)",
        "missing: norm.weight (8,)",
        "unexpected: extra.weight (2,)",
        "unexpected: epoch (int, not a tensor)",
        "unexpected: 5 (1,)",
        "mis-shaped: head.weight is (4, 8), the configuration needs (3, 8)",
        "wrong dtype: head.bias is int64, weights are floats",
    ):
        assert f"\n  - {line}" in message
    assert message.count("\n  - ") == 7


def test_a_variant_with_faults_is_compared_with_it(tmp_path):
    config = dataclasses.replace(VARIANTS["pvt_tiny"], img_size=32, num_classes=2)
    state = {k: torch.zeros(s, dtype=torch.float16) for k, s in param_shapes(config).items()}
    del state["block3.1.norm2.bias"], state["head.weight"]
    state["pos_embed2"] = torch.zeros(1, 5, 128)
    message = refusal(write_pth(tmp_path / "spoilt.pth", state), None)
    assert "nearest is pvt_tiny" in message
    assert "missing: block3.1.norm2.bias (320,)" in message
    assert "missing: head.weight" in message
    assert "mis-shaped: pos_embed2 is (1, 5, 128)" in message
    assert message.count("\n  - ") == 3


def test_keys_of_both_versions_are_those_of_none(tmp_path):
    state = as_torch(random_state(TINY))
    state["block1.0.mlp.dwconv.dwconv.weight"] = torch.ones(8, 1, 3, 3)
    path = write_pth(tmp_path / "pvt_v2_b0.pth", state)
    assert "unexpected: block1.0.mlp.dwconv.dwconv.weight (8, 1, 3, 3)" in refusal(path)
    assert "Its shapes show PVTConfig(" in refusal(path, None)


def test_several_models_in_one_file(tmp_path):
    state = as_torch(random_state(TINY))
    both = {f"{p}.{k}": x.clone() for p in ("student", "teacher") for k, x in state.items()}
    message = refusal(write_pth(tmp_path / "two.pth", both))
    assert "entry='student'; entry='teacher'" in message


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_that_are_not_numbers(tmp_path, suffix):
    state = as_torch(random_state(TINY))
    state["block3.0.mlp.fc1.bias"][2] = math.nan
    path = tmp_path / f"nan.{suffix}"
    write = torch.save if suffix == "pth" else safetensors.torch.save_file
    write(state, path)
    message = refusal(path)
    assert "block3.0.mlp.fc1.bias holds 1 values" in message


# --- what is not a weights file ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.pth", b"", "empty"),
        ("text.pth", b"some notes on weights\n" * 9, "neither a zip archive"),
        ("short.safetensors", b"\x01", "neither a zip archive"),
        ("page.pth", b"\n<!doctype html><html></html>", "HTML"),
        (
            "pointer.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "git lfs pull",
        ),
        ("pickle.bin", pickle.dumps({"a": 1}), "a bare pickle"),
        ("cut.safetensors", struct.pack("<Q", 10**15) + b'{"a":', "neither a zip archive"),
        ("json.safetensors", struct.pack("<Q", 4) + b"{no}", "not a whole .safetensors"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_other_files(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    assert says in refusal(tmp_path / name)


def test_missing_file_and_directory(tmp_path):
    write_pth(tmp_path / "near.pth", {})
    message = refusal(tmp_path / "neat.pth", kind=MissingFileError)
    assert "near.pth" in message
    assert message.count("neat.pth") == 1
    assert "nor is there a directory" in refusal(tmp_path / "no" / "x.pth", kind=FileNotFoundError)
    assert "model.safetensors" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / ("n" * 300))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "not a regular file" in refusal(tmp_path / "pipe.pth")


@pytest.mark.parametrize("tree", [[torch.ones(2)], torch.ones(2), {"epoch": 3}, {}, None, 3])
def test_files_without_a_state_dict(tmp_path, tree):
    message = refusal(write_pth(tmp_path / "x.pth", tree))
    assert "no weights in it" in message
    assert "state dict" in message


def test_archives_that_pytorch_did_not_write(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    assert ".npz" in refusal(tmp_path / "arrays.npz")
    path = write_pth(tmp_path / "x.pth", as_torch(random_state(TINY)))
    assert "compressed" in refusal(rewrite_zip(path, lambda _: None, zipfile.ZIP_DEFLATED))
    path = write_pth(tmp_path / "x.pth", as_torch(random_state(TINY)))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(match="Duplicate name"):
        archive.writestr(archive.namelist()[3], b"x")
    assert "comes twice" in refusal(path)


def test_a_storage_that_is_missing_or_short(tmp_path):
    path = write_pth(tmp_path / "x.pth", as_torch(random_state(TINY)))

    def drop(entries):
        del entries[next(n for n in entries if n.endswith("/data/7"))]

    assert "no entry 'data/7'" in refusal(rewrite_zip(path, drop))
    path = write_pth(tmp_path / "x.pth", as_torch(random_state(TINY)))

    def cut(entries):
        name = next(n for n in entries if n.endswith("/data/7"))
        entries[name] = entries[name][:-4]

    assert "need" in refusal(rewrite_zip(path, cut))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncation_anywhere_is_refused(tmp_path, suffix):
    path = tmp_path / f"whole.{suffix}"
    if suffix == "pth":
        torch.save(as_torch(random_state(TINY)), path)
    else:
        save(path, make_model())
    data = path.read_bytes()
    offsets = {
        *range(0, 80),
        *range(0, len(data), len(data) // 100),
        *range(len(data) - 80, len(data)),
    }
    for offset in sorted(offsets):
        path.write_bytes(data[:offset])
        with pytest.raises(CheckpointError, match="whole"):
            load(path, TINY)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_flipped_bit_in_the_numbers_is_refused(tmp_path, suffix):
    path = tmp_path / f"flip.{suffix}"
    state = random_state(TINY)
    if suffix == "pth":
        torch.save(as_torch(state), path)
    else:
        save(path, make_model())
    data = bytearray(path.read_bytes())
    at = data.index(state["block3.0.mlp.fc1.weight"].tobytes()) + 40
    data[at] ^= 1  # the lowest bit of one number
    path.write_bytes(data)
    message = refusal(path)
    assert ("CRC" if suffix == "pth" else "SHA-256") in message


# --- attacks -----------------------------------------------------------------------------------


class RunsOnLoad:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("nested", [True, False])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(tmp_path, protocol, nested):
    witness = tmp_path / "witness"
    attack = RunsOnLoad(os.system, (f"touch {witness}",))
    tree = {"model": as_torch(random_state(TINY)), "args": attack} if nested else attack
    path = write_pth(tmp_path / "evil.pth", tree, pickle_protocol=protocol)
    message = refusal(path)
    assert f"'{os.system.__module__}.system'" in message
    assert "nothing was run" in message
    assert not witness.exists()
    torch.load(path, weights_only=False)  # it would have worked
    assert witness.exists()


def test_a_whole_pickled_module_is_refused_by_name(tmp_path):
    path = write_pth(tmp_path / "module.pth", torch.nn.Linear(2, 2))
    message = refusal(path)
    assert "torch.nn.modules.linear.Linear" in message
    assert "model.state_dict()" in message


GLOBAL_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor_pickle(key="pos_embed1", offset=0, size=(2,), stride=(1,), numel=2, storage=b"0"):
    """A pickle with one tensor, by hand."""

    def integers(values):
        return b"(" + b"".join(b"\x8a\x09" + v.to_bytes(9, "little", signed=True) for v in values)

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value

    return (
        b"\x80\x02}" + text(key.encode()) + GLOBAL_TENSOR + b"((" + text(b"storage")
        + b"ctorch\nFloatStorage\n" + text(storage) + text(b"cpu") + integers([numel])[1:] + b"tQ"
        + integers([offset])[1:] + integers(size) + b"t" + integers(stride) + b"t"
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x02r\xff\xff\xff\xff.", id="memo slot 4 billion of nothing"),
        pytest.param(b"\x80\x02Nr\xf0\xff\xff\xff0.", id="memo slot 4 billion"),
        pytest.param(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f" + b".", id="bytes8"),
        pytest.param(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", id="bytearray8"),
        pytest.param(b"\x80\x02\x8b\xff\xff\xff\x7f.", id="long4"),
        pytest.param(b"\x80\x02X\xff\xff\xff\x7f.", id="text of 2 GB"),
        pytest.param(b"\x80\x02" + b"(" * 500_000 + b".", id="marks"),
        pytest.param(b"\x80\x02}" + b"\x85" * 500_000 + b"Ns.", id="deep tuple"),
        pytest.param(b"\x80\x02})" + b"\x85" * 500_000 + b"Ns.", id="deep tuple as a key"),
        pytest.param(b"\x80\x02})" + b"q\x00h\x00\x86" * 200 + b"Ns.", id="exponential key"),
        pytest.param(b"\x80\x02]" + b"q\x00h\x00a" * 9 + b".", id="list in itself"),
        pytest.param(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", id="dict in itself"),
        pytest.param(b"\x80\x02cargparse\nNamespace\n)\x81NNs.", id="item of a namespace"),
        pytest.param(b"\x80\x02cargparse\nNamespace\n(NtR.", id="namespace with arguments"),
        pytest.param(b"\x80\x02cargparse\nNamespace\n.", id="a name alone"),
        pytest.param(b"\x80\x02cargparse\nNamespace\n}b.", id="state of a name"),
        pytest.param(b"I1\n.", id="protocol 0"),
        pytest.param(b"\x80\x02", id="no end"),
        pytest.param(b".", id="nothing"),
        pytest.param(b"", id="empty"),
    ],
)
def test_pickles_that_would_exhaust_memory_or_time(tmp_path, data):
    refusal(replace_pickle(tmp_path / "bomb.pth", data))


def hand_made(path, **tensor):
    """A file with one tensor over a storage of the numbers 0 and 1."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made/data.pkl", tensor_pickle(**tensor))
        archive.writestr("made/data/0", np.arange(2, dtype="<f4").tobytes())
    return path


def read_all(path):
    with path.open("rb") as file:
        pth = PthFile(file)
        return pth.read(pth.tree)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ({}, [0, 1]),
        ({"offset": 1, "size": (1,)}, [1]),
        ({"size": (2, 1), "stride": (1, 7)}, [[0], [1]]),
        ({"size": (1, 2), "stride": (0, 1)}, [[0, 1]]),
        ({"size": (), "stride": (), "offset": 1}, 1),
    ],
)
def test_tensors_are_cut_out_of_their_storage(tmp_path, tensor, expected):
    (x,) = read_all(hand_made(tmp_path / "x.pth", **tensor)).values()
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, expected, strict=False)
    assert x.shape == np.shape(expected)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ({"size": (2**62,), "stride": (0,)}, "more than the whole file"),
        ({"size": (3,), "stride": (0,)}, "expanded view"),
        ({"size": (3,)}, "outside its storage"),
        ({"offset": 1}, "outside its storage"),
        ({"offset": 2, "size": (1,)}, "outside its storage"),
        ({"stride": (2,)}, "outside its storage"),
        ({"stride": (2**62,)}, "outside its storage"),
        ({"size": (), "stride": (), "offset": 2**62}, "outside its storage"),
        ({"offset": -1}, "not a whole number"),
        ({"stride": (-1,)}, "not a whole number"),
        ({"size": (-1,)}, "not a whole number"),
        ({"size": (2**63,)}, "not a whole number"),
        ({"size": (2**62, 0), "stride": (1, 1)}, "is empty"),
        ({"size": (1, 2)}, "cannot be read"),
        ({"size": (1,) * 70, "stride": (1,) * 70}, "cannot be read"),
        ({"numel": 2**62}, "has 8 bytes"),
        ({"numel": 1, "size": (1,)}, "has 8 bytes"),
        ({"numel": -1}, "not a whole number"),
        ({"storage": b"../data.pkl"}, "no entry"),
    ],
    ids=str,
)
def test_tensors_that_reach_beyond_their_storage(tmp_path, tensor, says):
    with pytest.raises(CheckpointError, match=says):
        read_all(hand_made(tmp_path / "x.pth", **tensor))


def in_directory(path, name, change):
    """Changes one entry's record in the zip's table of contents, which no checksum covers."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    at = data.index(name.encode(), start) - 46  # the fixed part of a record
    assert data[at : at + 4] == b"PK\1\2"
    change(data, at)
    path.write_bytes(data)
    return path


def test_a_damaged_table_of_contents(tmp_path):
    def rename(data, at):
        data[at + 46 + len("made/byt")] ^= 1

    def enlarge(data, at):
        data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)

    def shorten(data, at):
        data[at + 20 : at + 28] = struct.pack("<II", 4, 4)

    path = hand_made(tmp_path / "x.pth")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("made/byteorder", b"big")  # the name alone decides how numbers are read
    (x,) = read_all(path).values()
    assert x.tolist() != [0, 1]
    good = path.read_bytes()
    with pytest.raises(CheckpointError, match="differ"):
        read_all(in_directory(path, "made/byteorder", rename))
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="claim more bytes"):
        read_all(in_directory(path, "made/data/0", enlarge))
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="CRC"):
        read_all(in_directory(path, "made/data/0", shorten))


def test_views_that_unpack_to_more_than_the_file(tmp_path):
    state = as_torch(random_state(TINY))
    table = state["pos_embed1"]
    path = write_pth(
        tmp_path / "expanded.pth", state | {"pos_embed1": torch.ones(1, 1, 1).expand(table.shape)}
    )
    assert "expanded view" in refusal(path)
    config = dataclasses.replace(TINY, img_size=256)
    shapes = param_shapes(config)
    one = torch.zeros(max(math.prod(s) for s in shapes.values()))
    tree = {key: one[: math.prod(s)].view(s) for key, s in shapes.items()}
    path = write_pth(tmp_path / "overlap.pth", tree)
    assert "more than the whole file has" in refusal(path, config)


# --- this project's own files ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("config", [TINY, BARE], ids=["classifier", "backbone"])
def test_save_and_load_give_the_same_bits(tmp_path, dtype, config):
    config = dataclasses.replace(
        config, mlp_ratios=(2, 1.25, 2, 3), qk_scale=0.1, drop_path_rate=0.3, norm_eps=1.1e-6
    )
    model = make_model(config, dtype)
    save(tmp_path / "m.safetensors", model)
    again = load(tmp_path / "m.safetensors")
    assert_same_state(again, to_state_dict(model.params))
    assert again.config == config
    classes = "3 classes" if config.num_classes else "no classifier"
    assert again.source.startswith(f"pvt_ref file, custom configuration, {classes}, 32 px; eps 1.1")


def test_the_same_model_gives_the_same_bytes(tmp_path):
    save(tmp_path / "a.safetensors", make_model())
    save(tmp_path / "b.safetensors", make_model())
    save(tmp_path / "a2.safetensors", load(tmp_path / "a.safetensors"))
    data = (tmp_path / "a.safetensors").read_bytes()
    assert (tmp_path / "b.safetensors").read_bytes() == data
    assert (tmp_path / "a2.safetensors").read_bytes() == data
    code = "import sys, test_checkpoint as t; t.save(sys.argv[1], t.make_model())"
    subprocess.run(  # another process, another hash seed
        [sys.executable, "-c", code, str(tmp_path / "c.safetensors")],
        check=True,
        cwd=os.path.dirname(__file__),
        env=os.environ | {"PYTHONHASHSEED": "12345"},
    )
    assert (tmp_path / "c.safetensors").read_bytes() == data
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert list(file.metadata()) == [METADATA_KEY]
        record = json.loads(file.metadata()[METADATA_KEY])
    assert record.keys() == {"architecture", "config", "format", "sha256"}
    assert record["architecture"] == "pvt"
    other = dataclasses.replace(TINY, drop_rate=0.1)
    save(tmp_path / "d.safetensors", make_model(other))
    assert (tmp_path / "d.safetensors").read_bytes() != data


def test_memory_order_does_not_matter(tmp_path):
    state = {key: np.asfortranarray(x) for key, x in random_state(TINY).items()}
    state["head.weight"] = np.repeat(state["head.weight"], 2, axis=1)[:, ::2]
    assert not state["head.weight"].flags.contiguous
    save(tmp_path / "f.safetensors", Model(from_state_dict(state, TINY), TINY))
    save(tmp_path / "c.safetensors", make_model())
    assert (tmp_path / "f.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    assert_same_state(load(tmp_path / "f.safetensors"), random_state(TINY))


def test_other_readers_see_the_same_tensors(tmp_path):
    save(tmp_path / "m.safetensors", make_model())
    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    for key, x in random_state(TINY).items():
        np.testing.assert_array_equal(found[key].numpy(), x)


def test_a_given_configuration_may_differ_from_the_stored_one_in_eps_and_drop_rates(tmp_path):
    save(tmp_path / "m.safetensors", make_model())
    config = dataclasses.replace(TINY, norm_eps=1e-3, projection_norm_eps=1e-2, drop_rate=0.5)
    assert load(tmp_path / "m.safetensors", config).config == config
    # other heads would fit every shape and give other numbers
    for change in ({"num_heads": (4, 4, 4, 4)}, {"num_classes": 5}, {"qk_scale": 2.0}):
        (name, value), *_ = change.items()
        message = refusal(tmp_path / "m.safetensors", dataclasses.replace(TINY, **change))
        assert f"{name} is {getattr(TINY, name)} in the file and {value} in config" in message


def own_file(path, change_record=None, change_state=None, metadata=None):
    """An own file with changes, after the digest was made."""
    state = random_state(TINY)
    with_path = path.with_name("plain.safetensors")
    with_path.write_bytes(to_bytes(state, TINY))
    with safetensors.safe_open(with_path, "np") as file:
        record = json.loads(file.metadata()[METADATA_KEY])
    if change_record:
        change_record(record)
    if change_state:
        change_state(state)
    metadata = metadata or {METADATA_KEY: json.dumps(record)}
    safetensors.numpy.save_file(state, path, metadata)
    return path


def test_a_changed_own_file_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    assert load(own_file(path)).config == TINY
    changes = {
        "eps": lambda r: r["config"].update(norm_eps=1.0000001e-6),
        "heads": lambda r: r["config"].update(num_heads=[1, 1, 1, 1]),
        "digest": lambda r: r.update(sha256="0" * 64),
        "field": lambda r: r["config"].pop("drop_rate"),
    }
    for change in changes.values():
        assert "SHA-256" in refusal(own_file(path, change), None)
    for change in (lambda r: r.pop("sha256"), lambda r: r.pop("config")):
        assert "unreadable metadata" in refusal(own_file(path, change), None)
    assert "newer version" in refusal(
        own_file(path, lambda r: r.update(format="pvt_ref weights 3")), None
    )

    def swap(state):
        a, b = "block1.0.norm1.weight", "block1.0.norm2.weight"
        state[a], state[b] = state[b], state[a]

    def other_type(state):
        state["head.bias"] = state["head.bias"].view(np.int32)

    def other_shape(state):
        state["head.bias"] = state["head.bias"].reshape(1, 3)

    def extra(state):
        state["more"] = np.zeros(0, np.float32)

    for change in (swap, other_type, other_shape, extra):
        assert "SHA-256" in refusal(own_file(path, change_state=change), None)
    with safetensors.safe_open(own_file(path), "np") as file:
        record = file.metadata()[METADATA_KEY]
    for metadata in ({"pvt_reg": record}, {"format": record}):
        assert "cannot be verified" in refusal(own_file(path, metadata=metadata))
    assert "SHA-256" in refusal(own_file(path, metadata={METADATA_KEY: record, "more": ""}), None)
    assert "unreadable metadata" in refusal(own_file(path, metadata={METADATA_KEY: "{"}), None)


@pytest.mark.parametrize(
    "fields",
    [
        {"depths": [10**9, 1, 1, 1]},
        {"embed_dims": [10**400, 8, 12, 8]},
        {"colour": "blue"},
        {"num_heads": [3, 3, 3, 3]},
        {"mlp_ratios": [1e308, 1e308, 1, 1]},
        {"img_size": 32 * 10**300},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_an_own_file_with_an_impossible_configuration(tmp_path, monkeypatch, fields):
    """Signed with a right digest, so that only the checks of the configuration stand."""
    plain = config_to_dict(TINY) | fields
    monkeypatch.setattr("pvt_ref.checkpoint.safetensors_file.config_to_dict", lambda config: plain)
    (tmp_path / "m.safetensors").write_bytes(to_bytes(random_state(TINY), TINY))
    monkeypatch.undo()
    refusal(tmp_path / "m.safetensors", None)


def files_of(folder):
    return sorted(p.name for p in folder.iterdir())


class FullDisk(io.BytesIO):
    def write(self, data):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["fsync", "replace", "write", "interrupt"])
def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch, fault):
    path = tmp_path / "m.safetensors"
    save(path, make_model())
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt if fault == "interrupt" else OSError(5, "Input/output error")

    def open_full(self, mode, *args):
        assert mode == "xb"
        open(self, "xb").close()
        return FullDisk()

    with monkeypatch.context() as patch:
        if fault == "write":
            patch.setattr(files_module.Path, "open", open_full)
        else:
            patch.setattr(os, "replace" if fault == "replace" else "fsync", fail)
        kind = KeyboardInterrupt if fault == "interrupt" else CheckpointError
        with pytest.raises(kind) as caught:
            save(path, make_model(seed=1))
    if fault != "interrupt":
        assert str(path) in str(caught.value)
        assert "could not be saved" in str(caught.value)
    assert path.read_bytes() == old
    assert files_of(tmp_path) == ["m.safetensors"]


def test_save_into_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="directory exists"):
        save(tmp_path / "no" / "m.safetensors", make_model())
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="could not be saved"):
        save(tmp_path / "folder.safetensors", make_model())
    assert files_of(tmp_path) == ["folder.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_killed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save(path, make_model())
    old = path.read_bytes()
    code = textwrap.dedent("""
        import os, signal, sys
        import test_checkpoint as t
        os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
        t.save(sys.argv[1], t.make_model(seed=1))
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=os.path.dirname(__file__), check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    assert load(path).config == TINY


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions and links")
def test_permissions_and_links(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path / "m.safetensors", make_model())
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link.safetensors").symlink_to("m.safetensors")
    save(tmp_path / "link.safetensors", make_model(seed=1))
    assert (tmp_path / "link.safetensors").is_symlink()
    assert_same_state(load(tmp_path / "m.safetensors"), random_state(TINY, seed=1))


@pytest.mark.gpu
def test_a_model_on_the_gpu_is_saved_from_the_host(tmp_path, cupy):
    save(tmp_path / "g.safetensors", pvt_ref.to_device(make_model()))
    save(tmp_path / "h.safetensors", make_model())
    assert (tmp_path / "g.safetensors").read_bytes() == (tmp_path / "h.safetensors").read_bytes()


# --- the property ------------------------------------------------------------------------------


def test_36_key_maps_lose_nothing_and_save_load_is_bitwise(tmp_path):
    seen = collections.Counter()

    @settings(max_examples=30, suppress_health_check=[HealthCheck.filter_too_much])
    @given(
        config=configs(),
        dtype=float_dtypes,
        qk_scale=st.none() | st.floats(-2, 2),
        eps=st.floats(0, 1),
        rate=st.floats(0, 0.5),
    )
    def check(config, dtype, qk_scale, eps, rate):
        config = dataclasses.replace(config, qk_scale=qk_scale, norm_eps=eps, drop_path_rate=rate)
        facts = {
            "R > 1": max(config.sr_ratios) > 1,
            "no qkv bias": not config.qkv_bias,
            "backbone": not config.has_classifier,
            "classifier": config.has_classifier,
            "qk_scale": qk_scale is not None,
        }
        for fact in (name for name, true in facts.items() if true):
            event(fact)
            seen[fact] += 1
        state = random_state(config, dtype)
        model = Model(from_state_dict(state, config), config)
        save(tmp_path / "m.safetensors", model)
        again = load(tmp_path / "m.safetensors")
        assert_same_state(again, state)
        assert again.config == config
        for layout in (AUTHORS, AUTHORS_DENSE, HUGGING_FACE, MMDETECTION):
            if layout.has_classifier not in (None, config.has_classifier):
                continue
            foreign = to_foreign(state, layout, config)
            assert {k: x.shape for k, x in foreign.items()} == foreign_shapes(layout, config)
            back = to_native(foreign, layout, config)
            assert back.keys() == state.keys()
            for key, x in state.items():
                if layout is MMDETECTION and not config.qkv_bias and key.endswith("attn.proj.bias"):
                    assert not back[key].any()  # the one array that MMDetection does not have
                else:
                    assert back[key].dtype == x.dtype
                    np.testing.assert_array_equal(back[key], x, err_msg=f"{layout.name} {key}")
            extra = sum(x.size for x in foreign.values()) - sum(x.size for x in back.values())
            if layout is AUTHORS_DENSE:
                assert extra == config.embed_dims[-1]  # the cls token's row
            elif config.qkv_bias or layout is not MMDETECTION:
                assert extra == 0  # nothing twice, nothing left out
            safetensors.numpy.save_file(foreign, tmp_path / "f.safetensors")
            if layout is not AUTHORS:
                assert_same_state(load(tmp_path / "f.safetensors", config), back)

    check()
    assert_all_drawn(seen, {"R > 1", "no qkv bias", "backbone", "classifier", "qk_scale"})


def test_save_takes_every_name_that_the_file_system_takes(tmp_path):
    path = tmp_path / ("n" * 243 + ".safetensors")
    save(path, make_model())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- another network ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanConfig:
    """A network of two arrays, of which files of other projects are not known."""

    width: int
    img_size: int = 8
    in_chans: int = 3
    num_classes: int = 2
    drop_path_rate: float = 0.0

    has_classifier = True


@dataclasses.dataclass(frozen=True)
class MeanParams:
    first: np.ndarray
    head: LinearParams


def build_mean(config, make):
    C, K = config.width, config.num_classes
    return MeanParams(
        make(Leaf("first", (C, config.in_chans), "normal")),
        LinearParams(
            make(Leaf("head.weight", (K, C), "normal")), make(Leaf("head.bias", (K,), "zeros"))
        ),
    )


@pytest.fixture
def mean_network(monkeypatch):
    def none(*args):
        raise AssertionError("no file needs a pass")

    row = architecture.Architecture(
        name="mean",
        title="mean network",
        config_type=MeanConfig,
        params_type=MeanParams,
        build_params=build_mean,
        prepare=none,
        forward=none,
        backward=none,
        operations=frozenset(),
        place=none,
        describe=lambda config: f"mean network of width {config.width}",
        variants={"mean_5": MeanConfig(width=5)},
    )
    monkeypatch.setitem(architecture._rows, MeanConfig, row)
    return row


def test_a_network_without_layouts_has_our_own_files(tmp_path, mean_network):
    config = MeanConfig(width=4)
    state = random_state(config)
    model = Model(from_state_dict(state, config), config)
    path = tmp_path / "m.safetensors"
    save(path, model)
    for said in (None, config, dataclasses.replace(config, drop_path_rate=0.5)):
        again = load(path, said)
        assert_same_state(again, state)
        assert again.config == (said or config)
    assert again.source.startswith("pvt_ref file, mean network of width 4")
    assert "eps" not in again.source
    assert "width is 4 in the file and 5 in config" in refusal(path, "mean_5")
    assert "it holds a mean network, but config is a PVTConfig" in refusal(path, TINY)
    assert "a mean network has 0" in refusal(path, config, eps=1e-6)


def test_a_state_dict_of_a_network_without_layouts(tmp_path, mean_network):
    config = MeanConfig(width=5)
    state = random_state(config)
    path = write_pth(tmp_path / "m.pth", {"model": as_torch(state), "epoch": 3})
    (tmp_path / "c.json").write_text(json.dumps(config_to_dict(config)))
    for said in (config, "mean_5", tmp_path / "c.json"):
        model = load(path, said)
        assert_same_state(model, state)
        assert model.config == config
        assert model.source.startswith(
            "mean network state dict (under 'model'), mean network of width 5"
        )
    assert "are of no known layout" in refusal(path, None)
    assert "are of no known layout" in refusal(path, TINY)
    other = dataclasses.replace(config, num_classes=3)
    assert "mis-shaped: head.weight is (2, 5), the configuration needs (3, 5)" in refusal(
        path, other
    )
    missing = {key: x for key, x in as_torch(state).items() if key != "head.bias"}
    write_pth(path, {"backbone." + key: x for key, x in missing.items()})
    assert "missing: backbone.head.bias (2,)" in refusal(path, config)
    pvt = write_pth(tmp_path / "pvt.pth", as_torch(random_state(TINY)))
    assert "it holds a PVT, but config is a MeanConfig" in refusal(pvt, config)


def test_a_file_says_of_which_network_it_is(tmp_path, mean_network, monkeypatch):
    path = tmp_path / "m.safetensors"
    config = MeanConfig(width=4)
    save(path, Model(from_state_dict(random_state(config), config), config))
    monkeypatch.delitem(architecture._rows, MeanConfig)
    message = refusal(path, None)
    assert "of the architecture 'mean'; this version knows 'pvt'" in message
    changes = (lambda r: r.pop("architecture"), lambda r: r.update(architecture="mean"))
    for change in changes:
        assert "SHA-256" in refusal(own_file(path, change), None)


def test_files_of_the_first_format_are_a_pvts(tmp_path):
    """As version 0.1 wrote them: no architecture, and the digest over a list."""
    state, config = random_state(TINY), json.loads(json.dumps(config_to_dict(TINY)))
    for info in ({}, {"info": ModelInfo(title="t").to_dict()}):
        record = {"format": "pvt_ref weights 1", "config": config, **info}
        record["sha256"] = digest(state, list(record.values()))
        path = tmp_path / "m.safetensors"
        safetensors.numpy.save_file(state, path, {METADATA_KEY: json.dumps(record)})
        model = load(path)
        assert_same_state(model, state)
        assert model.config == TINY
        assert model.info.title == ("t" if info else "")
        record["architecture"] = "pvt"
        record["config"] = config | {"drop_rate": 0.5}
        safetensors.numpy.save_file(state, path, {METADATA_KEY: json.dumps(record)})
        assert "SHA-256" in refusal(path, None)


def test_an_alias_is_a_name():
    assert from_argument("pvt_v1_huge") == dataclasses.replace(
        loose(from_argument("pvt_huge_v2")), origin="pvt_v1_huge"
    )
    assert from_argument("pvt_v1_huge").config is VARIANTS["pvt_huge_v2"]


@dataclasses.dataclass(frozen=True)
class MarkedParams:
    pos_embed1: np.ndarray
    extra: np.ndarray


def test_a_mark_tells_layouts_apart_that_share_a_probe(tmp_path, mean_network, monkeypatch):
    """As depth-wise convolutions will tell the files of PVT v2, with many keys of a PVT's."""

    def build(config, make):
        shape = (1, 4, config.width)
        return MarkedParams(
            make(Leaf("pos_embed1", shape, "ones")), make(Leaf("extra", (2,), "ones"))
        )

    files = Files(
        readable="marked files",
        layouts=(Layout(name="marked layout", marks=("extra",)),),
        probes=("pos_embed1",),
        bare=lambda layout, state, wanted: (layout, ""),
        model_type="marked",
        telling=frozenset(),
        hugging_face=dict,
        partial=lambda values: MeanConfig(**{"width": 1, **values}),
        fit=lambda config, shapes, layout: config,
        shown=lambda shapes, layout: {"width": shapes["pos_embed1"][2]},
        widths="width",
        blocks=lambda config: 1,
    )
    row = dataclasses.replace(
        mean_network, build_params=build, params_type=MarkedParams, files=files
    )
    monkeypatch.setitem(architecture._rows, MeanConfig, row)
    param_shapes.cache_clear()
    try:
        config = MeanConfig(width=5)
        state = random_state(config)
        path = write_pth(tmp_path / "m.pth", as_torch(state))
        for said in (None, config):
            model = load(path, said)
            assert_same_state(model, state)
            assert model.source.startswith("marked layout, mean network of width 5")
        (tmp_path / "c.json").write_text('{"num_classes": 2}')  # fits a PVT's fields as well
        assert load(path, tmp_path / "c.json").config == config
        write_pth(path, as_torch(state | {"pos_embed1": np.ones((1, 4, 6), "float32")}))
        message = refusal(path, None)
        assert "Its shapes show MeanConfig(width=6, num_heads=unknown)" in message
        assert "marked layout, but none of mean_5" in message
        pvt = random_state(TINY)
        assert_same_state(load(write_pth(tmp_path / "p.pth", as_torch(pvt)), TINY), pvt)
        assert "it holds a PVT, but config is a MeanConfig" in refusal(tmp_path / "p.pth", config)
    finally:
        param_shapes.cache_clear()
