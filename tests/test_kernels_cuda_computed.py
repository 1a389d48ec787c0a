"""The kernels for CUDA through their table: on the CPU by the emulation, and on a GPU.

Expected is what the readable layers compute in float64. Arrays that a kernel should fill hold NaN
before it does.
"""

import functools
import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from closeness import relative
from cuda_on_cpu import Emulation, StandIn
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from loose import loose
from segmentors import SEGMENTORS, params_of
from strategies import normal, random_params, rng_of, seeds

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, Operation
from pvt_ref.arrays import array_module, is_numpy
from pvt_ref.blocks import mlp as blocks_mlp
from pvt_ref.blocks.mha import MHAParams
from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.blocks.sra import SRAParams
from pvt_ref.draws import Draws
from pvt_ref.heads.conv_unit import ConvUnitBuffers, ConvUnitParams, conv_unit, statistics
from pvt_ref.kernels.cpu.gelu import TANH_FIT
from pvt_ref.kernels.cuda import optimizer
from pvt_ref.kernels.cuda.depthwise_conv import _kernel_first
from pvt_ref.kernels.cuda.launch import Cuda, packed, source
from pvt_ref.kernels.cuda.table import cuda_kernels, table_with
from pvt_ref.kernels.cuda.weights import Arranged, arranged, can_join, joined, taken_apart
from pvt_ref.layers.attention import AttentionCache, attention
from pvt_ref.layers.batch_norm import (
    BatchNormBuffers,
    BatchNormCache,
    BatchNormParams,
    batch_norm,
)
from pvt_ref.layers.conv import ConvCache, ConvParams, conv
from pvt_ref.layers.depthwise_conv import DepthwiseConvCache, depthwise_conv
from pvt_ref.layers.gelu import GeluCache, gelu
from pvt_ref.layers.layer_norm import LayerNormCache, LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.patch_embed import (
    PatchEmbedCache,
    PatchEmbedParams,
    kernel_to_matrix,
    patch_embed,
)
from pvt_ref.layers.pool import pool
from pvt_ref.layers.position import position
from pvt_ref.layers.resize import resize
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.train import AdamW, AdamWState, adamw_step, clip_by_global_norm, is_decayed
from pvt_ref.tree import map_arrays, named_arrays, record

READABLE_CACHES = (
    *(AttentionCache, ConvCache, DepthwiseConvCache, GeluCache, LayerNormCache, PatchEmbedCache),
    *(blocks_mlp.MLPCache, BatchNormCache),
)

no_gxx = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)


@record
class Weights:
    """Arrays of several sizes."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray


#: In which threads and blocks take turns: rising, falling, shuffled.
ORDERS = (0, 1, 5)

#: Where the kernels run.
PLACES = [
    pytest.param("emulated", marks=no_gxx),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


def emulated(order: int, blocks: int = 6, **products) -> pvt_ref.Ops:
    """The table on NumPy arrays. So few blocks that small arrays keep all of them busy.

    Products are NumPy's unless something else is asked for; test_kernels_cuda_products.py tests
    what they are otherwise.
    """
    return table_with(Cuda(Emulation(order), blocks, **{"products": "cupy", **products}), is_numpy)


@pytest.fixture
def poisoned(monkeypatch):
    """New arrays hold NaN, so that what is not written is seen; CuPy's if called with it."""

    def poison(library):
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(library, name, _poisoned(getattr(library, name)))

    poison(np)
    return poison


def _poisoned(make):
    @functools.wraps(make)
    def full_of_nan(*args, **kwargs):
        x = make(*args, **kwargs)
        if x.dtype.kind == "f":
            x.fill(np.nan)
        return x

    return full_of_nan


def same(tree):
    return tree


@pytest.fixture(params=PLACES)
def place(request, poisoned):
    """A table, and a function that brings a tree of NumPy arrays to where the table computes."""
    if request.param == "emulated":
        return emulated(ORDERS[-1]), same
    cupy = request.getfixturevalue("cupy")
    poisoned(cupy)
    return cuda_kernels(), lambda tree: map_arrays(cupy.asarray, tree)


# One operation ------------------------------------------------------------------------------------


class Case:
    """An operation's arguments, in float64, and what they were drawn by, for the reproducer."""

    def __init__(self, op: Operation, facts: dict, p: Any, x: Any, args: tuple = ()):
        # the numbers are those of float32, so that both precisions compute with the same
        self.op, self.p, self.x, self.args = op, *(wide(narrow(tree)) for tree in (p, x, args))
        self.facts = facts

    def __repr__(self):
        return f"{self.op.name}({self.facts})"


def narrow(tree):
    return map_arrays(lambda x: x.astype(np.float32), tree)


def wide(tree):
    return map_arrays(lambda x: x.astype(np.float64), tree)


#: How arrays lie in memory: one number after the other; the same, but not from a multiple of 16
#: bytes; with gaps; and arrays of one shape as parts of one, as a linear layer makes q, k and v.
LAYOUTS = ("plain", "shifted", "gaps", "together")


