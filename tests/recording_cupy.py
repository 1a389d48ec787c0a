"""A stand-in for CuPy on a machine without CUDA: NumPy's numbers, CUDA's rules for graphs.

    cupy = RecordingCuPy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)

It has what the package uses of CuPy, and is strict where a graph is: while a stream captures,
nothing is computed. Each operation on arrays is kept with the memory that it reads and writes, and
a replay does them again on the same memory. Memory comes from pools that hand out again what was
given back; what is given back, and what is new, holds NaN. Refused while a stream captures, as
CuPy does: copies from and to the host, cuBLAS, and waiting. What NumPy cannot show is time:
operations end before the next begins, so a missing wait is seen only in the history.
"""

import contextlib
import operator
import threading
import types
from typing import Any

import numpy as np

#: Functions of NumPy that CuPy leaves to cuBLAS.
PRODUCTS = ("matmul", "dot", "tensordot", "vecdot", "einsum", "inner")

#: Functions that look at dtypes and shapes only.
OF_DTYPES = ("isdtype", "iinfo", "finfo", "result_type", "dtype", "can_cast", "broadcast_shapes")


class CUDARuntimeError(RuntimeError):
    """As cupy_backends has it."""


CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory has it."""


OutOfMemoryError.__module__ = "cupy.cuda.memory"


class _Now(threading.local):
    """What this thread has set: the device, a stream for each, an allocator, and its capture."""

    def __init__(self):
        self.device, self.devices = 0, []
        self.streams = {}
        self.allocator = None
        self.capturing: Any = None  # the operations so far


now = _Now()


class Block:
    """Bytes of a pool, which get them back when no array lies there any more."""

    def __init__(self, pool, size):
        self.pool, self.size = pool, size
        free = pool.free.get(size)
        self.bytes = free.pop() if free else np.empty(size, np.uint8)
        self.bytes.fill(0xFF)

    def __del__(self):
        if not replays:  # else a garbage collection would seem to be a kernel that writes
            self.bytes.fill(0xFF)
        self.pool.free.setdefault(self.size, []).append(self.bytes)


class MemoryPool:
    """Hands out again what came back, the last first."""

    def __init__(self):
        self.free = {}

    def malloc(self, size):
        if size > most_bytes[0]:
            raise OutOfMemoryError(f"Out of memory allocating {size} bytes")
        return Block(self, size)


most_bytes = [2**31]
replays = []  # those in progress, of all threads
default_pool = MemoryPool()


@contextlib.contextmanager
def using_allocator(allocator):
    before, now.allocator = now.allocator, allocator
    try:
        yield
    finally:
        now.allocator = before


class Device:
    """A device by number; several exist, and share the host's memory."""

    def __init__(self, number=0):
        self.id = number

    def __enter__(self):
        now.devices.append(now.device)
        now.device = self.id
        return self

    def __exit__(self, *_):
        now.device = now.devices.pop()

    def __eq__(self, other):
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self):
        return self.id

    def __repr__(self):
        return f"<CUDA Device {self.id}>"


class Event:
    def __init__(self, block=False, disable_timing=False):
        self.recorded = None

    def record(self, stream=None):
        _refuse_while_capturing("cudaEventRecord of another stream")
        self.recorded = stream or get_current_stream()
        history.append(("record", self.recorded.ptr, id(self)))

    def synchronize(self):
        _refuse_while_capturing("cudaEventSynchronize")


class Stream:
    numbers = iter(range(1000, 10**9))

    def __init__(self, null=False, non_blocking=False, ptr=None):
        self.non_blocking, self.device_id = non_blocking, now.device
        self.ptr = 0 if null else next(self.numbers) if ptr is None else ptr

    def __enter__(self):
        assert self.ptr == 0 or self.device_id == now.device, "a stream of another device"
        self._outer = now.streams.get(now.device)
        now.streams[now.device] = self
        return self

    def __exit__(self, *_):
        now.streams[self.device_id] = self._outer

    def wait_event(self, event):
        history.append(("wait", self.ptr, id(event)))

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        _refuse_while_capturing("cudaErrorStreamCaptureUnsupported: cudaStreamSynchronize")
        history.append(("synchronize", self.ptr))

    def begin_capture(self):
        assert self.non_blocking, "a blocking stream would disturb the others"
        assert now.capturing is None
        now.capturing = []
        history.append(("begin", self.ptr))

    def end_capture(self):
        operations, now.capturing = now.capturing, None
        if operations is None or operations[-1:] == ["invalid"]:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated")
        return Graph(operations)

    def is_capturing(self):
        return now.capturing is not None


