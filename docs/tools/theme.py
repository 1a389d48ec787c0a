"""A hook of mkdocs: what the theme and a plugin put into every page, put right."""

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

#: Pattern, what stands there instead, and why.
_MENDED = (
    # a dialog has to say what it is for
    (r'(<div class="md-search"[^>]*role="dialog")>', r'\1 aria-label="Search">'),
    # without a script, a keyboard opens the drawer by this box (course.css)
    (r'(<input class="md-toggle" data-md-toggle="drawer")', r'\1 aria-label="Navigation"'),
    # markdown-exec's editor for code in the browser, which no page has
    (r'\s*<link rel="stylesheet" href="[^"]*_markdown_exec_pyodide\.css">', ""),
    (r'\s*<script src="[^"]*_markdown_exec_pyodide\.js"></script>', ""),
)


def _mend(output: str, where: str) -> str:
    for pattern, replacement in _MENDED:
        output, count = re.subn(pattern, replacement, output)
        if not count:
            raise PluginError(
                f"{where}: nothing matches {pattern}; has the theme changed? See {__file__}"
            )
    return output


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with every page: what only readers of its source need is left out."""
    return re.sub(r"^> \*\*This is the source of a page\.(.*\n>)*.*\n\n", "", markdown, flags=re.M)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Called by mkdocs with every page."""
    return _mend(output, page.file.src_path)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """Called by mkdocs with the site map, and with the page that a server shows for a missing one.

    The theme's own page for that finds its style sheets only where the site's address is known.
    """
    if template_name != "404.html":
        return output_content
    return (Path(__file__).parent / "missing.html").read_text("utf-8")


#: A rule of the dark scheme, outside of any block.
_DARK = re.compile(r"(?<=\})[^{}@]*(?<!:not\()\[data-md-color-scheme=slate\][^{}]*\{[^{}]*\}")


def on_post_build(config: Any) -> None:
    """Called by mkdocs when all is written: removes what no page uses, and keeps paper light."""
    assets = Path(config["site_dir"]) / "assets"
    for file in assets.glob("_markdown_exec_pyodide.*"):  # they name another host
        file.unlink()
    shutil.rmtree(assets / "javascripts" / "lunr", ignore_errors=True)  # for other languages
    (palette,) = (assets / "stylesheets").glob("palette.*.css")
    style = palette.read_text("utf-8")
    if "@media not print{" in style:
        return  # mended by the build before, and not written since
    dark, count = _DARK.subn(r"@media not print{\g<0>}", style)
    if not count:
        raise PluginError(f"{palette} has no dark scheme; has the theme changed? See {__file__}")
    palette.write_text(dark, "utf-8")
