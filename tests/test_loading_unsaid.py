"""What JSON files and weights do not say, or say in part: read, said as assumed, or refused."""

import dataclasses
import json

import pytest
import safetensors.numpy
import torch
from test_checkpoint import (
    BARE,
    TINY,
    as_torch,
    assert_same_state,
    make_model,
    random_state,
    refusal,
    to_foreign,
    write_pth,
)

import pvt_ref
from pvt_ref import VARIANTS, ModelInfo, Preprocessing, PVTConfig
from pvt_ref.checkpoint import load, save
from pvt_ref.errors import CheckpointError, ConfigError, MissingFileError
from pvt_ref.models.architecture import config_to_dict, param_shapes
from pvt_ref.models.fields import MAX_DEPTH
from pvt_ref.models.pvt.files import HUGGING_FACE

#: As wide as the variants from pvt_tiny to pvt_large, and otherwise none of them.
WIDE = PVTConfig(
    img_size=32, num_classes=3, depths=(1, 1, 2, 1), mlp_ratios=(1, 1, 2, 1), sr_ratios=(1, 1, 1, 1)
)
HEADS = WIDE.num_heads


def wide_state():
    return {k: torch.zeros(s, dtype=torch.float16) for k, s in param_shapes(WIDE).items()}


def hugging_face_folder(tmp_path, config=TINY, **fields):
    """Weights in Hugging Face's layout with the config.json that says all, but for fields."""
    state = random_state(config)
    foreign = to_foreign(state, HUGGING_FACE, config)
    safetensors.numpy.save_file(foreign, tmp_path / "model.safetensors")
    written = {
        "model_type": "pvt",
        "image_size": config.img_size,
        "hidden_sizes": config.embed_dims,
        "depths": config.depths,
        "num_attention_heads": config.num_heads,
        "mlp_ratios": config.mlp_ratios,
        "sequence_reduction_ratios": config.sr_ratios,
        "layer_norm_eps": 1e-6,
        **fields,
    }
    kept = {name: value for name, value in written.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    return state


# --- config.json and other configurations ------------------------------------------------------


def test_sizes_that_a_json_file_lacks_are_read_off_the_shapes(tmp_path):
    """One field at a time, and all that shapes show at once."""
    state = random_state(TINY)
    path = write_pth(tmp_path / "w.pth", as_torch(state))
    whole = config_to_dict(TINY)
    unseen = {"num_heads", "qk_scale", "drop_rate", "attn_drop_rate", "drop_path_rate"}
    unseen |= {"norm_eps", "projection_norm_eps"}
    for lacking in (*({name} for name in whole if name != "num_heads"), whole.keys() - unseen):
        said = {name: value for name, value in whole.items() if name not in lacking}
        (tmp_path / "c.json").write_text(json.dumps(said))
        model = load(path, tmp_path / "c.json")
        assert model.config == TINY
        assert_same_state(model, state)
        assert ("does not say" in model.source) == bool(
            lacking & {"qk_scale", "norm_eps", "projection_norm_eps"}
        )
    (tmp_path / "c.json").write_text('{"drop_rate": 0.1}')
    message = refusal(path, tmp_path / "c.json")
    assert "does not say how many heads the model has" in message
    assert "Write num_heads into it" in message


def test_heads_that_a_json_file_lacks_are_assumed_and_said(tmp_path):
    path = write_pth(tmp_path / "w.pth", wide_state())
    (tmp_path / "c.json").write_text('{"num_classes": 3, "drop_rate": 0.1}')
    model = load(path, tmp_path / "c.json")
    assert model.config == dataclasses.replace(WIDE, drop_rate=0.1)
    said = f"assumed: num_heads {HEADS} and qk_scale None, since {tmp_path / 'c.json'} does not say"
    assert said in model.source
    assert "eps of this layout's code" in model.source


def test_a_hugging_face_config_without_heads_eps_or_sizes(tmp_path):
    state = hugging_face_folder(tmp_path, layer_norm_eps=..., depths=..., image_size=...)
    model = load(tmp_path)
    assert model.config == dataclasses.replace(TINY, projection_norm_eps=1e-6)
    assert_same_state(model, state)
    assert "assumed: eps of this layout's code" in model.source
    hugging_face_folder(tmp_path, num_attention_heads=...)
    assert "does not say how many heads" in refusal(tmp_path, None)
    model = load(tmp_path / "model.safetensors", TINY)  # the heads of the argument
    assert model.config.num_heads == TINY.num_heads
    hugging_face_folder(tmp_path)
    (tmp_path / "c.json").write_text(json.dumps({"embed_dims": TINY.embed_dims}))
    message = refusal(tmp_path, tmp_path / "c.json")
    assert "num_heads is not said in" in message
    assert "and (1, 2, 3, 4) in config.json beside it" in message


@pytest.mark.parametrize("fields", [{}, {"lr": 0.1, "epochs": 3, "num_classes": 7}, {"a": {}}])
def test_a_config_of_something_else_is_not_used(tmp_path, fields):
    hugging_face_folder(tmp_path, WIDE)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    message = refusal(tmp_path, None)  # no variant, and the file is no help
    assert "num_heads=unknown" in message
    model = load(tmp_path, WIDE)
    assert "not used: config.json beside it" in model.source
    (tmp_path / "config.json").write_text(json.dumps({**fields, "depths": [1]}))
    assert "config.json beside it: " in refusal(tmp_path, None)


def test_a_trainings_config_beside_hugging_face_keys(tmp_path):
    """Fields of this project, but no sizes: they say what they say, and no more."""
    hugging_face_folder(tmp_path, WIDE)
    (tmp_path / "config.json").write_text('{"num_classes": 3, "drop_rate": 0.1}')
    model = load(tmp_path)
    assert model.config == dataclasses.replace(WIDE, drop_rate=0.1, projection_norm_eps=1e-6)
    assert f"num_heads {HEADS} and qk_scale None, since config.json beside it" in model.source
    (tmp_path / "config.json").write_text('{"num_classes": 7, "drop_rate": 0.1}')
    assert "mis-shaped: classifier.weight" in refusal(tmp_path, None)


@pytest.mark.parametrize("task", ["multi_label_classification", "regression", ["x"]])
def test_outputs_that_are_not_one_class_per_picture(tmp_path, task):
    hugging_face_folder(tmp_path, problem_type=task)
    for config in (None, TINY):
        source = load(tmp_path, config).source
        says = f"though problem_type is {task!r} in config.json beside it: take probabilities"
        assert f"assumed: one class per picture, by softmax, {says}" in source
    for usual in ("single_label_classification", None):
        hugging_face_folder(tmp_path, problem_type=usual)
        assert "softmax" not in load(tmp_path).source


def test_a_partial_configuration_for_a_file_of_save(tmp_path):
    stored = dataclasses.replace(TINY, qk_scale=0.5, drop_rate=0.25)
    save(tmp_path / "m.safetensors", make_model(stored))
    (tmp_path / "c.json").write_text('{"num_classes": 3}')
    assert load(tmp_path / "m.safetensors", tmp_path / "c.json").config == stored
    (tmp_path / "c.json").write_text('{"num_heads": [1, 2, 3, 2]}')
    message = refusal(tmp_path / "m.safetensors", tmp_path / "c.json")
    assert "num_heads is (1, 2, 3, 4) in the file and (1, 2, 3, 2) in config" in message


# --- preprocessor_config.json ------------------------------------------------------------------

MEAN_STD = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "it has no image_mean"),
        ({"image_mean": [0, 0, 0]}, "it has no image_std"),
        ({**MEAN_STD, "image_std": None}, "it has no image_std"),
        ({**MEAN_STD, "image_mean": [0, None, 0]}, "image_mean or image_std is [0, None, 0]"),
        ({**MEAN_STD, "rescale_factor": None}, "rescale_factor is None; it must be a number"),
        ({**MEAN_STD, "rescale_factor": 0}, "rescale_factor is 0; it must be a number above 0"),
    ],
)
def test_a_preprocessing_that_lacks_numbers_is_not_used(tmp_path, fields, says):
    hugging_face_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    model = load(tmp_path)
    assert f"preprocessor_config.json is not used: {says}" in model.source
    assert model.info.preprocessing == Preprocessing()


