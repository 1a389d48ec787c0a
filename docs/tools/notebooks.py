"""A hook of mkdocs: every page of the course is there as a Jupyter notebook, too.

A notebook has the page's text, equations and code, in the page's order, and nothing that was
computed: its reader runs it. Two builds of one commit give the same bytes. If the environment
variable REPOSITORY names a repository on GitHub and a commit (``owner/name@commit``), as in
.github/workflows/docs.yml, a notebook fetches that where there is no checkout, and its page links
to Colab.
"""

import json
import os
import re
from typing import Any, NamedTuple
from urllib.parse import urljoin

from in_notebook import unfold

#: The branch of the repository that Colab opens notebooks from; docs.yml puts them there.
BRANCH = "notebooks"


class Address(NamedTuple):
    """Where the repository is, and what of it."""

    repository: str  # owner/name on GitHub
    commit: str

    @property
    def site(self) -> str:
        """Where GitHub Pages shows the site, unless it has a domain of its own."""
        owner, name = self.repository.split("/")
        own = name.lower() == f"{owner.lower()}.github.io"
        return f"https://{owner.lower()}.github.io/" + ("" if own else f"{name}/")

    def colab(self, page: str) -> str:
        """The link that opens a page's notebook in Colab."""
        there = f"{self.repository}/blob/{BRANCH}/{page}.ipynb"
        return f"https://colab.research.google.com/github/{there}"


def address() -> Address | None:
    """From the environment, or None where nobody has said.

    Raises:
        ValueError: if REPOSITORY is not of the form ``owner/name@commit``.
    """
    said = os.environ.get("REPOSITORY", "")
    if not said:
        return None
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", said)
    if found is None:
        raise ValueError(
            f"REPOSITORY is {said!r}; it must be owner/name@commit, as in the repository's address "
            "https://github.com/owner/name, and the commit's 40 digits"
        )
    return Address(found[1], found[2])


# The first cell -----------------------------------------------------------------------------------

_BEGIN = """\
import sys
from pathlib import Path

here = Path.cwd()
checkout = next((p for p in (here, *here.parents) if (p / "docs/tools/lesson.py").is_file()), None)
if checkout is None:
{missing}
sys.path[:0] = [str(checkout), str(checkout / "docs" / "tools")]

import in_notebook
import pvt_ref

in_notebook.begin()
print(f"pvt_ref {{pvt_ref.__version__}} of {{checkout}}")
"""

_UNKNOWN = """\
    raise FileNotFoundError(
        f"there is no checkout of pvt_ref at {here} or above it. Put this notebook into one, after "
        "pip install '.[plots]' there, and run it again"
    )
"""

_FETCHED = """\
    import subprocess

    checkout = here / "pvt_ref-{short}"
    if not checkout.exists():
        address = "https://github.com/{repository}"
        subprocess.run(["git", "clone", "-q", address, str(checkout)], check=True)
        subprocess.run(["git", "-C", str(checkout), "checkout", "-q", "{commit}"], check=True)
    wanted = f"{{checkout}}[plots]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
"""


def first_cell(at: Address | None) -> str:
    """Code that finds the package and what pages share, in a checkout at or above the notebook."""
    missing = _UNKNOWN
    if at is not None:
        missing = _FETCHED.format(repository=at.repository, commit=at.commit, short=at.commit[:7])
    return _BEGIN.format(missing=missing.rstrip("\n"))


# Text ---------------------------------------------------------------------------------------------

#: A block that runs on the page: what follows exec="1", and the code.
_RUN = re.compile(r'^```python exec="1"([^\n]*)\n(.*?)^```$\n?', re.DOTALL | re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)
_FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
#: What Jupyter's Markdown does not know; a page that uses it needs more lines here.
_STRANGE = re.compile(r"^(?:!!!|===) |--8<--|\{ ?[.#:][\w-]", re.MULTILINE)


def _text(markdown: str, page: str, base: str) -> str:
    """Text as Jupyter reads it: $$ around equations, a fold of HTML, links to the site's pages."""

    def linked(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        path = re.sub(r"\.md$", ".html", path) or f"{page}.html"
        return (
            match[1] + urljoin(f"{base}course/" if base else "", path + hash_ + anchor) + match[3]
        )

    parts = _FENCED.split(markdown)
    for number in range(0, len(parts), 2):  # every second one is code
        part = re.sub(r"^\\[\[\]]$", "$$", parts[number], flags=re.MULTILINE)
        if strange := _STRANGE.search(part):
            raise ValueError(
                f"course/{page}.md: a notebook cannot show {strange[0]!r}; see {__file__}"
            )
        parts[number] = _LINK.sub(linked, part)
    return "".join(parts)


# The notebook -------------------------------------------------------------------------------------


def _code(source: str, hidden: bool) -> dict[str, Any]:
    metadata = {"jupyter": {"source_hidden": True}} if hidden else {}
    code = {"cell_type": "code", "execution_count": None, "metadata": metadata, "outputs": []}
    return code | {"source": source}


def notebook(markdown: str, page: str, at: Address | None = None) -> dict[str, Any]:
    """A page as a notebook, nbformat 4.5: its text, and each block that runs on it as a cell.

    Args:
        markdown: the page's source.
        page: its name, ``gelu``.
        at: where the repository is, if that is known.

    Returns:
        The notebook, to be written as JSON.

    Raises:
        ValueError: if the page has Markdown that a notebook would show wrongly.
    """
    base = at.site if at else ""
    cells: list[dict[str, Any]] = []

    def add_text(text: str) -> None:
        text = _text(unfold(text), page, base)
        for section in re.split(r"^(?=## )", text, flags=re.MULTILINE):
            if section.strip():
                cells.append({"cell_type": "markdown", "metadata": {}, "source": section.strip()})

    text, place = _FRONT_MATTER.sub("", markdown), 0
    for block in _RUN.finditer(text):
        add_text(text[place : block.start()])
        place = block.end()
        head = ""
        if 'result="text"' not in block[1]:
            head = f"# prints {'HTML' if 'html=' in block[1] else 'Markdown'}\n"
        cells.append(_code(head + block[2].rstrip("\n"), hidden="source=" not in block[1]))
    add_text(text[place:])
    cells.insert(1, _code(first_cell(at).rstrip("\n"), hidden=False))
    for number, cell in enumerate(cells):
        cell["id"] = f"{page}-{number}"
        cell["source"] = cell["source"].splitlines(keepends=True)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


# Called by mkdocs ---------------------------------------------------------------------------------


def _page(file: Any) -> str | None:
    """The name of a lesson of the course, or None."""
    found = re.fullmatch(r"course/(?!index\.)(\w+)\.md", file.src_uri)
    return found[1] if found else None


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs when it has found the files of the site."""
    from mkdocs.structure.files import File  # which the tests of the rest do without

    at = address()
    for file in list(files):
        page = _page(file)
        if page:
            written = json.dumps(
                notebook(file.content_string, page, at),
                indent=1,
                ensure_ascii=False,
                sort_keys=True,
            )
            files.append(File.generated(config, f"course/{page}.ipynb", content=written + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with every page; those of the course end in a link to their notebook."""
    name, at = _page(page.file), address()
    if name is None:
        return markdown
    link = f'[`{name}.ipynb`]({name}.ipynb){{ download="{name}.ipynb" }}'
    how = "It runs inside a checkout of the repository. There is no link to Colab: this site was "
    how += "built without the repository's address."
    if at is not None:
        how = f"It runs by itself, or [in Colab]({at.colab(name)})."
    return f"{markdown}\n\n**This page as a notebook:** {link}. {how}\n"
