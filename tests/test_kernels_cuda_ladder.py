"""Every step of a ladder of kernels computes what the readable layer does, emulated or on a GPU.

Expected is what the readable layers compute in float64. Arrays that a kernel should fill hold NaN
before it does.
"""

import re

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import Emulation
from strategies import normal

from pvt_ref import REFERENCE
from pvt_ref.kernels.cuda.ladder import attention as attention_ladder
from pvt_ref.kernels.cuda.ladder import product as product_ladder
from pvt_ref.kernels.cuda.ladder import sum_rows as sum_rows_ladder
from pvt_ref.kernels.cuda.launch import HERE, Cuda, Function
from pvt_ref.layers.attention import attention
from pvt_ref.layers.sum_rows import sum_rows

no_gxx = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=cuda_on_cpu.why_not() or "there is g++"
)

ORDERS = (0, 1, 5)
LADDERS = {
    "sum_rows": sum_rows_ladder.STEPS,
    "attention": attention_ladder.STEPS,
    "product": product_ladder.STEPS,
}


def titled(steps):
    return [pytest.param(step, id=step.file.rpartition("/")[2]) for step in steps]


@pytest.fixture
def poisoned(monkeypatch):
    """New arrays hold NaN, so that what is not written is seen."""
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full_like(empty(shape, dtype), np.nan))


def on_each(run, *arguments):
    """The result in three orders of threads and blocks: the same bits, or there is a race."""
    first, *others = (run(*arguments, Cuda(Emulation(order), blocks=6)) for order in ORDERS)
    for other in others:
        np.testing.assert_array_equal(first, other)
    return first


@no_gxx
@pytest.mark.parametrize("step", titled(sum_rows_ladder.STEPS))
@pytest.mark.parametrize(("rows", "C"), [(1, 3), (300, 33), (700, 40)])
def test_each_version_of_the_sum_over_rows(step, rows, C, poisoned):
    x = (1 + normal(rows, rows, C)).astype(np.float32)
    expected, _ = sum_rows.forward(None, x.astype(np.float64), REFERENCE)
    y = on_each(step.run, x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=2e-7, atol=2e-7 * rows**0.5)


@no_gxx
@pytest.mark.parametrize("step", titled(attention_ladder.STEPS))
@pytest.mark.parametrize("shape", [(2, 2, 5, 7, 8), (1, 1, 130, 33, 12), (1, 2, 3, 70, 8)])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_each_version_of_attention(step, shape, scale, poisoned):
    B, N, n, m, d = shape
    q, k, v = (normal(i, B, N, rows, d).astype(np.float32) for i, rows in enumerate((n, m, m)))
    wide = tuple(x.astype(np.float64) for x in (q, k, v))
    expected, _ = attention.forward(None, wide, REFERENCE, scale)
    y = on_each(step.run, q, k, v, scale)
    assert y.dtype == np.float32
    # the exponential of a score errs as much as the score, absolutely
    largest = (scale * np.abs(wide[0]) @ np.abs(wide[1]).swapaxes(2, 3)).max()
    assert np.linalg.norm(y - expected) <= 2e-7 * (2 + largest) * np.linalg.norm(expected)


def test_every_file_is_a_step():
    files = {step.file for steps in LADDERS.values() for step in steps}
    assert {f"ladder/{path.name}" for path in HERE.glob("ladder/*.cu")} < files
    for name, steps in LADDERS.items():
        assert steps[-1].file == f"{name}.cu"  # the kernel that tables use
        assert len({step.title for step in steps}) == len(steps) == (3 if name == "product" else 4)


# Compiling ----------------------------------------------------------------------------------------

FUNCTIONS = [
    Function(step.file, "", (("D", 64),) if name == "attention" else ())
    for name, steps in LADDERS.items()
    for step in steps[:-1]
]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.file.rpartition("/")[2])
def test_every_version_compiles_for_a_gpu_without_spilling_registers(function, arch, nvrtc):
    log = cuda_on_cpu.compiled_for(nvrtc, function, arch)
    spilled = re.findall(r"(\d+) bytes spill stores", log)
    assert spilled, log
    assert set(spilled) == {"0"}, log


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", LADDERS)
def test_every_version_computes_on_a_gpu(name, cupy):
    cuda = Cuda()
    if name == "sum_rows":
        x = normal(0, 3000, 64).astype(np.float32)
        given, expected = (x,), x.sum(axis=0, dtype=np.float64)
    else:
        qkv = tuple(normal(i, 2, 2, 70, 64).astype(np.float32) for i in range(3))
        given = (*qkv, 0.125)
        expected, _ = attention.forward(None, tuple(map(np.float64, qkv)), REFERENCE, 0.125)
    there = [cupy.asarray(x) if isinstance(x, np.ndarray) else x for x in given]
    for step in LADDERS[name]:
        y = cupy.asnumpy(step.run(*there, cuda))
        assert np.linalg.norm(y - expected) <= 3e-6 * np.linalg.norm(expected), step.title
