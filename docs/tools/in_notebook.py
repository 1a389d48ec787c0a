"""In a notebook, what a cell prints as Markdown or HTML is shown as such.

Cells of the course's notebooks begin with ``# prints Markdown`` or ``# prints HTML`` where the page
shows it so. Run as plain Python, such a cell just prints.
"""

import io
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

STYLE = Path(__file__).parents[1] / "assets" / "course.css"
_FOLDED = re.compile(r'^\?\?\? \w+ "([^"\n]+)"\n((?: {4}[^\n]*\n|\n)*)', re.MULTILINE)
_REFERENCE = re.compile(r"\[(`[^`\n]+`)\]\[[\w.]+\]")
_CLASS = re.compile(r"\{ \.[\w-]+ \}$", re.MULTILINE)
_FIRST_LINE = re.compile(r"# prints (Markdown|HTML)\n")


def on_paper(html: str) -> str:
    """HTML of a page with the page's light colours, which a notebook does not have."""
    found = re.search(r"(--figure-ink:.*?)\s*\}", STYLE.read_text("utf-8"), re.DOTALL)
    assert found is not None, f"{STYLE} has no colours for figures"
    colours = " ".join(found[1].split())
    return f'<div style="background: white; color: #1c1c22; {colours}">{html}</div>'


def plain(markdown: str) -> str:
    """Markdown without what only the site reads: links to its reference, and classes."""
    return _CLASS.sub("", _REFERENCE.sub(r"\1", markdown))


def unfold(markdown: str) -> str:
    """The site's folds, ``??? note "title"``, in HTML, which Jupyter folds too."""

    def details(match: re.Match[str]) -> str:
        inside = textwrap.dedent(match[2]).strip("\n")
        return f"<details>\n<summary>{match[1]}</summary>\n\n{inside}\n\n</details>\n\n"

    return _FOLDED.sub(details, markdown)


class Shown:
    """Takes what a cell prints, and shows it when the cell ends."""

    def __init__(self, display: Any):
        self.display, self.kind, self.printed = display, "", io.StringIO()
        self.stdout: Any = None

    def pre_run_cell(self, info: Any) -> None:
        """Called by IPython before a cell."""
        kind = _FIRST_LINE.match(info.raw_cell or "")
        if kind:
            self.kind, self.printed, self.stdout = kind[1], io.StringIO(), sys.stdout
            sys.stdout = self.printed

    def post_run_cell(self, result: Any) -> None:
        """Called by IPython after a cell, also one that raised."""
        if self.kind:
            sys.stdout, kind, self.kind = self.stdout, self.kind, ""
            text = self.printed.getvalue()
            if kind == "HTML":
                self.display.display(self.display.HTML(on_paper(text)))
            else:
                self.display.display(self.display.Markdown(unfold(plain(text))))


def begin() -> None:
    """Shows what later cells print; called by the first cell, as often as one runs it."""
    if "IPython" not in sys.modules:
        return
    from IPython import display, get_ipython

    shell = get_ipython()
    if shell is not None and not hasattr(shell, "shown_as_the_page_does"):
        shell.shown_as_the_page_does = shown = Shown(display)
        shell.events.register("pre_run_cell", shown.pre_run_cell)
        shell.events.register("post_run_cell", shown.post_run_cell)