def external_stream(ptr):
    return Stream(ptr=ptr)


null = Stream(null=True)


def get_current_stream():
    return now.streams.get(now.device) or null


class Graph:
    """Operations on the memory that they were recorded with."""

    def __init__(self, operations):
        self.operations = operations

    def launch(self, stream=None):
        _refuse_while_capturing("cudaGraphLaunch")
        history.append(("launch", (stream or get_current_stream()).ptr, now.device))
        replays.append(self)
        try:
            with np.errstate(all="ignore"):
                for operation in self.operations:
                    operation()
        finally:
            replays.remove(self)


history = []


def _refuse_while_capturing(what):
    if now.capturing is not None:
        now.capturing.append("invalid")
        raise CUDARuntimeError(f"{what} while the stream is capturing")


def do(operation):
    """Does an operation that writes, or keeps it for the replay."""
    if now.capturing is None:
        operation()
    else:
        now.capturing.append(operation)


class ndarray:  # noqa: N801 (CuPy's name)
    """An array in the memory of a pool."""

    __slots__ = ("__weakref__", "block", "device", "x")

    def __init__(self, x, block, device):
        self.x, self.block, self.device = x, block, device

    shape = property(lambda self: self.x.shape)
    dtype = property(lambda self: self.x.dtype)
    ndim = property(lambda self: self.x.ndim)
    size = property(lambda self: self.x.size)
    nbytes = property(lambda self: self.x.nbytes)
    strides = property(lambda self: self.x.strides)
    flags = property(lambda self: self.x.flags)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.x.ctypes.data)

    def __array_namespace__(self, api_version=None):
        raise AssertionError("CuPy's arrays are known by their class")

    def __dlpack_device__(self):
        return (2, self.device.id)

    def get(self):
        _refuse_while_capturing("cudaMemcpy to the host")
        return self.x.copy()

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc, method, *args, **kwargs):
        assert method == "__call__"
        return call(ufunc, *args, **kwargs)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        function = getattr(np.ndarray, name)
        if not callable(function):
            return call(lambda x: getattr(x, name), self)
        return lambda *args, **kwargs: call(function, self, *args, **kwargs)

    def copy(self):
        return call(np.copy, self)

    def fill(self, value):
        x = self.x
        do(lambda: x.fill(value))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, key):
        return call(operator.getitem, self, key)

    def __setitem__(self, key, value):
        assert not isinstance(value, np.ndarray), "CuPy takes no array of the host here"
        x, key, value = self.x, unwrapped(key), unwrapped(value)
        do(lambda: operator.setitem(x, key, value))

    def _to_host(self, kind):
        _refuse_while_capturing(f"{kind}(): a copy to the host")
        return kind(self.x.item())

    def __float__(self):
        return self._to_host(float)

    def __int__(self):
        return self._to_host(int)

    def __bool__(self):
        return self._to_host(bool)

    def item(self):
        return self._to_host(lambda x: x)

    __hash__: Any = None


def _operator(name):
    function = getattr(operator, name)
    return lambda self, *others: call(function, self, *others)


def _reflected(name):
    function = getattr(operator, name)
    return lambda self, other: call(function, other, self)


