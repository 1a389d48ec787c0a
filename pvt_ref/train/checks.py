"""What the functions of a training check of their arguments: one message for all."""

import os
import sys
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from pvt_ref.arrays import Array, library_and_dtype, same_library
from pvt_ref.checks import is_whole
from pvt_ref.errors import ArrayTypeError, RangeError, ShapeError, TrainingError, shown
from pvt_ref.tree import named_arrays

#: Of whole numbers. A seed may have as many bits as NumPy's own.
_LARGEST_WHOLE = 2**128

#: In characters; that of Linux, in bytes.
_LONGEST_PATH = 4096


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> Any:
    """value as a plain int or float: NumPy's scalars would widen float32 arrays.

    Args:
        name: of the number, for the message.
        value: anything.
        least: the least that is allowed, if there is one.
        above: what it must be above, if there is such.
        most: the most that is allowed, if there is one.
        below: what it must be below, if there is such.
        whole: whether it must be a whole number.

    Returns:
        An int if whole, else a float.

    Raises:
        RangeError: unless it is a finite (whole) number within the bounds.
    """
    if isinstance(value, np.generic):  # which would compare bounds in float32
        value = value.item()
    right_kind = is_whole(value) if whole else isinstance(value, Real)
    limit = _LARGEST_WHOLE if whole else sys.float_info.max
    good = (
        right_kind
        and not isinstance(value, bool)
        and -limit <= value <= limit  # type: ignore[operator]
        and (least is None or value >= least)  # type: ignore[operator]
        and (above is None or value > above)  # type: ignore[operator]
        and (most is None or value <= most)  # type: ignore[operator]
        and (below is None or value < below)  # type: ignore[operator]
    )
    if not good:
        bounds = (("at least", least), ("above", above), ("at most", most), ("below", below))
        limits = " and ".join(f"{word} {limit:g}" for word, limit in bounds if limit is not None)
        kind = "a whole number" if whole else "a number"
        raise RangeError(f"{name} is {shown(value)}; it must be {kind} {limits}".rstrip())
    return int(value) if whole else float(value)  # type: ignore[arg-type]


def check_flag(name: str, value: object) -> bool:
    """Refuses what is neither True nor False.

    Args:
        name: of the argument, for the message.
        value: anything.

    Returns:
        value.

    Raises:
        RangeError: unless it is True or False.
    """
    if not isinstance(value, bool):
        raise RangeError(f"{name} is {shown(value)}; it must be True or False")
    return value


def check_type(name: str, value: object, kind: type, advice: str = "") -> None:
    """Refuses a value of another type.

    Args:
        name: of the argument, for the message.
        value: anything.
        kind: what it must be.
        advice: how to get one, for the message.

    Raises:
        ArrayTypeError: unless it is one.
    """
    if not isinstance(value, kind):
        raise ArrayTypeError(
            f"{name} is a {type(value).__name__}; it must be a {kind.__name__}"
            + (f", {advice}" if advice else "")
        )


def check_path(name: str, value: object) -> Path:
    """A path that the system can be asked about.

    Args:
        name: of the argument, for the message.
        value: anything.

    Returns:
        The path. Nothing need be there.

    Raises:
        ArrayTypeError: unless it is a text or a path of texts.
        TrainingError: if no file can be called so.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str):
        raise ArrayTypeError(
            f"{name} is a {type(value).__name__}; it must be a str or pathlib.Path"
        )
    try:
        usable = "\0" not in os.fsencode(text).decode("latin-1")
    except UnicodeEncodeError:
        usable = False
    if not 0 < len(text) <= _LONGEST_PATH or not usable:
        raise TrainingError(
            f"{name} is {shown(text)}, which no file can be called: it is empty, too long, or "
            f"holds a NUL or half a character. Name another"
        )
    return Path(text)


def check_record(name: str, tree: object) -> None:
    """Refuses what holds no arrays.

    Args:
        name: of the tree, for the message.
        tree: anything.

    Raises:
        ArrayTypeError: unless it is a PVTParams, or another record of arrays.
    """
    if next(named_arrays(tree), None) is None:
        raise ArrayTypeError(
            f"{name} is a {type(tree).__name__}; it must be a PVTParams, or a record of arrays as "
            f"its parts are"
        )


def check_alike(name: str, tree: object, params: Any) -> None:
    """Refuses gradients, moments or averages that do not belong to some weights.

    Args:
        name: of the tree, for the message.
        tree: anything.
        params: the weights.

    Raises:
        ArrayTypeError: if one of the two is no record of arrays, or they are of two types, or an
            array of the tree is of another library, device or dtype than the weight in its place.
        ShapeError: if a key is absent from one of them, or an array has another shape.
    """
    check_record("params", params)
    check_type(name, tree, type(params), "with an array for each weight of params")
    arrays, weights = dict(named_arrays(tree)), dict(named_arrays(params))
    for key in sorted(arrays.keys() ^ weights.keys()):
        there = name if key in arrays else "params"
        raise ShapeError(f"{name} and params are of different models: only {there} has {key}")
    for key, x in arrays.items():
        w = weights[key]
        if x.shape != w.shape:
            raise ShapeError(
                f"{name} and params are of different models: {key} is {_shape(x)} in {name} and "
                f"{_shape(w)} in params"
            )
        if x.dtype != w.dtype or not same_library(x, w):
            raise ArrayTypeError(
                f"{key} is {library_and_dtype(x)} in {name} and {library_and_dtype(w)} in params; "
                f"both must be alike"
            )


def _shape(x: Array) -> tuple[int, ...]:
    return tuple(x.shape)
