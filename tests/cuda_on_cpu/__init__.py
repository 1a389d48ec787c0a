"""Runs CUDA C++ kernels on NumPy arrays, without CUDA: g++ compiles them with cuda_on_cpu.h.

    launch = Emulation(order=2)
    launch(Function("gelu.cu", "gelu"), (3,), (256,), (x, y, x.size // 4))

An emulation takes the place of pvt_ref.kernels.cuda.launch.on_gpu in a table of operations. Every
array is copied to pages of its own, between protected pages, and back. If a kernel does something
wrong, a KernelError names kernel, block and thread.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pvt_ref.kernels.cuda.cublaslt import CublasLt
from pvt_ref.kernels.cuda.launch import Function, source

HEADER = Path(__file__).parent / "cuda_on_cpu.h"

#: Compiled libraries are kept here, each under a name with a hash of its source.
CACHE = Path(tempfile.gettempdir()) / f"pvt_ref_cuda_on_cpu_{getattr(os, 'getuid', int)()}"

FLAGS = (
    *("-std=c++17", "-O1", "-shared", "-fPIC", "-fno-gnu-unique", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=off", "-U_FORTIFY_SOURCE", "-w", "-x", "c++"),
    # a fault that these find is an illegal instruction, which the header turns into a message
    "-fsanitize=bounds-strict,signed-integer-overflow,integer-divide-by-zero,shift",
    "-fsanitize-undefined-trap-on-error",
)

#: Bytes of a number and of the whole that a kernel reads at once: the alignment it needs.
TYPES = {
    "float": (np.dtype(np.float32), 4),
    "float4": (np.dtype(np.float32), 16),
    "double": (np.dtype(np.float64), 8),
    "half_bits": (np.dtype(np.uint16), 2),  # a float16 or bfloat16
    "int": (np.dtype(np.int32), 4),
    "size_t": (np.dtype(np.uint64), 8),  # addresses: arrays that are reached by them are unguarded
}

#: What the GPU of least size allows: threads of a block, and blocks along each axis.
MOST_THREADS, MOST_BLOCKS = 1024, (2**31 - 1, 65535, 65535)

#: Bytes on both sides of an array that must not be touched: more than the arrays of tests have, so
#: that an index by a wrong pitch does not reach what is somebody else's. They take no memory.
FORBIDDEN = 2**24

_one_at_a_time = threading.RLock()  # the header's state is the process's


class KernelError(AssertionError):
    """A kernel that does what CUDA forbids, or a launch that it would refuse."""


class Parameter(NamedTuple):
    """One parameter of a kernel: ``const float4 *x``, or without a star, ``int rows``."""

    type: str
    is_pointer: bool
    is_const: bool
    name: str


class Fault(ctypes.Structure):
    """What the header reports about a kernel that was stopped."""

    _fields_ = [
        ("what", ctypes.c_char * 200),
        ("address", ctypes.c_void_p),
        ("block", ctypes.c_uint * 3),
        ("thread", ctypes.c_uint * 3),
    ]


class Memory(ctypes.Structure):
    """What the header uses of memory, for all files; it fills this in."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("stacks", "shared", "owner")),
        ("poison", ctypes.c_int),
    ]


_memory = Memory()


def why_not() -> str | None:
    """The reason why kernels cannot be compiled here, or None if they can."""
    if sys.platform != "linux":
        return "no kernel was run: the emulation is made for Linux"
    return None if shutil.which("g++") else "no kernel was run: there is no g++"


# Compiling ----------------------------------------------------------------------------------------


def compiled_for(nvrtc: Any, function: Function, arch: str) -> str:
    """The log of NVRTC, which compiles a file for a kind of GPU; no GPU is needed.

    Raises: KernelError if it refuses.
    """
    options = ["-std=c++17", f"-arch={arch}", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in function.macros]
    program = nvrtc.createProgram(source(function.file), function.file, (), ())
    try:
        nvrtc.compileProgram(program, tuple(options))
    except nvrtc.NVRTCError as error:
        raise KernelError(nvrtc.getProgramLog(program)) from error
    return nvrtc.getProgramLog(program)


