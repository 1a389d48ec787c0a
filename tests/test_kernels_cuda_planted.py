"""What an outsider broke in the kernels for CUDA while all other tests passed.

The mistakes are in planted_bugs/cuda.toml. Expected is what the readable layers compute in float64.
"""

import gc
import sys
import weakref
from dataclasses import replace

import cuda_on_cpu
import numpy as np
import pytest
import recording_cupy
from closeness import relative
from cuda_on_cpu import Emulation, StandIn
from loose import loose
from recording_cupy import RecordingCuPy
from strategies import normal

from pvt_ref import REFERENCE, capture
from pvt_ref.arrays import address, array_module, is_numpy
from pvt_ref.blocks.mlp import MLPParams, mlp
from pvt_ref.blocks.sra import SRAParams, SRASettings
from pvt_ref.blocks.transformer import BlockParams, BlockSettings, blocks
from pvt_ref.draws import Draws
from pvt_ref.errors import DeviceError
from pvt_ref.kernels.cuda import optimizer, product
from pvt_ref.kernels.cuda.capture import Graphs
from pvt_ref.kernels.cuda.cublaslt import CublasLt
from pvt_ref.kernels.cuda.ladder import attention as attention_ladder
from pvt_ref.kernels.cuda.launch import Cuda, is_float32
from pvt_ref.kernels.cuda.layer_norm import add_and_norm_rows, norm_backward_rows, norm_rows
from pvt_ref.kernels.cuda.product import multiply
from pvt_ref.kernels.cuda.table import table_with
from pvt_ref.kernels.cuda.windows import fold
from pvt_ref.layers.attention import attention
from pvt_ref.layers.conv import ConvParams, conv
from pvt_ref.layers.depthwise_conv import depthwise_conv
from pvt_ref.layers.layer_norm import LayerNormParams, layer_norm
from pvt_ref.layers.linear import LinearParams
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.tree import map_arrays, named_arrays

no_gxx = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)
CUDA = Cuda(Emulation(5), 6, products="cupy")
OPS = table_with(CUDA, is_numpy)


def numbers(seed, *shape):
    return normal(seed, *shape, dtype=np.float32)


def arrays_of(*trees):
    return [x for tree in trees for _, x in named_arrays(tree)]


def by_library():
    """A table whose products are cuBLASLt's, which add the residual where nothing is dropped."""
    cuda = Cuda(Emulation(5), 6, products="cublaslt", cublaslt=StandIn())
    return table_with(cuda, is_numpy)


def check(op, p, x, *args, tolerance=1e-6, readable=np.float64, ops=OPS):
    """y and the gradients are those of the readable layers; the same twice from one cache."""
    y, cache = ops[op].forward(p, x, ops, *args)
    dy = numbers(9, *y.shape)
    found = [arrays_of((y, *ops[op].backward(p, cache, dy, ops))) for _ in range(2)]
    p, x, dy = (map_arrays(lambda a: a.astype(readable), tree) for tree in (p, x, dy))
    y, cache = op.forward(p, x, REFERENCE, *args)
    expected = arrays_of((y, *op.backward(p, cache, dy, REFERENCE)))
    for first, again, right in zip(*found, expected, strict=True):
        np.testing.assert_array_equal(first, again)
        assert relative(first, right) < tolerance


# Attention ----------------------------------------------------------------------------------------


@no_gxx
@pytest.mark.parametrize(("more_q", "more_v"), [(0, 4), (2, 0), (4, 8)])
def test_queries_and_values_may_lie_otherwise_than_keys(more_q, more_v):
    q = numbers(1, 2, 2, 5, 8 + more_q)[..., :8]
    k, v = numbers(2, 2, 2, 9, 8), numbers(3, 2, 2, 9, 8 + more_v)[..., :8]
    check(attention, None, (q, k, v), 0.5)


@no_gxx
@pytest.mark.parametrize("step", attention_ladder.STEPS, ids=lambda step: step.run.__name__)
def test_every_step_of_the_ladder_bears_scores_far_below_zero(step):
    q, k, v = np.ones((1, 1, 3, 4)), np.full((1, 1, 9, 4), -60.0), numbers(1, 1, 1, 9, 4)
    y = step.run(q.astype(np.float32), k.astype(np.float32), v, 1.0, CUDA)
    np.testing.assert_allclose(y, np.repeat(v.mean(axis=2, keepdims=True), 3, axis=2), rtol=1e-5)


