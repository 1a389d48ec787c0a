"""Twins of the operations for CuPy arrays."""
