"""Whatever a caller gets wrong is told in one message: what came, what is needed, why, the fix.

Every error is of this project's own kind and of a built-in one, ValueError or TypeError. What
concerns files stands in test_checkpoint.py, what concerns pictures in test_image.py.
"""

import contextlib
import copy
import math
import sys
import types
from dataclasses import replace
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
import torch
from loose import loose
from PIL import Image
from strategies import normal, random_params, rng_of

import pvt_ref
from pvt_ref import (
    VARIANTS,
    VITS,
    Model,
    Operation,
    Ops,
    PVTConfig,
    PVTError,
    PVTv2Config,
    ViTConfig,
    count_cost,
    cross_entropy,
)
from pvt_ref.data.info import Preprocessing
from pvt_ref.errors import (
    ArrayTypeError,
    CheckpointError,
    ConfigError,
    DeviceError,
    NonFiniteError,
    RangeError,
    ShapeError,
)
from pvt_ref.report.times import time_stages
from pvt_ref.train import LabelledImages, evaluate
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
PARAMS = random_params(SMALL, 1)
BARE_PARAMS = random_params(BARE, 1)
IMAGES = normal(1, 2, 3, 32, 32)


@contextlib.contextmanager
def refused(error, *words: str):
    """The body raises this very error of ours, and its message holds all the words."""
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    assert issubclass(error, PVTError)
    assert issubclass(error, TypeError if error is ArrayTypeError else ValueError)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in the message:\n{message}"


def run_everything_on(images):
    """Each public function that takes images, as a call without arguments."""
    model = Model(PARAMS, SMALL)
    yield lambda: pvt_ref.forward(PARAMS, images, SMALL)
    yield lambda: pvt_ref.forward_with_cache(PARAMS, images, SMALL)
    yield lambda: pvt_ref.forward_pyramid(PARAMS, images, SMALL)
    yield lambda: pvt_ref.forward_pyramid_with_cache(PARAMS, images, SMALL)
    yield lambda: pvt_ref.attention_maps(PARAMS, images, SMALL)
    yield lambda: model(images)
    yield lambda: model.pyramid(images)


def images_are_refused(images, error, *words: str) -> None:
    for call in run_everything_on(images):
        with refused(error, *words):
            call()


def with_one_value(x: np.ndarray, value: float) -> np.ndarray:
    x = x.copy()
    x.reshape(-1)[7] = value
    return x


# Images ---------------------------------------------------------------------------------------


def test_a_good_image_passes_everywhere():  # or the refusals below would show nothing
    for call in run_everything_on(IMAGES):
        call()


def test_single_image_lacks_the_batch_axis():
    images_are_refused(
        IMAGES[0],
        ShapeError,
        "rank 3",
        "(3, 32, 32)",
        "(B, 3, H, W)",
        "A single image needs a batch axis: images[None]",
    )


@pytest.mark.parametrize("shape", [(), (32,), (32, 32), (1, 2, 3, 32, 32)])
def test_wrong_rank(shape):
    images_are_refused(
        np.zeros(shape), ShapeError, f"rank {len(shape)}", str(shape), "(B, 3, H, W)"
    )
    with pytest.raises(ShapeError) as caught:
        pvt_ref.forward(PARAMS, np.zeros(shape), SMALL)
    assert "single image" not in str(caught.value)


def test_channels_last_image():
    images_are_refused(
        np.zeros((8, 224, 224, 3), np.float32),
        ShapeError,
        "look channels-last: (8, 224, 224, 3); they must be (B, 3, H, W)",
        "images.transpose(0, 3, 1, 2)",
    )
    turned = np.zeros((1, 32, 32, 3)).transpose(0, 3, 1, 2)
    assert pvt_ref.forward(PARAMS, turned, SMALL).shape == (1, 5)  # the advice works


@pytest.mark.parametrize("channels", [1, 4])
def test_wrong_channel_count(channels):
    shape = (2, channels, 32, 32)
    images_are_refused(
        np.zeros(shape), ShapeError, f"{channels} channels", str(shape), "in_chans=3"
    )


@pytest.mark.parametrize("dtype", ["uint8", "int64", "uint16", "bool"])
def test_raw_pixels(dtype):
    words = (f"dtype {dtype}", "raw pixels", "normalised floats", "pvt_ref.load_image(path)")
    images_are_refused(np.zeros((2, 3, 32, 32), dtype), ArrayTypeError, *words)
    images_are_refused(
        np.zeros((2, 32, 32, 3), dtype), ArrayTypeError, *words, "pvt_ref.normalize(pixels)"
    )


def test_object_dtype():
    images = np.zeros((2, 3, 32, 32), object)
    for call in list(run_everything_on(images))[:5]:  # for Model see below
        with refused(ArrayTypeError, "dtype object", "float32 or float64", "different shapes"):
            call()


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_dtype(dtype):
    images_are_refused(
        IMAGES.astype(dtype), ArrayTypeError, f"dtype {dtype}", "must be float32 or float64"
    )


@pytest.mark.parametrize("dtype", ["U1", "M8[s]", "S3"])
def test_text_and_dates(dtype):
    with refused(ArrayTypeError, "dtype", "must be float32 or float64"):
        pvt_ref.forward(PARAMS, np.zeros((2, 3, 32, 32), dtype), SMALL)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.longdouble])
def test_images_of_other_float_dtypes_are_cast_and_get_gradients_of_the_weights(dtype):
    images = IMAGES.astype(dtype)
    logits, cache = pvt_ref.forward_with_cache(PARAMS, images, SMALL)
    expected = pvt_ref.forward(PARAMS, images.astype(np.float64), SMALL)
    np.testing.assert_array_equal(logits, expected)
    # larger than float16 can hold: in the images' own dtype they would be infinite
    _, dimages = pvt_ref.backward(PARAMS, cache, 1e6 * logits, SMALL)
    assert dimages.dtype == np.float64
    assert np.abs(dimages).max() > 65504
    assert np.isfinite(dimages).all()
    maps, cache = pvt_ref.forward_pyramid_with_cache(PARAMS, images, SMALL)
    _, dimages = pvt_ref.backward_pyramid(PARAMS, cache, [1e6 * x for x in maps], SMALL)
    assert dimages.dtype == np.float64
    assert np.abs(dimages).max() > 65504


def test_foreign_byte_order():
    with refused(ArrayTypeError, "dtype >f8" if sys.byteorder == "little" else "dtype <f8"):
        pvt_ref.forward(PARAMS, IMAGES.astype(IMAGES.dtype.newbyteorder()), SMALL)


def test_empty_batch():
    images_are_refused(IMAGES[:0], ShapeError, "the batch is empty", "(0, 3, 32, 32)", "at least 1")


@pytest.mark.parametrize(
    ("size", "resize", "pad"),
    [
        ((50, 40), "64x32", "64x64"),
        ((33, 64), "32x64", "64x64"),
        ((224, 100), "224x96", "224x128"),
        ((1, 32), "32x32", "32x32"),
        ((0, 32), "32x32", "32x32"),
    ],
)
def test_size_is_not_a_multiple(size, resize, pad):
    images_are_refused(
        np.zeros((1, 3, *size)),
        ShapeError,
        f"{size[0]}x{size[1]}",
        "multiples of 32",
        f"Resize to {resize}",
        f"pad to {pad} with pvt_ref.pad_to_multiple(images, 32)",
    )
    if 0 not in size:  # the advice works
        padded = pvt_ref.pad_to_multiple(np.zeros((1, 3, *size)), 32)
        assert f"{padded.shape[2]}x{padded.shape[3]}" == pad
        SMALL.grids(*padded.shape[2:])


def test_size_names_the_multiple_of_its_own_configuration():
    config = replace(SMALL, img_size=64, sr_ratios=(16, 4, 2, 1))
    with refused(ShapeError, "96x64", "multiples of 64", "(16, 4, 2, 1)", "128x64"):
        pvt_ref.forward(random_params(config, 0), np.zeros((1, 3, 96, 64)), config)