@functools.cache
def kernels_of(function: Function) -> dict[str, tuple[list[Parameter], str]]:
    """The parameters of each kernel of a file, and the source text of its launch bound, or ""."""
    found, text = {}, source(function.file)
    for name, value in function.macros:
        text = re.sub(rf"\b{name}\b", str(value), text)
    pattern = (
        r'extern "C" __global__ void\s+(?:__launch_bounds__\(([^)]*)\)\s*)?(\w+)\(([^)]*)\)\s*\{'
    )
    for bound, name, parameters in re.findall(pattern, text):
        found[name] = [_parameter(each, name) for each in parameters.split(",")], bound
    return found


def _parameter(text: str, kernel: str) -> Parameter:
    match = re.fullmatch(r"\s*(const )?(\w+) (\*?)(\w+)\s*", text)
    if not match or match[2] not in TYPES:
        raise KernelError(f"{kernel}: {text.strip()!r} is no parameter that the emulation knows")
    return Parameter(match[2], bool(match[3]), bool(match[1]), match[4])


def as_cpp(function: Function) -> str:
    """The source for g++: with the macros, and for each kernel a function that calls it."""
    text = source(function.file)
    dynamic = r"extern __shared__ (\w+) (\w+)\[\];"
    body = re.sub(dynamic, r"\1 *\2 = (\1 *)cuda_on_cpu::dynamic;", text)
    # after the header's own includes, since a macro could change those
    defines = "".join(f"#define {name} {value}\n" for name, value in function.macros)
    calls = ""
    for name, (parameters, _) in kernels_of(function).items():
        types = [f"{p.type} {'*' * (1 + p.is_pointer)}" for p in parameters]
        values = [f"*({type})v[{i}]" for i, type in enumerate(types)]
        calls += (
            f"static void call_{name}(void **v) {{ {name}({', '.join(values)}); }}\n"
            f'extern "C" int launch_{name}(void **v, const unsigned *grid, const unsigned *block, '
            f"unsigned order, unsigned shared, cuda_on_cpu::Fault *fault, "
            f"cuda_on_cpu::Memory *memory)\n"
            f"{{ return cuda_on_cpu::run(call_{name}, v, grid, block, order, shared, fault, "
            f"memory); }}\n"
        )
    return f'#include "cuda_on_cpu.h"\n{defines}{body}\n{calls}'


@functools.cache
def compiled(function: Function) -> ctypes.CDLL:
    """The library for a function's file and macros, compiled at the first use."""
    code = as_cpp(function)
    return _library(Path(function.file).stem, code, FLAGS, HEADER.read_text("utf-8"))


def _library(name: str, code: str, flags: tuple[str, ...], more: str = "") -> ctypes.CDLL:
    """The library that g++ compiles from code; more is all else that it depends on."""
    key = hashlib.sha256(repr((code, more, flags)).encode()).hexdigest()[:16]
    library = CACHE / f"{name}-{key}.so"
    if not library.exists():
        CACHE.mkdir(mode=0o700, exist_ok=True)
        assert CACHE.stat().st_uid == os.getuid(), f"{CACHE} is somebody else's"
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / "made.so"
            command = ["g++", *flags, f"-I{HEADER.parent}", "-o", str(made), "-"]
            done = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
            if done.returncode:
                raise KernelError(f"{name} does not compile:\n{done.stderr}")
            made.replace(library)  # atomic: another process may compile the same
    return ctypes.CDLL(str(library))


class StandIn:
    """A stand-in for cuBLASLt (cublaslt.cpp), in place of kernels/cuda/cublaslt.py's finder.

        table_with(Cuda(Emulation(), products="cublaslt", cublaslt=StandIn()), is_numpy)

    Attributes:
        functions: the library, with some functions for tests.
        loaded: what the kernels' table gets; None until the first use.
    """

    def __init__(self) -> None:
        code = (HEADER.parent / "cublaslt.cpp").read_text("utf-8")
        flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-x", "c++")
        self.functions = _library("cublaslt", code, flags)
        self.functions.stand_in_complaint.restype = ctypes.c_char_p
        self.functions.stand_in_version.argtypes = (ctypes.c_size_t,)
        self.loaded: CublasLt | None = None

    def __call__(self, x: Any) -> CublasLt:
        if self.loaded is None:
            self.loaded = CublasLt(self.functions)
        return self.loaded

    @property
    def complaint(self) -> str:
        """Why the last refused call was refused."""
        return self.functions.stand_in_complaint().decode()