@no_gxx
def test_wide_heads_fit_shared_memory():
    q, k, v = (numbers(i, 1, 1, rows, 256) for i, rows in enumerate((3, 17, 17)))
    check(attention, None, (q, k, v), 1 / 16)


def test_attention_has_no_most_images(monkeypatch):
    monkeypatch.setattr(np, "empty", np.zeros)
    grids = []
    cuda = Cuda(loose(lambda function, grid, *_: grids.append(grid)), products="cupy")
    ops, q = table_with(cuda, is_numpy), np.zeros((65_536, 1, 1, 4), np.float32)
    y, cache = ops[attention].forward(None, (q, q, q), ops, 0.5)
    ops[attention].backward(None, cache, y, ops)
    assert len(grids) == 2
    for along_x, *others in grids:  # as CUDA allows
        assert along_x < 2**31
        assert max(others) < 2**16


# What the kernels leave to the readable layers ----------------------------------------------------


def never(*_, **__):
    raise AssertionError("no kernel computes these")


NEVER = table_with(Cuda(never, products="cupy"), is_numpy)
#: With steps that are positive, as CuPy's has.
NO_MAPS = np.ndarray((0, 4, 4, 4), np.float32, b"0" * 256, strides=(256, 64, 16, 4))


@pytest.mark.parametrize(
    ("op", "p", "x", "args"),
    [
        (attention, None, (np.zeros((0, 2, 3, 8), np.float32),) * 3, (0.5,)),
        (layer_norm, LayerNormParams(numbers(1, 8), numbers(2, 8)),
         np.zeros((0, 3, 8), np.float32), (1e-6,)),
        (conv, ConvParams(numbers(1, 4, 4, 2, 2), None), NO_MAPS, (2, 0)),
        # kernels that read float32 would take the bytes of float64 for it
        (attention, None, (numbers(1, 1, 1, 2, 4), normal(2, 1, 1, 3, 4), normal(3, 1, 1, 3, 4)),
         (0.5,)),
        (layer_norm, LayerNormParams(normal(1, 8), normal(2, 8)), numbers(3, 5, 8), (1e-6,)),
        (mlp, MLPParams(LinearParams(numbers(1, 6, 4), numbers(2, 6)),
                        LinearParams(numbers(3, 4, 6), numbers(4, 4))), numbers(5, 1, 3, 4), ()),
    ],
    ids=["attention of none", "norms of none", "conv of none", "attention, mixed", "norm, mixed",
         "mlp of six"],
)  # fmt: skip
def test_no_kernel_computes_what_it_would_misread(op, p, x, args):
    y, _ = NEVER[op].forward(p, x, NEVER, *args)
    expected, _ = op.forward(p, x, REFERENCE, *args)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_kernels_compute_as_many_numbers_as_an_int_counts():
    assert is_float32(np.broadcast_to(np.float32(0), (2**31 - 1,)))
    assert not is_float32(np.broadcast_to(np.float32(0), (2**31,)))


# Views --------------------------------------------------------------------------------------------


@no_gxx
def test_norms_read_branches_and_skips_that_are_views():
    p = LayerNormParams(1 + numbers(1, 8), numbers(2, 8))
    x, branch = numbers(3, 2, 5, 8), numbers(4, 2, 8, 5).transpose(0, 2, 1)
    total, y, cache = add_and_norm_rows(p, x, branch, 1e-6, CUDA)
    np.testing.assert_array_equal(total, x + branch)
    np.testing.assert_array_equal(y, norm_rows(p, total, 1e-6, CUDA)[0])
    found, expected = (
        norm_backward_rows(p, cache, x, skip, CUDA) for skip in (branch, branch.copy("C"))
    )
    for mine, other in zip(arrays_of(found), arrays_of(expected), strict=True):
        np.testing.assert_array_equal(mine, other)


