"""What people pass to Model and its neighbours by mistake, and first layers for other channels."""

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loose import loose
from PIL import Image
from strategies import normal, random_params, rng_of

import pvt_ref
from pvt_ref import VARIANTS, Model, ModelInfo, Preprocessing, PVTConfig, with_channels
from pvt_ref.errors import ArrayTypeError, ConfigError, RangeError, ShapeError
from pvt_ref.models.architecture import architecture_of, param_shapes
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
PARAMS = random_params(SMALL, 1)
MODEL = Model(PARAMS, SMALL)
UNIT = rng_of(0).random((2, 3, 32, 32))


# Pixels that are no normalised images ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_predict_refuses_floats_that_look_like_pixels(dtype):
    advice = r"numpy\.rint\(255 \* images\).*model\(images\) takes them as they are"
    with pytest.raises(RangeError, match=f"scale of 0 to 1 and not normalised.*{advice}"):
        MODEL.predict(UNIT.astype(dtype))
    with pytest.raises(RangeError, match=r"scale of 0 to 255.*numpy\.rint\(images\)"):
        MODEL.predict((255 * UNIT).astype(dtype))
    MODEL(UNIT.astype(dtype))  # as the message says


def test_the_advice_on_pixels_gives_what_the_pictures_give():
    pictures = [Image.fromarray(rng_of(k).integers(0, 256, (32, 32, 3), np.uint8)) for k in (0, 1)]
    images = np.stack([np.asarray(p) for p in pictures]).transpose(0, 3, 1, 2) / 255
    with pytest.raises(RangeError):
        MODEL.predict(images)
    pixels = np.rint(255 * images).astype("uint8").transpose(0, 2, 3, 1)
    assert MODEL.predict(pixels) == MODEL.predict(pictures)


def test_normalised_floats_are_no_false_alarm():
    dark = MODEL.preprocess(np.zeros((32, 32, 3), np.uint8))
    bright = MODEL.preprocess(np.full((32, 32, 3), 255, np.uint8))  # all between 2.2 and 2.7
    photo = MODEL.preprocess(rng_of(1).integers(0, 256, (32, 32, 3), np.uint8))
    for images in (dark, bright, photo, np.zeros((1, 3, 32, 32)), np.ones((1, 3, 32, 32))):
        MODEL.predict(images)
    # where 0 stands for black, nothing is negative
    plain = ModelInfo(preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1)))
    Model(PARAMS, SMALL, info=plain).predict(UNIT)
    four = with_channels(MODEL, 4)  # whose preprocessing nobody knows
    four.predict(rng_of(0).random((1, 4, 32, 32)))


# Other things that are no images --------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], list], ids=["one", "list", "rows"])
def test_tensors_for_predict_get_the_line_that_converts_them(wrap):
    for call in (MODEL.predict, MODEL.preprocess):
        with pytest.raises(ArrayTypeError, match=r"torch\.Tensor.*x\.detach\(\)\.cpu\(\)\.numpy"):
            call(wrap(torch.zeros(1, 3, 32, 32)))


def test_predict_of_what_has_no_axes_or_too_many():
    for images in (np.array(1.0), np.float64(1), np.zeros((3, 32, 32)), np.zeros((0, 3, 32, 32))):
        with pytest.raises(ShapeError):
            MODEL.predict(images)
    with pytest.raises(ShapeError, match="the list of images is empty"):
        MODEL.predict([])
    with pytest.raises(ArrayTypeError):
        MODEL.predict(5)


def test_predict_in_another_library():
    there = map_arrays(array_api_strict.asarray, MODEL)
    images = normal(2, 70, 3, 32, 32)
    ours, theirs = MODEL.predict(images), there.predict(array_api_strict.asarray(images))
    assert [[a.index for a in row] for row in ours] == [[a.index for a in row] for row in theirs]


def test_a_model_of_parts_of_another_type():
    change: Any
    for change in ({"info": None}, {"info": {"title": "x"}}, {"source": 3}, {"source": None}):
        (name,) = change
        with pytest.raises(ArrayTypeError, match=f"{name} is a .*; it must be a"):
            Model(PARAMS, SMALL, **change)


def test_a_name_for_a_configuration_is_told_how_to_get_one():
    with pytest.raises(ArrayTypeError, match=r"VARIANTS\['pvt_small'\].*\(config, rng\) for init"):
        pvt_ref.init_params("pvt_small", rng_of(0))  # type: ignore[arg-type]


