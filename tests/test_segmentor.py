"""A segmentation network as a whole: mmsegmentation's numbers, its laws, and all it goes through.

The golden numbers were computed once by mmsegmentation 0.13 with the authors' dense backbone, for
weights, images and labels that are drawn here again; see golden/README.md.
"""

import copy
import dataclasses
import math
import pickle
import re
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import FORWARD, assert_near, relative
from hypothesis import given
from hypothesis import strategies as st
from loose import loose
from PIL import Image
from segmentors import PVT, SEGMENTORS, VIT, params_of
from strategies import normal, rng_of, without_dropout
from test_golden import MICRO, assert_digest, draw
from test_heads import assert_gradients, golden
from test_ops import counted

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, VITS, Model, ModelInfo, Preprocessing, blocked_ops
from pvt_ref.api import batch_buffers, updated, with_buffers
from pvt_ref.data.iou import class_iou, count_pixels, pixel_accuracy
from pvt_ref.dense import logit_bands, resize_logits, sliding_logits, windows
from pvt_ref.draws import Draws
from pvt_ref.errors import (
    ArrayTypeError,
    ConfigError,
    ImageError,
    MissingFileError,
    NonFiniteError,
    RangeError,
    ShapeError,
)
from pvt_ref.heads.mla import mla_head
from pvt_ref.heads.semantic_fpn import semantic_fpn
from pvt_ref.layers.batch_norm import batch_norm
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.layers.relu import relu
from pvt_ref.layers.resize import resize
from pvt_ref.models.architecture import (
    Place,
    architecture_of,
    buffer_keys,
    config_to_dict,
    count_keys,
    layer_numbers,
    param_shapes,
)
from pvt_ref.models.segmentor import SEGMENTOR
from pvt_ref.models.segmentor.config import SegmentorConfig, SemanticFPNHead, SETRHead
from pvt_ref.models.segmentor.params import SegmentorParams
from pvt_ref.models.segmentor.variants import published
from pvt_ref.ops import Operation
from pvt_ref.report.cost import cache_bytes
from pvt_ref.report.times import time_operations, time_stages
from pvt_ref.tree import map_arrays, named_arrays, to_device, to_numpy, without_buffers

each = pytest.mark.parametrize("name", SEGMENTORS)
CLASSES = ("sky", "road", "tree", "car")

#: By name, a size of images, and the grid of their logits. Of 72x56 pixels only the linear PVT v2
#: has whole grids, of 18x14, 9x7, 5x4 and 3x2 cells; SETR enlarges its map 4 and 16 times.
SIZES = {
    "pvt": ((64, 32), (16, 8)),
    "pvt_v2": ((32, 64), (8, 16)),
    "linear": ((72, 56), (18, 14)),
    "naive": ((24, 40), (12, 20)),
    "pup": ((16, 24), (32, 48)),
}


def images_of(name: str, batch: int = 2, seed: int = 1) -> np.ndarray:
    return normal(seed, batch, 3, *SIZES[name][0])


def torch_resized(x: np.ndarray, *sizes) -> np.ndarray:
    """x (B, C, h, w), enlarged or made smaller by PyTorch, to one size after the other."""
    y = torch.tensor(np.ascontiguousarray(x))
    for size in sizes:
        y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
    return y.numpy()


def plain(config: SegmentorConfig) -> SegmentorConfig:
    """Without dropout and drop path."""
    head = config.head
    if isinstance(head, SemanticFPNHead):
        head = dataclasses.replace(head, drop_rate=0.0)
    return dataclasses.replace(config, backbone=without_dropout(config.backbone), head=head)


# The released network -----------------------------------------------------------------------------

SEED, TAG = 33, "segmentor_64x96"
RELEASED = SegmentorConfig(
    backbone=dataclasses.replace(MICRO, num_classes=0, img_size=64),
    head=SemanticFPNHead(neck_channels=16, channels=8, drop_rate=0.0),
    num_classes=6,
)
WITH_CLS_ROW = "backbone.pos_embed4"


def released_value(key: str, shape) -> np.ndarray:
    """An array of the released network, which has a row for a cls token in its last table."""
    if key == WITH_CLS_ROW:
        shape = (1, shape[1] + 1, shape[2])
    x = draw(key, shape, SEED)
    if key.endswith("num_batches_tracked"):
        return np.array(0)
    if key.endswith("running_var"):
        return 0.5 + np.abs(x)
    if key.endswith("running_mean"):
        return 0.1 * x
    if len(shape) == 1:
        return 1 + 0.2 * x if key.endswith(".weight") else 0.1 * x
    return 0.2 * x if "pos_embed" in key else x / np.sqrt(np.prod(shape[1:]))


@pytest.fixture(scope="module")
def released():
    state = {key: released_value(key, shape) for key, shape in param_shapes(RELEASED).items()}
    state[WITH_CLS_ROW] = state[WITH_CLS_ROW][:, 1:]  # the backbone never reads the first row
    return pvt_ref.from_state_dict(state, RELEASED)


def released_labels(seed: int, shape) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(b"labels")])
    labels = rng.integers(0, 6, shape)
    labels[rng.random(shape) < 0.2] = 255
    return labels


IMAGES = draw("images", (2, 3, 64, 96), SEED)


@pytest.mark.parametrize("table", ["blocked", "reference"], indirect=True)
def test_loss_and_gradients_equal_mmsegmentations(released, table):
    numbers = golden("semantic_fpn")
    logits, cache = pvt_ref.forward_with_cache(released, IMAGES, RELEASED, batch_statistics=True)
    last = logits.transpose(0, 2, 3, 1)
    full, resized = resize.forward(None, last, REFERENCE, (64, 96))
    labels = released_labels(SEED, (2, 64, 96))
    loss, dfull = cross_entropy(
        full.transpose(0, 3, 1, 2), labels, reduction="mean_of_all", ignore_index=255
    )
    np.testing.assert_allclose(loss, numbers[f"{TAG}/loss/value"], rtol=1e-12)
    dlogits, _ = resize.backward(None, resized, dfull.transpose(0, 2, 3, 1), REFERENCE)
    grads, dimages = pvt_ref.backward(released, cache, dlogits.transpose(0, 3, 1, 2), RELEASED)
    named = dict(named_arrays(grads)) | {"images": dimages}
    table4 = named[WITH_CLS_ROW]
    named[WITH_CLS_ROW] = np.concatenate((np.zeros_like(table4[:, :1]), table4), axis=1)
    assert_gradients(f"{TAG}/loss", named, SEED, numbers)