def laid_out(tree, layout: str):
    """The same arrays in another layout."""

    def lay(x):
        xp = array_module(x)
        if layout == "shifted":
            y = xp.reshape(xp.empty(x.size + 1, x.dtype)[1:], x.shape)
        elif layout == "gaps":
            y = xp.empty((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)[..., ::2]
        else:
            return x
        y[...] = x
        return y

    if layout != "together" or not isinstance(tree, tuple):
        return map_arrays(lay, tree)
    q, k, v = tree
    together = [q, k, v] if q.shape == k.shape else [k, v]
    xp, (B, N, n, d) = array_module(k), k.shape
    y = xp.empty((B, n, len(together), N, d), k.dtype)
    for i, x in enumerate(together):
        y[:, :, i] = xp.permute_dims(x, (0, 2, 1, 3))
    parts = [xp.permute_dims(y[:, :, i], (0, 2, 1, 3)) for i in range(len(together))]
    return (q, *parts)[-3:]


def results(case: Case, ops, convert=same, layout: str = "plain"):
    """y and all gradients by name, and the cache; dy is drawn, and as large as y is."""
    p, x = (laid_out(convert(map_arrays(np.copy, tree)), layout) for tree in (case.p, case.x))
    args = convert(case.args)
    inputs = pvt_ref.to_numpy([p, x, args])
    y, cache = ops[case.op].forward(p, x, ops, *args)
    alone, nothing = ops[case.op].forward(p, x, ops, *args, keep=False)
    assert nothing is None
    y, alone = (pvt_ref.to_numpy(each) for each in (y, alone))
    np.testing.assert_array_equal(y, alone)
    dy = laid_out(convert(normal(9, *y.shape)), layout)
    dx, grads = ops[case.op].backward(p, cache, dy, ops)
    np.testing.assert_equal(  # nobody wrote to what was not his
        [dict(named_arrays(each)) for each in pvt_ref.to_numpy([p, x, args])],
        [dict(named_arrays(each)) for each in inputs],
    )
    found = {"y": y, "dy": pvt_ref.to_numpy(dy)}
    for name, tree in (("dx", dx), ("grads", grads)):
        found |= {f"{name}.{k}": pvt_ref.to_numpy(g) for k, g in named_arrays(tree)}
    return found, cache


def check_case(case: Case, place, tolerance: float = 4e-7, layout: str = "plain"):
    """The kernels' results are near those of float64, not of another shape or type, and repeat."""
    ops, there = place
    expected, _ = results(case, REFERENCE)
    found, cache = results(case, ops, lambda tree: there(narrow(tree)), layout)
    readable, _ = results(case, REFERENCE, narrow)
    assert not isinstance(cache, READABLE_CACHES), "the readable layer has computed, not the kernel"
    assert list(found) == list(expected)
    largest = max(np.linalg.norm(y) for y in expected.values())
    for key, x in found.items():
        assert x.dtype == np.float32, key
        assert x.shape == expected[key].shape, key
        error, plain = (np.linalg.norm(each - expected[key]) for each in (x, readable[key]))
        norm = np.linalg.norm(expected[key])
        if case.op in (attention, gelu, mlp):  # where terms of a derivative can cancel
            norm = max(norm, largest)
        assert error <= max(tolerance * norm, 3 * plain), key
    again, _ = results(case, ops, lambda tree: there(narrow(tree)), layout)
    for key, x in again.items():
        np.testing.assert_array_equal(x, found[key], err_msg=key)


def on_every_place(strategy, **how):
    """A test that draws cases of strategy and checks them at a place."""

    def decorate(function):
        @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], **how)
        @given(strategy, st.sampled_from(ORDERS), st.sampled_from(LAYOUTS))
        def test(place, case, order, layout):
            _, there = place
            function((emulated(order), same) if there is same else place, case, layout)

        return test

    return decorate


#: Channels for which a row is read by 1, 2, 4, 8, 16 and 32 threads, all of them busy or not.
WIDTHS = st.sampled_from([4, 8, 12, 32, 64, 68, 132, 160])


@st.composite
def sums(draw):
    rows, C, seed = draw(st.integers(1, 700)), draw(st.sampled_from([1, 3, 31, 33])), draw(seeds)
    return Case(sum_rows, {"rows": rows, "C": C, "seed": seed}, None, 1 + normal(seed, rows, C))


@on_every_place(sums())
def test_sums_over_rows(place, case, layout):
    check_case(case, place, layout=layout)


@st.composite
def norms(draw):
    C, seed = draw(WIDTHS), draw(seeds)
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 30)), C)
    eps = draw(st.sampled_from([1e-6, 1e-2]))
    p = LayerNormParams(1 + 0.3 * normal(seed, C), 0.3 * normal(seed + 1, C))
    x = normal(seed + 2, *shape) * 3 + draw(st.sampled_from([0, 5]))
    return Case(layer_norm, {"shape": shape, "eps": eps, "seed": seed}, p, x, (eps,))


@on_every_place(norms())
def test_layer_norms(place, case, layout):
    check_case(case, place, layout=layout)


@st.composite
def gelus(draw):
    shape, seed = (draw(st.integers(1, 9)), 4 * draw(st.integers(1, 90))), draw(seeds)
    return Case(gelu, {"shape": shape, "seed": seed}, None, 4 * normal(seed, *shape))


@on_every_place(gelus())
def test_gelus(place, case, layout):
    check_case(case, place, layout=layout)


@st.composite
def attentions(draw):
    B, N, d = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 12, 64]))
    n, m = draw(st.integers(1, 70)), draw(st.sampled_from([1, 7, 8, 9, 64, 65, 130]))
    seed, m = draw(seeds), n if draw(st.booleans()) else m
    q, k, v = (normal(seed + i, B, N, rows, d) for i, rows in enumerate((n, m, m)))
    facts = {"B": B, "N": N, "d": d, "n": n, "m": m, "seed": seed}
    scale = draw(st.sampled_from([d**-0.5, 3.0]))
    return Case(attention, facts | {"scale": scale}, None, (q, k, v), (scale,))


def of_scores(case: Case) -> float:
    """What attention may err: the exponential of a score errs as much as the score, absolutely."""
    q, k, _ = map(np.abs, case.x)
    return 2e-7 * (2 + (case.args[0] * q @ k.swapaxes(2, 3)).max())


@on_every_place(attentions())
def test_attentions(place, case, layout):
    check_case(case, place, of_scores(case), layout)


