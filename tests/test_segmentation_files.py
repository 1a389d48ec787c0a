"""Files of segmentation networks as mmsegmentation writes them, and this project's own."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from loose import loose
from segmentors import PVT, SEGMENTORS, is_count, params_of, state_of
from spelt_layouts import mmsegmentation_vit
from strategies import normal

import pvt_ref
from pvt_ref import VARIANTS, Model, ModelInfo
from pvt_ref.__main__ import main
from pvt_ref.checkpoint import load, save
from pvt_ref.checkpoint.key_maps import foreign_shapes
from pvt_ref.checkpoint.recognise import find_models, recognise_config
from pvt_ref.errors import ArrayTypeError, CheckpointError, ConfigError
from pvt_ref.models import architecture
from pvt_ref.models.architecture import config_to_dict, count_keys, param_shapes
from pvt_ref.models.segmentor.config import SegmentorConfig, SETRHead
from pvt_ref.models.segmentor.files import FILES
from pvt_ref.tree import named_arrays

each = pytest.mark.parametrize("name", SEGMENTORS)
WITH_CLS_ROW = "backbone.pos_embed4"
LAYOUTS = {"pvt": "PVT", "pvt_v2": "PVT v2", "linear": "PVT v2", "naive": "ViT", "pup": "ViT"}


def as_torch(state: dict) -> dict:
    """Tensors of the same shapes, those without axes too."""
    return {key: torch.tensor(x) for key, x in state.items()}


def spelt(name: str, seed: int = 0, dtype=np.float32) -> tuple[dict, dict]:
    """A state by our keys, and the same as mmsegmentation's file has it."""
    config = SEGMENTORS[name]
    ours = state_of(config, seed, dtype)
    theirs = dict(ours)
    if name == "pvt":  # with a row for a cls token, which the dense backbone never reads
        rows = theirs[WITH_CLS_ROW]
        theirs[WITH_CLS_ROW] = np.concatenate((9 + rows[:, :1], rows), axis=1)
    if LAYOUTS[name] == "ViT":
        inside = {k.removeprefix("backbone."): k for k in ours if k.startswith("backbone.")}
        backbone = mmsegmentation_vit({key: ours[whole] for key, whole in inside.items()})
        rest = {key: x for key, x in ours.items() if not key.startswith("backbone.")}
        theirs = {f"backbone.{key}": x for key, x in backbone.items()} | rest
    return ours, theirs


def written(path, state, prefix: str = "", **beside):
    """A file of mmcv's runner: what is beside the weights says how they came about."""
    state = as_torch({prefix + key: x for key, x in state.items()})
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    meta = {"epoch": 2, "iter": 80000, "CLASSES": ("sky", "road"), "mmcv_version": "1.3.3"}
    torch.save({"meta": meta, "state_dict": state, "optimizer": optimizer, **beside}, path)
    return path


def assert_same(params, state: dict) -> None:
    """Bit by bit, in the order of the state dict."""
    found = dict(named_arrays(params))
    assert list(found) == list(state)
    for key, x in found.items():
        assert x.dtype == state[key].dtype, key
        np.testing.assert_array_equal(x, state[key], err_msg=key)


@pytest.fixture
def small_variants(monkeypatch):
    """The small networks as published ones."""
    row = architecture._rows[SegmentorConfig]
    row = dataclasses.replace(row, variants={f"small_{name}": c for name, c in SEGMENTORS.items()})
    monkeypatch.setitem(architecture._rows, SegmentorConfig, row)


def refusal(path, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, *args, **kwargs)
    assert str(path) in str(caught.value)
    return str(caught.value)


# The authors' files -------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@each
def test_mmsegmentations_files(name, prefix, tmp_path):
    ours, theirs = spelt(name)
    model = load(written(tmp_path / "a.pth", theirs, prefix), SEGMENTORS[name])
    assert model.config == SEGMENTORS[name]
    assert_same(model.params, ours)
    under = "state_dict.module" if prefix else "state_dict"
    assert model.source.startswith(
        f"mmsegmentation layout, {LAYOUTS[name]} backbone (under '{under}'), "
    )
    images = normal(1, 1, 3, 64, 64, dtype=np.float32)
    expected = pvt_ref.forward(params_of(SEGMENTORS[name], dtype=np.float32), images, model.config)
    np.testing.assert_array_equal(model(images), expected)


@pytest.mark.parametrize("name", ["pvt", "pvt_v2"])
def test_a_variant_is_recognised_without_a_configuration(name, small_variants, tmp_path):
    ours, theirs = spelt(name)
    model = load(written(tmp_path / "a.pth", theirs, "module."))
    assert model.config == SEGMENTORS[name]
    assert_same(model.params, ours)
    assert "assumed: heads as in" in model.source
    other = dataclasses.replace(
        SEGMENTORS[name],
        num_classes=9,
        head=dataclasses.replace(SEGMENTORS[name].head, channels=3, neck_channels=11),
    )
    torch.save(as_torch(state_of(other, dtype=np.float32)), tmp_path / "other.pth")
    assert load(tmp_path / "other.pth").config == other  # classes and widths are seen in shapes