@pytest.mark.parametrize("table", ["blocked", "reference"], indirect=True)
def test_inference_equals_mmsegmentations(released, table):
    numbers, tag = golden("semantic_fpn"), f"{TAG}/infer"
    logits = pvt_ref.forward(released, IMAGES, RELEASED)
    assert_digest(f"{tag}/logits", resize_logits(logits, (64, 96)), SEED, numbers, 1e-12)
    full = resize_logits(logits, (64, 96), (50, 83))
    p = np.exp(full - full.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    assert_digest(f"{tag}/probabilities", p, SEED, numbers, 1e-12)
    np.testing.assert_array_equal(full.argmax(axis=1), numbers[f"{tag}/labels"])
    slid = sliding_logits(released, IMAGES, RELEASED, 64, (48, 40))
    assert_digest(f"{tag}/slide_64_48x40", slid, SEED, numbers, 1e-12)


@pytest.mark.parametrize("kind", SEGMENTORS)
def test_every_operation_that_a_network_asks_for_may_be_replaced(kind):
    config, asked = SEGMENTORS[kind], set()
    ops = REFERENCE.watched(lambda call: asked.add(call.operation))
    images = normal(0, 1, 3, 64, 64)
    logits, cache = pvt_ref.forward_with_cache(params_of(config), images, config, ops=ops)
    pvt_ref.backward(cache.params, cache, logits, config, ops=ops)
    assert batch_norm in asked
    assert asked <= SEGMENTOR.operations


def test_scores_equal_mmsegmentations():
    numbers, tag = golden("semantic_fpn"), f"{TAG}/infer"
    answers = numbers[f"{tag}/labels"]
    counts = count_pixels(answers, released_labels(1033, answers.shape), 6)
    accuracies = counts.diagonal() / counts.sum(axis=1)
    scores = [pixel_accuracy(counts), *class_iou(counts), *accuracies]
    np.testing.assert_allclose(scores, numbers[f"{tag}/metrics"], rtol=1e-12)


# Shape --------------------------------------------------------------------------------------------

#: Parameters and GMACs at 512 x 512, as counted of the released networks. They have 512 numbers
#: more, of a PVT's last table, for a cls token that the dense backbone does not have.
TABLE = {
    "pvt_tiny": (16_981_398 - 512, 33.190),
    "pvt_small": (28_237_974 - 512, 44.474),
    "pvt_medium": (47_960_214 - 512, 60.958),
    "pvt_large": (65_121_430 - 512, 79.528),
    "pvt_v2_b0": (7_545_334, 24.983),
    "pvt_v2_b1": (17_762_646, 34.140),
    "pvt_v2_b2": (29_116_502, 45.628),
    "pvt_v2_b2_li": (26_307_158, 40.842),
    "pvt_v2_b3": (48_992_342, 62.253),
    "pvt_v2_b4": (66_309_718, 81.080),
    "pvt_v2_b5": (85_709_654, 90.853),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_published_network_costs_what_the_papers_say(name):
    parameters, gmacs = TABLE[name]
    config = VARIANTS[f"fpn_{name}"]
    cost = pvt_ref.count_cost(config, 512)
    assert cost.parameters == parameters
    assert round(cost.macs / 1e9, 3) == gmacs
    assert config.backbone == dataclasses.replace(VARIANTS[name], num_classes=0, drop_path_rate=0.1)
    row = architecture_of(config)
    assert row.describe(config) == f"{name} with semantic_fpn, 150 classes"
    items = {(item.stage, item.operation): item for item in cost.items}
    assert all(stage > 0 or part.startswith(("neck", "decode_head")) for stage, part in items)
    neck = [item for (_, part), item in items.items() if part.startswith("neck")]
    head = [item for (_, part), item in items.items() if part.startswith("decode_head")]
    if name == "pvt_tiny":  # channels of 64 to 512
        assert sum(item.parameters for item in neck) == 2_623_488
        assert sum(item.parameters for item in head) == 1_643_158
        assert round(sum(item.macs for item in neck) / 1e9, 3) == 13.355
        assert round(sum(item.macs for item in head) / 1e9, 3) == 8.091


def test_all_backbones_of_the_papers_have_a_segmentation_network():
    assert set(published()) >= {f"fpn_{name}" for name in TABLE}
    assert published().items() <= VARIANTS.items()


def test_keys_come_in_the_order_of_mmsegmentations_files():
    keys = list(param_shapes(VARIANTS["fpn_pvt_v2_b0"]))
    backbone = [f"backbone.{key}" for key in param_shapes(VARIANTS["pvt_v2_b0"])][:-2]
    convs = [f"{kind}_convs.{i}.conv" for kind in ("lateral", "fpn") for i in range(4)]
    neck = [f"neck.{conv}.{leaf}" for conv in convs for leaf in ("weight", "bias")]
    weights = [key for key in keys if key not in buffer_keys(VARIANTS["fpn_pvt_v2_b0"])]
    units = [(0, 0), (1, 0), (2, 0), (2, 2), (3, 0), (3, 2), (3, 4)]
    names = [f"decode_head.scale_heads.{i}.{j}" for i, j in units]
    head = ["decode_head.conv_seg.weight", "decode_head.conv_seg.bias"]
    head += [f"{name}.{leaf}" for name in names for leaf in ("conv.weight", "bn.weight", "bn.bias")]
    assert weights == [*backbone, *neck, *head]
    state = ("running_mean", "running_var", "num_batches_tracked")
    assert [key for key in keys if key not in weights] == [
        f"{name}.bn.{leaf}" for name in names for leaf in state
    ]


@each
def test_fresh_weights_are_drawn_as_the_authors_did(name):
    config = SEGMENTORS[name]
    wide = {"channels": 64} | ({"neck_channels": 48} if "neck_channels" in dir(config.head) else {})
    config = dataclasses.replace(
        config, head=dataclasses.replace(config.head, **wide), num_classes=50
    )
    params = pvt_ref.init_params(config, rng_of(3), np.float32)
    named = dict(named_arrays(params))
    assert list(named) == list(param_shapes(config))
    heads = {key: x for key, x in named.items() if not key.startswith("backbone.")}
    for key, x in heads.items():
        last = key.rpartition(".")[2]
        if x.ndim == 4:
            k, C_out = x.shape[2], x.shape[0]
            std = 0.01 if "conv_seg" in key else math.sqrt(2 / (k * k * C_out))
            spread = 5 / math.sqrt(2 * x.size)  # of a deviation from so many numbers
            assert abs(x.std() / std - 1) < spread, key
            assert abs(x.mean()) < 5 * std / math.sqrt(x.size), key
        elif last == "num_batches_tracked":
            assert (x.dtype, x.shape, int(x)) == (np.int64, (), 0)
        else:
            ones = last == "running_var" or (last == "weight" and x.ndim == 1)
            assert x.dtype == np.float32
            assert (x == (1 if ones else 0)).all(), key
    alone = pvt_ref.init_params(config.backbone, rng_of(3), np.float32)
    for key, x in named_arrays(alone):
        np.testing.assert_array_equal(x, named[f"backbone.{key}"], err_msg=key)


@each
def test_where_its_operations_and_weights_stand(name):
    config = SEGMENTORS[name]
    row = architecture_of(config)
    for key in param_shapes(config.backbone):
        assert row.place(f"backbone.{key}") == config.row.place(key)
    assert row.place("decode_head.conv_seg.weight") == Place(0, None, "decode_head.conv_seg.weight")
    layers = layer_numbers(config)
    depth = sum(config.backbone.depths) if name[0] != "n" and name[0:2] != "pu" else VIT.depth
    assert {layers[key] for key in layers if not key.startswith("backbone.")} == {depth + 1}
    assert min(layers.values()) == 0


def test_a_configuration_becomes_plain_values_and_is_made_of_them_again():
    for config in SEGMENTORS.values():
        values = config_to_dict(config)
        assert SegmentorConfig(**values) == config
        assert values["backbone"]["name"] == config.row.name
    assert SEGMENTORS["pvt"].with_drop_path_rate(0.2).backbone.drop_path_rate == 0.2
    assert SEGMENTORS["pvt"].drop_path_rate == 0.3
    assert SEGMENTORS["pvt"].channels == (4, 8, 12, 8)
    assert SEGMENTORS["pvt"].strides == (4, 8, 16, 32)


V1_CLASSIFIER = VARIANTS["pvt_tiny"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0; it must be a whole number, 1 or more"),
        ({"num_classes": True}, "num_classes is True"),
        ({"backbone": V1_CLASSIFIER}, "backbone is one with a classifier .num_classes 1000.; a"),
        ({"backbone": "pvt_tiny"}, "backbone is 'pvt_tiny'; it must be the configuration of a n"),
        ({"backbone": SEGMENTORS["pvt"]}, "backbone is .*; it must be the configuration of a netw"),
        ({"head": "setr"}, "head is 'setr'; it must be a SemanticFPNHead or a SETRHead"),
        ({"head": None}, "head is None; it must be a SemanticFPNHead or a SETRHead"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(
        ConfigError, match=f"this segmentation network cannot be built:\n.*{message}"
    ):
        dataclasses.replace(SEGMENTORS["pvt"], **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SemanticFPNHead(channels=0), "channels is 0; it must be a whole number"),
        (lambda: SemanticFPNHead(neck_channels=loose(2.0)), "neck_channels is 2.0"),
        (lambda: SemanticFPNHead(drop_rate=1), r"drop_rate is 1; it must be in \[0, 1\)"),
        (lambda: SemanticFPNHead(drop_rate=loose("0")), "drop_rate is '0'"),
        (lambda: SETRHead(channels=-1), "channels is -1"),
        (lambda: SETRHead(upsampling="mla"), "upsampling is 'mla'; it must be 'naive' or 'pup'"),
        (
            lambda: SegmentorConfig(backbone={"name": "resnet"}),
            "backbone is called 'resnet'; known are 'pvt', 'pvt_v2', 'vit'",
        ),
        (lambda: SegmentorConfig(backbone={"name": ["pvt"]}), "backbone is called"),
        (
            lambda: SegmentorConfig(backbone={"name": "segmentor", "backbone": {}}),
            "backbone is called 'segmentor'",
        ),
        (
            lambda: dataclasses.replace(SEGMENTORS["pvt"], head={"name": "setr", "width": 3}),
            "head: .*unexpected keyword argument 'width'",
        ),
    ],
)
def test_parts_that_cannot_be_built_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# Numbers ------------------------------------------------------------------------------------------


@each
def test_forward_is_forward_with_cache_and_that_of_prepared_weights(name):
    config, (size, grid) = SEGMENTORS[name], SIZES[name]
    params, images = params_of(config), images_of(name)
    logits = pvt_ref.forward(params, images, config)
    assert logits.shape == (2, 4, *grid)
    kept, cache = pvt_ref.forward_with_cache(params, images, config)
    np.testing.assert_array_equal(logits, kept)
    prepared = pvt_ref.prepare(params, config, size)
    np.testing.assert_array_equal(logits, pvt_ref.forward(prepared, images))
    assert_near(pvt_ref.forward(params, images, config, ops=REFERENCE), logits, FORWARD)
    for trained in (False, True):  # the cache serves many backwards, and none changes it
        logits, cache = pvt_ref.forward_with_cache(
            params, images, config, Draws(1, 2), batch_statistics=trained
        )
        first, again = (pvt_ref.backward(params, cache, logits, config) for _ in range(2))
        np.testing.assert_array_equal(first[1], again[1])


@each
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_have_no_buffers_and_the_weights_shapes(name, dtype):
    config, images = SEGMENTORS[name], images_of(name).astype(dtype)
    params = params_of(config, dtype=dtype)
    logits, cache = pvt_ref.forward_with_cache(params, images, config, batch_statistics=True)
    grads, dimages = pvt_ref.backward(params, cache, logits, config)
    assert isinstance(grads, SegmentorParams)
    assert grads.buffers is None
    shapes = {key: (x.shape, x.dtype) for key, x in named_arrays(grads)}
    trained = named_arrays(without_buffers(params))
    assert shapes == {key: (x.shape, x.dtype) for key, x in trained}
    assert shapes.keys() == param_shapes(config).keys() - buffer_keys(config)
    assert (dimages.shape, dimages.dtype) == (images.shape, dtype)


def shifted(params, direction, step: float):
    """Weights moved along a direction, and running statistics as they were."""
    moved = map_arrays(lambda w, d: w + step * d, without_buffers(params), direction)
    return dataclasses.replace(moved, buffers=params.buffers)


@pytest.mark.parametrize("draws", [None, Draws(3, 1)], ids=["", "dropped"])
@pytest.mark.parametrize("trained", [False, True], ids=["running", "batch"])
@each
def test_its_gradients_are_slopes(name, trained, draws):
    config = SEGMENTORS[name]
    params, images = params_of(config), images_of(name)

    def run(params, images):
        return pvt_ref.forward_with_cache(
            params, images, config, draws, batch_statistics=trained, ops=REFERENCE
        )

    logits, cache = run(params, images)
    dlogits, v = normal(4, *logits.shape), normal(5, *images.shape)
    grads, dimages = pvt_ref.backward(params, cache, dlogits, config)
    directions = iter(range(1000))
    direction = map_arrays(lambda g: normal(next(directions), *g.shape), grads)
    h = 1e-6
    (up, _), (down, _) = (run(shifted(params, direction, s), images + s * v) for s in (h, -h))
    slope = ((up - down) * dlogits).sum() / (2 * h)
    pairs = zip(named_arrays(grads), named_arrays(direction), strict=True)
    expected = (dimages * v).sum() + sum((g * d).sum() for (_, g), (_, d) in pairs)
    np.testing.assert_allclose(slope, expected, rtol=2e-6)
    undropped, _ = pvt_ref.forward_with_cache(params, images, config, batch_statistics=trained)
    assert (draws is None) == np.allclose(undropped, logits)


@each
def test_the_pyramid_is_the_backbones(name):
    config = SEGMENTORS[name]
    params, images = params_of(config), images_of(name)
    maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config)
    theirs, their_cache = pvt_ref.forward_pyramid_with_cache(
        params.backbone, images, config.backbone
    )
    for x, y, z in zip(maps, theirs, pvt_ref.forward_pyramid(params, images, config), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    dmaps = [normal(i, *x.shape) for i, x in enumerate(maps)]
    grads, dimages = pvt_ref.backward_pyramid(params, cache, dmaps, config)
    dbackbone, dx = pvt_ref.backward_pyramid(params.backbone, their_cache, dmaps, config.backbone)
    np.testing.assert_array_equal(dimages, dx)
    assert np.any(dx)
    for (key, a), (_, b) in zip(named_arrays(grads.backbone), named_arrays(dbackbone), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=key)
    unread = [*named_arrays(grads.neck), *named_arrays(grads.decode_head)]
    assert unread
    assert not any(np.any(x) for _, x in unread)
    assert grads.buffers is None
    assert [f.shape[1] for f in maps] == [f["num_chs"] for f in Model(params, config).feature_info]


# Batch statistics ---------------------------------------------------------------------------------


@each
def test_running_statistics_follow_those_of_the_batch(name):
    config = plain(SEGMENTORS[name])
    params, images, seen = params_of(config), images_of(name, 3), {}

    def look(call):
        seen[call.path] = call.args[1].reshape(-1, call.args[1].shape[-1])

    watched = REFERENCE.watched(look, only=[batch_norm], params=params)
    _, cache = pvt_ref.forward_with_cache(
        params, images, config, batch_statistics=True, ops=watched
    )
    after = dict(named_arrays(updated(params, cache)))
    before = dict(named_arrays(params.buffers))
    assert len(seen) == len(after) / 3
    for path, x in seen.items():
        mean, var, count = (
            f"{path}.{leaf}" for leaf in ("running_mean", "running_var", "num_batches_tracked")
        )
        assert_near(after[mean], 0.9 * before[mean] + 0.1 * x.mean(axis=0), FORWARD)
        assert_near(after[var], 0.9 * before[var] + 0.1 * x.var(axis=0, ddof=1), FORWARD)
        assert after[count] == before[count] + 1
        assert after[count].dtype == np.int64


def test_running_statistics_stay_where_they_were_used():
    config, name = SEGMENTORS["pvt"], "pvt"
    params = params_of(config)
    _, cache = pvt_ref.forward_with_cache(params, images_of(name), config)
    assert batch_buffers(cache) is None
    assert updated(params, cache) is params.buffers
    assert with_buffers(params, None) is params
    classifier = dataclasses.replace(PVT, num_classes=3)
    other = params_of(classifier)
    _, cache = pvt_ref.forward_with_cache(other, images_of(name), classifier)
    assert updated(other, cache) is None
    with pytest.raises(ArrayTypeError, match="params is a PVTConfig; it must be"):
        updated(PVT, cache)
    with pytest.raises(ArrayTypeError, match="they belong to different networks"):
        updated(params, cache)
    with pytest.raises(ArrayTypeError, match="cache is a NoneType; this backward needs"):
        updated(params, loose(None))


def test_updated_takes_the_place_of_the_buffers_and_changes_nothing_else():
    config, images = SEGMENTORS["pvt"], images_of("pvt")
    params = params_of(config)
    before = {key: x.copy() for key, x in named_arrays(params)}
    _, cache = pvt_ref.forward_with_cache(params, images, config, batch_statistics=True)
    after = dataclasses.replace(params, buffers=updated(params, cache))
    for key, x in named_arrays(params):
        np.testing.assert_array_equal(x, before[key], err_msg=key)
    changed = {k for k, x in named_arrays(after) if not np.array_equal(x, before[k])}
    assert changed == buffer_keys(config)
    logits = pvt_ref.forward(after, images, config)
    assert not np.allclose(logits, pvt_ref.forward(params, images, config))


def test_of_one_batch_again_and_again_the_running_statistics_become_its_own():
    config, images = plain(SEGMENTORS["naive"]), images_of("naive")
    params = params_of(config)
    wanted, cache = pvt_ref.forward_with_cache(params, images, config, batch_statistics=True)
    for _ in range(250):  # 0.9^250 is 4e-12
        params = with_buffers(params, batch_buffers(cache))
    bn = params.buffers.decode_head.up_convs[0][0].bn
    N = images.shape[0] * 3 * 5  # cells of the map
    unbiased = dataclasses.replace(bn, running_var=bn.running_var * (N - 1) / N)
    unit = dataclasses.replace(params.buffers.decode_head.up_convs[0][0], bn=unbiased)
    head = dataclasses.replace(params.buffers.decode_head, up_convs=((unit, None),))
    buffers = dataclasses.replace(params.buffers, decode_head=head)
    params = dataclasses.replace(params, buffers=buffers)
    assert_near(pvt_ref.forward(params, images, config), wanted, 1e-9)


def test_one_value_a_channel_has_no_variance():
    config, params = SEGMENTORS["pvt"], params_of(SEGMENTORS["pvt"])
    with pytest.raises(ShapeError, match="one value per channel, which has no variance"):
        pvt_ref.forward_with_cache(params, normal(1, 1, 3, 32, 32), config, batch_statistics=True)
    pvt_ref.forward_with_cache(params, normal(1, 1, 3, 32, 32), config)
    pvt_ref.forward_with_cache(params, normal(1, 2, 3, 32, 32), config, batch_statistics=True)


@each
def test_a_segmentation_does_not_depend_on_its_neighbours(name):
    config = SEGMENTORS[name]
    params, images = params_of(config), images_of(name, 3)
    together = pvt_ref.forward(params, images, config)
    for i in range(3):
        assert_near(pvt_ref.forward(params, images[i : i + 1], config), together[i : i + 1], 1e-12)
    other = np.concatenate((images[:1], 5 + images_of(name, 2, seed=9)))
    assert_near(pvt_ref.forward(params, other, config)[:1], together[:1], 1e-12)
    trained = [  # where the batch's statistics are taken, it does
        pvt_ref.forward_with_cache(params, x, plain(config), batch_statistics=True)[0][:1]
        for x in (images, other)
    ]
    assert not np.allclose(*trained)


# Sizes that the backbone refuses ------------------------------------------------------------------


@given(st.sampled_from(sorted(SEGMENTORS)), st.integers(1, 150), st.integers(1, 150))
def test_a_size_that_does_not_fit_is_rounded_up(name, height, width):
    config = SEGMENTORS[name]
    fitting = config.fitting_size(height, width)
    try:
        config.backbone.grids(height, width)
    except ShapeError:
        m = {"pvt": 32, "pvt_v2": 32, "naive": 8, "pup": 8}[name]
        assert fitting == (math.ceil(height / m) * m, math.ceil(width / m) * m)
    else:
        assert fitting == (height, width)
    assert config.grids(height, width) == config.backbone.grids(*fitting)


@pytest.mark.parametrize(
    ("name", "size", "fitting", "grid"),
    [
        ("pvt", (50, 70), (64, 96), (12, 18)),  # of 16 x 24
        ("pvt", (64, 70), (64, 96), (16, 18)),
        ("pvt_v2", (33, 64), (64, 64), (8, 16)),
        ("naive", (17, 40), (24, 40), (8, 20)),  # of 12 x 20
        ("pup", (9, 8), (16, 8), (18, 16)),  # of 32 x 16
    ],
)
def test_it_is_stretched_and_its_logits_are_shrunk_as_much(name, size, fitting, grid):
    config, images = SEGMENTORS[name], normal(6, 2, 3, *size)
    params = params_of(config)
    assert config.fitting_size(*size) == fitting
    large = pvt_ref.forward(params, torch_resized(images, fitting), config)
    expected = torch_resized(large, grid)
    assert_near(pvt_ref.forward(params, images, config), expected, FORWARD)
    prepared = pvt_ref.prepare(params, config, size)
    assert_near(pvt_ref.forward(prepared, images), expected, FORWARD)
    maps = pvt_ref.forward_pyramid(params, images, config)
    theirs = pvt_ref.forward_pyramid(
        params.backbone, torch_resized(images, fitting), config.backbone
    )
    for x, y in zip(maps, theirs, strict=True):
        assert_near(x, y, FORWARD)


@pytest.mark.parametrize("pyramid", [False, True], ids=["logits", "pyramid"])
@pytest.mark.parametrize("name", ["pvt", "pup"])
def test_gradients_through_a_stretch_are_slopes(name, pyramid):
    config, images = SEGMENTORS[name], normal(6, 1, 3, 19, 41)
    params, v = params_of(config), normal(7, 1, 3, 19, 41)
    run: Any
    run_back: Any
    if pyramid:
        run, run_back = pvt_ref.forward_pyramid_with_cache, pvt_ref.backward_pyramid
    else:
        run, run_back = pvt_ref.forward_with_cache, pvt_ref.backward
    y, cache = run(params, images, config, ops=REFERENCE)
    flat = y if pyramid else [y]
    dy = [normal(8 + i, *x.shape) for i, x in enumerate(flat)]
    _, dimages = run_back(params, cache, dy if pyramid else dy[0], config)
    up, down = (run(params, images + h * v, config, ops=REFERENCE)[0] for h in (1e-6, -1e-6))
    pairs = zip(up, down, dy, strict=True) if pyramid else [(up, down, dy[0])]
    slope = sum(((a - b) * d).sum() for a, b, d in pairs) / 2e-6
    np.testing.assert_allclose(slope, (dimages * v).sum(), rtol=1e-6)


def test_sizes_that_are_none_are_refused():
    config = SEGMENTORS["pvt"]
    for size in ((0, 32), (32, -1)):
        with pytest.raises(ShapeError, match="must be positive numbers of pixels"):
            config.fitting_size(*size)
    with pytest.raises(ShapeError, match="must be whole numbers of pixels"):
        config.grids(loose(32.5), 32)


# From logits to classes ---------------------------------------------------------------------------


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_windows_cover_all_and_end_at_the_border(size, crop, stride):
    crop = tuple(map(min, crop, size))
    stride = tuple(map(min, stride, crop))
    covered = np.zeros(size, int)
    places = list(windows(size, crop, stride))
    for down, right in places:
        assert covered[down, right].shape == crop
        covered[down, right] += 1
    assert covered.min() >= 1
    assert len(set(map(str, places))) == len(places)
    along = [
        max(side - part + step - 1, 0) // step + 1
        for side, part, step in zip(size, crop, stride, strict=True)
    ]
    assert len(places) == math.prod(along)
    assert (places[-1][0].stop, places[-1][1].stop) == size


@each
def test_one_window_is_the_whole(name):
    config, (size, _) = SEGMENTORS[name], SIZES[name]
    params, images = params_of(config), images_of(name)
    whole = resize_logits(pvt_ref.forward(params, images, config), size)
    for crop in (size, (500, 600), 500):
        slid = sliding_logits(params, images, config, crop, 1)
        np.testing.assert_array_equal(slid, whole)


def test_windows_are_averaged_where_they_overlap():
    config, images = SEGMENTORS["pvt"], normal(1, 2, 3, 32, 80)
    params = params_of(config)
    slid = sliding_logits(params, images, config, 32, (32, 24), ops=REFERENCE)
    total, covered = np.zeros((2, 4, 32, 80)), np.zeros(80)
    for left in (0, 24, 48):  # the last would begin at 48, and end at the border
        part = pvt_ref.forward(params, images[..., left : left + 32], config, ops=REFERENCE)
        total[..., left : left + 32] += torch_resized(part, (32, 32))
        covered[left : left + 32] += 1
    assert set(covered) == {1, 2}
    assert_near(slid, total / covered, FORWARD)


def test_windows_that_leave_gaps_are_refused():
    config = SEGMENTORS["pvt"]
    params, images = params_of(config), images_of("pvt")
    with pytest.raises(ShapeError, match="pixels between two windows would get no logits"):
        sliding_logits(params, images, config, 16, (16, 17))
    crop: Any
    stride: Any
    for crop, stride in ((0, 1), (16, 0), (16.0, 4), (16, (1, 2, 3))):
        with pytest.raises(ShapeError, match="must be a side or"):
            sliding_logits(params, images, config, crop, stride)
    bare = dataclasses.replace(PVT, num_classes=3)
    advice = r"classifies a whole picture, not its pixels.*with_segmentation_head\(model"
    with pytest.raises(ConfigError, match=advice):
        sliding_logits(params_of(bare), images, bare, 16, 16)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.one_of(st.none(), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    st.integers(1, 200),
)
def test_bands_are_the_whole_in_parts(grid, size, final, pixels):
    logits, final = normal(2, 1, 3, *grid), final or size
    whole = torch_resized(logits, size, final)
    rows, bands = 0, []
    for top, bottom, part in logit_bands(logits, size, final, pixels):
        assert top == rows
        assert part.shape == (1, 3, bottom - top, final[1])
        assert bottom - top == 1 or (bottom - top) * final[1] <= pixels
        rows = bottom
        bands.append(part)
    np.testing.assert_allclose(np.concatenate(bands, axis=2), whole, rtol=0, atol=1e-12)
    np.testing.assert_allclose(resize_logits(logits, size, final), whole, rtol=0, atol=1e-12)


# Model --------------------------------------------------------------------------------------------

INFO = ModelInfo(title="a small one", classes=CLASSES)


def model_of(name: str = "pvt", dtype: Any = np.float32, **info) -> Model:
    info = dataclasses.replace(INFO, **info)
    return Model(params_of(SEGMENTORS[name], 1, dtype), SEGMENTORS[name], info=info)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth one, so that a pixel's class does not hang by a thread."""
    small = rng_of(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("name", "size", "seen"),
    [("pvt", (50, 37), (32, 64)), ("naive", (40, 61), (56, 32)), ("pup", (32, 64), (64, 32))],
)
def test_a_picture_is_segmented_as_released(name, size, seen):
    """The short side has 32 pixels, then both are stretched; logits go back the same way."""
    model, photo = model_of(name, np.float64), picture(*size)
    (found,) = model.segment(photo)
    pixels = np.asarray(photo.resize(seen[::-1], Image.Resampling.BILINEAR)) / 255
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    x = ((pixels - mean) / std).transpose(2, 0, 1)[None]
    full = torch_resized(model(x), seen, size[::-1])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, full.argmax(axis=1)[0])
    assert len(np.unique(found)) > 1


def test_a_picture_is_looked_at_in_windows():
    model, photo = model_of(dtype=np.float64), picture(100, 50)
    (found,) = model.segment(photo, size=40, window=32)
    pixels = np.asarray(photo.resize((80, 40), Image.Resampling.BILINEAR)) / 255
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    x = ((pixels - mean) / std).transpose(2, 0, 1)[None]
    logits = sliding_logits(model.params, x, model.config, 32, 21)
    np.testing.assert_array_equal(found, torch_resized(logits, (50, 100)).argmax(axis=1)[0])
    assert (found != model.segment(photo, size=40)[0]).any()
    np.testing.assert_array_equal(
        model.segment(photo, size=32, window=(64, 64))[0], model.segment(photo, size=32)[0]
    )


def test_pictures_of_any_kind_and_number(tmp_path):
    model = model_of()
    photos = [picture(40, 33, 1), picture(33, 40, 2), picture(20, 20, 3)]
    paths = []
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    expected = model.segment(photos)
    assert [m.shape for m in expected] == [(33, 40), (40, 33), (20, 20)]
    with open(paths[0], "rb") as file:
        several: list[Any] = [model.segment(paths), model.segment(tuple(map(str, paths)))]
        one = model.segment(file)
    several.append(list(model.segment_each(iter(paths))))
    for maps in several:
        for a, b in zip(maps, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(one) == 1
    np.testing.assert_array_equal(one[0], expected[0])


def test_a_picture_that_cannot_be_read_stops_no_other(tmp_path):
    model, path = model_of(), tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n no more")
    good = picture(30, 30)
    answers = list(model.segment_each([good, path, tmp_path / "none.png", good]))
    assert isinstance(answers[1], ImageError)
    assert isinstance(answers[2], MissingFileError)
    np.testing.assert_array_equal(answers[0], answers[3])
    with pytest.raises(ImageError):
        model.segment([good, path])


def test_segment_refuses_what_it_cannot_do():
    model, photo = model_of(), picture(30, 30)
    with pytest.raises(ShapeError, match="the list of images is empty"):
        model.segment([])
    size: Any
    for size in (0, 2.5, (32, 32), 2**16):
        with pytest.raises(RangeError, match=r"size is .*; it must be a whole number"):
            model.segment(photo, size)
    window: Any
    for window in (0, (1, 2, 3), "32"):
        with pytest.raises(ShapeError, match="must be a side or"):
            model.segment(photo, window=window)
    backbone = dataclasses.replace(PVT, num_classes=3)
    classifier = Model(params_of(backbone), backbone)
    with pytest.raises(ConfigError, match="a PVT classifies a whole picture, not its pixels"):
        classifier.segment(photo)
    bands = model_of(preprocessing=Preprocessing("bands", (0.5,) * 3, (0.25,) * 3))
    with pytest.raises(ConfigError, match="mode 'bands', but pictures are in colour or grey"):
        bands.segment(photo)
    many = dataclasses.replace(SEGMENTORS["pvt"], num_classes=257)
    with pytest.raises(
        ConfigError, match="the model has 257 classes, but a class map holds one by"
    ):
        Model(params_of(many), many).segment(photo)
    grey = model_of(preprocessing=Preprocessing("L", (0.5,), (0.25,)))
    with pytest.raises(ConfigError, match="in_chans=3, but its preprocessing makes 1 channels"):
        grey.segment(photo)


def test_a_network_for_grey_pictures():
    config = dataclasses.replace(SEGMENTORS["pvt"], backbone=dataclasses.replace(PVT, in_chans=1))
    info = ModelInfo(classes=CLASSES, preprocessing=Preprocessing("L", (0.5,), (0.25,)))
    model, photo = Model(params_of(config), config, info=info), picture(32, 32)
    pixels = np.asarray(photo.convert("L")) / 255
    logits = model(((pixels - 0.5) / 0.25)[None, None])
    np.testing.assert_array_equal(
        model.segment(photo)[0], torch_resized(logits, (32, 32)).argmax(axis=1)[0]
    )


def test_predict_says_what_to_ask_instead():
    model = model_of()
    for images in (picture(30, 30), normal(1, 1, 3, 32, 32, dtype=np.float32)):
        with pytest.raises(ConfigError, match=r"a class for every pixel: model.segment\(images\)"):
            model.predict(images)
    with pytest.raises(ConfigError, match=r"model.segment"):
        model.predict_each([])


def test_weights_that_are_not_finite_are_refused_counts_or_not():
    config = SEGMENTORS["pvt"]
    params = map_arrays(np.array, params_of(config))
    params.buffers.decode_head.scale_heads[0][0].bn.running_var[0] = np.nan
    with pytest.raises(NonFiniteError, match=r"scale_heads\.0\.0\.bn\.running_var holds 1 val"):
        Model(params, config)


@each
def test_it_says_what_it_is(name):
    model = model_of(name)
    head = {"naive": "setr naive", "pup": "setr pup"}.get(name, "semantic_fpn")
    assert f"with {head}, 4 classes" in repr(model)
    assert model.classes == CLASSES
    text = model.summary()
    assert "decode_head.conv_seg" in text
    assert f"{pvt_ref.count_cost(model.config).parameters:,}" in text


@each
def test_parameters_are_pickled_and_copied(name):
    config = SEGMENTORS[name]
    params, images = params_of(config, dtype=np.float32), images_of(name)
    expected = pvt_ref.forward(params, images, config)
    for again in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), to_numpy(params)):
        assert type(again) is SegmentorParams
        np.testing.assert_array_equal(pvt_ref.forward(again, images, config), expected)
    assert pickle.loads(pickle.dumps(config)) == config
    model = pickle.loads(pickle.dumps(Model(params, config, info=INFO)))
    np.testing.assert_array_equal(model(images), expected)
    moved = to_device(Model(params, config), "cpu")
    np.testing.assert_array_equal(moved(images), expected)


