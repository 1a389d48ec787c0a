"""PyTorch's files: objects beside the weights, other kinds of tensors, archives of other kinds."""

import argparse
import collections
import contextlib
import datetime
import functools
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from loose import loose
from test_checkpoint import TINY, as_torch, random_state, refusal

from pvt_ref import to_state_dict
from pvt_ref.checkpoint import load, pickles
from pvt_ref.checkpoint.pickles import Record
from pvt_ref.checkpoint.pth import open_pth
from pvt_ref.errors import CheckpointError

FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def write(path, tree, new=True, **options):
    torch.save(tree, path, _use_new_zipfile_serialization=new, **options)
    return path


def reread(path, name="x"):
    """The tensor of that name, or why it cannot be read."""
    with path.open("rb") as file:
        opened = open_pth(file)
        return opened.read({name: opened.tree[name]})[name]


def stored(path):
    with path.open("rb") as file:
        return open_pth(file)


@contextlib.contextmanager
def module(name, **members):
    """A module that is there while a file is written, and gone when it is read."""
    made = types.ModuleType(name)
    for key, member in members.items():
        member.__module__ = name
        setattr(made, key, member)
    sys.modules[name] = made
    try:
        yield
    finally:
        del sys.modules[name]


class HistoryBuffer:  # as MMEngine's: an array, and functions of its own class
    def __init__(self):
        self.log = np.arange(3.0)
        self.methods = {"mean": HistoryBuffer.mean}

    def mean(self):
        return self.log.mean()


class ConfigDict(dict):
    pass


class Colour:
    __slots__ = ("red",)


# --- objects beside the weights ------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_beside_the_weights_are_inert_and_named(tmp_path, protocol, new):
    state = random_state(TINY)
    colour = Colour()
    colour.red = 1
    HistoryBuffer.__qualname__, ConfigDict.__qualname__ = "HistoryBuffer", "ConfigDict"
    with module("some_engine", HistoryBuffer=HistoryBuffer, ConfigDict=ConfigDict, Colour=Colour):
        tree = {
            "model": as_torch(state),
            "message_hub": {"log_scalars": collections.OrderedDict(loss=HistoryBuffer())},
            "cfg": ConfigDict(a=ConfigDict(b=[1, 2])),
            "list": [colour, {1, 2}, frozenset("ab"), b"bytes", bytearray(b"ab"), 1j, 2**70, -1.5],
            "scalar": np.float64(0.5),
            "dtypes": [np.dtype("f4"), torch.float32, torch.Size((2, 3)), torch.device("cpu")],
            "when": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
            "where": pathlib.PurePosixPath("/tmp"),
            "partial": functools.partial(print, 1),
            "best": collections.defaultdict(list, a=[1]),
            "counter": collections.Counter("ab"),
            "deque": collections.deque([1, 2]),
            "range": range(3),
            "args": argparse.Namespace(lr=0.1),
            (1, "tuple"): None,
            7: "seven",
        }
        path = write(tmp_path / "x.pth", tree, new, pickle_protocol=protocol)
    model = load(path, TINY)
    for key, x in to_state_dict(model.params).items():
        assert x.tobytes() == state[key].tobytes(), key
    opened = stored(path)
    if protocol < 4:
        assert "builtins.getattr" in opened.foreign  # a function of a class
    assert {
        "builtins.print",
        "collections.deque",
        "datetime.datetime",
        "functools.partial",
        "numpy.dtype",
        "pathlib.PurePosixPath",
        "some_engine.ConfigDict",
        "some_engine.HistoryBuffer",
    } <= set(opened.foreign)
    assert list(opened.foreign) == sorted(opened.foreign)
    assert "argparse.Namespace" not in opened.foreign
    assert opened.tree["cfg"] == Record("some_engine.ConfigDict")
    assert opened.tree["args"] == Record("argparse.Namespace")
    assert opened.tree["best"] == {"a": [1]}
    assert opened.tree["message_hub"]["log_scalars"]["loss"].name == "some_engine.HistoryBuffer"
    assert opened.tree["7"] == "seven"
    assert opened.tree["list"][-2:] == [2**70, -1.5]
    assert not hasattr(opened.tree["cfg"], "shape")


