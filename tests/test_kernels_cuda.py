"""Kernels for CuPy: what they compute, on NumPy's arrays; where there is a GPU, on its own."""

import sys
import types

import numpy as np
import pytest
from strategies import normal, rng_of

import pvt_ref
from pvt_ref import REFERENCE, Operation
from pvt_ref.api import choose_ops, default_ops
from pvt_ref.errors import ArrayTypeError, RangeError
from pvt_ref.kernels.cuda.sum_rows import SUM_ROWS
from pvt_ref.kernels.cuda.table import cuda_ops
from pvt_ref.layers.sum_rows import sum_rows


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 255, 1000])
@pytest.mark.parametrize("C", [1, 3])
def test_the_sum_over_rows_is_the_sum_over_rows(rows, C):
    x = normal(rows, rows, C)
    y, cache = SUM_ROWS.forward(None, x, REFERENCE)
    np.testing.assert_allclose(y, x.sum(axis=0), rtol=1e-12, atol=1e-12)
    dy = normal(1, C)
    for op in (SUM_ROWS, sum_rows):
        np.testing.assert_array_equal(
            op.backward(None, cache, dy, REFERENCE)[0], np.broadcast_to(dy, (rows, C))
        )
    assert SUM_ROWS.forward(None, x, REFERENCE, keep=False)[1] is None


def test_the_sum_of_many_float32_rows_keeps_its_digits():
    # all of one sign, and next to a mean that is far from zero: where float32 loses most
    for x in (rng_of(0).random((200_704, 4)), 1 + normal(1, 200_704, 4)):
        x = x.astype(np.float32)
        y, _ = SUM_ROWS.forward(None, x, REFERENCE)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, x.sum(axis=0, dtype=np.float64), rtol=4e-7)


class FakeArray:
    """What the choice of a table looks at, without a GPU."""

    dtype = np.dtype(np.float32)


@pytest.fixture
def fake_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=FakeArray))
    return FakeArray()


def test_cupy_arrays_get_the_kernels_for_cuda(fake_cupy, monkeypatch):
    monkeypatch.delenv("PVT_REF_OPS", raising=False)
    assert default_ops(fake_cupy) == cuda_ops()
    monkeypatch.setenv("PVT_REF_OPS", "reference")
    assert default_ops(fake_cupy) == REFERENCE
    monkeypatch.setenv("PVT_REF_OPS", "fast")
    with pytest.raises(RangeError, match="PVT_REF_OPS is 'fast'"):
        default_ops(fake_cupy)


def test_the_kernels_for_cuda_refuse_numpy_arrays():
    with pytest.raises(ArrayTypeError, match="'cuda', which does not compute on numpy float64"):
        choose_ops(cuda_ops(), np.zeros(3))


def test_replacing_the_sum_takes_effect_there_too():
    calls = []

    def counted(p, x, ops, keep=True):
        calls.append(x.shape)
        return sum_rows.forward(p, x, ops, keep)

    table = cuda_ops().replace(sum_rows, Operation(counted, sum_rows.backward))
    table[sum_rows].forward(None, np.zeros((2, 3)), table)
    assert calls == [(2, 3)]


@pytest.mark.gpu
def test_on_a_gpu_the_gradients_are_those_of_the_readable_layers(cupy):
    config = pvt_ref.PVTConfig(
        img_size=64, num_classes=5, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)
    )
    params = pvt_ref.to_device(pvt_ref.init_params(config, rng_of(0)), "cuda")
    images = cupy.asarray(normal(1, 8, 3, 64, 64, dtype=np.float32))
    results = []
    for ops in (None, REFERENCE):
        logits, cache = pvt_ref.forward_with_cache(params, images, config, ops=ops)
        grads, _ = pvt_ref.backward(params, cache, logits, config)
        results.append(pvt_ref.to_numpy(pvt_ref.to_state_dict(grads)))
    largest = max(np.abs(x).max() for x in results[1].values())
    for key, x in results[0].items():
        np.testing.assert_allclose(x, results[1][key], rtol=1e-4, atol=1e-6 * largest, err_msg=key)
