"""The kernels: what the suite under PVT_REF_OPS=blocked does not ask of them.

Every test of operations, properties, golden numbers and transformers runs with the kernels too.
Here: every kernel against its readable twin for several thread counts and tile sizes, tiles by the
size of the cache, the fitted GELU, memory, and manners towards the threads and settings of others.
"""

import gc
import threading
import time
import tracemalloc
from dataclasses import replace
from typing import Any

import fit_gelu
import numpy as np
import operations
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from closeness import relative
from hypothesis import HealthCheck, given, settings
from operations import OPERATIONS
from strategies import ModelCase, normal, rng_of
from threadpoolctl import threadpool_info, threadpool_limits

import pvt_ref
from pvt_ref import REFERENCE, VARIANTS, blocked_ops, count_cost
from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.kernels.cpu import threads as threads_module
from pvt_ref.kernels.cpu import tiling
from pvt_ref.kernels.cpu.gelu import TANH_FIT, gelu_rows
from pvt_ref.kernels.cpu.linear import column_sums, for_many_rows
from pvt_ref.kernels.cpu.patch_embed import projection
from pvt_ref.kernels.cpu.threads import Scratch, default_threads, run_pieces
from pvt_ref.kernels.cpu.tiling import Tiling, by_group, cut, elements_for, share_columns
from pvt_ref.layers.attention import attention
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams, linear
from pvt_ref.layers.patch_embed import PatchEmbedParams, patch_embed
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Operation
from pvt_ref.tree import named_arrays

CONFIG = replace(
    VARIANTS["pvt_tiny"],
    img_size=64,
    embed_dims=(8, 12, 20, 32),
    num_heads=(1, 2, 5, 4),
    num_classes=7,
)
CASE = ModelCase(CONFIG, 3, (96, 160), 5)


def blas_threads() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


# Equal to the readable layers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "elements"), [(1, 1), (1, 50), (2, 1), (2, 2**18), (4, 50), (4, 2**18)]
)
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"drop"}))
def test_kernel_equals_its_readable_twin(name, threads, elements, monkeypatch):
    ops = blocked_ops(threads, elements=elements)

    def compute(table, case, dy):
        monkeypatch.setattr(operations, "table_under_test", lambda: table)
        y, cache = case.forward(case.inputs)
        without_cache, _ = case.forward(case.inputs, keep=False)
        np.testing.assert_array_equal(y, without_cache)
        return y, case.backward(case.inputs, cache, dy(y))

    @settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(OPERATIONS[name])
    def check(case):
        expected, expected_grads = compute(REFERENCE, case, lambda y: normal(9, *y.shape))
        y, grads = compute(ops, case, lambda y: normal(9, *y.shape))
        assert relative(y, expected) < 1e-13
        whole = np.concatenate([np.ravel(g) for g in expected_grads.values()])
        for key, g in grads.items():
            assert g.shape == expected_grads[key].shape
            error = np.linalg.norm(g - expected_grads[key])
            assert error <= 1e-12 * np.linalg.norm(whole), key

    check()


def run_model(case, ops, drop=None, dtype: Any = np.float64, **changes):
    config = replace(case.config, **changes)
    params = pvt_ref.from_state_dict(
        {k: x.astype(dtype) for k, x in pvt_ref.to_state_dict(case.params()).items()}, config
    )
    rng = None if drop is None else rng_of(drop)
    images = case.images().astype(dtype)
    y, cache = pvt_ref.forward_with_cache(params, images, config, rng, ops=ops)
    grads, dimages = pvt_ref.backward(params, cache, normal(3, *y.shape, dtype=dtype), config)
    return {"logits": y, "dimages": dimages} | dict(named_arrays(grads))


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("elements", [256, 4096, 2**18])
def test_a_whole_model_equals_the_readable_one(threads, elements):
    expected = run_model(CASE, REFERENCE)
    for key, x in run_model(CASE, blocked_ops(threads, elements=elements)).items():
        assert relative(x, expected[key]) < 1e-11, key


@pytest.mark.parametrize(
    "rates",
    [
        {"drop_path_rate": 0.4},
        {"drop_path_rate": 0.4, "drop_rate": 0.1},
        {"attn_drop_rate": 0.2},
    ],
)
def test_the_same_seed_drops_the_same(rates):
    expected = run_model(CASE, REFERENCE, drop=8, **rates)
    still = run_model(CASE, REFERENCE)
    assert relative(expected["logits"], still["logits"]) > 1e-3
    for key, x in run_model(CASE, blocked_ops(2, elements=4096), drop=8, **rates).items():
        assert relative(x, expected[key]) < 1e-11, key