class RunsOnLoad:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def calls(witness):
    """Ways to touch a file while a pickle is being loaded."""
    write_it = f"open({str(witness)!r}, 'w').close()"
    yield os.system, (f"touch {witness}",)
    yield eval, (write_it,)
    yield exec, (write_it,)
    yield __import__, ("antigravity",)
    yield open, (str(witness), "w")
    yield subprocess.check_output, (["touch", str(witness)],)
    yield os.mkdir, (str(witness),)


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("number", range(7))
def test_a_file_that_asks_for_a_program_is_refused_by_name(tmp_path, number, protocol, new):
    witness = tmp_path / "witness"
    call = list(calls(witness))[number]
    nested = {"a": [RunsOnLoad(functools.partial, (RunsOnLoad(*call),))]}
    tree = {"model": as_torch(random_state(TINY)), "hooks": nested}
    message = refusal(write(tmp_path / "evil.pth", tree, new, pickle_protocol=protocol))
    assert f"{call[0].__module__.removeprefix('_')}.{call[0].__name__}" in message
    assert "nothing was run" in message
    assert "weights_only=False)" in message.partition("Do not open")[2]
    assert not witness.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_not_known_as_a_program_is_inert(tmp_path, protocol):
    witness = tmp_path / "witness"
    writes = RunsOnLoad(pathlib.Path.touch, (RunsOnLoad(pathlib.Path, (str(witness),)),))
    state = random_state(TINY)
    path = write(
        tmp_path / "x.pth", {"model": as_torch(state), "x": writes}, pickle_protocol=protocol
    )
    load(path, TINY)
    assert isinstance(stored(path).tree["x"], Record)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists()  # it would have worked


@FORMATS
def test_a_whole_object_in_the_place_of_weights(tmp_path, new):
    path = write(tmp_path / "x.pth", torch.nn.Linear(2, 2), new)
    message = refusal(path)
    assert "torch.nn.modules.linear.Linear" in message
    assert message.index("Safe:") < message.index("weights_only=False")
    model = torch.load(path, weights_only=False, map_location="cpu")  # as advised
    write(path, model.state_dict())
    assert stored(path).tree["weight"].shape == (2, 2)


@FORMATS
def test_a_whole_object_in_an_entry(tmp_path, new):
    tree = {"epoch": 3, "args": argparse.Namespace(a=1), "model": torch.nn.Linear(2, 2)}
    message = refusal(write(tmp_path / "x.pth", tree, new))
    assert "the entry 'model' is a 'torch.nn.modules.linear.Linear'" in message
    loop = {"a": {}}
    loop["a"]["b"] = loop
    assert "no weights in it" in refusal(write(tmp_path / "x.pth", loop, new))


def test_the_advice_for_the_oldest_format_works(tmp_path):
    """A tar, as PyTorch before 0.1.10 wrote it, by hand."""

    class Reference(str):
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return str(value) if isinstance(value, Reference) else None

    def pickles_of(*values):
        return b"".join(pickle.dumps(value, 2) for value in values)

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"x": Reference("1")})
    numbers = struct.pack("<q", 2) + np.array([1, 2], "<f4").tobytes()
    sizes = struct.pack("<iiqqq", 1, 0, 2, 1, 0)
    entries = {
        "storages": pickles_of(1, (0, "cpu", torch.FloatStorage)) + numbers + pickles_of([]),
        "tensors": pickles_of(1, (1, 0, torch.FloatTensor)) + sizes,
        "pickle": stream.getvalue(),
    }
    path = tmp_path / "x.pth"
    with tarfile.open(path, "w") as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    message = refusal(path)
    assert "before 0.1.10" in message
    assert "weights_only=True cannot" in message
    with pytest.raises(RuntimeError, match="weights_only"):
        torch.load(path, weights_only=True, map_location="cpu")
    torch.save(torch.load(path, weights_only=False, map_location="cpu"), path)
    assert reread(path).tolist() == [1, 2]