@pytest.mark.parametrize(
    ("images", "name"),
    [
        ([IMAGES[0], IMAGES[1]], "list"),
        (None, "NoneType"),
        (Image.new("RGB", (32, 32)), "PIL.Image"),
        ([Image.new("RGB", (32, 32))], "list"),
        ("photo.jpg", "str"),
        (7, "int"),
        ({"images": IMAGES}, "dict"),
    ],
)
def test_not_an_array(images, name):
    images_are_refused(
        images,
        ArrayTypeError,
        f"images are a {name}",
        "one array (B, 3, H, W) of floats",
        "numpy.stack",
        "pvt_ref.load_image(path)",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_torch_tensor_as_images(dtype, requires_grad):
    images = torch.zeros(2, 3, 32, 32, dtype=dtype, requires_grad=requires_grad)
    images_are_refused(images, ArrayTypeError, "images are a torch.Tensor", "(B, 3, H, W)")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_model_refuses_images_that_are_not_finite(value):
    model = Model(PARAMS, SMALL)
    for call in (model, model.pyramid):
        with refused(
            NonFiniteError,
            "images holds 1 values of 6144",
            "NaN or infinite",
            "(0, 0, 0, 7)",
            "preprocessing",
        ):
            call(with_one_value(IMAGES, value))


def test_functions_let_nan_through_since_looking_costs_a_pass():
    # only Model looks; a function passes NaN on into the result, where it is seen
    assert np.isnan(pvt_ref.forward(PARAMS, with_one_value(IMAGES, math.nan), SMALL)).any()


# Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_model_refuses_weights_that_are_not_finite(value, dtype):
    params = random_params(SMALL, 1, dtype)
    params = replace(params, pos_embed2=with_one_value(params.pos_embed2, value))
    with refused(
        NonFiniteError,
        "pos_embed2 holds 1 values of 128",
        "NaN or infinite",
        "(0, 0, 7)",
        "damaged",
        "diverged",
    ):
        Model(params, SMALL)


def everything_with_params(params, config=SMALL):
    logits, cache = pvt_ref.forward_with_cache(PARAMS, IMAGES, SMALL)
    maps, pyramid_cache = pvt_ref.forward_pyramid_with_cache(PARAMS, IMAGES, SMALL)
    yield lambda: pvt_ref.forward(params, IMAGES, config)
    yield lambda: pvt_ref.forward_with_cache(params, IMAGES, config)
    yield lambda: pvt_ref.backward(params, cache, logits, config)
    yield lambda: pvt_ref.forward_pyramid(params, IMAGES, config)
    yield lambda: pvt_ref.forward_pyramid_with_cache(params, IMAGES, config)
    yield lambda: pvt_ref.backward_pyramid(params, pyramid_cache, maps, config)
    yield lambda: pvt_ref.attention_maps(params, IMAGES, config)
    yield lambda: Model(params, config)


def params_are_refused(params, config, error, *words: str) -> None:
    for call in everything_with_params(params, config):
        with refused(error, *words):
            call()


def test_good_params_pass_everywhere():
    for call in everything_with_params(PARAMS):
        call()


@pytest.mark.parametrize(
    ("change", "count", "words"),
    [
        ({"num_classes": 7}, 2, ["head.bias", "(5,)", "(7,)"]),
        ({"img_size": 64}, 4, ["pos_embed1", "(1, 64, 4)", "(1, 256, 4)"]),
        ({"depths": (1, 1, 1, 2)}, 14, ["block4.1", "absent"]),
        ({"qkv_bias": False}, 8, ["attn.kv.bias", "should be absent"]),
        ({"num_classes": 0}, 6, ["cls_token", "(1, 1, 8)", "should be absent"]),
    ],
)
def test_params_of_another_configuration(change, count, words):
    calls = everything_with_params(PARAMS, replace(SMALL, **change))
    for call in list(calls)[3:] if "num_classes" in change else calls:  # see the bare backbone
        with refused(
            ShapeError,
            "params do not belong to this config",
            f"{count} arrays differ",
            *words,
            "Pass the config that params were made with",
        ):
            call()


def test_params_that_lack_a_record():
    for lacking in (replace(PARAMS, norm=None), replace(PARAMS, block2=None)):
        params_are_refused(lacking, SMALL, ShapeError, "arrays differ", "is absent and should be (")


def test_params_that_mix_dtypes():
    norm = map_arrays(lambda x: x.astype(np.float32), PARAMS.norm)
    params_are_refused(
        replace(PARAMS, norm=norm),
        SMALL,
        ArrayTypeError,
        "numpy float64 (pos_embed1)",
        "numpy float32 (norm.weight)",
        "one dtype",
        "from_state_dict(to_state_dict(params), config)",
    )
    mended = pvt_ref.from_state_dict(pvt_ref.to_state_dict(replace(PARAMS, norm=norm)), SMALL)
    pvt_ref.forward(mended, IMAGES, SMALL)  # the advice works


@pytest.mark.parametrize("dtype", ["float16", "int64", "complex128", "object"])
def test_params_of_another_dtype(dtype):
    params = map_arrays(lambda x: x.astype(dtype), PARAMS)
    params_are_refused(
        params, SMALL, ArrayTypeError, f"pos_embed1 has dtype {dtype}", "float32 or float64"
    )


@pytest.mark.parametrize(
    "params", [None, {}, IMAGES, Model(PARAMS, SMALL), pvt_ref.to_state_dict(PARAMS)]
)
def test_params_of_another_type(params):
    params_are_refused(
        params, SMALL, ArrayTypeError, type(params).__name__, "PVTParams", "init_params"
    )


@pytest.mark.parametrize("config", ["pvt_tiny", None, {}, 3])
def test_config_of_another_type(config):
    params_are_refused(
        PARAMS,
        config,
        ArrayTypeError,
        f"config is a {type(config).__name__}",
        "PVTConfig",
        "(params, images, config)",
    )


# State dicts ----------------------------------------------------------------------------------


def test_missing_unexpected_and_mis_shaped_keys_are_listed_together():
    state = pvt_ref.to_state_dict(PARAMS)
    del state["norm.bias"], state["block1.0.attn.q.weight"]
    state["fc_norm.weight"] = np.ones((2, 3))
    state["head.weight"] = np.ones((9, 8))
    state["pos_embed1"] = np.ones((1, 5, 4))
    with refused(
        CheckpointError,
        "5 differences; it has 93 keys",
        "missing: block1.0.attn.q.weight (4, 4)",
        "missing: norm.bias (8,)",
        "unexpected: fc_norm.weight (2, 3)",
        "mis-shaped: head.weight is (9, 8), the configuration needs (5, 8)",
        "mis-shaped: pos_embed1 is (1, 5, 4), the configuration needs (1, 64, 4)",
        "dataclasses.replace(config",
    ):
        pvt_ref.from_state_dict(state, SMALL)


def test_an_empty_state_lists_every_key():
    with pytest.raises(CheckpointError) as caught:
        pvt_ref.from_state_dict({}, SMALL)
    for key in pvt_ref.to_state_dict(PARAMS):
        assert f"missing: {key} " in str(caught.value)


@pytest.mark.parametrize("state", [None, [], "model.pth", PARAMS, 3])
def test_state_is_not_a_mapping(state):
    with refused(
        ArrayTypeError, f"state is a {type(state).__name__}", "map key names", "pvt_ref.load(path)"
    ):
        pvt_ref.from_state_dict(state, SMALL)


@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (torch.tensor, "torch.Tensor"),
        (np.ndarray.tolist, "builtins.list"),
        (lambda x: None, "builtins.NoneType"),
    ],
)
def test_state_values_are_not_arrays(convert, name):
    state = pvt_ref.to_state_dict(PARAMS)
    state["norm.weight"] = convert(state["norm.weight"])
    with refused(
        ArrayTypeError, "state['norm.weight']", name, "array", "tensor.detach().cpu().numpy()"
    ):
        pvt_ref.from_state_dict(state, SMALL)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "object", "complex64", "U1"])
def test_state_values_are_not_floats(dtype):
    state = pvt_ref.to_state_dict(PARAMS)
    state["head.bias"] = np.ones(5, dtype)
    with refused(
        ArrayTypeError, "1 of 93", "head.bias", str(state["head.bias"].dtype), "x.astype('float32')"
    ):
        pvt_ref.from_state_dict(state, SMALL)
    everything = {key: x.astype(int) for key, x in pvt_ref.to_state_dict(PARAMS).items()}
    with refused(ArrayTypeError, "93 of 93", "pos_embed1", "int64"):
        pvt_ref.from_state_dict(everything, SMALL)


# Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_heads": (3, 2, 1, 2)},
            ["stage 1", "num_heads 3 does not divide embed_dims 4", "same width"],
        ),
        (
            {"sr_ratios": (8, 4, 2, 2), "img_size": 64},
            ["sr_ratios[3] is 2 in a classifier", "cls token", "Use 1", "num_classes=0"],
        ),
        ({"img_size": 40}, ["img_size 40 is not a multiple of 32", "(4, 2, 2, 2)", "no pixel"]),
        ({"mlp_ratios": (1.3, 1, 1, 1)}, ["stage 1", "4 times mlp_ratios 1.3 is 5.2", "whole"]),
        ({"depths": (1, 1, 1)}, ["depths is (1, 1, 1)", "four whole numbers, one per stage"]),
        ({"depths": (1, 1, 1, 1, 1)}, ["depths is (1, 1, 1, 1, 1)", "four whole numbers"]),
        ({"depths": 2}, ["depths is 2", "four whole numbers, one per stage"]),
        ({"embed_dims": "4848"}, ["embed_dims is '4848'", "four whole numbers"]),
        ({"embed_dims": None}, ["embed_dims is None", "four whole numbers"]),
        ({"mlp_ratios": [1, 1]}, ["mlp_ratios is [1, 1]", "four numbers, one per stage"]),
        ({"depths": (1, 1, 1, 0)}, ["depths is (1, 1, 1, 0)", "positive whole number"]),
        ({"depths": (1, 1, 1, -1)}, ["depths is (1, 1, 1, -1)", "positive whole number"]),
        ({"depths": (1, 1, 1, True)}, ["depths is (1, 1, 1, True)", "positive whole number"]),
        ({"num_heads": (1, 2, 1.0, 2)}, ["num_heads is (1, 2, 1.0, 2)", "whole number"]),
        ({"patch_sizes": ("4", 2, 2, 2)}, ["patch_sizes is ('4', 2, 2, 2)", "whole number"]),
        ({"mlp_ratios": (math.nan, 1, 1, 1)}, ["mlp_ratios is (nan,", "positive number"]),
        ({"mlp_ratios": (math.inf, 1, 1, 1)}, ["mlp_ratios is (inf,", "positive number"]),
        ({"mlp_ratios": (-1, 1, 1, 1)}, ["mlp_ratios is (-1,", "positive number"]),
        ({"img_size": "32"}, ["img_size is '32'", "whole number, 1 or more"]),
        ({"img_size": (32, 32)}, ["img_size is (32, 32)", "whole number, 1 or more"]),
        ({"img_size": 0}, ["img_size is 0", "whole number, 1 or more"]),
        ({"img_size": math.nan}, ["img_size is nan", "whole number, 1 or more"]),
        ({"in_chans": -3}, ["in_chans is -3", "whole number, 1 or more"]),
        ({"in_chans": True}, ["in_chans is True", "whole number, 1 or more"]),
        ({"num_classes": -1}, ["num_classes is -1", "whole number, 0 or more"]),
        ({"num_classes": 10.0}, ["num_classes is 10.0", "whole number, 0 or more"]),
        ({"drop_rate": 1.0}, ["drop_rate is 1.0", "[0, 1)"]),
        ({"drop_rate": -0.1}, ["drop_rate is -0.1", "[0, 1)"]),
        ({"attn_drop_rate": math.nan}, ["attn_drop_rate is nan", "[0, 1)"]),
        ({"drop_path_rate": "0.1"}, ["drop_path_rate is '0.1'", "[0, 1)"]),
        ({"drop_path_rate": False}, ["drop_path_rate is False", "[0, 1)"]),
        ({"norm_eps": -1e-6}, ["norm_eps is -1e-06", "finite number, 0 or more"]),
        ({"norm_eps": math.inf}, ["norm_eps is inf", "finite number, 0 or more"]),
        ({"projection_norm_eps": None}, ["projection_norm_eps is None", "finite number"]),
        ({"projection_norm_eps": math.nan}, ["projection_norm_eps is nan", "finite number"]),
        ({"qkv_bias": 1}, ["qkv_bias is 1", "True or False"]),
        ({"qk_scale": math.nan}, ["qk_scale is nan", "None (for 1/sqrt(d)) or finite"]),
        ({"qk_scale": "none"}, ["qk_scale is 'none'", "None (for 1/sqrt(d)) or finite"]),
    ],
    ids=str,
)
def test_configuration_that_cannot_be_built(change, words):
    with refused(ConfigError, "this PVT cannot be built", "dataclasses.replace", *words):
        replace(SMALL, **change)
    with pytest.raises(ConfigError) as caught:
        replace(SMALL, **change)
    assert str(caught.value).count("\n  - ") == 1  # nothing else is wrong with it


def test_all_problems_of_a_configuration_are_listed():
    with refused(
        ConfigError,
        "embed_dims is (8, 8, 8)",
        "num_heads is (0, 1, 1, 1)",
        "mlp_ratios is (1, nan, 1, 1)",
        "img_size is -1",
        "drop_rate is 3",
        "norm_eps is '1e-6'",
        "qkv_bias is 'yes'",
        "qk_scale is inf",
    ):
        replace(
            SMALL,
            embed_dims=(8, 8, 8),
            num_heads=(0, 1, 1, 1),
            mlp_ratios=(1, math.nan, 1, 1),
            img_size=-1,
            drop_rate=3,
            norm_eps="1e-6",
            qkv_bias="yes",
            qk_scale=math.inf,
        )
    with refused(  # and so are those between fields
        ConfigError,
        "stage 1: num_heads 3",
        "stage 4: num_heads 3",
        "stage 2: embed_dims 8 times mlp_ratios 1.3",
        "sr_ratios[3] is 2",
        "img_size 33 is not a multiple of 64",
    ):
        replace(
            SMALL,
            num_heads=(3, 2, 1, 3),
            mlp_ratios=(1, 1.3, 1, 1),
            sr_ratios=(8, 4, 2, 2),
            img_size=33,
        )


def test_what_looks_wrong_in_a_configuration_and_is_not():
    replace(BARE, sr_ratios=(8, 4, 2, 2), img_size=64)  # a backbone may reduce in stage 4
    config = loose(PVTConfig)(
        img_size=np.int64(64),
        depths=[np.int32(1), 1, 1, 1],
        mlp_ratios=(1.5, 8, 4.0, 4),
        qk_scale=0,
        norm_eps=0,
        drop_rate=np.float32(0.25),
    )
    assert config.of_stage(1).scale == 0.0
    assert config.of_stage(1).hidden_dim == 96


# Generators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", [0, 1.5, "seed", np.random.RandomState(0), np.random])
def test_rng_is_not_a_generator(rng):
    model = Model(PARAMS, SMALL)
    for call in (
        lambda: pvt_ref.init_params(SMALL, rng),
        lambda: pvt_ref.forward_with_cache(PARAMS, IMAGES, SMALL, rng),
        lambda: pvt_ref.forward_pyramid_with_cache(PARAMS, IMAGES, SMALL, rng),
        lambda: pvt_ref.with_new_head(model, 3, rng),
    ):
        with refused(
            ArrayTypeError,
            f"rng is {type(rng).__name__}",
            "NumPy generator",
            "numpy.random.default_rng(0)",
        ):
            call()


def test_no_rng_is_refused_where_weights_are_drawn():
    for call in (
        lambda: pvt_ref.init_params(SMALL, loose(None)),
        lambda: pvt_ref.with_new_head(Model(PARAMS, SMALL), 3, loose(None)),
    ):
        with refused(ArrayTypeError, "rng is NoneType", "numpy.random.default_rng(0)"):
            call()


@pytest.mark.parametrize("dtype", [np.float16, int, object, np.complex64, "S4"])
def test_init_params_of_another_dtype(dtype):
    with refused(ArrayTypeError, f"dtype is {np.dtype(dtype).name}", "float32 or float64"):
        pvt_ref.init_params(SMALL, rng_of(0), dtype)


# Cotangents and caches ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classified():
    return pvt_ref.forward_with_cache(PARAMS, IMAGES, SMALL)


