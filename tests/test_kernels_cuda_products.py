"""Matrix products on CUDA, without a GPU: the own kernel by the emulation, cuBLASLt by a stand-in.

Expected is the product in float64. The tensor core of the emulation reads 10 bits of a mantissa and
rounds sums toward zero, so that a product of less than float32's accuracy shows.
"""

import ctypes
import gc
import sys
import threading
import types
from dataclasses import replace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from closeness import relative
from cuda_on_cpu import HEADER, Emulation, KernelError, StandIn
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal

import pvt_ref
from pvt_ref import REFERENCE
from pvt_ref.arrays import is_numpy
from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.errors import ConfigError, DeviceError, RangeError
from pvt_ref.kernels.cuda import cublaslt, product
from pvt_ref.kernels.cuda.cublaslt import CublasLt
from pvt_ref.kernels.cuda.ladder import product as product_ladder
from pvt_ref.kernels.cuda.launch import Cuda, Function
from pvt_ref.kernels.cuda.mlp import mlp_rows
from pvt_ref.kernels.cuda.product import multiply
from pvt_ref.kernels.cuda.table import cuda_kernels, table_with
from pvt_ref.layers.gelu import gelu
from pvt_ref.layers.linear import LinearParams, linear

no_gxx = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)
pytestmark = no_gxx

#: Blocks among which work is shared: so few that 64 x 64 tiles are taken for more than one of them.
BLOCKS = 4

#: Of shared memory: 1.3e7 as float32. Of NaN, the kernel would make an element again, rightly, and
#: a tile that was read before it was there would not show.
POISON = 0x4B

#: Relative error of a product whose factors were rounded: a few units of the last bit that is left.
TOLERANCES = {"float32": 3e-7, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 8e-3}


def own(order: int = 5, precision: str = "float32", blocks: int = BLOCKS) -> Cuda:
    return Cuda(Emulation(order, POISON), blocks, precision=precision)


def by_library(precision: str = "float32", stand_in: StandIn | None = None) -> Cuda:
    found = stand_in or StandIn()
    return Cuda(Emulation(5), BLOCKS, "cublaslt", precision, found)


def matrix(
    seed: int, *shape: int, in_columns: bool = False, gap: int = 0, shift: int = 0
) -> np.ndarray:
    """Normal numbers (..., rows, K) of float32, columns or rows together, gap numbers between.

    shift numbers are before them, so that they begin at no multiple of 16 bytes.
    """
    *stack, rows, K = shape
    lines, along = (K, rows) if in_columns else (rows, K)
    whole = (*stack, lines, along + gap)
    x = np.full(shift + int(np.prod(whole)), np.nan, np.float32)[shift:].reshape(whole)
    x[..., :along] = normal(seed, *stack, lines, along)
    x = x[..., :along]
    return x.swapaxes(-1, -2) if in_columns else x


def exact(a, b, bias=None, residual=None) -> Any:
    y = a.astype(np.float64) @ b
    return sum((each for each in (bias, residual) if each is not None), y)


# What is computed ---------------------------------------------------------------------------------


@st.composite
def factors(draw):
    """Arguments of multiply: matrices of any layout, with bias and residual or without."""
    M, K, N = (
        draw(st.sampled_from(sizes)) for sizes in ((1, 3, 36, 68), (1, 5, 32, 68), (2, 7, 36))
    )
    a_in_columns, b_in_columns = draw(st.sampled_from([(0, 1), (0, 0), (1, 0), (1, 1)]))
    gap, shift = draw(st.sampled_from([(0, 0), (0, 0), (4, 0), (1, 0), (0, 1)]))
    seed = draw(st.integers(0, 9))
    a = matrix(seed, M, K, in_columns=bool(a_in_columns), gap=gap, shift=shift)
    b = matrix(seed + 1, K, N, in_columns=bool(b_in_columns), gap=gap, shift=shift)
    bias = matrix(seed + 2, 1, N)[0] if draw(st.booleans()) else None
    residual = matrix(seed + 3, M, N) if draw(st.booleans()) else None
    return a, b, bias, residual


