"""The library of an array, and transfers between host and device.

This is the only file that knows NumPy from CuPy. The layers ask :func:`array_module` once per call
and use the functions of the array API standard (https://data-apis.org/array-api), which NumPy and
CuPy share; so the same lines also run on any other library that implements the standard.
"""

import contextlib
import contextvars
import functools
import sys
from collections.abc import Callable, Generator
from types import ModuleType
from typing import Any

import numpy as np

from pvt_ref.errors import ArrayTypeError, DeviceError, PVTError, reason

#: An array of NumPy, CuPy or another library of the array API standard.
Array = Any

#: Height and width.
Grid = tuple[int, int]

FLOAT_DTYPES = ("float32", "float64")  # of parameters, and therefore of all computation

#: The answers so far, by class: all arrays of a class have the same library.
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
    """Whether x is a NumPy array or scalar with plain array arithmetic: not masked, no matrix."""
    return isinstance(x, np.ndarray | np.generic) and not _computes_otherwise(type(x))


def is_cupy(x: object) -> bool:
    """Whether x is a CuPy array. Does not import CuPy: without it there are no such arrays."""
    return isinstance(x, _cupy_array())


def _cupy_array() -> Any:
    return getattr(sys.modules.get("cupy"), "ndarray", ())


def is_array(x: object) -> bool:
    """Whether :func:`array_module` accepts x: no masked array or matrix."""
    return _is_array_type(type(x))


@functools.cache  # a walk over a model asks once for each of its branches
def _is_array_type(cls: type) -> bool:
    known = issubclass(cls, (np.ndarray, np.generic)) or issubclass(cls, _cupy_array())
    return (known or hasattr(cls, "__array_namespace__")) and not _computes_otherwise(cls)


def _computes_otherwise(cls: type) -> bool:
    """Whether cls is of matrices or masked arrays; does not import numpy.ma, which is slow."""
    masked = getattr(sys.modules.get("numpy.ma"), "MaskedArray", ())
    return issubclass(cls, np.matrix) or issubclass(cls, masked)


def is_foreign(x: object) -> bool:
    """Whether x holds numbers but is refused: a tensor, a masked array, a picture and so on."""
    exports = ("__array__", "__array_interface__", "__dlpack__")
    return not is_array(x) and any(hasattr(type(x), name) for name in exports)


def same_library(x: Array, y: Array) -> bool:
    """Whether x and y can be combined: arrays of one library and, on CUDA, of one device."""
    return array_module(x) is array_module(y) and (not is_cupy(x) or x.device == y.device)


def library_and_dtype(x: Array) -> str:
    """For messages: ``"numpy float32"`` and so on; for CuPy with the device."""
    device = f" on {x.device}" if is_cupy(x) else ""
    return f"{array_module(x).__name__.split('.')[0]} {dtype_name(x)}{device}"


def dtype_name(x: Array) -> str:
    """``"float32"`` and so on, for arrays of any library."""
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


#: Device types by DLPack's numbers: memory that the host can read, and memory of CUDA.
_DLPACK_HOST, _DLPACK_CUDA = (1, 3), (2, 13)


def from_dlpack(x: Any) -> Array:
    """An array that shares memory with another library's array; nothing is copied.

    To go back, use the other library's function: ``torch.from_dlpack``, ``jax.dlpack.from_dlpack``.
    On CUDA, CuPy's current stream waits for the work that x's library has started.

    Args:
        x: any object with DLPack export: a tensor of PyTorch, an array of JAX, of any shape.

    Returns:
        An array of NumPy, or of CuPy on x's device; x itself if it is one already. Writing to x
        changes it.

    Raises:
        ArrayTypeError: if x cannot be exported, or not to NumPy and CuPy: it requires a gradient,
            has a dtype such as bfloat16, or is on a device of another kind.
        DeviceError: if x is on CUDA and CuPy cannot be used.
    """
    if is_numpy(x) or is_cupy(x):
        return x
    exports = hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")
    if not exports or isinstance(x, np.ndarray):  # a masked one would lose its mask
        raise ArrayTypeError(f"expected an object with DLPack export, got {describe_type(x)}")
    try:
        kind, number = x.__dlpack_device__()
        if kind in _DLPACK_HOST:
            return np.from_dlpack(x)
        if kind in _DLPACK_CUDA:
            cupy = import_cupy()
            with cupy.cuda.Device(number), explained():
                return cupy.from_dlpack(x)
        why = f"it is on a device of DLPack's type {int(kind)}"
    except PVTError:
        raise
    except Exception as error:  # each library raises its own kind
        why = reason(error)
    raise ArrayTypeError(
        f"x is an array of {type(x).__module__.split('.')[0]} that cannot be shared ({why}). If "
        f"it requires a gradient, share x.detach(); convert bfloat16 to float32 first"
    )


def address(x: Array) -> int:
    """The address of the first element of a NumPy or CuPy array, for code that takes pointers."""
    return x.data.ptr if is_cupy(x) else x.ctypes.data


def synchronize(x: Array) -> None:
    """Waits until x's device has finished all queued work, for timing."""
    if is_cupy(x):
        with x.device:
            sys.modules["cupy"].cuda.get_current_stream().synchronize()