# Moving ---------------------------------------------------------------------------------------


def test_arrays_of_other_kinds_are_not_passed_on_in_silence():
    for move in (pvt_ref.to_numpy, lambda tree: pvt_ref.to_device(tree, "cpu")):
        for tree in (torch.zeros(2), {"a": [torch.zeros(2, requires_grad=True)]}):
            with pytest.raises(ArrayTypeError, match=r"torch\.Tensor.*x\.detach\(\)"):
                move(tree)
        with pytest.raises(ArrayTypeError, match="masked"):
            move((np.ma.masked_array([1.0]),))
        plain = {"name": "x", "count": 3, "none": None, "dtype": np.dtype("f4"), "kind": np.float32}
        assert move(plain) == plain


# Configurations -------------------------------------------------------------------------------


def test_faults_in_a_field_and_between_fields_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        PVTConfig(num_heads=(3, 2, 5, 8), img_size=225, drop_rate=3)
    lines = str(caught.value).splitlines()[1:-1]
    assert len(lines) == 3
    for line, words in zip(lines, ("drop_rate is 3", "num_heads 3", "img_size 225"), strict=True):
        assert words in line
    # what hangs on a wrong field is not asked about
    with pytest.raises(ConfigError) as caught:
        loose(PVTConfig)(
            num_heads="abcd", patch_sizes=None, img_size=225, mlp_ratios=(8, 8, 4, 4.001)
        )
    lines = str(caught.value).splitlines()[1:-1]
    assert [line.split(" is ")[0].strip(" -") for line in lines[:2]] == ["patch_sizes", "num_heads"]
    assert "stage 4" in lines[2]
    assert len(lines) == 3


# Channels -------------------------------------------------------------------------------------


def timm_adapts(weight: np.ndarray, in_chans: int) -> np.ndarray:
    """As timm's adapt_input_conv, written anew with PyTorch."""
    w = torch.tensor(weight)
    if in_chans == 1:
        return w.sum(dim=1, keepdim=True).numpy()
    repeat = math.ceil(in_chans / 3)
    return (w.repeat(1, repeat, 1, 1)[:, :in_chans] * (3 / in_chans)).numpy()


@given(in_chans=st.integers(1, 9))
def test_other_channels_are_adapted_as_timm_does(in_chans):
    adapted = with_channels(MODEL, in_chans)
    assert adapted.config == replace(SMALL, in_chans=in_chans)
    weight = adapted.params.patch_embed1.proj.weight
    np.testing.assert_allclose(
        weight, timm_adapts(PARAMS.patch_embed1.proj.weight, in_chans), rtol=1e-14
    )
    for (key, a), (_, b) in zip(named_arrays(adapted.params), named_arrays(PARAMS), strict=True):
        assert a is b or key == "patch_embed1.proj.weight"


