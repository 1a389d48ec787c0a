"""The stack machine for pickles: every instruction, bounds of memory and work, damage."""

import collections
import contextlib
import io
import pickle
import pickletools
import struct
import tracemalloc

import pytest

from pvt_ref.checkpoint.pickles import BYTES_PER_BYTE, FREE_BYTES, Global, Record, read_pickle
from pvt_ref.errors import CheckpointError

MOST = 48  # bytes of memory for each byte of a pickle, as SECURITY.md says
N = 50_000


def read(data):
    return read_pickle(io.BytesIO(data)).tree


def plain():
    shared = ["a", None, True, False, 1.5]
    return {
        "numbers": [0, 1, 255, 256, 65536, -1, 2**31, -(2**63), 2**200, 1e300, float("inf")],
        "texts": ["", "é", "\U0001f600", "x" * 300, "line\nline"],
        "bytes": [b"", b"\xff" * 300],
        "nested": {"tuple": (), "one": (1,), "two": (1, 2), "three": (1, 2, 3), "more": (1,) * 9},
        "shared": [shared, shared],
        "many": list(range(2500)),
        "dict": {str(i): i for i in range(2500)},
    }


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol(protocol):
    tree = plain()
    found = read(pickle.dumps(tree, protocol))
    if protocol < 3:  # bytes are made by a call there
        assert found.pop("bytes") == [Record("builtins.bytes"), Record("_codecs.encode")]
        tree.pop("bytes")
    assert found == tree
    assert list(map(type, found["numbers"])) == list(map(type, tree["numbers"]))
    assert found["shared"][0] is found["shared"][1]
    assert read(pickletools.optimize(pickle.dumps(plain(), max(3, protocol)))) == plain()


class Slots:
    __slots__ = ("a",)


class WithNewArguments:
    def __getnewargs_ex__(self):
        return (1,), {"a": 2}

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_every_protocol_are_records(protocol):
    slots = Slots()
    slots.a = [1]
    recursive = collections.deque()
    recursive.append((recursive,))
    tree = [WithNewArguments() if protocol > 1 else 0, recursive, {1, 2}, frozenset("a"), range(1)]
    tree += [slots if protocol > 1 else 0, collections.Counter("a"), ValueError("x"), range(2)]
    found, foreign, _ = read_pickle(io.BytesIO(pickle.dumps(tree, protocol)))
    assert len(found) == len(tree)
    assert found[1] == Record("collections.deque")
    assert found[3] == Record("builtins.frozenset")
    assert found[-1] == Record("builtins.range" if protocol > 2 else "builtins.xrange")
    assert "collections.deque" in foreign
    assert all(isinstance(x, Record) for x in found if x != 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"(lI1\nL2L\naI01\naF1.5\naS'a'\naVb\na.", None),
        (b"(I1\nL2L\nI01\nF1.5\nS'a'\nVb\nl.", [1, 2, True, 1.5, "a", "b"]),
        (b"(S'a'\nI1\nd.", {"a": 1}),
        (b"(ia\nB\n.", Record("a.B")),
        (b"(ca\nB\nNo.", Record("a.B")),
        (b"ca\nB\n.", Global("a.B")),
        (b"\x80\x02U\x02\xe9at\x01".replace(b"at\x01", b"a") + b".", "éa"),
        (b"T\x01\0\0\0\xe9.", "é"),
        (b"N(NN1.", None),
        (b"NN0.", None),
        (b"N(0.", None),
        (b"K\x012\x86.", (1, 1)),
        (b"Np0\n0g0\n.", None),
        (b"K\x07r\x01\0\0\0" + b"0h\x01.", 7),
        (b"\x8d\x01" + bytes(7) + b"a.", "a"),
        (b"\x8e\x01" + bytes(7) + b"a.", b"a"),
        (b"\x8b\x01\0\0\0\x05.", 5),
    ],
)
def test_rare_instructions(data, expected):
    if expected is None and data.startswith(b"(l"):
        with pytest.raises(CheckpointError, match="cannot be read"):  # a value without its list
            read(data)
    else:
        assert read(data) == expected


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"P1\n.", "PERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02}(U\x01aNU\x01aNu.", "the key 'a' twice"),
        (b"\x80\x02}(K\x01NU\x011Nu.", "the key '1' twice"),
        (b"\x80\x02}(U\x01au.", "a key without"),
        (b"\x80\x02]U\x01aNs.", "list in place of dict"),
        (b"\x80\x02}Na.", "dict in place of list"),
        (b"\x80\x02NNb.", "NoneType in place"),
        (b"\x80\x02N)R.", "NoneType in place of Global"),
        (b"\x80\x02ca\nB\nNR.", "NoneType in place of tuple"),
        (b"\x80\x04NN\x93.", "NoneType in place of str"),
        (b"\x80\x02K\x01r\x05\0\0\0h\x03.", "nothing was put into memo slot 3"),
        (b"\x80\x02h\x00.", "cannot be read"),
        (b"\x80\x02ccollections\nOrderedDict\nN\x85R.", "cannot be read"),
        (b"\x80\x02ccollections\nOrderedDict\n]N\x85a\x85R.", "cannot be read"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "with 0 arguments"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\nNNN\x87R.", "in place of StoredTensor"),
        (b"\x80\x02NQ.", "in place of tuple"),
        (b"\x80\x02c" + b"a" * 500 + b"\nb\n.", "longer than any class"),
        (b"\xff.", "cannot be read"),
    ],
)
def test_wrong_programs_are_refused(data, says):
    with pytest.raises(CheckpointError, match=says):
        read(data)