def sum_in_float64(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Sum over axis, accumulated in float64; the result has x's dtype.

    A float32 sum over 400,000 rows loses the fifth or sixth digit, and one more under cancellation;
    biases and norms need such sums.
    """
    xp = array_module(x)
    real = xp.isdtype(x.dtype, "real floating")  # tests differentiate by complex steps
    wide = xp.float64 if real else xp.complex128
    return xp.astype(xp.sum(x, axis=axis, dtype=wide), x.dtype)


def quietly(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) without NumPy's floating-point warnings; the caller checks the result.

    The setting is made in a copy of the caller's context and ends with it. ``numpy.errstate`` would
    leave it in place if Ctrl-C came just where the ``with`` ends.
    """
    context = contextvars.copy_context()
    context.run(np.seterr, all="ignore")
    return context.run(function, *args)


def erf(x: Array) -> Array:
    """The error function, which is not in the array API standard; a library may have its own."""
    plain = isinstance(x, np.ndarray | np.generic) or is_cupy(x)  # SciPy hands CuPy's to cupyx
    own = None if plain else getattr(array_module(x), "erf", None)
    if own is not None:
        return own(x)
    import scipy.special  # slow to import, so only when it is needed

    return scipy.special.erf(x) if plain else from_host(scipy.special.erf(np.asarray(x)), like=x)


def import_cupy() -> ModuleType:
    """The cupy module, after a check that it can compute. Raises: DeviceError."""
    found, cause = "CuPy cannot be imported", None
    try:
        import cupy  # type: ignore[import-not-found]

        found = f"CuPy {cupy.__version__} is installed but found no usable driver or device"
        if cupy.cuda.runtime.getDeviceCount():
            cupy.zeros(1).get()  # a listed device can still be broken
            return cupy
        found = f"CuPy {cupy.__version__} found a driver, but no CUDA device is visible"
        why = "is CUDA_VISIBLE_DEVICES empty?"
    except Exception as error:  # CuPy raises many kinds, of private modules: none can be named
        cause, why = error, f"{type(error).__name__}: {error}"
    raise DeviceError(
        f"CUDA was asked for, but {found} ({why}). Install CuPy for your driver's CUDA version, "
        f"which nvidia-smi prints: pip install cupy-cuda12x or pip install cupy-cuda13x (in a "
        f"checkout the extras cuda12 and cuda13: pip install -e '.[cuda12]'). Without an NVIDIA "
        f"GPU, everything runs on NumPy: leave the arrays as they are"
    ) from cause


_INSTALL = (
    "pip install 'cupy-cuda12x[ctk]' (or 13x, as nvidia-smi says) installs CuPy with the matching "
    "libraries and headers of CUDA"
)

#: Marks of a CUDA error, in its type or text; the cause in words; and the fix.
_CURES = (
    (
        ("OutOfMemoryError", "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"),
        "no memory is left on the device",
        "Take a smaller batch or smaller images, or free what other arrays and processes hold: "
        "nvidia-smi lists them, and cupy.get_default_memory_pool().free_all_blocks() returns what "
        "CuPy keeps for later",
    ),
    (
        ("cudaErrorInsufficientDriver", "UnsupportedPtxVersion", "UNSUPPORTED_PTX_VERSION"),
        "the driver is older than the CUDA version that CuPy was built for",
        f"Update the driver, or install the CuPy of the version that nvidia-smi shows: {_INSTALL}",
    ),
    (
        ("NoKernelImageForDevice", "NO_BINARY_FOR_GPU", "invalid value for --gpu-architecture"),
        "this CUDA version does not support the GPU",
        f"Install a newer one: {_INSTALL}",
    ),
    (
        ("open source file", "open include file", "CUDA_PATH"),
        "the compiler NVRTC does not find the headers of CUDA",
        f"{_INSTALL}; or set CUDA_PATH to a toolkit of that version",
    ),
    (
        ("cannot open shared object", "DynamicLibNotFoundError", "undefined symbol", "NOT_FOUND"),
        "a library of CUDA is missing or has another version",
        _INSTALL,
    ),
)


def cuda_error(error: Exception) -> DeviceError | None:
    """A CUDA or CuPy error as a DeviceError with the fix; None for an error of another kind."""
    kind = type(error)
    text = f"{kind.__name__}: {error}"
    for signs, what, cure in _CURES:
        if any(sign in text for sign in signs):
            return DeviceError(f"{what} ({text[:300]}). {cure}")
    if kind.__module__.split(".")[0].startswith("cupy"):
        return DeviceError(
            f"CUDA reports an error ({text[:300]}). After some errors nothing works until the "
            f"process is restarted. The environment variable PVT_REF_OPS=reference computes "
            f"without kernels"
        )
    return None


@contextlib.contextmanager
def explained() -> Generator[None]:
    """Turns errors of CUDA and CuPy into a DeviceError that names the fix."""
    try:
        yield
    except PVTError:
        raise
    except Exception as error:
        if (told := cuda_error(error)) is None:
            raise
        raise told from error
