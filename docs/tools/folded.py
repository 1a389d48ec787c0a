"""A hook of mkdocs: the code of tables and figures is there too, folded below them.

So whoever wants to run a page finds all that it ran.
"""

import re
import textwrap
from typing import Any

#: A block whose output alone is shown, and the caption of a figure.
_HIDDEN = re.compile(
    r'^```python exec="1"(?:(?P<figure> html="1")|(?P<told> result="text"))? session="\w+"\n'
    r"(?P<code>.*?)^```\n"
    r"(?(figure)(?:\n\*[^*\n].*?(?=\n\n|\Z))?)",
    re.DOTALL | re.MULTILINE,
)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with every page, before anything of it runs; changes those of the course."""
    if not page.file.src_uri.startswith("course/"):
        return markdown

    def with_code(match: re.Match[str]) -> str:
        code = match["code"]
        if match["figure"] and code.count("\n") > 4:
            title = "The code of the figure"
        elif "print(shapes(" in code:
            title = "The code of the table, and of the arrays used below"
        elif match["told"] or re.search(r'print\(f?"\| ', code):
            title = "The code of the table"
        else:
            return match[0]
        block = textwrap.indent(f"```python\n{code}```\n", "    ", lambda line: line.strip() != "")
        return f'{match[0]}\n\n??? note "{title}"\n\n{block}'

    return _HIDDEN.sub(with_code, markdown)