@no_gxx
def test_windows_that_are_a_view_are_folded():
    windows = numbers(1, 2, 2 * 2 * 4, 4).transpose(0, 2, 1)  # (B, h*w, k_h*k_w*C)
    found, expected = (fold(x, (4, 4), (2, 2), 2, 0, CUDA) for x in (windows, windows.copy("C")))
    np.testing.assert_array_equal(found, expected)


# Sums ---------------------------------------------------------------------------------------------


ROWS = np.arange(1536)
#: Each part of a sum has eight rows of 96, so numbers of one sign: it is large, and the sum is not.
SIGNS = 1 - 2 * (ROWS // 8 % 2)


@no_gxx
def test_parts_of_a_sum_are_added_in_double():
    x = (SIGNS * 2.0**20 + ROWS % 5).astype(np.float32)  # eight of them have no error in float32
    y, _ = OPS[sum_rows].forward(None, np.stack((x, -x), axis=1), OPS)
    np.testing.assert_array_equal(y, [(ROWS % 5).sum(), -(ROWS % 5).sum()])


@no_gxx
def test_the_first_bias_of_an_mlp_has_its_gradient_added_in_double():
    eye = np.eye(4, dtype=np.float32)
    # so far from zero that GELU is the identity
    p = MLPParams(LinearParams(eye, np.full(4, 100, np.float32)), LinearParams(eye, None))
    _, cache = OPS[mlp].forward(p, np.zeros((1, 1536, 4), np.float32), OPS)
    dy = np.outer(SIGNS * 2.0**22 + ROWS % 5, [1, -1, 1, -1]).astype(np.float32)
    _, grads = OPS[mlp].backward(p, cache, dy[None], OPS)
    np.testing.assert_array_equal(grads.fc1.bias, (ROWS % 5).sum() * np.array([1, -1, 1, -1]))


@no_gxx
def test_the_last_pixels_of_a_sum_are_as_many_as_there_are():
    p = ConvParams(numbers(1, 4, 1, 3, 3), numbers(2, 4))
    check(depthwise_conv, p, numbers(3, 1, 131, 1, 4))  # two parts, one a pixel short


# Blocks -------------------------------------------------------------------------------------------

C, GRID = 8, (4, 8)
ATTENTION = SRASettings(num_heads=2, scale=0.5, norm_eps=1e-2)


def linear_params(seed, rows, columns):
    return LinearParams(numbers(seed, rows, columns) / columns**0.5, numbers(seed + 1, rows))


def norm_params(seed):
    return LayerNormParams(1 + numbers(seed, C) / 3, numbers(seed + 1, C) / 3)


def block_params(seed, R):
    sr = LinearParams(numbers(seed, C, C, R, R) / (C * R * R) ** 0.5, numbers(seed + 1, C))
    q, kv, proj = (linear_params(seed + 2 * i, n * C, C) for i, n in enumerate((1, 2, 1)))
    reduction = (sr, norm_params(seed + 8)) if R > 1 else (None, None)
    fc1, fc2 = linear_params(seed + 10, 2 * C, C), linear_params(seed + 12, C, 2 * C)
    sra = SRAParams(q, kv, proj, *reduction)
    return BlockParams(norm_params(seed + 14), sra, norm_params(seed + 16), MLPParams(fc1, fc2))


@no_gxx
@pytest.mark.parametrize("ratios", [(2, 1), (1, 2), (4, 2)])
def test_blocks_of_a_stage_may_differ(ratios):
    settings = (BlockSettings(1e-6, ATTENTION), BlockSettings(1e-1, ATTENTION, number=1))
    p = tuple(block_params(20 * i, R) for i, R in enumerate(ratios))
    check(blocks, p, numbers(1, 2, 32, C), GRID, settings, tolerance=2e-5)


@no_gxx
def test_dropout_after_attention_alone_is_not_forgotten():
    settings = (BlockSettings(1e-6, replace(ATTENTION, drop_rate=0.4)),)
    p, x = (block_params(0, 2),), numbers(1, 2, 32, C)
    # masks are drawn in the dtype of x
    how = {"tolerance": 1e-5, "readable": np.float32, "ops": by_library()}
    check(blocks, p, x, GRID, settings, Draws(4, 1), **how)


# Products -----------------------------------------------------------------------------------------


def test_cupys_product_adds_bias_and_residual():
    a, b, bias, residual = numbers(1, 3, 4), numbers(2, 4, 5), numbers(3, 5), numbers(4, 3, 5)
    y = multiply(a, b, Cuda(never, products="cupy"), bias, residual)
    np.testing.assert_allclose(y, a @ b + bias + residual, rtol=1e-6)


def test_results_too_large_and_stacks_too_high_have_no_kernel(monkeypatch):
    a, b = numbers(1, 65_536, 1, 1, 4), numbers(2, 65_536, 1, 4, 1)
    np.testing.assert_array_equal(multiply(a, b, Cuda(never)), a @ b)
    monkeypatch.setattr(product, "MOST_NUMBERS", 100)
    a, b = numbers(1, 20, 4), numbers(2, 4, 8)
    np.testing.assert_array_equal(multiply(a, b, Cuda(never)), a @ b)


@no_gxx
def test_matrices_of_a_stack_need_not_begin_where_pieces_of_four_may():
    memory = numbers(1, 1, 2, 25)
    a = np.ndarray((1, 2, 3, 8), np.float32, memory, strides=(200, 100, 32, 4))
    b = numbers(2, 1, 2, 8, 4)
    assert relative(multiply(a, b, Cuda(Emulation(5, 0x4B), 6)), a.astype(np.float64) @ b) < 3e-7


@no_gxx
def test_cublaslt_is_told_how_matrices_of_a_stack_are_aligned():
    a, b = numbers(1, 2, 3, 3, 5), numbers(2, 2, 3, 5, 7)
    y = multiply(a, b, by_library().settings)
    assert relative(y, a.astype(np.float64) @ b) < 3e-7


@no_gxx
def test_a_product_that_cublaslt_finds_none_for_is_refused(monkeypatch):
    call, ops = CublasLt._call, by_library()

    def finds_none(self, name, *arguments, **more):
        if name != "cublasLtMatmulAlgoGetHeuristic":
            call(self, name, *arguments, **more)

    monkeypatch.setattr(CublasLt, "_call", finds_none)
    with pytest.raises(DeviceError, match="has no algorithm on this device"):
        multiply(numbers(1, 3, 5), numbers(2, 5, 7), ops.settings)


@no_gxx
def test_two_numbers_are_written_at_once_only_where_pairs_may_begin(monkeypatch):
    # a CPU does not mind
    monkeypatch.setattr(cuda_on_cpu, "FLAGS", (*cuda_on_cpu.FLAGS, "-fsanitize=alignment"))
    monkeypatch.setattr(cuda_on_cpu, "compiled", cuda_on_cpu.compiled.__wrapped__)
    a, b = numbers(1, 3, 5), numbers(2, 5, 7)
    assert relative(multiply(a, b, Cuda(Emulation(5, 0x4B))), a.astype(np.float64) @ b) < 3e-7


@no_gxx
@pytest.mark.parametrize("in_columns", [False, True])
def test_long_sums_of_a_stack_are_not_cut_into_parts(in_columns):
    a, b = numbers(1, 1, 2, 3, 1100), numbers(2, 1, 2, 1100, 4)
    if in_columns:
        a = np.ascontiguousarray(a.swapaxes(2, 3)).swapaxes(2, 3)
    y = multiply(a, b, Cuda(Emulation(5, 0x4B), 64))
    assert relative(y, a.astype(np.float64) @ b) < 3e-7


@no_gxx
def test_an_element_that_is_made_again_has_its_bias_and_residual():
    a, b, bias, residual = numbers(1, 3, 4), numbers(2, 4, 6), numbers(3, 6), numbers(4, 3, 6)
    a[1, 2], b[2] = np.finfo(np.float32).max, 1e-38  # rounded to ten bits, it is infinite
    y = multiply(a, b, Cuda(Emulation(5, 0x4B)), bias, residual)
    assert relative(y, a.astype(np.float64) @ b + bias + residual) < 3e-7


@no_gxx
def test_tf32_rounds_to_nearest():
    a, b = 1.5 + np.clip(numbers(1, 4, 1024), -1, 1) / 3, 1.5 + numbers(2, 1024, 4) / 9
    y = multiply(a, b, Cuda(Emulation(5, 0x4B), 6, precision="tf32"))
    # errors of both signs cancel; those of numbers cut off are 3e-4 in all
    assert relative(y, a.astype(np.float64) @ b) < 3e-5


# The optimiser ------------------------------------------------------------------------------------


@no_gxx
def test_a_step_in_place_is_the_same_and_writes_nothing_else():
    sizes, room = (4097, 3), 8192  # a chunk and a number more, and none
    memory = [[numbers(10 * i + j, room) for j in range(len(sizes))] for i in range(4)]
    memory[3] = [abs(x) for x in memory[3]]

    def parts(tree):
        return [x[:size] for x, size in zip(tree, sizes, strict=True)]

    given = [[x.copy() for x in tree] for tree in memory]
    rates = np.array([[0.9, -0.1, 1.1]] * 2, np.float32)
    constants = (0.9, 0.99, 1e-3, CUDA)
    optimizer.adamw(optimizer.gather(*map(parts, memory), in_place=True), rates, *constants)
    for tree, before in zip(memory, given, strict=True):
        for x, old, size in zip(tree, before, sizes, strict=True):
            np.testing.assert_array_equal(x[size:], old[size:])
    made = optimizer.adamw(optimizer.gather(*map(parts, given), in_place=False), rates, *constants)
    for mine, other in zip(map(parts, (memory[0], *memory[2:])), made, strict=True):
        for x, y in zip(mine, other, strict=True):
            np.testing.assert_array_equal(x, y)


@no_gxx
def test_the_norm_is_that_of_all_chunks_and_may_be_small():
    g = [np.full(1, 1e-6, np.float32)] * 400
    arrays = optimizer.gather(g, g, g, g)
    factor, norm = optimizer.clip_factor(arrays, 1e-6, CUDA)
    np.testing.assert_allclose(norm, 2e-5, rtol=1e-6)
    np.testing.assert_allclose(factor, 1e-6 / (2e-5 + 1e-6), rtol=1e-5)


def test_copies_whose_addresses_the_kernels_get_are_held():
    w, g = numbers(1, 3, 5), numbers(2, 5, 3).T
    arrays = optimizer.gather([w], [g], [w], [w])
    assert arrays.addresses[0, 1] != address(g)
    assert arrays.addresses[0, 1] == address(arrays.given[1][0])


# Graphs -------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    made = RecordingCuPy()
    monkeypatch.setitem(sys.modules, "cupy", made)
    return made


class Owner:
    """Weights, as far as graphs look at them."""


def twice(x):
    return x * 2


def test_a_graph_is_found_by_dtype_too_and_its_owner_is_kept(fake):
    graphs, owner = Graphs(), Owner()
    for dtype in (np.float32, np.float32, np.float64):
        x = fake.asarray(np.full(2, 1 / 3, dtype))
        y = graphs.run(owner, lambda: twice, x)
        np.testing.assert_array_equal(y.get(), np.full(2, dtype(1 / 3) * 2))
    assert len(graphs) == 1
    kept = weakref.ref(owner)
    del owner
    gc.collect()
    assert kept() is not None, "its id could be another's, who would get this graph"


def test_results_on_another_device_are_refused(fake):
    with fake.cuda.Device(1):
        elsewhere = fake.asarray(np.ones(2))
    with pytest.raises(DeviceError, match="the device does not compute it"):
        capture(lambda x: (x + 1, elsewhere), fake.asarray(np.ones(2)))


def test_memory_lives_as_long_as_the_graph(fake, monkeypatch):
    pools = []

    class Pool(recording_cupy.MemoryPool):
        """One that the arrays made in it do not keep."""

        def __init__(self):
            super().__init__()
            pools.append(weakref.ref(self))

        def malloc(self, size):
            return recording_cupy.Block(recording_cupy.MemoryPool(), size)

    x = fake.asarray(np.ones(2))
    monkeypatch.setattr(array_module(x).cuda, "MemoryPool", Pool)
    graph = capture(lambda x: x + 1, x)
    gc.collect()
    assert len(pools) == 2
    assert all(pool() is not None for pool in pools)
    del graph
    gc.collect()
    assert [pool() for pool in pools] == [None, None]