@pytest.fixture(scope="module")
def pyramid():
    return pvt_ref.forward_pyramid_with_cache(PARAMS, IMAGES, SMALL)


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (2, 5, 1), (5,), ()])
def test_dlogits_of_another_shape(classified, shape):
    _, cache = classified
    with refused(ShapeError, f"dlogits has shape {shape}", "the forward returned (2, 5)"):
        pvt_ref.backward(PARAMS, cache, np.ones(shape), SMALL)


@pytest.mark.parametrize("dtype", ["int64", "float16", "complex128", "object", "bool"])
def test_dlogits_of_another_dtype(classified, dtype):
    _, cache = classified
    with refused(ArrayTypeError, f"dlogits has dtype {dtype}", "float32 or float64", "astype"):
        pvt_ref.backward(PARAMS, cache, np.ones((2, 5), dtype), SMALL)


@pytest.mark.parametrize("dlogits", [None, [[1.0] * 5] * 2, 1.0, torch.ones(2, 5)])
def test_dlogits_of_another_type(classified, dlogits):
    _, cache = classified
    with refused(ArrayTypeError, "dlogits is a ", type(dlogits).__name__, "an array (2, 5)"):
        pvt_ref.backward(PARAMS, cache, dlogits, SMALL)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_wrong_count_of_dmaps(pyramid, count):
    maps, cache = pyramid
    with refused(ShapeError, "a list of 4 arrays", "dL/dF_1 to dL/dF_4", f"got {count}"):
        pvt_ref.backward_pyramid(PARAMS, cache, (maps * 2)[:count], SMALL)


@pytest.mark.parametrize("dmaps", [None, 3, np.ones((4, 2, 4, 8, 8)), {0: None}])
def test_dmaps_are_not_a_list(pyramid, dmaps):
    _, cache = pyramid
    with refused(ShapeError, "a list of 4 arrays", "None where", type(dmaps).__name__):
        pvt_ref.backward_pyramid(PARAMS, cache, dmaps, SMALL)


def test_one_of_the_dmaps_is_wrong(pyramid):
    maps, cache = pyramid
    for i in range(4):

        def backward(dmap, i=i):
            dmaps = [*maps[:i], dmap, *maps[i + 1 :]]
            return pvt_ref.backward_pyramid(PARAMS, cache, dmaps, SMALL)

        shape = maps[i].shape
        other = (*shape[:-1], 9)
        with refused(ShapeError, f"dmaps[{i}] has shape {other}", f"returned {shape}"):
            backward(np.ones(other))
        with refused(ArrayTypeError, f"dmaps[{i}] has dtype int64", "float32 or float64"):
            backward(np.ones(shape, int))
        with refused(ArrayTypeError, f"dmaps[{i}] is a list", f"an array {shape}"):
            backward(maps[i].tolist())
        with refused(ArrayTypeError, f"dmaps[{i}] is a torch.Tensor", f"an array {shape}"):
            backward(torch.ones(shape))


def test_none_among_the_dmaps_means_zeros(pyramid):
    maps, cache = pyramid
    for used in ((), (0,), (3,), (1, 2), (0, 1, 2, 3)):
        dmaps = [x if i in used else None for i, x in enumerate(maps)]
        zeros = [x if i in used else np.zeros_like(x) for i, x in enumerate(maps)]
        grads, dimages = pvt_ref.backward_pyramid(PARAMS, cache, dmaps, SMALL)
        expected, dexpected = pvt_ref.backward_pyramid(PARAMS, cache, zeros, SMALL)
        np.testing.assert_array_equal(dimages, dexpected)
        assert bool(np.any(dimages)) == bool(used)
        for key, g in pvt_ref.to_state_dict(grads).items():
            np.testing.assert_array_equal(g, pvt_ref.to_state_dict(expected)[key], err_msg=key)
            if not used:
                assert not np.any(g), key


def test_a_cache_of_the_other_kind(classified, pyramid):
    (logits, cache), (maps, pyramid_cache) = classified, pyramid
    with refused(
        ArrayTypeError,
        "that of forward_pyramid_with_cache",
        "that forward_with_cache returned",
        "forward_with_cache",
    ):
        pvt_ref.backward(PARAMS, pyramid_cache, logits, SMALL)
    with refused(
        ArrayTypeError,
        "that of forward_with_cache",
        "needs the ForwardCache",
        "forward_pyramid_with_cache",
    ):
        pvt_ref.backward_pyramid(PARAMS, cache, maps, SMALL)
    with refused(ArrayTypeError, "a NoneType", "needs the ForwardCache"):
        pvt_ref.backward(PARAMS, loose(None), logits, SMALL)


def test_a_cache_made_with_other_operations(classified, pyramid):
    (logits, cache), (maps, pyramid_cache) = classified, pyramid
    other = Ops(name="faster")
    made = f"made with ops '{cache.ops.name}'"
    words = (made, "'faster'", "only the table that made a cache", "Leave ops out")
    with refused(ArrayTypeError, *words):
        pvt_ref.backward(PARAMS, cache, logits, SMALL, ops=other)
    with refused(ArrayTypeError, *words):
        pvt_ref.backward_pyramid(PARAMS, pyramid_cache, maps, SMALL, ops=other)
    pvt_ref.backward(PARAMS, cache, logits, SMALL, ops=cache.ops)
    # a cache of the other operations is read by them without asking
    _, faster = pvt_ref.forward_with_cache(PARAMS, IMAGES, SMALL, ops=other)
    pvt_ref.backward(PARAMS, faster, logits, SMALL)


# Attention maps -------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [[0], [5], [1, 5], [-1], ["1"], "12", 3, None, [1.5]])
def test_attention_maps_of_stages_out_of_range(stages):
    with refused(RangeError, f"stages are {stages!r}", "from 1 to 4", "[1, 4]"):
        pvt_ref.attention_maps(PARAMS, IMAGES, SMALL, stages)


def test_attention_maps_of_any_collection_of_stages():
    for stages in ([4, 1], (1, 4), {1, 4}, np.array([1, 4])):
        found = pvt_ref.attention_maps(PARAMS, IMAGES, SMALL, stages)
        assert list(found) == [(1, 0), (4, 0)]
    assert pvt_ref.attention_maps(PARAMS, IMAGES, SMALL, []) == {}


# Cross-entropy --------------------------------------------------------------------------------

LOGITS = normal(2, 3, 4)
LABELS = np.array([0, 3, 1])


@pytest.mark.parametrize(
    ("labels", "low", "high"), [([0, 1, 4], 0, 4), ([-1, 0, 3], -1, 3), ([1, 2, 4], 1, 4)]
)
def test_labels_out_of_range(labels, low, high):
    with refused(
        RangeError,
        f"labels run from {low} to {high}",
        "classes 0 to 3",
        "one-based",
        "num_classes of another data set",
    ):
        cross_entropy(LOGITS, np.array(labels))


def test_labels_beyond_a_signed_integer():
    with refused(RangeError, f"to {2**64 - 1}", "classes 0 to 3"):
        cross_entropy(LOGITS, np.array([2**64 - 1, 0, 0], np.uint64))


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1, 3), (3, 4), ()])
def test_labels_of_another_shape(shape):
    with refused(
        ShapeError, f"targets have shape {shape}", "(3, 4)", "must be (3,)", "one label a sample"
    ):
        cross_entropy(LOGITS, np.zeros(shape, int))


@pytest.mark.parametrize("shape", [(3,), (3, 3), (4, 3), (3, 4, 1)])
def test_soft_targets_of_another_shape(shape):
    with refused(ShapeError, f"soft targets have shape {shape}", "(3, 4)", "a distribution a row"):
        cross_entropy(LOGITS, np.ones(shape))


@pytest.mark.parametrize("targets", [[0, 3, 1], (0, 3, 1), None, 1, torch.tensor([0, 3, 1])])
def test_targets_are_not_an_array(targets):
    with refused(
        ArrayTypeError,
        f"targets are a {type(targets).__name__}",
        "(B,) integer labels or (B, K) floats",
        "numpy.asarray(targets)",
    ):
        cross_entropy(LOGITS, targets)