@pytest.mark.parametrize(
    ("fields", "ignored", "asks"),
    [
        ({}, "", ""),
        ({"size": 32}, "size", ""),
        ({"size": {"shortest_edge": 36}, "resample": 2}, "size, resample", "36"),
        (
            {"size": {"shortest_edge": 36}, "crop_size": 32, "do_center_crop": True},
            "size, do_center_crop, crop_size",
            "",
        ),
        ({"size": 32, "crop_size": {"height": 64, "width": 64}}, "size, crop_size", "64"),
        (
            {"size": 64, "crop_size": 32, "do_center_crop": False},
            "size, do_center_crop, crop_size",
            "64",
        ),
    ],
)
def test_how_pictures_are_resized_is_not_taken_over(tmp_path, fields, ignored, asks):
    hugging_face_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**MEAN_STD, **fields}))
    source = load(tmp_path).source
    assert ("but not" in source) == bool(ignored)
    assert f"(but not {ignored}: pictures are resized and cut as the authors do)" in source or (
        not ignored
    )
    assert ("is not that of the tables: pass size=" in source) == bool(asks)
    assert asks in source


# --- what lies beside the model in a file ------------------------------------------------------


def test_a_head_beside_a_backbone_is_named(tmp_path):
    state = random_state(BARE)
    tree = {f"backbone.{key}": x for key, x in as_torch(state).items()}
    tree |= {"fc.weight": torch.ones(3, 8), "fc.bias": torch.ones(3)}
    path = write_pth(tmp_path / "a.pth", tree)
    assert "left out: 'fc.weight', 'fc.bias'" in load(path, BARE).source
    tree |= {f"neck.{i}": torch.ones(1) for i in range(5)} | {"epoch": 3}
    source = load(write_pth(tmp_path / "a.pth", tree), BARE).source
    assert "left out: 'fc.weight', 'fc.bias', 'neck.0' and 4 more" in source
    assert "left out:" not in load(write_pth(tmp_path / "b.pth", as_torch(state)), BARE).source


