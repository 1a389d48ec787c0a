r"""A hook of mkdocs: each letter of an equation has one meaning, or the site is not built.

letters.toml beside this file holds the letters of the whole course. A page may use others, if it
says in its front matter what they are; a letter of the whole course it may not use otherwise::

    letters:
      'p': a key, of $m$
      's, t': row and column of a token in its patch

What a page says there stands folded at the end of its first section.
"""

import html
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_suffix(".toml")

#: Commands whose argument is a word, or a label, and holds no letter.
_WORDS = ("text", "textbf", "textit", "operatorname", "mathrm", "begin", "end", "tag")
#: Commands that make another letter of a letter: a bold one is none of the plain ones.
_FONTS = ("mathbf", "mathcal", "mathbb")
_GREEK = re.compile(
    "(var)?(alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|"
    "phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega)|ell"
)

_TRANSPOSED = re.compile(r"\\mathsf\s*\{?\s*T\s*\}?")
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?\s*")
#: Primes and what is above do not part a letter from the word below it.
_WORD_BELOW = re.compile(r"'*(?:\s*\^(?:\{[^{}]*\}|.))?\s*_\s*\{?\s*\\text\s*\{([^{}]*)\}")


def _argument(tex: str, start: int) -> tuple[str, int]:
    """The argument of a command, and where it ends."""
    if tex[start : start + 1] != "{":
        token = re.compile(r"\\[A-Za-z]+|.|$", re.DOTALL).match(tex, start)
        assert token is not None
        return token[0], token.end()
    depth = 0
    for end in range(start, len(tex)):
        depth += (tex[end] == "{") - (tex[end] == "}")
        if depth == 0:
            return tex[start + 1 : end], end + 1
    raise ValueError(f"a brace is not closed: {tex}")


def letters_in(tex: str) -> Iterator[tuple[str, ...]]:
    r"""The letters of an equation, each as the names by which it may be known, the closest first.

    An index that is a word belongs to its letter: $d_\text{head}$ is ``d_\text{head}``, or a d.
    """
    tex = _TRANSPOSED.sub(" ", tex)
    place = 0
    while place < len(tex):
        command = _COMMAND.match(tex, place)
        if tex.startswith("\\\\", place):  # the end of a line
            letter, place = "", place + 2
        elif command is None:
            letter, place = tex[place] if tex[place].isalpha() else "", place + 1
        elif command[1] in _WORDS:
            letter, place = "", _argument(tex, command.end())[1]
        elif command[1] in _FONTS:
            inside, place = _argument(tex, command.end())
            letter = f"\\{command[1]}{{{inside}}}"
        else:  # an accent leaves the letter what it is, which comes next
            letter = command[0].strip() if _GREEK.fullmatch(command[1]) else ""
            place = command.end()
        if letter:
            word = _WORD_BELOW.match(tex, place)
            yield (*((f"{letter}_\\text{{{word[1]}}}",) if word else ()), letter)


def read_letters(stated: dict[str, str]) -> dict[str, str]:
    """Meanings by letter, of a table whose keys may hold several, parted by commas."""
    return {
        letter.strip(): meaning
        for letters, meaning in stated.items()
        for letter in letters.split(",")
    }


def _course() -> dict[str, str]:
    return tomllib.loads(_FILE.read_text("utf-8"))


def _table(rows: dict[str, str]) -> str:
    lines = ["| letter | what it is |", "| --- | --- |"]
    for letters, meaning in rows.items():
        lines.append(f"| {', '.join(f'${x.strip()}$' for x in letters.split(','))} | {meaning} |")
    return "\n".join(lines)


def course_letters() -> str:
    """The letters of the whole course, as a table."""
    return _table(_course())


def wrong_letters(equations: list[str], stated: dict[str, str]) -> list[str]:
    """What is wrong with the letters of a page: used and unknown, stated and known, or unused.

    Args:
        equations: all TeX of the page.
        stated: its front matter's letters.
    """
    known, here = read_letters(_course()), read_letters(stated)
    wrong = [
        f"{letter} is {known[letter]!r} in the whole course, and cannot be {here[letter]!r} too"
        for letter in here
        if letter in known
    ]
    unused = set(here)
    for tex in equations:
        for names in letters_in(tex):
            found = next((name for name in names if name in here or name in known), None)
            if found is None:
                wrong.append(f"{names[0]} in {tex.strip()!r} is stated nowhere")
            unused.discard(found or "")
    return list(dict.fromkeys(wrong)) + [f"{letter} is stated, but not used" for letter in unused]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with every page; adds the table of the page's own letters."""
    stated = page.meta.get("letters")
    if not stated:
        return markdown
    table = "\n".join("    " + line for line in _table(stated).splitlines())
    folded = f'??? note "Letters of this page"\n\n{table}\n\n'
    sections = [match.start() for match in re.finditer(r"^## ", markdown, re.MULTILINE)]
    place = sections[1] if len(sections) > 1 else len(markdown)
    return f"{markdown[:place].rstrip()}\n\n{folded}{markdown[place:]}"


def on_page_content(content: str, page: Any, config: Any, files: Any) -> None:
    """Called by mkdocs with every page, when its code has run."""
    # here, since pages print the tables of this file where nothing is installed to build a site
    from asked import REVIEW
    from equations import EQUATION
    from mkdocs.exceptions import PluginError

    # questions are looked at on their own pages; the glossary compares each row with its page
    if page.file.src_uri.startswith("api/") or page.file.src_uri in (REVIEW, "glossary.md"):
        return
    equations = [html.unescape(match["tex"]) for match in EQUATION.finditer(content)]
    stated = page.meta.get("letters", {})
    for letter in read_letters(stated):
        equations.remove(letter)  # the page's own table does not use it
    if wrong := wrong_letters(equations, stated):
        raise PluginError(f"{page.file.src_path}: " + "\n".join(wrong))
