"""What strangers wrote is shown as text: no message can move a cursor or hide a line."""

import pickle

import pytest

from pvt_ref import errors
from pvt_ref.errors import MissingFileError, PVTError, printable, shown

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PVTError)
]
NASTY = "a\x1b[31m\r\x07\u202e\udc80\x7f\x85b"


def test_printable_escapes_what_a_terminal_obeys_and_nothing_else():
    assert printable("π ≈ 3.14 × 10⁰, 日本\nnext line") == "π ≈ 3.14 × 10⁰, 日本\nnext line"
    assert printable(NASTY) == r"a\x1b[31m\r\x07\u202e\udc80\x7f\x85b"
    printable(NASTY).encode()  # no lone surrogate is left


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_message_of_every_error_is_printable(kind):
    error = kind(f"{NASTY}\nfix it")
    assert str(error) == printable(NASTY) + "\nfix it"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert kind is PVTError or isinstance(error, ValueError | TypeError)


def test_a_missing_file_is_also_pythons_own_kind():
    assert isinstance(MissingFileError("x"), FileNotFoundError)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("cat\n\x1b", r"'cat\n\x1b'"),
        ("x" * 1000, "'" + "x" * 80 + "'..."),
        (b"\x00PK", r"b'\x00PK'"),
        (0.5, "0.5"),
        (None, "None"),
        ([1, 2], "[1, 2]"),
        (10**5000, "<int>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_shown_is_one_short_line(value, text):
    assert shown(value) == text


def test_shown_of_deep_and_long_values_is_quick_and_short():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, list(range(10**6)), {"k" * 10**6: 1}, [["x" * 10**6] * 100] * 100):
        assert len(shown(value)) <= 83
        assert "\n" not in shown(value)
    while deep:
        deep = deep[0]  # freed level by level, whatever the interpreter's recursion limit
