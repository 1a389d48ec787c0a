"""An extension of griffe, which reads the docstrings for the API reference."""

import inspect
import itertools
from pathlib import Path
from typing import Any

import griffe
from rst import to_markdown

import pvt_ref.errors

_ERRORS = [name for name, thing in vars(pvt_ref.errors).items() if inspect.isclass(thing)]


class Markdown(griffe.Extension):
    """Rewrites each docstring as it is found, and links the errors that it names."""

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        """Called by griffe for every module: in each, all errors are known, imported or not."""
        for name in _ERRORS:
            if name not in mod.members and mod.path != "pvt_ref.errors":
                mod.set_member(name, griffe.Alias(name, f"pvt_ref.errors.{name}"))
                mod.imports[name] = f"pvt_ref.errors.{name}"  # what is imported is not listed again

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Called by griffe for every attribute: comments beside or above fields describe them."""
        if attr.docstring or not isinstance(attr.parent, griffe.Class) or not attr.lineno:
            return
        assert isinstance(attr.filepath, Path)  # a list is only a namespace package's
        before = attr.lines_collection[attr.filepath][: attr.lineno]
        comment = before.pop().partition("  # ")[2]
        if not comment:
            above = itertools.takewhile(lambda line: line.lstrip().startswith("# "), before[::-1])
            comment = " ".join(line.strip()[2:] for line in list(above)[::-1])
        if comment:
            attr.docstring = griffe.Docstring(to_markdown(comment), parent=attr)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