@each
def test_a_new_head_and_what_stays_as_it_is(name):
    model = model_of(name, colours=tuple((k, k, k) for k in range(4)))
    other = pvt_ref.with_new_head(model, 9, rng_of(2))
    assert other.info.colours == ()
    assert other.config == dataclasses.replace(model.config, num_classes=9)
    old, new = dict(named_arrays(model.params)), dict(named_arrays(other.params))
    drawn = {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    assert {key for key in old if new[key] is not old[key]} == drawn
    assert 0.005 < new["decode_head.conv_seg.weight"].std() < 0.02
    assert other.classes == tuple("012345678")
    with pytest.raises(ConfigError, match=r"another size to each call: model.segment\(pictures, s"):
        pvt_ref.with_image_size(model, 64)
    with pytest.raises(ConfigError, match="a segmentation network has no first layer"):
        pvt_ref.with_channels(model, 1)


def test_a_new_head_forgets_the_classes_and_their_colours():
    config, grey = SEGMENTORS["pvt"], Preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3)
    info = ModelInfo(
        title="four kinds of things",
        classes=CLASSES,
        colours=loose([(k, k, k) for k in range(4)]),
        preprocessing=grey,
        training={"data": "streets"},
    )
    model = Model(pvt_ref.init_params(config, rng_of(0)), config, info=info)
    left = ModelInfo(preprocessing=grey)
    assert pvt_ref.with_new_head(model, 3, rng_of(1)).info == left
    backbone = dataclasses.replace(config.backbone, num_classes=4)
    classifier = Model(pvt_ref.init_params(backbone, rng_of(0)), backbone, info=info)
    assert pvt_ref.with_segmentation_head(classifier, config.head, 3, rng_of(1)).info == left