@pytest.mark.parametrize("classes", [150, 19])
@pytest.mark.parametrize("layout", FILES.layouts[:2], ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("fpn_")])
def test_every_published_network_is_recognised(name, layout, classes):
    config = dataclasses.replace(VARIANTS[name], num_classes=classes)
    if ("v2" in layout.name) != ("pvt_v2" in name):
        return
    state = {  # which takes no memory
        key: np.broadcast_to(np.int64(0) if is_count(key, config) else np.float32(0), shape)
        for key, shape in foreign_shapes(layout, config).items()
    }
    models = find_models({"state_dict": state, "meta": {}})
    (found,) = [model for model in models if not model.is_part]
    assert found.layout is layout
    assert recognise_config(found) == config
    table = state.get(WITH_CLS_ROW)
    assert table is None or table.shape[1] == 7 * 7 + 1


def test_a_published_networks_file_needs_no_configuration(tmp_path):
    config = VARIANTS["fpn_pvt_v2_b0"]
    state = state_of(config, dtype=np.float32)
    model = load(written(tmp_path / "b0.pth", state))
    assert model.config == config
    assert_same(model.params, state)
    assert "pvt_v2_b0 with semantic_fpn, 150 classes" in model.source
    by_name = load(tmp_path / "b0.pth", "fpn_pvt_v2_b0")
    assert by_name.config == config


@each
def test_the_backbone_of_a_file_can_be_had_alone(name, tmp_path):
    ours, theirs = spelt(name)
    path = written(tmp_path / "a.pth", theirs)
    config = SEGMENTORS[name].backbone
    expected = {
        k.removeprefix("backbone."): x for k, x in ours.items() if k.startswith("backbone.")
    }
    for model in (load(path, config), load(path, config, entry="backbone")):
        assert model.config == config
        assert_same(model.params, expected)
        assert "(under 'state_dict.backbone')" in model.source
        assert "other weights in the file: entry='state_dict'" in model.source
    whole = load(path, SEGMENTORS[name], entry="state_dict")
    assert_same(whole.params, ours)


def test_a_published_backbone_is_recognised_by_its_entry(tmp_path):
    config = VARIANTS["fpn_pvt_v2_b0"]
    path = written(tmp_path / "b0.pth", state_of(config, dtype=np.float32))
    model = load(path, entry="backbone")
    assert model.config == dataclasses.replace(VARIANTS["pvt_v2_b0"], num_classes=0)
    assert next(iter(dict(named_arrays(model.params)))) == "patch_embed1.proj.weight"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_leave_counts_whole(dtype, tmp_path):
    ours, theirs = spelt("pvt", dtype=dtype)
    model = load(written(tmp_path / "a.pth", theirs), SEGMENTORS["pvt"])
    wide = np.float32 if dtype == np.float16 else np.float64
    counts = count_keys(SEGMENTORS["pvt"])
    assert len(counts) == 7
    for key, x in named_arrays(model.params):
        assert x.dtype == (np.int64 if key in counts else wide), key
        np.testing.assert_array_equal(x, ours[key])
        assert key not in counts or x == 7
    assert ("float16 made float32" in model.source) == (dtype == np.float16)


def test_a_table_of_another_image_size_is_read(tmp_path):
    large = dataclasses.replace(SEGMENTORS["pvt"], backbone=dataclasses.replace(PVT, img_size=64))
    torch.save(as_torch(state_of(large, dtype=np.float32)), tmp_path / "a.pth")
    assert load(tmp_path / "a.pth", SEGMENTORS["pvt"]).config.img_size == 64


def test_heads_that_only_a_training_has_are_left_out(tmp_path):
    ours, theirs = spelt("naive")
    more = {f"auxiliary_head.{i}.norm.weight": np.ones(12, np.float32) for i in range(5)}
    more |= {"auxiliary_head.0.conv_seg.weight": np.ones((4, 7, 1, 1), np.float32)}
    more |= {"backbone.ln1.weight": np.ones(12, np.float32)}  # behind all blocks
    model = load(written(tmp_path / "a.pth", theirs | more), SEGMENTORS["naive"])
    assert_same(model.params, ours)
    assert "left out: 'auxiliary_head.0.conv_seg.weight', " in model.source
    assert "and 4 more" in model.source


def test_a_setr_backbone_resizes_its_table_bilinearly(tmp_path):
    _, theirs = spelt("naive")
    bicubic = dataclasses.replace(SEGMENTORS["naive"].backbone, position_resize="bicubic")
    config = dataclasses.replace(SEGMENTORS["naive"], backbone=bicubic)
    model = load(written(tmp_path / "a.pth", theirs), config)
    assert model.config.backbone.position_resize == "bilinear"


