"""A device without numbers, which notes what a GPU would be told: each kernel, and its bytes.

Its arrays have shapes only (pvt_ref.report.shapes). CuPy starts one kernel for a call that computes
or copies, and none for one that gives another view; a kernel of pvt_ref is one as well. So whoever
runs a network on these arrays knows how many programs a GPU starts and how many bytes they move,
if each reads its arguments once. No GPU is needed, and no g++.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from pvt_ref.kernels.cuda.launch import Cuda, Function, source
from pvt_ref.kernels.cuda.sum_rows import SUM_BY_PRODUCT
from pvt_ref.kernels.cuda.table import table_with
from pvt_ref.layers.sum_rows import sum_rows
from pvt_ref.ops import Ops
from pvt_ref.report.shapes import ShapeArray, Shapes


class Start(NamedTuple):
    """A kernel that is started."""

    name: str  # of the array function, or of the kernel in its .cu file
    kind: str  # "product", "kernel" (a .cu file's), "copy" or "elementwise"
    moved: int  # bytes read and written
    operations: int  # on floating-point numbers; 0 where only a kernel's source tells


class DeviceArray(ShapeArray):
    """An array on it. Strides count numbers, so a number has the size 1."""

    __slots__ = ()
    itemsize = 1
    ctypes = SimpleNamespace(data=0)  # a row begins where kernels can read it in pieces

    def _on(self) -> Any:
        """The device, which notes what is done."""
        return self.memory.shapes

    def view(self, shape: Sequence[int], strides: Sequence[int]) -> "DeviceArray":
        """The same memory in another shape."""
        return DeviceArray(tuple(shape), tuple(strides), self.dtype, self.memory)

    def __len__(self) -> int:
        return self.shape[0]

    def copy(self) -> "DeviceArray":
        """The same numbers in order, in new memory."""
        y = self._on().empty(self.shape, self.dtype)
        self._on().note("copy", "copy", [self], y)
        return y

    def __setitem__(self, key: Any, value: Any) -> None:
        target = self[key]
        ShapeArray.__iadd__(target, value)  # that the shapes fit
        self._on().note("copy", "copy", [value], target)

    def __iadd__(self, other: Any) -> "DeviceArray":
        ShapeArray.__iadd__(self, other)
        self._on().note("in place", "elementwise", [self, other], self)
        return self

    __isub__ = __imul__ = __itruediv__ = __iadd__

    def __matmul__(self, other: "DeviceArray") -> ShapeArray:
        y = ShapeArray.__matmul__(self, other)
        flops = 2 * y.size * self.shape[-1]
        self._on().note("matmul", "product", [self, other], y, flops)
        return y


def _noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    kind = "copy" if name in ("concat", "reshape", "astype", "asarray", "zeros") else "elementwise"

    @wraps(function)
    def run(self: "Device", *args: Any, **options: Any) -> Any:
        y = function(self, *args, **options)
        given = [x for x in _flat(args) if isinstance(x, ShapeArray)]
        if all(x.memory is not y.memory for x in given):  # or it is a view, and nothing is done
            self.note(name, kind, given, y)
        return y

    return run


def _flat(values: Any) -> Any:
    for x in values:
        yield from _flat(x) if isinstance(x, tuple | list) else (x,)


class Device(Shapes):
    """The library of such arrays; ``starts`` are the kernels so far, in their order.

    Products of which kernels(...) knows nothing are the array library's.
    """

    int32, uint64, float32 = (np.dtype(name) for name in ("int32", "uint64", "float32"))

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[Start] = []

    def note(self, name: str, kind: str, read: list[Any], y: Any, operations: int = 0) -> None:
        """Adds a kernel that reads these arrays, or what of them is in memory, and writes y."""
        arrays = [x for x in (*read, y) if isinstance(x, ShapeArray)]
        moved = sum(min(x.nbytes, x.memory.bytes) for x in arrays)
        if kind == "elementwise":
            operations = max(x.size for x in arrays)
        self.starts.append(Start(name, kind, moved, operations))

    @contextmanager
    def counted(self) -> Any:
        """The list of kernels that are started inside the ``with``."""
        before, found = len(self.starts), []
        yield found
        found += self.starts[before:]

    def launch(
        self,
        function: Function,
        grid: Sequence[int],
        threads: Sequence[int],
        arguments: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """The setting ``launch`` of a table of kernels: the kernel is noted, and nothing is run."""
        assert all(n >= 1 for n in (*grid, *threads))
        (parameters,) = re.findall(
            rf"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?{function.name}\(([^)]*)\)",
            source(function.file),
        )
        assert len(parameters.split(",")) == len(arguments), function.name
        moved = sum(x.nbytes for x in arguments if isinstance(x, ShapeArray))
        kind, operations = "kernel", 0
        if function.name == "product":  # a stack along z, or one product in parts
            M, N, K, parts, _ = arguments[-5:]
            kind, operations = "product", 2 * M * N * K * (grid[2] if parts == 1 else 1)
        self.starts.append(Start(function.name, kind, moved, operations))

    # the functions that kernels need beside those of networks

    def empty(self, shape: Any, dtype: Any = Shapes.float64, device: None = None) -> DeviceArray:
        """New memory, into which nothing is written."""
        x = super().empty(shape if isinstance(shape, tuple) else (shape,), dtype)
        return DeviceArray(x.shape, x.strides, x.dtype, x.memory)

    def empty_like(self, x: ShapeArray) -> DeviceArray:
        """As :meth:`empty`, in x's shape."""
        return self.empty(x.shape, x.dtype)

    def ones(self, shape: Any, dtype: Any = Shapes.float64) -> DeviceArray:
        """New memory that is filled."""
        return self.zeros(shape, dtype)

    def flip(self, x: DeviceArray, *, axis: int) -> ShapeArray:
        """A view, which no kernel takes as it is."""
        return self.permute_dims(x, tuple(range(x.ndim)))

    def ascontiguousarray(self, x: DeviceArray) -> DeviceArray:
        """x, or a copy if its numbers do not lie in order."""
        strides = [math.prod(x.shape[i:]) for i in range(1, x.ndim + 1)]
        as_they_are = all(
            n == 1 or a == b for n, a, b in zip(x.shape, x.strides, strides, strict=True)
        )
        return x if as_they_are else x.copy()

    zeros = _noted("zeros", lambda self, *a, **o: self.empty(*a, **o))
    zeros_like = _noted("zeros", lambda self, x: self.empty(x.shape, x.dtype))


for _name in (
    *("asarray", "astype", "concat", "reshape", "elementwise", "exp", "sqrt", "erf", "maximum"),
    *("where", "sum", "mean", "max"),
):
    setattr(Device, _name, _noted(_name, getattr(Shapes, _name)))


def readable_on(device: Device) -> Ops:
    """The readable layers, with the sum over rows by a product: the default table for CuPy."""
    return Ops({sum_rows: SUM_BY_PRODUCT}, name="on no device")


def kernels_on(device: Device) -> Ops:
    """The table of kernels, which this device notes."""
    return table_with(Cuda(device.launch), None)