def test_names_are_few_and_short(tmp_path):
    long = "n" * 300
    classes = {f"C{i}": type(f"C{i}", (), {}) for i in range(200)} | {long: type(long, (), {})}
    with module("many", **classes):
        path = write(tmp_path / "x.pth", {"x": torch.ones(1), "y": [c() for c in classes.values()]})
    foreign = stored(path).foreign
    assert len(foreign) == 100
    assert max(map(len, foreign)) <= 200


@pytest.mark.parametrize("protocol", [2, 4])
def test_real_files_stay_far_below_the_bound_of_memory(tmp_path, monkeypatch, protocol):
    state = as_torch(random_state(TINY))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(x) for x in state.values()])
    for group in optimizer.param_groups:
        for x in group["params"]:
            x.grad = torch.ones_like(x)
    optimizer.step()
    tree = {"model": state, "optimizer": optimizer.state_dict(), "args": argparse.Namespace(a=1)}
    path = write(tmp_path / "x.pth", tree, pickle_protocol=protocol)
    monkeypatch.setattr(pickles, "FREE_BYTES", 2**12)
    monkeypatch.setattr(pickles, "BYTES_PER_BYTE", 36)  # really 48
    load(path, TINY)
    monkeypatch.setattr(pickles, "BYTES_PER_BYTE", 5)
    assert "5 times its own size" in refusal(path)


# --- kinds of tensors ----------------------------------------------------------------------------


def tensors():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=rng)
    x[0, 0], x[0, 1], x[0, 2] = float("nan"), float("inf"), -0.0
    z = torch.randn(3, 4, dtype=torch.complex64, generator=rng)
    yield "neg", torch._neg_view(x)
    yield "neg of a slice", torch._neg_view(x)[1:, ::2]
    yield "neg float64", torch._neg_view(x.double())
    yield "neg float16", torch._neg_view(x.half())
    yield "neg bfloat16", torch._neg_view(x[1:].bfloat16())
    yield "neg int64", torch._neg_view(torch.arange(-2, 3))
    yield "conj", z.conj()
    yield "neg conj", torch._neg_view(z.conj())
    yield "imag of conj", z.conj().imag
    yield "transposed", x.t()
    yield "parameter", torch.nn.Parameter(x)
    parameter = torch.nn.Parameter(x)
    loose(parameter).note = "kept by PyTorch"
    yield "parameter with attributes", parameter
    yield "parameter of neg", torch.nn.Parameter(torch._neg_view(x))
    yield "buffer", torch.nn.Buffer(x)
    attributed = x.clone()
    loose(attributed).note = {"a": 1}
    yield "attributes", attributed
    yield "complex128", z.to(torch.complex128)
    for name in ("uint16", "uint32", "uint64", "int8", "uint8", "int16", "int32", "bool"):
        yield name, torch.arange(8).to(getattr(torch, name))
    yield "uint16 view", torch.arange(9).to(torch.uint16)[3::2]
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        yield name, torch.linspace(-3, 3, 9).to(getattr(torch, name))


def same_bits(found, wanted):
    wanted = wanted.detach().resolve_conj().resolve_neg().contiguous()
    if (
        wanted.dtype.itemsize == 1 and wanted.is_floating_point()
    ) or wanted.dtype == torch.bfloat16:
        wanted = wanted.float()
    wanted = wanted.numpy()
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


@FORMATS
@pytest.mark.parametrize("name", [name for name, _ in tensors()])
def test_kinds_of_tensors_have_pytorch_s_values(tmp_path, name, new):
    tensor = dict(tensors())[name]
    path = write(tmp_path / "x.pth", {"x": tensor}, new)
    same_bits(reread(path), tensor)
    if new or tensor.dtype not in torch.storage._new_dtypes():  # which PyTorch cannot read back
        same_bits(reread(path), torch.load(path, weights_only=True)["x"])


