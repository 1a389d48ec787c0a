"""Trees of records: the one walk over parameters, gradients and caches, and its uses.

A record is a frozen dataclass of arrays, of other records, and of tuples of them; its field names
are the key segments of a checkpoint, so the walk is the key map.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar, dataclass_transform

import numpy as np

from pvt_ref.arrays import (
    Array,
    array_module,
    describe_type,
    dtype_name,
    import_cupy,
    is_array,
    is_cupy,
    is_foreign,
    library_and_dtype,
)
from pvt_ref.errors import ArrayTypeError, DeviceError, shown

_T = TypeVar("_T")

#: The field of state that is kept from batch to batch and not trained: None in gradients.
BUFFERS = "buffers"


@dataclass_transform(frozen_default=True, eq_default=False)
def record(cls: type[_T]) -> type[_T]:
    """A frozen dataclass with slots, which shows shapes instead of numbers."""
    cls.__repr__ = short_repr
    return dataclass(frozen=True, slots=True, eq=False, repr=False, weakref_slot=True)(cls)


@cache
def _field_names(cls: type) -> tuple[str, ...] | None:
    """The field names of a record or named tuple, in order; None for another class."""
    if is_dataclass(cls):
        return tuple(field.name for field in fields(cls))
    return getattr(cls, "_fields", None) if issubclass(cls, tuple) else None


def branches(tree: Any) -> list[tuple[str, Any]]:
    """Names and values in a record, tuple, list or dict; nothing for anything else."""
    names = _field_names(type(tree))
    if names is not None:
        return [(name, getattr(tree, name)) for name in names]
    if isinstance(tree, tuple | list):
        return [(str(i), branch) for i, branch in enumerate(tree)]
    return list(tree.items()) if isinstance(tree, dict) else []


def map_arrays(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """A copy of a record, tuple, list or dict with f applied to every array in it.

    With several trees of the same structure, f gets the arrays from the same place in each.
    Anything that is not an array stays as it is in the first tree.

    Raises:
        ValueError, KeyError, AttributeError: if another tree differs in lengths, keys or fields.
        ArrayTypeError: if tree holds arrays of a library that :func:`array_module` does not take.
    """
    if is_array(tree):
        return f(tree, *others)
    cls = type(tree)
    names = _field_names(cls)
    if names is not None:
        parts = {n: map_arrays(f, *[getattr(t, n) for t in (tree, *others)]) for n in names}
        return cls(**parts)
    if isinstance(tree, tuple | list):
        return cls(map_arrays(f, *branch) for branch in zip(tree, *others, strict=True))
    if isinstance(tree, dict):
        return {key: map_arrays(f, value, *(o[key] for o in others)) for key, value in tree.items()}
    if is_foreign(tree):
        raise ArrayTypeError(
            f"expected arrays that NumPy code computes with, got {describe_type(tree)}"
        )
    return tree


def named_arrays(tree: Any, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """Key and array of every leaf of a record, in field order; the arrays, not copies.

    A field called buffers adds no segment: a layer's buffers have the same prefix as its weights.
    """
    waiting = [(prefix, tree)]
    while waiting:
        prefix, tree = waiting.pop()
        if is_array(tree):
            yield prefix, tree
        elif isinstance(tree, tuple) or is_dataclass(tree):
            inner = [(_joined(prefix, name), branch) for name, branch in reversed(branches(tree))]
            waiting.extend(inner)


def _joined(prefix: str, name: str) -> str:
    if name == BUFFERS:
        return prefix
    return f"{prefix}.{name}" if prefix else name


def named_records(tree: Any, prefix: str = "") -> dict[int, str]:
    """The key prefix of every record, tuple and array of a tree, by its identity."""
    if tree is None:
        return {}
    names = {id(tree): prefix}
    if not is_array(tree):
        for name, branch in branches(tree):
            names |= named_records(branch, _joined(prefix, name))
    return names


def map_named(f: Callable[[str, Array], Any], tree: Any, prefix: str = "") -> Any:
    """A copy of a record with every array replaced by ``f(key, array)``."""
    results = iter([f(key, x) for key, x in named_arrays(tree, prefix)])
    return map_arrays(lambda _: next(results), tree)  # both walk the record in field order


def without_buffers(tree: Any) -> Any:
    """The trained weights: the same record, with None in place of its buffers."""
    return replace(tree, **{BUFFERS: None}) if hasattr(tree, BUFFERS) else tree


def first_array(tree: Any) -> Array:
    """The first array of a record; it has the device and dtype of all."""
    return next(named_arrays(tree))[1]


def zeros_like(tree: Any) -> Any:
    """A record of the same type with zeros: the gradient of weights that a pass did not use."""
    return map_arrays(lambda x: array_module(x).zeros_like(x), tree)


def short_repr(self: Any) -> str:
    """Shapes and sums, not numbers: ``LinearParams(weight (64, 3) float32, bias None)``.

    For nested records ``BlockParams(49,984 numbers in 16 arrays, float32, numpy)``.
    """
    named = branches(self)
    name = type(self).__name__
    if any(is_dataclass(value) or isinstance(value, tuple | list | dict) for _, value in named):
        return f"{name}({describe_arrays(self)})"
    parts = [
        f"{key} {tuple(x.shape)} {dtype_name(x)}"
        if is_array(x) and hasattr(x, "shape")
        else f"{key} {shown(x)}"
        for key, x in named
    ]
    return f"{name}({', '.join(parts)})"


def describe_arrays(tree: Any) -> str:
    """``"3,254,378 numbers in 139 arrays, float32, numpy"``, with all dtypes and libraries."""
    arrays = [x for _, x in named_arrays(tree)]
    count = f"{sum(math.prod(x.shape) for x in arrays):,} numbers in {len(arrays)} arrays"
    dtypes = sorted({dtype_name(x) for x in arrays})
    homes = sorted({library_and_dtype(x).replace(f" {dtype_name(x)}", "") for x in arrays})
    return ", ".join([count, *dtypes, *homes])


def to_numpy(tree: Any) -> Any:
    """Copies every CuPy array in tree to the host; NumPy arrays are returned as they are.

    Args:
        tree: an array, or arrays in a record (parameters, gradients), tuple, list or dict.

    Returns:
        The same structure with NumPy arrays. Anything that is not an array stays as it is.

    Raises:
        ArrayTypeError: if tree holds arrays of another kind, such as PyTorch's tensors.
    """
    return map_arrays(lambda a: a.get() if is_cupy(a) else np.asarray(a), tree)


def to_device(tree: Any, device: str = "cuda") -> Any:
    """Copies every array in tree to a device.

    Args:
        tree: as for :func:`to_numpy`; also a Model.
        device: ``"cuda"`` (the current CUDA device), ``"cuda:1"`` and so on, or ``"cpu"``. CuPy
            computes on the current one; for another, wrap calls in ``with cupy.cuda.Device(1):``.

    Returns:
        The same structure with CuPy arrays, or with NumPy arrays for ``"cpu"``.

    Raises:
        DeviceError: if there is no such device; it says what was found and what to install.
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


def digest(state: Mapping[str, np.ndarray], stated: Any) -> str:
    """SHA-256 of plain values and every tensor's name, dtype, shape and bytes; order is ignored."""
    sha256 = hashlib.sha256()
    sha256.update(json.dumps(stated, sort_keys=True).encode())
    for key, x in sorted(state.items()):  # no key comes twice, so no arrays are compared
        sha256.update(json.dumps([key, x.dtype.name, x.shape]).encode())  # also says how many bytes
        little = x.astype(x.dtype.newbyteorder("<"), copy=False)
        sha256.update(np.ascontiguousarray(little).data)
    return sha256.hexdigest()
