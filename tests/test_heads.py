"""Heads agree with MMSegmentation's elementwise, and obey the laws of the layers in them.

The golden numbers were computed once by mmsegmentation 0.13 (Semantic FPN) and 0.30 (SETR), for
weights and maps that are drawn here again; see golden/README.md. That each operation equals
PyTorch's on small maps, on every array library, say the tests of all operations (operations.py).
"""

import dataclasses
import functools
import itertools
import math
import zlib
from collections import Counter
from pathlib import Path

import array_api_strict
import numpy as np
import pytest
from closeness import FORWARD, GRADIENT, assert_near
from hypothesis import given
from hypothesis import strategies as st
from operations import HEIGHTS, READABLE, WIDTHS, table_under_test
from strategies import normal, rng_of, seeds
from test_golden import assert_digest, draw

from pvt_ref import cross_entropy
from pvt_ref.errors import ShapeError
from pvt_ref.heads import mla as mla_file
from pvt_ref.heads import semantic_fpn as semantic_fpn_file
from pvt_ref.heads import setr as setr_file
from pvt_ref.heads.conv_unit import ConvUnitBuffers, ConvUnitParams, conv_unit
from pvt_ref.heads.fpn import FPNConvParams, FPNParams, fpn
from pvt_ref.heads.mla import mla_head, mla_neck
from pvt_ref.heads.semantic_fpn import semantic_fpn
from pvt_ref.heads.setr import setr
from pvt_ref.layers.batch_norm import BatchNormBuffers, BatchNormParams, moved
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.resize import resize
from pvt_ref.models import head_parts
from pvt_ref.ops import REFERENCE, Operation
from pvt_ref.report.shapes import Shapes
from pvt_ref.tree import map_arrays, map_named, named_arrays

FOLDER = Path(__file__).parent / "golden"


@functools.cache
def golden(name: str):
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(params=["blocked", "reference"], autouse=True)
def table(request, monkeypatch):
    """Every test runs with the kernels and with the readable layers."""
    monkeypatch.setenv("PVT_REF_OPS", request.param)
    return table_under_test()


def first(x: np.ndarray) -> np.ndarray:
    """Channels first."""
    return np.moveaxis(x, -1, 1)


def last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def by_recipe(seed: int, prefix: str = ""):
    """The ``make`` of builders that draws an array as the golden files' recipe has it."""

    def make(leaf):
        key = prefix + leaf.key
        x = draw(key, leaf.shape, seed)
        if key.endswith("num_batches_tracked"):
            return np.array(0)
        if key.endswith("running_var"):
            return 0.5 + np.abs(x)
        if key.endswith("running_mean"):
            return 0.1 * x
        if len(leaf.shape) == 1:
            return 1 + 0.2 * x if key.endswith(".weight") else 0.1 * x
        return x / np.sqrt(np.prod(leaf.shape[1:]))

    return make


def assert_gradients(tag: str, named: dict, seed: int, numbers, noise: tuple[str, ...] = ()):
    """Of every entry of tag, and of no other; noise is 0 but for rounding."""
    assert {f"{tag}/grad/{key}" for key in named} == {
        name for name in numbers if name.startswith(f"{tag}/grad/")
    }
    largest = max(np.abs(g).max() for g in named.values())
    for key, g in named.items():
        name = f"{tag}/grad/{key}"
        if key in noise:
            assert np.abs(g).max() < 1e-12 * largest
        else:
            assert_digest(name, g, seed, numbers, GRADIENT)


def assert_buffers(tag: str, buffers, prefix: str, numbers):
    """The running statistics after a step: every entry, and one batch counted."""
    named = dict(named_arrays(buffers))
    counts = {key for key in named if key.endswith("num_batches_tracked")}
    assert {f"{tag}/after/{prefix}{key}" for key in named.keys() - counts} >= {
        name for name in numbers if name.startswith(f"{tag}/after/{prefix}")
    }
    for key, x in named.items():
        if key in counts:
            assert x == 1
        elif f"{tag}/after/{prefix}{key}" in numbers:
            expected = numbers[f"{tag}/after/{prefix}{key}"]
            np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-14, err_msg=key)