def _in_place(name):
    function = getattr(operator, name)

    def change(self, other):
        assert not isinstance(other, np.ndarray), "CuPy takes no array of the host here"
        x, other = self.x, unwrapped(other)
        if name == "imatmul":
            _refuse_products()
        do(lambda: function(x, other))
        return self

    return change


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "matmul"):
    _bare = _name.strip("_")
    setattr(ndarray, f"__{_bare}__", _operator(_name))
    setattr(ndarray, f"__r{_bare}__", _reflected(_name))
    setattr(ndarray, f"__i{_bare}__", _in_place(f"i{_bare}"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "invert", "abs"):
    setattr(ndarray, f"__{_name}__", _operator(_name))


def unwrapped(value: Any) -> Any:
    """The same with NumPy's views of the memory in the place of arrays."""
    if isinstance(value, ndarray):
        return value.x
    if isinstance(value, tuple | list):
        return type(value)(map(unwrapped, value))
    if isinstance(value, slice):
        return slice(*map(unwrapped, (value.start, value.stop, value.step)))
    return value


def arrays_in(value):
    if isinstance(value, ndarray):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from arrays_in(each)


def _refuse_products():
    if now.capturing is not None and not cupy_now[-1].products_captured:
        raise NotImplementedError("calling cuBLAS API during stream capture is unsupported")


def new(shape, dtype):
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    block = (now.allocator or default_pool.malloc)(max(-(-size // 512), 1) * 512)
    x = block.bytes[:size].view(dtype).reshape(shape)
    return ndarray(x, block, Device(now.device))


def call(function, *args, **kwargs):
    """function of NumPy on the arrays' memory: a view of it, or its result in new memory."""
    given = list(arrays_in([*args, *kwargs.values()]))
    for value in (*args, *kwargs.values()):
        assert not isinstance(value, np.ndarray) or not value.ndim, "an array of the host"
    for x in given:
        assert x.device.id == now.device, f"array of {x.device}, current is device {now.device}"
    if getattr(function, "__name__", "") in PRODUCTS:
        _refuse_products()
    args, kwargs = unwrapped(args), {key: unwrapped(value) for key, value in kwargs.items()}
    with np.errstate(all="ignore" if now.capturing is not None else None):
        result = function(*args, **kwargs)

    def wrap(result, pick):
        if isinstance(result, tuple | list):
            parts = [wrap(r, lambda *a, i=i: pick(*a)[i]) for i, r in enumerate(result)]
            return type(result)(parts)
        if not isinstance(result, np.ndarray | np.generic):
            return result
        if isinstance(result, np.ndarray):
            for x in given:
                if np.may_share_memory(result, x.x) and (result is x.x or result.base is not None):
                    return ndarray(result, x.block, x.device)
        made = new(result.shape, result.dtype)
        target = made.x
        if now.capturing is None:
            target[...] = result
        else:
            do(lambda: target.__setitem__(..., pick(function(*args, **kwargs))))
        return made

    return wrap(result, lambda result: result)


def asarray(x, dtype=None):
    if isinstance(x, ndarray):
        return x if dtype in (None, x.dtype) else call(np.astype, x, dtype)
    _refuse_while_capturing("cudaMemcpy from the host")
    host = np.asarray(x, dtype)
    made = new(host.shape, host.dtype)
    made.x[...] = host
    return made


def from_dlpack(x):
    return asarray(np.from_dlpack(x))


cupy_now = []


class RecordingCuPy(types.ModuleType):
    """The module. products_captured: whether a graph may hold matrix products, as cuBLASLt's."""

    def __init__(self, products_captured=True, devices=2):
        super().__init__("cupy")
        self.__version__ = "of the tests"
        self.products_captured = products_captured
        self.ndarray, self.asarray, self.array = ndarray, asarray, asarray
        self.from_dlpack = from_dlpack
        self.history = history
        self.cuda = types.SimpleNamespace(
            MemoryPool=MemoryPool, using_allocator=using_allocator, Stream=Stream, Event=Event,
            Device=Device, ExternalStream=external_stream, get_current_stream=get_current_stream,
            runtime=types.SimpleNamespace(
                getDeviceCount=lambda: devices, getDevice=lambda: now.device
            ),
        )  # fmt: skip
        history.clear()
        cupy_now.append(self)

    @staticmethod
    def empty(shape, dtype=float):
        return new((shape,) if isinstance(shape, int) else tuple(shape), dtype)

    @classmethod
    def full(cls, shape, value, dtype=float):
        x = cls.empty(shape, dtype)
        x.fill(value)
        return x

    @classmethod
    def zeros(cls, shape, dtype=float):
        return cls.full(shape, 0, dtype)

    @classmethod
    def ones(cls, shape, dtype=float):
        return cls.full(shape, 1, dtype)

    @classmethod
    def empty_like(cls, x, dtype=None):
        return cls.empty(x.shape, dtype or x.dtype)

    @classmethod
    def zeros_like(cls, x, dtype=None):
        return cls.zeros(x.shape, dtype or x.dtype)

    @classmethod
    def ones_like(cls, x, dtype=None):
        return cls.ones(x.shape, dtype or x.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(np, name)
        if isinstance(function, type) or not callable(function):
            return function
        if name in OF_DTYPES:
            return lambda *args, **kwargs: function(*unwrapped(args), **kwargs)
        return lambda *args, **kwargs: call(function, *args, **kwargs)


def launched_by(launch):
    """A launch on the stand-in's arrays, by one that runs on NumPy's."""

    def on_recording(function, grid, threads, arguments, shared=0):
        plain = unwrapped(tuple(arguments))
        do(lambda: launch(function, grid, threads, plain, shared))

    return on_recording
