"""What the functions of a training check of trees and paths; numbers: :mod:`pvt_ref.checks`."""

import os
from pathlib import Path
from typing import Any

from pvt_ref.arrays import library_and_dtype, same_library
from pvt_ref.checks import check_type
from pvt_ref.errors import ArrayTypeError, ShapeError, TrainingError, shown
from pvt_ref.tree import named_arrays

#: In characters; that of Linux, in bytes.
_LONGEST_PATH = 4096


def check_path(name: str, value: object) -> Path:
    """A path that the system can be asked about. Raises: ArrayTypeError or TrainingError."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str):
        raise ArrayTypeError(f"{name} is a {type(value).__name__}; it must be a str or Path")
    try:
        usable = "\0" not in os.fsencode(text).decode("latin-1")
    except UnicodeEncodeError:
        usable = False
    if not 0 < len(text) <= _LONGEST_PATH or not usable:
        why = "it is empty, too long, or holds a NUL or half a character"
        raise TrainingError(f"{name} is {shown(text)}, which no file can be called: {why}")
    return Path(text)


def check_record(name: str, tree: object) -> None:
    """Refuses what is no record of arrays. Raises: ArrayTypeError."""
    if next(named_arrays(tree), None) is None:
        kind = type(tree).__name__
        raise ArrayTypeError(f"{name} is a {kind}; it must be parameters of a model, or a part")


def check_alike(name: str, tree: object, params: Any) -> None:
    """Refuses what does not belong to the weights params. Raises: ArrayTypeError or ShapeError."""
    check_record("params", params)
    check_type(name, tree, type(params), "with an array for each weight of params")
    arrays, weights = dict(named_arrays(tree)), dict(named_arrays(params))
    what = f"{name} and params are of different models"
    for key in sorted(arrays.keys() ^ weights.keys()):
        raise ShapeError(f"{what}: only {name if key in arrays else 'params'} has {key}")
    for key, x in arrays.items():
        w = weights[key]
        if x.shape != w.shape:
            both = f"{tuple(x.shape)} in {name} and {tuple(w.shape)} in params"
            raise ShapeError(f"{what}: {key} is {both}")
        if x.dtype != w.dtype or not same_library(x, w):
            both = f"{library_and_dtype(x)} in {name} and {library_and_dtype(w)} in params"
            raise ArrayTypeError(f"{key} is {both}; both must be alike")
