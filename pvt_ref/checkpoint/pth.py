"""Reading .pth and .bin files, PyTorch's zip format, without PyTorch and without running them.

Such a file is a zip of uncompressed entries under one folder: ``data.pkl``, a pickle of the saved
object in which every tensor is a reference (storage, offset, shape, strides); ``data/0``,
``data/1`` and so on, the raw storages; ``byteorder``; and a few that do not matter here.

A pickle is a program for a small stack machine, and Python's own machine will call whatever the
program names. The machine here knows the instructions that PyTorch writes, names nothing but
tensors, storages, OrderedDict and argparse.Namespace, and makes inert records of those; so there is
nothing to run. It takes memory in proportion to the file, whatever sizes the file claims.

The zip's checksums are verified for everything that is used. (PyTorch does not look at them.)
"""

import math
import pickletools
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple

import ml_dtypes
import numpy as np

from pvt_ref.errors import CheckpointError

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}

_MAX_RANK = 8  # more than any weight has, fewer than NumPy's limit

_DAMAGED = (
    "The likely cause is an interrupted or faulty download or copy: fetch the file again, and "
    "compare its size and checksum with those of the publisher"
)
_RESAVE = (
    "If you trust where it comes from, keep only the weights, with PyTorch: "
    "state = torch.load(path, weights_only=False, map_location='cpu'); torch.save(state['model'], "
    "new_path) (or state['state_dict'], or model.state_dict() where a whole model was saved)"
)


class Storage(NamedTuple):
    """A reference to one entry of raw numbers.

    Attributes:
        key: name of the entry under ``data/``.
        dtype: its name in NumPy, or ``"bfloat16"``.
        numel: how many numbers.
    """

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor that has not been read yet.

    Attributes:
        storage: where its numbers are.
        offset: of the first, in elements.
        shape: its sizes.
        strides: from one to the next along each axis, in elements.
    """

    storage: Storage
    offset: int  # in elements, as strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Its dtype's name in NumPy."""
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes once it is read."""
        return math.prod(self.shape) * _itemsize(self.dtype)


class Record(dict):
    """The fields of an argparse.Namespace, and nothing of its behaviour."""


class PthFile:
    """An open file of PyTorch's zip format.

    Args:
        file: opened in binary mode, seekable; it must stay open while tensors are read.

    Attributes:
        tree: what was saved, with :class:`StoredTensor` for every tensor and :class:`Record` for
            argparse.Namespace.

    Raises:
        CheckpointError: if it is damaged, or holds anything else than data.
    """

    def __init__(self, file: BinaryIO):
        self._size = file.seek(0, 2)
        try:
            self._zip = zipfile.ZipFile(file)
            self._entries = _list_entries(self._zip, self._size)
            self._order: Literal["<", ">"] = self._read_byte_order()
            pickled = self._read_entry("data.pkl")
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # zipfile raises eight kinds on damaged archives
            raise CheckpointError(
                f"not a whole zip archive ({_describe(error)}). {_DAMAGED}"
            ) from error
        self.tree = read_pickle(pickled)

    def read(self, tensors: Mapping[str, StoredTensor]) -> dict[str, np.ndarray]:
        """The named tensors as contiguous arrays of their own.

        Args:
            tensors: some of those in ``tree``, by name.

        Returns:
            Arrays of the tensors' shapes, by the same names, of their dtypes; bfloat16 as float32.

        Raises:
            CheckpointError: if a storage is missing or damaged, or a tensor reaches outside its
                storage.
        """
        total = sum(x.nbytes for x in tensors.values())
        if total > self._size:
            raise CheckpointError(
                f"its tensors unpack to {total} bytes, more than the whole file has "
                f"({self._size}): several overlap in one storage, or one is an expanded view. Save "
                f"copies: torch.save({{k: v.clone() for k, v in state.items()}}, path)"
            )
        by_storage: dict[Storage, list[str]] = defaultdict(list)  # each is read only once
        for name, x in tensors.items():
            _check_bounds(name, x)
            by_storage[x.storage].append(name)
        arrays = {}
        for storage, names in by_storage.items():
            try:
                raw = self._read_entry(f"data/{storage.key}")
            except (CheckpointError, MemoryError):
                raise
            except Exception as error:
                raise CheckpointError(
                    f"the storage of {names[0]} is damaged ({_describe(error)}). {_DAMAGED}"
                ) from error
            if len(raw) != storage.numel * _itemsize(storage.dtype):
                raise CheckpointError(
                    f"the storage of {names[0]} has {len(raw)} bytes; {storage.numel} numbers of "
                    f"{storage.dtype} need {storage.numel * _itemsize(storage.dtype)}. {_DAMAGED}"
                )
            for name in names:
                arrays[name] = _cut(raw, tensors[name], self._order)
        return {name: arrays[name] for name in tensors}

    def _read_byte_order(self) -> Literal["<", ">"]:
        if "byteorder" not in self._entries:
            return "<"  # PyTorch before 2.1 did not say; those files are little-endian
        name = self._read_entry("byteorder")
        if name not in (b"little", b"big"):
            raise CheckpointError(f"byteorder is {name[:20]!r}; it must be b'little' or b'big'")
        return "<" if name == b"little" else ">"

    def _read_entry(self, name: str) -> bytes:
        if name not in self._entries:
            raise CheckpointError(f"the zip archive has no entry {name}. {_DAMAGED}")
        info = self._entries[name]
        data = self._zip.read(info)  # verifies the CRC
        if len(data) != info.file_size:
            raise CheckpointError(f"entry {name} is shorter than announced. {_DAMAGED}")
        return data


def _list_entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by name without the common folder, after checks that need no decompression."""
    infos = archive.infolist()
    pickles = [i.filename for i in infos if i.filename.endswith("/data.pkl")]
    folders = {name.partition("/")[0] for name in pickles}
    if len(folders) != 1 or f"{min(folders)}/data.pkl" not in pickles:
        raise CheckpointError(
            f"a zip archive, but not one that PyTorch wrote: {len(infos)} entries and no data.pkl "
            f"in a folder (first entries: {', '.join(i.filename for i in infos[:3]) or 'none'}). "
            f"A .pth file made by torch.save is needed; is this a .npz, or a folder zipped by hand?"
        )
    prefix = f"{min(folders)}/"
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removeprefix(prefix)
        if name in entries:
            raise CheckpointError(f"entry {name} comes twice in the zip archive. {_DAMAGED}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(
                f"entry {name} is compressed; torch.save never compresses. Unzip the archive and "
                f"zip it again with no compression (zip -0), or save the weights again"
            )
        entries[name] = info
    if sum(info.file_size for info in infos) > size:  # also keeps every later read below this
        raise CheckpointError(f"the zip's entries claim more bytes than the file has. {_DAMAGED}")
    for info in infos:
        archive.open(info).close()  # the name stands twice in the file: both must agree
    return entries


