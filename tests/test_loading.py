"""What weights do not tell: read beside them, chosen, said as assumed, or refused."""

import collections
import dataclasses
import json
import os
import re
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from loose import loose
from test_checkpoint import (
    BARE,
    TINY,
    as_torch,
    assert_same_state,
    detector,
    make_model,
    mmdetection_state,
    random_state,
    refusal,
    write_pth,
)

import pvt_ref
from pvt_ref import VARIANTS, Model, ModelInfo, Preprocessing, from_state_dict, to_state_dict
from pvt_ref.checkpoint import load, save
from pvt_ref.checkpoint.pth import PthFile
from pvt_ref.checkpoint.safetensors_file import MAX_HEADER, MAX_RECORD
from pvt_ref.checkpoint.stated import MAX_JSON
from pvt_ref.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from pvt_ref.errors import ArrayTypeError, CheckpointError, ConfigError, MissingFileError
from pvt_ref.models.architecture import config_to_dict, param_shapes

HEADS = (2, 4, 6, 4)  # as no variant has them
ODD = dataclasses.replace(TINY, num_heads=HEADS)
NAMES = ("cat", "dog", "a bird")


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    return transformers


def their_config(transformers, **changes):
    fields = {
        "image_size": TINY.img_size,
        "hidden_sizes": list(TINY.embed_dims),
        "depths": list(TINY.depths),
        "num_attention_heads": list(HEADS),
        "mlp_ratios": list(TINY.mlp_ratios),
        "sequence_reduction_ratios": list(TINY.sr_ratios),
        "num_labels": TINY.num_classes,
        "id2label": dict(enumerate(NAMES)),
        "layer_norm_eps": 3e-5,
    }
    return transformers.PvtConfig(**fields | changes)


@pytest.fixture(scope="module")
def their_model(transformers):
    """A small float64 PvtForImageClassification with heads, eps and labels of its own."""
    torch.manual_seed(3)
    model = transformers.PvtForImageClassification(their_config(transformers)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.1)
    return model.eval()


@pytest.fixture
def folder(their_model, tmp_path):
    their_model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change_json(path, **changes):
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values[name] = value
        if value is ...:
            del values[name]
    path.write_text(json.dumps(values))


IMAGES = np.random.default_rng(5).standard_normal((2, 3, 32, 32))


def assert_their_logits(model, their_model):
    with torch.no_grad():
        expected = their_model(torch.from_numpy(IMAGES)).logits.numpy()
    np.testing.assert_allclose(model(IMAGES), expected, rtol=1e-10)


# --- folders of save_pretrained ----------------------------------------------------------------


@pytest.mark.parametrize("what", ["folder", "file", "config", "config of the folder"])
def test_a_folder_of_save_pretrained_is_read_with_its_config(folder, their_model, what):
    """A custom model with heads, eps and labels that no variant has: none is lost."""
    path, config = folder, None
    if what != "folder":
        path = folder / "model.safetensors"
    if what.startswith("config"):
        path = path.rename(folder.parent / "moved.safetensors")
        config = folder if what == "config of the folder" else folder / "config.json"
    model = load(path, config)
    assert model.config == dataclasses.replace(ODD, norm_eps=3e-5, projection_norm_eps=3e-5)
    assert model.classes == NAMES
    assert_their_logits(model, their_model)
    assert "config.json" in model.source
    assert "assumed: ImageNet's preprocessing" in model.source
    assert "heads" not in model.source