def test_dropout_alone_on_attention_and_mlp_is_the_readable_one():
    ops = blocked_ops(2, elements=16)
    q, k, v = (normal(i, 2, 3, 5, 4) for i in range(3))
    dy = normal(4, 2, 3, 5, 4)
    for table in (REFERENCE, ops):
        y, cache = table[attention].forward(None, (q, k, v), table, 0.5, 0.3, rng_of(1))
        grads, _ = table[attention].backward(None, cache, dy, table)
        if table is REFERENCE:
            expected, expected_grads = y, grads
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)
    for g, e in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-11, atol=1e-13)
    block = CASE.params().block1[0].mlp
    x = normal(5, 2, 6, 8)
    for table in (REFERENCE, ops):
        y, cache = table[mlp].forward(block, x, table, 0.3, rng_of(1))
        dx, _ = table[mlp].backward(block, cache, x, table)
        if table is REFERENCE:
            expected, expected_dx = y, dx
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-12, atol=1e-14)


def test_the_number_of_helpers_does_not_change_a_bit():
    # who computes a piece is left to chance; what comes out is not
    ops = blocked_ops(4, elements=4096)
    first = run_model(CASE, ops, dtype=np.float32)
    for _ in range(3):
        for key, x in run_model(CASE, ops, dtype=np.float32).items():
            np.testing.assert_array_equal(x, first[key], err_msg=key)


def test_many_keys_err_in_float32_no_more_than_pytorch_does_twice():
    q, k, v = (normal(i, 1, 2, n, 64) for i, n in enumerate((300, 4096, 4096)))
    exact, _ = attention.forward(None, (q, k, v), REFERENCE, 0.125)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    ops = blocked_ops(2)
    ours, _ = ops[attention].forward(None, (q, k, v), ops, 0.125, keep=False)
    tensors: Any = map(torch.tensor, (q, k, v))
    theirs = F.scaled_dot_product_attention(*tensors, scale=0.125)
    assert relative(ours, exact) <= 2 * relative(theirs.numpy(), exact)


def test_sums_of_many_rows_are_as_exact_as_the_readable_ones():
    x = np.abs(normal(1, 50_000, 8)).astype(np.float32)
    exact = x.sum(axis=0, dtype=np.float64)
    # products of 256 rows round in float32, their sum in float64; all in float32: 1.3e-7
    assert column_sums(x).dtype == np.float64
    assert relative(column_sums(x), exact) < 4e-8
    p = LinearParams(np.eye(8, dtype=np.float32), np.zeros(8, np.float32))
    ops = blocked_ops(2)
    _, cache = ops[linear].forward(p, x, ops)
    _, grads = ops[linear].backward(p, cache, x, ops)
    assert grads.bias.dtype == np.float32
    assert relative(grads.bias, exact) < 1.5e-7


def test_sums_over_many_tiles_are_in_double_precision():
    x, dy = normal(1, 6000, 3), np.abs(normal(2, 6000, 3))
    p = LayerNormParams(np.ones(3), np.zeros(3))
    _, cache = layer_norm.forward(p, x, REFERENCE, 1e-6)
    dy = np.abs(dy) * np.sign(cache.x_hat)  # the shares of dweight do not cancel
    _, exact = layer_norm.backward(p, cache, dy, REFERENCE)
    ops = blocked_ops(1, elements=1)
    narrow = LayerNormParams(*(w.astype(np.float32) for w in (p.weight, p.bias)))
    _, cache = ops[layer_norm].forward(narrow, x.astype(np.float32), ops, 1e-6)
    _, grads = ops[layer_norm].backward(narrow, cache, dy.astype(np.float32), ops)
    assert relative(grads.weight, exact.weight) < 2e-7


def test_where_there_is_no_bias_there_is_no_gradient_of_one():
    ops, block = blocked_ops(2, elements=64), CASE.params().block1[0]
    bare = MLPParams(*(LinearParams(fc.weight, None) for fc in (block.mlp.fc1, block.mlp.fc2)))
    x = normal(5, 2, 6, 8)
    _, cache = ops[mlp].forward(bare, x, ops)
    _, grads = ops[mlp].backward(bare, cache, x, ops)
    assert grads.fc1.bias is None
    assert grads.fc2.bias is None


