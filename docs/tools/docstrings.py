"""An extension of griffe, which reads the docstrings for the API reference.

The package's docstrings are read in a terminal first, so they use the little reStructuredText that
Python's own documentation does; the reference is Markdown.
"""

import inspect
import re
from typing import Any

import griffe

import pvt_ref.errors


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


_ERRORS = [name for name, thing in vars(pvt_ref.errors).items() if inspect.isclass(thing)]


class Markdown(griffe.Extension):
    """Rewrites each docstring as it is found, and links the errors that it names."""

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        """Called by griffe for every module: in each, all errors are known, imported or not."""
        for name in _ERRORS:
            if name not in mod.members and mod.path != "pvt_ref.errors":
                mod.set_member(name, griffe.Alias(name, f"pvt_ref.errors.{name}"))
                mod.imports[name] = f"pvt_ref.errors.{name}"  # what is imported is not listed again

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
