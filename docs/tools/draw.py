"""Figures of the pages: drawn by the package's own numbers while the site is built.

A figure is one SVG inside the page. Its colours are the page's, by CSS variables (course.css), so
that it suits light and dark; its text is text. Drawn twice, it has the same bytes.
"""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

#: Stand-ins that matplotlib draws with; :func:`show` writes the page's own colours in their place.
INK, FAINT, PAPER = "#010101", "#020202", "#fdfdfd"
SERIES = ("#000011", "#000022", "#000033", "#000044", "#000055")

_IN_THE_PAGE = {
    INK: "var(--figure-ink)",
    FAINT: "var(--figure-faint)",
    PAPER: "var(--figure-paper)",
    **{colour: f"var(--figure-{number})" for number, colour in enumerate(SERIES, start=1)},
}

_STYLE: Any = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "image.cmap": "viridis",
    "legend.edgecolor": "none",
    "legend.facecolor": "none",
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def panels(
    rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 2.8, **more: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure of width x height inches and its axes, to be drawn in inside a ``with``.

    Inside it, whatever is added takes the style of the site; after it, matplotlib's settings are
    what they were.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))  # pyplot would keep it, and choose a window
        yield figure, figure.subplots(rows, columns, **more)


def bare(*axes: Any) -> None:
    """Takes ticks and frames away: for pictures."""
    for ax in axes:
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)


def show(figure: Figure, name: str, alt: str) -> str:
    """The figure as HTML for a page, to be printed by a block with ``html="1"``.

    Args:
        figure: from :func:`panels`.
        name: unique on the page; ids in the SVG begin with it.
        alt: what can be seen, for who cannot see it.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    width = 72 * figure.get_figwidth()
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    # ids are made of coordinates with all their digits, of which the layout leaves the last open
    found = dict.fromkeys(re.findall(r'id="([mp][0-9a-f]{10})"', svg))
    numbers = {old: f"{old[0]}{number}" for number, old in enumerate(found)}
    svg = re.sub(r"\b[mp][0-9a-f]{10}\b", lambda old: numbers.get(old[0], old[0]), svg)
    # of a picture's bytes, so that one shown twice would have it twice
    svg = re.sub(r' id="image[0-9a-f]+"', "", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for stand_in, colour in _IN_THE_PAGE.items():
        svg = svg.replace(stand_in, colour)
    # an upright font of the page rather than matplotlib's own
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--md-text-font-family, sans-serif)", svg)
    label = html.escape(alt, quote=True)
    svg = svg.replace(
        "<svg",
        f'<svg role="img" aria-label="{label}" style="max-width:{width:.0f}pt"',
        1,
    )
    one_line = re.sub(r"\s*\n\s*", " ", svg)
    return f'<div class="drawn">{one_line}</div>'
