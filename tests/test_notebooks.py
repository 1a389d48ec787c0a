"""The course's notebooks hold what the pages hold, in Jupyter's own form.

That they run and print what the pages show is tested on the built site: check_notebooks.py.
"""

import importlib
import io
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from loose import loose

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COURSE = sorted(page for page in (DOCS / "course").glob("*.md") if page.stem != "index")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def notebooks(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "tools"))
    monkeypatch.delenv("REPOSITORY", raising=False)
    yield importlib.import_module("notebooks")
    for name in [path.stem for path in (DOCS / "tools").glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture
def known(notebooks):
    return notebooks.Address("somebody/pvt", "0123456789" * 4)


def sources(made, kind):
    return ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_a_notebook_is_its_page(path, notebooks):
    page = path.read_text("utf-8")
    made = notebooks.notebook(page, path.stem)
    blocks = re.findall(r'^```python exec="1"(.*?)\n(.*?)\n```$', page, re.DOTALL | re.MULTILINE)
    first, *cells = sources(made, "code")
    assert "pvt_ref" in first
    assert len(cells) == len(blocks) >= 5
    for (how, code), cell in zip(blocks, cells, strict=True):
        kind = (
            ""
            if "result=" in how
            else "# prints HTML\n"
            if "html=" in how
            else "# prints Markdown\n"
        )
        assert cell == kind + code
    text = "\n\n".join(sources(made, "markdown"))
    assert text.count("$$") == 2 * len(re.findall(r"^\\\[$", page, re.MULTILINE)) > 0
    assert re.findall(r"\\tag\{\d+\}", text) == re.findall(r"\\tag\{\d+\}", page)
    assert re.findall("^#.*", FENCED.sub("", text), re.M) == re.findall(
        "^#.*", FENCED.sub("", page), re.M
    )
    # every word of the page, but for its front matter and the signs of its folds
    words = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.DOTALL)
    words = re.sub(r"^\?\?\? success ", "", words, flags=re.MULTILINE)
    words = re.sub(r'^```python exec="1".*', "", words, flags=re.MULTILINE)
    left = "\n".join("".join(cell["source"]) for cell in made["cells"])
    missing = set(re.findall(r"[\w.]+", re.sub(r"\]\([^)\s]*\)", "]", words)))
    assert missing - set(re.findall(r"[\w.]+", left)) == set()


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_a_notebook_is_what_jupyter_reads(path, notebooks):
    made = json.loads(json.dumps(notebooks.notebook(path.read_text("utf-8"), path.stem)))
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    assert set(made) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert made["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in made["cells"]]
    assert len(set(names)) == len(names)
    for cell in made["cells"]:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        more = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"id", "cell_type", "metadata", "source"} | more
        assert all(line.endswith("\n") for line in cell["source"][:-1])
    assert [cell["cell_type"] for cell in made["cells"][:2]] == ["markdown", "code"]
    text = FENCED.sub("", "\n".join(sources(made, "markdown")))
    assert not re.search(r"^(\\[\[\]]|\?\?\?|!!!)|\.md[)#]|--8<--", text, re.MULTILINE)


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_links_lead_to_the_site(path, notebooks, known):
    page = path.read_text("utf-8")
    inside = set()
    for at in (None, known):
        text = "\n".join(sources(notebooks.notebook(page, path.stem, at), "markdown"))
        links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text))
        ours = [link for link in links if "://" not in link]
        if at is not None:
            assert ours == []
            base = "https://somebody.github.io/pvt/"
            assert {link for link in links if link.startswith(base)} == {
                base + there.relative_to(DOCS).as_posix() + anchor for there, anchor in inside
            }
        for link in ours:
            there, hash_, anchor = link.partition("#")
            inside.add(((DOCS / "course" / there).resolve(), hash_ + anchor))
    assert inside
    for there, _ in inside:
        assert there.with_suffix(".md").is_file() or there.is_file(), there


def test_what_jupyter_would_show_wrongly_is_refused(notebooks):
    for strange in ('!!! note "x"\n', "x { .wide }\n", '--8<-- "x.md"\n', '=== "tab"\n'):
        with pytest.raises(ValueError, match=r"course/odd.md: a notebook cannot show"):
            notebooks.notebook(f"# Odd\n\n{strange}", "odd")


