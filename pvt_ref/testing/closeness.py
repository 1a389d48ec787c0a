"""Comparison of two arrays: as a whole, in relative L2 norm; and the first wrong entry."""

from typing import Any

import numpy as np

from pvt_ref.errors import printable


class LawError(AssertionError):
    """A law that does not hold.

    Attributes:
        law: its name, such as ``"shape"`` or ``"adjoint"``.
        message: what was found, and what was expected.
        where: the array that it fails for, ``"x"`` or ``"weight"``; empty for the result.
        index: of the first wrong entry, or None.
    """

    def __init__(
        self, law: str, message: str, where: str = "", index: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(printable(f"{law}: {message}"))
        self.law, self.message, self.where, self.index = law, printable(message), where, index


def spelt_entry(what: str, index: tuple[int, ...] | None) -> str:
    """``"dx[0, 1]"``; ``"dx"`` for a number without axes; after words ``", at [0, 1],"``."""
    if not index:
        return what
    place = f"[{', '.join(map(str, index))}]"
    return f"{what}, at {place}," if " " in what else f"{what}{place}"


def spelt_pair(a: float, b: float) -> tuple[str, str]:
    """Two numbers with six digits, or with all of them where these agree."""
    few = f"{a:.6g}", f"{b:.6g}"
    return few if few[0] != few[1] else (repr(a), repr(b))


def first_wrong(actual: np.ndarray, expected: np.ndarray, allowed: float) -> tuple[int, ...] | None:
    """Index of the first entry that is off by more than its share of an L2 norm allowed; or None.

    An entry that is finite in only one of the two is always off.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(actual - expected)
        alike = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        off = np.where(alike, 0.0, off)  # also two infinities, two NaNs
        if float(np.sqrt(np.sum(off * off))) <= allowed:
            return None
        wrong = ~(off <= allowed / np.sqrt(max(off.size, 1)))
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def close(
    actual: Any,
    expected: Any,
    tolerance: float = 1e-10,
    what: str = "the result",
    *,
    floor: float = 0.0,
    law: str = "values",
) -> None:
    """Refuses an array that is not near another, over the whole of it, in relative L2 norm.

    Args:
        actual: the array in question, of NumPy.
        expected: what it should be, of the same shape.
        tolerance: of the norm of the difference, over the norm of expected.
        what: the array's name, for the message.
        floor: the norm of expected is taken to be at least this: for what should be zero. Without
            it a comparison with zeros is refused, since it would show little.
        law: name of the law, for the message.

    Raises:
        LawError: if the shapes differ, or the arrays do; its index is the first wrong entry's.
        ValueError: if expected is all zeros, and there is no floor.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        raise LawError(law, f"{what} has shape {actual.shape}; it must be {expected.shape}")
    norm = max(float(np.linalg.norm(expected[np.isfinite(expected)])), floor)
    if not norm and expected.size and not np.any(expected):
        raise ValueError(
            f"{what} is compared with zeros, which shows little. If it should be zero, name a "
            f"floor, the size of number at which it counts as one"
        )
    index = first_wrong(actual, expected, tolerance * norm)
    if index is not None:
        entry = spelt_entry(what, index)
        is_, should = spelt_pair(actual[index].item(), expected[index].item())
        raise LawError(law, f"{entry} is {is_}; it must be {should}", index=index)