def test_a_new_segmentation_head_keeps_the_tables_rows_of_places():
    """A classifier's last table has a row for the class token, which comes first."""
    config = dataclasses.replace(PVT, num_classes=5)
    classifier = Model(params_of(config), config)
    made = pvt_ref.with_segmentation_head(classifier, SEGMENTORS["pvt"].head, 3, rng_of(1))
    given, kept = (pvt_ref.to_state_dict(m.params) for m in (classifier, made))
    for stage in (1, 2, 3):
        np.testing.assert_array_equal(
            kept[f"backbone.pos_embed{stage}"], given[f"pos_embed{stage}"]
        )
    np.testing.assert_array_equal(kept["backbone.pos_embed4"], given["pos_embed4"][:, 1:])


def test_advice_names_a_network_that_is_there():
    for make in (
        lambda: SegmentorConfig(backbone=None),
        lambda: SETRHead(channels=0),
        lambda: SemanticFPNHead(channels=0),
    ):
        with pytest.raises(ConfigError, match=r"Start from VARIANTS\['(\w+)'\]") as caught:
            make()
        (name,) = re.findall(r"VARIANTS\['(\w+)'\] and", str(caught.value))
        assert architecture_of(VARIANTS[name]).dense


# What watched runs tell ---------------------------------------------------------------------------