@given(in_chans=st.integers(1, 9), seed=st.integers(0, 100))
def test_a_grey_image_gives_the_same_as_before(in_chans, seed):
    grey = normal(seed, 2, 1, 32, 32)
    before = MODEL(np.repeat(grey, 3, axis=1))
    if in_chans % 3 == 0 or in_chans == 1:
        after = with_channels(MODEL, in_chans)(np.repeat(grey, in_chans, axis=1))
        np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-12)
    # from one channel to any number, and back
    one = with_channels(MODEL, 1)
    many = with_channels(one, in_chans)
    np.testing.assert_allclose(
        many(np.repeat(grey, in_chans, axis=1)), before, rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(with_channels(many, 1)(grey), before, rtol=1e-9, atol=1e-12)


def test_a_model_of_other_channels_says_what_it_is_and_keeps_its_dtype():
    single = Model(random_params(SMALL, 1, np.float32), SMALL, "from somewhere")
    for in_chans in (1, 4):
        adapted = with_channels(single, in_chans)
        assert adapted.params.patch_embed1.proj.weight.dtype == np.float32
        assert "from somewhere; first layer adapted from 3 channels" in adapted.source
    assert with_channels(single, 3) is single
    there = map_arrays(array_api_strict.asarray, single)
    for in_chans in (1, 4):
        np.testing.assert_array_equal(
            np.asarray(with_channels(there, in_chans).params.patch_embed1.proj.weight),
            with_channels(single, in_chans).params.patch_embed1.proj.weight,
        )


def test_the_preprocessing_of_other_channels():
    grey = with_channels(MODEL, 1)
    assert grey.info.preprocessing.mode == "L"
    assert grey.info.preprocessing.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert len(grey.predict(Image.new("L", (40, 40), 7))) == 1
    back = with_channels(grey, 3)
    assert back.info.preprocessing.mode == "RGB"
    assert len(set(back.info.preprocessing.std)) == 1
    four = with_channels(MODEL, 4)
    with pytest.raises(ConfigError, match="in_chans=4, but its preprocessing makes 3"):
        four.predict(Image.new("RGB", (40, 40)))
    assert four(normal(0, 1, 4, 32, 32)).shape == (1, 5)
    assert four.info.classes == MODEL.info.classes
    for wrong in (0, -1, 1.5, "4", None, True):
        with pytest.raises(ConfigError, match="in_chans is"):
            with_channels(MODEL, wrong)  # type: ignore[arg-type]
    with pytest.raises(ArrayTypeError, match="model is a PVTParams"):
        with_channels(PARAMS, 1)  # type: ignore[arg-type]


# Made once ------------------------------------------------------------------------------------


def test_weights_are_checked_when_a_model_is_made_and_not_when_it_is_called(monkeypatch):
    images = normal(0, 1, 3, 32, 32)
    wanted = MODEL(images), MODEL.pyramid(images)

    def refuse(*_):
        raise AssertionError("checked again")

    model = Model(PARAMS, SMALL)
    monkeypatch.setattr("pvt_ref.api.check_params", refuse)
    np.testing.assert_array_equal(model(images), wanted[0])
    for ours, theirs in zip(model.pyramid(images), wanted[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), replace]
)
def test_a_model_that_was_called_can_be_copied(copied):
    images = normal(0, 1, 3, 32, 32)
    model = Model(PARAMS, SMALL, "from somewhere", ModelInfo(title="small"))
    wanted = model(images)
    again = copied(model)
    np.testing.assert_array_equal(again(images), wanted)
    assert (again.source, again.info, again.config) == (model.source, model.info, SMALL)
    other = replace(model, params=map_arrays(lambda x: 2 * x, PARAMS))
    assert not np.array_equal(other(images), wanted)


def test_weights_that_are_written_to_are_seen_by_the_next_call():
    params = random_params(SMALL, 1)
    model, images = Model(params, SMALL), normal(0, 1, 3, 32, 32)
    before = model(images)
    for _, x in named_arrays(params):
        x *= 2
    np.testing.assert_array_equal(model(images), pvt_ref.forward(params, images, SMALL))
    assert not np.array_equal(model(images), before)


# What a network says of itself ----------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, num_classes=0, patch_sizes=(2, 2, 1, 2))])
def test_feature_info_describes_the_maps(config):
    model = Model(random_params(config, 0), config)
    maps = model.pyramid(normal(0, 1, 3, 64, 128))
    assert [info["num_chs"] for info in model.feature_info] == [m.shape[1] for m in maps]
    assert [info["reduction"] for info in model.feature_info] == [64 // m.shape[2] for m in maps]


def with_row(monkeypatch, **changes):
    """A PVT whose row in the table of networks is another."""
    row = replace(architecture_of(SMALL), **changes)
    monkeypatch.setattr("pvt_ref.app.architecture_of", lambda config: row)


def test_a_network_without_what_is_asked_for(monkeypatch):
    with_row(monkeypatch, forward_pyramid=None)
    assert MODEL.feature_info == []
    with_row(monkeypatch, stem=None)
    with pytest.raises(ConfigError, match="a PVT has no first layer to adapt"):
        with_channels(MODEL, 1)


def test_the_row_names_the_head_and_the_first_weight():
    row = architecture_of(SMALL)
    shapes = param_shapes(SMALL)
    assert shapes[row.stem or ""][1] == SMALL.in_chans
    changed = {k for k, s in param_shapes(replace(SMALL, in_chans=4)).items() if s != shapes[k]}
    assert changed == {row.stem}
    changed = {k for k, s in param_shapes(replace(SMALL, num_classes=6)).items() if s != shapes[k]}
    assert changed == {k for k in shapes if k.startswith(f"{row.head}.")}