def test_weights_for_many_rows_are_the_same_numbers_column_by_column():
    p = LinearParams(normal(1, 70, 20), normal(2, 70))
    assert for_many_rows(p, 1023) is p
    ready = for_many_rows(p, 1024)
    assert ready.weight.T.flags.c_contiguous
    assert ready.bias is p.bias
    np.testing.assert_array_equal(ready.weight, p.weight)


@pytest.mark.parametrize(("batch", "channels_first"), [(1, True), (2, True), (3, False)])
def test_patches_and_kernel_come_in_one_order_whichever_it_is(batch, channels_first):
    # 6 patches an image, and 12 output channels
    norm = LayerNormParams(normal(3, 12), normal(4, 12))
    p = PatchEmbedParams(LinearParams(normal(1, 12, 5, 2, 2), normal(2, 12)), norm)
    ready = projection(p.proj, norm, 6 * batch, Tiling(2, 16))
    assert ready.channels_first == channels_first
    x, ops = normal(5, batch, 4, 6, 5), blocked_ops(2, elements=16)
    y, cache = patch_embed.forward(p, x, REFERENCE, 1e-6)
    ours, our_cache = ops[patch_embed].forward(p, x, ops, 1e-6)
    dx, grads = patch_embed.backward(p, cache, y * y, REFERENCE)
    our_dx, our_grads = ops[patch_embed].backward(p, our_cache, y * y, ops)
    np.testing.assert_allclose(ours, y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(our_dx, dx, rtol=1e-10, atol=1e-12)
    for (key, ours), (_, exact) in zip(named_arrays(our_grads), named_arrays(grads), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-11, err_msg=key)


# GELU -----------------------------------------------------------------------------------------


def fitted_gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, slope = x.copy(), np.empty_like(x)
    gelu_rows(y[None], Scratch(), slope[None])
    return y, slope


def exact_gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    cdf = scipy.special.ndtr(x)
    return x * cdf, cdf + x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)


def test_the_fit_is_what_its_script_makes():
    coefficients, error = fit_gelu.fit()
    np.testing.assert_allclose(TANH_FIT, coefficients, rtol=1e-4)
    assert 6e-8 < error < 7e-8


def test_the_fit_errs_less_than_float32_rounds_and_keeps_growing():
    x = np.linspace(-40, 40, 800_001)
    u = x * np.polynomial.polynomial.polyval(x * x, TANH_FIT)
    assert np.abs(x * (1 + np.tanh(u)) / 2 - exact_gelu(x)[0]).max() < 7e-8
    assert (np.diff(u) > 0).all()


def test_gelu_in_float32_errs_no_more_than_pytorch():
    x = np.linspace(-12, 12, 1_000_001, dtype=np.float32)
    leaf = torch.tensor(x, requires_grad=True)
    their_y = F.gelu(leaf)
    their_y.sum().backward()
    assert leaf.grad is not None
    theirs = their_y.detach().numpy(), leaf.grad.numpy()
    for ours, their, exact in zip(fitted_gelu(x), theirs, exact_gelu(x), strict=True):
        assert np.abs(ours - exact).max() <= np.abs(their - exact).max()
        z = slice(None, None, 7)
        assert relative(ours[z], exact[z]) <= 2 * relative(their[z], exact[z])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gelu_far_out(dtype):
    x = np.array([0, -0.0, 1e-40, -1e-40, 30, -30, 1e19, -1e19, 1e30, -1e30], dtype)
    y, slope = fitted_gelu(x)
    np.testing.assert_allclose(y, np.maximum(x, 0) * (np.abs(x) > 1) + x / 2 * (np.abs(x) < 1))
    np.testing.assert_allclose(slope, np.where(np.abs(x) < 1, 0.5, x > 0), atol=1e-30)
    assert np.isnan(fitted_gelu(np.array([np.nan], dtype))[0]).all()


def test_gelu_of_a_single_number():
    ops = blocked_ops(2)
    y, cache = ops[gelu].forward(None, np.array(1.0), ops)
    assert y.shape == ()
    np.testing.assert_allclose(y, 0.8413447460685429, rtol=1e-15)
    dx, _ = ops[gelu].backward(None, cache, np.array(1.0), ops)
    np.testing.assert_allclose(dx, 1.0833154705876864)


# Memory ---------------------------------------------------------------------------------------


