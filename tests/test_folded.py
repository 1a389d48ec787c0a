"""Code that only prints a table or draws is folded below what it made, and nothing else is."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PAGE = SimpleNamespace(file=SimpleNamespace(src_uri="course/a.md"))


@pytest.fixture
def fold(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs" / "tools"))
    hook = importlib.import_module("folded")
    yield lambda markdown: hook.on_page_markdown(markdown, PAGE, None, None)
    sys.modules.pop("folded", None)


def block(options: str, code: str) -> str:
    return f'```python exec="1"{options} session="a"\n{code}\n```\n'


@pytest.mark.parametrize(
    ("hidden", "title"),
    [
        (block("", "print(shapes({}))"), "The code of the table, and of the arrays used below"),
        (block("", 'print("| a |")'), "The code of the table"),
        (block("", 'print(f"| {a} |")'), "The code of the table"),
        (block(' result="text"', "print(1)"), "The code of the table"),
        (block(' html="1"', "a\n" * 5), "The code of the figure"),
    ],
)
def test_hidden_code_is_folded_below_what_it_printed(fold, hidden, title):
    told = fold(f"{hidden}\n*So* it is.\n\nMore.\n")
    before, after = told.split(f'??? note "{title}"\n\n    ```python\n    ')
    assert after.startswith(hidden.split("\n")[1])
    assert before.startswith(hidden)
    if "figure" in title:  # its caption stays close to it
        assert before.endswith("*So* it is.\n\n")
    else:
        assert "*So* it is.\n\nMore." in after


@pytest.mark.parametrize(
    "markdown",
    [
        block("", "print(source(linear))"),
        block(' html="1"', "print(show(figure))"),
        block(' source="above" result="text"', 'print("| a |")'),
        '```python\nprint("| a |")\n```\n',
    ],
)
def test_what_is_shown_or_short_is_not_folded(fold, markdown):
    assert fold(markdown) == markdown


def test_other_pages_stay_as_they_are(fold, monkeypatch):
    markdown = block("", 'print("| a |")')
    assert fold(markdown) != markdown
    monkeypatch.setattr(PAGE.file, "src_uri", "use.md")
    assert fold(markdown) == markdown
