"""The map of the course is one: declared once, without circles, and no arrow too many."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def course_map(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    yield importlib.import_module("course_map")
    for name in ("course_map", "draw"):
        sys.modules.pop(name, None)


def test_a_page_stands_after_those_that_it_builds_upon(course_map):
    course = course_map.pages()
    before = set()
    assert len(course) == len(list((ROOT / "docs" / "course").glob("*.md"))) - 1  # the index
    for page in course:
        assert before.issuperset(page.after), page.name
        assert page.after or not before, f"{page.name} builds upon nothing"
        before.add(page.name)


def test_no_arrow_says_what_the_others_say(course_map):
    course = course_map.pages()
    for page in course:
        for name in page.after:
            others = set(page.after) - {name}
            further = {x.name for other in others for x in course_map.needed(other, course)}
            assert name not in further, f"{page.name}: {name} is needed by another of {page.after}"


def test_the_map_draws_every_arrow_once(course_map):
    figure = course_map.drawn()
    label = re.search(r'aria-label="([^"]*)"', figure)[1]
    for page in course_map.pages():
        assert f">{page.number}. " in figure
        told = re.search(rf"\b{page.number} upon ([\w, ]+)", label)
        assert (told[1].count(",") + 1 if told else 0) == len(page.after)


def test_minutes_count_what_is_read(course_map):
    words = "word " * 1200  # ten minutes
    shown = '```python exec="1" source="above"\n' + "x = 1\n" * 100 + "```\n"  # ten
    folded = '```python exec="1" session="a"\n' + "x = 1\n" * 500 + "```\n"
    equations = "\\[\nx\n\\]\n\n" * 10  # ten
    assert course_map.minutes_of(words) == 10
    assert course_map.minutes_of(words + "\n\n" + shown + folded) == 20
    assert course_map.minutes_of(f"---\n{words}\n---\n{words}\n\n{equations}") == 20
    assert course_map.minutes_of(f"{words}\n\n## Exercises\n\n{words}") == 10


def test_a_teachers_plan_gives_nothing_before_what_it_needs(course_map):
    text = (ROOT / "docs" / "teachers.md").read_text("utf-8")
    plan = re.findall(r"^print\(session\((\d), \[(.*)\]\)\)$", text, re.MULTILINE)
    assert [int(number) for number, _ in plan] == [1, 2, 3, 4, 5, 6]
    course, before = course_map.pages(), set()
    minutes = {page.name: page.reading for page in course}
    for number, listed in plan:
        names = re.findall(r'"(\w+)"', listed)
        for name in names:
            lacking = {page.name for page in course_map.needed(name, course)} - before
            assert not lacking, f"session {number} reads {name} before {lacking}"
            before.add(name)
        assert sum(minutes[name] for name in names) <= 150, number  # to be read before a session


def test_every_page_has_the_exercises_that_are_set(course_map):
    for page in course_map.pages():
        assert page.exercises_to_set, page.name
        assert max(page.exercises_to_set) <= page.exercises, page.name
