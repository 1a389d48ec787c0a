"""An extension of griffe, which reads the docstrings for the API reference."""

import inspect
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

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