@each
def test_its_bill(name):
    config, (size, grid) = SEGMENTORS[name], SIZES[name]
    cost = pvt_ref.count_cost(config, size, batch=2)
    shapes, skipped = param_shapes(config), buffer_keys(config)
    assert cost.parameters == sum(
        math.prod(shape) for key, shape in shapes.items() if key not in skipped
    )
    seg = next(item for item in cost.items if item.operation == "decode_head.conv_seg")
    cells = {"naive": 3 * 5, "pup": 32 * 48}.get(name, math.prod(grid))
    cells *= 16 if name == "naive" else 1
    assert seg.macs == 2 * cells * config.head.channels * 4
    alone = pvt_ref.count_cost(config.backbone, size, batch=2)
    assert cost.macs > alone.macs
    assert pvt_ref.count_cost(config, size, 2, pyramid=True).macs == alone.macs
    assert cost.peak_bytes > 0
    kept = cache_bytes(config, size, 2, ops=REFERENCE)
    assert sum(kept.values()) == cost.cache_bytes
    stretched = pvt_ref.count_cost(config, (33, 33))
    fitting = config.fitting_size(33, 33)
    assert stretched.macs == pvt_ref.count_cost(config, fitting).macs


@pytest.mark.parametrize("ops", [None, REFERENCE], ids=["default", "reference"])
@each
def test_where_it_looks_and_how_long_it_takes(name, ops):
    config, images = SEGMENTORS[name], images_of(name)
    params = params_of(config)
    maps = pvt_ref.attention_maps(params, images, config, ops=ops)
    theirs = pvt_ref.attention_maps(params.backbone, images, config.backbone, ops=ops)
    assert maps.keys() == theirs.keys()
    assert maps
    for place, weights in maps.items():
        np.testing.assert_array_equal(weights, theirs[place])
    times = time_stages(params, images, config, repeats=1, ops=ops)
    assert len(times) == len(config.channels) + 1
    assert all(seconds >= 0 for seconds in times)
    parts = time_operations(params, images, config, repeats=1, ops=ops)
    assert any(part.startswith("decode_head") for _, part in parts)