@pytest.mark.parametrize("dtype", ["bool", "complex128", "object", "U1"])
def test_targets_of_another_dtype(dtype):
    with refused(ArrayTypeError, "targets have dtype", "integer labels (B,) or floats (B, K)"):
        cross_entropy(LOGITS, LABELS.astype(dtype))


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, math.nan, math.inf])
def test_label_smoothing_out_of_range(smoothing):
    for targets in (LABELS, np.ones((3, 4)) / 4):
        with refused(RangeError, f"label_smoothing is {smoothing!r}", "[0, 1]"):
            cross_entropy(LOGITS, targets, smoothing)


@pytest.mark.parametrize("reduction", ["none", "Mean", None, ["mean"]])
def test_unknown_reduction(reduction):
    with refused(RangeError, f"reduction is {reduction!r}", "'mean', 'mean_of_all' or 'sum'"):
        cross_entropy(LOGITS, LABELS, reduction=reduction)


def test_logits_are_unsuitable():
    for dtype in ("float16", "int64", "complex128", "object"):
        with refused(ArrayTypeError, f"logits have dtype {dtype}", "float32 or float64"):
            cross_entropy(np.ones((3, 4), dtype), LABELS)
    for shape in ((4,), (3, 4, 1), (), (0, 4), (3, 0)):
        with refused(ShapeError, f"logits have shape {shape}", "(B, K), not empty"):
            cross_entropy(np.ones(shape), LABELS)
    for logits, name in ((LOGITS.tolist(), "got a list"), (None, "NoneType")):
        with refused(ArrayTypeError, name, "numpy.asarray"):
            cross_entropy(logits, LABELS)
    with refused(ArrayTypeError, "torch.Tensor", "x.detach().cpu().numpy()"):
        cross_entropy(torch.zeros(3, 4), LABELS)


# Backbones and heads --------------------------------------------------------------------------


def test_a_bare_backbone_has_no_logits():
    words = ("bare backbone", "num_classes 0", "no logits", "forward_pyramid gives")
    _, cache = pvt_ref.forward_pyramid_with_cache(BARE_PARAMS, IMAGES, BARE)
    model = Model(BARE_PARAMS, BARE)
    for call in (
        lambda: pvt_ref.forward(BARE_PARAMS, IMAGES, BARE),
        lambda: pvt_ref.forward_with_cache(BARE_PARAMS, IMAGES, BARE),
        lambda: pvt_ref.backward(BARE_PARAMS, cache, np.ones((2, 5)), BARE),
        lambda: model(IMAGES),
    ):
        with refused(ConfigError, *words):
            call()
    assert len(model.pyramid(IMAGES)) == 4  # the advice works


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", None, True])
def test_with_new_head_of_an_impossible_count(count):
    for model in (Model(PARAMS, SMALL), Model(BARE_PARAMS, BARE)):
        with refused(ConfigError, f"num_classes is {count!r}"):
            pvt_ref.with_new_head(model, count, rng_of(0))


def test_with_new_head_on_a_backbone_that_reduces_in_stage_4():
    config = replace(BARE, sr_ratios=(8, 4, 2, 2), img_size=64)
    with refused(ConfigError, "sr_ratios[3] is 2 in a classifier", "cls token"):
        pvt_ref.with_new_head(Model(random_params(config, 0), config), 3, rng_of(0))


# Devices --------------------------------------------------------------------------------------

PIP_LINES = ("pip install cupy-cuda12x", "pip install cupy-cuda13x", "nvidia-smi")


class FakeRuntime:
    """As much of cupy.cuda.runtime as is asked before anything is computed."""

    def __init__(self, devices):
        self.devices = devices

    def getDeviceCount(self):  # noqa: N802 (CuPy's name)
        if isinstance(self.devices, Exception):
            raise self.devices
        return self.devices

    def getDevice(self):  # noqa: N802
        return 0


class OnDevice:
    """As much of a CuPy array as is asked before anything is computed."""

    def __init__(self, host):
        self.host = np.asarray(host)
        self.dtype, self.shape, self.ndim = self.host.dtype, self.host.shape, self.host.ndim
        self.device = "<CUDA Device 0>"

    def get(self):
        return self.host


OnDevice.__module__ = "cupy"


def fake_cupy(devices, zeros: Any = OnDevice) -> types.ModuleType:
    """A CuPy that finds so many devices, or raises an error when asked for them."""
    cupy: Any = types.ModuleType("cupy")
    cupy.__version__ = "14.99"
    cupy.ndarray = OnDevice
    cupy.cuda = types.SimpleNamespace(
        runtime=FakeRuntime(devices), Device=lambda number: contextlib.nullcontext()
    )
    cupy.zeros = zeros
    cupy.asarray = OnDevice
    return cupy


def cuda_is_refused(*words: str) -> None:
    for tree in (IMAGES, PARAMS, Model(PARAMS, SMALL), [IMAGES], {}):
        for device in ("cuda", "cuda:0", "cuda:1"):
            with refused(DeviceError, *words):
                pvt_ref.to_device(tree, device)
        with refused(DeviceError, *words):
            pvt_ref.to_device(tree)  # cuda is what it does if nothing is said


def test_cuda_where_cupy_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # None makes the import fail
    cuda_is_refused("CuPy cannot be imported", *PIP_LINES, "everything runs on NumPy")


def test_cuda_where_cupy_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libnvrtc.so.12: cannot open')")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    cuda_is_refused("cannot be imported", "libnvrtc.so.12: cannot open", *PIP_LINES)


def test_cuda_where_there_is_no_driver(monkeypatch):
    error = RuntimeError("cudaErrorInsufficientDriver: driver version is insufficient")
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(error))
    cuda_is_refused("CuPy 14.99 is installed", "no usable driver or device", str(error), *PIP_LINES)


def test_cuda_where_no_device_is_visible(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(0))
    cuda_is_refused("CuPy 14.99", "no CUDA device is visible", "CUDA_VISIBLE_DEVICES", *PIP_LINES)


def test_cuda_where_the_device_does_not_answer(monkeypatch):
    def zeros(n):
        raise RuntimeError("cudaErrorECCUncorrectable")

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(1, zeros))
    cuda_is_refused("no usable driver or device", "cudaErrorECCUncorrectable", *PIP_LINES)


def test_a_cuda_device_beyond_the_last(monkeypatch):
    cupy = fake_cupy(2)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for device in ("cuda", "cuda:0", "cuda:1"):
        assert isinstance(pvt_ref.to_device(IMAGES, device), cupy.ndarray)
    for device in ("cuda:2", "cuda:10"):
        with refused(DeviceError, repr(device), "CUDA devices here are 0 to 1"):
            pvt_ref.to_device(IMAGES, device)
    for tree in (PARAMS, Model(PARAMS, SMALL).params):
        for (key, x), (_, y) in zip(
            named_arrays(tree), named_arrays(pvt_ref.to_device(tree)), strict=True
        ):
            assert isinstance(y, cupy.ndarray), key
            assert pvt_ref.to_numpy(y) is x


@pytest.mark.parametrize(
    "device",
    ["gpu", "CUDA", "cuda:x", "cuda:-1", "cuda:0:1", "cpu:0", "", 0, None, torch.device("cpu")],
)
def test_unknown_device(device):
    with refused(DeviceError, f"device is {device!r}", "'cpu', 'cuda', 'cuda:0'"):
        pvt_ref.to_device(IMAGES, device)


def test_host_and_device_mixed(monkeypatch):
    cupy = fake_cupy(1)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    on_device = pvt_ref.to_device(PARAMS, "cuda")
    hint = ("one device", "pvt_ref.to_device(x, 'cuda')", "pvt_ref.to_numpy(x)")
    with refused(ArrayTypeError, "images are", "the weights", *hint):
        pvt_ref.forward(on_device, IMAGES, SMALL)
    with refused(ArrayTypeError, "images are", "the weights", *hint):
        pvt_ref.forward_pyramid(PARAMS, cupy.asarray(IMAGES), SMALL)
    logits, cache = pvt_ref.forward_with_cache(PARAMS, IMAGES, SMALL)
    with refused(ArrayTypeError, "dlogits is", "the weights are", *hint):
        pvt_ref.backward(PARAMS, cache, cupy.asarray(logits), SMALL)
    maps, cache = pvt_ref.forward_pyramid_with_cache(PARAMS, IMAGES, SMALL)
    with refused(ArrayTypeError, "dmaps[1] is", "the weights are", *hint):
        dmaps = [maps[0], cupy.asarray(maps[1]), None, None]
        pvt_ref.backward_pyramid(PARAMS, cache, dmaps, SMALL)
    with refused(ArrayTypeError, "params mix", "pos_embed1", "norm.weight", "to_device(params"):
        pvt_ref.forward(replace(PARAMS, norm=on_device.norm), IMAGES, SMALL)
    with refused(ArrayTypeError, "logits are numpy", "targets", "to_device or to_numpy"):
        cross_entropy(LOGITS, cupy.asarray(LABELS))


# Costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["224", 224.0, (224,), (32, 32, 32), (32.0, 32)])
def test_cost_of_something_that_is_no_size(size):
    for config in (SMALL, VITS["deit_s_16"]):
        with refused(ShapeError, f"size is {size!r}", "(H, W), in whole pixels"):
            count_cost(config, size)


@pytest.mark.parametrize("size", [33, 0, -32, (32, 40)])
def test_cost_of_a_size_the_model_cannot_take(size):
    for call in (lambda: count_cost(SMALL, size), lambda: Model(PARAMS, SMALL).summary(size)):
        with refused(ShapeError, "multiples of 32", "Resize to", "pad to"):
            call()
    with refused(ShapeError, "30x32", "patch size 16"):
        count_cost(VITS["deit_s_16"], (30, 32))


@pytest.mark.parametrize("batch", [0, -1, 2.0, "2", None])
def test_cost_of_an_impossible_batch(batch):
    for config in (SMALL, VITS["deit_s_16"]):
        with refused(RangeError, f"batch is {batch!r}", "whole number, 1 or more"):
            count_cost(config, 32, batch)


@pytest.mark.parametrize("dtype", ["float16", "double", np.float32, None])
def test_cost_of_an_unknown_dtype(dtype):
    with refused(RangeError, f"dtype is {dtype!r}", "'float32' or 'float64'"):
        count_cost(SMALL, 32, dtype=dtype)


def test_cost_of_an_unknown_stage():
    stage: Any
    for stage in (5, -1, "1"):
        with refused(RangeError, f"stage is {stage!r}", "[0, 1, 2, 3, 4]"):
            count_cost(SMALL).of_stage(stage)
    with refused(RangeError, "stage is 0", "[1, 2, 3, 4]"):
        count_cost(BARE).of_stage(0)


def test_vit_that_cannot_be_built():
    with refused(ConfigError, "img_size 224 is not a multiple of patch_size 15", "would be lost"):
        ViTConfig(patch_size=15)
    with refused(ConfigError, "num_heads 7 does not divide embed_dim 384", "the same width"):
        ViTConfig(patch_size=16, num_heads=7)
    with refused(ConfigError, "times mlp_ratio 0.3 is", "not a whole number of hidden units"):
        ViTConfig(mlp_ratio=0.3)


# Further kinds ---------------------------------------------------------------------------------


def strict(tree):
    return map_arrays(array_api_strict.asarray, tree)


def test_model_refuses_object_and_text_images_like_the_functions():
    model = Model(PARAMS, SMALL)
    for dtype in ("object", "U1", "M8[s]"):
        for call in (model, model.pyramid):
            with refused(ArrayTypeError, "images have dtype", "float32 or float64"):
                call(np.zeros((2, 3, 32, 32), dtype))


def test_torch_tensor_as_images_gets_the_line_that_converts_it():
    images_are_refused(
        torch.zeros(2, 3, 32, 32), ArrayTypeError, "torch.Tensor", ".detach().cpu().numpy()"
    )


def test_images_and_weights_of_two_libraries():
    words = ("images are", "the weights", "array_api_strict", "numpy")
    images_are_refused(strict(IMAGES), ArrayTypeError, *words)
    with refused(ArrayTypeError, *words):
        pvt_ref.forward(strict(PARAMS), IMAGES, SMALL)


def test_params_of_two_libraries():
    mixed = replace(PARAMS, norm=strict(PARAMS.norm))
    params_are_refused(
        mixed, SMALL, ArrayTypeError, "params mix", "pos_embed1", "array_api_strict", "norm.weight"
    )


def test_cotangents_of_another_library(classified, pyramid):
    (logits, cache), (maps, pyramid_cache) = classified, pyramid
    with refused(ArrayTypeError, "dlogits is array_api_strict", "numpy"):
        pvt_ref.backward(PARAMS, cache, strict(logits), SMALL)
    with refused(ArrayTypeError, "dmaps[0] is array_api_strict", "numpy"):
        pvt_ref.backward_pyramid(PARAMS, pyramid_cache, strict(maps), SMALL)


def test_logits_and_targets_of_two_libraries():
    soft = np.ones((3, 4)) / 4
    for logits, targets in (
        (LOGITS, strict(LABELS)),
        (strict(LOGITS), LABELS),
        (LOGITS, strict(soft)),
        (strict(LOGITS), soft),
    ):
        with refused(ArrayTypeError, "logits are", "targets", "numpy", "array_api_strict"):
            cross_entropy(logits, targets)


def test_a_state_of_another_library_may_need_a_conversion_too():
    state = strict(pvt_ref.to_state_dict(random_params(SMALL, 1, np.float32)))
    state["norm.bias"] = strict(PARAMS.norm.bias)  # float64 among float32
    params = pvt_ref.from_state_dict(state, SMALL)
    assert params.pos_embed1.dtype == array_api_strict.float64
    assert isinstance(params.pos_embed1, type(state["pos_embed1"]))


def test_a_cache_of_another_configuration(classified, pyramid):
    (logits, cache), (maps, pyramid_cache) = classified, pyramid
    for change in ({"depths": (1, 1, 1, 2)}, {"img_size": 64}, {"qkv_bias": False}):
        config = replace(SMALL, **change)
        params = random_params(config, 0)
        with refused(ShapeError, "cache", "config"):
            pvt_ref.backward(params, cache, logits, config)
        with refused(ShapeError, "cache", "config"):
            pvt_ref.backward_pyramid(params, pyramid_cache, maps, config)


@pytest.mark.parametrize("ops", ["reference", 3, Operation(loose(len), loose(len))])
def test_ops_are_not_a_table_of_operations(ops, classified):
    logits, cache = classified
    for call in (
        lambda: pvt_ref.forward(PARAMS, IMAGES, SMALL, ops=ops),
        lambda: pvt_ref.forward_with_cache(PARAMS, IMAGES, SMALL, ops=ops),
        lambda: pvt_ref.forward_pyramid(PARAMS, IMAGES, SMALL, ops=ops),
        lambda: pvt_ref.attention_maps(PARAMS, IMAGES, SMALL, ops=ops),
        lambda: pvt_ref.backward(PARAMS, cache, logits, SMALL, ops=ops),
    ):
        with refused(ArrayTypeError, f"ops is a {type(ops).__name__}", "Ops", "REFERENCE"):
            call()


@pytest.mark.parametrize("stages", [[1.0], [True], [[1]]])
def test_attention_maps_of_stages_that_are_no_whole_numbers(stages):
    with refused(RangeError, f"stages are {stages!r}", "from 1 to 4"):
        pvt_ref.attention_maps(PARAMS, IMAGES, SMALL, stages)


def test_attention_maps_of_stages_that_can_be_read_only_once():
    assert list(pvt_ref.attention_maps(PARAMS, IMAGES, SMALL, iter([1, 4]))) == [(1, 0), (4, 0)]


@pytest.mark.parametrize("config", ["pvt_tiny", None, 3])
def test_weights_for_something_that_is_no_configuration(config):
    state = pvt_ref.to_state_dict(PARAMS)
    for call in (
        lambda: pvt_ref.init_params(config, rng_of(0)),
        lambda: pvt_ref.from_state_dict(state, config),
    ):
        with refused(ArrayTypeError, f"config is a {type(config).__name__}", "PVTConfig"):
            call()


@pytest.mark.parametrize("dtype", ["half-ish", 3, torch.float32, None])
def test_init_params_of_no_dtype(dtype):
    with refused(ArrayTypeError, "dtype is", repr(dtype), "float32 or float64"):
        pvt_ref.init_params(SMALL, rng_of(0), dtype)


