"""Arrays with a shape and a name: operations on them are recorded as nodes of ONNX.

A network that runs on them computes nothing and leaves a graph behind. The batch is -1, and a size
that depends on it comes out negative: B n tokens are -n rows. ONNX's Reshape calls all of them -1.
Height and width are plain numbers, or a :class:`Dim` each if the graph is to take any.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pvt_ref.arrays import Array

Shape = tuple[int, ...]

#: The size of the batch axis.
BATCH = -1


class Node(NamedTuple):
    """One node: what it computes, from which values by name, and the name of the result."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


class View(NamedTuple):
    """The source of a reshaped symbol, and the axes of Transpose or the shape of Reshape."""

    base: "Symbol"
    op: str
    how: Shape


class Dim(int):
    """A size that is unknown until the graph runs; as a number, its placeholder."""

    source: "Symbol"  # one int64

    def __new__(cls, number: int, source: "Symbol") -> "Dim":
        """A number, and the value that is read when the graph runs."""
        self = super().__new__(cls, number)
        self.source = source
        return self

    def __mul__(self, other: int) -> "Dim":
        return self._made("Mul", int(self) * int(other), other)

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> "Dim":
        return self._made("Div", int(self) // int(other), other)

    def _made(self, op: str, number: int, other: int) -> "Dim":
        operand = other.source if isinstance(other, Dim) else np.array([other], np.int64)
        return Dim(number, self.source.graph.node(op, [self.source, operand], (1,)))


class Symbol:
    """An array of the array API standard, as far as networks use it, that stands for a value."""

    __array_ufunc__ = None  # NumPy leaves arithmetic to this class
    __slots__ = ("dtype", "graph", "name", "shape", "view")
    device = None

    def __init__(self, graph: "Graph", name: str, shape: Sequence[int], dtype: Any) -> None:
        self.graph, self.name, self.shape = graph, name, tuple(shape)
        self.dtype = np.dtype(dtype)
        self.view: View | None = None

    def __array_namespace__(self, api_version: str | None = None) -> "Graph":
        return self.graph

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, key: Any) -> "Symbol":
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            i = keys.index(Ellipsis)
            keys[i : i + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        cut = {i: k for i, k in enumerate(keys) if isinstance(k, slice) and k != slice(None)}
        x, shape = self, list(self.shape)
        if any(shape[i] < 0 or isinstance(shape[i], Dim) for i in cut):
            raise ValueError("an axis of any size cannot be cut")
        if cut:
            ranges = [range(shape[i])[k] for i, k in cut.items()]
            for i, kept in zip(cut, ranges, strict=True):
                shape[i] = len(kept)
            bounds = [[r.start for r in ranges], [r.stop for r in ranges], list(cut)]
            steps = [[r.step for r in ranges]] if any(r.step != 1 for r in ranges) else []
            limits = [np.array(numbers, np.int64) for numbers in (*bounds, *steps)]
            x = self.graph.node("Slice", [x, *limits], shape)
        for i in reversed(range(len(keys))):
            if not isinstance(keys[i], slice):
                del shape[i]
                x = self.graph.node("Gather", [x, np.array(keys[i], np.int64)], shape, axis=i)
        return x

    def __setitem__(self, key: Any, value: "Symbol") -> None:
        if key is not Ellipsis or value.shape != self.shape:
            raise NotImplementedError("a part of an array cannot be assigned to in an export")
        self.name, self.view = value.name, value.view

    def __add__(self, other: Any) -> "Symbol":
        return self.graph.elementwise("Add", self, other)

    def __mul__(self, other: Any) -> "Symbol":
        return self.graph.elementwise("Mul", self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __sub__(self, other: Any) -> "Symbol":
        return self.graph.elementwise("Sub", self, other)

    def __truediv__(self, other: Any) -> "Symbol":
        return self.graph.elementwise("Div", self, other)

    def __matmul__(self, other: Array) -> "Symbol":
        return self.graph.product(self, other)

    def __rmatmul__(self, other: Array) -> "Symbol":
        return self.graph.product(other, self)


class Graph:
    """The nodes, in order, and the functions on symbols, as ``numpy`` has them.

    Args:
        keys: names of weights, by the identity of the arrays, which live as long as the graph.
    """

    __name__ = "symbols"

    def __init__(self, keys: Mapping[int, str]) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self.given = Symbol(self, "", (), np.float32)
        self.paths: list[str] = []  # of the operations in progress, the innermost last
        self._keys = dict(keys)
        self._used = Counter[str]()
        self._same: dict[Any, str] = {}  # nodes and constants that are there already

    def input(self, name: str, shape: Shape, dtype: Any, free: Sequence[int] = ()) -> Symbol:
        """The one value that is given; free are the axes of any size, the batch aside."""
        self.given = x = Symbol(self, name, shape, dtype)
        x.shape = tuple(self.dim(x, i) if i in free else n for i, n in enumerate(shape))
        return x

    def dim(self, x: Symbol, axis: int) -> Dim:
        """The size of an axis, read off when the graph runs."""
        source = self.node("Shape", [x], (1,), start=axis, end=axis + 1)
        return Dim(x.shape[axis], source)

    def called(self, x: np.ndarray, like: np.ndarray) -> np.ndarray:
        """x, which was made of a weight and takes its name: key/2 if another of its arrays has it.

        A classifier and its pyramid read a table with and without the row of the cls token.
        """
        key = self._keys.get(id(like))
        if key is None:
            return x
        number = 1
        while not np.array_equal(self.constants.setdefault(key, x), x):
            number += 1
            key = f"{self._keys[id(like)]}/{number}"
        x = self.constants[key]  # kept alive there, and so its identity
        self._keys[id(x)] = key
        return x

    def node(
        self, op: str, inputs: Sequence[Any], shape: Sequence[int], **attributes: Any
    ) -> Symbol:
        """Notes a node, unless the same was noted; arrays among its inputs are constants."""
        names = tuple(x.name if isinstance(x, Symbol) else self._constant(x) for x in inputs)
        same = (op, names, repr(attributes))
        if same not in self._same:
            output = self._new_name(f"{self.paths[-1]}/{op}" if self.paths else op)
            self.nodes.append(Node(op, names, output, attributes))
            self._same[same] = output
        return Symbol(self, self._same[same], shape, np.float32)

    def _new_name(self, name: str) -> str:
        self._used[name] += 1
        return name if self._used[name] == 1 else f"{name}_{self._used[name]}"

    def _constant(self, x: np.ndarray) -> str:
        """The name of an array: the key of a weight; others of equal content share one."""
        key = self._keys.get(id(x))
        if key is None:
            same = (x.dtype.str, x.shape, x.tobytes())
            key = self._same.get(same)
            if key is None:
                key = self._same[same] = self._new_name("constant")
                self.constants[key] = x
        elif self.constants.setdefault(key, x) is not x:
            raise ValueError(f"two arrays want to be called {key}")
        return key

    def elementwise(self, op: str, *operands: Any) -> Symbol:
        """One of ONNX's elementwise operators; with numbers, they become float32."""
        x: list[Any] = [y if np.ndim(y) else np.asarray(y, np.float32) for y in operands]
        views = [y.view for y in x if isinstance(y, Symbol)]
        first = views[0]
        alike = first is not None and all(
            v is not None and v[1:] == first[1:] and v.base.shape == first.base.shape for v in views
        )
        if first is not None and alike and all(isinstance(y, Symbol) or y.ndim == 0 for y in x):
            # before the view instead of behind it, where nothing stands between two products
            inner = [y.view.base if isinstance(y, Symbol) and y.view else y for y in x]
            return self._viewed(self.elementwise(op, *inner), first.op, first.how)
        return self.node(op, x, _broadcast(*(y.shape for y in x)))

    def product(self, x: Any, y: Any) -> Symbol:
        """x @ y."""
        if x.shape[-1] != y.shape[-2]:
            raise ValueError(f"no matrix product of {x.shape} and {y.shape}")
        before = _broadcast(x.shape[:-2], y.shape[:-2])
        return self.node("MatMul", [x, y], (*before, x.shape[-2], y.shape[-1]))

    def _viewed(self, x: Symbol, op: str, how: Shape) -> Symbol:
        """x transposed or reshaped; of two alike in turn, only the second is noted."""
        base = x.view.base if x.view and x.view.op == op else x
        if op == "Transpose":
            if x.view and base is not x:
                how = tuple(x.view.how[i] for i in how)
            shape = tuple(base.shape[i] for i in how)
            if how == tuple(range(base.ndim)):
                return base
            y = self.node(op, [base], shape, perm=list(how))
        else:
            if how in (x.shape, base.shape):
                return x if how == x.shape else base
            y = self.node(op, [base, self._sizes([max(n, -1) for n in how])], how)
        y.view = View(base, op, how)
        return y

    def _sizes(self, shape: Sequence[int]) -> Any:
        """A shape as int64: a constant if all of it is known."""
        if not any(isinstance(n, Dim) for n in shape):
            return np.array(shape, np.int64)
        parts = [n.source if isinstance(n, Dim) else np.array([n], np.int64) for n in shape]
        return self.node("Concat", parts, (len(shape),), axis=0)

    def reshape(self, x: Any, shape: Sequence[int], copy: bool | None = None) -> Any:
        """As NumPy's; an axis of -1 is the batch if that fits, and else what is left."""
        if isinstance(x, np.ndarray):
            return x.reshape(shape)
        size, target = _count(x.shape), list(shape)
        if _count(target) != size and -1 in target:
            i = target.index(-1)
            target[i] = size // _count(target[:i] + target[i + 1 :])
        if _count(target) != size or sum(n < 0 for n in target) != 1:
            raise ValueError(f"{x.shape} cannot become {tuple(shape)}")
        return self._viewed(x, "Reshape", tuple(target))

    def permute_dims(self, x: Symbol, axes: Shape) -> Symbol:
        """The axes in another order."""
        return self._viewed(x, "Transpose", tuple(axes))

    def matrix_transpose(self, x: Symbol) -> Symbol:
        """The last two axes."""
        return self.permute_dims(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))

    def concat(self, arrays: Sequence[Any], axis: int) -> Symbol:
        """Symbols and constants."""
        shape = list(arrays[0].shape)
        shape[axis] = sum(x.shape[axis] for x in arrays)
        return self.node("Concat", arrays, shape, axis=axis % len(shape))

    def broadcast_to(self, x: Array, shape: Shape) -> Symbol:
        """The same for every image of a batch, whose number is known when the graph runs."""
        if shape[0] != BATCH:
            raise ValueError(f"{x.shape} cannot become {shape}")
        sizes = self._sizes([self.dim(self.given, 0), *shape[1:]])
        return self.node("Expand", [x, sizes], _broadcast(x.shape, shape))

    def mean(self, x: Symbol, axis: int) -> Symbol:
        """Over one axis."""
        shape = [n for i, n in enumerate(x.shape) if i != axis % x.ndim]
        return self.node("ReduceMean", [x, np.array([axis], np.int64)], shape, keepdims=0)

    def astype(self, x: Any, dtype: Any, *, copy: bool = True) -> Any:
        """Of a symbol, to float32."""
        if isinstance(x, np.ndarray) or x.dtype == dtype:
            return x if x.dtype == dtype else x.astype(dtype)
        return self.node("Cast", [x], x.shape, to=np.dtype(np.float32))

    def asarray(self, host: np.ndarray, device: None = None) -> np.ndarray:
        """A constant stays an array until a node takes it."""
        return host

    def empty(self, shape: Shape, dtype: Any = np.float32, device: None = None) -> Symbol:
        """Something to be assigned to as a whole."""
        return Symbol(self, "", shape, dtype)


def _count(shape: Iterable[int]) -> int:
    """How many numbers, of a batch of -1."""
    return math.prod(map(int, shape))


def _broadcast(*shapes: Shape) -> Shape:
    """NumPy's rule, with the batch as a size of its own."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    result: list[int] = []
    for sizes in zip(*padded, strict=True):
        large = set(sizes) - {1}
        if len(large) > 1:
            raise ValueError(f"shapes {shapes} cannot be broadcast")
        result.append(large.pop() if large else 1)
    return tuple(result)