# Operations ---------------------------------------------------------------------------------------


#: What only some networks ask for.
OF_SOME = {
    "linear_sra": "linear",
    "pool": "linear",
    "depthwise_conv": "linear",
    "conv_mlp": "linear",
    "setr": "pup",
    "mha": "pup",
    "block": "pvt",
}
OPERATIONS = sorted(SEGMENTOR.operations, key=lambda op: op.name)


@pytest.mark.parametrize("table", ["blocked", "reference"], indirect=True)
@pytest.mark.parametrize("op", OPERATIONS, ids=repr)
def test_replacing_any_operation_takes_effect(op, table):
    base = blocked_ops() if table == "blocked" else REFERENCE
    name, calls = OF_SOME.get(op.name, "pvt"), Counter()
    config, images = SEGMENTORS[name], images_of(name)
    if op.name in ("dropout", "drop_path", "dropout_channels"):
        backbone = dataclasses.replace(config.backbone, drop_rate=0.2)
        config = dataclasses.replace(config, backbone=backbone)
    if op is resize:
        images = images[..., :-1]  # which is stretched
    params = params_of(config)

    def run(ops):
        logits, cache = pvt_ref.forward_with_cache(
            params, images, config, Draws(1, 1), batch_statistics=True, ops=ops
        )
        return logits, *pvt_ref.backward(params, cache, np.ones_like(logits), config)[1:]

    expected, same = run(base), run(base.replace(op, counted(op, calls)))
    assert calls[f"{op.name}.forward"] > 0
    for x, y in zip(same, expected, strict=True):
        assert_near(x, y, 1e-9)
    other = run(base.replace(op, counted(op, calls, factor=1.25)))
    assert max(relative(x, y) for x, y in zip(other, expected, strict=True)) > 1e-6


