"""Arrays with a shape but no numbers: running a network on them gives shapes and memory."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

Shape = tuple[int, ...]


class _Memory:
    """What an array and its views share; counted as long as one of them lives."""

    __slots__ = ("bytes", "shapes")

    def __init__(self, shapes: "Shapes", size: int) -> None:
        self.shapes, self.bytes = shapes, size
        shapes.alive += size
        shapes.peak = max(shapes.peak, shapes.alive)

    def __del__(self) -> None:
        self.shapes.alive -= self.bytes


class ShapeArray:
    """An array of the array API standard, as far as networks use it, without its numbers."""

    __array_ufunc__ = None  # NumPy leaves arithmetic to this class
    __slots__ = ("__weakref__", "dtype", "memory", "shape", "strides")
    device = None

    def __init__(self, shape: Shape, strides: Shape, dtype: Any, memory: _Memory) -> None:
        self.shape, self.strides, self.dtype, self.memory = shape, strides, dtype, memory

    def __array_namespace__(self, api_version: str | None = None) -> "Shapes":
        return self.memory.shapes

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def view(self, shape: Sequence[int], strides: Sequence[int]) -> "ShapeArray":
        return ShapeArray(tuple(shape), tuple(strides), self.dtype, self.memory)

    def __getitem__(self, key: Any) -> "ShapeArray":
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            i = keys.index(Ellipsis)
            keys[i : i + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        keys += [slice(None)] * (self.ndim - len(keys))
        shape, strides = [], []
        for k, n, stride in zip(keys, self.shape, self.strides, strict=True):
            if isinstance(k, slice):
                start, stop, step = k.indices(n)
                shape.append(max(0, -((start - stop) // step)))
                strides.append(stride * step)
            else:
                range(n)[k]  # an IndexError for a number that is too large
        return self.view(shape, strides)

    def __setitem__(self, key: Any, value: Any) -> None:
        self[key].__iadd__(value)

    def __add__(self, other: Any) -> "ShapeArray":
        return self.memory.shapes.elementwise(self, other)

    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __add__

    def __gt__(self, other: Any) -> "ShapeArray":
        return self.memory.shapes.empty(_broadcast(self.shape, getattr(other, "shape", ())), bool)

    def __iadd__(self, other: Any) -> "ShapeArray":
        if _broadcast(self.shape, getattr(other, "shape", ())) != self.shape:
            raise ValueError(f"{other.shape} does not broadcast to {self.shape}")
        return self

    __isub__ = __imul__ = __itruediv__ = __iadd__

    def __matmul__(self, other: "ShapeArray") -> "ShapeArray":
        if self.shape[-1] != other.shape[-2]:
            raise ValueError(f"no matrix product of {self.shape} and {other.shape}")
        before = _broadcast(self.shape[:-2], other.shape[:-2])
        return self.memory.shapes.empty((*before, self.shape[-2], other.shape[-1]), self.dtype)


class Shapes:
    """The functions on such arrays, as ``numpy`` has them; alive and peak count their bytes."""

    __name__ = "shapes"
    float64 = np.dtype(np.float64)
    isdtype = staticmethod(np.isdtype)

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def empty(self, shape: Shape, dtype: Any = float64, device: None = None) -> ShapeArray:
        dtype, size = np.dtype(dtype), math.prod(shape)
        strides = tuple(math.prod(shape[i:]) for i in range(1, len(shape) + 1))
        return ShapeArray(tuple(shape), strides, dtype, _Memory(self, size * dtype.itemsize))

    zeros = empty

    def zeros_like(self, x: ShapeArray) -> ShapeArray:
        return self.empty(x.shape, x.dtype)

    def asarray(self, host: np.ndarray, device: None = None) -> ShapeArray:
        x = self.empty(host.shape, host.dtype)
        weakref.finalize(host, id, x.memory)  # as NumPy's asarray: alive as long as host is
        return x

    def separable_matrix(self, out_size: int, in_size: int) -> np.ndarray:
        return np.broadcast_to(np.zeros(()), (out_size, in_size))  # as large, without memory

    def astype(self, x: ShapeArray, dtype: Any, *, copy: bool = True) -> ShapeArray:
        return x if x.dtype == dtype and not copy else self.empty(x.shape, dtype)

    def elementwise(self, *operands: Any) -> ShapeArray:
        arrays = [x for x in operands if isinstance(x, ShapeArray)]
        dtype = np.result_type(*(x.dtype for x in arrays))
        return self.empty(_broadcast(*(x.shape for x in arrays)), dtype)

    exp = sqrt = erf = maximum = where = elementwise

    def sum(
        self, x: ShapeArray, axis: Any, dtype: Any = None, keepdims: bool = False
    ) -> ShapeArray:
        axes = {i % x.ndim for i in (axis if isinstance(axis, tuple) else (axis,))}
        shape = [1 if i in axes else n for i, n in enumerate(x.shape) if keepdims or i not in axes]
        return self.empty(tuple(shape), dtype or x.dtype)

    mean = max = sum

    def reshape(self, x: ShapeArray, shape: Shape, copy: bool | None = None) -> ShapeArray:
        if -1 in shape:
            others = -math.prod(shape)
            shape = tuple(x.size // others if n == -1 else n for n in shape)
        if math.prod(shape) != x.size:
            raise ValueError(f"{x.shape} cannot become {shape}")
        strides = None if copy else _strides_of_view(x.shape, x.strides, shape)
        if strides is None and copy is False:
            raise ValueError(f"{x.shape} cannot become {shape} without a copy")
        return self.empty(shape, x.dtype) if strides is None else x.view(shape, strides)

    def permute_dims(self, x: ShapeArray, axes: Shape) -> ShapeArray:
        return x.view([x.shape[i] for i in axes], [x.strides[i] for i in axes])

    def matrix_transpose(self, x: ShapeArray) -> ShapeArray:
        return self.permute_dims(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))

    def expand_dims(self, x: ShapeArray, *, axis: int) -> ShapeArray:
        i = axis % (x.ndim + 1)
        return x.view((*x.shape[:i], 1, *x.shape[i:]), (*x.strides[:i], 0, *x.strides[i:]))

    def broadcast_to(self, x: ShapeArray, shape: Shape) -> ShapeArray:
        new = len(shape) - x.ndim
        kept = [s if n > 1 else 0 for n, s in zip(x.shape, x.strides, strict=True)]
        return x.view(_broadcast(x.shape, shape), [0] * new + kept)

    def concat(self, arrays: Sequence[ShapeArray], axis: int) -> ShapeArray:
        shape = list(arrays[0].shape)
        shape[axis] = sum(x.shape[axis] for x in arrays)
        return self.empty(tuple(shape), arrays[0].dtype)


def _broadcast(*shapes: Shape) -> Shape:
    """NumPy's rule; its own function refuses shapes that no memory could hold."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    result = tuple(max(sizes) if 0 not in sizes else 0 for sizes in zip(*padded, strict=True))
    for shape in padded:
        if any(size not in (1, most) for size, most in zip(shape, result, strict=True)):
            raise ValueError(f"shapes {shapes} cannot be broadcast")
    return result


def _strides_of_view(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Strides with which the same memory has a new shape; None if only a copy can have it."""
    runs: list[tuple[int, int]] = []  # axes that lie one after the other in memory, joined
    for n, stride in zip(shape, strides, strict=True):
        if runs and runs[-1][1] == n * stride:
            runs[-1] = (runs[-1][0] * n, stride)
        elif n > 1:
            runs.append((n, stride))
    found: list[int] = []
    left, stride = 1, 1
    for n in reversed(new):
        if left == 1 and n > 1:
            left, stride = runs.pop()
        if left % n:
            return None  # a new axis over two runs
        found.append(stride)
        left, stride = left // n, stride * n
    return tuple(reversed(found))
