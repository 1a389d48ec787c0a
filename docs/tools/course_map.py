"""The map of the course: which page builds upon which, and how long each takes.

What builds upon what is told once, in course.toml; order and titles are the navigation's, and the
minutes are counted from the pages themselves. Functions return text; pages print it. Links end in
.html: what a page prints is Markdown whose links mkdocs does not follow.
"""

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1]

#: A reader's pace: words of prose, lines of code and displayed equations a minute.
WORDS, LINES, EQUATIONS = 120, 10, 1
#: Minutes that an exercise takes.
EXERCISE = 8

_NAV = re.compile(r'^ +- "?(\d+\w?)\. (.+?)"?: course/(\w+)\.md$', re.MULTILINE)
_FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Page(NamedTuple):
    """A page of the course."""

    name: str
    number: str
    title: str
    after: tuple[str, ...]  # nearest pages that it builds upon
    at: float  # place in its row of the drawn map
    draw: str
    exercises_to_set: tuple[int, ...]
    reading: int  # minutes
    exercises: int  # how many there are


def minutes_of(markdown: str) -> int:
    """Minutes that a page takes to read, its exercises not counted; to the next five."""
    text = re.sub(r"\A---\n.*?^---\n", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.split(r"^## Exercises$", text, flags=re.MULTILINE)[0]
    lines = 0
    for _, _, options, code in _FENCE.findall(text):
        if 'exec="1"' not in options or "source=" in options:  # what draws and prints is folded
            lines += code.count("\n")
    text = _FENCE.sub("", text)
    equations = len(re.findall(r"^\\\[", text, re.MULTILINE))
    text = re.sub(r"^\\\[.*?^\\\]", "", text, flags=re.DOTALL | re.MULTILINE)
    minutes = len(text.split()) / WORDS + lines / LINES + equations / EQUATIONS
    return 5 * max(1, round(minutes / 5))


def pages() -> list[Page]:
    """The pages of the course, in the order of the navigation.

    Raises:
        AssertionError: if course.toml and the navigation have other pages, or another order.
    """
    told = tomllib.loads((Path(__file__).parent / "course.toml").read_text("utf-8"))
    nav = _NAV.findall((DOCS.parent / "mkdocs.yml").read_text("utf-8"))
    names = [name for _, _, name in nav]
    assert list(told) == names, f"course.toml has {list(told)}, the navigation {names}"
    found = []
    for number, title, name in nav:
        text = (DOCS / "course" / f"{name}.md").read_text("utf-8")
        exercises = len(re.findall(r"^\*\*\d+ \(", text.partition("\n## Exercises\n")[2], re.M))
        row = told[name]
        found.append(Page(name, number, title, tuple(row["after"]), row["at"], row["draw"],
                          tuple(row["set"]), minutes_of(text), exercises))  # fmt: skip
    return found


def needed(name: str, course: list[Page]) -> list[Page]:
    """The pages that one builds upon, nearest or not, in the order of the course."""
    by_name = {page.name: page for page in course}
    found: set[str] = set()
    ahead = list(by_name[name].after)
    while ahead:
        if (here := ahead.pop()) not in found:
            found.add(here)
            ahead += by_name[here].after
    return [page for page in course if page.name in found]


def depths(course: list[Page]) -> dict[str, int]:
    """How many pages, one upon the other, lie below each."""
    found: dict[str, int] = {}
    for page in course:  # a page stands after those that it builds upon
        found[page.name] = 1 + max((found[name] for name in page.after), default=-1)
    return found


def _link(page: Page, here: str) -> str:
    return f"[{page.title}]({here}{page.name}.html)"


def table(here: str = "") -> str:
    """All pages: what each builds upon, its minutes, and how many exercises it has.

    Args:
        here: the way from the page that prints it to the folder of the course.
    """
    course = pages()
    titles = {page.name: f"[{page.number}]({here}{page.name}.html)" for page in course}
    rows = ["| | page | builds upon | minutes | exercises |", "| --- | --- | --- | --- | --- |"]
    for page in course:
        after = ", ".join(titles[name] for name in page.after) or "nothing"
        rows.append(
            f"| {page.number} | {_link(page, here)} | {after} | {page.reading} | {page.exercises} |"
        )
    total = sum(page.reading for page in course)
    count = sum(page.exercises for page in course)
    rows.append(f"| | all, {total / 60:.0f} hours | | {total} | {count} |")
    return "\n".join(rows)


def way(name: str, here: str = "") -> str:
    """One line: the shortest way to a page, and how long it takes."""
    course = pages()
    (goal,) = [page for page in course if page.name == name]
    stops = [*needed(name, course), goal]
    links = " → ".join(f"[{page.number}]({here}{page.name}.html)" for page in stops)
    return f"**{goal.title}**: {links}, {sum(page.reading for page in stops)} minutes."


def session(number: int, names: list[str], here: str = "course/") -> str:
    """A teacher's table of some pages: minutes, what to draw, which exercises to set."""
    course = {page.name: page for page in pages()}
    rows = ["| page | minutes | draw | set |", "| --- | --- | --- | --- |"]
    for name in names:
        page = course[name]
        exercises = ", ".join(map(str, page.exercises_to_set))
        assert max(page.exercises_to_set) <= page.exercises, f"{name} has no exercise {exercises}"
        rows.append(f"| {_link(page, here)} | {page.reading} | {page.draw} | {exercises} |")
    home = sum(EXERCISE * len(course[name].exercises_to_set) for name in names)
    rows.append(
        f"| session {number} | {sum(course[name].reading for name in names)} | | {home} minutes |"
    )
    return "\n".join(rows)


def drawn() -> str:
    """The map as a figure: an arrow to each page from those that it builds upon."""
    from draw import FAINT, INK, PAPER, bare, panels, show

    course = pages()
    depth = depths(course)
    rows = 1 + max(depth.values())
    place = {page.name: (page.at, -float(depth[page.name])) for page in course}
    with panels(width=7.5, height=0.72 * rows) as (figure, ax):
        bare(ax)
        ax.set(xlim=(0, 1), ylim=(-rows + 0.4, 0.6))
        for page in course:
            for name in page.after:
                (x, y), (u, v) = place[name], place[page.name]
                ax.annotate("", (u, v + 0.2), (x, y - 0.2), zorder=1,
                            arrowprops={"arrowstyle": "->", "color": FAINT, "lw": 1})  # fmt: skip
            short = re.sub(r"^The | and .*|: .*|,.*", "", page.title)
            short = short[0].upper() + short[1:]
            ax.text(*place[page.name], f"{page.number}. {short}", ha="center", va="center",
                    zorder=2, fontsize=8, color=INK,
                    bbox={"boxstyle": "round,pad=0.3", "fc": PAPER, "ec": FAINT})  # fmt: skip
    number = {page.name: page.number for page in course}
    told = "; ".join(
        f"{page.number} upon {', '.join(number[name] for name in page.after)}"
        for page in course
        if page.after
    )
    alt = f"The pages of the course by number, each below those that it builds upon: {told}."
    return show(figure, "course-map", alt)
