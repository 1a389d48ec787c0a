"""The course's code runs, solutions included, and its equations and tables hold.

The site runs the shown blocks when it is built; here every fenced block of a page runs, in order.
"""

import contextlib
import io
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "course").glob("*.md"))
BLOCK = re.compile(r"^( *)```python([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def lesson(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "tools"))
    import lesson

    yield lesson
    sys.modules.pop("lesson", None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, lesson):
    names: dict = {}
    blocks = BLOCK.findall(page.read_text("utf-8"))
    solutions = [code for indent, _, code in blocks if indent]
    assert len(solutions) >= 2
    assert all("assert " in code for code in solutions)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for indent, _, code in blocks:
            # a solution stands on its own
            exec(textwrap.dedent(code), {} if indent else names)
    text = printed.getvalue()
    assert "| symbol | shape |" in text
    assert "finite differences" in text
    assert text.count("PyTorch") >= 2
    assert not re.search(r"^(True |False )*False\b", text, re.MULTILINE)


def test_a_lesson_shows_only_what_holds(lesson):
    x = np.ones((2, 3))
    assert "| `x` | (B, C) | (2, 3) | tokens |" in lesson.shapes(
        {"B": 2, "C": 3}, x=(x, "B C", "tokens")
    )
    with pytest.raises(AssertionError, match=r"x is \(2, 3\), the page says C B"):
        lesson.shapes({"B": 2, "C": 3}, x=(x, "C B", "tokens"))
    assert "less than 1e-03" in lesson.compare("x", x, x + 1e-5, 1e-3)
    with pytest.raises(AssertionError, match=r"1\.0e-02 apart"):
        lesson.compare("x", 1.01 * x, x, 1e-3)
    with pytest.raises(AssertionError, match="compared with zero"):
        lesson.compare("x", x, 0 * x, 1e-3)
    gradient = lesson.finite_difference(lambda v: float(np.sum(v**3)), 2 * x)
    np.testing.assert_allclose(gradient, 12, rtol=1e-8)
    shown = lesson.source(lesson.finite_difference)
    assert "central differences" not in shown
    assert "gradient = np.empty_like(x)" in shown
