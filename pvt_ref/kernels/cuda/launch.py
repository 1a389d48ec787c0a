"""How kernels in CUDA C++ are launched: compiled at the first use, with few checks of arguments.

A kernel is in a .cu file beside the Python file that launches it. All are launched by the setting
``launch`` of their table. So a table with another ``launch`` runs them in another way: the tests
run them on NumPy arrays without a GPU.
"""

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pvt_ref.arrays import Array, address, array_module, dtype_name, explained
from pvt_ref.errors import ConfigError, DeviceError, RangeError, reason, shown
from pvt_ref.kernels.cuda.capture import Graphs
from pvt_ref.kernels.cuda.cublaslt import Finder
from pvt_ref.kernels.cuda.cublaslt import on_gpu as cublaslt_on_gpu
from pvt_ref.kernels.cuda.weights import Arranged
from pvt_ref.ops import Operation

HERE = Path(__file__).parent

#: The most numbers that an int of a kernel can count. Larger arrays use the readable layers.
MOST_NUMBERS = 2**31 - 1

#: What the factors of a product are rounded to, and what may compute the product.
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
HALVES = ("float16", "bfloat16")
PRODUCTS = ("own", "cublaslt", "cupy")

#: Threads of a block, unless there is a reason for another number.
THREADS = 256


class Function(NamedTuple):
    """A kernel: its file, its name there, and the macros with which the file is compiled."""

    file: str
    name: str
    macros: tuple[tuple[str, int | str], ...] = ()


class Order(NamedTuple):
    """The order in which the tokens of a map of width W are stored: in R x R blocks.

    With R = 1 that is raster order, and W is not used.
    """

    W: int = 1
    R: int = 1


class Launch(Protocol):
    """Starts a kernel. Arrays are passed as pointers, None as the null pointer.

    grid has the number of blocks along x, y and z, threads that of the threads in a block; missing
    numbers are 1. shared is the number of bytes of dynamic shared memory.
    """

    def __call__(
        self,
        function: Function,
        grid: Sequence[int],
        threads: Sequence[int],
        arguments: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """As the class says."""


@functools.cache
def source(file: str) -> str:
    """The text of a .cu file, with each ``#include "..."`` replaced by the text of the header."""

    def text(name: str) -> str:
        return f'#line 1 "{name}"\n' + (HERE / name).read_text(encoding="utf-8")

    parts = re.split(r'^#include "(\w+\.h)"\n', text(file), flags=re.MULTILINE)
    for i in range(1, len(parts), 2):
        lines = "".join(parts[:i:2]).count("\n") + (i - 1) // 2  # of the file, before this one
        parts[i] = f'{text(parts[i])}#line {lines + 1} "{file}"\n'
    return "".join(parts)


@functools.cache
def _loaded(cupy: Any, function: Function, device: int) -> Any:
    """The kernel on the current device, whose number is given."""
    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in function.macros))
    try:
        module = cupy.RawModule(code=source(function.file), options=options, backend="nvrtc")
        return module.get_function(function.name)
    except Exception as error:  # CuPy has many: no NVRTC, no memory, a GPU older than the code
        raise DeviceError(
            f"the kernel {function.name} could not be compiled for CUDA device {device} "
            f"({reason(error)}). It needs NVRTC, the compiler that comes with the CUDA toolkit or "
            f"with pip install 'cupy-cuda12x[ctk]' (or 13x), and a GPU that it knows. The "
            f"environment variable PVT_REF_OPS=reference computes without these kernels"
        ) from error


def on_gpu(
    function: Function,
    grid: Sequence[int],
    threads: Sequence[int],
    arguments: Sequence[Any],
    shared: int = 0,
) -> None:
    """Launches on the device of the first array, in CuPy's current stream."""
    first = next(x for x in arguments if hasattr(x, "device"))
    with first.device:
        kernel = _loaded(array_module(first), function, first.device.id)
        kernel(tuple(grid), tuple(threads), tuple(map(_as_cuda, arguments)), shared_mem=shared)