def _check_bounds(name: str, x: StoredTensor) -> None:
    """Raises CheckpointError unless every element of x lies in its storage."""
    numel = math.prod(x.shape)
    last = x.offset + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True))
    if not numel:
        raise CheckpointError(
            f"tensor {name} of shape {x.shape} is empty; no weight is. {_DAMAGED}"
        )
    if last >= x.storage.numel:
        raise CheckpointError(
            f"tensor {name} (shape {x.shape}, strides {x.strides}, offset {x.offset}) reaches "
            f"outside its storage of {x.storage.numel} numbers. {_DAMAGED}"
        )
    if numel > x.storage.numel:
        raise CheckpointError(
            f"tensor {name} of shape {x.shape} is an expanded view of {x.storage.numel} numbers. "
            f"Save a copy: torch.save({{k: v.clone() for k, v in state.items()}}, path)"
        )


def _cut(raw: bytes, x: StoredTensor, order: Literal["<", ">"]) -> np.ndarray:
    """One tensor out of the bytes of its storage."""
    stored = np.dtype("uint16" if x.dtype == "bfloat16" else x.dtype).newbyteorder(order)
    view = np.lib.stride_tricks.as_strided(
        np.frombuffer(raw, stored, offset=x.offset * stored.itemsize),
        x.shape,
        [s * stored.itemsize for s in x.strides],
        writeable=False,
    )
    array = np.array(view, dtype=stored.newbyteorder("="), order="C")
    return array.view(ml_dtypes.bfloat16).astype(np.float32) if x.dtype == "bfloat16" else array


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# --- the stack machine -------------------------------------------------------------------------

_ORDERED_DICT = "collections.OrderedDict"
_NAMESPACE = "argparse.Namespace"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"