@st.composite
def mlps(draw):
    B, n, C, seed = *(draw(st.integers(1, top)) for top in (3, 60, 9)), draw(seeds)
    E_C = draw(st.sampled_from([4, 12, 132]))
    fc1 = LinearParams(normal(seed, E_C, C) / C**0.5, normal(seed + 1, E_C))
    fc2 = LinearParams(normal(seed + 2, C, E_C) / E_C**0.5, normal(seed + 3, C))
    facts = {"B": B, "n": n, "C": C, "E_C": E_C, "seed": seed}
    return Case(mlp, facts, MLPParams(fc1, fc2), normal(seed + 4, B, n, C))


@on_every_place(mlps())
def test_mlps(place, case, layout):
    check_case(case, place, 1e-6, layout)


@st.composite
def depthwise_convs(draw):
    shape = [draw(st.integers(1, n)) for n in (3, 9, 9)] + [draw(st.sampled_from([4, 12, 36]))]
    seed, C = draw(seeds), shape[-1]
    bias = normal(seed, C) if draw(st.booleans()) else None
    p = ConvParams(normal(seed + 1, C, 1, 3, 3), bias)
    return Case(depthwise_conv, {"shape": shape, "seed": seed}, p, normal(seed + 2, *shape))


@on_every_place(depthwise_convs())
def test_depthwise_convs(place, case, layout):
    check_case(case, place, layout=layout)