def assert_output(name: str, x: np.ndarray, seed: int, numbers) -> None:
    expected = numbers[name]
    if expected.ndim == 1:
        assert_digest(name, x, seed, numbers, 1e-12)
    else:
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# Semantic FPN ---------------------------------------------------------------------------------

CASES = {  # seed, B, sizes and channels of the maps, neck, head, classes, size of the labels
    "fpn_64x96": (
        *(31, 2, ((16, 24), (8, 12), (4, 6), (2, 3)), (12, 24, 40, 48), 16, 8, 7),
        (64, 96),
    ),
    "fpn_odd_60x44": (
        *(32, 3, ((15, 11), (8, 6), (4, 3), (2, 2)), (8, 12, 20, 24), 12, 10, 5),
        (60, 44),
    ),
}


class GivenMask:
    """A generator that draws one mask: 1 where a channel is kept."""

    def __init__(self, kept: np.ndarray):
        self.kept = kept

    def random(self, shape, dtype):
        assert shape == (self.kept.shape[0], 1, 1, self.kept.shape[1])
        return self.kept.astype(dtype).reshape(shape)


class SemanticFPN:
    """Neck and head of a case, from maps to logits and back."""

    def __init__(self, case: str, table):
        self.seed, self.B, sizes, widths, C, D, self.K, self.label_size = CASES[case]
        make = by_recipe(self.seed, "neck.")
        self.neck = head_parts.build_fpn(make, widths, C)
        make = by_recipe(self.seed, "decode_head.")
        self.head = head_parts.build_semantic_fpn(make, C, D, self.K)
        self.buffers = head_parts.build_semantic_fpn_buffers(make, D)
        shapes = [(self.B, C_i, *size) for C_i, size in zip(widths, sizes, strict=True)]
        self.maps = [last(draw(f"map{i}", shape, self.seed)) for i, shape in enumerate(shapes)]
        self.table = table

    def forward(self, batch_statistics: bool, rate: float = 0.0, rng=None):
        """Q_1..Q_4, the logits, and both caches."""
        ops = self.table
        levels, neck_cache = ops[fpn].forward(self.neck, self.maps, ops)
        logits, cache = ops[semantic_fpn].forward(
            self.head, levels, ops, self.buffers, batch_statistics, rate, rng
        )
        return levels, logits, neck_cache, cache

    def backward(self, neck_cache, cache, dlogits, dlevels=None):
        """Gradients by the golden file's names."""
        ops = self.table
        through, dhead = ops[semantic_fpn].backward(self.head, cache, dlogits, ops)
        if dlevels is not None:
            through = [a + b for a, b in zip(through, dlevels, strict=True)]
        dmaps, dneck = ops[fpn].backward(self.neck, neck_cache, through, ops)
        named = {f"map{i}": first(x) for i, x in enumerate(dmaps)}
        named |= named_arrays(dneck, "neck")
        return named | dict(named_arrays(dhead, "decode_head"))


