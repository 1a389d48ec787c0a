"""An extension of griffe, which reads the docstrings for the API reference.

The package's docstrings are read in a terminal first, so they use the little reStructuredText that
Python's own documentation does; the reference is Markdown.
"""

import re
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    """Roles become code, and the double colon before an indented block a single one."""
    text = re.sub(r":(?:func|class|meth|mod):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites each docstring as it is found."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