def test_numbers_of_too_many_digits_are_refused():
    for data in (b"I" + b"1" * 5000 + b"\n.", b"L" + b"1" * 5000 + b"L\n."):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(data)
    number = b"\x8b" + struct.pack("<i", 5000) + b"\x01" * 5000
    assert read(b"\x80\x02}" + number + b"Ns.") == {"<int 0>": None}  # its repr would be refused


# --- bounds --------------------------------------------------------------------------------------

STORAGE = (
    b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tq\x00Qq\x010"
    b"ctorch._utils\n_rebuild_tensor_v2\nq\x02(h\x01K\x00K\x02\x85K\x01\x85\x89}tq\x030"
)
NAMESPACE = b"\x80\x02cargparse\nNamespace\nq\x000"
ORDERED = b"\x80\x02ccollections\nOrderedDict\nq\x000"


def keys(count, form, *parts):
    return b"".join(b"\x8a\x09" + (k * form).to_bytes(9, "little") + b"N" for k in range(count))


HOSTILE = {
    "lists": b"]" * N,
    "dicts": b"}" * N,
    "marks": b"(" * N,
    "lists in lists": b"(" * 300 + b"(l" * (N // 2),
    "dicts of marks": b"(d" * (N // 2),
    "tuples in tuples": b"N" + b"\x85" * N,
    "tuples": b"N\x85" * (N // 2),
    "memoized lists": b"]\x94" * (N // 2),
    "memoized nothing": b"N" + b"\x94" * N,
    "a far memo slot": b"N" * N + b"r" + struct.pack("<I", N) + b"N" * N,
    "sets": b"\x8f" * N,
    "nothing": b"N" * N,
    "copies": b"N" + b"2" * N,
    "short texts": b"\x8c\x02\xc4\x80" * (N // 4),
    "wide texts": b"\x8c\x04\xf0\x9f\x98\x80" * (N // 6),
    "one long wide text": b"X" + struct.pack("<I", N + 4) + b"\xf0\x9f\x98\x80" + b"a" * N,
    "numbers": b"M\xff\xff" * (N // 3),
    "a long number": b"\x8b" + struct.pack("<i", N) + b"\x7f" * N,
    "text keys": b"}(" + b"".join(b"\x8c\x04%04xN" % i for i in range(N // 7)) + b"u",
    "number keys": b"}(" + b"".join(b"J%bN" % struct.pack("<i", i) for i in range(N // 6)) + b"u",
    "storages": STORAGE + b"h\x00Q" * (N // 3),
    "tensors": STORAGE + b"h\x02h\x03R" * (N // 5),
    "memoized tensors": STORAGE + b"h\x02h\x03R\x94" * (N // 6),
    "names": b"".join(b"c%d\na\n" % i for i in range(N // 9)),
    "pairs of names": b"".join(b"\x8c\x3c%060d\x94" % i for i in range(N // 200))
    + b"".join(
        b"j" + struct.pack("<I", i % 500) + b"j" + struct.pack("<I", i // 500 % 500) + b"\x93"
        for i in range(N // 11)
    ),
    "an OrderedDict's pairs again and again": ORDERED
    + b"]("
    + b"".join(b"\x8c\x04%04xN\x86" % i for i in range(2000))
    + b"e\x85q\x010"
    + b"h\x00h\x01R" * (N // 5),
    "fields for many namespaces": NAMESPACE
    + b"}("
    + b"".join(b"\x8c\x04%04xN" % i for i in range(N // 14))
    + b"uq\x010"
    + b"h\x00)\x81h\x01b" * (N // 14),
    "the same fields again and again": NAMESPACE
    + b"}("
    + b"".join(b"\x8c\x04%04xN" % i for i in range(N // 14))
    + b"uq\x010h\x00)\x81"
    + b"h\x01b" * (N // 6),
    "attributes of a dict again and again": b"}q\x00}q\x01" + b"h\x00b" * (N // 3),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_is_bounded_by_the_size(name):
    data = b"\x80\x04" + HOSTILE[name] + b"."
    file = io.BytesIO(data)
    tracemalloc.start()
    with contextlib.suppress(CheckpointError):
        read_pickle(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST * file.tell() + 2 * FREE_BYTES


@pytest.mark.parametrize(
    "name",
    ["lists", "dicts", "marks", "tuples in tuples", "an OrderedDict's pairs again and again"],
)
def test_what_is_made_to_exhaust_memory_is_refused_early(name):
    file = io.BytesIO(b"\x80\x04" + 2 * HOSTILE[name] + b".")
    with pytest.raises(CheckpointError, match=f"{BYTES_PER_BYTE} times its own size"):
        read_pickle(file)
    assert file.tell() < 2 * N


def test_keys_that_share_a_hash_are_texts():
    """Integers can be chosen to collide; the hashes of texts are different in every process."""
    for form in (2**61 - 1, 2**40, 1):
        count = 200 if form == 2**61 - 1 else 3000
        data = b"\x80\x02}(" + keys(count, form) + b"u."
        tree = read(data)
        assert len(tree) == count
        assert all(isinstance(key, str) for key in tree)
    odd = {None: 0, True: 1, 2.5: 2, (1, 2): 3, b"b": 4, frozenset(): 5, Slots: 6, 2**70: 7}
    assert list(read(pickle.dumps(odd))) == [
        "None", "True", "2.5", "<tuple 3>", "<bytes 4>", "<Record 5>", "<Global 6>", "<int 7>",
    ]  # fmt: skip


def test_exponential_trees_are_shared_and_never_walked():
    data = b"\x80\x02]" + b"q\x00h\x00\x86" * 200 + b"."
    tree = read(data)
    assert tree[0] is tree[1]
    for key in (b"\x80\x02})" + b"q\x00h\x00\x86" * 200 + b"Ns.",):
        assert list(read(key)) == ["<tuple 0>"]


def test_the_file_is_left_after_the_pickle():
    stream = io.BytesIO(pickle.dumps([1]) + pickle.dumps({"a": 2}) + b"rest")
    assert read_pickle(stream).tree == [1]
    assert read_pickle(stream).tree == {"a": 2}
    assert stream.read() == b"rest"


@pytest.mark.parametrize("claim", [b"\x8d", b"\x8e", b"\x96", b"X", b"T", b"B", b"\x8b"])
def test_claimed_lengths_take_no_memory(tmp_path, claim):
    """A file on disk prepares a buffer as large as one asks for."""
    size = 2**34 if claim in (b"\x8d", b"\x8e", b"\x96") else 2**31 - 1
    width = 8 if size > 2**31 else 4
    path = tmp_path / "x"
    path.write_bytes(b"\x80\x05" + claim + size.to_bytes(width, "little") + b"a" * 1000)
    tracemalloc.start()
    with path.open("rb") as file, pytest.raises(CheckpointError, match="cannot be read"):
        read_pickle(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < FREE_BYTES