@pytest.mark.parametrize("batch_statistics", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_neck_and_head_equal_mmsegmentations(case, batch_statistics, table):
    numbers, net = golden("semantic_fpn"), SemanticFPN(case, table)
    tag = f"{case}/{'train' if batch_statistics else 'eval'}"
    levels, logits, neck_cache, cache = net.forward(batch_statistics)
    for i, x in enumerate([*levels, logits]):
        assert_output(f"{tag}/out{i}", first(x), net.seed, numbers)
    dlevels = [last(draw(f"{tag}/dy{i}", first(x).shape, net.seed)) for i, x in enumerate(levels)]
    dlogits = last(draw(f"{tag}/dy4", first(logits).shape, net.seed))
    named = net.backward(neck_cache, cache, dlogits, dlevels)
    assert_gradients(tag, named, net.seed, numbers)
    after = moved(net.buffers, semantic_fpn_file.statistics(cache))
    if batch_statistics:
        assert_buffers(tag, after, "decode_head.", numbers)
    else:
        for (_, a), (_, b) in zip(named_arrays(after), named_arrays(net.buffers), strict=True):
            assert a is b


@pytest.mark.parametrize("case", CASES)
def test_dropped_channels_equal_mmsegmentations(case, table):
    numbers, net, tag = golden("semantic_fpn"), SemanticFPN(case, table), f"{case}/dropout"
    D = net.head.conv_seg.weight.shape[1]
    kept = draw("dropout", (net.B, D), net.seed) > -0.5
    assert not kept.all()
    _, logits, neck_cache, cache = net.forward(True, 0.1, GivenMask(kept))
    assert_output(f"{tag}/out0", first(logits), net.seed, numbers)
    dlogits = last(draw(f"{tag}/dy0", first(logits).shape, net.seed))
    assert_gradients(tag, net.backward(neck_cache, cache, dlogits), net.seed, numbers)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_pixels_equals_mmsegmentations(case, table):
    numbers, net, tag = golden("semantic_fpn"), SemanticFPN(case, table), f"{case}/loss"
    rng = np.random.default_rng([net.seed, zlib.crc32(b"labels")])
    shape = (net.B, *net.label_size)
    labels = rng.integers(0, net.K, shape)
    labels[rng.random(shape) < 0.2] = 255
    histogram = np.bincount(labels.ravel(), minlength=256)
    np.testing.assert_array_equal(histogram, numbers[f"{tag}/labels_histogram"])
    _, logits, neck_cache, cache = net.forward(True)
    ops = table
    large, resized = ops[resize].forward(None, logits, ops, net.label_size)
    loss, dlarge = cross_entropy(first(large), labels, reduction="mean_of_all", ignore_index=255)
    np.testing.assert_allclose(loss, numbers[f"{tag}/value"], rtol=1e-12)
    dlogits, _ = ops[resize].backward(None, resized, last(dlarge), ops)
    named = {"logits": first(dlogits), **net.backward(neck_cache, cache, dlogits)}
    assert_gradients(tag, named, net.seed, numbers)
    right = np.argmax(large, axis=-1) == labels
    np.testing.assert_allclose(100 * right.mean(), numbers[f"{tag}/acc_seg"], rtol=1e-6)


# SETR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_statistics", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "kernel", "convs"), [("naive", 1, 1), ("pup", 3, 4)])
def test_setr_equals_mmsegmentations(case, kernel, convs, batch_statistics, table):
    numbers, seed, ops, scale = golden("vit_setr"), 43, table, 4 if kernel == 1 else 2
    tag = f"setr_4x6_{case}/{'train' if batch_statistics else 'eval'}"
    D = numbers[f"setr_4x6_{case}/train/after/up_convs.0.0.bn.running_mean"].shape[0]
    make = by_recipe(seed)
    p = head_parts.build_setr(make, 24, D, 5, convs, kernel)
    buffers = head_parts.build_setr_buffers(make, D, convs)
    x = last(draw("map", (2, 24, 4, 6), seed))
    logits, cache = ops[setr].forward(p, x, ops, buffers, batch_statistics, scale)
    assert_output(f"{tag}/out0", first(logits), seed, numbers)
    dlogits = last(draw(f"{tag}/dy0", first(logits).shape, seed))
    dx, grads = ops[setr].backward(p, cache, dlogits, ops)
    named = {"map": first(dx), **dict(named_arrays(grads))}
    noise = ("norm.bias",) if batch_statistics and kernel == 1 else ()
    assert_gradients(tag, named, seed, numbers, noise)
    if batch_statistics:
        assert_buffers(tag, moved(buffers, setr_file.statistics(cache)), "", numbers)
    else:
        full, _ = ops[resize].forward(None, logits, ops, (64, 96))
        assert_output(f"{tag}/full", first(full), seed, numbers)


@pytest.mark.parametrize("batch_statistics", [True, False], ids=["train", "eval"])
def test_mla_equals_mmsegmentations(batch_statistics, table):
    numbers, seed, ops = golden("vit_setr"), 45, table
    tag = f"mla_4x6/{'train' if batch_statistics else 'eval'}"
    make = by_recipe(seed, "neck.")
    neck = head_parts.build_mla_neck(make, 20, 12)
    neck_buffers = head_parts.build_mla_neck_buffers(make, 12)
    make = by_recipe(seed, "decode_head.")
    head = head_parts.build_mla_head(make, 12, 6, 5)
    head_buffers = head_parts.build_mla_head_buffers(make, 6)
    maps = [last(draw(f"map{j}", (2, 20, 4, 6), seed)) for j in range(4)]
    sums, neck_cache = ops[mla_neck].forward(neck, maps, ops, neck_buffers, batch_statistics)
    logits, cache = ops[mla_head].forward(head, sums, ops, head_buffers, batch_statistics)
    for j, x in enumerate([*sums, logits]):
        assert_output(f"{tag}/out{j}", first(x), seed, numbers)
    dsums = [last(draw(f"{tag}/dy{j}", first(x).shape, seed)) for j, x in enumerate(sums)]
    dlogits = last(draw(f"{tag}/dy4", first(logits).shape, seed))
    through, dhead = ops[mla_head].backward(head, cache, dlogits, ops)
    dsums = [a + b for a, b in zip(dsums, through, strict=True)]
    dmaps, dneck = ops[mla_neck].backward(neck, neck_cache, dsums, ops)
    named = {f"map{j}": first(x) for j, x in enumerate(dmaps)}
    named |= dict(named_arrays(dneck, "neck")) | dict(named_arrays(dhead, "decode_head"))
    noise = [f"neck.norm.{j}.bias" for j in range(4)] if batch_statistics else []
    assert_gradients(tag, named, seed, numbers, tuple(noise))
    if batch_statistics:
        after = moved(neck_buffers, mla_file.neck_statistics(neck_cache)).mla
        for kind in ("channel_proj", "feat_extract"):
            for new, old, unit in zip(
                getattr(after, kind),
                getattr(neck_buffers.mla, kind),
                getattr(neck_cache, kind),
                strict=True,
            ):
                expected = 0.9 * old.bn.running_mean + 0.1 * unit.bn.mean
                np.testing.assert_allclose(new.bn.running_mean, expected, rtol=1e-13)
        of_head = moved(head_buffers, mla_file.head_statistics(cache)).up_convs
        for j, k in itertools.product(range(4), range(2)):
            old, unit = head_buffers.up_convs[j][k].bn, cache.up_convs[j][k].bn
            expected = 0.9 * old.running_mean + 0.1 * unit.mean
            np.testing.assert_allclose(of_head[j][k].bn.running_mean, expected, rtol=1e-13)


# Names and sizes ------------------------------------------------------------------------------


def zeros(leaf):
    return np.zeros(leaf.shape)


def test_keys_come_in_the_order_of_mmsegmentations_files():
    # so the golden file has them: it was written in the order of the state dict
    for file, case, trees in (
        (
            "semantic_fpn",
            "fpn_64x96",
            {
                "neck": head_parts.build_fpn(zeros, (12, 24, 40, 48), 16),
                "decode_head": head_parts.build_semantic_fpn(zeros, 16, 8, 7),
            },
        ),
        ("vit_setr", "setr_4x6_pup", {"": head_parts.build_setr(zeros, 24, 12, 5, 4, 3)}),
        (
            "vit_setr",
            "mla_4x6",
            {
                "neck": head_parts.build_mla_neck(zeros, 20, 12),
                "decode_head": head_parts.build_mla_head(zeros, 12, 6, 5),
            },
        ),
    ):
        tag = f"{case}/train/grad/"
        theirs = [name.removeprefix(tag) for name in golden(file) if name.startswith(tag)]
        ours = [key for prefix, tree in trees.items() for key, _ in named_arrays(tree, prefix)]
        assert ours == [key for key in theirs if not key.startswith("map")]


def test_every_array_stands_where_its_leaf_says():
    made: list[str] = []

    def make(leaf):
        made.append(leaf.key)
        return np.full(leaf.shape, len(made))

    for build in (
        lambda: head_parts.build_fpn(make, (3, 4), 5),
        lambda: head_parts.build_semantic_fpn(make, 5, 6, 7),
        lambda: head_parts.build_semantic_fpn_buffers(make, 6),
        lambda: head_parts.build_setr(make, 8, 6, 7, 4, 3),
        lambda: head_parts.build_setr_buffers(make, 6, 4),
        lambda: head_parts.build_mla_neck(make, 8, 6),
        lambda: head_parts.build_mla_neck_buffers(make, 6),
        lambda: head_parts.build_mla_head(make, 6, 5, 7),
        lambda: head_parts.build_mla_head_buffers(make, 5),
    ):
        made.clear()
        tree = build()
        assert [key for key, _ in named_arrays(tree)] == made  # in the order in which they are made
        for number, (_, x) in enumerate(named_arrays(tree), 1):
            assert np.all(x == number)


def test_buffers_stand_beside_the_norms_of_the_weights():
    for weights, buffers in (
        (
            head_parts.build_semantic_fpn(zeros, 5, 6, 7),
            head_parts.build_semantic_fpn_buffers(zeros, 6),
        ),
        (
            head_parts.build_setr(zeros, 8, 6, 7, 4, 3),
            head_parts.build_setr_buffers(zeros, 6, 4),
        ),
        (head_parts.build_mla_neck(zeros, 8, 6), head_parts.build_mla_neck_buffers(zeros, 6)),
        (head_parts.build_mla_head(zeros, 6, 5, 7), head_parts.build_mla_head_buffers(zeros, 5)),
    ):
        norms = [key[: -len(".weight")] for key, _ in named_arrays(weights) if "bn.weight" in key]
        fields = ("running_mean", "running_var", "num_batches_tracked")
        expected = [f"{norm}.{name}" for norm in norms for name in fields]
        assert [key for key, _ in named_arrays(buffers)] == expected


def test_neck_and_head_of_the_paper_have_its_number_of_parameters():
    def count(tree) -> int:
        return sum(x.size for _, x in named_arrays(tree))

    assert count(head_parts.build_fpn(zeros, (64, 128, 320, 512), 256)) == 2_623_488
    assert count(head_parts.build_semantic_fpn(zeros, 256, 128, 150)) == 1_643_158


def test_multiplications_of_heads_at_512_pixels():
    # neck and head together 21.4 GMACs, what the paper's tables add to a backbone; SETR's heads for
    # the width of DeiT-S. Only convolutions are counted; arrays have shapes and no numbers
    xp, macs = Shapes(), Counter()

    def note(call):
        weight, y = call.args[0].weight, call.result[0]
        macs["conv"] += math.prod(y.shape) * math.prod(weight.shape[1:])

    def run(op, p, x, *settings):
        """The operation's result and its GMACs; its backward runs too."""
        macs.clear()
        ops = REFERENCE.watched(note, only=[conv])
        y, cache = ops[op].forward(p, x, ops, *settings)
        cost = macs["conv"] / 1e9
        op.backward(p, cache, y, REFERENCE)
        return y, round(cost, 3)

    def make(leaf):
        return xp.empty(leaf.shape, np.float32)

    widths = (64, 128, 320, 512)
    maps = [xp.empty((1, 128 >> i, 128 >> i, C), np.float32) for i, C in enumerate(widths)]
    levels, cost = run(fpn, head_parts.build_fpn(make, widths, 256), maps)
    assert cost == 13.355
    buffers = head_parts.build_semantic_fpn_buffers(make, 128)
    p = head_parts.build_semantic_fpn(make, 256, 128, 150)
    logits, cost = run(semantic_fpn, p, levels, buffers, True)
    assert (logits.shape, cost) == ((1, 128, 128, 150), 8.091)
    x = xp.empty((1, 32, 32, 384), np.float32)
    for convs, kernel, scale, side, expected in ((1, 1, 4, 128, 0.730), (4, 3, 2, 512, 61.707)):
        p = head_parts.build_setr(make, 384, 256, 150, convs, kernel)
        buffers = head_parts.build_setr_buffers(make, 256, convs)
        logits, cost = run(setr, p, x, buffers, False, scale)
        assert (logits.shape, cost) == ((1, side, side, 150), expected)


def test_first_values_are_those_of_the_authors_runs():
    def std(leaf):
        if leaf.init == "fan_out":
            return np.full(leaf.shape, math.sqrt(2 / leaf.fan_out))
        constants = {"zeros": 0.0, "ones": 1.0, "count": 0.0, "normal": leaf.std}
        return np.full(leaf.shape, constants[leaf.init])

    neck = dict(named_arrays(head_parts.build_fpn(std, (3, 4), 5)))
    np.testing.assert_allclose(neck["lateral_convs.1.conv.weight"], math.sqrt(2 / 5))
    np.testing.assert_allclose(neck["fpn_convs.0.conv.weight"], math.sqrt(2 / 45))
    assert not neck["fpn_convs.0.conv.bias"].any()
    head = dict(named_arrays(head_parts.build_semantic_fpn(std, 5, 6, 7)))
    np.testing.assert_allclose(head["conv_seg.weight"], 0.01)
    np.testing.assert_allclose(head["scale_heads.3.4.conv.weight"], math.sqrt(2 / 54))
    buffers = dict(named_arrays(head_parts.build_semantic_fpn_buffers(std, 6)))
    for key, x in (head | buffers).items():
        if ".bn." in key:
            assert np.all(x == key.endswith(("weight", "running_var"))), key


# Laws -----------------------------------------------------------------------------------------


def random_tree(tree, seed: int):
    """Norms and variances around one, the rest of size 1 or that of the fan-in."""

    def value(key, x):
        if key.endswith("num_batches_tracked"):
            return np.array(seed % 7)
        y = normal(seed + zlib.crc32(key.encode()) % 10**6, *x.shape)
        if key.endswith(("bn.weight", "running_var")):
            return 1 + 0.3 * np.abs(y)
        return y / math.sqrt(math.prod(x.shape[1:])) if x.ndim > 1 else 0.3 * y

    return map_named(value, tree)


@st.composite
def pyramids(draw):
    """Maps of four levels, some with odd sides, of one width; and a seed."""
    seed, B = draw(seeds), draw(st.integers(2, 3))
    grids = zip(draw(HEIGHTS), draw(WIDTHS), strict=True)
    return [normal(seed + k, B, *grid, 3) for k, grid in enumerate(grids)], seed


def head_of(seed: int):
    """Weights and buffers of a Semantic FPN for maps of 3 channels, 4 inside, 5 classes."""
    p = random_tree(head_parts.build_semantic_fpn(zeros, 3, 4, 5), seed)
    return p, random_tree(head_parts.build_semantic_fpn_buffers(zeros, 4), seed)


@given(pyramid=pyramids())
def test_the_backward_of_fpn_is_the_adjoint_of_its_forward(pyramid):
    maps, seed = pyramid
    p = random_tree(head_parts.build_fpn(zeros, (3, 3, 3, 3), 4), seed)

    def without_bias(convs):
        return tuple(FPNConvParams(ConvParams(c.conv.weight, None)) for c in convs)

    p = FPNParams(without_bias(p.lateral_convs), without_bias(p.fpn_convs))
    ops = table_under_test()
    y, cache = ops[fpn].forward(p, maps, ops)
    u = [normal(seed + 10 + k, *x.shape) for k, x in enumerate(y)]
    back, _ = ops[fpn].backward(p, cache, u, ops)
    left = sum((a * b).sum() for a, b in zip(y, u, strict=True))
    right = sum((a * b).sum() for a, b in zip(maps, back, strict=True))
    size = math.sqrt(sum((a**2).sum() for a in y) * sum((b**2).sum() for b in u))
    assert abs(left - right) <= 1e-13 * size
    # what the finest map is given reaches no coarser level: the sum runs down only
    only = [np.zeros_like(x) for x in u]
    only[3] = u[3]
    back, _ = ops[fpn].backward(p, cache, only, ops)
    assert not any(x.any() for x in back[:3])
    assert back[3].any()


@given(pyramid=pyramids())
def test_logits_of_any_sizes_are_as_large_as_the_finest_map(pyramid):
    maps, seed = pyramid
    (p, buffers), ops = head_of(seed), table_under_test()
    logits, cache = ops[semantic_fpn].forward(p, maps, ops, buffers, True)
    assert logits.shape == (*maps[0].shape[:3], 5)
    dmaps, _ = ops[semantic_fpn].backward(p, cache, normal(seed, *logits.shape), ops)
    assert [x.shape for x in dmaps] == [x.shape for x in maps]


@given(pyramid=pyramids())
def test_pixels_under_an_ignored_label_get_no_gradient_but_enter_the_batch_statistics(pyramid):
    maps, seed = pyramid
    (p, buffers), ops = head_of(seed), table_under_test()
    logits, cache = ops[semantic_fpn].forward(p, maps, ops, buffers, True)
    labels = rng_of(seed).integers(0, 5, logits.shape[:3])
    labels[0] = 255  # a whole image
    _, dlogits = cross_entropy(first(logits), labels, reduction="mean_of_all", ignore_index=255)
    dlogits = last(dlogits)
    assert not dlogits[0].any()
    assert dlogits[1:].any()
    # its logits have no influence, and still the image has one on those of the others
    dmaps, _ = ops[semantic_fpn].backward(p, cache, dlogits, ops)
    assert any(x[0].any() for x in dmaps)
    other = [x.copy() for x in maps]
    for x in other:
        x[0] = x[0] + 1
    moved, _ = ops[semantic_fpn].forward(p, other, ops, buffers, True)
    assert np.abs(moved[1:] - logits[1:]).max() > 1e-6
    # not so with running statistics, where each image is by itself
    alone, cache = ops[semantic_fpn].forward(p, maps, ops, buffers, False)
    dmaps, _ = ops[semantic_fpn].backward(p, cache, dlogits, ops)
    assert not any(x[0].any() for x in dmaps)
    moved, _ = ops[semantic_fpn].forward(p, other, ops, buffers, False)
    np.testing.assert_allclose(moved[1:], alone[1:], rtol=1e-12, atol=1e-12)


@given(C=st.integers(1, 3), k=st.sampled_from([1, 3]), factor=st.floats(2, 50), seed=seeds)
def test_a_larger_kernel_before_batch_norm_changes_a_unit_through_eps_only(C, k, factor, seed):
    x = normal(seed, 2, 3, 4, C)
    bn = BatchNormParams(1 + np.abs(normal(seed, 3)), normal(seed + 1, 3))
    kernel = normal(seed + 2, 3, C, k, k)
    buffers = ConvUnitBuffers(BatchNormBuffers(np.zeros(3), np.ones(3), np.array(0)))
    ops = table_under_test()

    def run(times: float):
        p = ConvUnitParams(ConvParams(times * kernel, None), bn)
        y, cache = ops[conv_unit].forward(p, x, ops, buffers, True)
        variance = cache.bn.variance
        return y, np.sqrt(variance / (variance + 1e-5))

    y, shrunk = run(1.0)
    large, less_shrunk = run(factor)
    # before ReLU both are a line through the same points: undo bias and shrinking where both live
    alive = (y > 0) & (large > 0)
    a, b = ((z - bn.bias) / s for z, s in ((y, shrunk), (large, less_shrunk)))
    np.testing.assert_allclose(a[alive], b[alive], rtol=1e-9, atol=1e-11)


@given(pyramid=pyramids(), rate=st.sampled_from([0.3, 0.6]))
def test_a_dropped_channel_adds_nothing_to_the_logits_of_its_sample(pyramid, rate):
    maps, seed = pyramid
    (p, buffers), ops = head_of(seed), table_under_test()
    logits, cache = ops[semantic_fpn].forward(p, maps, ops, buffers, True, rate, rng_of(seed))
    kept = rng_of(seed).random((len(maps[0]), 4), dtype=np.float32) >= rate
    plain, _ = ops[semantic_fpn].forward(p, maps, ops, buffers, True)
    same, _ = ops[semantic_fpn].forward(p, maps, ops, buffers, True, 0.0, rng_of(seed))
    np.testing.assert_array_equal(plain, same)
    for b, channels in enumerate(kept):
        weight = p.conv_seg.weight * channels[None, :, None, None] / (1 - rate)
        by_hand = dataclasses.replace(p, conv_seg=ConvParams(weight, p.conv_seg.bias))
        expected, _ = ops[semantic_fpn].forward(by_hand, maps, ops, buffers, True)
        assert_near(logits[b], expected[b], FORWARD)
    _, grads = ops[semantic_fpn].backward(p, cache, normal(seed, *logits.shape), ops)
    never = ~kept.any(axis=0)
    assert not grads.conv_seg.weight[:, never].any()


def test_an_image_too_small_for_batch_statistics_is_refused():
    p, buffers = head_of(0)
    maps = [normal(k, 1, *grid, 3) for k, grid in enumerate([(8, 8), (4, 4), (2, 2), (1, 1)])]
    with pytest.raises(ShapeError, match="one value per channel"):
        semantic_fpn.forward(p, maps, REFERENCE, buffers, True)
    logits, _ = semantic_fpn.forward(p, maps, REFERENCE, buffers, False)
    assert logits.shape == (1, 8, 8, 5)


def test_nothing_that_comes_in_is_written_to():
    (p, buffers), ops = head_of(1), table_under_test()
    maps = [normal(k, 2, *grid, 3) for k, grid in enumerate([(5, 6), (3, 3), (2, 2), (1, 1)])]
    p, buffers, maps = map_arrays(np.array, (p, buffers, maps))
    for _, x in named_arrays((p, buffers, tuple(maps))):
        x.flags.writeable = False
    logits, cache = ops[semantic_fpn].forward(p, maps, ops, buffers, True, 0.5, rng_of(1))
    for _, x in named_arrays(cache):
        x.flags.writeable = False
    dlogits = normal(2, *logits.shape)
    dlogits.flags.writeable = False
    once = ops[semantic_fpn].backward(p, cache, dlogits, ops)
    again = ops[semantic_fpn].backward(p, cache, dlogits, ops)
    for (key, a), (_, b) in zip(
        named_arrays(tuple(once[0])), named_arrays(tuple(again[0])), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=key)
    after = moved(buffers, semantic_fpn_file.statistics(cache))
    for (key, a), (_, b) in zip(named_arrays(after), named_arrays(buffers), strict=True):
        assert a is not b, key


def test_running_statistics_of_heads_in_another_library():
    (p, buffers) = head_of(2)
    maps = [normal(k, 2, *grid, 3) for k, grid in enumerate([(4, 4), (2, 2), (2, 1), (1, 1)])]
    _, cache = semantic_fpn.forward(p, maps, REFERENCE, buffers, True)
    expected = moved(buffers, semantic_fpn_file.statistics(cache))
    there = map_arrays(array_api_strict.asarray, (p, buffers, maps))
    _, cache = semantic_fpn.forward(there[0], there[2], REFERENCE, there[1], True)
    after = moved(there[1], semantic_fpn_file.statistics(cache))
    for (key, a), (_, b) in zip(named_arrays(after), named_arrays(expected), strict=True):
        assert type(a) is type(there[2][0]), key
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-12, atol=1e-14, err_msg=key)