@st.composite
def convs(draw):
    C, C_out, k = draw(st.sampled_from([1, 3, 4, 8])), 4, draw(st.integers(1, 4))
    stride, padding = draw(st.integers(1, 5)), draw(st.integers(0, k // 2))
    H, W = (draw(st.integers(max(k - 2 * padding, 1), 11)) for _ in range(2))
    B, seed = draw(st.integers(1, 2)), draw(seeds)
    bias = normal(seed, C_out) if draw(st.booleans()) else None
    p = ConvParams(normal(seed + 1, C_out, C, k, k), bias)
    channels_first = draw(st.booleans())  # as images are
    x = normal(seed + 2, B, C, H, W).transpose(0, 2, 3, 1)
    x = x if channels_first else x.copy()
    facts = {"x": x.shape, "k": k, "stride": stride, "padding": padding, "seed": seed}
    return Case(conv, facts | {"first": channels_first}, p, x, (stride, padding))


@on_every_place(convs())
def test_convs(place, case, layout):
    check_case(case, place, layout=layout)


@st.composite
def patch_embeds(draw):
    C, C_out, P = (
        draw(st.sampled_from([3, 4, 8])),
        draw(st.sampled_from([4, 12])),
        draw(st.integers(1, 4)),
    )
    B, h, w, seed = *(draw(st.integers(1, 3)) for _ in range(3)), draw(seeds)
    norm = (
        LayerNormParams(normal(seed, C_out), normal(seed + 1, C_out))
        if draw(st.booleans())
        else None
    )
    p = PatchEmbedParams(
        LinearParams(normal(seed + 2, C_out, C, P, P), normal(seed + 3, C_out)), norm
    )
    x = normal(seed + 4, B, C, h * P, w * P).transpose(0, 2, 3, 1)
    facts = {"x": x.shape, "C_out": C_out, "P": P, "norm": norm is not None, "seed": seed}
    return Case(patch_embed, facts, p, x if draw(st.booleans()) else x.copy(), (1e-6,))


@on_every_place(patch_embeds())
def test_patch_embeds(place, case, layout):
    check_case(case, place, layout=layout)


def batch_norm_parts(seed: int, C: int) -> tuple[BatchNormParams, BatchNormBuffers]:
    """Weights and running statistics of C channels."""
    p = BatchNormParams(1 + 0.3 * normal(seed, C), 0.3 * normal(seed + 1, C))
    running = normal(seed + 2, C), 0.5 + np.abs(normal(seed + 3, C))
    return p, BatchNormBuffers(*running, np.zeros(()))


@st.composite
def batch_norms(draw):
    shape = [draw(st.integers(1, n)) for n in (3, 9, 9)] + [draw(st.sampled_from([1, 3, 32, 36]))]
    seed, in_batch = draw(seeds), draw(st.booleans())
    shape[0] += in_batch  # one value has no variance
    p, buffers = batch_norm_parts(seed, shape[-1])
    x = normal(seed + 4, *shape) * 3 + draw(st.sampled_from([0, 50]))
    eps = draw(st.sampled_from([1e-5, 1e-1]))
    facts = {"shape": shape, "in_batch": in_batch, "eps": eps, "seed": seed}
    return Case(batch_norm, facts, p, x, (buffers, in_batch, eps))


@on_every_place(batch_norms())
def test_batch_norms(place, case, layout):
    check_case(case, place, 1e-6, layout)


@st.composite
def conv_units(draw):
    B, H, W = (draw(st.integers(1, n)) for n in (2, 7, 7))
    C, C_out, k = draw(st.sampled_from([3, 8])), draw(st.sampled_from([5, 36])), 3
    seed, in_batch = draw(seeds), draw(st.booleans())
    bn, buffers = batch_norm_parts(seed, C_out)
    p = ConvUnitParams(ConvParams(normal(seed + 5, C_out, C, k, k) / (3 * C**0.5), None), bn)
    x = normal(seed + 6, B + in_batch, H, W, C)
    facts = {"x": x.shape, "C_out": C_out, "in_batch": in_batch, "seed": seed}
    return Case(conv_unit, facts, p, x, (ConvUnitBuffers(buffers), in_batch))


@on_every_place(conv_units())
def test_units_of_heads(place, case, layout):
    check_case(case, place, 2e-6, layout)
    ops, there = place
    p, x, args = (there(narrow(tree)) for tree in (case.p, case.x, case.args))
    _, cache = ops[conv_unit].forward(p, x, ops, *args)
    assert cache.relu is None  # or the readable one has computed
    seen = pvt_ref.to_numpy(statistics(cache))
    expected = statistics(conv_unit.forward(case.p, case.x, REFERENCE, *case.args)[1])
    assert (seen is not None) is args[1]
    for (key, y), (_, exact) in zip(named_arrays(seen), named_arrays(expected), strict=True):
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-6, err_msg=key)


@st.composite
def resizes(draw):
    shape = [draw(st.integers(1, n)) for n in (2, 9, 9)] + [draw(st.sampled_from([1, 3, 8]))]
    size = tuple(draw(st.integers(1, 19)) for _ in range(2))
    mode, align = draw(st.sampled_from(["bilinear", "nearest", "bicubic"])), draw(st.booleans())
    facts = {"shape": shape, "size": size, "mode": mode, "align": align, "seed": 0}
    assume(size != tuple(shape[1:3]))
    return Case(resize, facts, None, normal(0, *shape), (size, mode, align))


@on_every_place(resizes())
def test_resizes(place, case, layout):
    check_case(case, place, layout=layout)


@st.composite
def pools(draw):
    shape = [draw(st.integers(1, n)) for n in (2, 17, 17)] + [draw(st.sampled_from([3, 8]))]
    size = draw(st.sampled_from([(7, 7), (2, 3), (1, 1)]))
    return Case(pool, {"shape": shape, "size": size}, None, normal(0, *shape), (size,))


@on_every_place(pools())
def test_pools(place, case, layout):
    check_case(case, place, layout=layout)


@st.composite
def position_tables(draw):
    table_grid, grid = ((draw(st.integers(1, 5)), draw(st.integers(1, 5))) for _ in range(2))
    cls, has_row = draw(st.sampled_from([(True, True), (False, True), (False, False)]))
    mode, C = draw(st.sampled_from(["bilinear", "bicubic"])), draw(st.sampled_from([3, 8]))
    table = normal(1, 1, has_row + table_grid[0] * table_grid[1], C)
    x = normal(2, 2, cls + grid[0] * grid[1], C)
    facts = {"x": x.shape, "table": table.shape, "grid": grid, "cls": cls, "mode": mode}
    return Case(position, facts, table, x, (grid, table_grid, cls, mode))


@on_every_place(position_tables())
def test_position_tables(place, case, layout):
    check_case(case, place, layout=layout)


# What the cases above do not show -----------------------------------------------------------------


def test_many_queries_get_few_threads_each(place):
    ops, there = place
    seen = []

    def watching(function, *rest, **more):
        seen.append(dict(function.macros)["LANES"])
        return settings_of_table.launch(function, *rest, **more)

    settings_of_table = ops.settings
    few = replace(settings_of_table, launch=watching)
    ops = table_with(few, ops.accepts)
    for n, lanes in ((3, {8}), (80, {2, 8}), (230, {2, 4})):
        seen.clear()
        n *= settings_of_table.blocks
        q, k, v = (normal(i, 1, 1, rows, 64) for i, rows in enumerate((n, 70, 70)))
        case = Case(attention, {}, None, (q, k, v), (0.125,))
        check_case(case, (ops, there), of_scores(case))
        assert set(seen) == lanes


@no_gxx
def test_sums_keep_their_digits_where_float32_would_lose_them(poisoned):
    # equal numbers are rounded in one direction, so a sum in float32 drifts
    x = np.tile(np.array([1.1, 2.3, 0.7, 1.9], np.float32), (20_000, 1))
    exact = x.sum(axis=0, dtype=np.float64)
    ops = emulated(0, blocks=1)  # so that a thread has many rows
    y, _ = ops[sum_rows].forward(None, x, ops)
    assert relative(y, exact) < 2e-7
    p = LayerNormParams(np.ones(4, np.float32), np.zeros(4, np.float32))
    _, cache = ops[layer_norm].forward(p, x, ops, 1e-6)
    _, grads = ops[layer_norm].backward(p, cache, x, ops)
    assert relative(grads.bias, exact) < 2e-7
    p = ConvParams(np.ones((4, 1, 3, 3), np.float32), np.zeros(4, np.float32))
    _, cache = ops[depthwise_conv].forward(p, x.reshape(1, 100, 200, 4), ops)
    _, grads = ops[depthwise_conv].backward(p, cache, x.reshape(1, 100, 200, 4), ops)
    assert relative(grads.bias, exact) < 2e-7


def test_a_norm_of_numbers_far_from_zero_keeps_its_digits(place):
    p = LayerNormParams(np.ones(64), np.zeros(64))
    x = 1000 + np.round(normal(1, 5, 64) * 64) / 64  # float32 holds them exactly
    check_case(Case(layer_norm, {}, p, x, (1e-6,)), place)


@pytest.mark.parametrize("in_batch", [True, False])
def test_a_batch_norm_of_numbers_far_from_zero_keeps_its_digits(in_batch, place):
    x = 1000 + np.round(normal(1, 3, 5, 5, 32) * 64) / 64  # float32 holds them exactly
    running = BatchNormBuffers(np.full(32, 1000.0), np.ones(32), np.zeros(()))
    p = BatchNormParams(np.ones(32), np.zeros(32))
    check_case(Case(batch_norm, {}, p, x, (running, in_batch)), place, 1e-6)


def test_relu_of_a_unit_keeps_nan_and_passes_nothing_back_at_zero(place):
    ops, there = place
    bn = BatchNormParams(np.ones(2, np.float32), np.zeros(2, np.float32))
    p = ConvUnitParams(ConvParams(np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1), None), bn)
    running = BatchNormBuffers(np.zeros(2, np.float32), np.ones(2, np.float32), np.zeros(()))
    x = np.array([[[[0, 1], [-1, 2], [3, -4], [np.nan, np.nan]]]], np.float32)
    p, running, x = (there(tree) for tree in (p, running, x))
    y, cache = ops[conv_unit].forward(p, x, ops, ConvUnitBuffers(running), False)
    y = pvt_ref.to_numpy(y)[0, 0]
    np.testing.assert_allclose(y, [[0, 1], [0, 2], [3, 0], [np.nan, np.nan]], rtol=1e-5)
    dx, _ = ops[conv_unit].backward(p, cache, there(np.ones((1, 1, 4, 2), np.float32)), ops)
    np.testing.assert_allclose(pvt_ref.to_numpy(dx)[0, 0], [[0, 1], [0, 1], [1, 0], [0, 0]], 1e-5)