def peak(images, config, params, ops) -> int:
    pvt_ref.forward(params, images[:, :, :64, :64], config, ops=ops)
    gc.collect()
    tracemalloc.start()
    try:
        pvt_ref.forward(params, images, config, ops=ops)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_with_the_number_of_tokens_and_not_with_its_square():
    params = CASE.params()
    sides = (384, 768)
    ops = blocked_ops(2, elements=2**14)
    images = [normal(1, 1, 3, side, side) for side in sides]
    small, large = (peak(x, CONFIG, params, ops) for x in images)
    assert large < 4.4 * small
    # the readable layers hold all scores: sixteen times as many
    bills = [count_cost(CONFIG, side, dtype="float64").peak_bytes for side in sides]
    assert bills[1] > 8 * bills[0]
    assert large < bills[1] / 5


def test_a_convolution_holds_no_array_of_all_windows():
    x, p = normal(1, 1, 64, 48, 8), ConvParams(normal(2, 8, 8, 5, 5), normal(3, 8))

    def peaks(ops):
        y, cache = ops[conv].forward(p, x, ops, 1, 2)  # what is imported now is not counted
        ops[conv].backward(p, cache, y, ops)
        del y, cache
        gc.collect()
        tracemalloc.start()
        try:
            y, cache = ops[conv].forward(p, x, ops, 1, 2)
            forward = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            ops[conv].backward(p, cache, y, ops)
            return forward, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert min(peaks(REFERENCE)) > 25 * x.nbytes
    assert max(peaks(blocked_ops(2, elements=2**10))) < 6 * x.nbytes


@pytest.mark.parametrize("op", [conv, depthwise_conv])
def test_convolutions_of_some_threads_give_the_same_bits_each_time(op):
    x, settings = normal(1, 6, 24, 18, 8, dtype=np.float32), (2, 1) if op is conv else ()
    weight = normal(2, 8, 8 if op is conv else 1, 3, 3, dtype=np.float32)
    p, ops = ConvParams(weight, normal(3, 8, dtype=np.float32)), blocked_ops(4, elements=2**10)
    runs = []
    for _ in range(4):
        y, cache = ops[op].forward(p, x, ops, *settings)
        dx, grads = ops[op].backward(p, cache, y, ops)
        runs.append([a.tobytes() for a in (y, dx, grads.weight, grads.bias)])
    assert all(run == runs[0] for run in runs)


# Threads --------------------------------------------------------------------------------------


def test_pieces_are_worked_off_in_order_of_their_results():
    for threads in (1, 2, 4):
        results = run_pieces(lambda i, scratch: i * i, range(20), threads)
        assert results == [i * i for i in range(20)]
    assert run_pieces(lambda i, scratch: i, [], 3) == []


def test_no_more_threads_than_asked_for_and_not_fewer():
    at_work, most = set(), 0
    lock, both = threading.Lock(), threading.Barrier(3, timeout=20)

    def work(i, scratch):
        nonlocal most
        with lock:
            at_work.add(threading.get_ident())
            most = max(most, len(at_work))
        if i < 3:
            both.wait()  # three are needed to get past it
        time.sleep(0.001)
        with lock:
            at_work.discard(threading.get_ident())
        assert scratch.threads == 1

    run_pieces(work, range(30), 3)
    assert most == 3


def test_an_error_in_a_piece_ends_the_work_and_reaches_the_caller():
    done = []

    def work(i, scratch):
        if i == 5:
            raise MemoryError("no room")
        done.append(i)
        time.sleep(0.002)

    for threads in (1, 3):
        done.clear()
        before = blas_threads()
        with pytest.raises(MemoryError, match="no room"):
            run_pieces(work, range(1000), threads)
        assert len(done) < 20
        assert blas_threads() == before


def test_an_error_in_a_helper_alone_reaches_the_caller():
    caller, helping = threading.get_ident(), threading.Event()

    def work(i, scratch):
        if threading.get_ident() == caller:
            assert helping.wait(20)
        else:
            helping.set()
            raise MemoryError("no room for the helper")

    with pytest.raises(MemoryError, match="no room for the helper"):
        run_pieces(work, range(4), 2)


def test_where_no_thread_can_be_started_the_caller_does_it_all(monkeypatch):
    class Full:
        @staticmethod
        def start_new_thread(*args):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads_module, "_thread", Full)
    monkeypatch.setattr(threads_module, "_helpers", threads_module._Helpers())
    assert run_pieces(lambda i, scratch: -i, range(9), 4) == [-i for i in range(9)]
    assert threads_module._helpers.jobs.empty()


