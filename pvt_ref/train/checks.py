"""How the numbers of a training are checked: one message for all."""

from numbers import Real
from typing import Any

from pvt_ref.config import is_whole
from pvt_ref.errors import RangeError


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
    right_kind = is_whole(value) if whole else isinstance(value, Real)
    good = (
        right_kind
        and not isinstance(value, bool)
        and float("-inf") < value < float("inf")  # type: ignore[operator]
        and (least is None or value >= least)  # type: ignore[operator]
        and (above is None or value > above)  # type: ignore[operator]
        and (most is None or value <= most)  # type: ignore[operator]
        and (below is None or value < below)  # type: ignore[operator]
    )
    if not good:
        bounds = (("at least", least), ("above", above), ("at most", most), ("below", below))
        limits = " and ".join(f"{word} {limit:g}" for word, limit in bounds if limit is not None)
        kind = "a whole number" if whole else "a number"
        raise RangeError(f"{name} is {value!r}; it must be {kind} {limits}".rstrip())
    return int(value) if whole else float(value)  # type: ignore[arg-type]