class Subclass(torch.Tensor):
    pass


def unreadable():
    x = torch.ones(2, 2)
    yield "sparse", x.to_sparse(), "_rebuild_sparse_tensor"
    yield "sparse csr", x.to_sparse_csr(), "_rebuild_sparse_tensor"
    yield "meta", torch.ones(2, device="meta"), "_rebuild_meta_tensor_no_storage"
    yield "nested", torch.nested.nested_tensor([x, x]), "_rebuild_nested_tensor"
    yield "subclass", x.as_subclass(Subclass), "Subclass"


@FORMATS
@pytest.mark.filterwarnings("ignore")  # PyTorch's, of prototypes
@pytest.mark.parametrize("number", range(5))
def test_tensors_that_are_more_than_their_numbers_are_no_tensors_here(tmp_path, number, new):
    name, tensor, says = list(unreadable())[number]
    if name == "nested" and not new:
        tensor = [tensor]  # as an item of a list
    path = write(tmp_path / "x.pth", {"x": tensor, "model": as_torch(random_state(TINY))}, new)
    load(path, TINY)  # beside the weights it does not matter
    found = stored(path).tree["x"]
    found = found[0] if isinstance(found, list) else found
    assert says in found.name


@FORMATS
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantized_tensors_are_refused_by_name_with_advice_that_works(tmp_path, new, per_channel):
    x = torch.linspace(-1, 1, 6).view(2, 3)
    if per_channel:
        scales, zeros = torch.ones(2).double(), torch.zeros(2).long()
        quantized = torch.quantize_per_channel(x, scales, zeros, 0, torch.qint8)
    else:
        quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    path = write(tmp_path / "x.pth", {"x": quantized, "model": as_torch(random_state(TINY))}, new)
    load(path, TINY)
    with pytest.raises(CheckpointError, match="quantized"):
        reread(path)
    state = torch.load(path, weights_only=True, map_location="cpu")
    write(path, {"x": state["x"].dequantize()})
    assert reread(path).shape == (2, 3)


def test_metadata_that_is_not_known_is_refused(tmp_path):
    path = write(tmp_path / "x.pth", {"x": torch._neg_view(torch.ones(2))})
    change_entry(path, "data.pkl", lambda data: data.replace(b"\x03\0\0\0neg", b"\x03\0\0\0new"))
    with pytest.raises(CheckpointError, match="'new' in its metadata"):
        reread(path)
    path = write(tmp_path / "y.pth", {"x": torch._neg_view(torch.ones(2))})
    change_entry(path, "data.pkl", lambda data: data.replace(b"\x03\0\0\0neg", b"\x04\0\0\0conj"))
    with pytest.raises(CheckpointError, match="conjugate bit"):
        reread(path)


def change_entry(path, name, change):
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for full, data in entries.items():
            archive.writestr(full, change(data) if full.endswith(f"/{name}") else data)


# --- archives ------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_checksums():
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)


def test_a_file_saved_without_checksums(tmp_path):
    state = random_state(TINY)
    with no_checksums():
        path = write(tmp_path / "x.pth", as_torch(state))
    for key, x in to_state_dict(load(path, TINY).params).items():
        assert x.tobytes() == state[key].tobytes(), key
    assert not stored(path).checksummed
    assert stored(write(tmp_path / "y.pth", as_torch(state))).checksummed


def test_one_entry_without_checksum_among_others_is_damage(tmp_path):
    state = random_state(TINY)
    path = write(tmp_path / "x.pth", as_torch(state))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("data/3"))
        crc = zlib.crc32(archive.read(info)).to_bytes(4, "little")
    assert data.count(crc) == 2  # after the entry, and in the table of contents
    path.write_bytes(data.replace(crc, bytes(4)))
    assert "CRC" in refusal(path)


