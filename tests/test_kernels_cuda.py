"""The table of the kernels for CuPy: who gets it, how it launches, and whether its files compile.

What the kernels compute is in test_kernels_cuda_computed.py.
"""

import pickle
import re
import sys
import types

import cuda_on_cpu
import numpy as np
import pytest
from closeness import relative
from strategies import normal, rng_of

import pvt_ref
from pvt_ref import REFERENCE, Operation, blocked_ops
from pvt_ref.api import choose_ops, default_ops
from pvt_ref.errors import ArrayTypeError, DeviceError, RangeError
from pvt_ref.kernels.cuda import launch
from pvt_ref.kernels.cuda.launch import HALVES, HERE, Cuda, Function, on_gpu, source
from pvt_ref.kernels.cuda.layer_norm import lanes_and_pieces
from pvt_ref.kernels.cuda.product import multiply
from pvt_ref.kernels.cuda.table import cuda_kernels, cuda_ops, table_with
from pvt_ref.layers.sum_rows import sum_rows

SUM_ROWS = cuda_ops()[sum_rows]  # of float64, it launches nothing


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 255, 1000])
@pytest.mark.parametrize("C", [1, 3])
def test_the_sum_over_rows_of_float64_is_a_product(rows, C):
    x = normal(rows, rows, C)
    y, cache = SUM_ROWS.forward(None, x, REFERENCE)
    np.testing.assert_allclose(y, x.sum(axis=0), rtol=1e-12, atol=1e-12)
    dy = normal(1, C)
    for op in (SUM_ROWS, sum_rows):
        np.testing.assert_array_equal(
            op.backward(None, cache, dy, REFERENCE)[0], np.broadcast_to(dy, (rows, C))
        )
    assert SUM_ROWS.forward(None, x, REFERENCE, keep=False)[1] is None


# Who gets the table -------------------------------------------------------------------------------


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
    monkeypatch.setenv("PVT_REF_OPS", "kernels")
    assert default_ops(fake_cupy) == cuda_kernels()
    assert default_ops(np.zeros(1)) == blocked_ops()
    monkeypatch.setenv("PVT_REF_OPS", "reference")
    assert default_ops(fake_cupy) == REFERENCE
    monkeypatch.setenv("PVT_REF_OPS", "fast")
    with pytest.raises(RangeError, match="PVT_REF_OPS is 'fast'"):
        default_ops(fake_cupy)


def test_the_kernels_for_cuda_refuse_numpy_arrays():
    for table, name in ((cuda_ops(), "cuda"), (cuda_kernels(), "cuda kernels")):
        with pytest.raises(ArrayTypeError, match=f"'{name}', which does not compute on numpy"):
            choose_ops(table, np.zeros(3))


def test_replacing_the_sum_takes_effect_there_too():
    calls = []

    def counted(p, x, ops, keep=True):
        calls.append(x.shape)
        return sum_rows.forward(p, x, ops, keep)

    table = cuda_ops().replace(sum_rows, Operation(counted, sum_rows.backward))
    table[sum_rows].forward(None, np.zeros((2, 3)), table)
    assert calls == [(2, 3)]


def test_tables_of_equal_settings_are_equal_and_pickle():
    assert table_with(Cuda(), None) == table_with(Cuda(), None)
    assert table_with(Cuda(blocks=5), None) != table_with(Cuda(), None)
    assert repr(table_with(Cuda(blocks=5), None)) == (
        "Ops('cuda kernels', Cuda(blocks=5, products='own', precision='float32'))"
    )
    for table in (cuda_ops(), cuda_kernels()):
        assert pickle.loads(pickle.dumps(table)) == table


# Launching ----------------------------------------------------------------------------------------


class FakeDevice:
    """A device that notes when it is the current one."""

    current: list[int] = []  # noqa: RUF012

    def __init__(self, number):
        self.id = number

    def __enter__(self):
        self.current.append(self.id)

    def __exit__(self, *_):
        self.current.pop()


class FakeDeviceArray:
    """An array on a device, whose library keeps what it is told to launch."""

    def __init__(self, number, module):
        self.device, self.module = FakeDevice(number), module

    def __array_namespace__(self):
        return self.module


