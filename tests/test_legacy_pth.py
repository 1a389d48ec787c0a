"""PyTorch's format from before 1.6: contents, damage that is noticed, lies in its structure."""

import collections
import io
import pickle
import struct
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoint import TINY, as_torch, assert_same_state, random_state, refusal
from torch._utils import _rebuild_tensor_v2

from pvt_ref.checkpoint import load
from pvt_ref.checkpoint.legacy import LegacyFile, is_legacy
from pvt_ref.checkpoint.pth import open_pth
from pvt_ref.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C
HEAD = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def save(path, tree, **options):
    torch.save(tree, path, _use_new_zipfile_serialization=False, **options)
    return path


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_state_dict(tmp_path, protocol, dtype):
    state = random_state(TINY, dtype)
    tree = collections.OrderedDict(as_torch(state))
    path = save(tmp_path / "x.pth", tree, pickle_protocol=protocol)
    assert_same_state(load(path, TINY), state)
    with path.open("rb") as file:
        assert not open_pth(file).checksummed


def test_a_published_detector_checkpoint(tmp_path):
    """As OpenMMLab's publishing tool writes them: no optimizer, meta beside the state dict."""
    state = random_state(TINY)
    tree = {"meta": {"mmdet_version": "2.14", "config": "text"}, "state_dict": as_torch(state)}
    assert_same_state(load(save(tmp_path / "x.pth", tree), TINY), state)


def test_views_and_shared_storages(tmp_path):
    x = torch.arange(24.0).view(4, 6)
    tree = {"x": x, "t": x.t(), "s": x[1:, ::2], "again": x, "p": torch.nn.Parameter(x)}
    with save(tmp_path / "x.pth", tree).open("rb") as file:
        opened = open_pth(file)
        read = opened.read(opened.tree)
    for name, tensor in tree.items():
        np.testing.assert_array_equal(read[name], tensor.detach().numpy(), strict=True)


class Reference:
    def __init__(self, *fields):
        self.fields = fields


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.fields if isinstance(value, Reference) else None


class Tensor:
    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return _rebuild_tensor_v2, self.args


def storage(key="7", numel=4, view=None, kind: Any = torch.FloatStorage, word="storage"):
    return Reference(word, kind, key, "cpu", numel, view)


def tensor(reference=None, offset=0, shape=(4,), strides=(1,)):
    return Tensor(reference or storage(), offset, shape, strides, False, collections.OrderedDict())


def block(numbers=(0, 1, 2, 3), claimed=None, form="<f4"):
    raw = np.array(numbers, form).tobytes()
    return struct.pack("<q", len(numbers) if claimed is None else claimed) + raw


def by_hand(tree=None, keys=("7",), blocks=None, magic=MAGIC, version=1001, head=HEAD, end=b""):
    stream = io.BytesIO()
    for value in (magic, version, head):
        pickle.dump(value, stream, protocol=2)
    Pickler(stream, protocol=2).dump({"x": tensor()} if tree is None else tree)
    pickle.dump(list(keys) if isinstance(keys, tuple) else keys, stream, protocol=2)
    stream.write(block() if blocks is None else blocks)
    stream.write(end)
    return stream.getvalue()


def read_all(data):
    opened = LegacyFile(io.BytesIO(data))
    return opened.read(opened.tree)


def test_by_hand_is_what_pytorch_reads():
    data = by_hand()
    assert is_legacy(data[:64])
    assert torch.load(io.BytesIO(data), weights_only=True)["x"].tolist() == [0, 1, 2, 3]
    assert read_all(data)["x"].tolist() == [0, 1, 2, 3]


def test_views_of_storages_as_old_versions_wrote_them():
    tree = {
        "x": tensor(storage(view=("8", 1, 2)), shape=(2,)),
        "y": tensor(storage(view=("9", 2, 2)), offset=1, shape=(1,)),
        "z": tensor(),
    }
    data = by_hand(tree)
    expected = {k: v.tolist() for k, v in torch.load(io.BytesIO(data), weights_only=True).items()}
    assert {k: v.tolist() for k, v in read_all(data).items()} == expected
    assert expected["x"] == [1, 2]
    assert expected["y"] == [3]
    for view in (("8", 3, 2), ("8", 0, 5), ("8", 2**62, 2)):
        with pytest.raises(CheckpointError, match=r"reaches\s+outside"):
            read_all(by_hand({"x": tensor(storage(view=view), shape=(1,))}))
    with pytest.raises(CheckpointError, match="outside its storage"):
        read_all(by_hand({"x": tensor(storage(view=("8", 1, 2)), shape=(3,))}))


