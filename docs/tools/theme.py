"""A hook of mkdocs: what the theme and a plugin put into every page, put right."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

#: Pattern, what stands there instead, and why.
_MENDED = (
    # a dialog has to say what it is for
    (r'(<div class="md-search"[^>]*role="dialog")>', r'\1 aria-label="Search">'),
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


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Called by mkdocs with every page."""
    return _mend(output, page.file.src_path)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """Called by mkdocs with the page that is shown for a missing one, and with the site map."""
    return _mend(output_content, template_name) if template_name == "404.html" else output_content


def on_post_build(config: Any) -> None:
    """Called by mkdocs when all is written: that editor's files name another host, and go."""
    for file in (Path(config["site_dir"]) / "assets").glob("_markdown_exec_pyodide.*"):
        file.unlink()