@pytest.mark.parametrize("value", [None, [1.0], torch.zeros(1, 64, 4)])
def test_params_that_hold_something_else_than_an_array(value):
    params_are_refused(
        replace(PARAMS, pos_embed1=value), SMALL, ShapeError, "pos_embed1", "should be (1, 64, 4)"
    )


@pytest.mark.parametrize("params", [Model(PARAMS, SMALL), None, 3, IMAGES, {"a": IMAGES}])
def test_state_dict_of_something_that_is_no_params(params):
    with refused(ArrayTypeError, f"params is a {type(params).__name__}", "PVTParams"):
        pvt_ref.to_state_dict(params)


@pytest.mark.parametrize("smoothing", ["0.1", None, np.array([0.1, 0.2])])
def test_label_smoothing_is_no_number(smoothing):
    with refused(RangeError, "label_smoothing is", "[0, 1]"):
        cross_entropy(LOGITS, LABELS, smoothing)


def test_with_new_head_of_something_that_is_no_model():
    with refused(ArrayTypeError, "model is a PVTParams", "Model(params, config)"):
        pvt_ref.with_new_head(PARAMS, 3, rng_of(0))


@pytest.mark.parametrize("config", ["pvt_tiny", None, PARAMS])
def test_cost_of_something_that_is_no_configuration(config):
    with refused(ArrayTypeError, f"config is a {type(config).__name__}", "PVTConfig", "ViTConfig"):
        count_cost(config)


@pytest.mark.parametrize("i", [-1, 4, 1.0, True, "1"])
def test_a_stage_that_there_is_not(i):
    with refused(RangeError, f"stage {i!r}", "0 to 3"), pytest.warns(FutureWarning, match="from 1"):
        SMALL.stage(i)


@pytest.mark.parametrize("i", [0, 5, 1.0, True, "1"])
def test_a_stage_that_there_is_not_counted_from_one(i):
    with refused(RangeError, f"stage {i!r}", "1 to 4"):
        SMALL.of_stage(i)


def test_the_old_names_of_stages_count_from_zero_and_warn():
    with pytest.warns(FutureWarning, match="of_stage"):
        assert SMALL.stage(0) == SMALL.of_stage(1)
    with pytest.warns(FutureWarning, match="of_stage"):
        assert PARAMS.stage(3).pos_embed is PARAMS.of_stage(4).pos_embed


def test_timing_something_that_is_no_configuration():
    with refused(ArrayTypeError, "config", "PVTConfig"):
        time_stages(PARAMS, IMAGES, "pvt_tiny")


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_evaluating_in_batches_of_nothing(batch_size):
    images, labels = np.zeros((2, 3, 32, 32), np.uint8), np.zeros(2, np.int64)
    data = LabelledImages(images, labels, Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))
    with refused(RangeError, f"batch_size is {batch_size!r}", "at least 1"):
        evaluate(PARAMS, SMALL, data, batch_size)


def test_cost_takes_the_whole_numbers_of_numpy_and_no_truth_values():
    assert count_cost(SMALL, loose(np.int64(64)), loose(np.int64(2))) == count_cost(SMALL, 64, 2)
    with refused(ShapeError, "size is True"):
        count_cost(SMALL, True)
    with refused(RangeError, "batch is True"):
        count_cost(SMALL, 32, True)


@pytest.mark.parametrize("size", [0, -16, (16, -16)])
def test_cost_of_a_vit_without_pixels(size):
    with refused(ShapeError, "size", "16"):
        count_cost(VITS["deit_s_16"], size)


@pytest.mark.parametrize(
    "change",
    [{"patch_size": 0}, {"patch_size": -16}, {"num_heads": 0}, {"depth": -1}, {"embed_dim": "384"}],
)
def test_vit_of_impossible_numbers(change):
    name, value = next(iter(change.items()))
    with refused(ConfigError, f"{name} is {value!r}", "whole number"):
        ViTConfig(**({"patch_size": 16} | change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_classes": -1}, "a whole number, 0 or more"),
        ({"mlp_ratio": 0}, "a positive number"),
        ({"mlp_ratio": math.nan}, "a positive number"),
        ({"qkv_bias": 1}, "True or False"),
        ({"qk_scale": math.inf}, "None (for 1/sqrt(d)) or finite"),
        ({"drop_rate": 1.0}, "in [0, 1)"),
        ({"drop_path_rate": -0.1}, "in [0, 1)"),
        ({"norm_eps": -1e-6}, "a finite number, 0 or more"),
        ({"norm_eps": "1e-6"}, "a finite number, 0 or more"),
        ({"position_resize": "nearest"}, "bicubic or bilinear"),
        ({"position_resize": None}, "bicubic or bilinear"),
        ({"depth": 1001}, "at most 1000"),
    ],
)
def test_vit_with_a_field_of_another_kind(change, says):
    name, value = next(iter(change.items()))
    with refused(ConfigError, "this ViT cannot be built", f"{name} is {value!r}", says):
        ViTConfig(**change)


def test_vit_with_several_faults_is_told_all_of_them():
    with refused(ConfigError, "depth is 0", "qkv_bias is None", "drop_rate is 2"):
        loose(ViTConfig)(depth=0, qkv_bias=None, drop_rate=2)
    with refused(ConfigError, "patch_size 15", "num_heads 7 does not", "times mlp_ratio 0.1 is"):
        ViTConfig(patch_size=15, num_heads=7, mlp_ratio=0.1)


VIT = ViTConfig(img_size=16, patch_size=8, embed_dim=8, depth=3, num_heads=2, num_classes=4)


@pytest.mark.parametrize(
    ("size", "near", "padded"),
    [((17, 16), "16x16", "24x16"), ((4, 30), "8x32", "8x32"), ((0, 8), "8x8", "8x8")],
)
def test_vit_of_an_image_that_its_patches_do_not_fill(size, near, padded):
    shape = "x".join(map(str, size))
    said = [f"image size {shape} does not fit", "positive multiples of the patch size 8"]
    said += ["a border of pixels would be lost", f"Resize to {near}", f"or pad to {padded}"]
    with refused(ShapeError, *said, "pvt_ref.pad_to_multiple(images, 8)"):
        VIT.grids(*size)


V2 = PVTv2Config(
    img_size=32,
    num_classes=4,
    embed_dims=(4, 8, 4, 8),
    num_heads=(1, 2, 1, 2),
    mlp_ratios=(1, 1, 1, 1),
    depths=(1, 1, 1, 1),
    sr_ratios=(2, 2, 1, 1),
)
LINEAR = replace(V2, linear=True)
V2_PARAMS = random_params(V2, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"linear": 1}, "linear is 1; it must be True or False"),
        ({"linear": "yes"}, "linear is 'yes'; it must be True or False"),
        ({"linear": None}, "linear is None; it must be True or False"),
        ({"linear": True, "sr_ratios": (0, 1, 1, 1)}, "sr_ratios is (0, 1, 1, 1); each must be"),
        ({"embed_dims": 64}, "embed_dims is 64; it must be four whole numbers, one per stage"),
        ({"embed_dims": (64, 128, 320)}, "embed_dims is (64, 128, 320); it must be four"),
        ({"num_heads": "1258"}, "num_heads is '1258'; it must be four whole numbers"),
        ({"depths": (2, 2, 2, 0)}, "depths is (2, 2, 2, 0); each must be a positive whole number"),
        ({"depths": (2, 2, 2, 1001)}, "each must be at most 1000"),
        ({"mlp_ratios": (8, 8, 4, 0.3)}, "stage 4: embed_dims 512 times mlp_ratios 0.3 is"),
        ({"num_heads": (1, 2, 3, 8)}, "stage 3: num_heads 3 does not divide embed_dims 320"),
        ({"img_size": 225}, "img_size 225 makes 57 rows of tokens in stage 1, no multiple of"),
        ({"num_classes": True}, "num_classes is True; it must be a whole number, 0 or more"),
        ({"norm_eps": "1e-6"}, "norm_eps is '1e-6'; it must be a finite number, 0 or more"),
        ({"projection_norm_eps": -1}, "projection_norm_eps is -1; it must be a finite number"),
        ({"qk_scale": math.nan}, "qk_scale is nan; it must be None (for 1/sqrt(d)) or finite"),
    ],
)
def test_version_2_that_cannot_be_built(change, says):
    with refused(ConfigError, "this PVT v2 cannot be built", says, "VARIANTS['pvt_v2_b0']"):
        PVTv2Config(**change)