def test_bin_files_and_several_files(folder, their_model, tmp_path):
    state = their_model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_their_logits(load(folder), their_model)
    (folder / "pytorch_model.bin").unlink()
    keys = list(state)
    places = {key: f"pytorch_model-{i % 3}.bin" for i, key in enumerate(keys)}
    for name in set(places.values()):
        torch.save({key: state[key] for key in keys if places[key] == name}, folder / name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (folder, index):
        assert_their_logits(load(path), their_model)

    def refused(**changes):
        index.write_text(json.dumps({"weight_map": places | changes}))
        return refusal(folder, None)

    first = keys[0]
    for name in ("../out.bin", "/etc/passwd", "a\\b", "..", "", "C:x", "n\0"):
        assert "only names in its own folder" in refused(**{first: name})
    assert "not beside it" in refused(**{first: "pytorch_model-7.bin"})
    assert "name different weights" in refused(**{first: "pytorch_model-1.bin"})
    assert "name different weights" in refused(more="pytorch_model-1.bin")
    assert "weight_map" in refused(**{first: 3})
    index.write_text(json.dumps({"weight_map": {str(i): str(i) for i in range(2000)}}))
    assert "names 2000 files" in refusal(folder, None)
    index.write_text('{"weight_map": ' * 100 + "1" + "}" * 100)
    assert "nested too deeply" in refusal(folder, None)


def test_shards_as_transformers_writes_them(their_model, tmp_path):
    their_model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_their_logits(load(tmp_path), their_model)
    part = next(tmp_path.glob("model-00002-of-*.safetensors"))
    assert f"one of several files; load their folder, {tmp_path}" in refusal(part, None)
    (tmp_path / "config.json").unlink()
    assert "num_heads=unknown" in refusal(tmp_path, None)


def test_a_pvt_model_is_a_backbone(their_model, transformers, tmp_path):
    their_model.pvt.save_pretrained(tmp_path)
    bare = load(tmp_path)
    whole = {f"pvt.{key}": x for key, x in their_model.pvt.state_dict().items()}
    write_pth(tmp_path / "prefixed.bin", whole)
    for model in (bare, load(tmp_path / "prefixed.bin")):
        assert model.config.num_classes == 0
        assert model.config.num_heads == HEADS
        assert model.classes == ()
        assert "left out, since there is no head: " in model.source
        assert "encoder.layer_norm.weight" in model.source
    # the first three maps are those of the classifier
    their_model.save_pretrained(tmp_path / "whole")
    classifier = load(tmp_path / "whole")
    for ours, theirs in zip(bare.pyramid(IMAGES)[:3], classifier.pyramid(IMAGES)[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    table = their_model.pvt.encoder.patch_embeddings[3].position_embeddings.detach().numpy()
    np.testing.assert_array_equal(bare.params.pos_embed4, table[:, 1:])
    backbone = load(tmp_path / "whole", dataclasses.replace(bare.config))
    assert_same_state(backbone, to_state_dict(bare.params))
    assert "the classifier is left out, as config asks" in backbone.source


def test_labels(folder, their_model):
    config = folder / "config.json"
    change_json(config, id2label={str(i): f"LABEL_{i}" for i in range(3)})
    assert load(folder).info.classes == ()  # placeholders are no names
    change_json(config, id2label=None)
    assert load(folder).info.classes == ()
    change_json(config, num_labels=10)
    assert "says 10 labels, but the head in the file has 3 outputs" in refusal(folder, None)
    change_json(config, id2label={"0": "a", "1": "b"}, num_labels=3)
    assert "says 2 labels" in refusal(folder, None)
    for wrong in ({"0": "a", "2": "b"}, ["a"], {"0": 1}, {"x": "a"}):
        change_json(config, id2label=wrong)
        assert "id2label" in refusal(folder, None)
    change_json(config, id2label={"0": "a", "1": "\x1b[31m", "2": "c"})
    assert load(folder).classes[1] == "\x1b[31m"


def test_a_config_that_contradicts_the_weights_is_refused(folder, their_model):
    config, whole = folder / "config.json", (folder / "config.json").read_text()
    for changes, says in (
        ({"model_type": "vit"}, "another model: model_type is 'vit'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"strides": [4, 2, 2, 3]}, "patches overlap"),
        ({"num_encoder_blocks": 3}, "num_encoder_blocks is 3"),
        ({"image_size": [32, 64]}, "tables here are square"),
        ({"depths": [1, 1, 1, 1]}, "unexpected: pvt.encoder.block.1.1"),
        ({"image_size": 64}, "mis-shaped: pvt.encoder.patch_embeddings.0.position_embeddings"),
        ({"num_attention_heads": [3, 2, 3, 4]}, "does not divide"),
        ({"layer_norm_eps": "x"}, "norm_eps"),
        ({"num_labels": "many", "id2label": None}, "num_labels is 'many'"),
    ):
        change_json(config, **changes)
        assert says in refusal(folder, None), changes
        config.write_text(whole)
    change_json(config, image_size=[32, 32], num_attention_heads=[4, 4, 4, 4])
    assert load(folder).config.num_heads == (4, 4, 4, 4)
    for text, says in (
        ("[1]", "holds a list"),
        ("{", "not JSON"),
        ('{"model_type": "pvt", "model_type": "vit"}', "comes twice"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        (" " * (MAX_JSON + 1), "too long"),
    ):
        config.write_text(text)
        assert says in refusal(folder, None)
    config.unlink()
    os.mkfifo(config) if hasattr(os, "mkfifo") else config.mkdir()
    assert "not a regular file" in refusal(folder, None)


def test_a_given_config_and_one_beside_must_agree(folder, their_model):
    path = folder / "model.safetensors"
    model = load(path, ODD)  # eps and labels are read beside, heads agree
    assert model.config.norm_eps == model.config.projection_norm_eps == 3e-5
    assert model.classes == NAMES
    assert_their_logits(model, their_model)
    message = refusal(path, TINY)
    assert "num_heads is (1, 2, 3, 4) in config and (2, 4, 6, 4) in config.json" in message
    other = dataclasses.replace(ODD, norm_eps=1e-3)
    assert "norm_eps is 0.001 in config and 3e-05 in config.json" in refusal(path, other)
    model = load(path, other, eps=(1e-3, 1e-4))
    assert (model.config.norm_eps, model.config.projection_norm_eps) == (1e-3, 1e-4)
    change_json(folder / "config.json", model_type="vit")
    model = load(path, TINY)  # it belongs to something else
    assert model.config.num_heads == TINY.num_heads
    assert "not used: config.json beside it" in model.source


def test_preprocessing_beside_the_weights(folder, their_model, transformers):
    path = folder / "preprocessor_config.json"
    from transformers.models.pvt.image_processing_pil_pvt import PvtImageProcessorPil

    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for settings in (
        {"image_mean": mean, "image_std": std},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": mean, "image_std": std},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    ):
        processor = loose(PvtImageProcessorPil)(size={"height": 32, "width": 32}, **settings)
        processor.save_pretrained(folder)
        if settings.get("image_mean") == 1.0:
            change_json(path, image_mean=1.0, image_std=1.0)
            expected = picture.transpose(2, 0, 1)[None] / 127.5 - 1
        else:
            expected = processor(picture, return_tensors="np")["pixel_values"]
        model = load(folder)
        np.testing.assert_allclose(model.preprocess(picture), expected, rtol=1e-5, atol=1e-5)
        assert "mean and std from preprocessor_config.json" in model.source
        assert "assumed" not in model.source
    change_json(path, size={"height": 64, "width": 64})
    assert "not that of the tables: pass size=" in load(folder).source
    for changes in ({"image_mean": [1]}, {"image_std": [0, 0, 0]}, {"image_mean": "x"}):
        PvtImageProcessorPil().save_pretrained(folder)
        change_json(path, **changes)
        model = load(folder)
        assert model.info.preprocessing == Preprocessing()
        assert "preprocessor_config.json is not used: " in model.source
        assert "assumed: ImageNet's preprocessing" in model.source


def test_folders_without_weights(tmp_path):
    assert "a directory without model.safetensors or pytorch_model.bin" in refusal(tmp_path, None)
    (tmp_path / "other.pth").write_bytes(b"")
    assert "it has: 'other.pth'" in refusal(tmp_path, None)
    (tmp_path / "config.json").write_text("{}")
    assert "a JSON file, which holds no weights" in refusal(tmp_path / "config.json", None)


# --- the argument config, and eps --------------------------------------------------------------


def test_config_by_name_and_by_file(tmp_path):
    small = dataclasses.replace(VARIANTS["pvt_tiny"], img_size=32, num_classes=5, in_chans=4)
    state = {k: torch.zeros(s, dtype=torch.float16) for k, s in param_shapes(small).items()}
    path = write_pth(tmp_path / "w.pth", state)
    for config in ("pvt_tiny", None):
        model = load(path, config)
        assert model.config == small
        assert "no preprocessing is known for in_chans=4" in model.source
        assert ("heads as in pvt_tiny" in model.source) == (config is None)
    assert "pvt_tiny, 5 classes, 32 px, in_chans=4" in model.source
    assert "missing: block1.2.norm1.weight" in refusal(path, "pvt_small")
    (tmp_path / "c.json").write_text(json.dumps(config_to_dict(small)))
    for config in (tmp_path / "c.json", str(tmp_path / "c.json")):
        assert load(path, config).config == small
    with pytest.raises(MissingFileError, match="'pvt_tini': neither a variant"):
        load(path, "pvt_tini")
    with pytest.raises(MissingFileError, match="neither a variant"):
        load(path, "p\0")
    for config in (3, b"x", ("pvt_tiny",)):
        with pytest.raises(ArrayTypeError, match="ViTConfig or SegmentorConfig, a variant's name"):
            load(path, config)
    for text, says in (
        ('{"colour": 1}', r"unknown fields are \['colour'\]"),
        ("{}", "neither Hugging Face's"),
        ('{"img_size": NaN}', "NaN is not a number"),
        ('{"img_size": ' + "9" * 5000 + "}", "5000 digits"),
    ):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(CheckpointError, match=says):
            load(path, tmp_path / "c.json")
    for text in ('{"img_size": "x"}', '{"model_type": "pvt", "num_channels": [1]}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ConfigError, match=r"c\.json: "):
            load(path, tmp_path / "c.json")


def test_a_given_config_does_not_change_eps_in_silence(folder, their_model, tmp_path):
    """With the port's own eps the logits agree to rounding; with the authors' they do not."""
    (folder / "config.json").unlink()
    path = folder / "model.safetensors"
    model = load(path, ODD)
    assert (model.config.norm_eps, model.config.projection_norm_eps) == (1e-6, 1e-6)
    assert "assumed: eps of this layout's code (pass eps=(1e-6, 1e-5)" in model.source
    model = load(path, ODD, eps=3e-5)
    assert_their_logits(model, their_model)
    assert "eps of" not in model.source
    own = tmp_path / "own.json"
    own.write_text(json.dumps(config_to_dict(ODD)))  # says eps, though they are the defaults
    model = load(path, own)
    assert model.config == ODD
    assert "eps of" not in model.source


def test_a_config_for_a_file_of_save(tmp_path):
    stored = dataclasses.replace(TINY, norm_eps=3e-6)
    save(tmp_path / "m.safetensors", make_model(stored))
    (tmp_path / "c.json").write_text(json.dumps(config_to_dict(TINY)))
    assert load(tmp_path / "m.safetensors", tmp_path / "c.json").config == TINY  # it says eps
    assert "embed_dims is (4, 8, 12, 8) in the file" in refusal(
        tmp_path / "m.safetensors", "pvt_tiny"
    )
    assert "leave entry out" in refusal(tmp_path / "m.safetensors", None, entry="model")
    hugging_face = {"model_type": "pvt", "num_labels": 7}
    (tmp_path / "c.json").write_text(json.dumps(hugging_face))
    assert "says 7 labels" in refusal(tmp_path / "m.safetensors", tmp_path / "c.json")


# --- which of several --------------------------------------------------------------------------


def two_states():
    return [random_state(TINY, seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize(
    "name",
    ["model_state_dict", "net", "network", "weights", "module", "params", "ema", "model_ema",
     "state_dict_ema", "ema_state_dict", "teacher", "anything"],
)  # fmt: skip
def test_weights_under_any_name_are_found_and_named(tmp_path, name):
    state, _ = two_states()
    path = write_pth(tmp_path / "c.pth", {"epoch": 3, name: as_torch(state)})
    model = load(path, TINY)
    assert_same_state(model, state)
    assert f"(under {name!r})" in model.source
    assert_same_state(load(path, TINY, entry=name), state)


def test_one_of_two_sets_of_weights_is_chosen_and_the_other_named(tmp_path):
    first, second = two_states()
    path = write_pth(
        tmp_path / "c.pth", {"model": as_torch(first), "model_ema": as_torch(second), "epoch": 1}
    )
    model = load(path, TINY)
    assert_same_state(model, first)
    assert "(under 'model')" in model.source
    assert "other weights in the file: entry='model_ema'" in model.source
    model = load(path, TINY, entry="model_ema")
    assert_same_state(model, second)
    assert "other weights in the file: entry='model'" in model.source
    assert pvt_ref.load(path, TINY, entry="model_ema").source == model.source
    message = refusal(path, entry="ema")
    assert "none of the models in it have this name" in message
    assert "entry='model'; entry='model_ema'" in message
    wrong: Any
    for wrong in (3, b"model", ["model"]):
        with pytest.raises(ArrayTypeError, match="entry is a"):
            load(path, TINY, entry=wrong)


def test_where_nothing_says_which_is_meant_all_are_listed(tmp_path):
    first, second = two_states()
    for tree in (
        {"student": as_torch(first), "teacher": as_torch(second)},
        {"model": as_torch(first), "state_dict": as_torch(second)},
        {f"{p}.{k}": x for p, s in (("a", first), ("b.c", second)) for k, x in as_torch(s).items()},
    ):
        path = write_pth(tmp_path / "c.pth", tree)
        message = refusal(path)
        assert "several models" in message
        names = re.findall(r"entry='([\w.]+)'", message)
        assert len(names) == 2
        for name, state in zip(names, (first, second), strict=True):
            assert_same_state(load(path, TINY, entry=name), state)


def test_two_names_for_the_same_tensors_are_one_set_of_weights(tmp_path):
    state = as_torch(two_states()[0])
    again = collections.OrderedDict(state.items())
    for tree in ({"student": state, "teacher": again}, {"student": state, "teacher": state}):
        model = load(write_pth(tmp_path / "c.pth", tree), TINY)
        assert "other weights" not in model.source


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "ema."])
def test_wrappers_of_pytorch_only_add_a_prefix(tmp_path, prefix):
    state, _ = two_states()
    tree = {"state_dict": {prefix + key: x for key, x in as_torch(state).items()}}
    assert_same_state(load(write_pth(tmp_path / "c.pth", tree), TINY), state)


def test_names_reach_into_dicts_and_prefixes(tmp_path):
    first, second = random_state(BARE), random_state(BARE, seed=1)
    tree = {"run": {"state": detector(first, BARE), "ema": detector(second, BARE)}}
    path = write_pth(tmp_path / "c.pth", tree)
    assert "entry='run.state.state_dict.backbone'; entry='run.ema" in refusal(path, BARE)
    for entry in ("run.ema", "run.ema.state_dict", "run.ema.state_dict.backbone"):
        assert_same_state(load(path, BARE, entry=entry), second)
    assert "several of the models" in refusal(path, BARE, entry="run")
    assert "several of the models" in refusal(path, BARE, entry="backbone")


def test_a_model_beside_another_ones_prefix_does_not_get_its_keys(tmp_path):
    first, second = two_states()
    tree = as_torch(first) | {f"ema.{k}": x for k, x in as_torch(second).items()}
    path = write_pth(tmp_path / "c.pth", tree)
    assert_same_state(load(path, TINY, entry="ema"), second)
    assert_same_state(load(path, TINY, entry=""), first)


# --- what lies beside the weights in the file --------------------------------------------------


def test_counters_of_profilers_are_left_out(tmp_path):
    state, _ = two_states()
    tree = as_torch(state)
    for module in ("", "patch_embed1.", "block2.1.attn.q.", "head."):
        tree[f"{module}total_ops"] = torch.zeros(1, dtype=torch.float64)
        tree[f"{module}total_params"] = torch.zeros(1, dtype=torch.float64)
    tree["bn.num_batches_tracked"] = torch.tensor(3)
    model = load(write_pth(tmp_path / "c.pth", tree), TINY)
    assert_same_state(model, state)  # float32, though the counters are float64
    assert "ignored: num_batches_tracked, total_ops, total_params" in model.source
    tree["block1.0.total_ops"] = torch.zeros(2)  # no counter
    assert "unexpected: block1.0.total_ops (2,)" in refusal(write_pth(tmp_path / "c.pth", tree))


@pytest.mark.parametrize("layout", ["authors", "hugging face"])
def test_files_without_a_head_are_backbones(tmp_path, layout, their_model):
    if layout == "authors":
        state = random_state(TINY)
        tree = {k: x for k, x in as_torch(state).items() if not k.startswith("head.")}
        expected, dtype = state["pos_embed4"][:, 1:], np.float32
    else:
        tree = {k: x for k, x in their_model.state_dict().items() if "classifier" not in k}
        table = tree["pvt.encoder.patch_embeddings.3.position_embeddings"]
        expected, dtype = table[:, 1:].numpy(), np.float64
    path = write_pth(tmp_path / "c.pth", tree)
    model = load(path, dataclasses.replace(ODD, num_classes=0))
    assert model.params.pos_embed4.dtype == dtype
    np.testing.assert_array_equal(model.params.pos_embed4, expected)
    assert "left out, since there is no head" in model.source
    assert "cls_token" in model.source
    assert "it has no head" in refusal(path, TINY)


def test_a_variant_without_head_needs_no_configuration(tmp_path):
    config = dataclasses.replace(VARIANTS["pvt_tiny"], img_size=32)
    state = {k: torch.zeros(s, dtype=torch.float16) for k, s in param_shapes(config).items()}
    del state["head.weight"], state["head.bias"]
    model = load(write_pth(tmp_path / "c.pth", state))
    assert model.config == dataclasses.replace(config, num_classes=0)
    state["head.bias"] = torch.zeros(1000)  # a head that lost its weight is a damaged classifier
    assert "missing: head.weight" in refusal(write_pth(tmp_path / "c.pth", state), None)


def test_a_classifier_can_be_read_as_a_backbone(tmp_path):
    state, _ = two_states()
    model = load(write_pth(tmp_path / "c.pth", as_torch(state)), BARE)
    assert model.config == BARE
    np.testing.assert_array_equal(model.params.pos_embed4, state["pos_embed4"][:, 1:])
    assert "left out, since there is no head: cls_token, head.bias, head.weight" in model.source


def test_metadata_of_another_program(tmp_path):
    state = as_torch(two_states()[0])
    path = tmp_path / "a.safetensors"
    for metadata in (
        {"epoch": "3", "note": "my run"},
        {"format": "pt", "modelspec.hash_sha256": "0x" + "a" * 64},
        {"config": '{"sr_ratios": [4, 2, 1, 1], "embed_dims": [4, 8, 12, 8]}'},
    ):
        safetensors.torch.save_file(state, path, metadata)
        model = load(path, TINY)
        assert "metadata of another program is ignored" in model.source
    safetensors.torch.save_file(state, path, {"format": "pt"})
    assert "metadata" not in load(path, TINY).source
    save(path, make_model())
    data = path.read_bytes()
    start = data.index(b'"pvt_ref":') + 1
    end = data.index(b"}}", data.index(b"sha256"))
    name = range(start, start + len("pvt_ref"))
    format_ = range(data.index(b"pvt_ref weights"), data.index(b"pvt_ref weights") + 17)
    for at in (*name, *format_):  # any one damage, and one at each of the two names
        changed = bytearray(data)
        changed[at] ^= 2
        path.write_bytes(changed)
        refusal(path)
    changed = bytearray(data)
    changed[start] ^= 2
    for width in (8, 64, 256):
        for at in range(start + 10, end - width, 16):
            twice = bytearray(changed)
            twice[at : at + width] = b" " * width
            path.write_bytes(twice)
            refusal(path)


# --- bounds and messages -----------------------------------------------------------------------


def sealed(path, training):
    """A file of save() with any JSON in it, and the right digest."""
    config = TINY
    params = from_state_dict(random_state(config), config)
    save(path, Model(params, config, info=ModelInfo(training=training)))


def test_what_is_saved_beside_the_weights_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    sealed(path, {"log": [0] * 1000})
    before = path.read_bytes()
    for training, says in (
        ({"log": "x" * MAX_RECORD}, "too long"),
        ({"log": json.loads("[" * 70 + "]" * 70)}, "nested too deeply"),
    ):
        with pytest.raises(CheckpointError, match=says) as caught:
            sealed(path, training)
        assert str(path) in str(caught.value)
        assert path.read_bytes() == before
    nested = [[] for _ in range(2**16)]  # a file of an attacker, who can seal it as well
    limit = "pvt_ref.checkpoint.safetensors_file.MAX_RECORD"
    monkeypatch.setattr(limit, 2**40)
    sealed(path, {"log": nested})
    monkeypatch.setattr(limit, 2**17)
    del nested
    tracemalloc.start()
    try:
        message = refusal(path, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "too long" in message
    assert peak < 12 * path.stat().st_size


def test_a_header_is_bounded(tmp_path):
    path = tmp_path / "m.safetensors"
    for size in (MAX_HEADER + 1, 2**63 - 1):
        with path.open("wb") as file:
            file.write(size.to_bytes(8, "little") + b"{")
            file.truncate(MAX_HEADER + 100)
        refusal(path, None)
    for header, says in (
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', "twice"),
        ('{"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 4]}}', "number type 'F8'"),
        ('{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', "TypeError"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "does not have 4 bytes"),
        ('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "the shape"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', "the shape"),
        ('{"a": {"dtype": "F32", "shape": [1,1,1,1,1,1,1,1,1], "data_offsets": [0, 4]}}', "shape"),
        ('{"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}', "gaps"),
        ('{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', "gaps"),
        ('{"a": {"shape": [1], "data_offsets": [0, 4]}}', "has the fields"),
        ('{"a": [1]}', "AttributeError"),
        ('{"__metadata__": {"a": 1}}', "map names to texts"),
        ('{"__metadata__": []}', "map names to texts"),
        (
            '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}',
            "digits",
        ),
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
        assert says in refusal(path, None), header


def test_weights_are_read_once_and_not_copied(tmp_path):
    config = dataclasses.replace(VARIANTS["pvt_tiny"], num_classes=10)
    path = tmp_path / "m.safetensors"
    save(path, Model(pvt_ref.init_params(config, np.random.default_rng(0)), config))
    load(path)
    tracemalloc.start()
    try:
        model = load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert model.config == config
    assert peak < 1.3 * path.stat().st_size


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save(path, pvt_ref.load("cifar10"))  # more than a buffer holds
    from pvt_ref.checkpoint import safetensors_file

    parse = safetensors_file.parse_json

    def shorten(*args):
        os.truncate(path, path.stat().st_size - 4000)  # after the header was read
        return parse(*args)

    monkeypatch.setattr(safetensors_file, "parse_json", shorten)
    assert "was shortened while it was being read" in refusal(path, None)


EVIL = "pos_embed9\n  - all is well\x1b[2J\u202e"


def test_strangers_names_are_shown_as_text(tmp_path):
    state = as_torch(two_states()[0])
    messages = [
        refusal(write_pth(tmp_path / "a.pth", state | {EVIL: torch.ones(1)})),
        refusal(write_pth(tmp_path / "c.pth", {EVIL: 3})),
        refusal(write_pth(tmp_path / "d.pth", {EVIL: torch.ones(1)})),
        refusal(write_pth(tmp_path / "e.pth", {EVIL: state, "b": as_torch(two_states()[1])})),
        refusal(write_pth(tmp_path / "f.pth", state), entry=EVIL),
    ]
    source = load(write_pth(tmp_path / "g.pth", {EVIL: state}), TINY).source
    for text in (*messages, source):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\n  - all" not in text
        assert r"pos_embed9\n" in text
    assert len(source.splitlines()) == 1


def test_long_lists_of_problems_are_cut(tmp_path):
    path = write_pth(tmp_path / "a.pth", as_torch(random_state(BARE)))
    message = refusal(path, dataclasses.replace(VARIANTS["pvt_large"], num_classes=0))
    assert message.count("\n  - ") == 21
    assert re.search(r"\n  - \.\.\. and \d{3} more\n", message)


def test_mmdetection_labels_are_the_detectors(tmp_path):
    model = load(write_pth(tmp_path / "m.pth", detector(random_state(BARE), BARE)), BARE)
    assert model.info.classes == ()
    tree = as_torch(mmdetection_state(random_state(BARE), BARE))
    assert "assumed: eps of this layout" in load(write_pth(tmp_path / "n.pth", tree), BARE).source


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"foreign": ("mmengine.logging.MessageHub",)}, "were not made: 'mmengine.logging.Mess"),
        ({"foreign": tuple("abcde")}, "were not made: 'a', 'b', 'c' and 2 more"),
        ({"checksummed": False}, "the file has no checksums"),
    ],
)
def test_what_the_reader_met_is_said(tmp_path, monkeypatch, attributes, says):
    path = write_pth(tmp_path / "a.pth", as_torch(random_state(TINY)))
    for name, value in attributes.items():
        monkeypatch.setattr(PthFile, name, property(lambda _, v=value: v, lambda *_: None), False)
    assert says in load(path, TINY).source


def test_imagenets_preprocessing_is_what_is_assumed():
    assert Preprocessing() == Preprocessing("RGB", IMAGENET_MEAN, IMAGENET_STD)