# The table of operations ----------------------------------------------------------------------


def test_heads_ask_the_table_and_their_paths_are_keys():
    (p, buffers), ops = head_of(3), table_under_test()
    maps = [normal(k, 2, *grid, 3) for k, grid in enumerate([(8, 8), (4, 4), (2, 2), (1, 1)])]
    calls, paths = Counter(), set()

    def note(call):
        calls[f"{call.operation.name}.{call.way}"] += 1
        paths.add(call.path)

    watched = ops.watched(note, params=p)
    logits, cache = watched[semantic_fpn].forward(p, maps, watched, buffers, True, 0.1, rng_of(1))
    watched[semantic_fpn].backward(p, cache, logits, watched)
    for way in ("forward", "backward"):
        assert calls[f"conv_unit.{way}"] == calls[f"batch_norm.{way}"] == 7
        assert calls[f"relu.{way}"] == 7
        assert calls[f"conv.{way}"] == 8
        assert calls[f"resize.{way}"] == 6 + 4
        assert calls[f"dropout_channels.{way}"] == 1
    assert {"conv_seg", "scale_heads.0", "scale_heads.3.4.conv", "scale_heads.2.2.bn"} <= paths


@pytest.mark.parametrize("name", ["conv_unit", "scale_head", "batch_norm", "dropout_channels"])
def test_a_replacement_takes_effect_in_a_head(name, table):
    (p, buffers), op = head_of(4), READABLE[name]
    maps = [normal(k, 2, *grid, 3) for k, grid in enumerate([(4, 4), (2, 2), (2, 1), (1, 1)])]

    def doubled(*args, **kwargs):
        y, cache = op.forward(*args, **kwargs)
        return 2 * y, cache

    ops = table.replace(op, Operation(doubled, op.backward))
    plain, _ = table[semantic_fpn].forward(p, maps, table, buffers, False)
    replaced, _ = ops[semantic_fpn].forward(p, maps, ops, buffers, False)
    assert np.abs(replaced - plain).max() > 1e-3