def test_linear_attention_takes_any_size_and_the_other_says_so():
    images = normal(0, 1, 3, 33, 47)
    assert pvt_ref.forward(random_params(LINEAR, 2), images, LINEAR).shape == (1, 4)
    for run in (pvt_ref.forward, pvt_ref.forward_pyramid):
        said = ["33x47 does not fit", "grid in stage 1 is 9x12", "multiples of 2 there"]
        said += ["resize to 32x32", "pad to 64x64", "Linear attention takes any size"]
        with refused(ShapeError, *said):
            run(V2_PARAMS, images, V2)


def test_weights_and_configurations_of_different_networks():
    pairs = [(V2_PARAMS, VIT), (V2_PARAMS, SMALL), (random_params(VIT, 0), V2), (PARAMS, V2)]
    for params, config in pairs:
        kinds = f"params is a {type(params).__name__} and config a {type(config).__name__}"
        for run in (
            lambda params=params, config=config: pvt_ref.forward(params, IMAGES, config),
            lambda params=params, config=config: Model(params, config),
        ):
            with refused(ArrayTypeError, kinds, "different networks"):
                run()
    for params, config in ((V2_PARAMS, LINEAR), (random_params(LINEAR, 2), V2)):
        with refused(ShapeError, "do not belong to this config", "block1.0.attn.sr.weight"):
            pvt_ref.forward(params, IMAGES, config)


def test_states_of_different_networks():
    state = pvt_ref.to_state_dict(V2_PARAMS)
    with refused(CheckpointError, "missing: cls_token", "unexpected: patch_embed1.proj.weight"):
        pvt_ref.from_state_dict(state, VIT)
    with refused(CheckpointError, "missing: block3.0.attn.sr.weight (4, 4, 1, 1)", "mis-shaped"):
        pvt_ref.from_state_dict(state, LINEAR)


def test_logits_of_bare_networks():
    for config in (replace(V2, num_classes=0), replace(VIT, num_classes=0)):
        params = random_params(config, 0)
        with refused(ConfigError, "a bare backbone (num_classes 0", "forward_pyramid"):
            pvt_ref.forward(params, IMAGES, config)
        with refused(ConfigError, "a bare backbone (num_classes 0", "forward_pyramid"):
            Model(params, config)(IMAGES)


@pytest.mark.parametrize("blocks", [[], [3], [-1], [1, 0], [1, 1], [0.0], [True], 2, "02", [None]])
def test_maps_of_blocks_that_there_are_not(blocks):
    params, images = random_params(VIT, 0), normal(0, 1, 3, 16, 16)
    for run in (pvt_ref.forward_pyramid, pvt_ref.forward_pyramid_with_cache):
        with refused(RangeError, "blocks are", "rising numbers from 0 to 2", "such as [0, 2]"):
            run(params, images, VIT, blocks=blocks)


def test_maps_of_blocks_of_a_network_with_stages():
    with refused(ConfigError, "blocks are [0]", "a PVT gives one map for each stage"):
        pvt_ref.forward_pyramid(PARAMS, IMAGES, SMALL, blocks=[0])
    with refused(ConfigError, "blocks are [0]", "a PVT gives one map for each stage"):
        Model(PARAMS, SMALL).pyramid(IMAGES, blocks=[0])
    with refused(ConfigError, "blocks are [0]", "a PVT v2 gives one map for each stage"):
        Model(V2_PARAMS, V2).pyramid(IMAGES, blocks=[0])


def test_numbers_too_large_for_floats_in_a_configuration():
    for change in ({"embed_dims": (10**400, 8, 4, 8)}, {"mlp_ratios": (10**400, 1, 1, 1)}):
        with refused(ConfigError, "too large"):
            replace(SMALL, **change)


@pytest.mark.parametrize("size", [(32.0, 32), ("32", 32), (32, None)])
def test_grids_of_no_whole_number_of_pixels(size):
    with refused(ShapeError, "image size", repr(size[0]), "whole numbers of pixels"):
        SMALL.grids(*size)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("odd", [np.ma.masked_array, np.matrix])
def test_masked_arrays_and_matrices_are_no_arrays(odd):
    # the mask would be ignored, and a matrix multiplies in its own way
    name = "a masked array" if odd is np.ma.masked_array else "numpy.matrix"
    logits = odd(LOGITS)
    with refused(ArrayTypeError, name):
        cross_entropy(logits, LABELS)
    if odd is np.ma.masked_array:
        images_are_refused(odd(IMAGES), ArrayTypeError, name, "x.filled(value)")
        masked = replace(PARAMS, norm=replace(PARAMS.norm, weight=odd(PARAMS.norm.weight)))
        params_are_refused(masked, SMALL, ShapeError, "norm.weight", "absent")


def test_a_cache_and_weights_of_two_dtypes(classified, pyramid):
    (logits, cache), (maps, pyramid_cache) = classified, pyramid
    narrow = map_arrays(lambda x: x.astype(np.float32), PARAMS)
    with refused(ArrayTypeError, "float64 weights", "float32", "same params"):
        pvt_ref.backward(narrow, cache, logits, SMALL)
    with refused(ArrayTypeError, "float64 weights", "float32", "same params"):
        pvt_ref.backward_pyramid(narrow, pyramid_cache, maps, SMALL)


def test_a_copied_cache_is_still_of_the_record_that_made_it(classified):
    logits, cache = classified
    grads, _ = pvt_ref.backward(PARAMS, copy.deepcopy(cache), logits, SMALL, ops=cache.ops)
    expected, _ = pvt_ref.backward(PARAMS, cache, logits, SMALL)
    np.testing.assert_array_equal(grads.cls_token, expected.cls_token)


def test_model_refuses_images_beyond_the_range_of_its_weights():
    narrow = Model(map_arrays(lambda x: x.astype(np.float32), PARAMS), SMALL)
    for call in (narrow, narrow.pyramid):
        with refused(NonFiniteError, "images", "infinite"):
            call(np.full((1, 3, 32, 32), 1e300))


def test_small_numpy_integers_do_not_wrap_round():
    assert SMALL.grids(np.uint8(224), np.uint8(224)) == SMALL.grids(224, 224)
    assert type(SMALL.grids(np.uint8(32), 32)[0][0]) is int
    padded = pvt_ref.pad_to_multiple(np.zeros((1, 3, 225, 300), np.float32), loose(np.uint8(32)))
    assert padded.shape == (1, 3, 256, 320)


@pytest.mark.parametrize("name", ["qk_scale", "norm_eps", "projection_norm_eps"])
def test_scale_and_eps_beyond_floats(name):
    with refused(ConfigError, name, "finite"):
        replace(SMALL, **{name: 10**400})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cotangents_of_the_other_float_dtype_are_cast(dtype):
    params = map_arrays(lambda x: x.astype(dtype), PARAMS)
    other = np.float64 if dtype == np.float32 else np.float32
    logits, cache = pvt_ref.forward_with_cache(params, IMAGES, SMALL)
    maps, pyramid_cache = pvt_ref.forward_pyramid_with_cache(params, IMAGES, SMALL)
    dmaps = [x.astype(other) for x in maps]
    for grads, _ in (
        pvt_ref.backward(params, cache, logits.astype(other), SMALL),
        pvt_ref.backward_pyramid(params, pyramid_cache, dmaps, SMALL),
    ):
        assert {x.dtype for x in pvt_ref.to_state_dict(grads).values()} == {np.dtype(dtype)}


def test_a_strangers_key_cannot_fake_a_line_of_the_message():
    state = pvt_ref.to_state_dict(PARAMS)
    state["head.weight2\n  - all is well\x1b[2J"] = np.zeros((1,), np.float32)
    with pytest.raises(CheckpointError) as caught:
        pvt_ref.from_state_dict(state, SMALL)
    assert r"unexpected: 'head.weight2\n  - all is well\x1b[2J' (1,)" in str(caught.value)