@settings(max_examples=24)
@given(factors(), st.sampled_from([0, 1, 5]))
def test_the_own_kernel_multiplies_matrices_of_any_layout(arguments, order):
    a, b, bias, residual = arguments
    before = [x.tobytes() for x in (a, b)]
    y = multiply(a, b, own(order), bias, residual)
    assert y.dtype == np.float32
    assert y.shape == (len(a), b.shape[1])
    scale = np.linalg.norm(abs(a) @ abs(b)) + np.linalg.norm(y)
    assert np.linalg.norm(y - exact(a, b, bias, residual)) <= 3e-7 * scale
    np.testing.assert_array_equal(multiply(a, b, own(7), bias, residual), y)  # the same bits
    assert before == [x.tobytes() for x in (a, b)]


@settings(max_examples=24)
@given(factors(), st.sampled_from(["float32", "tf32", "float16", "bfloat16"]))
def test_cublaslt_is_asked_for_the_same(arguments, precision):
    a, b, bias, residual = arguments
    y = multiply(a, b, by_library(precision), bias, residual)
    assert y.dtype == np.float32
    scale = np.linalg.norm(abs(a) @ abs(b)) + 1e-3 * np.linalg.norm(y)
    assert np.linalg.norm(y - exact(a, b, bias, residual)) <= TOLERANCES[precision] * scale


@pytest.mark.parametrize(("B", "N"), [(2, 3), (3, 2), (1, 3)])
@pytest.mark.parametrize("make", [own, by_library, lambda: by_library("float16")])
def test_stacks_of_matrices_are_multiplied_one_by_one(make, B, N):
    cuda = make()
    a = matrix(1, B, N, 7, 20)
    heads = matrix(2, B, 20, N * 12).reshape(B, 20, N, 12).transpose(0, 2, 1, 3)  # (B, N, 20, 12)
    for b in (heads, np.ascontiguousarray(heads)):
        y = multiply(a, b, cuda)
        assert y.shape == (B, N, 7, 12)
        assert relative(y, exact(a, b)) < TOLERANCES[cuda.precision]


@pytest.mark.parametrize("tiles", ["large", "small"])
@pytest.mark.parametrize("K", [68, 2100])
def test_an_epilogue_adds_bias_gelu_and_residual_in_this_order(tiles, K):
    # 2100 terms are cut into parts, which another kernel adds
    cuda = own(blocks=2 if tiles == "large" else 64)
    a, b, bias, residual = matrix(1, 5, K), matrix(2, K, 36), matrix(3, 1, 36)[0], matrix(4, 5, 36)
    b /= np.sqrt(K)
    y = multiply(a, b, cuda, bias, residual, has_gelu=True)
    hidden, _ = gelu.forward(None, exact(a, b, bias), REFERENCE)
    assert relative(y, hidden + residual) < 4e-7
    assert relative(multiply(a, b, cuda, bias, residual), exact(a, b, bias, residual)) < 3e-7