class FakeLibrary:
    """Of CuPy what launches: every kernel is kept with what it was compiled from."""

    def __init__(self):
        self.launched, self.compiled = [], []

    def RawModule(self, **how):  # noqa: N802 (CuPy's name)
        self.compiled.append((how, list(FakeDevice.current)))
        return self

    def get_function(self, name):
        return lambda *args, **more: self.launched.append(
            (name, args, more, list(FakeDevice.current))
        )


def test_a_kernel_is_launched_on_the_device_of_its_arrays_with_arguments_of_its_types():
    library = FakeLibrary()
    x, y = FakeDeviceArray(1, library), FakeDeviceArray(0, library)
    function = Function("layer_norm.cu", "layer_norm", (("LANES", 16), ("PIECES", 1)))
    on_gpu(function, (3,), (256,), (None, x, 0.5, 7, y), shared=96)
    (name, (grid, threads, arguments), more, devices) = library.launched[0]
    assert (name, grid, threads, more, devices) == (
        "layer_norm", (3,), (256,), {"shared_mem": 96}, [1],
    )  # fmt: skip
    # CuPy passes NumPy's scalars as they are, and a Python int as 64 bits
    assert [type(a) for a in arguments[:1]] == [np.uint64]
    assert arguments[0] == 0
    assert arguments[1] is x
    assert (type(arguments[2]), arguments[2]) == (np.float32, 0.5)
    assert (type(arguments[3]), arguments[3]) == (np.int32, 7)
    on_gpu(function, (3,), (256,), (x,))
    on_gpu(function, (3,), (256,), (y,))
    # once for each device, on that device
    assert [devices for _, devices in library.compiled] == [[1], [0]]
    how = library.compiled[0][0]
    assert how["code"] == source("layer_norm.cu")
    assert {"-DLANES=16", "-DPIECES=1"} < set(how["options"])
    assert how["backend"] == "nvrtc"


def test_a_kernel_that_cannot_be_compiled_says_what_to_do():
    class Broken(FakeLibrary):
        def RawModule(self, **how):  # noqa: N802
            raise RuntimeError("libnvrtc.so.12: cannot open shared object file")

    with pytest.raises(DeviceError) as refused:
        on_gpu(Function("gelu.cu", "gelu"), (1,), (256,), (FakeDeviceArray(2, Broken()),))
    for words in (
        *("kernel gelu could not be compiled for CUDA device 2", "libnvrtc.so.12: cannot open"),
        *("pip install 'cupy-cuda12x[ctk]'", "PVT_REF_OPS=reference"),
    ):
        assert words in str(refused.value)


def test_headers_stand_where_they_are_included_and_lines_keep_their_numbers(tmp_path, monkeypatch):
    (tmp_path / "some.h").write_text("in header\n")
    (tmp_path / "more.h").write_text("in the other\nline 2\n")
    (tmp_path / "some.cu").write_text('first\n#include "some.h"\n#include "more.h"\nfourth\n')
    monkeypatch.setattr(launch, "HERE", tmp_path)
    where, told = ("", 0), {}
    for line in source.__wrapped__("some.cu").splitlines():
        directive = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if directive:
            where = (directive[2], int(directive[1]))
        else:
            told[line] = where
            where = (where[0], where[1] + 1)
    assert told == {
        "first": ("some.cu", 1), "in header": ("some.h", 1), "in the other": ("more.h", 1),
        "line 2": ("more.h", 2), "fourth": ("some.cu", 4),
    }  # fmt: skip


def test_a_row_is_shared_by_threads_that_have_work():
    for C in range(4, 1025, 4):
        for backward in (False, True):
            lanes, pieces = lanes_and_pieces(C, backward)
            assert lanes in (1, 2, 4, 8, 16, 32)
            assert (pieces - 1) * lanes * 4 < C <= pieces * lanes * 4
            assert not backward or pieces <= max(1, C / 4 / 16)
            assert backward or C % 32 or C % (lanes * 4) == 0  # all have work


# Compiling ----------------------------------------------------------------------------------------

#: Head widths and channels of the networks that come by name, and a few more.
HEADS = {32: (2, 4), 64: (2, 4), 128: (), 256: ()}  # with fewer threads than eight a query
CHANNELS = (32, 64, 128, 160, 192, 256, 320, 384, 512, 768, 1024)