def test_a_twin_is_computed_instead():
    def twice_forward(p, x, ops, buffers, batch_statistics, drop_rate=0.0, rng=None, keep=True):
        y, cache = semantic_fpn.forward(
            p, x, ops, buffers, batch_statistics, drop_rate, rng, keep=keep
        )
        return 2 * y, cache

    def twice_backward(p, cache, dy, ops):
        return semantic_fpn.backward(p, cache, 2 * dy, ops)

    config, images = SEGMENTORS["pvt"], images_of("pvt")
    params, twin = params_of(config), Operation(twice_forward, twice_backward)
    logits, cache = pvt_ref.forward_with_cache(params, images, config)
    _, dimages = pvt_ref.backward(params, cache, logits, config)
    for base in (REFERENCE, blocked_ops()):
        ops = base.replace(semantic_fpn, twin)
        double, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
        assert_near(double, 2 * logits, FORWARD)
        _, dx = pvt_ref.backward(params, cache, logits, config)
        assert_near(dx, 2 * dimages, 1e-10)


def test_an_operation_that_it_never_asks_for_is_refused():
    config = SEGMENTORS["pvt"]
    ops = REFERENCE.replace(mla_head, mla_head)
    with pytest.raises(ConfigError, match="ops replaces mla_head, which a segmentation network"):
        pvt_ref.forward(params_of(config), images_of("pvt"), config, ops=ops)
    backbone = dataclasses.replace(PVT, num_classes=3)
    ops = REFERENCE.replace(batch_norm, batch_norm)
    with pytest.raises(ConfigError, match="ops replaces batch_norm, which a PVT never asks for"):
        pvt_ref.forward(params_of(backbone), images_of("pvt"), backbone, ops=ops)
    assert relu in SEGMENTOR.operations