@pytest.mark.parametrize(("M", "N", "rows"), [(3, 5, 700), (4, 8, 1030)])
def test_a_sum_over_many_rows_is_made_in_parts_whose_order_is_fixed(M, N, rows):
    launched = []

    def launch(function, grid, threads, arguments, shared=0):
        launched.append((function.name, grid))
        Emulation(1)(function, grid, threads, arguments, shared)

    dy, x = matrix(1, rows, M), matrix(2, rows, N)
    y = multiply(dy.T, x, Cuda(launch, 64))
    assert [name for name, _ in launched] == ["product", "add_products"]
    assert launched[0][1] == (1, 1, rows // 256)
    assert relative(y, exact(dy.T, x)) < 3e-7
    np.testing.assert_array_equal(multiply(dy.T, x, own(0, blocks=64)), y)


@pytest.mark.parametrize("terms", [1000, 1024])
def test_long_sums_of_one_sign_do_not_drift(terms):
    # a tensor core rounds every sum toward zero: were it to add all terms, 1e-5 would be lost
    a = 1 + abs(matrix(1, 2, terms)) / 8
    b = 1 + abs(matrix(2, terms, 4)) / 8
    assert relative(multiply(a, b, own()), exact(a, b)) < 4e-7


@pytest.mark.parametrize("where", [{"gap": 1}, {"shift": 1}, {"gap": 4}])
def test_numbers_that_are_not_aligned_are_copied_one_by_one(where):
    a, b = matrix(1, 5, 36, **where), matrix(2, 36, 8, **where)
    for cuda in (own(), by_library(), by_library("float16")):
        y = multiply(a, b, cuda)
        assert relative(y, exact(a, b)) < TOLERANCES[cuda.precision]


# What is not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3.4028235e38])
@pytest.mark.parametrize("K", [36, 2052])
def test_infinity_and_nan_come_where_float32_has_them_and_nowhere_else(value, precision, K):
    a, b = matrix(1, 5, K), matrix(2, K, 6) / 1e3
    a[1, 3], a[1, K - 1], a[3, K - 1] = value, value, -value  # in two parts, if there are some
    b[3, 2] = 0  # times infinity: NaN
    y = multiply(a, b, own(precision=precision))
    with np.errstate(all="ignore"):
        expected = a @ b
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isposinf(y), np.isposinf(expected))
    np.testing.assert_array_equal(np.isneginf(y), np.isneginf(expected))
    finite = np.isfinite(expected)
    assert finite.sum() >= 18
    with np.errstate(all="ignore"):
        exact = a.astype(np.float64) @ b.astype(np.float64)
        terms = abs(a).astype(np.float64) @ abs(b).astype(np.float64)
    error = abs(y[finite] - exact[finite]) / terms[finite]
    assert error.max() < (1e-6 if precision == "float32" else 2e-3)


def test_a_nan_of_any_bits_stays_one():
    for bits in (0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001):
        a = np.ones((1, 4), np.float32)
        a.view(np.uint32)[0, 2] = bits
        for precision in ("float32", "tf32"):
            y = multiply(a, np.ones((4, 3), np.float32), own(precision=precision))
            assert np.isnan(y).all(), (hex(bits), precision)


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "products"),
    [("tf32", "own"), ("tf32", "cublaslt"), ("float16", "cublaslt"), ("bfloat16", "cublaslt")],
)
def test_a_lower_precision_rounds_the_factors_and_nothing_else(precision, products):
    cuda = own(precision=precision) if products == "own" else by_library(precision)
    a, b = matrix(1, 20, 64), matrix(2, 64, 12)
    error = relative(multiply(a, b, cuda), exact(a, b))
    assert TOLERANCES[precision] / 10 < error < TOLERANCES[precision]
    whole = np.round(a * 4), np.round(b * 4)  # every precision holds them
    np.testing.assert_array_equal(multiply(*whole, cuda), exact(*whole).astype(np.float32))


