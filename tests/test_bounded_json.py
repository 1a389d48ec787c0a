"""JSON of strangers: memory and time are bounded, and every fault is this project's error."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvt_ref.checkpoint.bounded_json import MAX_DEPTH, MAX_DIGITS, parse_json
from pvt_ref.errors import CheckpointError

LIMIT = 2**20
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(values)
def test_what_json_writes_is_read(value):
    text = json.dumps(value)
    assert parse_json(text, "it") == value
    assert parse_json(text.encode(), "it") == value
    assert parse_json(b"\xef\xbb\xbf" + text.encode(), "it") == value


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("{}x", "not JSON"),
        (b"\xff", "not JSON"),
        ("NaN", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("1e999", "too large"),
        ("-1e999", "too large"),
        ("9" * (MAX_DIGITS + 1), f"a number of {MAX_DIGITS + 1} digits"),
        ("0." + "9" * MAX_DIGITS, "too large or too long"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' comes twice"),
        (r'{"\u001b": 1, "\u001b": 1}', r"'\\x1b' comes twice"),
        (nested(MAX_DEPTH + 1), "nested too deeply"),
        (nested(300_000), "nested too deeply"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "nested too deeply"),
        (" " * (LIMIT + 1), "too long"),
        (b" " * (LIMIT + 1), "too long"),
    ],
    ids=lambda value: None if len(value) > 30 else repr(value),
)
def test_what_is_refused(text, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        parse_json(text, "its metadata")
    assert str(caught.value).startswith("its metadata ")
    assert len(str(caught.value)) < 300


def test_what_is_just_allowed():
    parse_json(nested(MAX_DEPTH), "it")
    assert parse_json("9" * MAX_DIGITS, "it") > 0
    assert len(parse_json(json.dumps("x" * (LIMIT - 2)), "it")) == LIMIT - 2
    assert parse_json("[1]", "it", limit=3) == [1]
    with pytest.raises(CheckpointError, match="4 characters; at most 3"):
        parse_json("[10]", "it", limit=3)


@pytest.mark.parametrize("item", ["[]", "{}", "300", "1.5", '{"a":0}', "[0]", '""'])
def test_memory_is_bounded_by_the_limit(item):
    limit = LIMIT // 8
    text = "[" + ",".join([item] * (limit // (len(item) + 1) - 2)) + "]"
    tracemalloc.start()
    try:
        parse_json(text, "it", limit)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * limit


def test_a_key_that_comes_twice_among_many():
    keys = ",".join(f'"{k:x}":0' for k in range(90_000))
    with pytest.raises(CheckpointError, match="comes twice"):
        parse_json(f'{{{keys},"{89_999:x}":0}}', "it")