# Wrong arguments ----------------------------------------------------------------------------------


def test_batch_statistics_is_a_choice_of_networks_with_batch_norm():
    config, images = SEGMENTORS["pvt"], images_of("pvt")
    params = params_of(config)
    flag: Any
    for flag in (1, None, "yes"):
        with pytest.raises(RangeError, match=r"batch_statistics is .*; it must be True or False"):
            pvt_ref.forward_with_cache(params, images, config, batch_statistics=flag)
    classifier = dataclasses.replace(PVT, num_classes=3)
    with pytest.raises(ConfigError, match=r"batch_statistics is True, but a PVT has no batch norm"):
        pvt_ref.forward_with_cache(params_of(classifier), images, classifier, batch_statistics=True)


def test_wrong_arguments_are_refused():
    config, images = SEGMENTORS["pvt"], images_of("pvt")
    params = params_of(config)
    logits, cache = pvt_ref.forward_with_cache(params, images, config)
    with pytest.raises(ShapeError, match="dlogits has shape"):
        pvt_ref.backward(params, cache, logits[..., 1:], config)
    with pytest.raises(ArrayTypeError, match="cache is that of forward_with_cache"):
        pvt_ref.backward_pyramid(params, cache, [None] * 4, config)
    other = dataclasses.replace(config, num_classes=5)
    with pytest.raises(ShapeError, match="params do not belong to this config: 2 arrays differ"):
        pvt_ref.forward(params, images, other)
    with pytest.raises(ShapeError, match="made with another config; the two differ in backbone"):
        pvt_ref.backward(params, cache, logits, config.with_drop_path_rate(0.1))
    with pytest.raises(ShapeError, match="images have 2 channels"):
        pvt_ref.forward(params, images[:, :2], config)
    with pytest.raises(ArrayTypeError, match="they belong to different networks"):
        pvt_ref.forward(params.backbone, images, config)
    with pytest.raises(ArrayTypeError, match="they belong to different networks"):
        pvt_ref.forward_pyramid(params, images, config.backbone)
    floats = map_arrays(lambda x: x.astype(np.float64), params)
    with pytest.raises(ArrayTypeError, match="num_batches_tracked has dtype float64; it counts"):
        pvt_ref.forward(floats, images, config)
    with pytest.raises(ConfigError, match="a segmentation network gives one map for each stage"):
        pvt_ref.forward_pyramid(params, images, config, blocks=[0])


def test_a_state_dict_keeps_counts_whole_whatever_the_dtype():
    config = SEGMENTORS["pvt"]
    state = pvt_ref.to_state_dict(params_of(config, dtype=np.float32))
    halves = {k: x if k in count_keys(config) else x.astype(np.float16) for k, x in state.items()}
    small = {k: x.astype(np.int32) if k in count_keys(config) else x for k, x in halves.items()}
    params = pvt_ref.from_state_dict(small, config)
    for key, x in named_arrays(params):
        assert x.dtype == (np.int64 if key in count_keys(config) else np.float32), key
    assert len(count_keys(config)) == 7
    wrong = halves | {next(iter(count_keys(config))): np.array(1.0)}
    with pytest.raises(ArrayTypeError, match="it counts batches, and must be integer"):
        pvt_ref.from_state_dict(wrong, config)


def test_published_vits_can_carry_a_head():
    config = SegmentorConfig(
        backbone=dataclasses.replace(VITS["deit_s_16"], num_classes=0), head=SETRHead()
    )
    cost = pvt_ref.count_cost(config, 512)
    alone = pvt_ref.count_cost(config.backbone, 512)
    assert round((cost.macs - alone.macs) / 1e9, 2) == 0.73
    pup = dataclasses.replace(config, head=SETRHead(upsampling="pup"))
    assert round((pvt_ref.count_cost(pup, 512).macs - alone.macs) / 1e9, 1) == 61.7
