"""The notebooks of the built site, run cell by cell: they print what their pages show.

    make check-site        builds the site, then runs this and check_site.py

Each runs in names of its own, as plain Python. Text and figures must be the page's to the last
character, and so must the words of tables, source and sentences that were printed as Markdown.
"""

import contextlib
import html
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import threadpoolctl

pytest.importorskip("markdown", reason="needs the extra 'docs': make check-site installs it")
import markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "tools"))
from in_notebook import plain

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("SITE", ROOT / "site")).resolve()
NOTEBOOKS = sorted((SITE / "course").glob("*.ipynb"))


@pytest.fixture
def from_the_notebook(monkeypatch):
    """As Jupyter would start it, in a folder of the checkout; the pages' tools are forgotten.

    BLAS has as many threads as when the site was built: their number changes last bits, of which
    one figure tells.
    """
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "docs" / "course")
    with threadpoolctl.threadpool_limits(os.cpu_count(), user_api="blas"):
        yield
    for path in (ROOT / "docs" / "tools").glob("*.py"):
        sys.modules.pop(path.stem, None)


def words(text: str) -> str:
    """What is read of HTML: no tags, one space where there were some; equations are left out."""
    text = re.sub(r'<(span|div) class="(equation|arithmatex)">.*?</math>.*?</\1>', " ", text)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def judge(first_line: str, printed: str, page: str) -> str:
    """What of a cell's output the page does not show; nothing if all is there."""
    if first_line == "# prints HTML":
        return "" if printed.strip() in page else printed.strip()[:200]
    if first_line != "# prints Markdown":
        shown = {html.unescape(text) for text in re.findall("<code>(.*?)</code>", page, re.DOTALL)}
        return "" if printed.strip() in {text.strip() for text in shown} else printed
    printed = plain(printed)
    if "$" in printed:  # equations are set by the site's own hook
        between = re.split(r"\$[^$]+\$|[|\n]", printed)
        missing = [part for part in between if words(markdown.markdown(part)) not in words(page)]
        return "\n".join(missing)
    extensions = ["tables", "md_in_html", "pymdownx.superfences", "pymdownx.details"]
    said = words(markdown.markdown(printed, extensions=extensions))
    return "" if said in words(page) else said


def run(cells: list[str], page: str) -> list[str]:
    """Runs cells in one set of names; returns what the page does not show."""
    names: dict = {"__name__": "__main__"}
    missing = []
    for number, cell in enumerate(cells):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(cell, f"cell {number}", "exec"), names)
        if number:  # the first says where the package is
            missing.append(judge(cell.partition("\n")[0], printed.getvalue(), page))
    return [told for told in missing if told]


def test_there_are_notebooks():
    lessons = {page.stem for page in (ROOT / "docs" / "course").glob("*.md")} - {"index"}
    assert {path.stem for path in NOTEBOOKS} == lessons
    assert len(lessons) > 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_its_page_shows(path, from_the_notebook):
    made = json.loads(path.read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert run(cells, path.with_suffix(".html").read_text("utf-8")) == []


def test_a_number_that_is_not_the_page_s_is_found():
    page = "<code>y = 2\n</code><table><tr><td>a</td>\n<td>3</td></tr></table><svg>4</svg>"
    table = "# prints Markdown\nprint('| a | {} |\\n| --- | --- |')"
    good = ["", "print('y = 2')", "# prints HTML\nprint('<svg>4</svg>')", table.format(3)]
    assert run(good, page) == []
    bad = ["", "print('y = 3')", "# prints HTML\nprint('<svg>5</svg>')", table.format(4)]
    assert len(run(bad, page)) == 3
