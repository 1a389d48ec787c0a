"""Checks for your own layers: the laws that this package tests its own layers with.

``check_operation`` and ``check_vjp`` try a forward and its backward, ``close`` compares arrays, and
``shape_comments`` executes comments such as ``# (B, n, C)``. A failure is a :class:`LawError`, an
AssertionError that names the law and the first wrong entry. NumPy arrays only.
"""

from pvt_ref.testing.closeness import LawError, close
from pvt_ref.testing.comments import shape_comments
from pvt_ref.testing.laws import check_operation, check_vjp

__all__ = ["LawError", "check_operation", "check_vjp", "close", "shape_comments"]
