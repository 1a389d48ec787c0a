"""The emulation of CUDA itself: what is right computes, and what CUDA forbids is told by name."""

from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import HEADER, Emulation, KernelError, Pages

from pvt_ref.kernels.cuda.launch import Function

pytestmark = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)

MISTAKES = str(HEADER.parent / "mistakes.cu")


def launch(name, *arguments, grid=(1,), threads=(64,), order=0, **more):
    Emulation(order)(Function(MISTAKES, name), grid, threads, arguments, **more)


def ones(n=64, dtype: Any = np.float32):
    return np.ones(n, dtype)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_every_thread_of_every_block_runs_once_and_knows_its_place(order):
    y = np.zeros((24, 12), np.int32)
    launch("places", y, grid=(2, 3, 4), threads=(2, 3, 2), order=order)
    np.testing.assert_array_equal(y, np.arange(24)[:, None] * 1000 + np.arange(12) + 1)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_parts_of_a_warp_exchange_on_their_own(order):
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    launch("halves", x, y, 64, order=order)
    lanes = np.arange(32)[::-1]  # whose value each lane got last
    expected = np.where(lanes < 16, lanes ^ 1, lanes)  # exchanged once, and twice
    np.testing.assert_array_equal(y, np.concatenate((expected, 32 + expected)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "writes_behind",
            r"thread \(63, 0, 0\) of block \(0, 0, 0\) touches .*, 0 bytes behind",
        ),
        ("writes_before", "something was written beside an array.* y"),
        ("writes_far_before", "touches memory that is not its own, before the end of y"),
        ("writes_far_behind", "touches memory that is not its own, 3999744 bytes behind the end"),
        ("leaves_before_the_barrier", r"waits for ever at the barrier of line \d+, which not all"),
        ("two_barriers", r"barrier of line \d+ while thread \d+ waits at that of line \d+"),
        ("leaves_before_the_exchange", "waits for ever in an exchange of the lanes 0xffffffff"),
        ("is_not_named", "is lane 16 of an exchange whose mask 0xffff does not name it"),
        ("asks_others", "asks lane 16, which the mask 0xffff does not name"),
        ("other_masks", "gives the mask"),
        ("index_of_shared", "has an index beyond its array"),
        ("beyond_dynamic", "touches memory that is not its own"),
    ],
)
def test_what_cuda_forbids_is_refused_by_name(name, words):
    with pytest.raises(KernelError, match=rf"{name}.*{words}"):
        launch(name, ones(), 64, shared=256)
    # and what comes after it is computed as if nothing had been
    y = np.zeros((1, 64), np.int32)
    launch("places", y)
    np.testing.assert_array_equal(y[0], np.arange(1, 65))


def test_a_number_behind_the_last_cannot_be_read():
    with pytest.raises(KernelError, match=r"thread \(63, 0, 0\).*, 0 bytes behind the end of x"):
        launch("reads_behind", ones(), ones(), 64)
    with pytest.raises(KernelError, match="touches memory that is not its own, at address 0x0"):
        launch("reads_null", None, ones(), 64)


def test_shared_memory_holds_nothing_that_was_not_written():
    y = ones()
    launch("reads_unwritten", y, 64)
    assert np.isnan(y[0])
    assert not np.isnan(y[1:]).any()


def test_a_barrier_that_lacks_shows_in_some_order():
    results = []
    for order in range(4):
        y = ones()
        launch("lacks_a_barrier", y, 64, order=order)
        results.append(y)
    assert all(np.isnan(y).any() for y in results)
    assert not np.array_equal(*(np.isnan(y) for y in results[:2]))


def test_blocks_that_wait_for_others_show_in_some_order():
    expected = np.arange(1, 5, dtype=np.float32)
    results = []
    for order in range(3):
        y = np.zeros(4, np.float32)
        launch("waits_for_blocks", y, 4, grid=(4,), order=order)
        results.append(np.array_equal(y, expected))
    assert results == [True, False, False]


def test_whole_numbers_do_not_overflow_unseen():
    with pytest.raises(KernelError, match="an int that overflows"):
        launch("overflows", ones(dtype=np.int32), 64)
    with pytest.raises(KernelError, match=r"divides by zero|an int that overflows"):
        launch("divides_by_zero", ones(dtype=np.int32), 64)


@pytest.mark.parametrize(
    ("name", "arguments", "more", "words"),
    [
        ("writes_behind", (ones(),), {}, "1 arguments for 2 parameters"),
        ("writes_behind", (ones(dtype=np.float64), 64), {}, r"y is of float64, not float \*"),
        ("writes_behind", (ones(), 64.0), {}, "n is 64.0, not int"),
        ("writes_behind", (ones(), 2**31), {}, "n is 2147483648, not int"),
        ("whole_pieces", (ones(65)[1:], ones(), 64), {}, "x is not aligned to 16"),
        ("bounded", (ones(128), 64), {"threads": (128,)}, "128 threads in a block of at most 64"),
        (
            "places",
            (ones(8, np.int32),),
            {"threads": (2000,)},
            "2000 threads in a block",
        ),
        ("places", (ones(8, np.int32),), {"grid": (0,)}, r"a grid of \(0, 1, 1\) blocks"),
        ("places", (ones(8, np.int32),), {"grid": (1, 65536)}, r"a grid of \(1, 65536, 1\) blocks"),
        ("bounded", (ones(), 64), {"shared": 50_000}, "has more shared memory than the 49152"),
        ("absent", (), {}, "has no kernel absent"),
    ],
)
def test_a_launch_that_cuda_would_refuse_is_refused(name, arguments, more, words):
    with pytest.raises(KernelError, match=words):
        launch(name, *arguments, **more)


def test_views_of_one_array_share_memory_there_too():
    x = np.arange(128, dtype=np.float32)
    launch("halves", x[:64], x[64:], 64)
    assert x[64] == 31
    x = np.arange(64, dtype=np.float32)
    launch("halves", x, x, 64)
    assert x[0] == 31


@pytest.mark.parametrize("size", [1, 4, 16, 4096, 5000])
def test_pages_end_with_the_array(size):
    for start in (0, 4, 8):
        pages = Pages(start, start + size, 16)
        assert pages.start % 16 == start
        assert 0 <= pages.end - pages.start - size < 16


def test_source_that_does_not_compile_is_shown(tmp_path):
    file = tmp_path / "wrong.cu"
    file.write_text('extern "C" __global__ void wrong(float *y)\n{\n    y[0] = nothing;\n}\n')
    with pytest.raises(KernelError, match=r"wrong.cu:3:\d+: error: .nothing. was not declared"):
        Emulation()(Function(str(file), "wrong"), (1,), (1,), (ones(),))
