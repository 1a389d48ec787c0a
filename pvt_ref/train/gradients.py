"""Gradients between the backward and the optimiser: accumulation and clipping."""

import dataclasses
import math
from typing import Any

from pvt_ref.arrays import array_module, describe_type, dtype_name, is_array
from pvt_ref.checks import check_number
from pvt_ref.errors import ArrayTypeError
from pvt_ref.train.checks import check_alike, check_record
from pvt_ref.tree import map_arrays, named_arrays

#: Added to the norm before it divides, as PyTorch's clip_grad_norm_ does.
_TINY = 1e-6


def global_norm(grads: Any) -> float:
    """``sqrt(sum of g^2)`` over all arrays, added up in double precision; the host waits for it.
    Raises: ArrayTypeError if grads is no record, tuple or array, or not of numbers.

    Args:
        grads: gradients of a model, or any record of arrays.

    Returns:
        The norm; 0 if there is no array, NaN or infinity if there is one in it.
    """
    if not (dataclasses.is_dataclass(grads) or isinstance(grads, tuple) or is_array(grads)):
        raise ArrayTypeError(f"grads is {describe_type(grads)}. Needed is a record of gradients")
    squares = []
    for key, g in named_arrays(grads):
        if not dtype_name(g).startswith(("float", "bfloat", "int", "uint")):
            raise ArrayTypeError(f"{key or 'grads'} has dtype {dtype_name(g)}; needed are floats")
        xp = array_module(g)
        wide = xp.astype(g, xp.float64)  # float32 squares could overflow, and sums would drift
        squares.append(xp.sum(wide * wide))
    return math.sqrt(float(sum(squares)))


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, float]:
    """All gradients scaled by one factor, so that their global norm is at most max_norm.
    Raises: RangeError if max_norm is no number above 0, ArrayTypeError as :func:`global_norm`.

    One factor for all keeps the direction of the step (Pascanu et al. 2013, arXiv 1211.5063,
    Algorithm 1): ``g <- g min(1, max_norm / (|g| + 1e-6))``.

    Args:
        grads: gradients of a model.
        max_norm: above 0. Infinity clips nothing.

    Returns:
        The gradients, of the same shapes and dtypes, and their norm before clipping. grads itself
        if nothing was clipped, or the norm is not a number.
    """
    if not (isinstance(max_norm, float) and max_norm == math.inf):
        max_norm = check_number("max_norm", max_norm, above=0)
    norm = global_norm(grads)
    factor = max_norm / (norm + _TINY)
    if not factor < 1:  # small enough, or not a number: left for the caller to see
        return grads, norm
    return map_arrays(lambda g: g * factor, grads), norm


def add_gradients(total: Any, grads: Any, share: float) -> Any:
    """``total + share * grads``: gradient accumulation over parts of a batch.
    Raises: RangeError if share is outside its range; ArrayTypeError or ShapeError if the two differ
    in type, dtype, device, keys or shapes.

    The loss of a batch is the mean over its samples, so b samples out of B have the share b / B.

    Args:
        total: the sum so far; None for the first part.
        grads: gradients of the mean loss of this part.
        share: of this part in the batch, in (0, 1].

    Returns:
        The sum, of the same shapes and dtypes; grads itself if it is the whole batch.
    """
    share = check_number("share", share, above=0, most=1)
    check_record("grads", grads)
    if total is None:
        return grads if share == 1 else map_arrays(lambda g: g * share, grads)
    check_alike("total", total, grads)
    return map_arrays(lambda a, g: a + share * g, total, grads)
