"""Which library an array belongs to, and how arrays move between host and device.

This is the only file that knows NumPy from CuPy. The layers ask :func:`array_module` once per call
and use the functions of the array API standard (https://data-apis.org/array-api), which NumPy and
CuPy share; so the same lines also run on any other library that implements the standard.
"""

import contextvars
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

import numpy as np

from pvt_ref.errors import ArrayTypeError, DeviceError, shown

#: An array of NumPy, CuPy or another library of the array API standard.
Array = Any

_ODD_ARRAYS = (np.ma.MaskedArray, np.matrix)

FLOAT_DTYPES = ("float32", "float64")  # of parameters, and so of all computation


def array_module(x: Array) -> ModuleType:
    """The namespace (``numpy``, ``cupy``, ...) whose functions work on x.

    Args:
        x: an array of any shape and dtype.

    Returns:
        A module with the functions of the array API standard.

    Raises:
        ArrayTypeError: if x is not an array, or a masked one or a matrix.
    """
    if is_numpy(x):
        return np
    if is_cupy(x):
        return sys.modules["cupy"]
    if is_array(x):
        return x.__array_namespace__()
    raise ArrayTypeError(f"expected an array, got {describe_type(x)}")


def describe_type(x: object) -> str:
    """What a value is that should be an array, and how it becomes one.

    Args:
        x: anything.

    Returns:
        Words for a message: ``"a list. numpy.asarray(...) makes an array of numbers"``.
    """
    library = type(x).__module__.split(".")[0]
    if library == "torch":
        return "a torch.Tensor. x.detach().cpu().numpy() makes an array of it"
    if isinstance(x, np.ma.MaskedArray):
        return "a masked array. x.filled(value) makes a plain one, with value where it is masked"
    if is_array(x) and not is_numpy(x):
        return f"an array of {library}. pvt_ref.to_numpy(x) brings it to the host"
    name = type(x).__name__ if library == "builtins" else f"{library}.{type(x).__name__}"
    return f"a {name}. numpy.asarray(x, dtype=numpy.float32) makes an array of numbers"


def is_numpy(x: object) -> bool:
    """Whether x is a NumPy array that computes as arrays do; masked ones and matrices do not.

    Args:
        x: anything.

    Returns:
        True or False; True for NumPy's scalars too.
    """
    return isinstance(x, np.ndarray | np.generic) and not isinstance(x, _ODD_ARRAYS)


def is_cupy(x: object) -> bool:
    """Whether x is a CuPy array. CuPy is looked at only if the caller has imported it.

    Args:
        x: anything.

    Returns:
        True or False.
    """
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, getattr(cupy, "ndarray", ()))


def is_array(x: object) -> bool:
    """Whether :func:`array_module` accepts x.

    Args:
        x: anything.

    Returns:
        True or False.
    """
    if isinstance(x, _ODD_ARRAYS):
        return False
    return is_numpy(x) or is_cupy(x) or hasattr(type(x), "__array_namespace__")


def is_foreign(x: object) -> bool:
    """Whether x holds an array's numbers, and :func:`array_module` refuses it all the same.

    Args:
        x: anything.

    Returns:
        True for PyTorch's tensors, masked arrays, data frames, pictures and the like.
    """
    exports = ("__array__", "__array_interface__", "__dlpack__")
    return not is_array(x) and any(hasattr(type(x), name) for name in exports)


def same_library(x: Array, y: Array) -> bool:
    """Whether x and y can be combined: arrays of one library and, on CUDA, of one device.

    Args:
        x: an array of any shape and dtype.
        y: an array of any shape and dtype.

    Returns:
        True or False.

    Raises:
        ArrayTypeError: if one is not an array.
    """
    if array_module(x) is not array_module(y):
        return False
    return not is_cupy(x) or x.device == y.device


def library_and_dtype(x: Array) -> str:
    """``"numpy float32"`` and the like, for messages.

    Args:
        x: an array of any shape and dtype.

    Returns:
        Library and dtype; for CuPy, the device too.

    Raises:
        ArrayTypeError: if x is not an array.
    """
    device = f" on {x.device}" if is_cupy(x) else ""
    return f"{array_module(x).__name__.split('.')[0]} {dtype_name(x)}{device}"


def dtype_name(x: Array) -> str:
    """``"float32"`` and the like, for the arrays of any library.

    Args:
        x: an array, or anything with a dtype.

    Returns:
        The name of the dtype, without the library's.
    """
    return str(x.dtype).rsplit(".", 1)[-1]


