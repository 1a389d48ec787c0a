"""Products by cuBLASLt, NVIDIA's library of matrix products, called through ctypes.

CuPy's own products cannot be captured in a CUDA graph, and add neither bias nor residual. cuBLASLt
keeps no state between calls: stream and workspace are arguments. Its matrices are column-major, and
arrays are row-major, so the transposed product is computed::

    y^T (N, M) = b^T (N, K) a^T (K, M)

Of the algorithms that it proposes for a shape, the first is used: the fastest by its own estimate.
Timing them would find a faster one for some shapes, but the winner could change from run to run,
and each algorithm rounds differently.
"""

import ctypes
import functools
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

from pvt_ref.arrays import Array, address, array_module, is_cupy
from pvt_ref.errors import DeviceError, reason

#: The most plans that are kept, one for each problem.
_MOST_PLANS = 1024

#: The largest workspace that an algorithm may use, in bytes.
_MOST_WORKSPACE = 32 << 20

#: The largest alignment of arrays that plans assume, in bytes. By default, cuBLASLt assumes 256.
_MOST_ALIGNMENT = 16

# from cublasLt.h, library_types.h and cublas_api.h
_FLOAT32 = 0
_TYPES = {"float32": _FLOAT32, "tf32": _FLOAT32, "float16": 2, "bfloat16": 14}
_COMPUTE_FLOAT32, _COMPUTE_TF32 = 68, 77
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8  # of a product's description
_WITH_BIAS = 4  # an epilogue
_BATCH_COUNT, _BATCH_STEP = 5, 6  # of a matrix's
_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)  # of a preference; A, B, C, D
_STATUS = {
    1: "not initialised", 3: "out of memory", 7: "an invalid value", 8: "no code for this GPU",
    13: "the launch failed", 14: "an internal error", 15: "not supported",
}  # fmt: skip

_POINTER = c_void_p
_ATTRIBUTE = (_POINTER, c_int, _POINTER, c_size_t)