def test_settings_of_the_caller_hold_in_the_threads():
    with np.errstate(over="raise", divide="ignore"):
        seen = run_pieces(lambda i, scratch: time.sleep(0.002) or np.geterr(), range(20), 3)
        assert all(settings == np.geterr() for settings in seen)


def test_blas_threads_are_as_before_afterwards():
    images, params = CASE.images(), CASE.params()
    for count in (1, 2, 3):
        with threadpool_limits(count, user_api="blas"):
            before = blas_threads()
            assert set(before) == {count}
            pvt_ref.forward(params, images, CONFIG, ops=blocked_ops(2, elements=1024))
            assert blas_threads() == before

            def look(i, scratch, count=count):
                assert set(blas_threads()) == {1}
                assert default_threads() == count
                run_pieces(lambda i, scratch: None, range(2), 2)
                assert set(blas_threads()) == {1}

            run_pieces(look, range(3), 2)
            assert blas_threads() == before
            assert default_threads() == count


def test_two_callers_do_not_disturb_each_other():
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        cases = [ModelCase(CONFIG, 2, (64, 96), seed) for seed in range(2)]
        ops = blocked_ops(2, elements=512)
        expected = [pvt_ref.forward(c.params(), c.images(), CONFIG, ops=ops) for c in cases]
        wrong: list[int] = []

        def call(i):
            params, images = cases[i].params(), cases[i].images()
            for _ in range(15):
                logits = pvt_ref.forward(params, images, CONFIG, ops=ops)
                if not np.array_equal(logits, expected[i]):
                    wrong.append(i)

        callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not wrong
        assert blas_threads() == before


def test_whoever_leaves_last_restores_and_any_thread_can_limit():
    inside, leave = threading.Event(), threading.Event()

    def stay(i, scratch):
        inside.set()
        leave.wait(20)

    def start_other(i, scratch):
        caller.start()
        inside.wait(20)

    def other():
        run_pieces(stay, [0], 1)

    with threadpool_limits(3, user_api="blas"):
        before = blas_threads()
        caller = threading.Thread(target=other)
        run_pieces(start_other, [0], 1)
        assert set(blas_threads()) == {1}  # the other is still inside
        assert default_threads() == 3
        leave.set()
        caller.join()
        assert blas_threads() == before
        inside.clear()
        leave.clear()
        caller = threading.Thread(target=other)
        caller.start()
        inside.wait(20)
        assert set(blas_threads()) == {1}
        leave.set()
        caller.join()
        assert blas_threads() == before


def test_libraries_with_a_setting_for_each_thread(monkeypatch):
    class PerThread:
        internal_api = "mkl"

        def __init__(self):
            self.counts: dict[int, int] = {}
            self.within: set[int] = set()

        def get_num_threads(self):
            return self.counts.get(threading.get_ident(), 8)

        def set_num_threads(self, count):
            self.counts[threading.get_ident()] = count

    library = PerThread()
    monkeypatch.setattr(threads_module, "_blas", lambda: [library])
    assert default_threads() == 8
    seen = run_pieces(
        lambda i, scratch: time.sleep(0.002) or library.get_num_threads(), range(20), 3
    )
    assert set(seen) == {1}
    assert set(library.counts.values()) == {8}  # of the caller and of every helper
    assert default_threads() == 8


# Cutting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 10), slice(5, 105)])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_parts_are_even_and_leave_nothing_out(rows, size):
    parts = list(cut(rows, size))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(rows.start, rows.stop))
    groups = list(by_group(rows, size))
    flat = [g * size + i for g, within, _ in groups for i in range(within.start, within.stop)]
    assert flat == list(range(rows.start, rows.stop))
    counted = [i for _, _, part in groups for i in range(part.start, part.stop)]
    assert counted == list(range(rows.stop - rows.start))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("count", "size"), [(1, 5), (7, 2), (100, 9), (1000, 64)])
def test_work_is_shared_without_gap_or_overlap(threads, count, size):
    pieces = Tiling(threads, elements=1).run(lambda tiles, scratch: tiles, count, size)
    rows = [i for tiles in pieces for tile in tiles for i in range(tile.start, tile.stop)]
    assert rows == list(range(count))
    assert max(tile.stop - tile.start for tiles in pieces for tile in tiles) <= size
    assert len(pieces) >= min(threads, count)
    assert all(pieces)  # nobody is called for nothing