def test_the_repository_s_address_is_told_or_said_to_be_unknown(notebooks, monkeypatch):
    def last_line(name="course/gelu.md"):
        page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
        return notebooks.on_page_markdown("text", page, None, None).splitlines()[-1]

    assert "gelu.ipynb" in last_line()
    assert "no link to Colab" in last_line()
    assert last_line("use.md") == "text"
    commit = "0123456789" * 4
    monkeypatch.setenv("REPOSITORY", f"Some.body/pvt@{commit}")
    colab = "https://colab.research.google.com/github/Some.body/pvt/blob/notebooks/gelu.ipynb"
    assert f"[in Colab]({colab})" in last_line()
    assert notebooks.address().site == "https://some.body.github.io/pvt/"
    assert notebooks.address().commit == commit
    monkeypatch.setenv("REPOSITORY", f"you/You.github.io@{commit}")
    assert notebooks.address().site == "https://you.github.io/"
    for wrong in ("you/pvt", f"https://github.com/you/pvt@{commit}", f"you@{commit}"):
        monkeypatch.setenv("REPOSITORY", wrong)
        with pytest.raises(ValueError, match="it must be owner/name@commit"):
            notebooks.address()


def run_first_cell(notebooks, at):
    exec(notebooks.first_cell(at), {})


def test_the_first_cell_finds_the_checkout_above_it(notebooks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(DOCS / "course")
    run_first_cell(notebooks, None)
    assert sys.path[:2] == [str(ROOT), str(DOCS / "tools")]
    assert str(ROOT) in capsys.readouterr().out


def test_without_a_checkout_the_first_cell_says_so_or_fetches_it(
    notebooks, known, monkeypatch, tmp_path
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkout of pvt_ref") as found:
        run_first_cell(notebooks, None)
    assert str(tmp_path) in str(found.value)
    done = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: done.append(command))
    run_first_cell(notebooks, known)
    there = tmp_path / "pvt_ref-0123456"
    assert done == [
        ["git", "clone", "-q", "https://github.com/somebody/pvt", str(there)],
        ["git", "-C", str(there), "checkout", "-q", known.commit],
        [sys.executable, "-m", "pip", "install", "-q", f"{there}[plots]"],
    ]
    assert sys.path[0] == str(there)


class Shell:
    """As much of IPython as the notebooks ask for."""

    def __init__(self):
        self.events, self.called = self, {}

    def register(self, name, function):
        self.called.setdefault(name, []).append(function)

    def run(self, cell, names):
        info = SimpleNamespace(raw_cell=cell)
        for function in self.called["pre_run_cell"]:
            function(info)
        try:
            exec(cell, names)
        finally:
            for function in self.called["post_run_cell"]:
                function(None)


@pytest.fixture
def shell(notebooks, monkeypatch):
    shown, shell = [], loose(Shell())
    display = SimpleNamespace(
        display=shown.append,
        HTML=lambda text: ("HTML", text),
        Markdown=lambda text: ("Markdown", text),
    )
    fake = SimpleNamespace(display=display, get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    in_notebook = importlib.import_module("in_notebook")
    in_notebook.begin()
    in_notebook.begin()  # the first cell, run again
    shell.shown = shown
    return shell


def test_a_notebook_shows_what_is_printed_as_the_page_does(shell, capsys):
    shell.run("# prints Markdown\nfor k in range(2):\n    print(f'| {k} |')", {})
    shell.run("# prints HTML\nprint('<svg/>')", {})
    shell.run("print('plain')", {})
    shell.run("# prints Markdown\nprint('??? note \"kernel.cu\"\\n    text')", {})
    assert shell.shown.pop() == (
        "Markdown",
        "<details>\n<summary>kernel.cu</summary>\n\ntext\n\n</details>\n\n",
    )
    assert shell.shown[0] == ("Markdown", "| 0 |\n| 1 |\n")
    kind, html = shell.shown[1]
    assert kind == "HTML"
    assert html.endswith("><svg/>\n</div>")
    for colour in ("ink", "faint", "paper", *"12345"):
        assert re.search(rf"--figure-{colour}: #\w+", html), colour
    assert len(shell.shown) == 2
    assert capsys.readouterr().out == "plain\n"


def test_a_cell_that_raises_gives_the_output_back(shell):
    before = sys.stdout
    with pytest.raises(ZeroDivisionError):
        shell.run("# prints Markdown\nprint('so far')\n1 / 0", {})
    assert sys.stdout is before
    assert shell.shown == [("Markdown", "so far\n")]


def test_outside_of_a_notebook_a_cell_just_prints(notebooks, monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    in_notebook = importlib.import_module("in_notebook")
    before = sys.stdout
    assert in_notebook.begin() is None
    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(display=None, get_ipython=io.StringIO)
    )
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
    assert in_notebook.begin() is None
    assert sys.stdout is before


def test_a_fold_keeps_what_is_in_it(notebooks):
    inside = "Text.\n\n```python\nif x:\n    y\n```"
    page = '# A\n\n??? success "Solution"\n' + textwrap.indent(inside, "    ") + "\n\nB\n"
    (text,) = sources(notebooks.notebook(page, "a"), "markdown")
    folded = f"<details>\n<summary>Solution</summary>\n\n{inside}\n\n</details>"
    assert text == f"# A\n\n{folded}\n\nB"
