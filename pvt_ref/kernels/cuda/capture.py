"""CUDA graphs: the launches of a function of arrays, recorded once and then launched as a whole.

A forward is a few hundred launches. Python needs microseconds for each, and with few images the GPU
computes faster than Python launches. The replay of a graph is a single launch.

A graph records addresses. So it has its own arrays for the inputs and its own memory for all
intermediate results, and uses the weights where they are. A call copies its arrays in and the
results out. What the host does while a graph is recorded, it does only once: Python numbers keep
their values. CUDA refuses copies between host and device while recording, and so does
:func:`capture`.

A capture takes three runs. Two warm up: they compile kernels, choose algorithms and let the memory
pool grow to its final size. The third is recorded, and computes nothing.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator
from typing import Any

import numpy as np

from pvt_ref.arrays import (
    Array,
    array_module,
    describe_type,
    dtype_name,
    explained,
    from_host,
    is_array,
    is_cupy,
    library_and_dtype,
)
from pvt_ref.errors import ArrayTypeError, DeviceError, ShapeError, reason, shown
from pvt_ref.ops import Ops
from pvt_ref.tree import branches, map_arrays

#: The number of runs before the recorded one.
_WARM_UPS = 2

#: CUDA allows concurrent captures, but they gain nothing here.
_one_at_a_time = threading.RLock()


class _Recording(threading.local):
    """What this thread is recording: constants with their host arrays; None if it is not."""

    constants: list[tuple[Array, np.ndarray]] | None = None
    allocator: Any = None  # for memory that no other array of the graph uses


_recording = _Recording()


def is_recording() -> bool:
    """Whether this thread is recording a graph, or warming up for that."""
    return _recording.allocator is not None


def constant(host: np.ndarray, like: Array) -> Array:
    """host as an array of like's library and device, the same in every replay of a graph.

    Nothing can be copied while a graph is recorded. In that case the numbers are copied afterwards,
    into memory to which no replay writes.
    """
    if _recording.constants is None:
        return from_host(host, like=like)
    xp = array_module(like)
    with xp.cuda.using_allocator(_recording.allocator):
        x = xp.empty(host.shape, host.dtype)
    _recording.constants.append((x, host))
    return x


class Captured:
    """A function as a CUDA graph, made by :func:`capture`.

    Calls take turns, whatever their thread and stream: each waits, on the device, until the one
    before has copied its results out.

    Attributes:
        device: the device of its arrays, on which it was captured.
        outputs: the arrays to which the graph writes its results, at each call.
    """

    __slots__ = ("_done", "_graph", "_held", "_inputs", "_turn", "device", "outputs")

    def __init__(
        self, graph: Any, inputs: tuple[Array, ...], outputs: Any, done: Any, held: tuple[Any, ...]
    ) -> None:
        self._graph, self._inputs, self.outputs, self._held = graph, inputs, outputs, held
        self._done, self._turn, self.device = done, threading.Lock(), inputs[0].device

    def __call__(self, *arrays: Array) -> Any:
        """The function's result for arrays of the same shapes and dtypes, in new memory.

        Everything happens in CuPy's current stream of the device.
        """
        _check_like(arrays, self._inputs)
        with arrays[0].device, self._turn, explained():
            stream = array_module(arrays[0]).cuda.get_current_stream()
            stream.wait_event(self._done)
            for mine, given in zip(self._inputs, arrays, strict=True):
                mine[...] = given
            self._graph.launch(stream)
            results = map_arrays(lambda x: x.copy(), self.outputs)
            self._done.record(stream)
        return results


def capture(function: Callable[..., Any], *arrays: Array) -> Captured:
    """A CUDA graph of function, which then computes it for other arrays of the same shapes.

    The function may be a forward, a pyramid, a forward with its backward, a whole training step::

        prepared = pvt_ref.prepare(params, config)
        replay = pvt_ref.capture(lambda x: pvt_ref.forward(prepared, x, ops=ops), images)
        logits = replay(other_images)

    The function runs three times. Arrays that it closes over, such as weights, are read in place
    and kept alive. The replay has the bits of direct launches. Constants from the host come from
    :func:`constant`.

    Args:
        function: takes these arrays and returns an array, or arrays in a record, tuple, list or
            dict. All else that it returns, and every number that it takes from elsewhere, keeps its
            present value.
        arrays: examples of any shapes: CuPy arrays on one device, at least one.

    Returns:
        A function of arrays of the same shapes and dtypes. It holds the memory of one run.

    Raises:
        DeviceError: if the arrays are not CuPy's, or if the function needs the host while it runs:
            for copies between host and device, or because CuPy cannot record it. Also if CUDA
            fails.
        ArrayTypeError: if function is not callable, or an argument is not an array.
        PVTError: errors of function itself.
    """
    if not callable(function):
        raise ArrayTypeError(f"function is {shown(function)}; it must take arrays")
    _check_examples(arrays)
    if is_recording():
        raise DeviceError("a graph is being captured already: capture the whole function at once")
    cupy, device = array_module(arrays[0]), arrays[0].device
    with _one_at_a_time, device, explained():
        pool, apart = cupy.cuda.MemoryPool(), cupy.cuda.MemoryPool()
        stream, done = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Event(disable_timing=True)
        done.record(cupy.cuda.get_current_stream())
        stream.wait_event(done)  # until the examples and the weights are computed
        with cupy.cuda.using_allocator(pool.malloc), stream, _recorded_with(apart.malloc):
            inputs = tuple(x.copy() for x in arrays)
            for _ in range(_WARM_UPS):
                function(*inputs)
            stream.synchronize()
            graph, outputs, constants = _record(function, inputs, stream)
            _check_outputs(outputs, device)
            for x, host in constants:
                x[...] = from_host(host, like=x)
            done.record(stream)
            stream.synchronize()
    return Captured(graph, inputs, outputs, done, (function, pool, apart, stream, constants))


@contextlib.contextmanager
def _recorded_with(allocator: Any) -> Generator[None]:
    """While entered, this thread is recording, and this allocator gives memory for constants."""
    _recording.allocator = allocator
    try:
        yield
    finally:
        _recording.allocator = None


def _record(
    function: Callable[..., Any], inputs: tuple[Array, ...], stream: Any
) -> tuple[Any, Any, list[tuple[Array, np.ndarray]]]:
    """The graph of one run, what the function returned, and the constants to be filled in."""
    constants: list[tuple[Array, np.ndarray]] = []
    _recording.constants = constants
    try:
        stream.begin_capture()
        outputs = function(*inputs)
        return stream.end_capture(), outputs, constants
    except BaseException as error:  # CuPy has several for what cannot be recorded
        with contextlib.suppress(Exception):  # the stream must not stay in capture mode
            stream.end_capture()
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        raise DeviceError(
            f"the function cannot be captured as a CUDA graph ({reason(error)}). A graph holds "
            f"only work on the device. While the function runs, nothing may go between host and "
            f"device (float(x), to_numpy(x), labels that are checked, masks that are drawn, "
            f"position tables that are resized), and CuPy's own matrix products cannot be "
            f"recorded. Compute such things before, pass them as arrays (prepare(params, config, "
            f"size) resizes tables), and use a table that can: ops=cuda_kernels()"
        ) from error
    finally:
        _recording.constants = None


def _check_examples(arrays: tuple[Any, ...]) -> None:
    """Refuses what is not a CuPy array, and arrays on several devices."""
    if not arrays:
        raise ArrayTypeError("capture needs an example of each array that the function takes")
    for i, x in enumerate(arrays):
        if not is_array(x):
            raise ArrayTypeError(f"array {i} is {describe_type(x)}")
        if not is_cupy(x):
            what = f"array {i} is {library_and_dtype(x)}, but a CUDA graph needs CuPy arrays"
            cure = "pvt_ref.to_device((params, images), 'cuda') makes them"
            raise DeviceError(f"{what}. {cure}; without CUDA, call the function itself")
        if x.device != arrays[0].device:
            both = f"{arrays[0].device} and array {i} on {x.device}"
            raise DeviceError(f"array 0 is on {both}; a graph needs one device. Move one of them")


def _check_like(arrays: tuple[Any, ...], examples: tuple[Array, ...]) -> None:
    """Refuses arrays that differ from the examples of a graph in shape, dtype or device."""
    again = "capture the function again for others"
    if len(arrays) != len(examples):
        raise ShapeError(f"captured for {len(examples)} arrays, called with {len(arrays)}")
    for i, (x, example) in enumerate(zip(arrays, examples, strict=True)):
        if not is_cupy(x) or x.dtype != example.dtype or x.device != example.device:
            given = library_and_dtype(x) if is_array(x) else describe_type(x)
            what = f"array {i} is {given}; the graph is of {library_and_dtype(example)}"
            raise ArrayTypeError(f"{what}: {again}")
        if x.shape != example.shape:
            both = f"shape {tuple(x.shape)}; the graph is of {tuple(example.shape)}"
            raise ShapeError(f"array {i} has {both}: {again}")


def _check_outputs(tree: Any, device: Any) -> None:
    """Refuses results that no replay would update: no arrays, or arrays on the host."""
    found = list(_arrays(tree))
    if not found:
        what = f"the function returned {shown(tree)}"
        raise DeviceError(f"{what}; a graph needs arrays to write its results to")
    for x in found:
        if not is_cupy(x) or x.device != device:
            what = f"the function returned an array that is {library_and_dtype(x)}"
            raise DeviceError(
                f"{what}: the device does not compute it, so no replay would renew it"
            )


def _arrays(tree: Any) -> Iterator[Array]:
    """All arrays of a tree, including those in lists and dicts."""
    if is_array(tree):
        yield tree
        return
    for _, branch in branches(tree):
        yield from _arrays(branch)


# Where shapes repeat ------------------------------------------------------------------------------

#: Entries for shapes that were used once, and for shapes whose capture was refused.
SEEN, REFUSED = object(), object()


class Graphs:
    """The graphs of a table of operations, captured where shapes repeat.

    A function is called directly the first time. The second time with arrays of the same shapes, it
    is captured; if that is refused, it is called directly from then on. The least recently used
    graph is evicted first.
    """

    def __init__(self, most: int = 16) -> None:
        self.most = most
        self._known: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.most,)  # a copy captures its own graphs

    def __len__(self) -> int:
        return sum(isinstance(known, Captured) for known, _ in self._known.values())

    def clear(self) -> None:
        """Drops all graphs, and frees their memory."""
        with self._lock:
            self._known.clear()

    def run(self, owner: Any, make: Callable[[], Callable[..., Any]], *arrays: Array) -> Any:
        """make()(*arrays), or the replay of its graph.

        Args:
            owner: the record of weights that the function uses. Records never change, so its
                identity stands for the addresses of its arrays. A graph keeps it alive.
            make: makes the function; what make itself does is not captured.
            arrays: the arguments of the function, on a device.
        """
        of_arrays = tuple((x.shape, dtype_name(x), x.device.id) for x in arrays)
        key = (id(owner), of_arrays)
        with self._lock:
            known, _ = self._known.pop(key, (None, None))
            self._enter(key, known or SEEN, owner)
        if known is SEEN:
            try:
                known = capture(make(), *arrays)
            except DeviceError:
                known = REFUSED
            with self._lock:
                self._enter(key, known, owner)
        return known(*arrays) if isinstance(known, Captured) else make()(*arrays)

    def _enter(self, key: Hashable, known: Any, owner: Any) -> None:
        # an id is unique only while its owner is alive; a wrong entry without a graph does no harm
        self._known[key] = known, owner if isinstance(known, Captured) else None
        while len(self._known) > self.most:
            self._known.popitem(last=False)


def replays(ops: Ops, x: Array) -> bool:
    """Whether computations with this table on x may use ``ops.settings.graphs``."""
    wanted = getattr(ops.settings, "capture", False)
    return bool(wanted) and is_cupy(x) and not is_recording()