def test_two_models_of_one_name_are_told_apart_by_nothing(tmp_path):
    first, second = (as_torch(random_state(TINY, seed=seed)) for seed in (0, 1))
    path = write_pth(tmp_path / "a.pth", {"a.b": first, "a": {"b": second}})
    assert refusal(path).count("entry='a.b'") == 2
    message = refusal(path, entry="a.b")
    assert "2 models in it have exactly this name" in message
    assert "torch.save(state[...], new_path)" in message


def test_long_names_can_be_copied(tmp_path):
    first, second = (random_state(TINY, seed=seed) for seed in (0, 1))
    names = [f"{'long' * 40}{x}" for x in "ab"]
    tree = {name: as_torch(state) for name, state in zip(names, (first, second), strict=True)}
    path = write_pth(tmp_path / "a.pth", tree)
    message = refusal(path)
    for name, state in zip(names, (first, second), strict=True):
        assert f"entry='{name}'" in message
        model = load(path, TINY, entry=name)
        assert_same_state(model, state)
        assert f"(under '{name}')" in model.source


# --- numbers that are not read -----------------------------------------------------------------


def write_header(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**40, 0, 2**40], [2**62, 0]])
def test_an_empty_tensor_of_an_impossible_shape(tmp_path, shape):
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    path = write_header(tmp_path / "a.safetensors", header)
    assert "too large for an array" in refusal(path, None)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"])