# Memory -------------------------------------------------------------------------------------------


@functools.cache
def _mprotect() -> Any:
    return ctypes.CDLL(None, use_errno=True).mprotect


class Pages:
    """Memory for the bytes from start to stop, which ends where protected pages begin.

    Before the bytes are NaN, and before those, protected pages. The first byte is aligned as start
    is, so between the last byte and the protected pages are fewer bytes than alignment.
    """

    def __init__(self, start: int, stop: int, alignment: int):
        page, self.size = mmap.PAGESIZE, stop - start
        inside = max(-(-(self.size + alignment) // page), 1) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, inside + 2 * FORBIDDEN, flags=flags)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.first, self.end = base + FORBIDDEN, base + FORBIDDEN + inside
        self.start = self.end - self.size
        self.start -= (self.start - start) % alignment
        ctypes.memset(self.first, 0xFF, inside)
        for forbidden in (base, self.end):
            if _mprotect()(ctypes.c_void_p(forbidden), ctypes.c_size_t(FORBIDDEN), 0):
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def outside(self) -> bytes:
        """The bytes of the pages that do not belong to the array."""
        before = ctypes.string_at(self.first, self.start - self.first)
        return before + ctypes.string_at(self.start + self.size, self.end - self.start - self.size)


def span(x: np.ndarray) -> tuple[int, int]:
    """The first byte of an array and the one behind its last; strides are not negative."""
    start = x.__array_interface__["data"][0]
    reach = sum((n - 1) * step for n, step in zip(x.shape, x.strides, strict=True))
    return start, start + (reach + x.itemsize if x.size else 0)


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in disjoint spans: views of one array share memory."""
    result: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if result and start < result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], stop))
        else:
            result.append((start, stop))
    return result


# Launching ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Emulation:
    """Launches kernels on NumPy arrays, as pvt_ref.kernels.cuda.launch.on_gpu does on CuPy's.

    Attributes:
        order: of threads and blocks: 0 is ascending, 1 descending; others are seeds of a shuffle.
        poison: the byte that shared memory is filled with at first; 0xFF gives NaN.
    """

    order: int = 0
    poison: int = 0xFF

    def __call__(
        self,
        function: Function,
        grid: Sequence[int],
        threads: Sequence[int],
        arguments: Sequence[Any],
        shared: int = 0,
    ) -> None:
        known = kernels_of(function)
        if function.name not in known:
            raise KernelError(f"{function.file} has no kernel {function.name}")
        parameters, bound = known[function.name]
        grid, threads = (tuple(each) + (1,) * (3 - len(each)) for each in (grid, threads))
        _check_launch(function, grid, threads, bound)
        if len(arguments) != len(parameters):
            many = f"{len(arguments)} arguments for {len(parameters)} parameters"
            raise KernelError(f"{function.name}: {many}")
        with _one_at_a_time:
            _memory.poison = self.poison
            _run(function, parameters, grid, threads, arguments, shared, self.order)


def _check_launch(function: Function, grid: tuple, threads: tuple, bound: str) -> None:
    """Refuses what cuLaunchKernel would."""
    count = int(np.prod(threads))
    defined = re.findall(r"^#define (\w+) (\d+)", source(function.file), flags=re.MULTILINE)
    most = int(dict(defined).get(bound, bound or MOST_THREADS))
    if not 1 <= count <= min(most, MOST_THREADS):
        raise KernelError(f"{function.name}: {count} threads in a block of at most {most}")
    if not all(1 <= n <= limit for n, limit in zip(grid, MOST_BLOCKS, strict=True)):
        raise KernelError(f"{function.name}: a grid of {grid} blocks; {MOST_BLOCKS} are the most")


def _check(function: Function, parameter: Parameter, value: Any) -> None:
    """Refuses an argument whose type is not its parameter's."""
    if parameter.is_pointer:
        dtype, alignment = TYPES[parameter.type]
        fits = value is None or (isinstance(value, np.ndarray) and value.dtype == dtype)
        if fits and value is not None and span(value)[0] % alignment:
            raise KernelError(f"{function.name}: {parameter.name} is not aligned to {alignment}")
    elif parameter.type == "int":
        fits = type(value) is int and -(2**31) <= value < 2**31
    else:
        fits = isinstance(value, float)
    if not fits:
        wanted = f"{parameter.type}{' *' if parameter.is_pointer else ''}"
        given = f"of {value.dtype}" if isinstance(value, np.ndarray) else repr(value)
        raise KernelError(f"{function.name}: {parameter.name} is {given}, not {wanted}")


def _run(
    function: Function,
    parameters: list[Parameter],
    grid: tuple,
    threads: tuple,
    arguments: Sequence[Any],
    shared: int,
    order: int,
) -> None:
    launch = getattr(compiled(function), f"launch_{function.name}")
    for parameter, value in zip(parameters, arguments, strict=True):
        _check(function, parameter, value)
    pairs = zip(arguments, parameters, strict=True)
    arrays = [(span(x), p) for x, p in pairs if p.is_pointer and x is not None]
    spans = merged([each for each, _ in arrays])
    pages = []
    for start, stop in spans:
        inside = [TYPES[p.type][1] for (first, _), p in arrays if start <= first <= stop]
        # unaligned arrays stay unaligned: kernels may read more at once than their types say
        pages.append(Pages(start, stop, 16 if start % 16 else max(inside)))
    for (start, stop), page in zip(spans, pages, strict=True):
        ctypes.memmove(page.start, start, stop - start)
    before = [page.outside() for page in pages]
    values = [_value(p, x, spans, pages) for p, x in zip(parameters, arguments, strict=True)]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    fault = Fault()
    sizes = [(ctypes.c_uint * 3)(*each) for each in (grid, threads)]
    failed = launch(pointers, *sizes, order, shared, ctypes.byref(fault), ctypes.byref(_memory))
    if failed:
        what, block, thread = fault.what.decode(), tuple(fault.block), tuple(fault.thread)
        if what.startswith("touches"):
            what += _owner(fault.address or 0, parameters, values, pages)
        told = f"thread {thread} of block {block} {what}"
        raise KernelError(f"{function.name} in {function.file}: {told}")
    for page, bytes_before in zip(pages, before, strict=True):
        if page.outside() != bytes_before:
            where = _owner(page.start, parameters, values, pages)
            raise KernelError(f"{function.name}: something was written beside an array{where}")
    for (start, stop), page in zip(spans, pages, strict=True):
        ctypes.memmove(start, page.start, stop - start)


def _value(parameter: Parameter, value: Any, spans: list, pages: list[Pages]) -> Any:
    """An argument as a ctypes value; for an array, the address of its copy."""
    if not parameter.is_pointer:
        return (ctypes.c_int if parameter.type == "int" else ctypes.c_float)(value)
    if value is None:
        return ctypes.c_void_p(None)
    address = span(value)[0]
    for (start, stop), page in zip(spans, pages, strict=True):
        if start <= address < stop or address == start:
            return ctypes.c_void_p(page.start + address - start)
    raise AssertionError("every array has its pages")


def _owner(address: int, parameters: list, values: list, pages: list[Pages]) -> str:
    """The parameter whose pages contain an address or are next to it, for a message."""
    for page in pages:
        if page.first - FORBIDDEN <= address < page.end + FORBIDDEN:
            of = [
                p.name
                for p, v in zip(parameters, values, strict=True)
                if p.is_pointer and page.first <= (v.value or 0) < page.end
            ]
            beyond = address - (page.start + page.size)
            place = f"{beyond} bytes behind the end" if beyond >= 0 else "before the end"
            return f", {place} of {' or '.join(of)}"
    return f", at address {address:#x}"
