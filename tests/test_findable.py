"""What the search is told of a page; what it then finds, tests/check_site.py sees in a browser."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def findable(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "tools"))
    yield importlib.import_module("findable")
    sys.modules.pop("findable", None)


def meta_of(findable, path, **said):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=path), meta=said)
    findable.on_page_markdown("", page, None, None)
    return page.meta


def test_what_explains_comes_before_what_lists(findable):
    def boost(path, **said):
        return meta_of(findable, path, **said).get("search", {}).get("boost", 1.0)

    assert boost("course/sra.md") > boost("how_to/head.md") > boost("use.md") == 1.0
    assert boost("course/index.md") == 1.0 > boost("api/layers.md")
    assert boost("api/layers.md", search={"boost": 2.0}) == 2.0  # a page may say it itself


def test_words_lead_to_pages_that_exist_and_to_one_each(findable):
    words = [word.lower() for words in findable.WORDS.values() for word in words]
    assert len(words) == len(set(words))
    for path, said in findable.WORDS.items():
        assert (DOCS / path).is_file(), path
        assert meta_of(findable, path)["tags"] == list(said)
    assert "tags" not in meta_of(findable, "use.md")
