"""What records show of themselves fits a screen and says what matters: shapes, not numbers."""

import dataclasses
import importlib
import pkgutil
from dataclasses import replace

import numpy as np
import pytest
from strategies import normal, random_params

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, Model, ModelInfo, blocked_ops, count_cost
from pvt_ref.layers.linear import LinearParams
from pvt_ref.ops import Ops
from pvt_ref.tree import map_arrays, named_arrays, short_repr

SMALL = replace(
    VARIANTS["pvt_tiny"],
    img_size=32,
    num_classes=5,
    embed_dims=(4, 8, 4, 8),
    num_heads=(1, 2, 1, 2),
    mlp_ratios=(1, 1, 1, 1),
    drop_path_rate=0.1,
)
PARAMS = random_params(SMALL, 1)
IMAGES = normal(1, 2, 3, 64, 32)  # not the tables' size: they are resized


def records(tree):
    """Every record in a tree, the tree itself included."""
    if dataclasses.is_dataclass(tree):
        yield tree
        for field in dataclasses.fields(tree):
            yield from records(getattr(tree, field.name))
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from records(branch)


def trees():
    model = Model(PARAMS, SMALL)
    yield from (PARAMS, PARAMS.of_stage(2), model, count_cost(SMALL), count_cost(SMALL).of_stage(2))
    for ops in (blocked_ops(), REFERENCE):
        for rng in (None, np.random.default_rng(0)):
            logits, cache = pvt_ref.forward_with_cache(PARAMS, IMAGES, SMALL, rng, ops=ops)
            yield cache
            yield pvt_ref.backward(PARAMS, cache, logits, SMALL)[0]
        yield pvt_ref.forward_pyramid_with_cache(PARAMS, IMAGES, SMALL, ops=ops)[1]


def test_every_record_of_arrays_is_a_line():
    seen = set()
    for tree in trees():
        for record in (tree, *records(tree)):
            if isinstance(record, Ops | ModelInfo):
                continue
            text = repr(record)
            assert len(text) < 700, text
            assert "\n" not in text
            seen.add(type(record).__name__)
    assert {"SRACache", "BlockCache", "SoftmaxCache", "KeptCache", "DropCache"} <= seen


def test_no_record_of_arrays_prints_numbers():
    for module in pkgutil.walk_packages(pvt_ref.__path__, "pvt_ref."):
        if module.name.endswith("__main__"):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
                continue
            holds = any(
                str(field.type) in ("Array", "np.ndarray", "Array | None")
                for field in dataclasses.fields(kind)
            )
            if holds and not kind.__name__.startswith(("_", "LabelledImages")):
                assert kind.__repr__ is short_repr, kind


def test_a_record_of_arrays_shows_shapes_and_dtypes():
    head = LinearParams(np.zeros((64, 3), np.float32), None)
    assert repr(head) == "LinearParams(weight (64, 3) float32, bias None)"
    fc1 = "fc1=(4, 4)"
    assert fc1 not in repr(PARAMS.block1[0])
    count = sum(x.size for _, x in named_arrays(PARAMS.block1[0]))
    arrays = len(list(named_arrays(PARAMS.block1[0])))
    expected = f"BlockParams({count:,} numbers in {arrays} arrays, float64, numpy)"
    assert repr(PARAMS.block1[0]) == expected
    mixed = replace(PARAMS, cls_token=PARAMS.cls_token.astype(np.float32))
    assert "float32, float64, numpy" in repr(mixed)
    broken = LinearParams([1, 2], "x" * 1000)  # type: ignore[arg-type]
    assert len(repr(broken)) < 200


def test_a_model_says_what_it_is():
    model = Model(PARAMS, SMALL, "read from\x1b[31m weights.pth\nline two")
    count = sum(x.size for _, x in named_arrays(PARAMS))
    assert repr(model) == (
        f"Model(custom configuration, 5 classes, 32 px: {count:,} numbers in 161 arrays, float64, "
        r"numpy; 'read from\x1b[31m weights.pth\nline two')"
    )
    config = VARIANTS["pvt_tiny"]
    tiny = Model(pvt_ref.init_params(config, np.random.default_rng(0)), config, "x" * 10_000)
    assert repr(tiny).startswith("Model(pvt_tiny, 1000 classes, 224 px: 13,229,288 numbers in ")
    assert len(repr(tiny)) < 400
    bare = replace(config, num_classes=0)
    text = repr(Model(pvt_ref.init_params(bare, np.random.default_rng(0)), bare))
    assert "pvt_tiny, no classifier, 224 px" in text


def test_a_model_of_another_library_says_which():
    array_api_strict = pytest.importorskip("array_api_strict")
    there = map_arrays(array_api_strict.asarray, Model(PARAMS, SMALL))
    assert "float64, array_api_strict" in repr(there)


def test_a_bill_says_its_totals():
    cost = count_cost(VARIANTS["pvt_tiny"], (224, 320), batch=2)
    assert repr(cost) == (
        f"Cost(image 224x320, batch 2, float32: 13,229,288 parameters, "
        f"{cost.macs / 1e6:,.2f} MMACs, {cost.peak_bytes / 2**20:,.2f} MiB at most)"
    )
