"""The pages of the course as one: what the PDF is printed from."""

import importlib
import re
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "docs" / "tools"


@pytest.fixture
def print_course(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("print_course")
    for name in ("print_course", "course_map"):
        sys.modules.pop(name, None)


def page(path, article):
    head = '<html><head><title>a page</title><link rel="stylesheet" href="../x.css"></head>'
    path.write_text(f'{head}<body><article class="a">{article}</article>end</body></html>', "utf-8")
    return path


def test_ids_and_links_lead_to_the_right_page(print_course, tmp_path):
    first = page(
        tmp_path / "first.html",
        '<h1 id="top">One<a class="headerlink" href="#top">&para;</a></h1>'
        '<a href="#top">here</a> <a href="second.html">there</a>'
        '<a href="second.html#top">in it</a>'
        '<a href="other.html">not printed</a> <a href="https://arxiv.org/abs/1">paper</a>'
        '<img src="../images/a.png">'
        '<svg><path id="m1"/><use xlink:href="#m1" clip="url(#m1)"/></svg>',
    )
    second = page(
        tmp_path / "second.html",
        '<h1 id="top">Two</h1><details class="note"><p>code of a figure</p></details>'
        '<details class="success"><p>a solution</p></details><script>gone()</script>',
    )
    whole = print_course.joined([first, second])
    ids = re.findall(r'\sid="([^"]*)"', whole)
    assert ids == ["first", "first-top", "first-m1", "second", "second-top"]
    links = re.findall(r'\s(?:href|xlink:href)="([^"]*)"', whole)
    inside = ["#first-top", "#second", "#second-top", "https://arxiv.org/abs/1", "#first-m1"]
    assert links == ["../x.css", *inside]
    assert "url(#first-m1)" in whole
    assert f'src="{(tmp_path.parent / "images" / "a.png").as_uri()}"' in whole
    assert "not printed" in whole
    assert "code of a figure" not in whole
    assert "gone()" not in whole
    assert '<details open class="success"><p>a solution' in whole
    assert whole.count("<title>") == 1
    assert "the course</title>" in whole
    assert whole.endswith("end</body></html>")


def test_every_page_of_the_course_is_printed_once_and_in_order(print_course, tmp_path):
    names = [path.relative_to(tmp_path).as_posix() for path in print_course.pages(tmp_path)]
    assert names[:2] == ["course/index.html", "course/pyramid.html"]
    assert names[-1] == "exercises.html"
    lessons = {f"course/{path.stem}.html" for path in (TOOLS.parent / "course").glob("*.md")}
    assert set(names) == lessons | {"exercises.html"}
    assert len(names) == len(set(names))
