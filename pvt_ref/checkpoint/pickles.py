"""Reading the pickles of PyTorch's files without running them.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the
program names. In this machine a name is only a label: nothing is imported and nothing is called.
Labels of tensors and storages become records of where the numbers are, OrderedDict and defaultdict
become dicts, and every other label becomes an inert :class:`Record`. A file that names something
out of place beside weights (``os.system``) is refused, though it could do no harm.

Every instruction has a price, about the bytes of memory that it can take, and a pickle may spend
:data:`BYTES_PER_BYTE` for each of its bytes. So memory and time grow with the bytes really read.
"""

import io
import pickletools
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from pvt_ref.checkpoint import stored
from pvt_ref.checkpoint.stored import MAX_RANK, Storage, StoredTensor, damaged
from pvt_ref.errors import CheckpointError, shown

#: The price that instructions may spend for each byte of the pickle, beside FREE_BYTES.
BYTES_PER_BYTE = 48  # PyTorch's own files spend 18 to 33
FREE_BYTES = 2**20
_MAX_FOREIGN, _MAX_NAME = 100, 200

_BUILTINS = "bytearray bytes complex frozenset object set"
_DANGEROUS = "__import__ breakpoint compile eval exec execfile open"
_DICTS = {"collections.OrderedDict", "collections.defaultdict"}
_TENSOR_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
#: Names of plain data, which need no mention.
_PLAIN = {
    *("argparse.Namespace", "collections.Counter", "copyreg._reconstructor", "_codecs.encode"),
    *("torch.nn.parameter.UninitializedParameter", "torch.serialization._get_layout", *_DICTS),
    *_TENSOR_CLASSES,
    *(f"builtins.{name}" for name in _BUILTINS.split()),
}
_PROGRAM_MODULES = {"nt", "os", "posix", "pty", "runpy", "shutil", "socket", "subprocess", "sys"}
_PROGRAMS = {
    *("_io.open", "importlib.import_module", "io.open", "webbrowser.open"),
    *(f"builtins.{name}" for name in _DANGEROUS.split()),
}
#: The module's name up to protocol 2.
_PYTHON_2 = {"__builtin__": "builtins", "commands": "subprocess", "copy_reg": "copyreg"}


@dataclass(frozen=True, slots=True)
class Global:
    """A name in the pickle, ``"module.name"``. Only a label: nothing is imported."""

    name: str


@dataclass(frozen=True, slots=True)
class Record:
    """An object that was not made: the name of its class or of its factory."""

    name: str


class Pickle(NamedTuple):
    """The content of a pickle."""

    tree: Any  # as StoredFile's
    foreign: tuple[str, ...]  # names of other objects than data and tensors, sorted; the first 100
    storages: dict[str, Storage]  # by key, the first reference to each block of numbers


def read_pickle(file: BinaryIO) -> Pickle:
    """Reads a pickle of torch.save at the file's position. Raises: CheckpointError."""
    with stored.refuse_damage("its pickle cannot be read"):  # a damaged one can fail anywhere
        return _Machine(file)._run()


def whole_object(name: str, where: str) -> CheckpointError:
    """The refusal of a file that has, at where, an object called name in place of weights."""
    if name.startswith("numpy.") and "multiarray." in name:
        tensors = "torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, new_path)"
        return CheckpointError(
            f"no tensors in it: {where} is a NumPy array, which only running the file would make; "
            f"nothing was run. Save the arrays as tensors: {tensors}. If you have only this file "
            f"and trust its source: arrays = torch.load(path, weights_only=False)"
        )
    return CheckpointError(
        f"no weights in it: {where} is a {shown(name)}, an object with code of its own, such as a "
        f"whole pickled model; nothing was run. Safe: look for the state dict or a .safetensors "
        f"file from the same publisher. If there is none, and you trust the source, PyTorch can "
        f"run the file where that class can be imported: model = torch.load(path, "
        f"weights_only=False, map_location='cpu'); torch.save(model.state_dict(), new_path)"
    )