def test_few_rows_are_shared_by_columns():
    seen = []

    def work(tiles, scratch):
        assert scratch.threads == 3
        seen.extend(share_columns(lambda columns, scratch: columns, 100, scratch))

    Tiling(3).run(work, 10, 100)
    assert [(c.start, c.stop) for c in seen] == [(0, 33), (33, 66), (66, 100)]
    assert share_columns(lambda columns, scratch: columns, 40, Scratch(3)) == [slice(0, 40)]
    assert share_columns(lambda columns, scratch: columns, 400, Scratch(1)) == [slice(0, 400)]


# Tiles by the size of the cache --------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "elements"),
    [
        (2**20, 2**18),  # 1 to 2 MiB: what the size was tuned for
        (5 * 2**18, 2**18),
        (2**21, 2**18),
        (2**24, 2**18),
        (2**19, 2**17),
        (2**20 - 1, 2**17),
        (2**18, 2**16),
        (1, 2**15),
    ],
)
def test_a_tile_is_as_large_as_the_cache_but_not_larger_than_it_needs(cache, elements):
    assert elements_for(cache) == elements


@pytest.fixture
def fresh_cache():
    tiling.cache_size.cache_clear()
    yield
    tiling.cache_size.cache_clear()


def test_the_size_of_the_cache_is_read_where_linux_tells_it(tmp_path, monkeypatch, fresh_cache):
    told = [("1", "48K"), ("1", "32K"), ("2", "512K"), ("3", "32768K")]
    for i, (level, size) in enumerate(told):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        (folder / "level").write_text(level + "\n")
        (folder / "size").write_text(size + "\n")
    (tmp_path / "index9").mkdir()  # tells nothing
    monkeypatch.setattr(tiling, "_CACHES", tmp_path)
    assert tiling.cache_size() == 2**19
    assert blocked_ops(2).settings == Tiling(2, 2**17)
    assert "elements=131072" in repr(blocked_ops(2))
    assert blocked_ops(2, elements=2**18).settings == Tiling(2, 2**18)  # as said, whatever is here


@pytest.mark.parametrize(
    ("told", "size"), [(2**22, 2**22), (0, 2**20), (ValueError, 2**20), (None, 2**20)]
)
def test_where_linux_tells_nothing_posix_does_or_it_is_the_usual(
    told, size, tmp_path, monkeypatch, fresh_cache
):
    def sysconf(name):
        assert name == "SC_LEVEL2_CACHE_SIZE"
        if told is ValueError:
            raise ValueError("unrecognized configuration name")
        return told

    monkeypatch.setattr(tiling, "_CACHES", tmp_path / "none")
    if told is None:
        monkeypatch.delattr(tiling.os, "sysconf", raising=False)
    else:
        monkeypatch.setattr(tiling.os, "sysconf", sysconf, raising=False)
    assert tiling.cache_size() == size


# Replacing ------------------------------------------------------------------------------------


def test_sums_over_rows_are_asked_for_by_the_small_twins():
    # so that another way of summing lets none of these step aside
    table = blocked_ops(2, elements=16).replace(sum_rows, Operation(summed, sum_rows.backward))
    assert {linear, layer_norm, mlp, attention} <= set(table.twins)
    x, dy = normal(1, 3, 4, 8), normal(2, 3, 4, 8)
    p = CASE.params().block1[0]
    for op, params, further in (
        (linear, p.attn.q, ()),
        (layer_norm, p.norm1, (1e-6,)),
        (mlp, p.mlp, ()),
    ):
        _, cache = table[op].forward(params, x, table, *further)
        _, grads = table[op].backward(params, cache, dy, table)
        for key, gradient in named_arrays(grads):
            replaced = key.endswith("bias") or op is layer_norm
            assert (gradient == 7).all() == replaced, (op, key)


def summed(p, x, ops, keep=True):
    return np.full(x.shape[1], 7.0), None


def test_rows_wider_than_1024_are_cut_into_tiles_of_as_many_rows():
    settings = Tiling(1, 2**18)
    assert [settings.rows(width) for width in (1, 256, 1024, 1025, 2048, 2**20)] == [
        *(2**18, 1024, 256),
        *(256, 256, 256),
    ]
    assert Tiling(1, 16).rows(64) == 1