def test_gelu_is_right_far_outside(place):
    ops, there = place
    x = np.array([-1e30, -100, -9, -1e-30, 0, 1e-30, 9, 100], np.float32)
    y, cache = ops[gelu].forward(None, there(x), ops)
    dx, _ = ops[gelu].backward(None, cache, there(np.ones(8, np.float32)), ops)
    np.testing.assert_allclose(pvt_ref.to_numpy(y), [0, 0, 0, -5e-31, 0, 5e-31, 9, 100], atol=1e-15)
    np.testing.assert_allclose(pvt_ref.to_numpy(dx), [0, 0, 0, 0.5, 0.5, 0.5, 1, 1], atol=1e-15)


def test_gelu_has_the_fit_of_the_kernels_for_the_cpu():
    text = source("gelu.h")
    for coefficient in TANH_FIT:
        assert f" {abs(coefficient)!r}f;" in text, coefficient


def test_attention_bears_scores_that_no_float_holds_the_exponential_of(place):
    q = np.zeros((1, 1, 3, 4))
    q[0, 0, :, 0] = (300, -300, 0)
    k = np.zeros((1, 1, 9, 4))
    k[0, 0, :, 0] = np.arange(9)
    check_case(Case(attention, {}, None, (q, k, normal(1, 1, 1, 9, 4)), (1.0,)), place, 1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_a_sum_of_nothing_is_zero(shape):
    y, _ = cuda_kernels()[sum_rows].forward(None, np.zeros(shape, np.float32), REFERENCE)
    np.testing.assert_array_equal(y, np.zeros(shape[1]))


@no_gxx
@pytest.mark.parametrize("what", ["float64", "odd widths", "wide", "dropout", "5 x 5"])
def test_what_has_no_kernel_is_computed_by_the_readable_layers(what):
    launched = []

    def launch(function, *rest, **more):
        launched.append(function.name)
        Emulation()(function, *rest, **more)

    ops = table_with(Cuda(launch), is_numpy)
    dtype, C = np.float64 if what == "float64" else np.float32, 6 if what == "odd widths" else 8
    cases: dict[Any, Any] = {
        layer_norm: (LayerNormParams(normal(0, C), normal(1, C)), normal(2, 3, C), (1e-6,)),
        gelu: (None, normal(3, 3, C + 3 * (C == 6)), ()),
        attention: (None, tuple(normal(i, 1, 2, 3, C) for i in range(3)), (0.5,)),
        depthwise_conv: (
            ConvParams(normal(4, C, 1, 3, 3), normal(5, C)),
            normal(6, 1, 4, 4, C),
            (),
        ),
    }
    if what == "wide":
        C = 1028
        wide_norm = (LayerNormParams(normal(0, C), normal(1, C)), normal(2, 3, C), (1e-6,))
        cases = {layer_norm: wide_norm}
        cases[attention] = (None, tuple(normal(i, 1, 2, 3, 260) for i in range(3)), (0.5,))
    if what == "dropout":
        cases = {attention: (*cases[attention][:2], (0.5, 0.3, rng_of(1)))}
    if what == "5 x 5":
        p = ConvParams(normal(4, 8, 1, 5, 5), normal(5, 8))
        cases = {depthwise_conv: (p, *cases[depthwise_conv][1:])}
    if what == "float64":
        cases[conv] = (ConvParams(normal(0, 4, 8, 2, 2), None), normal(1, 1, 4, 4, 8), (2, 0))
        p = PatchEmbedParams(LinearParams(normal(0, 4, 8, 2, 2), normal(3, 4)), None)
        cases[patch_embed] = (p, normal(1, 1, 4, 4, 8), (1e-6,))
        bn, buffers = batch_norm_parts(2, 8)
        cases[batch_norm] = (bn, normal(1, 1, 4, 4, 8), (buffers, False))
        unit = ConvUnitParams(ConvParams(normal(0, 8, 8, 3, 3), None), bn)
        cases[conv_unit] = (unit, normal(1, 1, 4, 4, 8), (ConvUnitBuffers(buffers), True))
        cases[resize] = (None, normal(1, 1, 4, 4, 8), ((6, 3),))
        cases[pool] = (None, normal(1, 1, 4, 4, 8), ((3, 2),))
    for op, (p, x, args) in cases.items():
        p, x = (map_arrays(lambda a: a.astype(dtype), tree) for tree in (p, x))
        results = []
        for table in (ops, REFERENCE):
            rng = [rng_of(1) if isinstance(a, np.random.Generator) else a for a in args]
            y, cache = table[op].forward(p, x, table, *rng)
            dx, grads = table[op].backward(p, cache, y, table)
            results.append([y, *(g for tree in (dx, grads) for _, g in named_arrays(tree))])
        for mine, readable in zip(*results, strict=True):
            if sum_rows in ops[op].absorbs and dtype == np.float64:
                assert relative(mine, readable) < 1e-12
            else:
                np.testing.assert_allclose(mine, readable, rtol=1e-6, atol=1e-6)
    assert set(launched) <= {"partial_sums", "add_parts"}  # which the readable layers ask for


# The optimiser ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_a_step_of_the_optimiser_is_that_of_adamw(max_norm, place):
    ops, there = place
    cuda, settings = ops.settings, AdamW(eps=1e-3)
    # more than one block's, and such as fill none
    shapes = {"a": (2, 4100), "b": (3,), "c": (1,), "d": (5, 7)}
    trees = [
        {key: normal(i, *shape) for key, shape in shapes.items()} for i in range(3)
    ]  # weights, gradients, m
    trees += [{key: 0.1 + normal(3, *shape) ** 2 for key, shape in shapes.items()}]
    weights, grads, m, v = wide(narrow([Weights(**tree) for tree in trees]))
    clipped = grads
    if max_norm is not None:
        clipped, norm = clip_by_global_norm(grads, max_norm)
    t, lr = 3, 0.01
    expected, state = adamw_step(weights, clipped, AdamWState(t - 1, m, v), lr, settings)
    bias_1, bias_2 = 1 - settings.beta1**t, 1 - settings.beta2**t
    decays = [is_decayed(key, w) for key, w in named_arrays(weights)]
    rates = [(1 - lr * settings.weight_decay * d, -lr / bias_1, bias_2**-0.5) for d in decays]
    given = there(narrow([[x for _, x in named_arrays(tree)] for tree in (weights, grads, m, v)]))
    arrays = optimizer.gather(*given)
    clip = None
    if max_norm is not None:
        clip = optimizer.clip_factor(arrays, max_norm, cuda)
        factor = min(1, max_norm / (norm + 1e-6))
        np.testing.assert_allclose(pvt_ref.to_numpy(clip), [factor, norm], rtol=1e-6)
    rates = there(np.array(rates, np.float32))
    constants = (settings.beta1, settings.beta2, settings.eps)
    made = optimizer.adamw(arrays, rates, *constants, cuda, clip)
    for mine, tree in zip(made, (expected, state.m, state.v), strict=True):
        for x, (key, y) in zip(mine, named_arrays(tree), strict=True):
            assert relative(pvt_ref.to_numpy(x), y) < 3e-7, key
            assert x.shape == y.shape
    before = narrow([[x for _, x in named_arrays(tree)] for tree in (weights, grads, m, v)])
    for x, y in zip(pvt_ref.to_numpy(given), before, strict=True):
        np.testing.assert_equal(x, y)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 3e38])