def files_with_macros():
    """Every file, with all macros that these widths need."""
    for C in CHANNELS:
        for backward in (False, True):
            macros = zip(("LANES", "PIECES"), lanes_and_pieces(C, backward), strict=True)
            yield Function("layer_norm.cu", "", tuple(macros))
    for d, few in HEADS.items():
        for i, name in enumerate(("attention", "attention_backward")):
            for lanes in (8, *few[i : i + 1]):
                yield Function(f"{name}.cu", "", (("D", d), ("LANES", lanes)))
    for piece in ("float", "float4"):
        yield Function("windows.cu", "", (("PIECE", piece),))
        yield Function("resize.cu", "", (("PIECE", piece),))
    for tile, piece in ((64, 4), (32, 4), (32, 1)):
        for layout in ((0, 0), (0, 1), (1, 1), (1, 0)):
            for terms in (3, 1):
                values = (tile, terms, *layout, piece)
                names = ("TILE", "TERMS", "A_IN_COLUMNS", "B_IN_COLUMNS", "PIECE")
                yield Function("product.cu", "", tuple(zip(names, values, strict=True)))
    for half in HALVES:
        yield Function("cast.cu", "", (("CAST", f"to_{half}"),))
    for name in (
        *("sum_rows", "gelu", "depthwise_conv", "optimizer", "mlp"),
        *("product_parts", "batch_norm"),
    ):
        yield Function(f"{name}.cu", "")


FUNCTIONS = sorted(set(files_with_macros()))


def test_every_file_of_kernels_is_compiled_here():
    assert {function.file for function in FUNCTIONS} == {path.name for path in HERE.glob("*.cu")}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    "function",
    sorted(FUNCTIONS),
    ids=lambda f: "-".join(map(str, (f.file, *dict(f.macros).values()))),
)
def test_every_kernel_compiles_without_spilling_registers(function, arch, nvrtc):
    log = cuda_on_cpu.compiled_for(nvrtc, function, arch)
    spills, uses = r"(\d+) bytes spill stores", r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    pattern = rf"entry function '(\w+)'.*?{spills}.*?{uses}"
    found = re.findall(pattern, log, flags=re.DOTALL)
    names = {name for name, *_ in found}
    assert names == set(cuda_on_cpu.kernels_of(function)), log
    for name, spilled, registers, shared in found:
        print(f"{name} {dict(function.macros)} for {arch}: {registers} registers, "
              f"{shared or 0} bytes of shared memory, {spilled} spilled")  # fmt: skip
        assert int(spilled) == 0
        assert int(registers) * 256 <= 65_536  # or a block of 256 threads could not start


# On a GPU -----------------------------------------------------------------------------------------


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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("products", "precision", "tolerance"),
    [
        *(("own", "float32", 3e-7), ("own", "tf32", 1e-3), ("cublaslt", "float32", 3e-7)),
        *(
            ("cublaslt", "tf32", 1e-3),
            ("cublaslt", "float16", 1e-3),
            ("cublaslt", "bfloat16", 8e-3),
        ),
    ],
)
def test_on_a_gpu_products_have_the_accuracy_of_their_precision(
    products, precision, tolerance, cupy
):
    cuda = cuda_kernels(precision, products).settings
    for M, K, N in ((3, 5, 7), (197, 384, 1000), (130, 68, 36), (49, 4096, 64)):
        a, b = normal(1, M, K, dtype=np.float32), normal(2, K, N, dtype=np.float32)
        bias, residual = normal(3, N, dtype=np.float32), normal(4, M, N, dtype=np.float32)
        expected = a.astype(np.float64) @ b + bias + residual
        factors = (cupy.asarray(a), cupy.asarray(a.T.copy()).T, cupy.asarray(b))
        for left in factors[:2]:
            for right in (factors[2], cupy.asarray(b.T.copy()).T):
                more = (cupy.asarray(bias), cupy.asarray(residual))
                y = multiply(left, right, cuda, *more)
                assert relative(cupy.asnumpy(y), expected) < tolerance
                again = multiply(left, right, cuda, *more)
                np.testing.assert_array_equal(cupy.asnumpy(again), cupy.asnumpy(y))
    a = np.ones((2, 8), np.float32)
    a[0, 1], a[1, 2] = np.inf, np.nan
    y = cupy.asnumpy(multiply(cupy.asarray(a), cupy.ones((8, 4), np.float32), cuda))
    np.testing.assert_array_equal(y, [[np.inf] * 4, [np.nan] * 4])
