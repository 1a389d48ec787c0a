"""What the pages of the course print: source, shapes and checks, shown only if they hold.

Everything here returns text; pages print it, since only their own print is looked at.
"""

import functools
import inspect
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray


def source(*functions: Any) -> str:
    """The source of functions or records, as it is installed, without docstrings.

    A line above says which file of the package it is from, and links that file's reference.
    """
    blocks, last = [], None
    for function in functions:
        text = textwrap.dedent(inspect.getsource(function))
        if '"""' in text:  # the page says it in more words
            start = text.index('"""')
            end = text.index('"""', start + 3) + 3
            text = text[:start].rstrip() + re.sub(r"^\n\n", "\n", text[end:])
        if (module := function.__module__) != last and module.startswith("pvt_ref."):
            blocks.append(f"{_file(module)}{{ .listing }}\n")
        last = module
        blocks.append(f"```python\n{text.rstrip()}\n```\n")
    return "\n".join(blocks)


def _file(module: str) -> str:
    """A module's file, as a link where the reference has it."""
    name = f"`{module.replace('.', '/')}.py`"
    return f"[{name}][{module}]" if module in _in_the_reference() else name


@functools.cache
def _in_the_reference() -> frozenset[str]:
    """What the pages of the reference list by name."""
    pages = (Path(__file__).parents[1] / "api").glob("*.md")
    return frozenset(
        re.findall(r"^::: (\S+)$", "\n".join(p.read_text("utf-8") for p in pages), re.M)
    )


def shapes(sizes: dict[str, int], **arrays: tuple[Array, str, str]) -> str:
    """A table of arrays: symbol, shape in letters and in numbers, meaning.

    Args:
        sizes: the letters.
        arrays: by symbol, the array, its shape in letters (``"B n C"``), and what it is.

    Raises:
        AssertionError: if an array has another shape, or if two letters of the table have one size:
            then one could stand for the other, and nothing would show it.
    """
    used = {letter for _, letters, _ in arrays.values() for letter in letters.split()}
    by_size: dict[int, str] = {}
    for letter in sorted(used):
        other = by_size.setdefault(sizes[letter], letter)
        assert other == letter, f"{other} and {letter} are both {sizes[letter]}: change one"
    rows = ["| symbol | shape | here | what it is |", "| --- | --- | --- | --- |"]
    for symbol, (x, letters, meaning) in arrays.items():
        expected = tuple(sizes[letter] for letter in letters.split())
        assert x.shape == expected, f"{symbol} is {x.shape}, the page says {letters} = {expected}"
        # symbols.js finds the axes by their class
        written = ", ".join(f'<span class="axis">{letter}</span>' for letter in letters.split())
        rows.append(f"| `{symbol}` | ({written}) | {expected} | {meaning} |")
    return "\n".join(['<div class="shapes" markdown="1">', "", *rows, "", "</div>"])


def compare(name: str, ours: Array, theirs: Array, tolerance: float) -> str:
    """One line: the error of an array relative to the norm of another, and the bound on it.

    Raises:
        AssertionError: if the error is above the bound, or the second array is zero.
    """
    assert ours is not theirs, f"{name}: compared with itself, which shows nothing"
    norm = float(np.linalg.norm(theirs))
    assert norm > 0, f"{name}: compared with zero, which shows nothing"
    error = float(np.linalg.norm(ours - theirs)) / norm
    assert error <= tolerance, f"{name}: {error:.1e} apart, allowed is {tolerance:.0e}"
    shown = f"{error:.0e}" if error else "0"
    return f"{name:<28} relative error {shown:>5}, bound {tolerance:.0e}"


def finite_difference(f: Callable[[Array], float], x: Array, step: float = 1e-5) -> Array:
    """dL/dx by central differences, a number at a time: ``(L(x + h) - L(x - h)) / 2h``."""
    gradient = np.empty_like(x)
    for place in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            ends.append(f(moved))
        gradient[place] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def stored(lesson: str) -> dict[str, Array]:
    """What PyTorch computed for the numbers of a page, by symbol; see store_pytorch.py."""
    path = Path(__file__).parents[1] / "course" / "pytorch" / f"{lesson}.json"
    arrays = json.loads(path.read_text(encoding="utf-8"))
    return {symbol: np.array(values) for symbol, values in arrays.items()}