def test_eight_bits_in_safetensors_are_named(tmp_path, kind):
    header = {"pos_embed1": {"dtype": kind, "shape": [2], "data_offsets": [0, 2]}}
    message = refusal(write_header(tmp_path / "a.safetensors", header, bytes(2)), None)
    assert f"'pos_embed1' has the number type '{kind}', which is unknown" in message
    assert "download" not in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_variant_of_unreadable_numbers_is_named_with_its_dtype(tmp_path, dtype):
    config = dataclasses.replace(VARIANTS["pvt_tiny"], img_size=32, num_classes=5)
    state = {k: torch.zeros(s, dtype=dtype) for k, s in param_shapes(config).items()}
    message = refusal(write_pth(tmp_path / "a.pth", state), None)
    assert f"pos_embed1 is {str(dtype).removeprefix('torch.')}, weights are floats" in message
    assert "pvt_tiny, 5 classes, 32 px, but 161 of its 161 tensors are not of float16" in message
    assert "none of" not in message


def test_a_dict_of_numpy_arrays_gets_advice_that_works(tmp_path):
    state = random_state(TINY)
    for tree in (state, {"model": state, "epoch": 3}):
        message = refusal(write_pth(tmp_path / "a.pth", tree))
        assert "is a NumPy array" in message
        assert (
            "torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, new_path)" in message
        )
        assert "state_dict()" not in message
    fixed = {k: torch.from_numpy(v) for k, v in state.items()}
    assert_same_state(load(write_pth(tmp_path / "b.pth", fixed), TINY), state)


# --- bounds ------------------------------------------------------------------------------------


def test_depths_are_bounded(tmp_path):
    for depths in ((MAX_DEPTH + 1, 2, 2, 2), (2, 2, 2, 10**7)):
        with pytest.raises(ConfigError, match=f"depths is .*; each must be at most {MAX_DEPTH}"):
            PVTConfig(depths=depths)
    deep = PVTConfig(depths=(MAX_DEPTH, 2, 2, 2), drop_path_rate=0.5)
    assert len(deep.of_stage(1).drop_path_rates) == MAX_DEPTH
    assert deep.of_stage(4).drop_path_rates == (0.5 * 1004 / 1005, 0.5)


def test_a_configuration_of_more_blocks_than_tensors(tmp_path, monkeypatch):
    path = write_pth(tmp_path / "a.pth", as_torch(random_state(TINY)))
    built = []
    monkeypatch.setattr(
        "pvt_ref.checkpoint.recognise.foreign_shapes", lambda *args: built.append(args)
    )
    deep = dataclasses.replace(TINY, depths=(MAX_DEPTH, 1, 1, 1))
    assert "has 1003 blocks, but the file only" in refusal(path, deep)
    (tmp_path / "c.json").write_text(json.dumps(config_to_dict(deep)))
    message = refusal(path, tmp_path / "c.json")
    assert f"configuration from {tmp_path / 'c.json'} has 1003 blocks" in message
    assert built == []


def test_a_stage_is_described_once_for_all_its_blocks(monkeypatch):
    asked = []
    of_stage = PVTConfig.of_stage
    monkeypatch.setattr(
        PVTConfig, "of_stage", lambda self, i: (asked.append(i), of_stage(self, i))[1]
    )
    shapes = param_shapes.__wrapped__(dataclasses.replace(TINY, depths=(9, 9, 9, 9)))
    assert "block4.8.mlp.fc2.bias" in shapes
    assert asked == [1, 2, 3, 4]


class TimeIsUpError(Exception):
    """As a handler of SIGALRM raises it: of no kind that a parser would raise."""


