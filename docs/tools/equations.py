r"""A hook of mkdocs: equations become HTML and MathML while the site is built.

So they are read without JavaScript and without a network, and TeX that is wrong fails the build.
KaTeX comes from npm (package.json beside this file) and runs in QuickJS, inside this process.

A page may name its symbols in its front matter, each with what it is called in code and tables::

    symbols:
      W: weight
      C_\text{in}: C_in
      \hat{x}: x_hat

They are marked in its equations, and assets/symbols.js lights up what belongs together.
"""

import html
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import quickjs
from mkdocs.exceptions import PluginError

KATEX = Path(__file__).parent / "node_modules" / "katex" / "dist"

#: What the arithmatex extension leaves of an equation, in a line and on lines of its own.
EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>'
    r"(?P<follows>[.,;:!?)]*)",  # a sign right after it
    re.DOTALL,
)


_ANNOTATION = re.compile(r"(<annotation[^>]*>).*?(</annotation>)", re.DOTALL)


@cache
def _renderer() -> Any:
    script = KATEX / "katex.min.js"
    if not script.is_file():
        raise PluginError(
            f"{script} is missing: equations need KaTeX from npm. 'make docs' fetches it; by "
            f"hand: npm ci --prefix {Path(__file__).parent}"
        )
    context = quickjs.Context()
    context.eval(script.read_text(encoding="utf-8"))
    context.eval(
        "function render(tex, display) { return katex.renderToString(tex, "
        "{displayMode: display, throwOnError: true, "
        # only what mark() puts in: nothing else of KaTeX's HTML extension, no links
        "trust: (c) => c.command === '\\\\htmlData', "
        "strict: (c) => c === 'htmlExtension' ? 'ignore' : 'error'}); }"
    )
    return context.get("render")


def render(tex: str, display: bool) -> str:
    """An equation as HTML for the eye and MathML for screen readers.

    Raises:
        PluginError: if KaTeX does not understand it.
    """
    try:
        return _renderer()(tex, display)
    except quickjs.JSException as error:
        raise PluginError(f"KaTeX refuses {tex!r}: {str(error).splitlines()[0]}") from error


#: What TeX is made of: a command that takes a word, with it; another command; one character.
_TOKEN = re.compile(
    r"\\(?:begin|end|text|operatorname|mathrm|mathsf|mathbb|mathbf|mathcal|tag)\*?\s*\{[^{}]*\}"
    r"|\\[A-Za-z]+|\\.|.",
    re.DOTALL,
)


def _marked(symbol: str, number: int) -> str:
    """A symbol with its number; base and script apart, so that one more index finds its place."""
    found = re.match(r"([^_^']+)([_^']?)(.*)$", symbol)
    assert found is not None
    base, script, rest = found.groups()
    marks = [f"{{\\htmlData{{symbol={number}}}{{{base}}}}}", script]
    if rest:
        rest = rest[1:-1] if rest.startswith("{") else rest
        marks.append(f"{{\\htmlData{{symbol={number}}}{{{rest}}}}}")
    return "".join(marks)


def mark(tex: str, symbols: list[str]) -> str:
    """The same with every occurrence of the symbols marked by its number, longest symbol first.

    A letter inside a command's name, or inside the word that it takes, is no symbol.
    """
    longest_first = sorted(range(len(symbols)), key=lambda number: -len(symbols[number]))
    out, place = [], 0
    while place < len(tex):
        for number in longest_first:
            symbol = symbols[number]
            after = tex[place + len(symbol) : place + len(symbol) + 1]
            word = symbol[-1].isalpha() and re.search(r"\\[A-Za-z]+$", symbol)
            if tex.startswith(symbol, place) and not (word and after.isalpha()):
                out.append(_marked(symbol, number))
                place += len(symbol)
                break
        else:
            token = _TOKEN.match(tex, place)
            assert token is not None  # its last alternative takes anything
            out.append(token[0])
            place = token.end()
    return "".join(out)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Every equation of a page, and the names of its symbols; called by mkdocs."""
    names = {str(key): str(value).split() for key, value in page.meta.get("symbols", {}).items()}
    used: set[int] = set()

    def replace(match: re.Match[str]) -> str:
        display = match["tag"] == "div"
        tex = html.unescape(match["tex"])
        marked = mark(tex, list(names))
        used.update(map(int, re.findall(r"\\htmlData\{symbol=(\d+)\}", marked)))
        try:
            shown = render(marked, display)
        except PluginError as error:
            raise PluginError(f"{page.file.src_path}: {error}") from error
        # the TeX that readers copy, or have read to them, is what was written
        written = html.escape(tex, quote=False)
        shown = _ANNOTATION.sub(lambda found: found[1] + written + found[2], shown)
        equation = f'<{match["tag"]} class="equation">{shown}</{match["tag"]}>{match["follows"]}'
        in_one_piece = shown.count('class="base"') == 1  # a longer one may be broken at the margin
        if match["follows"] and not display and in_one_piece:
            return f'<span class="together">{equation}</span>'
        return equation

    output = EQUATION.sub(replace, output)
    unused = [key for number, key in enumerate(names) if number not in used]
    if unused:
        raise PluginError(f"{page.file.src_path}: no equation holds the symbols {unused}")
    if not names:
        return output
    record = json.dumps(list(names.values())).replace("<", "\\u003c")
    script = f'<script type="application/json" id="symbols">{record}</script>'
    return output.replace("</body>", f"{script}</body>")
