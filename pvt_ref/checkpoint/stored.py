"""Tensors in a PyTorch file: their place and dtype, and how they become arrays."""

import contextlib
import math
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from pvt_ref.errors import CheckpointError, shown

#: Classes of typed storages, and their dtypes.
STORAGE_DTYPES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16"},
    **{"BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32"},
    **{"ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8"},
    **{"BoolStorage": "bool", "UntypedStorage": "uint8"},  # bytes; the tensor has the dtype
    **{"ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64"},
    **{f"{x}Storage": x.lower() for x in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")},
}
_FLOATS_8 = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
#: Bytes of the dtypes that NumPy lacks. Narrow floats become float32, which holds all of them.
_NARROW_FLOATS = {"bfloat16": 2, **{f"float8_{name}": 1 for name in _FLOATS_8}}
_SIZES = {**_NARROW_FLOATS, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
_NUMPY_DTYPES = {"uint16", "uint32", "uint64", *STORAGE_DTYPES.values()} - _SIZES.keys()
MAX_RANK = 8  # more than any weight has, fewer than NumPy's limit
#: Raised when a value has another kind than expected.
UNEXPECTED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
#: Raised when arbitrary bytes are read as a zip, a pickle or numbers. Not all of Exception, because
#: a signal handler can raise any.
UNREADABLE = (
    *(*UNEXPECTED, EOFError, OSError),
    *(RuntimeError, Warning),  # of zipfile, or of too deep recursion; of pickletools
    *(struct.error, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error),
)
#: Advice for messages: readable formats, packing a folder again, and loading that runs nothing.
NEEDED = "PVT's weights are needed as PyTorch or safetensors has them"
PACK = "Load the original, or pack the folder again, from the one above it: zip -0 -r model.pth"
SAFE_LOAD = "state = torch.load(path, weights_only=True, map_location='cpu')"
_CLONED = "torch.save({k: v.clone() for k, v in state.items()}, new_path)"
_COPIES = f"Save copies, with PyTorch: {SAFE_LOAD}; {_CLONED}"


def damaged(what: str) -> CheckpointError:
    """The error for bytes that have changed since they were written."""
    return CheckpointError(
        f"{what}. The likely cause is an interrupted or faulty download or copy: fetch or save the "
        f"file again, and compare its size and checksum with those of the publisher"
    )


class Storage(NamedTuple):
    """A reference to one block of raw numbers."""

    key: str  # in a zip, of the entry under data/
    dtype: str  # its name in NumPy, ml_dtypes or, where neither has it, PyTorch
    numel: int  # of the block
    view: tuple[int, int]  # the part that is used, (first, count)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole block."""
        return self.numel * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that has not been read yet."""

    storage: Storage
    offset: int  # of the first number, in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str  # as in Storage
    negated: bool = False  # PyTorch's negative bit: the values are those stored, times -1
    conjugated: bool = False  # the same for complex conjugates
    unread: str = ""  # why its values cannot be computed from the stored numbers, if they cannot


def itemsize(dtype: str) -> int:
    """Bytes of one number; 1 where it is not known."""
    return np.dtype(dtype).itemsize if dtype in _NUMPY_DTYPES else _SIZES.get(dtype, 1)


class StoredFile(ABC):
    """An open PyTorch file, in either format."""

    tree: Any  # of dicts, lists, tuples, numbers, texts, StoredTensors, and Records for all else
    foreign: tuple[str, ...]  # names of the Records in the tree, sorted; the first 100
    checksummed: bool  # if not, a changed bit in the numbers goes unnoticed
    _size: int
    _order: Literal["<", ">"]

    @abstractmethod
    def _read_block(self, storage: Storage) -> bytes:
        """The whole block, of ``storage.nbytes`` bytes, or CheckpointError."""

    def read(self, tensors: Mapping[str, StoredTensor]) -> dict[str, np.ndarray]:
        """The named tensors as arrays; narrow floats as float32. Raises: CheckpointError."""
        total = sum(math.prod(x.shape) * itemsize(x.dtype) for x in tensors.values())
        if total > self._size:
            what = f"its tensors unpack to {total} bytes, more than the whole file has"
            why = "some overlap in one storage, or are expanded views"
            raise CheckpointError(f"{what} ({self._size}): {why}. {_COPIES}")
        by_block: dict[str, list[str]] = defaultdict(list)  # each is read only once
        for name, x in tensors.items():
            _check(name, x)
            by_block[x.storage.key].append(name)
        arrays = {}
        for names in by_block.values():
            with refuse_damage(f"the storage of {shown(names[0])} is damaged"):
                raw = self._read_block(tensors[names[0]].storage)
            for name in names:
                storage = tensors[name].storage
                if len(raw) != storage.nbytes:
                    needed = f"{storage.numel} numbers of {storage.dtype} need {storage.nbytes}"
                    raise damaged(f"the storage of {shown(name)} has {len(raw)} bytes; {needed}")
                arrays[name] = _cut(raw, tensors[name], self._order)
        return {name: arrays[name] for name in tensors}


def _check(name: str, x: StoredTensor) -> None:
    """Refuses x if NumPy cannot hold it, or if elements lie outside its storage."""
    unread = x.unread
    if not unread and x.dtype not in _NUMPY_DTYPES and x.dtype not in _NARROW_FLOATS:
        unread = f"it is of dtype {shown(x.dtype)}, which NumPy does not have"
    if unread:
        what = f"the values of tensor {shown(name)} cannot be read: {unread}. Save plain floats"
        floats = "what v.dequantize(), v.to_dense() or v.float() makes of each v in state.values()"
        raise CheckpointError(f"{what}, with PyTorch: {SAFE_LOAD}; then torch.save {floats}")
    size = itemsize(x.dtype)
    first, count = (n * itemsize(x.storage.dtype) for n in x.storage.view)
    if sum(x.storage.view) > x.storage.numel or first % size:
        view = f"a view, {x.storage.view}, that reaches outside its {x.storage.numel} numbers"
        raise damaged(f"the storage of {shown(name)} is {view}")
    stored = count // size
    last = x.offset + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True))
    what = f"tensor {shown(name)} (shape {x.shape}, strides {x.strides}, offset {x.offset})"
    if 0 in x.shape:
        raise damaged(f"{what} is empty; no weight is")
    if last >= stored:
        raise damaged(f"{what} reaches outside its storage of {stored} numbers")
    if math.prod(x.shape) > stored:
        raise CheckpointError(f"{what} is an expanded view of {stored} numbers. {_COPIES}")


def _cut(raw: bytes, x: StoredTensor, order: Literal["<", ">"]) -> np.ndarray:
    narrow, size = x.dtype in _NARROW_FLOATS, itemsize(x.dtype)
    stored = np.dtype(f"u{size}" if narrow else x.dtype).newbyteorder(order)
    first = x.storage.view[0] * itemsize(x.storage.dtype) + x.offset * size
    numbers = np.frombuffer(raw, stored, count=(len(raw) - first) // size, offset=first)
    strides = [s * size for s in x.strides]
    view = np.lib.stride_tricks.as_strided(numbers, x.shape, strides, writeable=False)
    array = np.array(view, dtype=stored.newbyteorder("="), order="C")
    if narrow:
        import ml_dtypes

        array = array.view(getattr(ml_dtypes, x.dtype)).astype(np.float32)
    if x.conjugated:
        np.conjugate(array, out=array)
    if x.negated:
        np.negative(array, out=array)
    return array


@contextlib.contextmanager
def refuse_damage(what: str) -> Generator[None]:
    """For code that reads damaged bytes, which raise anything. Raises: CheckpointError instead."""
    try:
        yield
    except CheckpointError:
        raise
    except UNREADABLE as error:
        text = " ".join([f"{type(error).__name__}:", *str(error)[:200].split()])
        raise damaged(f"{what} ({text.removesuffix(':')})") from error