#: The functions that are called, and the types of their arguments. All return a status.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_POINTER,),
    "cublasLtMatmulDescCreate": (_POINTER, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": _ATTRIBUTE,
    "cublasLtMatmulDescDestroy": (_POINTER,),
    "cublasLtMatrixLayoutCreate": (_POINTER, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutSetAttribute": _ATTRIBUTE,
    "cublasLtMatrixLayoutDestroy": (_POINTER,),
    "cublasLtMatmulPreferenceCreate": (_POINTER,),
    "cublasLtMatmulPreferenceSetAttribute": _ATTRIBUTE,
    "cublasLtMatmulPreferenceDestroy": (_POINTER,),
    "cublasLtMatmulAlgoGetHeuristic": (*(_POINTER,) * 7, c_int, _POINTER, _POINTER),
    "cublasLtMatmul": (*(_POINTER,) * 14, c_size_t, _POINTER),
}


class Factor(NamedTuple):
    """A matrix (rows, K), or a stack (B, N, rows, K) of them, and its memory layout.

    Rows are contiguous in memory or, if in_columns, columns. step is the number of elements from
    row to row, or from column to column; outer and inner are the steps along B and N.
    """

    array: Array
    in_columns: bool
    step: int
    outer: int
    inner: int


class Problem(NamedTuple):
    """What a plan is for: D (m, n) = op(A) op(B) + bias + C, column-major; C has D's layout.

    If batch > 1, there are that many matrices, with these steps between them. A, B and D have these
    alignments in bytes.
    """

    m: int
    n: int
    k: int
    precision: str
    a_transposed: bool
    b_transposed: bool
    lda: int
    ldb: int
    has_bias: bool
    has_residual: bool
    batch: int
    steps: tuple[int, int, int]
    alignments: tuple[int, int, int]


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class CublasLt:
    """The library on one device, and its plans.

    Args:
        library: the loaded library.
        where: the name of the device, for messages.

    Raises:
        DeviceError: if the library is too old, lacks a function, or finds no device.
    """

    def __init__(self, library: Any, where: str = "this device"):
        try:
            library.cublasLtGetVersion.restype = c_size_t
            self.version = int(library.cublasLtGetVersion())
            for name, types in _FUNCTIONS.items():
                getattr(library, name).argtypes = types
        except AttributeError as error:
            raise _no_library(f"it lacks a function ({error})") from error
        if self.version < 110_000:  # major * 1000 + minor up to 10, then major * 10000
            raise _no_library(f"its version is {self.version}, and 11 is the first with this use")
        self._library, self._where = library, where
        self._handle = c_void_p()
        self._call("cublasLtCreate", byref(self._handle))
        self.plan = functools.lru_cache(_MOST_PLANS)(self._new_plan)

    def _call(self, name: str, *arguments: Any, of: Problem | None = None) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            what = f" for a product of {of}" if of else ""
            raise DeviceError(
                f"{name} of cuBLASLt {self.version} refuses on {self._where}{what}: status "
                f"{status}, {_STATUS.get(status, 'unknown')}. Where memory is short, smaller "
                f"batches help; cuda_kernels(products='own') needs no cuBLASLt"
            )

    def _made(self, kind: str, made: list[tuple[str, c_void_p]], *arguments: Any) -> c_void_p:
        """Creates a descriptor, and appends it to made."""
        descriptor = c_void_p()
        self._call(f"cublasLt{kind}Create", byref(descriptor), *arguments)
        made.append((kind, descriptor))
        return descriptor

    def _set(self, kind: str, descriptor: c_void_p, attribute: int, value: Any) -> None:
        name = f"cublasLt{kind}SetAttribute"
        self._call(name, descriptor, attribute, byref(value), ctypes.sizeof(value))

    def _new_plan(self, problem: Problem) -> "Plan":
        m, n, k, precision = problem[:4]
        made: list[tuple[str, c_void_p]] = []
        try:
            compute = _COMPUTE_TF32 if precision == "tf32" else _COMPUTE_FLOAT32
            description = self._made("MatmulDesc", made, compute, _FLOAT32)
            for attribute, value in (
                (_TRANSA, problem.a_transposed),
                (_TRANSB, problem.b_transposed),
                (_EPILOGUE, _WITH_BIAS if problem.has_bias else 1),
            ):
                self._set("MatmulDesc", description, attribute, c_int(value))
            if problem.has_bias:  # only its presence: each call sets the address
                self._set("MatmulDesc", description, _BIAS_POINTER, c_uint64(_MOST_ALIGNMENT))
            a = (k, m) if problem.a_transposed else (m, k)
            b = (n, k) if problem.b_transposed else (k, n)
            dtype = _TYPES[precision]
            layouts = [
                self._made("MatrixLayout", made, *each)
                for each in (
                    (dtype, *a, problem.lda),
                    (dtype, *b, problem.ldb),
                    (_FLOAT32, m, n, m),
                )
            ]
            if problem.batch > 1:
                for layout, step in zip(layouts, problem.steps, strict=True):
                    self._set("MatrixLayout", layout, _BATCH_COUNT, c_int(problem.batch))
                    self._set("MatrixLayout", layout, _BATCH_STEP, c_int64(step))
            preference = self._made("MatmulPreference", made)
            self._set("MatmulPreference", preference, _WORKSPACE, c_uint64(_MOST_WORKSPACE))
            alignments = (*problem.alignments, problem.alignments[2])  # C's is D's
            for attribute, value in zip(_ALIGNMENTS, alignments, strict=True):
                self._set("MatmulPreference", preference, attribute, c_uint32(value))
            best, count = _Heuristic(), c_int()
            self._call(
                "cublasLtMatmulAlgoGetHeuristic",
                *(self._handle, description, *layouts, layouts[2], preference),
                *(1, byref(best), byref(count)),
                of=problem,
            )
            if not count.value or best.state:
                raise DeviceError(
                    f"cuBLASLt {self.version} has no algorithm on {self._where} for a product of "
                    f"{problem}. cuda_kernels(products='own') needs no cuBLASLt"
                )
        except BaseException:
            _destroy(self._library, made)
            raise
        plan = Plan(description, tuple(layouts), best)
        weakref.finalize(plan, _destroy, self._library, made).atexit = False
        return plan

    def multiply(
        self,
        a: Factor,
        b: Factor,
        shape: tuple[int, ...],
        precision: str,
        bias: Array | None,
        residual: Array | None,
    ) -> Array:
        """y = a (..., M, K) b (..., N, K)^T + bias + residual, of the given shape (..., M, N).

        y is float32. If there are two axes before M, a and b are stacks. The products along the
        longer axis are one batch, and those along the other a loop.
        """
        xp, (M, N) = array_module(a.array), shape[-2:]
        K = a.array.shape[-1]
        images, heads = shape[:-2] or (1, 1)
        # the longer axis of a stack becomes a batch, the other a loop
        axes = (images, (b.outer, a.outer, heads * M * N)), (heads, (b.inner, a.inner, M * N))
        (times, moves), (batch, steps) = sorted(axes)
        problem = Problem(
            *(N, M, K, precision, not b.in_columns, a.in_columns, b.step, a.step),
            *(bias is not None, residual is not None),
            *(batch, steps if batch > 1 else (0, 0, 0)),
            (
                _alignment(b),
                _alignment(a),
                4 if images * heads > 1 and M * N % 4 else _MOST_ALIGNMENT,
            ),
        )
        plan = self.plan(problem)
        given = None if bias is None else c_uint64(address(bias))
        one, beta = c_float(1), c_float(residual is not None)
        with a.array.device if is_cupy(a.array) else nullcontext():
            stream = xp.cuda.get_current_stream().ptr if is_cupy(a.array) else None
            y = xp.empty(shape, xp.float32)
            workspace = xp.empty(plan.best.workspace, xp.uint8)
            where = address(workspace) if workspace.size else None
            for i in range(times):
                # the addresses of matrix i
                pointers = [
                    address(x) + x.itemsize * i * move
                    for x, move in zip((b.array, a.array, y), moves, strict=True)
                ]
                old = pointers[2] if residual is None else address(residual)
                with plan.lock:  # the description holds the address of the bias
                    if given is not None:
                        self._set("MatmulDesc", plan.description, _BIAS_POINTER, given)
                    self._call(
                        "cublasLtMatmul",
                        *(self._handle, plan.description, byref(one)),
                        *(pointers[0], plan.layouts[0], pointers[1], plan.layouts[1], byref(beta)),
                        *(old, plan.layouts[2], pointers[2], plan.layouts[2]),
                        *(byref(plan.best), where, workspace.size, stream),
                        of=problem,
                    )
        return y


def _destroy(library: Any, made: list[tuple[str, c_void_p]]) -> None:
    for kind, descriptor in made:
        getattr(library, f"cublasLt{kind}Destroy")(descriptor)


class Plan:
    """The descriptors of a problem and its algorithm; the plan keeps the descriptors alive."""

    def __init__(
        self, description: c_void_p, layouts: tuple[c_void_p, ...], best: _Heuristic
    ) -> None:
        self.description, self.layouts, self.best = description, layouts, best
        self.lock = threading.Lock()


def _alignment(x: Factor) -> int:
    """The alignment in bytes that all matrices of a stack have."""
    together = address(x.array) | x.array.itemsize * (x.outer | x.inner) | _MOST_ALIGNMENT
    return together & -together  # the largest power of two that divides all


#: Finds the library for an array, in the settings of a table.
Finder = Callable[[Array], CublasLt]


def _no_library(why: str) -> DeviceError:
    return DeviceError(
        f"products by cuBLASLt were asked for, but {why}. It comes with the CUDA toolkit and with "
        f"pip install 'cupy-cuda12x[ctk]' (or 13x), of the CUDA version that CuPy is made for. "
        f"Without it: cuda_kernels(products='own'), for float32 and TF32, or products='cupy'"
    )


@functools.cache
def _on_device(cupy: Any, device: int) -> CublasLt:
    """The library on the current device, whose number is given."""
    try:
        cupy.cuda.device.get_cublas_handle()  # CuPy knows where cuBLAS is, and loads both
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        windows = sys.platform == "win32"
        name = f"cublasLt64_{major}.dll" if windows else f"libcublasLt.so.{major}"
        library = ctypes.CDLL(name)
    except Exception as error:  # CuPy has many
        raise _no_library(f"it cannot be loaded ({reason(error)})") from error
    return CublasLt(library, f"CUDA device {device}")


def on_gpu(x: Array) -> CublasLt:
    """The library on the device of x, a CuPy array."""
    with x.device:
        return _on_device(array_module(x), x.device.id)