def test_torchscript_and_advice_that_works(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for key, x in as_torch(random_state(TINY)).items():
                self.register_buffer(key.replace(".", "_"), x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    path = tmp_path / "script.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(Model()).save(path)
    message = refusal(path)
    assert "TorchScript" in message
    assert message.index("Safe:") < message.index("torch.jit.load")
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        model = torch.jit.load(path, map_location="cpu")
    write(path, model.state_dict())
    assert len(stored(path).tree) == len(random_state(TINY))


def test_a_packed_archive_and_advice_that_works(tmp_path):
    state = random_state(TINY)
    path = write(tmp_path / "x.pth", as_torch(state))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "there")
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    message = refusal(path)
    assert "compressed" in message
    assert "weights_only=True" in message
    assert "weights_only=False" not in message
    write(path, torch.load(path, weights_only=True, map_location="cpu"))
    assert load(path, TINY)
    folder = tmp_path / "there" / "x"
    assert "zip -0 -r model.pth folder" in refusal(folder / "data.pkl")
    with zipfile.ZipFile(path, "w") as archive:  # what zip -0 -r makes
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    assert load(path, TINY)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    assert "without the folder" in refusal(path)


def zip_of(**entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GGUF\3\0\0\0" + bytes(99), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        (b"\x93NUMPY\1\0" + bytes(99), ".npy"),
        (b"\x1c\0\0\0TFL3" + bytes(99), "TensorFlow Lite"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:" + bytes(999), "ONNX"),
        (bytes(90) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "TensorFlow checkpoint"),
        (b"pickle".ljust(257, b"\0") + b"ustar\x0000" + bytes(249), "before 0.1.10"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip"),
        (b"BZh9" + bytes(99), "bzip2"),
        (b"\xfd7zXZ\0" + bytes(99), "xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "zstd"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(99), "7-Zip"),
        (b"Rar!\x1a\x07" + bytes(99), "RAR"),
        (b"PK\x05\x06" + bytes(18), "empty zip"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "picture"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "picture"),
        (b"%PDF-1.4\n", "PDF"),
        (zip_of(**{"model.weights.h5": b"", "config.json": b"{}"}), "Keras"),
        (zip_of(**{"archive_format": b"pt2"}), "exported program"),
        (zip_of(**{"weights/pvt.pth": b"x"}), "Unzip it and load 'weights/pvt.pth'"),
        (zip_of(**{"a/notes.txt": b"x"}), "not one that PyTorch wrote"),
        (b"\x80\x02]q\x00.", "a bare pickle (a list"),
        (b"\x80\x04}\x94\x8c\x1bStructuredToParameterName@@\x94}\x94s.", "PaddlePaddle"),
        (b"\x80\x02cpaddle.x\nY\n)\x81.", "PaddlePaddle"),
        (b"\x80\x02cposix\nsystem\n.", "'posix.system'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_kinds_of_files_are_named(tmp_path, data, says):
    path = tmp_path / "x.pth"
    path.write_bytes(data)
    message = refusal(path)
    assert says in message
    if "weights_only=False" in message:
        assert "trust" in message.partition("weights_only=False")[0] or "Do not" in message


@pytest.mark.parametrize("name", ["last.pdparams", "table_last.bin"])
def test_paddles_files_are_known_by_name_and_by_a_table_anywhere(tmp_path, name):
    state: dict[str, Any] = {f"linear_{i}.w_0": (f"linear_{i}.w_0", [1.0]) for i in range(9)}
    if name == "table_last.bin":
        state["StructuredToParameterName@@"] = {}
    (tmp_path / name).write_bytes(pickle.dumps(state, 2))
    assert "PaddlePaddle" in refusal(tmp_path / name)


def test_the_folder_of_an_unpacked_file_is_known(tmp_path):
    torch.save(as_torch(random_state(TINY)), tmp_path / "z.pth")
    with zipfile.ZipFile(tmp_path / "z.pth") as archive:
        archive.extractall(tmp_path / "unpacked")
    message = refusal(tmp_path / "unpacked" / "z")
    assert "the folder of an unpacked PyTorch file" in message
    assert "zip -0 -r model.pth 'z'" in message