class Global(NamedTuple):
    """A name that the pickle may use. Only a label: nothing is imported.

    Attributes:
        name: module and name, joined by a dot.
    """

    name: str


_GLOBALS = {
    name: Global(name)
    for name in (
        _ORDERED_DICT,
        _NAMESPACE,
        _TENSOR,
        _PARAMETER,
        *(f"torch.{storage}" for storage in _STORAGE_DTYPES),
    )
}


def read_pickle(data: bytes) -> Any:
    """What a pickle written by torch.save says, by the rules in the head of this file.

    Args:
        data: the bytes of ``data.pkl``.

    Returns:
        Dicts, lists, tuples, numbers, texts, and :class:`StoredTensor` for every tensor.

    Raises:
        CheckpointError: if it names anything that is not allowed, or is damaged.
    """
    try:
        return _run(data)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # a wrong program can fail at any instruction, in any way
        raise CheckpointError(
            f"its pickle cannot be read ({_describe(error)}). {_DAMAGED}"
        ) from error


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each open MARK
    memo: dict[int, Any] = {}
    arg: Any
    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "BININT1" | "BININT2" | "BININT" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(arg)
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                items = [stack.pop() for _ in range(count)]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                items = [stack.pop()]
                _expect(stack[-1], list).extend(items)
            case "APPENDS":
                items, stack = stack, below.pop()
                _expect(stack[-1], list).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, below.pop()
                _set_items(stack[-1], items)
            case "GLOBAL":
                stack.append(_find(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_find(module, name))
            case "BINPERSID":
                stack.append(_make_storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(_make(_expect(function, Global), _expect(args, tuple)))
            case "BUILD":
                fields = _expect(stack.pop(), dict)
                if isinstance(_expect(stack[-1], dict), Record):
                    stack[-1].update(fields)  # an OrderedDict's attributes are not needed
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case _:
                raise CheckpointError(
                    f"its pickle holds the instruction {opcode.name}, which torch.save does not "
                    f"write for weights. {_RESAVE}"
                )
    raise CheckpointError(f"its pickle has no end. {_DAMAGED}")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in the place of {kind.__name__}")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    _expect(target, dict)
    if isinstance(target, Record) or len(items) % 2:
        raise TypeError("items for something that takes none")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None):
            # nested tuples, for one, can take exponential time to hash
            raise CheckpointError(
                f"its pickle has a {type(key).__name__} as a dict key; weights have names. "
                f"{_RESAVE}"
            )
        target[key] = value


def _find(module: Any, name: Any) -> Global:
    full = f"{_expect(module, str)}.{_expect(name, str)}"
    if full not in _GLOBALS:
        raise CheckpointError(
            f"its pickle asks for {full!r}, which is refused; nothing was run. Allowed are "
            f"tensors, their storages, collections.OrderedDict, argparse.Namespace, and plain "
            f"dicts, lists, numbers and strings. A training checkpoint or a whole pickled model "
            f"can hold other objects, and so can an attack. {_RESAVE}"
        )
    return _GLOBALS[full]


def _make(function: Global, args: tuple[Any, ...]) -> Any:
    if function.name == _ORDERED_DICT and not args:
        return {}
    if function.name == _NAMESPACE and not args:
        return Record()
    if function.name == _TENSOR and len(args) in (6, 7):
        storage, offset, shape, strides = args[:4]
        _check_counts((offset,))
        _check_counts(_expect(shape, tuple))
        _check_counts(_expect(strides, tuple))
        if len(shape) != len(strides) or len(shape) > _MAX_RANK:
            raise ValueError(f"shape {len(shape)} and strides {len(strides)} long")
        return StoredTensor(_expect(storage, Storage), offset, shape, strides)
    if function.name == _PARAMETER and len(args) == 3:
        return _expect(args[0], StoredTensor)
    raise TypeError(f"{function.name} with {len(args)} arguments")


def _make_storage(reference: Any) -> Storage:
    kind, storage_type, key, _, numel = _expect(reference, tuple)
    dtype = _STORAGE_DTYPES.get(_expect(storage_type, Global).name.removeprefix("torch."))
    if kind != "storage" or dtype is None:
        raise ValueError(f"a reference to {storage_type.name} that is not a storage")
    _check_counts((numel,))
    return Storage(_expect(key, str), dtype, numel)


def _check_counts(values: tuple[Any, ...]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise ValueError("a size, stride or offset that is not a whole number")