def _as_cuda(x: Any) -> Any:
    """An argument in the type that the kernels expect: CuPy would pass a Python int as 64 bits."""
    if x is None:
        return np.uint64(0)
    return np.int32(x) if type(x) is int else np.float32(x) if type(x) is float else x


@dataclass(frozen=True, slots=True)
class Cuda:
    """Settings of the kernels.

    Attributes:
        launch: starts a kernel.
        blocks: the most blocks of threads among which a sum is split. It affects how sums are
            rounded, so it does not depend on the GPU at hand: this many fill today's largest.
        products: what computes matrix products: ``"own"``, a kernel of this package;
            ``"cublaslt"``, NVIDIA's library; or ``"cupy"``, which leaves them to CuPy.
        precision: what the factors of products are rounded to: ``"float32"``, no rounding;
            ``"tf32"``, 10 bits of mantissa; ``"float16"``, also 10 bits, with 65504 the largest
            number; ``"bfloat16"``, 7 bits. All else is float32: sums, norms, softmax, losses.
        cublaslt: finds cuBLASLt for an array.
        capture: whether predict and a training replay what repeats as CUDA graphs. Results do not
            depend on it.
        graphs: the graphs captured so far.
        arranged: the weights of models in the layout that the kernels read.

    Raises:
        RangeError: if products or precision is none of these.
        ConfigError: if products cannot have that precision.
    """

    launch: Launch = field(default=on_gpu, repr=False)
    blocks: int = 264
    products: str = "own"
    precision: str = "float32"
    cublaslt: Finder = field(default=cublaslt_on_gpu, repr=False)
    capture: bool = field(default=True, repr=False, kw_only=True)
    graphs: Graphs = field(default_factory=Graphs, repr=False, compare=False, kw_only=True)
    arranged: Arranged = field(default_factory=Arranged, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        for name, known in (("products", PRODUCTS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known:
                raise RangeError(f"{name} is {shown(value)}; it must be one of {', '.join(known)}")
        able = {"own": ("float32", "tf32"), "cublaslt": PRECISIONS, "cupy": ("float32",)}
        if self.precision not in able[self.products]:
            raise ConfigError(
                f"products={self.products!r} cannot compute in {self.precision}. "
                f"products='cublaslt' can"
            )

    def scope(self) -> AbstractContextManager[None]:
        """Entered for the time of a public call: errors of CUDA then name their fix."""
        return explained()


def is_float32(*arrays: Array) -> bool:
    """Whether the kernels compute on these arrays: float32, and few enough numbers for an int."""
    return all(dtype_name(x) == "float32" and x.size <= MOST_NUMBERS for x in arrays)


def packed(x: Array) -> Array:
    """x itself if kernels can read it in contiguous pieces of four numbers; otherwise a copy.

    They can if x is contiguous and begins at a multiple of 16 bytes.
    """
    x = array_module(x).ascontiguousarray(x)
    return x if address(x) % 16 == 0 else x.copy()


def blocks_for(count: int, threads: int = THREADS) -> int:
    """The number of blocks that together have at least count threads."""
    return -(-count // threads)


@dataclass(frozen=True, slots=True)
class _WithSettings:
    """A function and its settings; compares by content, so that tables can be compared."""

    function: Callable[..., Any]
    cuda: Cuda

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs, cuda=self.cuda)


class Kernel(NamedTuple):
    """A twin whose functions take their settings by name.

    If backward is None, the readable operation's is used.
    """

    readable: Operation
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    absorbs: tuple[Operation, ...] = ()

    def with_settings(self, cuda: Cuda) -> Operation:
        """The twin for the table."""
        backward = _WithSettings(self.backward, cuda) if self.backward else self.readable.backward
        return Operation(_WithSettings(self.forward, cuda), backward, self.absorbs)
