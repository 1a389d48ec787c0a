"""Kernels for NumPy arrays on the cores of a processor."""
