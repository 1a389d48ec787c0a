"""The shape comments of layers, blocks and model hold: they are executed, see shape_comments.py."""

import importlib
import itertools
import pkgutil
import re
import types

import numpy as np
import pytest
from shape_comments import ShapeComments, find_shapes, parse_dim, spelt

import pvt_ref
import pvt_ref.blocks
import pvt_ref.layers
from pvt_ref import PVTConfig
from pvt_ref.layers.cross_entropy import cross_entropy
from pvt_ref.layers.position import position
from pvt_ref.models.pvt import model
from pvt_ref.ops import REFERENCE

#: Sizes that coincide nowhere within a stage, not even those that are made of others.
B, H, W, K = 11, 48, 112, 13
CONFIG = PVTConfig(
    img_size=32,  # so the tables are resized
    in_chans=5,
    num_classes=K,
    patch_sizes=(2, 2, 2, 2),
    embed_dims=(10, 15, 32, 8),
    num_heads=(2, 3, 4, 2),
    mlp_ratios=(3, 4, 5, 5),
    depths=(1, 2, 1, 1),
    sr_ratios=(4, 2, 2, 1),
    drop_rate=0.1,
    attn_drop_rate=0.1,
    drop_path_rate=0.1,
)
GRIDS = ((H, W), *CONFIG.grids(H, W))
STAGES = {
    "C": (CONFIG.in_chans, *CONFIG.embed_dims),
    "H": tuple(h for h, _ in GRIDS),
    "W": tuple(w for _, w in GRIDS),
}


def modules() -> list[types.ModuleType]:
    """Every file of layers and blocks, and the model."""
    found = [model]
    for package in (pvt_ref.layers, pvt_ref.blocks):
        for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            found.append(importlib.import_module(file.name))
    return found


@pytest.fixture(scope="module")
def comments() -> ShapeComments:
    """After a classifier and a pyramid, forward and backward, and what is in neither."""
    rng = np.random.default_rng(0)
    params = pvt_ref.init_params(CONFIG, rng)
    images = rng.standard_normal((B, CONFIG.in_chans, H, W), np.float32)
    comments = ShapeComments(modules(), STAGES)
    with comments:
        logits, cache = model.forward(params, images, CONFIG, REFERENCE, rng)
        model.backward(params, cache, logits, REFERENCE)
        maps, cache = model.forward_pyramid(params, images, CONFIG, REFERENCE, rng)
        model.backward_pyramid(params, cache, maps, REFERENCE)

        labels = np.arange(B)
        cross_entropy(logits, labels, ignore_index=3)
        logit_maps = rng.standard_normal((B, K, 3, 7))
        cross_entropy(logit_maps, np.zeros((B, 3, 7), int), ignore_index=3)
        # a model's own tables are square, so h and w would be one number
        table, x = rng.standard_normal((1, 1 + 4 * 9, 8)), rng.standard_normal((B, 1 + 3 * 7, 8))
        _, cache = position.forward(table, x, REFERENCE, (3, 7), (4, 9), True)
        position.backward(table, cache, x)
    return comments


def test_every_comment_holds(comments):
    assert len(comments.comments) > 90
    assert not comments.faults, "\n".join(comments.faults)


def test_every_comment_is_reached_and_every_shape_that_it_offers(comments):
    assert not comments.unreached()


def test_a_wrong_last_dimension_is_caught_in_every_comment(comments):
    assert not comments.survivors()


def test_another_letter_is_caught_in_every_place(comments):
    assert not comments.confusable(), "\n".join(comments.confusable())