def from_host(host: np.ndarray, like: Array) -> Array:
    """host as an array of like's library (and device), so that the two can be combined.

    Args:
        host: a NumPy array of any shape and dtype.
        like: an array of any shape that says where to.

    Returns:
        An array of host's shape and dtype; host itself if like is a NumPy array.

    Raises:
        ArrayTypeError: if like is not an array.
    """
    if isinstance(like, np.ndarray | np.generic):
        return host
    xp = array_module(like)
    if is_cupy(like):
        with like.device:
            return xp.asarray(host)
    return xp.asarray(host, device=like.device)


def synchronize(x: Array) -> None:
    """Waits until x's device has done all it was told, so that a clock can be read.

    Args:
        x: an array of any shape. For one on the host there is nothing to wait for.
    """
    if is_cupy(x):
        with x.device:
            sys.modules["cupy"].cuda.get_current_stream().synchronize()


def sum_in_float64(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Sum over axis, added up in double precision; the result has x's dtype.

    A float32 sum over 400,000 rows loses the sixth digit or the fifth, and where numbers cancel one
    more; biases and norms need such sums.

    Args:
        x: floats of any shape.
        axis: one axis, or several.

    Returns:
        x's shape without those axes, of x's dtype: (..., C) over all but the last gives (C,).

    Raises:
        ArrayTypeError: if x is not an array.
    """
    xp = array_module(x)
    return xp.astype(xp.sum(x, axis=axis, dtype=xp.float64), x.dtype)


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) without NumPy's floating-point warnings: what it gives is looked at after.

    The setting lies in a copy of the caller's context and ends with it. ``with numpy.errstate(...)``
    would leave it to the caller if Ctrl-C comes just where the block ends.

    Args:
        function: what to call.
        args: its arguments.

    Returns:
        Its result.
    """
    context = contextvars.copy_context()
    context.run(np.seterr, all="ignore")
    return context.run(function, *args)


def erf(x: Array) -> Array:
    """The error function, the one special function that the array API standard lacks.

    scipy.special.erf hands a CuPy array to cupyx by itself.

    Args:
        x: (...), float32 or float64.

    Returns:
        (...) of x's library, device and dtype, new memory.
    """
    import scipy.special  # slow to import: where nothing is computed, nothing waits for it

    if isinstance(x, np.ndarray | np.generic) or is_cupy(x):
        return scipy.special.erf(x)
    return from_host(scipy.special.erf(np.asarray(x)), like=x)


def map_arrays(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """A copy of a record, tuple, list or dict with f applied to every array in it.

    With several trees of one shape, f gets the arrays that stand in the same place. None, numbers,
    texts and the like stay as they are in the first tree.

    Args:
        f: gets as many arrays as there are trees.
        tree: an array, or arrays in records, tuples, lists and dicts.
        others: more trees of the same structure.

    Returns:
        tree's structure with the results of f in the places of the arrays.

    Raises:
        ValueError: if tuples or lists in the same place differ in length.
        KeyError: if another tree lacks a key of the first.
        AttributeError: if another tree lacks a field of the first.
        ArrayTypeError: if tree holds arrays of a library that :func:`array_module` does not take,
            such as PyTorch's tensors.
    """
    if is_array(tree):
        return f(tree, *others)
    if is_foreign(tree):
        raise ArrayTypeError(
            f"expected arrays that NumPy code computes with, got {describe_type(tree)}"
        )
    if is_dataclass(tree) and not isinstance(tree, type):
        values = {
            field.name: map_arrays(
                f, getattr(tree, field.name), *(getattr(o, field.name) for o in others)
            )
            for field in fields(tree)
        }
        return type(tree)(**values)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a named tuple
        return type(tree)(*map_arrays(f, tuple(tree), *(tuple(o) for o in others)))
    if isinstance(tree, tuple | list):
        return type(tree)(map_arrays(f, *branch) for branch in zip(tree, *others, strict=True))
    if isinstance(tree, dict):
        return {key: map_arrays(f, value, *(o[key] for o in others)) for key, value in tree.items()}
    return tree


def named_arrays(tree: Any, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Key and array of every leaf of a parameter record, in field order.

    Args:
        tree: a record of parameters or gradients, a tuple of such, or an array; None has no leaves.
        prefix: of all keys, without a dot at its end.

    Yields:
        (key, array of its own shape), the array itself, not a copy.
    """
    if is_array(tree):
        yield prefix, tree
    elif is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            key = f"{prefix}.{field.name}" if prefix else field.name
            yield from named_arrays(getattr(tree, field.name), key)
    elif isinstance(tree, tuple):
        for index, branch in enumerate(tree):
            yield from named_arrays(branch, f"{prefix}.{index}")


def short_repr(self: Any) -> str:
    """What a record of arrays shows of itself: shapes and sums, not numbers.

    Every such record has it as its ``__repr__``: ``LinearParams(weight (64, 3) float32, bias
    None)`` where all fields are arrays or plain values, else ``BlockParams(49,984 numbers in 16
    arrays, float32, numpy)``.

    Args:
        self: a dataclass or a named tuple.

    Returns:
        One line, shorter than a screen is wide or little longer.
    """
    names = getattr(self, "_fields", None) or [field.name for field in fields(self)]
    values = [getattr(self, name) for name in names]
    name = type(self).__name__
    if any(is_dataclass(value) or isinstance(value, tuple | list | dict) for value in values):
        return f"{name}({describe_arrays(self)})"
    parts = (
        f"{tuple(x.shape)} {dtype_name(x)}" if is_array(x) and hasattr(x, "shape") else shown(x)
        for x in values
    )
    return f"{name}({', '.join(map(' '.join, zip(names, parts, strict=True)))})"


def describe_arrays(tree: Any) -> str:
    """How much a tree of arrays holds, of what, and where.

    Args:
        tree: arrays of any shapes in records and tuples.

    Returns:
        ``"3,254,378 numbers in 139 arrays, float32, numpy"``, with all dtypes and libraries in it.
    """
    arrays = [x for _, x in named_arrays(tree)]
    count = f"{sum(math.prod(x.shape) for x in arrays):,} numbers in {len(arrays)} arrays"
    dtypes = sorted({dtype_name(x) for x in arrays})
    homes = sorted({library_and_dtype(x).replace(f" {dtype_name(x)}", "") for x in arrays})
    return ", ".join([count, *dtypes, *homes])


def to_numpy(tree: Any) -> Any:
    """Copies every CuPy array in tree to the host; NumPy arrays are passed on.

    Args:
        tree: an array, or arrays in a record (parameters, gradients), tuple, list or dict.

    Returns:
        The same structure with NumPy arrays of the same shapes and dtypes. What is no array stays
        as it is.

    Raises:
        ArrayTypeError: if tree holds arrays of another kind, such as PyTorch's tensors.
    """
    return map_arrays(lambda a: a.get() if is_cupy(a) else np.asarray(a), tree)


def to_device(tree: Any, device: str = "cuda") -> Any:
    """Copies every array in tree to a device.

    Args:
        tree: an array, or arrays in a record (parameters, gradients, a Model), tuple, list or dict.
        device: ``"cuda"`` (the current CUDA device), ``"cuda:1"`` and so on, or ``"cpu"``. CuPy
            computes on the current device: for another, use ``with cupy.cuda.Device(1):`` around
            the calls.

    Returns:
        The same structure with CuPy arrays of the same shapes and dtypes, or with NumPy arrays for
        ``"cpu"``.

    Raises:
        DeviceError: if there is no such device here; the message says what was found and what to
            install.
        ArrayTypeError: as :func:`to_numpy`.
    """
    if isinstance(device, str) and device == "cpu":
        return to_numpy(tree)
    match = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if not match:
        raise DeviceError(
            f"device is {shown(device)}; known are 'cpu', 'cuda', 'cuda:0', 'cuda:1', ..."
        )
    cupy = import_cupy()
    count = cupy.cuda.runtime.getDeviceCount()
    number = int(match[1]) if match[1] else cupy.cuda.runtime.getDevice()
    if number >= count:
        raise DeviceError(f"device is {device!r}, but the CUDA devices here are 0 to {count - 1}")
    with cupy.cuda.Device(number):
        return map_arrays(cupy.asarray, tree)


def import_cupy() -> ModuleType:
    """The cupy module, once it is sure that it can compute.

    Returns:
        The module.

    Raises:
        DeviceError: if CuPy is not installed, cannot be loaded, or finds no driver or device.
    """
    advice = (
        "Install CuPy for your driver's CUDA version: pip install 'pvt_ref[cuda12]' or "
        "pip install 'pvt_ref[cuda13]' (from a checkout: pip install -e '.[cuda12]'); nvidia-smi "
        "prints the version. Without an NVIDIA GPU, everything runs on NumPy: leave the arrays as "
        "they are"
    )
    try:
        import cupy  # type: ignore[import-not-found]
    except ImportError as error:
        raise DeviceError(
            f"CUDA was asked for, but CuPy cannot be imported ({error}). {advice}"
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        if count:
            cupy.zeros(1).get()  # a device that is listed can still be out of order
    except Exception as error:  # CuPy has many, in private modules: all mean no usable device
        raise DeviceError(
            f"CUDA was asked for; CuPy {cupy.__version__} is installed but found no usable driver "
            f"or device ({type(error).__name__}: {error}). {advice}"
        ) from error
    if not count:
        raise DeviceError(
            f"CUDA was asked for; CuPy {cupy.__version__} is installed and there is a driver, but "
            f"no CUDA device is visible (is CUDA_VISIBLE_DEVICES empty?). {advice}"
        )
    return cupy