@pytest.mark.parametrize(
    ("target", "suffix"),
    [
        ("pvt_ref.checkpoint.safetensors_file.digest", ".safetensors"),
        ("pvt_ref.checkpoint.safetensors_file.ModelInfo.from_dict", ".safetensors"),
        ("zipfile.ZipFile.infolist", ".pth"),
        ("zipfile.ZipFile.read", ".pth"),
        ("pvt_ref.checkpoint.pickles._Machine._make", ".pth"),
    ],
)
def test_what_a_signal_handler_raises_is_not_taken_for_damage(
    tmp_path, monkeypatch, target, suffix
):
    path = tmp_path / f"m{suffix}"
    if suffix == ".pth":
        write_pth(path, as_torch(random_state(TINY)))
    else:
        save(path, dataclasses.replace(make_model(), info=ModelInfo(title="t")))

    def strike(*args, **kwargs):
        raise TimeIsUpError

    monkeypatch.setattr(target, strike)
    with pytest.raises(TimeIsUpError):
        load(path, TINY)


# --- paths and texts ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".th", ".pkl", ".pth.tar"])
def test_weights_of_any_usual_name_are_mentioned(tmp_path, suffix):
    (tmp_path / f"last{suffix}").write_bytes(b"")
    assert f"it has: 'last{suffix}'" in refusal(tmp_path, None)
    message = refusal(tmp_path / f"lost{suffix}", None, MissingFileError)
    assert f"weights files there: 'last{suffix}'" in message


def test_long_paths_are_cut(tmp_path):
    long = "x" * 5000
    for attempt in (
        lambda: pvt_ref.load(long),
        lambda: load(tmp_path / long),
        lambda: pvt_ref.load("a/" * 2500),
        lambda: pvt_ref.load(f"https://{long}"),
        lambda: load(tmp_path, long),
        lambda: save(f"{long}.safetensors", make_model()),
        lambda: save(f"{long}.pth", make_model()),
    ):
        with pytest.raises((CheckpointError, MissingFileError)) as caught:
            attempt()
        assert 100 < len(str(caught.value)) < 1200
    name = "y" * 100
    assert name in refusal(tmp_path / name, None, MissingFileError)


def test_an_empty_path_is_no_folder():
    for attempt in (
        lambda: pvt_ref.load(""),
        lambda: load(""),
        lambda: save("", make_model()),
    ):
        with pytest.raises(CheckpointError, match="the path is empty; it must name a weights file"):
            attempt()


def test_one_key_differs(tmp_path):
    config = dataclasses.replace(VARIANTS["pvt_tiny"], img_size=32, num_classes=5)
    state = {k: torch.zeros(s, dtype=torch.float16) for k, s in param_shapes(config).items()}
    del state["norm.bias"]
    message = refusal(write_pth(tmp_path / "a.pth", state), None)
    assert "but 1 key differs:\n  - missing: norm.bias (512,)" in message


def test_a_refused_config_ends_its_sentence_once(tmp_path):
    hugging_face_folder(tmp_path, num_attention_heads=[3, 3, 3, 3])
    message = refusal(tmp_path, None)
    assert "dataclasses.replace. If it belongs to other weights" in message


# --- what records show of themselves -----------------------------------------------------------


def test_an_info_fits_a_screen():
    classes = tuple(f"class {i}" for i in range(1000))
    bands = Preprocessing("bands", (0.25,) * 200, (0.5,) * 200)
    training = {f"step {i}": [0.1] * 50 for i in range(50)}
    info = ModelInfo(title="t" * 500, classes=classes, preprocessing=bands, training=training)
    assert len(repr(info)) < 600
    assert "classes=('class 0', 'class 1', 'class 2', ... 1000 in all)" in repr(info)
    assert repr(bands) == (
        "Preprocessing(mode='bands', mean=(0.25, 0.25, 0.25, ... 200 in all), "
        "std=(0.5, 0.5, 0.5, ... 200 in all))"
    )
    for short in (Preprocessing(), Preprocessing("L", (0.5,), (0.25,))):
        assert eval(repr(short), {"Preprocessing": Preprocessing}) == short
    evil = ModelInfo(title="\x1b[2J\n", classes=("\x1b[31m\n",))
    assert repr(evil).isprintable()
    assert len(repr(pvt_ref.load("digits").info)) < 600
