"""Untrusted JSON, read in bounded memory and time, or refused."""

import json
import math
from typing import Any

from pvt_ref.errors import CheckpointError, shown

#: Levels of nested lists and objects. Comparing or printing more could fail later.
MAX_DEPTH = 64

#: Characters of one number. The time to read a whole number grows with their square.
MAX_DIGITS = 4300


def parse_json(text: str | bytes, what: str, limit: int = 2**20) -> Any:
    """The values in a JSON text (bytes are UTF-8) of at most limit characters, or bytes.

    Memory is at most about 30 times the limit. Repeated keys, NaN and infinity are refused too.
    """
    if len(text) > limit:
        raise CheckpointError(f"{what} is too long: {len(text)} characters; at most {limit}")
    hooks: Any = {"parse_int": _whole, "parse_float": _real, "parse_constant": _real}
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_object, **hooks)
        _check_depth(value)
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply: over {MAX_DEPTH} levels") from None
    except ValueError as error:  # includes JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{what} is not JSON that can be used ({error})") from error
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is not a number, or is too large or too long")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {shown(name)} comes twice")
        values[name] = value
    return values


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [x for x in level if isinstance(x, list | dict)]
        level = [y for x in nested for y in (x.values() if isinstance(x, dict) else x)]
        if not nested:
            return
    raise RecursionError
