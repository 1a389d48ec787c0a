"""Docstrings as Markdown.

The package's docstrings are read in a terminal first, so they use the little reStructuredText that
Python's own documentation does; the pages are Markdown.
"""

import re


def to_markdown(text: str) -> str:
    """Roles become code, a double colon before a block a single one; P*P*C keeps its stars."""
    text = re.sub(r":(?:func|class|meth|mod):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    lines, literal = [], None  # the indentation of the line that a literal block follows
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if literal is None:
            # code stays as it is, and so does *args: only between two letters is a star a product
            line = re.sub(r"(`[^`]*`)|(?<=[\w)])\*(?=[\w(])", lambda m: m[1] or r"\*", line)
            if line.endswith("::"):
                line, literal = line[:-1], indent
        lines.append(line)
    return "\n".join(lines)
