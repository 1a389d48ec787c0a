"""A hook of mkdocs: equations become HTML and MathML while the site is built.

So they are read without JavaScript and without a network, and TeX that is wrong fails the build.
KaTeX comes from npm (package.json beside this file) and runs in QuickJS, inside this process.
"""

import html
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import quickjs
from mkdocs.exceptions import PluginError

KATEX = Path(__file__).parent / "node_modules" / "katex" / "dist"

#: What the arithmatex extension leaves of an equation, in a line and on lines of its own.
_EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


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
        "{displayMode: display, throwOnError: true, strict: 'error'}); }"
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


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Every equation of a page; called by mkdocs."""

    def replace(match: re.Match[str]) -> str:
        display = match["tag"] == "div"
        try:
            shown = render(html.unescape(match["tex"]), display)
        except PluginError as error:
            raise PluginError(f"{page.file.src_path}: {error}") from error
        return f'<{match["tag"]} class="equation">{shown}</{match["tag"]}>'

    return _EQUATION.sub(replace, output)


def on_post_build(config: Any) -> None:
    """The style sheet and the fonts that the pages refer to; called by mkdocs."""
    target = Path(config["site_dir"]) / "assets" / "katex"
    (target / "fonts").mkdir(parents=True, exist_ok=True)
    shutil.copy(KATEX / "katex.min.css", target)
    for font in sorted((KATEX / "fonts").glob("*.woff2")):
        shutil.copy(font, target / "fonts")