# What does not fit --------------------------------------------------------------------------------


def test_missing_and_strange_keys_are_named(tmp_path):
    _, theirs = spelt("pvt")
    for key in ("backbone.block2.1.mlp.fc1.bias", "decode_head.scale_heads.2.2.bn.running_mean"):
        state = {k: x for k, x in theirs.items() if k != key}
        message = refusal(written(tmp_path / "a.pth", state), SEGMENTORS["pvt"])
        assert f"missing: {key}" in message
    state = theirs | {"decode_head.scale_heads.9.0.conv.weight": np.ones((2, 2), np.float32)}
    message = refusal(written(tmp_path / "a.pth", state), SEGMENTORS["pvt"])
    assert "unexpected: decode_head.scale_heads.9.0.conv.weight (2, 2)" in message


def test_wrong_shapes_are_named_with_both(tmp_path, small_variants):
    _, theirs = spelt("pvt")
    state = theirs | {"neck.fpn_convs.1.conv.weight": np.ones((6, 6, 1, 1), np.float32)}
    for config in (SEGMENTORS["pvt"], None):
        message = refusal(written(tmp_path / "a.pth", state), config)
        assert "mis-shaped: neck.fpn_convs.1.conv.weight is (6, 6, 1, 1)" in message
        assert "needs (6, 6, 3, 3)" in message
        assert "PVT backbone" in message


def test_a_count_of_batches_must_be_whole(tmp_path):
    _, theirs = spelt("pvt")
    key = "decode_head.scale_heads.0.0.bn.num_batches_tracked"
    message = refusal(written(tmp_path / "a.pth", theirs | {key: np.float32(3)}), SEGMENTORS["pvt"])
    assert f"wrong dtype: {key} is float32, but counts batches" in message
    state = theirs | {"decode_head.conv_seg.bias": np.arange(4)}
    message = refusal(written(tmp_path / "a.pth", state), SEGMENTORS["pvt"])
    assert "wrong dtype: decode_head.conv_seg.bias is int64, weights are floats" in message


def test_another_backbone_or_head_is_refused(tmp_path):
    _, theirs = spelt("pvt")
    path = written(tmp_path / "a.pth", theirs)
    for other in ("pvt_v2", "naive"):
        message = refusal(path, SEGMENTORS[other])
        assert "mmsegmentation layout, PVT backbone, but it does not fit" in message
    other = dataclasses.replace(SEGMENTORS["pvt"], head=SETRHead(channels=5))
    message = refusal(path, other)
    assert "decode_head.up_convs.0.0.conv.weight" in message
    message = refusal(path, dataclasses.replace(PVT, depths=(1, 1, 1, 1)))
    assert "block2.1" in message
    message = refusal(path)  # which is of no published size
    assert "mmsegmentation layout, PVT backbone" in message
    assert "pass its configuration, load(path, config=SegmentorConfig(...))" in message


@pytest.mark.parametrize("name", ["naive", "pup", "linear"])
def test_a_file_of_no_published_network_needs_a_configuration(name, tmp_path):
    _, theirs = spelt(name)
    message = refusal(written(tmp_path / "a.pth", theirs))
    assert f"mmsegmentation layout, {LAYOUTS[name]} backbone, but none of fpn_pvt_tiny" in message
    assert "pass its configuration, load(path, config=SegmentorConfig(...))" in message


def test_eps_are_the_backbones(tmp_path):
    _, theirs = spelt("pvt")
    path = written(tmp_path / "a.pth", theirs)
    message = refusal(path, SEGMENTORS["pvt"], eps=1e-5)
    assert "those of a segmentation network are in its backbone. Set them in config" in message
    backbone = dataclasses.replace(PVT, norm_eps=1e-4)
    config = dataclasses.replace(SEGMENTORS["pvt"], backbone=backbone)
    assert load(path, config).config == config


def test_a_configuration_from_a_json_file(tmp_path):
    _, theirs = spelt("pup")
    path, file = written(tmp_path / "a.pth", theirs), tmp_path / "config.json"
    file.write_text(json.dumps(config_to_dict(SEGMENTORS["pup"])))
    assert load(path, file).config == SEGMENTORS["pup"]
    file.write_text(json.dumps({"head": {"name": "setr"}, "num_classes": 4}))
    with pytest.raises(CheckpointError, match="does not say which backbone a segmentation netw"):
        load(path, file)