def cast(x: np.ndarray, to: str) -> np.ndarray:
    y = np.zeros(x.shape, np.uint16)
    function = Function("cast.cu", "cast", (("CAST", f"to_{to}"),))
    Emulation()(function, (-(-x.size // 64),), (64,), (x, y, x.size))
    return y


#: Numbers with ties, with none, beyond the largest and below the least of each format.
NUMBERS = np.concatenate(
    (
        normal(1, 500, dtype=np.float32),
        np.ldexp(normal(2, 1000, dtype=np.float32), np.arange(1000, dtype=np.int32) % 60 - 35),
        np.ldexp(np.arange(2049, 2112, dtype=np.float32), -5),  # ties of float16
        np.ldexp(np.arange(257, 300, dtype=np.float32), 3),  # ties of bfloat16
        np.array([0, -0.0, 65504, 65519.99, 65520, 1e30, -1e30, np.inf, -np.inf, np.nan, 2**-25,
                  2**-24, 2**-14, 2**-14 - 2**-25, 1.5 * 2**-24, 3.4e38], np.float32),
    )
)  # fmt: skip


def test_a_cast_to_float16_is_that_of_numpy():
    with np.errstate(over="ignore"):
        expected = NUMBERS.astype(np.float16)
    np.testing.assert_array_equal(cast(NUMBERS, "float16").view(np.float16), expected)


def test_a_cast_to_bfloat16_takes_the_nearest_and_of_two_the_even_one():
    found = (cast(NUMBERS, "bfloat16").astype(np.uint32) << 16).view(np.float32)
    finite = NUMBERS[np.isfinite(NUMBERS)].astype(np.float64)
    fraction, exponent = np.frexp(finite)
    expected = np.ldexp(np.round(fraction * 256), exponent - 8)  # 8 bits, ties to even
    expected[abs(expected) >= 2.0**128] = np.inf
    np.testing.assert_array_equal(found[np.isfinite(NUMBERS)], expected)
    np.testing.assert_array_equal(found[~np.isfinite(NUMBERS)], NUMBERS[~np.isfinite(NUMBERS)])


# The linear layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("products", ["own", "cublaslt", "cupy"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_layer_and_its_gradients(products, has_bias):
    ops = table_with(Cuda(Emulation(1), BLOCKS, products, cublaslt=StandIn()), is_numpy)
    p = LinearParams(matrix(1, 12, 20), matrix(2, 1, 12)[0] if has_bias else None)
    x, dy = matrix(3, 2, 9, 20), matrix(4, 2, 9, 12)
    y, cache = ops[linear].forward(p, x, ops)
    dx, grads = ops[linear].backward(p, cache, dy, ops)
    assert ops[linear].forward(p, x, ops, keep=False)[1] is None
    assert ops[linear] != linear
    rows, drows = x.reshape(18, 20), dy.reshape(18, 12)
    assert relative(y.reshape(18, 12), exact(rows, p.weight.T, p.bias)) < 3e-7
    assert relative(dx.reshape(18, 20), exact(drows, p.weight)) < 3e-7
    assert relative(grads.weight, exact(drows.T, rows)) < 3e-7
    assert (grads.bias is None) is not has_bias
    if has_bias:
        assert relative(grads.bias, drows.sum(axis=0, dtype=np.float64)) < 3e-7


def test_float64_and_nothing_are_left_to_the_library_of_the_arrays():
    def launch(*_, **__):
        raise AssertionError("no kernel computes these")

    for products in ("own", "cublaslt"):
        cuda = Cuda(launch, products=products, cublaslt=launch)
        a, b = normal(1, 3, 4), normal(2, 4, 5)
        np.testing.assert_array_equal(multiply(a, b, cuda, b[0]), a @ b + b[0])
        empty = multiply(np.zeros((0, 4), np.float32), np.ones((4, 5), np.float32), cuda)
        assert empty.shape == (0, 5)
        nothing = multiply(np.zeros((2, 0), np.float32), np.ones((0, 5), np.float32), cuda)
        np.testing.assert_array_equal(nothing, np.zeros((2, 5)))


# cuBLASLt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_more_hidden_numbers_than_an_int_counts_are_left_to_the_library(keep, monkeypatch):
    p = MLPParams(LinearParams(matrix(1, 8, 4), matrix(2, 1, 8)[0]),
                  LinearParams(matrix(3, 4, 8), matrix(4, 1, 4)[0]))  # fmt: skip
    x = matrix(5, 1, 20, 4)
    expected, _ = mlp.forward(p, x, REFERENCE)
    monkeypatch.setattr(product, "MOST_NUMBERS", 100)  # 160 are hidden
    y, _ = mlp_rows(p, x, keep, own())
    assert relative(y, expected) < 1e-6


def test_a_plan_is_made_once_for_a_shape_and_takes_the_bias_of_each_call():
    stand_in = StandIn()
    cuda = by_library(stand_in=stand_in)
    a, b = matrix(1, 6, 8), matrix(2, 8, 12)
    biases = [matrix(seed, 1, 12)[0] for seed in (3, 4)]
    for bias in (*biases, *biases):
        assert relative(multiply(a, b, cuda, bias), exact(a, b, bias)) < 3e-7
    library = stand_in(a)
    assert (library.plan.cache_info().misses, library.plan.cache_info().hits) == (1, 3)
    multiply(a, b, cuda)
    multiply(matrix(5, 7, 8), b, cuda)
    multiply(matrix(5, 8, 6).T, b, cuda)
    assert library.plan.cache_info().misses == 4


def test_plans_are_few_and_what_they_hold_is_given_back(monkeypatch):
    monkeypatch.setattr(cublaslt, "_MOST_PLANS", 3)
    stand_in = StandIn()
    gc.collect()
    before, b = stand_in.functions.stand_in_alive(), matrix(2, 4, 5)
    for rows in range(1, 9):
        multiply(matrix(rows, rows, 4), b, by_library(stand_in=stand_in))
    gc.collect()
    assert stand_in.functions.stand_in_alive() - before == 3 * 5
    stand_in.loaded.plan.cache_clear()
    gc.collect()
    assert stand_in.functions.stand_in_alive() == before


def test_threads_do_not_take_each_others_bias():
    cuda, wrong = by_library(), []
    a, b = matrix(1, 3, 8), matrix(2, 8, 12)

    def work(seed):
        bias = matrix(seed, 1, 12)[0]
        for _ in range(20):
            y = multiply(a, b, cuda, bias)
            wrong.extend([seed] * (relative(y, exact(a, b, bias)) > 3e-7))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def failing():
    """A stand-in, and a function that lets a call of it fail; in the end none does."""
    stand_in = StandIn()
    yield stand_in, lambda name, status: stand_in.functions.stand_in_fail(name.encode(), status)
    stand_in.functions.stand_in_fail(b"", 0)
    stand_in.functions.stand_in_version(130_100)


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("cublasLtCreate", 1, "cublasLtCreate of cuBLASLt 130100 refuses .*1, not initialised"),
        ("cublasLtMatmulPreferenceCreate", 3, "status 3, out of memory"),
        ("cublasLtMatmulAlgoGetHeuristic", 15, r"Problem\(m=5, n=3, k=4, .* 15, not supported"),
        ("cublasLtMatmul", 13, "status 13, the launch failed.*products='own'"),
        ("cublasLtMatmul", 99, "status 99, unknown"),
    ],
)
def test_what_cublaslt_refuses_is_told_and_leaks_nothing(name, status, words, failing):
    stand_in, fail = failing
    gc.collect()
    before = stand_in.functions.stand_in_alive()
    fail(name, status)
    with pytest.raises(DeviceError, match=words):
        multiply(matrix(1, 3, 4), matrix(2, 4, 5), by_library(stand_in=stand_in))
    fail("", 0)
    assert (
        relative(
            multiply(matrix(1, 3, 4), matrix(2, 4, 5), by_library(stand_in=stand_in)),
            exact(matrix(1, 3, 4), matrix(2, 4, 5)),
        )
        < 3e-7
    )
    stand_in.loaded.plan.cache_clear()
    gc.collect()
    assert stand_in.functions.stand_in_alive() == before


def test_an_old_library_and_one_that_lacks_functions_are_refused(failing):
    stand_in, _ = failing
    stand_in.functions.stand_in_version(10_300)
    with pytest.raises(DeviceError, match="its version is 10300"):
        CublasLt(stand_in.functions)
    with pytest.raises(DeviceError, match="it lacks a function"):
        CublasLt(ctypes.CDLL(None))


class FakeCupy:
    """Of CuPy what finds the library; it says so when cuBLAS was loaded."""

    def __init__(self, version):
        self.loaded = False
        device = types.SimpleNamespace(get_cublas_handle=self._load)
        runtime = types.SimpleNamespace(runtimeGetVersion=lambda: version)
        self.cuda = types.SimpleNamespace(device=device, runtime=runtime)

    def _load(self):
        self.loaded = True


def test_the_library_is_that_of_cupys_cuda(monkeypatch):
    cupy, stand_in, asked = FakeCupy(13_010), StandIn(), []

    def load(name):
        assert cupy.loaded
        asked.append(name)
        return stand_in.functions

    monkeypatch.setattr(cublaslt.ctypes, "CDLL", load)
    find = cublaslt._on_device.__wrapped__
    assert find(cupy, 0).version == 130_100
    monkeypatch.setattr(sys, "platform", "win32")
    find(cupy, 0)
    assert asked == ["libcublasLt.so.13", "cublasLt64_13.dll"]


def test_a_library_that_is_not_there_is_told_with_the_cure():
    with pytest.raises(DeviceError) as refused:
        cublaslt._on_device.__wrapped__(FakeCupy(99_000), 0)
    for words in ("libcublasLt.so.99", "pip install 'cupy-cuda12x[ctk]'", "products='own'"):
        assert words in str(refused.value)


# Settings -----------------------------------------------------------------------------------------


def test_the_settings_say_products_and_precision():
    for precision, products in (
        *(("float32", "own"), ("tf32", "cublaslt")),
        *(("float16", "cublaslt"), ("bfloat16", "cublaslt")),
    ):
        found = cuda_kernels(precision).settings
        assert (found.precision, found.products) == (precision, products)
    assert cuda_kernels() == cuda_kernels("float32", "own") != cuda_kernels(products="cupy")
    assert cuda_kernels("tf32", "own") != cuda_kernels("tf32")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("float8",), RangeError, "precision is 'float8'; it must be one of float32, tf32, "),
        (("float32", "cudnn"), RangeError, "products is 'cudnn'; it must be one of own, "),
        (("float16", "own"), ConfigError, "'own' cannot compute in float16"),
        (("tf32", "cupy"), ConfigError, "'cupy' cannot compute in tf32"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        cuda_kernels(*arguments)


@pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"])
def test_a_network_in_lower_precision_is_near_and_not_equal(precision):
    config = replace(
        pvt_ref.VARIANTS["pvt_tiny"],
        **{"img_size": 32, "num_classes": 5, "embed_dims": (8, 16, 24, 32), "depths": (1,) * 4},
        **{"num_heads": (1, 2, 2, 4), "sr_ratios": (4, 2, 2, 1)},
    )
    params = pvt_ref.init_params(config, np.random.default_rng(1))
    images = normal(2, 1, 3, 32, 32, dtype=np.float32)
    expected = pvt_ref.forward(params, images, config, ops=REFERENCE)
    ops = table_with(by_library(precision), is_numpy)
    found = pvt_ref.forward(params, images, config, ops=ops)
    assert found.dtype == np.float32
    assert TOLERANCES[precision] / 50 < relative(found, expected) < 4 * TOLERANCES[precision]


# The ladder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", product_ladder.STEPS, ids=lambda step: step.run.__name__)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (17, 5, 33), (70, 66, 40)])
def test_each_step_of_the_ladder_computes_the_product(step, M, N, K):
    a, b = matrix(1, M, K), matrix(2, N, K)
    y = step.run(a, b, Cuda(Emulation(5)))
    assert relative(y, exact(a, b.T)) < 4e-7


# The emulation of the instructions ----------------------------------------------------------------

MISTAKES = str(HEADER.parent / "mistakes.cu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("copies_unaligned", "copies 16 bytes between places that are not aligned"),
        ("does_not_wait", "ends while copies are under way"),
        ("loads_unaligned", "a row of a matrix that is not aligned"),
        ("half_a_tensor_core", "names lane 16 in a mask, and its warp has 16"),
        ("mixes_exchanges", "exchanges otherwise than lane"),
    ],
)
def test_what_the_instructions_forbid_is_refused(name, words):
    threads = (16,) if name == "half_a_tensor_core" else (32,)
    with pytest.raises(KernelError, match=words):
        Emulation()(Function(MISTAKES, name), (1,), threads, (np.ones(64, np.float32), 64))


def test_a_copy_lands_when_it_is_waited_for_and_no_sooner():
    x, y = np.arange(1, 65, dtype=np.float32), np.zeros(96, np.float32)
    Emulation()(Function(MISTAKES, "copies_in_groups"), (1,), (32,), (x, y))
    assert np.isnan(y[:32]).all()  # before any was waited for
    np.testing.assert_array_equal(y[32:64], x[:32])  # the older group has landed
    np.testing.assert_array_equal(y[64:], x[32:])


def test_the_tensor_core_reads_ten_bits_and_rounds_toward_zero():
    a, b = normal(1, 16, 8, dtype=np.float32), normal(2, 8, 8, dtype=np.float32)
    c, y = normal(3, 16, 8, dtype=np.float32), np.zeros((16, 8), np.float32)
    Emulation()(Function(MISTAKES, "tensor_core"), (1,), (32,), (a, b, c, y))
    short = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b)]
    expected = c + short[0] @ short[1].T
    assert (abs(y) <= abs(expected)).all()
    np.testing.assert_allclose(y, expected, rtol=2**-23, atol=0)
    assert relative(y, c + a.astype(np.float64) @ b.T) > 1e-5