_CONTAINER, _TENSOR = 80, 144  # with the slot on the stack
_ITEM = 96  # of a dict, while it grows
_VALUE = 64  # a number or a short text, beside its bytes
_PRICES = {  # every other instruction is a _VALUE
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "MARK", "LIST", "DICT", "TUPLE"), _CONTAINER),
    **dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3"), _CONTAINER - 16),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINPERSID"), 96),
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BININT1", "EMPTY_TUPLE", "DUP"), 16),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET", "BINPUT", "LONG_BINPUT", "MEMOIZE"), 16),
    **dict.fromkeys(("APPEND", "APPENDS", "REDUCE", "NEWOBJ", "EMPTY_SET"), 16),
    **dict.fromkeys(("SETITEM", "SETITEMS", "BUILD", "POP", "STOP", "PROTO", "FRAME"), 0),
}


class _NoMoreThanThereIs:
    """A file whose read allocates only for bytes that exist, whatever length is claimed."""

    def __init__(self, file: BinaryIO):
        self._read, self.tell, self.readline = file.read, file.tell, file.readline
        place = file.tell()
        self._end = file.seek(0, 2)
        file.seek(place)

    def read(self, count: int) -> bytes:
        return self._read(count if count < 512 else min(count, self._end - self.tell()))


class _Machine:
    def __init__(self, file: BinaryIO):
        self.file: Any = file if isinstance(file, io.BytesIO) else _NoMoreThanThereIs(file)
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open MARK
        self.memo: list[Any] = []
        self.spent = 0
        self.start = file.tell()
        self.read = 0  # bytes of the pickle
        self.labels: dict[str, Global] = {}
        self.records: dict[str, Record] = {}
        self.storages: dict[str, Storage] = {}

    def _spend(self, price: int) -> None:
        self.spent += price
        if self.spent > FREE_BYTES + BYTES_PER_BYTE * self.read:
            what = "its pickle would unpack to more than"
            raise damaged(f"{what} {BYTES_PER_BYTE} times its own size and exhaust memory")

    def _run(self) -> Pickle:
        arg: Any
        for opcode, arg, position in pickletools.genops(self.file):
            name = opcode.name
            self.read = (position or 0) - self.start + 1
            self._spend(_PRICES.get(name, _VALUE))
            stack = self.stack
            match name:
                case "LONG_BINPUT" | "BINPUT" | "PUT" | "MEMOIZE":
                    self._remember(len(self.memo) if arg is None else arg)
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(self.memo[arg])
                    if stack[-1] is _UNSET:
                        raise ValueError(f"nothing was put into memo slot {arg}")
                case _ if name in _VALUES:
                    stack.append(arg)  # pickletools decodes Python 2's strings as latin-1
                case "MARK":
                    self.below.append(stack)
                    self.stack = []
                case "TUPLE" | "LIST":
                    items = self._pop_mark()
                    self.stack.append(tuple(items) if name == "TUPLE" else items)
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(name[-1]))]
                    stack.append(tuple(reversed(items)))
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self._make(function, _expect(args, tuple)))
                case "BINPERSID":
                    stack.append(self._refer(stack.pop()))
                case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                    stack.append(_CONSTANTS[name])
                case "EMPTY_LIST" | "EMPTY_DICT":
                    stack.append([] if name == "EMPTY_LIST" else {})
                case "SETITEM" | "SETITEMS":
                    items = self._pop_mark() if name[-1] == "S" else [stack.pop(-2), stack.pop()]
                    self._set_items(self.stack[-1], items)
                case "APPEND" | "APPENDS" | "ADDITEMS":
                    items = self._pop_mark() if name[-1] == "S" else [stack.pop()]
                    if not isinstance(self.stack[-1], Record):
                        _expect(self.stack[-1], list).extend(items)
                case "GLOBAL":
                    stack.append(self._label(*arg.split(" ", 1)))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(self._label(module, attribute))
                case "BUILD":
                    stack.pop()  # attributes are not needed
                    _expect(stack[-1], Record | dict)
                case "STOP":
                    names = sorted({x[:_MAX_NAME] for x in self.labels if not is_known(x)})
                    return Pickle(stack.pop(), tuple(names[:_MAX_FOREIGN]), self.storages)
                # written by protocols other than 2, and for objects of Python 2
                case "PROTO" | "FRAME":
                    pass
                case "DICT":
                    items = self._pop_mark()
                    self.stack.append({})
                    self._set_items(self.stack[-1], items)
                case "EMPTY_SET":
                    stack.append(self._record("builtins.set"))
                case "FROZENSET":
                    self._pop_mark()
                    self.stack.append(self._record("builtins.frozenset"))
                case "OBJ" | "INST":
                    args = self._pop_mark()
                    function = args.pop(0) if name == "OBJ" else self._label(*arg.split(" ", 1))
                    self.stack.append(self._make(function, tuple(args)))
                case "NEWOBJ_EX":
                    _, args, function = stack.pop(), stack.pop(), stack.pop()
                    stack.append(self._record(_expect(function, Global).name))
                case "POP" if stack:
                    stack.pop()
                case "POP" | "POP_MARK":
                    self._pop_mark()
                case "DUP":
                    stack.append(stack[-1])
                case _:  # EXT1 and so on, PERSID, NEXT_BUFFER: their meaning is not in the file
                    raise damaged(f"its pickle has the instruction {name}, unknown to torch.save")
        raise damaged("its pickle has no end")

    def _remember(self, slot: int) -> None:
        memo = self.memo
        if slot >= len(memo):
            self._spend(12 * (slot - len(memo)))  # picklers count up, some from 1 on
            memo.extend([_UNSET] * (slot - len(memo) + 1))
        memo[slot] = self.stack[-1]

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise TypeError("a key without a value")
        if isinstance(target, Record):
            return
        _expect(target, dict)
        self._spend(_ITEM * (len(items) // 2))
        for key, value in zip(items[::2], items[1::2], strict=True):
            name = _as_text(key, len(target))
            if name in target:
                raise damaged(f"its pickle has the key {shown(name)} twice")
            target[name] = value

    def _label(self, module: Any, attribute: Any) -> Global:
        module, attribute = _expect(module, str), _expect(attribute, str)
        if len(module) + len(attribute) > 2 * _MAX_NAME:
            raise ValueError("a name that is longer than any class has")
        module = _PYTHON_2.get(module, module)
        name = f"{module}.{attribute}"
        if name not in self.labels:
            if module.partition(".")[0] in _PROGRAM_MODULES or name in _PROGRAMS:
                raise CheckpointError(
                    f"its pickle asks for {shown(name)}, which is refused; nothing was run. No "
                    f"weights need it: the likely cause is an attack. Do not open this file with "
                    f"torch.load(weights_only=False) or pickle; get weights from their publisher"
                )
            self._spend(2 * len(name) + 2 * _ITEM)
            self.labels[name] = Global(name)
        return self.labels[name]

    def _make(self, function: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(function, Record):  # stands for a function that was not looked up
            return function
        name = _expect(function, Global).name
        if name in _DICTS:  # empty, or with the pairs that Python 2 wrote
            self._spend(_CONTAINER)
            result: dict[str, Any] = {}
            (pairs,) = args[name.endswith("defaultdict") :] or ((),)  # without the factory
            for pair in _expect(pairs, list | tuple):
                key, value = _expect(pair, list | tuple)
                self._set_items(result, [key, value])
            return result
        if name.startswith(_REBUILD):
            self._spend(_TENSOR)
            return _make_tensor(name.removeprefix(_REBUILD), args) or self._record(name)
        if name == "torch._tensor._rebuild_from_type_v2" and len(args) == 4:
            inner, kind, inner_args, _ = args
            x = self._make(inner, _expect(inner_args, tuple))
            return x if _expect(kind, Global).name in _TENSOR_CLASSES else self._record(kind.name)
        if name == "copyreg._reconstructor" and args and isinstance(args[0], Global):
            name = args[0].name
        return self._record(name)

    def _record(self, name: str) -> Record:
        return self.records.setdefault(name, Record(name))

    def _refer(self, reference: Any) -> Any:
        """A storage from its persistent id, or the class that a whole pickled model refers to."""
        kind, *fields = _expect(reference, tuple)
        if kind == "module":
            return _expect(fields[0], Global)
        storage_type, key, _, numel, *rest = fields
        name = _expect(storage_type, Global).name.rpartition(".")[2]
        view = rest[0] if rest else None
        _, first, count = (None, 0, numel) if view is None else _expect(view, tuple)
        if kind != "storage" or len(rest) > 1 or not name.endswith("Storage"):
            raise ValueError("a reference to something other than a storage")
        dtype = stored.STORAGE_DTYPES.get(name) or name[:_MAX_NAME]
        view = (_count(first), _count(count))
        storage = Storage(_expect(key, str), dtype, _count(numel), view)
        if storage.key not in self.storages:
            self._spend(_ITEM)
            self.storages[storage.key] = storage
        return storage


_UNSET = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING"),
    *("SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_REBUILD = "torch._utils._rebuild_"


def is_known(name: str) -> bool:
    """Whether a name is of plain data, of a tensor or of a part of one."""
    torch = name.startswith("torch.") and (name.count(".") == 1 or name.endswith("Storage"))
    rebuilt = name.startswith((_REBUILD, "torch._tensor._rebuild_from_type"))
    return torch or rebuilt or name in _PLAIN


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in place of {getattr(kind, '__name__', kind)}")
    return value


def _as_text(key: Any, place: int) -> str:
    """A dict's key as text: other hashes could be made to collide or to take forever."""
    if isinstance(key, str):
        return key
    if key is None or isinstance(key, float | bool) or (isinstance(key, int) and abs(key) < 2**64):
        return repr(key)
    return f"<{type(key).__name__} {place}>"


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError("a size, stride or offset that is not a whole number")
    return value


def _make_tensor(how: str, args: tuple[Any, ...]) -> StoredTensor | None:
    """The tensor that torch._utils._rebuild_<how> makes from args; None for unknown kinds."""
    dtype, rest = None, []
    match how, args:
        case ("parameter", (data, _, _)) | ("parameter_with_state", (data, _, _, _)):
            return _expect(data, StoredTensor)
        case "device_tensor_from_cpu_tensor", (data, dtype, _, _):  # XLA's
            return data if _dtype(dtype) == _expect(data, StoredTensor).dtype else None
        case "tensor", (storage, offset, shape, strides):
            pass
        case "tensor_v2", (storage, offset, shape, strides, _, _, *rest) if len(rest) < 2:
            pass
        case "tensor_v3", (storage, offset, shape, strides, _, _, dtype, *rest) if len(rest) < 2:
            pass
        case "qtensor", (storage, offset, shape, strides, _, _, _):
            pass
        case (("tensor" | "tensor_v2" | "tensor_v3" | "parameter"), _):
            raise TypeError(f"_rebuild_{how} with {len(args)} arguments")
        case _:
            return None
    _expect(storage, Storage)
    dtype = _dtype(dtype) if how == "tensor_v3" else storage.dtype
    if not len(_expect(shape, tuple)) == len(_expect(strides, tuple)) <= MAX_RANK:
        raise ValueError(f"{len(shape)} axes and {len(strides)} strides")
    shape, strides = (tuple(map(_count, x)) for x in (shape, strides))
    bits = _expect(rest[0], dict) if rest and rest[0] is not None else {}
    unread = "it is quantized" if how == "qtensor" else _strange(bits, dtype)
    where = (storage, _count(offset), shape, strides, dtype)
    return StoredTensor(*where, "neg" in bits, "conj" in bits, unread)


def _dtype(value: Any) -> str:
    return _expect(value, Global).name.removeprefix("torch.")[:_MAX_NAME]


def _strange(bits: dict[str, Any], dtype: str) -> str:
    """Describes metadata of a tensor that are unknown here; empty if there are none."""
    for name, value in bits.items():
        if name not in ("neg", "conj") or value is not True:
            return f"it has {shown(name)} in its metadata, which is not known here"
    if "conj" in bits and not dtype.startswith("complex"):
        return f"it has the conjugate bit, and is of dtype {dtype}"
    if "neg" in bits and dtype == "bool":
        return "it has the negative bit, and is of dtype bool"
    return ""
