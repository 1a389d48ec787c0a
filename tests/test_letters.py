"""Each letter of a page's equations has one meaning, stated for the whole course or on the page."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs" / "tools"))
    yield importlib.import_module("letters")
    for name in ("letters", "asked", "equations"):
        sys.modules.pop(name, None)


def page(path, **meta):
    return SimpleNamespace(file=SimpleNamespace(src_uri=path, src_path=path), meta=meta)


@pytest.mark.parametrize(
    ("tex", "found"),
    [
        (r"y_{aj} = x\, w", "y a j x w"),
        (r"2 x^2 + \log x \le \infty", "x x"),
        (r"\alpha + \varphi(\ell) \cdot \partial x", r"\alpha \varphi \ell x"),
        # a font makes another letter, with braces or without
        (r"\mathbf{W}_{ji} W", r"\mathbf{W} j i W"),
        (r"\mathbf W + \mathcal L", r"\mathbf{W} \mathcal{L}"),
        # accents and primes do not
        (r"\hat{x} \bar y' \widehat{\mathbf{W}}", r"x y \mathbf{W}"),
        # words and labels hold none, however they are nested
        (r"\text{if {all} are} x", "x"),
        (r"\operatorname{Softmax}(x) \operatorname*{max}_y", "x y"),
        (r"\mathrm{d}x\, \mathbf{W}^\mathrm{Q}", r"x \mathbf{W}"),
        (r"x^{\mathsf T} y^{\mathsf{T}} z^\mathsf T", "x y z"),
        (r"\frac{x}{\sqrt{y_{a{i}}}}", "x y a i"),
        # after the end of a line comes a letter, not the rest of a command
        ("\\begin{aligned} x &= y \\\\\nz &= t \\\\y \\end{aligned} \\tag{1}", "x y z t y"),
    ],
)
def test_letters_are_found_and_words_are_not(letters, tex, found):
    assert [names[-1] for names in letters.letters_in(tex)] == found.split()


@pytest.mark.parametrize("tex", [r"d_\text{head}", r"d_{\text{head}}", r"d _ { \text {head}}"])
def test_a_word_below_may_make_another_letter(letters, tex):
    assert list(letters.letters_in(tex)) == [(r"d_\text{head}", "d")]


@pytest.mark.parametrize("tex", [r"\text{if", r"x + \mathbf{W_{ij}"])
def test_a_brace_that_is_not_closed_is_named(letters, tex):
    with pytest.raises(ValueError, match="brace is not closed"):
        list(letters.letters_in(tex))


def test_a_letter_of_the_course_is_there_once(letters):
    every = [letter for row in letters._course() for letter in letters.read_letters({row: ""})]
    assert len(every) == len(set(every)) > 30
    for letter in every:  # and as equations have it
        assert letter in next(letters.letters_in(letter)), letter


@pytest.mark.parametrize(
    ("equations", "stated", "wrong"),
    [
        ([r"F_i = \mathbf{W} x"], {}, []),
        (["q k", "s"], {"q, k": "queries and keys", "s": "scores"}, []),
        (["q + q", "q"], {}, [r"q in 'q \+ q' is stated nowhere", "q in 'q' is stated nowhere"]),
        (["F"], {"F": "a filter"}, ["F is 'a map.*' in the whole course, and .* 'a filter' too"]),
        (["q"], {"q, k": "queries and keys"}, ["k is stated, but not used"]),
        ([r"\mathbf{q}"], {"q": "a query"}, [r"\\mathbf{q} in .*", "q is stated, but not used"]),
        # with a word below, a letter is what it would be without, unless the two are stated
        ([r"d_\text{head}"], {}, []),
        ([r"d"], {}, ["d in 'd' is stated nowhere"]),
        ([r"T_\text{warm}"], {"T": "steps"}, []),
        ([r"T_\text{warm} < T"], {r"T, T_\text{warm}": "steps, of all and of warm-up"}, []),
        ([r"T_\text{warm}"], {r"T, T_\text{warm}": "steps"}, ["T is stated, but not used"]),
    ],
)
def test_a_letter_is_stated_once_and_used(letters, equations, stated, wrong):
    said = letters.wrong_letters(equations, stated)
    assert len(said) == len(wrong)
    for line, pattern in zip(said, wrong, strict=True):
        assert re.fullmatch(pattern, line), line


def test_the_build_ends_at_a_letter_that_nobody_states(letters):
    pytest.importorskip("quickjs", reason="needs the extra docs")
    exceptions = pytest.importorskip("mkdocs.exceptions", reason="needs the extra docs")
    table, x, q = (f'<span class="arithmatex">\\({tex}\\)</span>' for tex in "qxq")
    less = '<span class="arithmatex">\\(x &lt; q\\)</span>'
    build, told = letters.on_page_content, page("course/a.md", letters={"q": "a query"})
    for content in (table + less, x + table + q):
        build(content, told, None, None)
    with pytest.raises(
        exceptions.PluginError, match=r"course/a\.md: q in 'x < q' is stated nowhere"
    ):
        build(less, page("course/a.md"), None, None)
    with pytest.raises(exceptions.PluginError, match=r"course/a\.md: q is stated, but not used"):
        build(table + x, told, None, None)
    for path in ("api/layers.md", "review.md", "glossary.md"):
        build(less, page(path), None, None)


def test_a_pages_letters_are_folded_at_the_end_of_its_first_section(letters):
    told = page("course/a.md", letters={"q, k": "queries and keys"})
    first, second = "# A\n\n## One\n\nText.\n", "\n## Two\n\nMore.\n"
    table = (
        '??? note "Letters of this page"\n\n'
        "    | letter | what it is |\n    | --- | --- |\n    | $q$, $k$ | queries and keys |\n\n"
    )
    made = letters.on_page_markdown
    assert made(first + second, told, None, None) == f"{first}\n{table}{second.lstrip()}"
    assert made(first, told, None, None) == f"{first}\n{table}"
    assert made(first + second, page("course/a.md"), None, None) == first + second