def test_a_norm_that_is_no_number_clips_nothing(wrong, place):
    ops, there = place
    g = np.full(5000, wrong, np.float32)
    arrays = optimizer.gather(*([there(x)] for x in (g, g, g, g)), in_place=False)
    factor, norm = pvt_ref.to_numpy(optimizer.clip_factor(arrays, 1.0, ops.settings))
    if wrong == 3e38:  # each square is beyond float32, and so is the norm
        assert norm == np.inf
        assert 0 < factor < 1e-39
    else:
        assert not np.isfinite(norm)
        assert factor == (1 if np.isnan(wrong) else 0)


# Whole networks -----------------------------------------------------------------------------------

CONFIGS = {
    "pvt": replace(
        VARIANTS["pvt_tiny"],
        img_size=32,
        num_classes=5,
        embed_dims=(8, 16, 24, 32),
        num_heads=(1, 2, 2, 4),
        sr_ratios=(4, 2, 2, 1),  # so that stages have several lines of patches
        depths=(1, 1, 1, 1),
    ),
    "pvt_v2": replace(
        VARIANTS["pvt_v2_b0"],
        img_size=32,
        num_classes=5,
        embed_dims=(8, 16, 20, 32),
        num_heads=(1, 2, 5, 8),
        depths=(1, 1, 1, 1),
    ),
    "pvt_v2_linear": replace(
        VARIANTS["pvt_v2_b2_li"],
        img_size=32,
        num_classes=5,
        embed_dims=(8, 16, 20, 32),
        num_heads=(1, 2, 5, 8),
        depths=(1, 1, 1, 1),
    ),
    "vit": replace(
        VARIANTS["deit_s_16"],
        img_size=32,
        num_classes=5,
        embed_dim=24,
        num_heads=3,
        depth=2,
    ),
}


def step(name: str, ops, convert, rng=None, **changes):
    """Logits and all gradients of a small network, by name."""
    config = replace(CONFIGS[name], **changes)
    size = (32, 32) if name in ("vit", "pvt_v2_linear") else (32, 64)
    params, images = random_params(config, 1), normal(2, 2, 3, *size)
    params, images, dy = (convert(tree) for tree in (params, images, normal(3, 2, 5)))
    y, cache = pvt_ref.forward_with_cache(params, images, config, rng, ops=ops)
    grads, dimages = pvt_ref.backward(params, cache, dy, config)
    alone = pvt_ref.forward(params, images, config, ops=ops)
    if rng is None:
        np.testing.assert_array_equal(*(pvt_ref.to_numpy(each) for each in (alone, y)))
    return pvt_ref.to_numpy({"logits": y, "dimages": dimages} | dict(named_arrays(grads)))