def test_python_2_wrote_byte_strings_pairs_and_a_memo_from_1_on():
    """Hand-made after what cPickle writes: the keys are byte strings, an OrderedDict its pairs."""
    data = (
        b"\x80\x02ccollections\nOrderedDict\nq\x01]q\x02]q\x03(U\x01xq\x04"
        b"ctorch._utils\n_rebuild_tensor_v2\nq\x05((U\x07storageq\x06ctorch\nFloatStorage\nq\x07"
        b"U\x017q\x08U\x03cpuq\x09K\x04NtQK\x00K\x04\x85K\x01\x85\x89h\x01]\x85RtRq\x0ae"
        b"a\x85Rq\x0b."
    )
    stream = io.BytesIO()
    for value in (MAGIC, 1001, HEAD):
        pickle.dump(value, stream, protocol=2)
    stream.write(data + b"\x80\x02]q\x01U\x017q\x02a." + block())
    theirs = torch.load(io.BytesIO(stream.getvalue()), weights_only=False, encoding="latin1")
    assert theirs["x"].tolist() == [0, 1, 2, 3]
    assert read_all(stream.getvalue())["x"].tolist() == [0, 1, 2, 3]


def test_numbers_are_little_endian_whatever_machine_wrote_them():
    data = by_hand(head={**HEAD, "little_endian": False})
    assert read_all(data)["x"].tolist() == [0, 1, 2, 3]


def test_one_block_that_is_referred_to_as_bytes_and_as_floats():
    """The first reference says in which unit the block's length is counted."""
    as_bytes = storage(numel=16, kind=torch.storage.UntypedStorage)
    tree = {"raw": as_bytes, "x": tensor()}
    opened = LegacyFile(io.BytesIO(by_hand(tree, blocks=block(claimed=16))))
    assert opened.read({"x": opened.tree["x"]})["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 1002}, "version 1002"),
        ({"version": "1001"}, "version '1001'"),
        ({"head": []}, "its head"),
        ({"magic": MAGIC + 1}, "its head"),
        ({"keys": ()}, "whole file"),
        ({"keys": ("7", "7"), "blocks": block() * 2}, "twice"),
        ({"keys": ("8",)}, "no tensor refers"),
        ({"keys": ("7", "8"), "blocks": block() * 2}, "no tensor refers"),
        ({"keys": (7,)}, "no tensor refers"),
        ({"keys": {"7": 1}}, "no list"),
        ({"keys": None}, "no list"),
        ({"end": b"\0"}, "or more than one"),
        ({"end": by_hand()}, "or more than one"),
        ({"blocks": b""}, "whole file"),
        ({"blocks": block()[:-1]}, "whole file"),
        ({"blocks": block()[:5]}, "whole file"),
        ({"blocks": block(claimed=5)}, "whole file"),
        ({"blocks": block(claimed=-1)}, "whole file"),
        ({"blocks": block(claimed=2**62)}, "whole file"),
        ({"blocks": block(claimed=3)}, "has 3 numbers"),
        ({"blocks": block((0, 1, 2)), "end": bytes(4)}, "has 3 numbers"),
        ({"tree": {"x": tensor(storage(numel=5))}}, "need 5"),
        ({"tree": {"x": tensor(storage(numel=2**62))}}, "need 46116"),
        ({"tree": {"x": tensor(storage(numel=-1))}}, "not a whole number"),
        ({"tree": {"x": tensor(storage(kind=torch.DoubleStorage))}}, "whole file"),
        ({"tree": {"x": tensor(offset=1)}}, "outside its storage"),
        ({"tree": {"x": tensor(shape=(2**40,), strides=(0,))}}, "more than the whole file"),
        ({"tree": {"x": tensor(shape=(5,), strides=(0,))}}, "expanded view"),
        ({"tree": {"x": tensor(storage(word="module"))}}, "cannot be read"),
        ({"tree": {"x": tensor(storage(word="else"))}}, "cannot be read"),
        ({"tree": {"x": tensor(storage(kind="FloatStorage"))}}, "cannot be read"),
        ({"tree": {"x": tensor(storage(kind=collections.Counter))}}, "cannot be read"),
        ({"tree": {"x": tensor(storage(view=(1, 2)))}}, "cannot be read"),
        ({"tree": {"x": tensor(storage(view=("8", -1, 2)))}}, "not a whole number"),
        (
            {"tree": {"x": tensor(), "y": tensor(storage(numel=5), shape=(5,))}},
            "needs? 20",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_lies_about_the_structure_are_refused(change, says):
    with pytest.raises(CheckpointError, match=says):
        read_all(by_hand(**change))


def test_a_storage_of_unknown_kind():
    tree = {"x": tensor(storage(kind=torch.storage.TypedStorage))}
    with pytest.raises(CheckpointError, match="unknown size"):
        read_all(by_hand(tree))


def test_truncation_anywhere_is_refused(tmp_path):
    path = save(tmp_path / "x.pth", as_torch(random_state(TINY)))
    data = path.read_bytes()
    offsets = {
        *range(0, 200),
        *range(0, len(data), len(data) // 97),
        *range(len(data) - 9, len(data)),
    }
    for offset in sorted(offsets - {len(data)}):
        path.write_bytes(data[:offset])
        refusal(path)
    path.write_bytes(data + b"\0")
    assert "or more than one" in refusal(path)
