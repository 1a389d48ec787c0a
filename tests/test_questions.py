"""The questions at the end of the course's pages: enough of them, true, and exported for Anki."""

import csv
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import pvt_ref

DOCS = Path(__file__).parents[1] / "docs"
COURSE = sorted(p.stem for p in (DOCS / "course").glob("*.md") if p.stem != "index")  # lessons


@pytest.fixture
def questions(monkeypatch):
    """The module of the pages' tools that reads them."""
    monkeypatch.syspath_prepend(str(DOCS / "tools"))
    yield importlib.import_module("questions")
    for name in ("questions", "asked", "equations"):
        sys.modules.pop(name, None)


@pytest.fixture
def nav():
    """The part of the site's navigation that has the pages of the course."""
    told = (DOCS.parent / "mkdocs.yml").read_text("utf-8")
    found = re.findall(r'^ +- "?(.+?)"?: (course/\w+\.md)$', told, re.MULTILINE)
    assert len(found) == len(COURSE)
    return [{"Learn": [{title: path} for title, path in found]}]


@pytest.mark.parametrize("page", COURSE)
def test_a_page_asks_8_to_12_questions_whose_answers_hold(page, questions):
    asked = questions.read(page)
    assert 8 <= len(asked) <= 12
    for question in asked:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", question.id)
        assert question.text.endswith(("?", "."))
        assert question.answer.endswith((".", "?"))
        assert "](" not in question.text + question.answer  # they are shown in several places
        assert len(question.text) < 260, question.id
        assert len(question.answer) < 330, question.id
        try:
            exec(compile(question.check, question.id, "exec"), {"np": np, "pvt_ref": pvt_ref})
        except Exception as error:
            raise AssertionError(f"{question.id}: what it checks does not hold") from error


def test_every_question_has_an_id_of_its_own_and_every_file_a_page(questions):
    ids = [question.id for page in COURSE for question in questions.read(page)]
    assert len(ids) == len(set(ids))
    assert sorted(path.stem for path in questions.FOLDER.iterdir()) == COURSE


def test_an_answer_with_a_number_that_was_computed_is_checked(questions):
    """Digits that stand for a result, and not for a size that the question gave."""
    for page in COURSE:
        for question in questions.read(page):
            figures = re.findall(r"\b\d+\.\d+\b|\b\d+(?:,\d{3})+\b", question.answer)
            if set(figures) - set(re.findall(r"[\d.,]+", question.text)):
                assert question.check, question.id


def test_tex_in_questions_renders(questions):
    pytest.importorskip("quickjs")
    equations = importlib.import_module("equations")
    if not (equations.KATEX / "katex.min.js").is_file():
        pytest.skip("needs KaTeX: npm ci --prefix docs/tools")
    count = 0
    for page in COURSE:
        for question in questions.read(page):
            text = re.sub(r"`[^`]*`", "", question.text + " " + question.answer)
            assert text.count("$") % 2 == 0, question.id
            for tex in re.findall(r"\$(.+?)\$", text):
                equations.render(tex, display=False)
                count += 1
    assert count > 200


def test_the_file_for_anki_reads_back(questions, nav):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    text = importlib.import_module("asked").anki(nav)
    head, body = text.splitlines()[:5], text.splitlines()[5:]
    told = dict(line.removeprefix("#").split(":") for line in head)
    assert (told["separator"], told["html"]) == ("tab", "true")
    guid, deck, tags = (int(told[f"{name} column"]) - 1 for name in ("guid", "deck", "tags"))
    rows = list(csv.reader(body, delimiter="\t"))
    asked = {f"pvt_ref-{q.id}": q for page in COURSE for q in questions.read(page)}
    assert {row[guid] for row in rows} == set(asked)
    assert len(rows) == len(asked)
    assert len({row[deck] for row in rows}) == len(COURSE)
    for row in rows:
        assert len(row) == 5
        assert row[tags].startswith("pvt_ref ")
        front, back = (x for i, x in enumerate(row) if i not in (guid, deck, tags))
        question = asked[row[guid]]
        for html, source in ((front, question.text), (back, question.answer)):
            assert not re.search(r"\$|`|\*\*|arithmatex", html)
            tex = re.findall(r"\$(.+?)\$", re.sub(r"`[^`]*`", "", source))
            assert html.count(r"\(") == html.count(r"\)") == len(tex)
    first = next(row for row in rows if row[guid] == "pvt_ref-linear-dx")
    assert first[deck] == "pvt_ref::03. Linear"
    assert r"\(\mathrm{d}x = \mathrm{d}y\, \mathbf{W}\)" in first[3]


def test_the_titles_of_the_pages_are_read_in_order(questions, nav):
    assert list(questions.titles(nav))[:3] == ["pyramid", "notation", "linear"]
    assert questions.titles([{"Use it": "use.md"}, "plain.md"]) == {}


@pytest.mark.parametrize("page", COURSE)
def test_exercises_are_numbered_and_graded(page):
    text = (DOCS / "course" / f"{page}.md").read_text("utf-8")
    text = text[text.index("\n## Exercises\n") :]
    found = re.findall(r"^\*\*(\d+) \((easy|medium|hard)\)\.\*\* ", text, re.MULTILINE)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    assert len(found) == text.count('??? success "Solution"') >= 3
    assert {grade for _, grade in found} == {"easy", "medium", "hard"}