def test_a_classifiers_file_is_no_segmentation_network(tmp_path):
    classifier = dataclasses.replace(PVT, num_classes=3)
    torch.save(as_torch(state_of(classifier, dtype=np.float32)), tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth", SEGMENTORS["pvt"])
    assert "it holds a PVT, but config is a SegmentorConfig" in message
    with pytest.raises(ConfigError, match="classifies a whole picture, not its pixels"):
        load(tmp_path / "a.pth", classifier).segment([])


def test_of_two_sets_of_weights_one_is_chosen(tmp_path):
    ours, theirs = spelt("pvt")
    average, _ = spelt("pvt", seed=1)
    path = written(tmp_path / "a.pth", theirs, ema_state_dict=as_torch(average))
    assert_same(load(path, SEGMENTORS["pvt"]).params, ours)
    model = load(path, SEGMENTORS["pvt"], entry="ema_state_dict")
    assert_same(model.params, average)
    assert "other weights in the file: entry='state_dict'" in model.source


# Our own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@each
def test_a_file_of_it_is_read_as_it_was_saved(name, dtype, tmp_path):
    config, path = SEGMENTORS[name], tmp_path / "own.safetensors"
    info = ModelInfo(
        title="small", classes=("a", "b", "c", "d"),
        colours=((0, 0, 0), (1, 2, 3), (255, 0, 9), (7, 7, 7)), training={"miou": 0.5},
    )  # fmt: skip
    save(path, Model(params_of(config, dtype=dtype), config, info=info))
    model = load(path)
    assert model.config == config
    assert model.info == info
    assert_same(model.params, state_of(config, dtype=dtype))
    again = tmp_path / "again.safetensors"
    save(again, model)
    assert again.read_bytes() == path.read_bytes()
    assert load(path, config).config == config
    with pytest.raises(CheckpointError, match="leave entry out"):
        load(path, entry="backbone")
    other = dataclasses.replace(config, num_classes=5)
    assert "num_classes is 4 in the file and 5 in config" in refusal(path, other)


def test_a_file_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "own.safetensors"
    save(path, Model(params_of(SEGMENTORS["pvt"], dtype=np.float32), SEGMENTORS["pvt"]))
    data = path.read_bytes()
    head = data[8 : 8 + int.from_bytes(data[:8], "little")]
    start, _ = json.loads(head)["decode_head.scale_heads.0.0.bn.num_batches_tracked"][
        "data_offsets"
    ]
    place = 8 + len(head) + start
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert "SHA-256" in refusal(path)


def test_colours_are_as_many_as_classes():
    colours: Any
    for colours, says in (
        (((0, 0, 0),), "colours are .*; they must be as many as there are classes .2."),
        (((0, 0), (1, 1)), r"each \(red, green, blue\)"),
        (((0, 0, 0), (0, 0, 256)), "colours hold 256; levels are whole numbers, 0 to 255"),
        (((0, 0, 0), (0, 0, 1.5)), "colours hold 1.5"),
        ("red", "colours are 'red'"),
    ):
        with pytest.raises(ConfigError, match=says):
            ModelInfo(classes=("a", "b"), colours=colours)
    info = loose(ModelInfo)(classes=("a", "b"), colours=([0, 0, 0], [np.int64(255), 0, 1]))
    assert info.colours == ((0, 0, 0), (255, 0, 1))
    assert ModelInfo.from_dict(info.to_dict()) == info
    assert "colours" not in ModelInfo(classes=("a", "b")).to_dict()


@pytest.mark.parametrize("name", ["pvt", "naive"])
def test_convert(name, tmp_path, capsys, small_variants):
    ours, theirs = spelt(name)
    path = written(tmp_path / "a.pth", theirs, "module.")
    target = tmp_path / "a.safetensors"
    config = ["--config", f"small_{name}"]
    assert main(["convert", str(path), str(target), *config]) == 0
    assert f"mmsegmentation layout, {LAYOUTS[name]} backbone" in capsys.readouterr().out
    model = load(target)
    assert model.config == SEGMENTORS[name]
    assert_same(model.params, ours)
    assert main(["convert", str(path), str(target), "--entry", "backbone", "--force"]) == 2
    capsys.readouterr()
    assert main(["summary", str(target)]) == 0
    assert "decode_head.conv_seg" in capsys.readouterr().out


def test_state_dicts_go_both_ways():
    for name, config in SEGMENTORS.items():
        state = state_of(config)
        again = pvt_ref.to_state_dict(pvt_ref.from_state_dict(state, config))
        assert list(again) == list(param_shapes(config))
        assert all(again[key] is state[key] for key in state), name
    del state["decode_head.up_convs.0.0.bn.running_var"]
    with pytest.raises(CheckpointError, match=r"missing: decode_head\.up_convs\.0\.0\.bn\.runn"):
        pvt_ref.from_state_dict(state, config)
    with pytest.raises(ArrayTypeError, match="must be a NumPy or CuPy array"):
        pvt_ref.from_state_dict(state | {"decode_head.up_convs.0.0.bn.running_var": 1.0}, config)
