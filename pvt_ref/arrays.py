"""Which library an array belongs to, and what moves between host and device.

This is the only file that knows NumPy from CuPy. The layers ask :func:`array_module` once per call
and use the functions of the array API standard (https://data-apis.org/array-api), which NumPy and
CuPy share; so the same lines also run on any other library that implements the standard.
"""

import contextvars
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from pvt_ref.errors import ArrayTypeError, DeviceError

#: An array of NumPy, CuPy or another library of the array API standard.
Array = Any

#: Height and width.
Grid = tuple[int, int]

FLOAT_DTYPES = ("float32", "float64")  # of parameters, and so of all computation

#: By class, for those that were asked about before. A library's class says it all.
_modules: dict[type, ModuleType] = {np.ndarray: np}


def array_module(x: Array) -> ModuleType:
    """The namespace (``numpy``, ``cupy``, ...) of an array's functions. Raises: ArrayTypeError."""
    module = _modules.get(type(x))
    if module is None:
        if not is_array(x):
            raise ArrayTypeError(f"expected an array, got {describe_type(x)}")
        if not is_numpy(x) and not is_cupy(x):
            return x.__array_namespace__()  # a library may have several versions of it
        module = _modules[type(x)] = np if is_numpy(x) else sys.modules["cupy"]
    return module


def describe_type(x: object) -> str:
    """Names a value that is not an array, and says how to convert it."""
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
    """Whether x is a NumPy array or scalar that computes as arrays do; masked ones do not."""
    return isinstance(x, np.ndarray | np.generic) and not _computes_otherwise(type(x))


def is_cupy(x: object) -> bool:
    """Whether x is a CuPy array. CuPy is looked at only if the caller has imported it."""
    return isinstance(x, _cupy_array())


def _cupy_array() -> Any:
    return getattr(sys.modules.get("cupy"), "ndarray", ())


def is_array(x: object) -> bool:
    """Whether :func:`array_module` accepts x: no masked array or matrix."""
    return _is_array_type(type(x))


@functools.cache  # a walk over a model asks for each of its branches
def _is_array_type(cls: type) -> bool:
    known = issubclass(cls, (np.ndarray, np.generic)) or issubclass(cls, _cupy_array())
    return (known or hasattr(cls, "__array_namespace__")) and not _computes_otherwise(cls)


def _computes_otherwise(cls: type) -> bool:
    """Whether cls is of matrices or masked arrays; numpy.ma, slow to import, is only looked at."""
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())
    return issubclass(cls, np.matrix) or issubclass(cls, masked)


def is_foreign(x: object) -> bool:
    """Whether x holds numbers but is refused: a tensor, a masked array, a picture and the like."""
    exports = ("__array__", "__array_interface__", "__dlpack__")
    return not is_array(x) and any(hasattr(type(x), name) for name in exports)


def same_library(x: Array, y: Array) -> bool:
    """Whether x and y can be combined: arrays of one library and, on CUDA, of one device."""
    return array_module(x) is array_module(y) and (not is_cupy(x) or x.device == y.device)


def library_and_dtype(x: Array) -> str:
    """``"numpy float32"`` and the like, for messages; for CuPy with the device."""
    device = f" on {x.device}" if is_cupy(x) else ""
    return f"{array_module(x).__name__.split('.')[0]} {dtype_name(x)}{device}"


def dtype_name(x: Array) -> str:
    """``"float32"`` and the like, for the arrays of any library."""
    return _name_of(x.dtype)


@functools.lru_cache(typed=True)  # some libraries' dtypes warn if compared with another's
def _name_of(dtype: Any) -> str:
    return str(dtype).rsplit(".", 1)[-1]


def from_host(host: np.ndarray, like: Array) -> Array:
    """host as an array of like's library and device; host itself if like is NumPy's."""
    if isinstance(like, np.ndarray | np.generic):
        return host
    xp = array_module(like)
    if is_cupy(like):
        with like.device:
            return xp.asarray(host)
    return xp.asarray(host, device=like.device)


def address(x: Array) -> int:
    """Where the first number of a NumPy or CuPy array lies, for code that is given pointers."""
    return x.data.ptr if is_cupy(x) else x.ctypes.data


def synchronize(x: Array) -> None:
    """Waits until x's device has done all it was told, so that a clock can be read."""
    if is_cupy(x):
        with x.device:
            sys.modules["cupy"].cuda.get_current_stream().synchronize()


def sum_in_float64(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Sum over axis, accumulated in float64; the result has x's dtype.

    A float32 sum over 400,000 rows loses the sixth digit or the fifth, and where numbers cancel one
    more; biases and norms need such sums.
    """
    xp = array_module(x)
    real = xp.isdtype(x.dtype, "real floating")  # the tests differentiate with complex numbers
    wide = xp.float64 if real else xp.complex128
    return xp.astype(xp.sum(x, axis=axis, dtype=wide), x.dtype)


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) without NumPy's floating-point warnings: what it gives is looked at after.

    The setting lies in a copy of the caller's context and ends with it. Of ``numpy.errstate``, the
    caller would keep it if Ctrl-C came just where the ``with`` ends.
    """
    context = contextvars.copy_context()
    context.run(np.seterr, all="ignore")
    return context.run(function, *args)


def erf(x: Array) -> Array:
    """The error function, which the array API standard lacks; a library may offer its own."""
    plain = isinstance(x, np.ndarray | np.generic) or is_cupy(x)  # which SciPy hands to cupyx
    own = None if plain else getattr(array_module(x), "erf", None)
    if own is not None:
        return own(x)
    import scipy.special  # slow to import: where nothing is computed, nothing waits for it

    return scipy.special.erf(x) if plain else from_host(scipy.special.erf(np.asarray(x)), like=x)


def import_cupy() -> ModuleType:
    """The cupy module, once it is sure that it can compute. Raises: DeviceError."""
    found, cause = "CuPy cannot be imported", None
    try:
        import cupy  # type: ignore[import-not-found]

        found = f"CuPy {cupy.__version__} is installed but found no usable driver or device"
        if cupy.cuda.runtime.getDeviceCount():
            cupy.zeros(1).get()  # a device that is listed can still be out of order
            return cupy
        found = f"CuPy {cupy.__version__} found a driver, but no CUDA device is visible"
        why = "is CUDA_VISIBLE_DEVICES empty?"
    except Exception as error:  # CuPy has many, in private modules: all mean no usable device
        cause, why = error, f"{type(error).__name__}: {error}"
    raise DeviceError(
        f"CUDA was asked for, but {found} ({why}). Install CuPy for your driver's CUDA version, "
        f"which nvidia-smi prints: pip install cupy-cuda12x or pip install cupy-cuda13x (the "
        f"extras cuda12 and cuda13 of a checkout: pip install -e '.[cuda12]'). Without an NVIDIA "
        f"GPU, everything runs on NumPy: leave the arrays as they are"
    ) from cause
