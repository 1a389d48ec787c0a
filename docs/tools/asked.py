"""A hook of mkdocs: questions that come back, at the end of each page of the course.

They stand in docs/questions/ (see questions.py). From there they go three ways: to the end of their
page, to the page of them all (review.md), and into a file for Anki. They open and close without
JavaScript; assets/recall.js adds grades, and remembers when each question is due.
"""

import csv
import io
import re
from typing import Any

import markdown
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url
from questions import Question, read, titles

REVIEW = "review.md"

#: The export for Anki, as the site has it.
ANKI = "review/pvt_ref.txt"

#: Where in review.md the questions go.
_HERE = "<!-- the questions of all pages -->"

_SECTION = """

## Questions that come back { data-search-exclude }

Answer each in your head, then open it. If you grade your answers, the questions
[come back](../review.md) when they are due.

<div class="recall explore"></div>

"""


def _as_markdown(question: Question, more: str = "") -> str:
    return (
        '<details class="question recall-question explore" '
        f'data-question="{question.id}" markdown="1">\n'
        f'<summary markdown="span">{question.text}</summary>\n\n{question.answer}\n\n{more}'
        "</details>\n\n"
    )


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with every page: adds its questions, or all of them."""
    if page.file.src_uri == REVIEW:
        parts = []
        for name, title in titles(config["nav"]).items():
            more = f"[{title}](course/{name}.md)\n\n"
            parts.append(f"## {title}\n\n")
            parts += [_as_markdown(question, more) for question in read(name)]
        assert _HERE in markdown
        return markdown.replace(_HERE, "".join(parts))
    folder, _, name = page.file.src_uri.removesuffix(".md").rpartition("/")
    asked = read(name) if folder == "course" else []
    if not asked:
        return markdown
    return markdown.rstrip() + _SECTION + "".join(map(_as_markdown, asked))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Called by mkdocs with every page: those with questions get the scripts."""
    if 'class="recall explore"' not in output:
        return output
    scripts = "".join(
        f'<script defer src="{get_relative_url(path, page.url)}"></script>'
        for path in ("assets/ts-fsrs/index.umd.js", "assets/recall.js")
    )
    return output.replace("</body>", f"{scripts}</body>")


def _as_html(text: str) -> str:
    r"""Markdown as one line of HTML, its TeX between \( and \), which Anki renders."""
    html = markdown.markdown(
        text,
        extensions=["pymdownx.arithmatex"],
        extension_configs={"pymdownx.arithmatex": {"generic": True}},
    )
    html = re.sub(r'<span class="arithmatex">(.*?)</span>', r"\1", html, flags=re.DOTALL)
    if html.count("<p>") == 1:
        html = html.removeprefix("<p>").removesuffix("</p>")
    return html.replace("\n", " ")


def anki(nav: list[Any]) -> str:
    """All questions as a text file that Anki imports.

    The first column is Anki's key of a note. A file that is imported again renews its notes and
    leaves what Anki knows of their answers.
    """
    out = io.StringIO()
    out.write("#separator:tab\n#html:true\n#guid column:1\n#deck column:2\n#tags column:5\n")
    rows = csv.writer(out, delimiter="\t", lineterminator="\n")
    for name, title in titles(nav).items():
        deck = "pvt_ref::" + re.sub(r"^\d+", lambda number: number[0].zfill(2), title)
        for question in read(name):
            front, back = _as_html(question.text), _as_html(question.answer)
            rows.writerow((f"pvt_ref-{question.id}", deck, front, back, f"pvt_ref {name}"))
    return out.getvalue()


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs when it has found the files of the site."""
    files.append(File.generated(config, ANKI, content=anki(config["nav"])))
    return files