@pytest.mark.parametrize("products", ["own", "cublaslt", "cupy"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_network_equals_the_readable_one(name, products, place):
    ops, there = place
    if there is same:
        ops = emulated(ORDERS[-1], products=products, cublaslt=StandIn())
    else:
        ops = cuda_kernels(products=products)
    expected = step(name, REFERENCE, lambda tree: wide(narrow(tree)))
    readable = step(name, REFERENCE, narrow)
    found = step(name, ops, lambda tree: there(narrow(tree)))
    largest = max(np.linalg.norm(x) for x in expected.values())
    for key, x in found.items():
        error, plain = (np.linalg.norm(each - expected[key]) for each in (x, readable[key]))
        norm = np.linalg.norm(expected[key])
        assert error <= max(4 * plain, 2e-6 * norm, 1e-7 * largest), key
    for key, x in step(name, ops, lambda tree: there(narrow(tree))).items():
        np.testing.assert_array_equal(x, found[key], err_msg=key)


@no_gxx
@pytest.mark.parametrize("attn_drop_rate", [0.0, 0.2])
@pytest.mark.parametrize("source", [lambda: rng_of(4), lambda: Draws(4, 1)])
def test_the_same_seed_drops_the_same(source, attn_drop_rate, poisoned):
    rates = {"drop_rate": 0.1, "attn_drop_rate": attn_drop_rate, "drop_path_rate": 0.3}
    rates["depths"] = (1, 2, 1, 1)
    expected = step("pvt", REFERENCE, narrow, source(), **rates)
    ops = emulated(0, products="cublaslt", cublaslt=StandIn())
    found = step("pvt", ops, narrow, source(), **rates)
    still = step("pvt", REFERENCE, narrow, depths=(1, 2, 1, 1))
    assert relative(still["logits"], expected["logits"]) > 1e-2
    for key, x in found.items():
        assert np.linalg.norm(x - expected[key]) <= 2e-5 * np.linalg.norm(expected[key]) + 1e-5, key


@no_gxx
@pytest.mark.parametrize("name", ["pvt", "pvt_v2"])
def test_pyramids_equal_the_readable_ones(name, poisoned):
    config = CONFIGS[name]
    params, images = narrow(random_params(config, 1)), normal(2, 1, 3, 32, 64, dtype=np.float32)
    results = []
    for ops in (REFERENCE, emulated(5)):
        maps, cache = pvt_ref.forward_pyramid_with_cache(params, images, config, ops=ops)
        dmaps = [normal(i, *y.shape, dtype=np.float32) for i, y in enumerate(maps)]
        grads, dimages = pvt_ref.backward_pyramid(params, cache, dmaps, config)
        results.append([*maps, dimages, *(g for _, g in named_arrays(grads))])
    for mine, readable in zip(*results[::-1], strict=True):
        error = np.linalg.norm(mine - readable)
        assert error <= 5e-6 * np.linalg.norm(readable) + 1e-5


@no_gxx
@pytest.mark.parametrize(("name", "in_batch"), [("pvt", True), ("linear", False), ("pup", True)])
def test_segmentation_networks_equal_the_readable_ones(name, in_batch, poisoned):
    config = SEGMENTORS[name]
    params = params_of(config, 1, np.float32)
    images = normal(2, 1, 3, 32, 48, dtype=np.float32)
    results = []
    for convert, ops in ((wide_floats, REFERENCE), (same, REFERENCE), (same, emulated(5))):
        p, x = convert(params), convert(images)
        y, cache = pvt_ref.forward_with_cache(p, x, config, ops=ops, batch_statistics=in_batch)
        dy = convert(normal(3, *y.shape, dtype=np.float32))
        grads, dimages = pvt_ref.backward(p, cache, dy, config)
        seen = pvt_ref.updated(p, cache)
        found = {"logits": y, "dimages": dimages} | dict(named_arrays((grads, seen)))
        results.append(found)
    exact, plain, mine = results
    assert list(mine) == list(exact)
    largest = max(np.linalg.norm(x) for key, x in exact.items() if "num_batches" not in key)
    for key, x in mine.items():
        errors = [np.linalg.norm(each - exact[key]) for each in (x, plain[key])]
        limit = max(4 * errors[1], 3e-6 * np.linalg.norm(exact[key]), 1e-6 * largest)
        assert errors[0] <= limit, key


def wide_floats(tree):
    return map_arrays(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)


@no_gxx
def test_attention_maps_are_the_readable_ones(poisoned):
    # kernels that never make the weights step aside when the weights are watched
    config = CONFIGS["pvt"]
    params, images = narrow(random_params(config, 1)), normal(2, 1, 3, 32, 32, dtype=np.float32)
    expected, found = (
        pvt_ref.attention_maps(params, images, config, ops=ops) for ops in (REFERENCE, emulated(0))
    )
    assert list(found) == list(expected)
    for key, x in found.items():
        assert relative(x, expected[key]) < 2e-6


# Weights that do not change -----------------------------------------------------------------------


@no_gxx
@pytest.mark.parametrize("name", ["pvt", "pvt_v2", "vit"])
def test_arranged_weights_give_the_same_bits(name, poisoned):
    config, ops = CONFIGS[name], emulated(5)
    params, images = narrow(random_params(config, 1)), normal(2, 1, 3, 32, 32, dtype=np.float32)
    model = pvt_ref.prepare(params, config)
    copies = replace(model, params=arranged(params))
    for way in (pvt_ref.forward, lambda *a, **how: pvt_ref.forward_pyramid(*a, **how)[-1]):
        expected, found = (way(m, images, ops=ops) for m in (model, copies))
        np.testing.assert_array_equal(found, expected)


def test_nothing_of_arranged_weights_is_copied_again():
    params = arranged(narrow(random_params(CONFIGS["pvt_v2"], 1)))
    kernels = [w for _, w in named_arrays(params) if w.ndim == 4]
    assert len(kernels) == 4 + 3 + 4  # patches, reductions, and depth-wise
    depthwise = [w for w in kernels if w.shape[1] == 1]
    for w in kernels:
        matrix = packed(_kernel_first(w)) if w.shape[1] == 1 else kernel_to_matrix(w)
        assert matrix.flags.c_contiguous
        assert np.shares_memory(matrix, w)
    assert len(depthwise) == 4
    assert [type(b.attn) for b in params.block4] == [MHAParams]
    heads = arranged(ConvParams(normal(1, 8, 4, 3, 3), None)).weight
    assert np.shares_memory(kernel_to_matrix(heads), heads)


def test_what_is_made_of_queries_and_keys_comes_apart_again():
    q, kv = (LinearParams(normal(i, n, 8), normal(i + 2, n)) for i, n in enumerate((8, 16)))
    p = SRAParams(q, kv, LinearParams(normal(5, 8, 8), None), None, None)
    again = taken_apart(joined(p))
    for (key, x), (_, y) in zip(named_arrays(p), named_arrays(again), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=key)
    assert not can_join(replace(p, q=LinearParams(q.weight, None)))
    assert not can_join(replace(p, norm=LayerNormParams(normal(1, 8), normal(2, 8))))
    assert not can_join(joined(p))


def test_weights_are_arranged_once_for_a_model_and_few_are_kept():
    known, owners = Arranged(most=2), [object() for _ in range(3)]
    params = ConvParams(normal(1, 8, 4, 3, 3), None)
    first = known.of(owners[0], params)
    assert known.of(owners[0], params) is first
    second = known.of(owners[1], params)
    assert second is not first  # another model's weights may have been written to since
    known.of(owners[0], params)
    known.of(owners[2], params)
    assert len(known) == 2
    assert known.of(owners[0], params) is first
    assert known.of(owners[1], params) is not second
    assert len(pickle.loads(pickle.dumps(known))) == 0
    known.clear()
    assert len(known) == 0


# Counts, and laws of the table --------------------------------------------------------------------


class Counting:
    """Launches nothing, and counts by kernel; what a kernel would have filled holds zeros."""

    def __init__(self):
        self.calls = Counter()

    def __call__(self, function, *rest, **more):
        self.calls[function.name] += 1

    def multiply(self, a, b, shape, precision, bias, residual):
        """In the place of cuBLASLt."""
        self.calls["cublasLtMatmul"] += min(shape[:-2], default=1)
        return np.zeros(shape, np.float32)


@pytest.fixture
def dry(monkeypatch):
    """A table that launches nothing, and its counter."""
    monkeypatch.setattr(np, "empty", np.zeros)
    monkeypatch.setattr(np, "empty_like", np.zeros_like)
    counting = Counting()
    return table_with(Cuda(counting, cublaslt=loose(lambda x: counting)), is_numpy), counting.calls


#: Launches of these kernels: of a forward, of a forward that keeps what the backward needs, and of
#: both. Not counted is what CuPy does by itself: positions added, and, of weights that are not
#: arranged, those of patches permuted and those of queries and keys put together. The limit for
#: the forward of pvt_small by the default products is 180.
LAUNCHES = {
    ("pvt_small", "own"): (175, 191, 736),
    ("pvt_small", "cublaslt"): (181, 181, 723),
    ("pvt_small", "cupy"): (86, 86, 406),
    ("pvt_v2_b0", "own"): (109, 109, 425),
    ("pvt_v2_b0", "cublaslt"): (107, 107, 423),
    ("deit_s_16", "own"): (88, 100, 391),
    ("deit_s_16", "cublaslt"): (100, 100, 391),
}


@pytest.mark.parametrize(("name", "products"), LAUNCHES)
def test_the_number_of_launches_does_not_grow_unseen(name, products, dry):
    ops, calls = dry
    ops = table_with(replace(ops.settings, products=products), is_numpy)
    config = replace(VARIANTS[name], img_size=32, num_classes=3)
    params, images = (
        narrow(random_params(config, 1, np.float32)),
        normal(1, 1, 3, 32, 32, dtype=np.float32),
    )
    pvt_ref.forward(params, images, config, ops=ops)
    found = [calls.total()]
    calls.clear()
    y, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
    found.append(calls.total())
    pvt_ref.backward(params, cache, y, config)
    assert (*found, calls.total()) == LAUNCHES[name, products], dict(calls)


def test_the_number_of_launches_of_a_head_does_not_grow_unseen(dry):
    ops, calls = dry
    config = SEGMENTORS["pvt"]
    params = params_of(config, 1, np.float32)
    found = []
    for in_batch in (False, True):
        calls.clear()
        images = normal(1, 1, 3, 32, 64, dtype=np.float32)
        y, cache = pvt_ref.forward_with_cache(
            params, images, config, ops=ops, batch_statistics=in_batch
        )
        found.append(dict(calls))
        pvt_ref.backward(params, cache, y, config)
        found.append(dict(calls - Counter(found[-1])))
    names = ["batch_norm", "batch_norm_squares", "batch_norm_sums", "batch_norm_backward", "resize"]
    counts = [[each.get(name, 0) for name in names] for each in found]
    # seven units; four tables, three levels told by nearest, six enlargements; and back
    assert counts == [[7, 0, 0, 0, 13], [0, 0, 7, 7, 13], [7, 7, 0, 0, 13], [0, 0, 7, 7, 13]]
    assert [sum(each.values()) for each in found] == [108, 276, 136, 276]


@pytest.mark.parametrize("name", [*CONFIGS, "segmentor"])
def test_replacing_any_operation_takes_effect(name, dry):
    ops, _ = dry
    if name == "segmentor":
        config, images = SEGMENTORS["pvt"], normal(2, 1, 3, 32, 64, dtype=np.float32)
        params = params_of(config, 1, np.float32)
    else:
        config, images = CONFIGS[name], normal(2, 1, 3, 32, 32, dtype=np.float32)
        params = narrow(random_params(config, 1))
    asked: set[Operation] = set()
    watched = REFERENCE.watched(lambda call: asked.add(call.operation))
    y, cache = pvt_ref.forward_with_cache(params, images, config, ops=watched)
    pvt_ref.backward(params, cache, y, config)
    assert set(ops.twins) & asked
    for op in asked:
        seen = Counter()

        def counted(*args, op=op, seen=seen, **kwargs):
            seen["calls"] += 1
            return op.forward(*args, **kwargs)

        table = ops.replace(op, Operation(counted, op.backward))
        y, cache = pvt_ref.forward_with_cache(params, images, config, ops=table)
        pvt_ref.backward(params, cache, y, config)
        assert seen["calls"], op
